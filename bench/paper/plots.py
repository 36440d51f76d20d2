"""The two kinds of plots, drawn into a figure of matplotlib."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_STYLES = {
    "FasterTransformer": ("tab:gray", "v"),
    "Orca (Max)": ("tab:red", "s"),
    "Orca (Pow2)": ("tab:orange", "^"),
    "Orca (Oracle)": ("tab:green", "D"),
    "jpaged": ("tab:blue", "o"),
    "paper": ("lightgray", "o"),
}


def draw_lines(
    axes: "Axes",
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    title: str,
    x: str,
    y: str,
    top: float | None = None,
    log_x: bool = False,
) -> None:
    """One line of (xs, ys) per name; values that are not finite are left out."""
    for name, (xs, ys) in lines.items():
        color, marker = _STYLES.get(name, (None, "o"))
        axes.plot(xs, ys, label=name, color=color, marker=marker, markersize=3, linewidth=1)
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.set_ylim(0, top)
    if log_x:
        axes.set_xscale("log", base=2)
    axes.grid(alpha=0.3)


def draw_bars(axes: "Axes", groups: Mapping[str, Mapping[str, float]], *, title: str, y: str) -> None:
    """Groups of bars: per label on the x axis, the height of each named bar."""
    names = list(dict.fromkeys(name for bars in groups.values() for name in bars))
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        heights = [bars[name] for bars in groups.values() if name in bars]
        places = [place + (i + 0.5) * width - 0.4 for place, bars in enumerate(groups.values()) if name in bars]
        drawn = axes.bar(places, heights, width, label=name, color=_STYLES.get(name, (None,))[0])
        axes.bar_label(drawn, fmt="%.3g", fontsize=6)
    axes.set_xticks(range(len(groups)), list(groups), fontsize=8)
    axes.set(title=title, ylabel=y)


def add_legend(figure: "Figure", axes: "Axes") -> None:
    """What ``axes`` shows, below all plots of the figure."""
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8)
