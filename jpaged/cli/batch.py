"""``jpaged batch``: computes a file of requests."""

import argparse
import asyncio
import sys
from pathlib import Path

from jpaged.cli import start
from jpaged.cli.options import BATCH_OPTIONS, server_settings
from jpaged.cli.terminal import note


def run(args: argparse.Namespace) -> int:
    """Run the command. Returns the exit status: 1 if requests were lost to failures of the engine."""
    start.check_extra()
    from jpaged.server.batch import Batch, run_batch

    settings = server_settings(args, BATCH_OPTIONS)
    if args.is_leader:
        batch = Batch.open(Path(args.source), Path(args.destination))
        if not batch.waiting:
            note(f"all {batch.num_lines} requests are done")
            return 0
    llm = start.load_for_many(args)

    async def compute() -> None:
        try:
            await run_batch(llm, batch, settings, use_tqdm=sys.stderr.isatty())
        finally:
            await llm.drain(0)  # while the loop runs, which gets the output of the step that runs

    try:
        asyncio.run(compute())
    finally:
        note(f"{batch.num_done} of {batch.num_lines} requests are done, {batch.num_failed} of them with an error")
        if batch.num_lost:
            note(f"{batch.num_lost} of the errors are failures of the engine: run the command again to compute them")
    return 1 if batch.num_lost else 0
