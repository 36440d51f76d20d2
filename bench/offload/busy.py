"""The shares of a decode step's time in which the device computes, and in which the link copies."""

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from bench.serving.breakdown import Kernel, busy_ns, read_kernels
from bench.serving.profiling import trace
from jpaged import LLM

NUM_TRACED = 8
COPIES = "Memcpy"
"""Part of the names of copies in a profile."""


@dataclass(frozen=True, slots=True)
class Busy:
    """Shares of the time between the first and the last event of some steps.

    Args:
        computing: kernels ran.
        copying: copies from or to host memory ran, perhaps beside kernels.
        step_ms: time of a step under the profiler.
    """

    computing: float
    copying: float
    step_ms: float


def trace_steps(llm: LLM) -> Busy:
    """Profile a few steps of an engine whose requests all decode."""
    with TemporaryDirectory() as directory:
        with trace(Path(directory)):
            for _ in range(NUM_TRACED):
                llm.engine.step()
        return shares_of(read_kernels(Path(directory)))


def shares_of(kernels: list[Kernel]) -> Busy:
    """Compute the shares of ``NUM_TRACED`` steps.

    Raises:
        RuntimeError: there is no event.
    """
    if not kernels:
        raise RuntimeError(f"the profile of {NUM_TRACED} steps has no event of the device")
    first, last = min(k.start_ns for k in kernels), max(k.start_ns + k.duration_ns for k in kernels)
    copies = [kernel for kernel in kernels if COPIES in kernel.name]
    others = [kernel for kernel in kernels if COPIES not in kernel.name]
    total = last - first
    return Busy(busy_ns(others) / total, busy_ns(copies) / total, total / NUM_TRACED / 1e6)
