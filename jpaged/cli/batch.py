"""``jpaged batch``: computes a file of requests."""

import argparse
import asyncio
import os
import sys
from pathlib import Path

from jpaged.cli import start
from jpaged.cli.options import BATCH_OPTIONS, model_aliases, server_settings
from jpaged.cli.terminal import note


def run(args: argparse.Namespace) -> int:
    """Run the command. Returns the exit status: 1 if requests were lost to failures of the engine."""
    start.check_extra()
    from jpaged.engine.health import EngineDeadError, HealthState
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
            await run_batch(llm, batch, settings, model_aliases(args), use_tqdm=sys.stderr.isatty())
        finally:
            if llm.health().state is not HealthState.HUNG:
                await llm.drain(0)  # while the loop runs, which gets the output of the step that runs

    is_lost = False
    try:
        asyncio.run(compute())
    except EngineDeadError as error:
        is_lost = True
        note(f"jpaged: error: {error}")
    finally:
        note(f"{batch.num_done} of {batch.num_lines} requests are done, {batch.num_failed} of them with an error")
        if batch.num_lost:
            note(f"{batch.num_lost} of the errors are failures of the engine: run the command again to compute them")
    if llm.health().state is HealthState.HUNG:
        sys.stdout.flush()
        os._exit(1)  # the engine's thread would keep the process
    return 1 if is_lost or batch.num_lost else 0
