"""``jpaged serve``: serves a model over HTTP."""

import argparse
import logging
from collections.abc import Iterator
from contextlib import contextmanager

from jpaged.cli import start
from jpaged.cli.options import SERVER_OPTIONS, model_aliases, server_settings
from jpaged.cli.terminal import note


def run(args: argparse.Namespace) -> int:
    """Run the command. Returns the exit status."""
    start.check_extra()
    from jpaged.server.run import serve

    settings = server_settings(args, SERVER_OPTIONS)
    if not args.is_leader:
        start.load_for_many(args)  # raises Followed in the end
    name = settings.served_model_name
    with _log_to_stderr():
        return serve(
            lambda: start.load_for_many(args),
            settings,
            lambda address: note(f"{name} is served at {address}"),
            model_aliases(args),
        )


@contextmanager
def _log_to_stderr() -> Iterator[None]:
    """Show the log of the server, of which a library shows warnings only."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log = logging.getLogger("jpaged")
    before = log.level, log.propagate
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(before[0])
        log.propagate = before[1]
