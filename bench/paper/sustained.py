"""Normalised latency over request rate, and the rate that a system sustains (figures 12, 14, 16, 17)."""

import math
from dataclasses import dataclass
from typing import Protocol

from bench.paper.traces import Tally, Trace, TraceMaker

LATENCY_BOUND_S = 0.2
"""Largest mean over requests of seconds per output token at a sustained rate. It is about the speed of reading, and
every curve of the paper is steep there."""

RATE_STEP = math.sqrt(2)
NUM_BISECTIONS = 3


class System(Protocol):
    """A system that can replay a trace."""

    @property
    def name(self) -> str: ...

    def serve(self, trace: Trace, tally: Tally) -> None: ...


@dataclass(frozen=True)
class Sweep:
    """Latency of one system at rising rates.

    Args:
        rates: requests/s, ascending.
        latencies_s: seconds per output token, mean over requests; infinite where the replay was given up.
        sustained: the rate at which the mean crosses ``LATENCY_BOUND_S``, interpolated between the nearest two; the
            last rate tried if none exceeds it (traces too short for queues to build).
    """

    rates: list[float]
    latencies_s: list[float]
    sustained: float


def measure_latency(system: System, trace: Trace, most_latency_s: float = math.inf) -> Tally:
    """Serve a trace to its end."""
    tally = Tally(trace, most_latency_s)
    system.serve(trace, tally)
    return tally


def sweep_rates(system: System, traces: TraceMaker, first_rate: float) -> Sweep:
    """Find the sustained rate: steps of sqrt(2) up (or down) from ``first_rate``, then bisection.

    Replays are given up at twice the bound.
    """
    most_s = 2 * LATENCY_BOUND_S
    latency_at: dict[float, float] = {}

    def is_sustained(rate: float) -> bool:
        latency_at[rate] = measure_latency(system, traces.at(rate), most_s).latency_s
        return latency_at[rate] <= LATENCY_BOUND_S

    below, above = first_rate, first_rate
    if is_sustained(first_rate):
        above *= RATE_STEP
        while above <= traces.highest_rate and is_sustained(above):
            below, above = above, above * RATE_STEP
    else:
        below /= RATE_STEP
        while not is_sustained(below):
            below, above = below / RATE_STEP, below
    sustained = below
    if above in latency_at:
        for _ in range(NUM_BISECTIONS):
            middle = math.sqrt(below * above)
            below, above = (middle, above) if is_sustained(middle) else (below, middle)
        low, high = latency_at[below], min(latency_at[above], most_s)
        sustained = below + (above - below) * (LATENCY_BOUND_S - low) / (high - low)
    rates = sorted(latency_at)
    return Sweep(rates, [latency_at[rate] for rate in rates], sustained)
