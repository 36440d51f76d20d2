"""Experiments: independent simulations, then figures beside the paper's, as text, JSON and plots."""

import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bench.report import Table as TextTable

WIDTH = 110

type Paper = float | tuple[float, float] | None
"""The paper's figure: a number, the ends of a range, or None if the paper states no number."""


@dataclass(frozen=True)
class Row:
    """One figure of ours beside the paper's."""

    label: str
    paper: Paper
    ours: float
    unit: str = ""

    @property
    def ratio(self) -> float | None:
        """Ours over the paper's; over the nearer end of a range, 1 inside it."""
        if self.paper is None:
            return None
        low, high = self.paper if isinstance(self.paper, tuple) else (self.paper, self.paper)
        return self.ours / min(max(self.ours, low), high)


@dataclass(frozen=True)
class Table:
    """Figures of ours that the paper only plots.

    Args:
        title: name and unit of the figures.
        columns: heads.
        rows: a figure for each column, by label.
    """

    title: str
    columns: Sequence[object]
    rows: Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Plot:
    """One pair of axes, with lines or with bars.

    Args:
        title, x, y: labels.
        lines: xs and ys of each line, by name; values that are not finite are left out.
        bars: heights of named bars, by group.
        is_stacked: whether a group's bars stand on each other; "group" then names a part, and a bar a column.
        top: upper limit of y.
        has_log_x: whether x is logarithmic.
    """

    title: str
    y: str
    x: str = ""
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]] = field(default_factory=dict)
    bars: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    is_stacked: bool = False
    top: float | None = None
    has_log_x: bool = False


@dataclass(frozen=True)
class Report:
    """The outcome of one experiment.

    Args:
        setting: the simulation, in a line.
        rows: figures beside the paper's.
        tables: other figures.
        notes: where and why ours differs from the paper's.
        plots: axes of the plot, from left to right, three in a row at most.
        data: all measurements, for the result file.
    """

    setting: str
    rows: Sequence[Row]
    tables: Sequence[Table]
    notes: str
    plots: Sequence[Plot]
    data: Any


@dataclass(frozen=True)
class Experiment:
    """One figure of the paper.

    Args:
        name: "fig12".
        title: subject of the figure.
        tasks: scale of the traces (1 for all of it) to independent simulations, by key. Tasks and results are
            picklable.
        report: the tasks' results, by key, to the outcome.
    """

    name: str
    title: str
    tasks: Callable[[float], Mapping[Any, Callable[[], Any]]]
    report: Callable[[Mapping[Any, Any]], Report]


def render(experiment: Experiment, report: Report) -> str:
    """The tables of one experiment, with its notes."""
    figures = TextTable("", "paper", "ours", "ratio", "", first=60, width=9)
    lines = [f"{experiment.name}: {experiment.title}", *_wrapped(report.setting), "", figures.header()]
    lines += [
        figures.row(f"  {row.label}", _show(row.paper), row.ours, row.ratio, f" {row.unit}") for row in report.rows
    ]
    for table in report.tables:
        rows = {f"    {label}": list(values) for label, values in table.rows.items()}
        lines += ["", TextTable(f"  {table.title}", *table.columns, first=30).text(rows)]
    return "\n".join([*lines, "", *_wrapped(report.notes), ""])


def to_json(experiment: Experiment, report: Report) -> dict[str, Any]:
    """The whole report, and the measurements behind it."""
    return {
        "title": experiment.title,
        "setting": report.setting,
        "figures": [asdict(row) | {"ratio": row.ratio} for row in report.rows],
        "tables": [asdict(table) for table in report.tables],
        "notes": report.notes,
        "data": report.data,
    }


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent="  ", subsequent_indent="  ")


def _show(paper: Paper) -> str:
    if paper is None:
        return ""
    return "-".join(f"{end:g}" for end in paper) if isinstance(paper, tuple) else f"{paper:g}"


# Plots ----------------------------------------------------------------------------------------------------------------

_STYLES = {
    "FasterTransformer": ("tab:gray", "v"),
    "Orca (Max)": ("tab:red", "s"),
    "Orca (Pow2)": ("tab:orange", "^"),
    "Orca (Oracle)": ("tab:green", "D"),
    "jpaged": ("tab:blue", "o"),
    "paper": ("lightgray", "o"),
}


def save_plots(reports: Mapping[str, Report], directory: Path) -> str:
    """Draw a PNG for each report. Returns where; without matplotlib, how to install it."""
    done = [save_plot(report.plots, directory / f"{name}.png") for name, report in reports.items()]
    return f"plots in {directory}" if all(done) else "no plots: pip install '.[bench]' brings matplotlib"


def save_plot(plots: Sequence[Plot], path: Path, *, title: str | None = None, has_log_y: bool = False) -> bool:
    """Draw some axes into a PNG; False without matplotlib. ``has_log_y`` is of the first axes."""
    if find_spec("matplotlib") is None:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    path.parent.mkdir(parents=True, exist_ok=True)
    num_columns = min(len(plots), 3)
    num_rows = -(-len(plots) // num_columns)
    figure = Figure(figsize=(8, 1.7 * (1 + num_rows)), dpi=80, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title or "", fontsize=10)
    grid = figure.subplots(num_rows, num_columns, squeeze=False)
    for axes, plot in zip(grid.flat, plots, strict=True):
        _draw_lines(axes, plot) if plot.lines else _draw_bars(axes, plot)
        axes.set(title=plot.title, xlabel=plot.x, ylabel=plot.y)
        if plot.top is not None:
            axes.set_ylim(0, plot.top)
    if has_log_y:
        figure.axes[0].set_yscale("log")
    handles = figure.axes[-1].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=5, fontsize=8)
    figure.savefig(path)
    return True


def _draw_lines(axes: Any, plot: Plot) -> None:
    for name, (xs, ys) in plot.lines.items():
        color, marker = _STYLES.get(name, (None, "o"))
        axes.plot(xs, ys, label=name, color=color, marker=marker, markersize=3, linewidth=1)
    axes.set_ylim(0)
    if plot.has_log_x:
        axes.set_xscale("log", base=2)
    axes.grid(alpha=0.3)


def _draw_bars(axes: Any, plot: Plot) -> None:
    if plot.is_stacked:
        bottoms: dict[str, float] = dict.fromkeys(next(iter(plot.bars.values())), 0.0)
        for part, heights in plot.bars.items():
            axes.bar(list(bottoms), list(heights.values()), bottom=list(bottoms.values()), label=part)
            bottoms = {name: bottom + heights[name] for name, bottom in bottoms.items()}
        return
    names = list(dict.fromkeys(name for bars in plot.bars.values() for name in bars))
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        heights = [bars[name] for bars in plot.bars.values() if name in bars]
        places = [place + (i + 0.5) * width - 0.4 for place, bars in enumerate(plot.bars.values()) if name in bars]
        drawn = axes.bar(places, heights, width, label=name, color=_STYLES.get(name, (None,))[0])
        axes.bar_label(drawn, fmt="%.3g", fontsize=6)
    axes.set_xticks(range(len(plot.bars)), list(plot.bars), fontsize=8)
