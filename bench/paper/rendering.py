"""Reports as text, JSON and plots."""

import dataclasses
import textwrap
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bench.paper.experiment import Experiment, Paper, Report
from bench.report import Table

WIDTH = 110


def render(experiment: Experiment, report: Report) -> str:
    """The table of one experiment, with its notes."""
    lines = [f"{experiment.name}: {experiment.title}", *_wrapped(report.setting), ""]
    figures = Table("", "paper", "ours", "ratio", "", first=60, width=9)
    lines.append(figures.header())
    lines += [figures.row(f"  {r.label}", _show(r.paper), r.ours, r.ratio, f" {r.unit}") for r in report.rows]
    for table in report.tables:
        rows = {f"    {label}": list(values) for label, values in table.rows.items()}
        lines += ["", Table(f"  {table.title}", *table.columns, first=30).text(rows)]
    return "\n".join([*lines, "", *_wrapped(report.notes), ""])


def to_json(experiment: Experiment, report: Report) -> dict[str, Any]:
    """The whole report, and the measurements behind it."""
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
    """Draw a PNG per report. Returns where; without matplotlib, how to install it."""
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


def _show(paper: Paper) -> str:
    if paper is None:
        return ""
    return "-".join(f"{end:g}" for end in paper) if isinstance(paper, tuple) else f"{paper:g}"
