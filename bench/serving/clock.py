"""Time of one workload: its parts, and its limit, which preparation does not use up."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

PREPARATION, TIMED, BREAKDOWN = "preparation", "timed", "breakdown"


class TimeIsUp(Exception):
    """A workload took longer than its limit, and has no figure."""


class Clock:
    """The time of one workload from the start on.

    Args:
        limit_s: seconds after which steps end. Each preparation has as many of its own.
        end: when everything ends, by ``time.perf_counter``.

    Raises:
        TimeIsUp: everything has ended.

    Attributes:
        deadline: when the current part ends, by ``time.perf_counter``.
        seconds: time of each part so far.
    """

    def __init__(self, limit_s: float = float("inf"), end: float = float("inf")) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._began = time.perf_counter()
        self._limit_s = limit_s
        self._end = end
        self.extend()

    def extend(self) -> None:
        """Begin another limit, for a further run of the workload.

        Raises:
            TimeIsUp: everything has ended.
        """
        now = time.perf_counter()
        if now >= self._end:
            raise TimeIsUp
        self.deadline = min(now + self._limit_s, self._end)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time a part, which no other part contains."""
        began, deadline = time.perf_counter(), self.deadline
        if name == PREPARATION:
            self.deadline = min(began + self._limit_s, self._end)
        try:
            yield
        finally:
            elapsed_s = time.perf_counter() - began
            self.seconds[name] += elapsed_s
            self.deadline = min(deadline + elapsed_s, self._end) if name == PREPARATION else deadline

    def summary(self) -> dict[str, float]:
        """Seconds of each part so far, and "total"."""
        return {name: self.seconds[name] for name in (PREPARATION, TIMED, BREAKDOWN)} | {
            "total": time.perf_counter() - self._began
        }
