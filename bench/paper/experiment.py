"""What an experiment is: independent simulations, then figures beside the paper's figures and a plot."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

type Paper = float | tuple[float, float] | None
"""The paper's figure: a number, the ends of a range, or nothing it states in numbers."""


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
        title: what they are, with the unit.
        columns: heads.
        rows: a figure per column, by label.
    """

    title: str
    columns: Sequence[object]
    rows: Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Report:
    """The outcome of one experiment.

    Args:
        setting: what was simulated, in a line.
        rows: beside the paper's.
        tables: what else was measured.
        notes: where and why ours differs from the paper's.
        draw: draws the plot into an empty figure.
        data: everything measured, for the result file.
    """

    setting: str
    rows: Sequence[Row]
    tables: Sequence[Table]
    notes: str
    draw: Callable[["Figure"], None]
    data: Any


@dataclass(frozen=True)
class Experiment:
    """One figure of the paper.

    Args:
        name: "fig12".
        title: what the figure shows.
        tasks: scale of the traces (1 for all of it) to simulations that need nothing of each other, by key. Each is
            picklable, and so is what it returns.
        report: the tasks' results, by key, to the outcome.
    """

    name: str
    title: str
    tasks: Callable[[float], Mapping[Any, Callable[[], Any]]]
    report: Callable[[Mapping[Any, Any]], Report]
