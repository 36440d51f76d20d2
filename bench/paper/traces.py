"""Traces that every system replays, and the tally of one replay."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from bench.workloads import Workload, poisson_arrivals

WARM_UP = 0.25
"""Fraction of the arrivals' time before averages are taken: the pool fills."""


@dataclass(frozen=True)
class Decoding:
    """Decoding of a request: ``width`` samples of one prompt, or a beam search of that width."""

    width: int = 1
    is_beam_search: bool = False

    def __str__(self) -> str:
        if self.width == 1:
            return "greedy"
        return f"beam width {self.width}" if self.is_beam_search else f"n = {self.width}"


GREEDY = Decoding()


@dataclass(frozen=True)
class Trace:
    """Requests in order of arrival.

    Args:
        work: prompts and output lengths; every sequence of a request runs to the same length, as in the paper.
        arrivals_s: time of each arrival.
        decoding: decoding of all requests.
    """

    work: Workload
    arrivals_s: list[float]
    decoding: Decoding = GREEDY

    def __len__(self) -> int:
        return len(self.arrivals_s)


@dataclass(frozen=True)
class TraceMaker:
    """Traces of one kind of requests: at every rate the same requests in the same pattern, only closer in time.

    Args:
        workload: count and seed to requests.
        seconds: duration of the arrivals.
        highest_rate: largest rate, in requests/s.
        decoding: decoding of all requests.
        seed: seed of lengths, tokens and arrivals.
    """

    workload: Callable[[int, int], Workload]
    seconds: float
    highest_rate: float
    decoding: Decoding = GREEDY
    seed: int = 0

    def at(self, rate: float) -> Trace:
        """Requests that arrive in ``seconds`` at ``rate`` a second on average: Poisson arrivals."""
        assert rate <= self.highest_rate
        work = _draw(self.workload, max(1, round(self.highest_rate * self.seconds)), self.seed)
        count = max(1, round(rate * self.seconds))
        first = Workload(work.prompts[:count], work.output_lens[:count])
        return Trace(first, poisson_arrivals(count, rate, self.seed + 1).tolist(), self.decoding)


@lru_cache(maxsize=1)
def _draw(workload: Callable[[int, int], Workload], count: int, seed: int) -> Workload:
    return workload(count, seed)


@dataclass(frozen=True)
class Usage:
    """Numbers of slots by use at one moment; they sum to the pool.

    Args:
        tokens: slots that hold a token's KV.
        reserved: slots that will hold a token later.
        internal: slots of a request that never fills them.
        external: free slots, and the rounding of a buddy allocator.
    """

    tokens: int
    reserved: int
    internal: int
    external: int

    @property
    def num_slots(self) -> int:
        return self.tokens + self.reserved + self.internal + self.external


@dataclass
class Tally:
    """Measurements of one replay. The system that serves the trace is the writer.

    Args:
        trace: the trace served.
        most_latency_s: mean latency of all requests at which the replay is given up.
        is_drained: whether the replay lasts until the last request ends, instead of the last arrival.
    """

    trace: Trace
    most_latency_s: float = math.inf
    is_drained: bool = True
    batches: list[int] = field(default_factory=list)
    usages: list[Usage] = field(default_factory=list)
    num_preemptions: int = 0
    num_swaps: int = 0
    saved: float = 0.0
    """Blocks saved by sharing / blocks without sharing, over all steps."""
    _latency_sum: float = 0.0
    _num_finished: int = 0

    def finish(self, index: int, clock_s: float) -> None:
        """Count request ``index``, whose last token came at ``clock_s``."""
        latency_s = clock_s - self.trace.arrivals_s[index]
        self._latency_sum += latency_s / self.trace.work.output_lens[index]
        self._num_finished += 1

    def is_over(self, clock_s: float) -> bool:
        """Whether the replay can end."""
        if not self.is_drained:
            return clock_s > self.trace.arrivals_s[-1]
        return self._num_finished == len(self.trace) or self._latency_sum > self.most_latency_s * len(self.trace)

    def is_steady(self, clock_s: float) -> bool:
        """Whether averages are taken: requests still arrive, and the pool has had time to fill."""
        last = self.trace.arrivals_s[-1]
        return WARM_UP * last <= clock_s <= last

    @property
    def latency_s(self) -> float:
        """Mean over all requests of seconds from arrival to end, per output token; infinite if given up."""
        return self._latency_sum / len(self.trace) if self._num_finished == len(self.trace) else math.inf

    @property
    def mean_batch(self) -> float:
        """Requests in a step, on average over the steady steps."""
        return float(np.mean(self.batches)) if self.batches else 0.0

    def mean_usage(self) -> dict[str, float]:
        """Percentages of the pool, on average over the steady steps."""
        names = ("tokens", "reserved", "internal", "external")
        return {
            name: float(np.mean([100 * getattr(u, name) / u.num_slots for u in self.usages] or [0])) for name in names
        }
