"""Reports as text, JSON and plots."""

import dataclasses
import textwrap
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bench.paper.experiment import Experiment, Paper, Report

WIDTH = 110


def render(experiment: Experiment, report: Report) -> str:
    """The table of one experiment, with its notes."""
    lines = [f"{experiment.name}: {experiment.title}", *_wrapped(report.setting), ""]
    lines.append(f"  {'':58} {'paper':>12} {'ours':>10} {'ratio':>7}")
    for row in report.rows:
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        lines.append(f"  {row.label:58} {_show_paper(row.paper):>12} {_show(row.ours):>10} {ratio:>7} {row.unit}")
    for table in report.tables:
        lines += ["", f"  {table.title:28}" + "".join(f"{column!s:>9}" for column in table.columns)]
        lines += [
            f"    {label:26}" + "".join(f"{_show(value):>9}" for value in row) for label, row in table.rows.items()
        ]
    return "\n".join([*lines, "", *_wrapped(report.notes), ""])


def to_json(experiment: Experiment, report: Report) -> dict[str, Any]:
    """Everything a report says, and the measurements behind it."""
    return {
        "title": experiment.title,
        "setting": report.setting,
        "figures": [
            {"label": row.label, "paper": row.paper, "ours": row.ours, "ratio": row.ratio, "unit": row.unit}
            for row in report.rows
        ],
        "tables": [dataclasses.asdict(table) for table in report.tables],
        "notes": report.notes,
        "data": report.data,
    }


def save_plots(reports: Mapping[str, Report], directory: Path) -> str:
    """Draw a PNG per report, and say where they are; without matplotlib, how to get them."""
    if find_spec("matplotlib") is None:
        return "no plots: pip install '.[bench]' brings matplotlib"
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    directory.mkdir(parents=True, exist_ok=True)
    for name, report in reports.items():
        figure = Figure(figsize=(8, 3.4), dpi=80, layout="constrained")
        FigureCanvasAgg(figure)
        report.draw(figure)
        figure.savefig(directory / f"{name}.png")
    return f"plots in {directory}"


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent="  ", subsequent_indent="  ")


def _show(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 1 else f"{value:.2f}" if abs(value) < 1000 else f"{value:,.0f}"


def _show_paper(paper: Paper) -> str:
    if paper is None:
        return ""
    return "-".join(f"{end:g}" for end in paper) if isinstance(paper, tuple) else f"{paper:g}"
