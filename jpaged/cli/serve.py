"""``jpaged serve``: serves a model over HTTP."""

import argparse
import logging

from jpaged.cli import start
from jpaged.cli.options import SERVER_OPTIONS, server_settings
from jpaged.cli.terminal import note


def run(args: argparse.Namespace) -> int:
    """Run the command. Returns the exit status."""
    start.check_extra()
    from jpaged.server.run import serve

    settings = server_settings(args, SERVER_OPTIONS)
    if not args.is_leader:
        start.load_for_many(args)  # raises Followed in the end
    _log_to_stderr()
    name = settings.served_model_name
    return serve(lambda: start.load_for_many(args), settings, lambda address: note(f"{name} is served at {address}"))


def _log_to_stderr() -> None:
    """Show the log of the server, of which a library shows warnings only."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log = logging.getLogger("jpaged")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
