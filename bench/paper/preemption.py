"""Experiments on how a preempted request comes back: figure 19."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from bench.paper.blocks import BLOCK_SIZES
from bench.paper.experiment import Experiment, Report, Row, Table
from bench.paper.memory import DATASETS, Load
from bench.paper.paged import Paged
from bench.paper.plots import add_legend, draw_lines
from bench.paper.step_time import A100, NUM_SLOTS
from bench.paper.sustained import measure_latency
from bench.paper.traces import TraceMaker

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PREEMPTED_LEN = 512
"""Tokens of the one request preempted in the microbenchmark."""

PAPER_PIECES_PER_BLOCK = 2 * 40
"""Where keys and values of each of 40 layers are pools of their own, a block is moved in so many pieces."""

LOAD = Load("ShareGPT", 3.0, 300)
"""A rate at which requests are preempted all the time."""

WAYS = {
    "recompute": Paged(),
    "swap": Paged(preemption="swap", num_host_slots=NUM_SLOTS),
    "swap, a pool per layer": Paged(
        preemption="swap", num_host_slots=NUM_SLOTS, pieces_per_block=PAPER_PIECES_PER_BLOCK
    ),
}
"""The host pool is as large as the device's (section 4.5 bounds it so)."""


@dataclass(frozen=True)
class Recovery:
    """One replay: latency per output token, and how often requests were preempted and swapped."""

    latency_s: float
    num_preemptions: int
    num_swaps: int


def measure_recovery(way: str, block_size: int, scale: float) -> Recovery:
    """Serve ``LOAD`` to its end."""
    system = replace(WAYS[way], block_size=block_size)
    traces = TraceMaker(DATASETS[LOAD.dataset], scale * LOAD.seconds, LOAD.rate)
    tally = measure_latency(system, traces.at(LOAD.rate))
    return Recovery(tally.latency_s, tally.num_preemptions, tally.num_swaps)


def recovery_s(way: str, block_size: int) -> float:
    """One preemption alone on the modelled machine: out and in over the link, or one prefill."""
    if way == "recompute":
        return A100.compute_s(PREEMPTED_LEN, PREEMPTED_LEN, math.ceil(PREEMPTED_LEN / block_size))
    num_blocks = math.ceil(PREEMPTED_LEN / block_size)
    return 2 * A100.transfer_s(num_blocks * block_size, num_blocks * WAYS[way].pieces_per_block)


def _tasks(scale: float) -> dict[tuple[str, int], Callable[[], Recovery]]:
    return {(way, size): partial(measure_recovery, way, size, scale) for way in WAYS for size in BLOCK_SIZES}


def _report(results: Mapping[tuple[str, int], Recovery]) -> Report:
    per_layer = "swap, a pool per layer"
    alone = {way: [1e3 * recovery_s(way, size) for size in BLOCK_SIZES] for way in WAYS}
    whole = {way: [results[way, size].latency_s for size in BLOCK_SIZES] for way in WAYS}
    worst = max(recompute / swap for recompute, swap in zip(alone["recompute"], alone[per_layer], strict=True))
    rows = [Row("one preemption: most of recompute / swap, a pool per layer", (0, 1.2), worst, "x")]
    rows += [
        Row(
            f"{LOAD}: {way} / recompute, blocks of {size}",
            1.0 if way == per_layer else None,
            results[way, size].latency_s / results["recompute", size].latency_s,
            "x",
        )
        for way in ("swap", per_layer)
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
            "The paper's finding, that small blocks make swapping slow, is one of its layout: KV of each layer in a "
            f"pool of its own moves a block in {PAPER_PIECES_PER_BLOCK} pieces. Here a block holds all layers and is "
            "one piece, so swapping costs the same at any size. Where the paper calls both comparable (blocks of 16 to "
            "64), swapping wins here: its transfers hide behind the steps, and a prefill of the model is slow beside "
            "the link."
        ),
        draw=partial(_draw, results),
        data={f"{way}, {size}": vars(recovery) for (way, size), recovery in results.items()},
    )


def _draw(results: Mapping[tuple[str, int], Recovery], figure: "Figure") -> None:
    alone, whole = figure.subplots(1, 2)
    lines: dict[str, Any] = {way: (BLOCK_SIZES, [1e3 * recovery_s(way, size) for size in BLOCK_SIZES]) for way in WAYS}
    draw_lines(alone, lines, title="One preemption", x="tokens in a block", y="ms", top=300, log_x=True)
    lines = {way: (BLOCK_SIZES, [results[way, size].latency_s for size in BLOCK_SIZES]) for way in WAYS}
    draw_lines(whole, lines, title=str(LOAD), x="tokens in a block", y="s / output token", log_x=True)
    add_legend(figure, whole)


FIG19 = Experiment("fig19", "Recovery by swapping and by recomputation", _tasks, _report)
