"""Replays of workloads without a device: a pool under pressure, the padding of steps, and first tokens.

    python -m bench replay          # about half a minute

The scheduler and the block manager run as they are, with one step in flight. A step's time is modelled: llama3-8b on
one H200, fitted to measured steps. Under pressure, works run in 2,048 blocks: with and without expected growth, with
ends that the scheduler knows or not. Padding is that of decodes in a pool that holds all requests. First tokens are
those of Poisson arrivals at half of the rate that 256 rows sustain, in steps that end before one. Writes
bench/results/replay.json.
"""

import argparse
import dataclasses
from typing import Any

import numpy as np

from bench import UsageError, workloads
from bench.replay.replay import Replay, Setting, replay
from bench.replay.step_time import H200
from bench.report import Table, save, start_report
from jpaged.config import MOST_DEFAULT_ROWS, MOST_DEFAULT_TOKENS
from jpaged.device.step.inputs import all_buckets
from jpaged.device.target import TARGETS

NUM_PRESSURE_BLOCKS = 2048
NUM_BLOCKS = 51_647
"""The pool that an H200 has beside the weights of llama3-8b."""

COLUMNS = ("steps", "plans", "late", "rows/step", "fill %", "preempted", "tokens/s")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--num-requests", type=int, default=1000, metavar="N", help="requests (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Replay, print and save."""
    if args.num_requests < 1:
        raise UsageError(f"--num-requests {args.num_requests}: expected 1 or more")
    pressure = _under_pressure(args.num_requests)
    print(Table("2,048 blocks", *COLUMNS, first=68).text({title: _cells(row) for title, row in pressure.items()}))
    padding = _padding(args.num_requests)
    table = Table(f"sharegpt{args.num_requests}, 1,024 rows", "sizes", "% of row-steps", "% of time", first=68)
    print("\n" + table.text({title: list(row.values()) for title, row in padding.items()}))
    arrivals = _arrivals(args.num_requests)
    print("\nhalf of the sustained rate: " + ", ".join(f"{name} {value:.4g}" for name, value in arrivals.items()))
    report = start_report(
        args,
        num_requests=args.num_requests,
        step_time=dataclasses.asdict(H200),
        under_pressure=pressure,
        padding=padding,
        arrivals=arrivals,
    )
    print(f"\nwritten to {save('replay', report, args.out)}")
    return 0


def _cells(row: dict[str, float]) -> list[Any]:
    names = ("num_steps", "num_plans", "num_late_plans", "mean_rows", "fill_percent", "num_preemptions", "tokens_per_s")
    return [row[name] for name in names]


def _under_pressure(num_requests: int) -> dict[str, dict[str, float]]:
    """Figures of each way to admit, by title."""
    works = {
        f"sharegpt{num_requests}": workloads.sharegpt(num_requests, 1),
        "200 requests of 64 and 1,000 tokens": workloads.uniform(200, 64, 1000),
    }
    rows = {}
    for name, work in works.items():
        for knows_ends in (True, False):
            for horizon, way in ((0, "if it fits now"), (None, "by growth")):
                ends = "known ends" if knows_ends else "stops"
                setting = dataclasses.replace(_small_pool(), horizon=horizon, knows_ends=knows_ends)
                rows[f"{name}, {ends}, {way}"] = replay(work, setting).figures()
    return rows


def _small_pool() -> Setting:
    target = TARGETS["gpu"]
    buckets = all_buckets(256, 2048, target.least_rows, target.halfway_from)
    return Setting(NUM_PRESSURE_BLOCKS, tuple(buckets), 256, 2048)


def _arrivals(num_requests: int) -> dict[str, float]:
    """First tokens of requests that arrive at half of the rate at which a server of 256 rows ends them."""
    target, rows, tokens = TARGETS["gpu"], 256, MOST_DEFAULT_TOKENS
    buckets = all_buckets(rows, tokens, target.least_rows, target.halfway_from)
    setting, work = Setting(NUM_BLOCKS, tuple(buckets), rows, tokens), workloads.sharegpt(num_requests, 3)
    rate = num_requests / replay(work, setting).seconds.sum() / 2
    done = replay(work, setting, workloads.poisson_arrivals(num_requests, rate))
    figures = {"requests_per_s": rate}
    for name, values in (("steps", done.first_token_steps), ("ttft_s", done.first_token_s)):
        figures |= {f"{name}_p{percent}": float(np.percentile(values, percent)) for percent in (50, 99)}
    return figures


def _padding(num_requests: int) -> dict[str, dict[str, float]]:
    """Cost of the padding of decodes, for several lists of sizes."""
    target = TARGETS["gpu"]
    buckets = all_buckets(MOST_DEFAULT_ROWS, MOST_DEFAULT_TOKENS, target.least_rows, target.halfway_from)
    setting = Setting(NUM_BLOCKS, tuple(buckets), MOST_DEFAULT_ROWS, MOST_DEFAULT_TOKENS)
    done = replay(workloads.sharegpt(num_requests, 1), setting)
    own = [size.num_rows for size in buckets if size.is_decode]
    sizes = {
        "the engine's sizes": own,
        "powers of two, and those halfway from 64 on": [16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024],
        "every 16 rows": list(range(16, MOST_DEFAULT_ROWS + 1, 16)),
    }
    return {title: _padding_of(done, np.array(rows)) for title, rows in sizes.items()}


def _padding_of(done: Replay, sizes: np.ndarray) -> dict[str, float]:
    is_decode = done.num_tokens == done.num_rows
    num_steps, num_rows = done.num_steps[is_decode], done.num_rows[is_decode]
    padded = sizes[np.searchsorted(sizes, num_rows)]
    return {
        "num_sizes": len(sizes),
        "row_steps_percent": float(100 * (num_steps * (padded - num_rows)).sum() / (num_steps * num_rows).sum()),
        "seconds_percent": float(100 * (num_steps * H200.padding_s(num_rows, padded)).sum() / done.seconds.sum()),
    }
