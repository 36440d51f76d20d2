"""The health of an engine that serves: what its steps do, and whether they do it."""

import enum
from dataclasses import dataclass

from jpaged.progress import Progress

HANGS_AFTER_S = 30.0
"""A step that runs for longer is taken to hang. Compilation does not count."""

MAX_FAILURES = 3
"""Failures in a row after which the requests in the step end with an error."""


class HealthState(enum.StrEnum):
    """The state of an engine that serves."""

    OK = "ok"
    COMPILING = "compiling"  # a program that a step needs, or a step waits until host memory is pinned
    DRAINING = "draining"  # takes no more requests, and ends with those that it has
    FAILING = "failing"  # ``MAX_FAILURES`` steps in a row, and none since went well
    HUNG = "hung"  # the step that runs
    STOPPED = "stopped"
    DEAD = "dead"  # ended by an error


@dataclass(frozen=True, slots=True)
class Health:
    """The health of an engine now. Times are of ``time.monotonic``.

    Args:
        state: the state.
        error: the error of the last step, if that failed, or of the thread that ended.
        num_failures: steps that failed in a row.
        step_began: start of the step that runs; None between steps.
        step_ended: end of the last step; None before the first.
        compiling: progress of the programs that are compiled while steps run; None if all that can be are there.
    """

    state: HealthState
    error: str | None
    num_failures: int
    step_began: float | None
    step_ended: float | None
    compiling: Progress | None = None

    @property
    def is_healthy(self) -> bool:
        """Whether requests get their tokens."""
        return self.state in (HealthState.OK, HealthState.COMPILING, HealthState.DRAINING)

    @property
    def is_ready(self) -> bool:
        """Whether new requests are taken, and get their tokens."""
        return self.state in (HealthState.OK, HealthState.COMPILING)


class EngineDeadError(RuntimeError):
    """The engine takes no more requests: it was shut down, or it ended with an error."""
