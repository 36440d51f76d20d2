"""The ``jpaged`` command. JAX loads inside the commands, so that ``--help`` is quick."""

import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module

from jpaged.cli.options import as_typed, make_parser
from jpaged.cli.start import Followed, join
from jpaged.cli.terminal import note, one_line


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments after the program's name; None takes the process's own.

    Returns:
        The exit status: 0; 1 if a server has lost its engine; 2 for a mistake of the caller's; 130 after Ctrl-C; 141
        when stdout is closed.

    Raises:
        ValueError, OSError, NotImplementedError: a mistake of the caller's, with ``--debug``.
    """
    args = make_parser().parse_args(argv)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # XLA's own log: errors only
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    try:
        _quieten_libtpu()
        by_hand = args.coordinator_address, args.num_processes, args.process_id
        if args.distributed or any(value is not None for value in by_hand):
            join(args)
        status = import_module(f"jpaged.cli.{args.command}").run(args)
        sys.stdout.flush()
    except Followed:
        return 0
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter's last flush would fail
        return 141
    except (ValueError, OSError, NotImplementedError) as error:
        if args.debug:
            raise
        message = one_line(error)
        note(f"jpaged: error: {as_typed(message) if _is_ours(error) else f'{message} (--debug shows where)'}")
        return 2
    return status or 0


def _quieten_libtpu() -> None:
    """Keep an installed libtpu from printing errors on a machine without a TPU, where JAX still loads it."""
    import jax  # noqa: F401  (sets TPU_SKIP_MDS_QUERY where no TPU is attached)

    if "TPU_SKIP_MDS_QUERY" in os.environ:  # libtpu then takes both values from the environment alone
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")


def _is_ours(error: Exception) -> bool:
    """Whether jpaged raised it, so that it says what to do. Errors of others may come from a mistake in jpaged."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_globals.get("__name__", "").partition(".")[0] == "jpaged"
