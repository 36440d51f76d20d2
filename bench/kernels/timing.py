"""Device time of a program, from runs queued one behind the other."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import jax

LONG_CHAIN_S, MAX_RUNS = 0.03, 256
"""Wanted duration of the runs that are timed together, and their largest number."""

PATIENCE_S, MIN_SAMPLES = 3.0, 3
"""Sampling stops after this time, once there are this many samples."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds that one run keeps the device busy, over several samples."""

    median_s: float
    fastest_s: float
    slowest_s: float
    num_samples: int

    def divided(self, by: int) -> "Timing":
        """The timing of one of ``by`` equal parts of the program."""
        return Timing(self.median_s / by, self.fastest_s / by, self.slowest_s / by, self.num_samples)


def time_program(
    program: Callable[..., Any], state: Any, args: tuple[Any, ...], num_samples: int
) -> tuple[Timing, Any]:
    """Time ``state = program(state, *args)``, a compiled program that may donate its state.

    A sample is the time of a long chain of runs less that of a single run, divided by the further runs. So the cost of
    waiting drops out, and dispatching hides behind the device's work.

    Returns:
        The timing, and the last state.
    """

    def chain(num_runs: int) -> float:
        nonlocal state
        start = time.perf_counter()
        for _ in range(num_runs):
            state = program(state, *args)
        jax.block_until_ready(state)
        return time.perf_counter() - start

    chain(1)  # loads the program
    num_runs = min(max(round(LONG_CHAIN_S / chain(1)), 1), MAX_RUNS)
    samples, begin = [], time.perf_counter()
    while len(samples) < num_samples:
        single = chain(1)
        samples.append((chain(1 + num_runs) - single) / num_runs)
        if len(samples) >= MIN_SAMPLES and time.perf_counter() - begin > PATIENCE_S:
            break
    return Timing(median(samples), min(samples), max(samples), len(samples)), state
