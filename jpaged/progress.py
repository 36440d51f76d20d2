"""Progress of work that takes long: shown as a bar, and told to the code that watches."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

from tqdm import tqdm


class Progress(NamedTuple):
    """Progress of one kind of work.

    Args:
        state: the kind: "loading" for weights, in bytes; "compiling" for programs.
        done: units that are done.
        of: units in all.
    """

    state: str
    done: int
    of: int


_report: ContextVar[Callable[[Progress], None] | None] = ContextVar("report", default=None)


@contextmanager
def watched(report: Callable[[Progress], None]) -> Iterator[None]:
    """Tell ``report`` of the progress of all work that a block does in this thread."""
    token = _report.set(report)
    try:
        yield
    finally:
        _report.reset(token)


@contextmanager
def counted(state: str, total: int, *, label: str, unit: str, is_shown: bool) -> Iterator[Callable[[int], None]]:
    """Count the units of work that a block does, behind a progress bar.

    Args:
        state: see ``Progress``.
        total: units in all.
        label: words before the bar.
        unit: the unit, after numbers; numbers of bytes ("B") are shortened.
        is_shown: whether to show the bar.

    Returns:
        A function that counts units as done.
    """
    report, done = _report.get(), 0
    with tqdm(total=total, desc=label, unit=unit, unit_scale=unit == "B", disable=not is_shown) as bar:

        def count(units: int) -> None:
            nonlocal done
            done += units
            bar.update(units)
            if report is not None:
                report(Progress(state, done, total))

        count(0)
        yield count
