"""Experiments on the block size: figure 18b."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING

from bench.paper.experiment import Experiment, Report, Row, Table
from bench.paper.memory import DATASETS, Load
from bench.paper.paged import Paged
from bench.paper.plots import add_legend, draw_lines
from bench.paper.sustained import measure_latency
from bench.paper.traces import TraceMaker

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLOCK_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
LOADS = Load("ShareGPT", 2.6, 300), Load("Alpaca", 56, 60)
"""Fixed rates a little below what block size 16 sustains: what a size costs is felt."""


def measure_block_size(load: Load, block_size: int, scale: float) -> float:
    """Mean seconds per output token."""
    traces = TraceMaker(DATASETS[load.dataset], scale * load.seconds, load.rate)
    return measure_latency(Paged(block_size), traces.at(load.rate)).latency_s


def _tasks(scale: float) -> dict[tuple[Load, int], Callable[[], float]]:
    return {(load, size): partial(measure_block_size, load, size, scale) for load in LOADS for size in BLOCK_SIZES}


def _report(results: Mapping[tuple[Load, int], float]) -> Report:
    rows = []
    for load, best in zip(LOADS, ((16, 128), (16, 32)), strict=True):
        ours = min(BLOCK_SIZES, key=lambda size: results[load, size])
        rows.append(Row(f"{load.dataset}: best block size", best, ours, "tokens"))
    return Report(
        setting="Mean seconds per output token at a fixed rate",
        rows=rows,
        tables=[
            Table(
                "s/token by block size",
                BLOCK_SIZES,
                {str(load): [results[load, size] for size in BLOCK_SIZES] for load in LOADS},
            )
        ],
        notes=(
            "Small blocks pay the model's cost of each block read, large ones waste the rest of each sequence's last "
            "block, the more the shorter the sequences."
        ),
        draw=partial(_draw, results),
        data={f"{load}: {size}": latency for (load, size), latency in results.items()},
    )


def _draw(results: Mapping[tuple[Load, int], float], figure: "Figure") -> None:
    lines = {str(load): (BLOCK_SIZES, [results[load, size] for size in BLOCK_SIZES]) for load in LOADS}
    axes = figure.subplots()
    draw_lines(axes, lines, title="Block size", x="tokens in a block", y="s / output token", log_x=True)
    add_legend(figure, axes)


FIG18B = Experiment("fig18b", "Latency over block size", _tasks, _report)
