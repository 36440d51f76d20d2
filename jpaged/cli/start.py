"""Starts what commands need: the LLM, and the other processes that share it."""

import argparse
import sys
from importlib import import_module
from typing import TYPE_CHECKING

from jpaged.cli.options import MAX_BATCHED_TOKENS, SERVING_OPTIONS, engine_settings

if TYPE_CHECKING:
    from jpaged.async_llm import AsyncLLM
    from jpaged.llm import LLM


class Followed(Exception):
    """This process did what the leading one decided, which is all that it had to do."""


def load(args: argparse.Namespace, *, num_sequences: int) -> "LLM":
    """The LLM that the options ask for. Each program is compiled when it is first needed: a command needs few.

    Args:
        args: the options given.
        num_sequences: sequences that run at once.

    Raises:
        Followed: another process leads, and has ended.
    """
    from jpaged.llm import LLM

    settings = engine_settings(args)
    num_rows = settings["max_num_seqs"] = num_sequences if args.max_num_seqs is None else args.max_num_seqs
    if args.max_num_batched_tokens is None:
        # A block of a prompt fits beside the decodes, as 8-bit pools need.
        settings["max_num_batched_tokens"] = max(MAX_BATCHED_TOKENS, num_rows + args.block_size)
    llm = LLM(
        args.model,
        enable_prefix_caching=not args.no_prefix_caching,
        warm_up="none",
        use_tqdm=sys.stderr.isatty(),
        **settings,
    )
    if not llm.is_leader:
        llm.follow()
        raise Followed
    return llm


def load_for_many(args: argparse.Namespace) -> "AsyncLLM":
    """The engine for the requests of many clients.

    Raises:
        Followed: another process leads, and has ended.
    """
    from jpaged.async_llm import AsyncLLM
    from jpaged.llm import LLM

    llm = LLM(
        args.model,
        enable_prefix_caching=not args.no_prefix_caching,
        warm_up=args.warm_up,
        use_tqdm=sys.stderr.isatty(),
        **engine_settings(args, SERVING_OPTIONS),
    )
    if not llm.is_leader:
        llm.follow()
        raise Followed
    return AsyncLLM.from_llm(llm)


def check_extra() -> None:
    """Check that the libraries of the server are there.

    Raises:
        ValueError: one is missing.
    """
    try:
        import_module("jpaged.server.run")
    except ModuleNotFoundError as error:
        raise ValueError(f"{error.name} is not installed, which a server needs: pip install 'jpaged[serve]'") from error


def join(args: argparse.Namespace) -> None:
    """Bring this process together with the others; ``args`` then says whether it leads."""
    import jax

    from jpaged.device.processes import join_processes

    join_processes(args.coordinator_address, args.num_processes, args.process_id)
    args.is_leader = jax.process_index() == 0
