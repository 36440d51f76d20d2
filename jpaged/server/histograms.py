"""Histograms that cost an event loop little, and the values of the last minute."""

from bisect import bisect_left
from collections import deque
from collections.abc import Mapping, Sequence
from itertools import accumulate
from time import monotonic

from prometheus_client.core import HistogramMetricFamily
from prometheus_client.utils import floatToGoString

RECENT_S = 60.0
"""Values of ``Recent`` that are older no longer count."""

MAX_RECENT = 4096
"""Most observations that ``Recent`` keeps."""


class Histogram:
    """Counts of values by their size, for Prometheus. One thread observes.

    Args:
        name: the name of the family.
        help_: its meaning, in words.
        bounds: upper bounds of the buckets, ascending; the last bucket has none.
    """

    def __init__(self, name: str, help_: str, bounds: Sequence[float]) -> None:
        self.name = name
        self.help = help_
        self._bounds = list(bounds)
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, count: int = 1) -> None:
        """Count a value, so many times."""
        self._counts[bisect_left(self._bounds, value)] += count
        self._sum += value * count

    @property
    def count(self) -> int:
        """The number of values."""
        return sum(self._counts)

    def family(self, labels: Mapping[str, str], name: str = "") -> HistogramMetricFamily:
        """The histogram as Prometheus reads it, under another name if one is given."""
        edges = [*map(floatToGoString, self._bounds), "+Inf"]
        family = HistogramMetricFamily(name or self.name, self.help, labels=list(labels))
        buckets = list(zip(edges, accumulate(self._counts), strict=True))
        family.add_metric(list(labels.values()), buckets, self._sum)
        return family


class Recent:
    """The values of the last minute, for quantiles. One thread uses it."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, float, int]] = deque(maxlen=MAX_RECENT)  # when, value, how many

    def add(self, value: float, count: int = 1) -> None:
        """Take a value that was seen now, so many times."""
        self._seen.append((monotonic(), value, count))

    def quantiles(self, *fractions: float) -> list[float | None]:
        """The value below which each fraction of the values lies; None without values."""
        while self._seen and self._seen[0][0] < monotonic() - RECENT_S:
            self._seen.popleft()
        values = sorted((value, count) for _, value, count in self._seen)
        if not values:
            return [None] * len(fractions)
        ranks = list(accumulate(count for _, count in values))
        return [values[min(bisect_left(ranks, fraction * ranks[-1]), len(values) - 1)][0] for fraction in fractions]


def one_two_five(most: int) -> list[float]:
    """Bounds 1, 2, 5, 10, 20, 50 and so on, up to ``most``."""
    return [float(bound) for power in range(len(str(most))) for k in (1, 2, 5) if (bound := k * 10**power) <= most]
