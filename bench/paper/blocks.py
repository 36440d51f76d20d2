"""Experiments on the block size, and on the way back of a preempted request: figures 18b and 19."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

from bench.paper.experiment import Experiment, Plot, Report, Row, Table
from bench.paper.memory import DATASETS, Load
from bench.paper.paged import Paged
from bench.paper.step_time import A100, NUM_SLOTS
from bench.paper.sustained import measure_latency
from bench.paper.traces import TraceMaker

BLOCK_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Served:
    """One replay: latency per output token, and the numbers of preemptions and swaps."""

    latency_s: float
    num_preemptions: int
    num_swaps: int


def serve(system: Paged, load: Load, scale: float) -> Served:
    """Serve ``load`` to its end."""
    traces = TraceMaker(DATASETS[load.dataset], scale * load.seconds, load.rate)
    tally = measure_latency(system, traces.at(load.rate))
    return Served(tally.latency_s, tally.num_preemptions, tally.num_swaps)


def _plot(title: str, lines: Mapping[str, list[float]], y: str = "s / output token", top: float | None = None) -> Plot:
    of_size = {name: (BLOCK_SIZES, values) for name, values in lines.items()}
    return Plot(title, y, "tokens in a block", lines=of_size, top=top, has_log_x=True)


# Figure 18b -----------------------------------------------------------------------------------------------------------

LOADS = Load("ShareGPT", 2.6, 300), Load("Alpaca", 56, 60)
"""Fixed rates a little below the limit of block size 16, so that the cost of a size shows."""


def _size_tasks(scale: float) -> dict[tuple[Load, int], Callable[[], Served]]:
    return {(load, size): partial(serve, Paged(size), load, scale) for load in LOADS for size in BLOCK_SIZES}


def _report_sizes(results: Mapping[tuple[Load, int], Served]) -> Report:
    latencies = {str(load): [results[load, size].latency_s for size in BLOCK_SIZES] for load in LOADS}
    rows = []
    for load, best in zip(LOADS, ((16, 128), (16, 32)), strict=True):
        ours = min(BLOCK_SIZES, key=lambda size: results[load, size].latency_s)
        rows.append(Row(f"{load.dataset}: best block size", best, ours, "tokens"))
    return Report(
        setting="Mean seconds per output token at a fixed rate",
        rows=rows,
        tables=[Table("s/token by block size", BLOCK_SIZES, latencies)],
        notes=(
            "Small blocks pay the model's cost of each block read, large ones waste the rest of each sequence's last "
            "block, the more the shorter the sequences."
        ),
        plots=[_plot("Block size", latencies)],
        data={f"{load}: {size}": served.latency_s for (load, size), served in results.items()},
    )


FIG18B = Experiment("fig18b", "Latency over block size", _size_tasks, _report_sizes)

# Figure 19 ------------------------------------------------------------------------------------------------------------

PREEMPTED_LEN = 512
"""Tokens of the one request preempted in the microbenchmark."""

PAPER_PIECES_PER_BLOCK = 2 * 40
"""Pieces of a block where keys and values of each of 40 layers are pools of their own."""

PREEMPTING_LOAD = Load("ShareGPT", 3.0, 300)
"""A rate at which requests are preempted all the time."""

PER_LAYER = "swap, a pool per layer"
WAYS = {
    "recompute": Paged(horizon=0),
    "swap": Paged(horizon=0, preemption="swap", num_host_slots=NUM_SLOTS),
    PER_LAYER: Paged(horizon=0, preemption="swap", num_host_slots=NUM_SLOTS, pieces_per_block=PAPER_PIECES_PER_BLOCK),
}
"""The host pool is as large as the device's (section 4.5 bounds it so). Groups start if they fit now."""


def recovery_s(way: str, block_size: int) -> float:
    """Seconds of one preemption alone on the modelled machine: out and in over the link, or one prefill."""
    num_blocks = math.ceil(PREEMPTED_LEN / block_size)
    if way == "recompute":
        return A100.compute_s(PREEMPTED_LEN, PREEMPTED_LEN, num_blocks)
    return 2 * A100.transfer_s(num_blocks * block_size, num_blocks * WAYS[way].pieces_per_block)


def _recovery_tasks(scale: float) -> dict[tuple[str, int], Callable[[], Served]]:
    return {
        (way, size): partial(serve, replace(system, block_size=size), PREEMPTING_LOAD, scale)
        for way, system in WAYS.items()
        for size in BLOCK_SIZES
    }


def _report_recovery(results: Mapping[tuple[str, int], Served]) -> Report:
    alone = {way: [1e3 * recovery_s(way, size) for size in BLOCK_SIZES] for way in WAYS}
    whole = {way: [results[way, size].latency_s for size in BLOCK_SIZES] for way in WAYS}
    worst = max(recompute / swap for recompute, swap in zip(alone["recompute"], alone[PER_LAYER], strict=True))
    rows = [Row("one preemption: most of recompute / swap, a pool per layer", (0, 1.2), worst, "x")]
    rows += [
        Row(
            f"{PREEMPTING_LOAD}: {way} / recompute, blocks of {size}",
            1.0 if way == PER_LAYER else None,
            results[way, size].latency_s / results["recompute", size].latency_s,
            "x",
        )
        for way in ("swap", PER_LAYER)
        for size in (16, 32, 64)
    ]
    return Report(
        setting=(
            f"One preemption of {PREEMPTED_LEN} tokens alone; then a whole trace in the real scheduler, where "
            f"transfers run beside the steps and the host pool holds {NUM_SLOTS:,} tokens"
        ),
        rows=rows,
        tables=[
            Table("ms of one, by block size", BLOCK_SIZES, alone),
            Table("s/token by block size", BLOCK_SIZES, whole),
        ],
        notes=(
            "The paper's finding, that small blocks make swapping slow, follows from its layout: KV of each layer in a "
            f"pool of its own moves a block in {PAPER_PIECES_PER_BLOCK} pieces. Here a block holds all layers and is "
            "one piece, so swapping costs the same at any size. Where the paper calls both comparable (blocks of 16 to "
            "64), swapping wins here: its transfers hide behind the steps, and a prefill of the model is slow beside "
            "the link."
        ),
        plots=[_plot("One preemption", alone, "ms", top=300), _plot(str(PREEMPTING_LOAD), whole)],
        data={f"{way}, {size}": vars(served) for (way, size), served in results.items()},
    )


FIG19 = Experiment("fig19", "Recovery by swapping and by recomputation", _recovery_tasks, _report_recovery)
