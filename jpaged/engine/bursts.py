"""The length of multi-step decodes while requests arrive: a newcomer must not wait long for the end of one."""

from jpaged.host.scheduler import Scheduler

MOST_WAIT_S = 0.01
"""Time that a multi-step decode takes at most, about, while a request that arrives would find room."""

_SHARE_OF_LAST = 0.25
"""Weight of the last step in the mean time of a step."""


class Bursts:
    """Bounds the multi-step decodes of a scheduler by the times of its recent steps.

    Args:
        scheduler: its ``max_burst`` is the most so far, and follows each step from now on.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._most = scheduler.max_burst
        self._mean_step_s: float | None = None

    def note_step(self, seconds: float) -> None:
        """Bound the next multi-step decodes, after a step of the model that took so long."""
        mean = seconds if self._mean_step_s is None else self._mean_step_s
        self._mean_step_s = mean + _SHARE_OF_LAST * (seconds - mean)
        line = self._scheduler.line
        has_room = line.num_rows < self._scheduler.max_num_seqs and not line.waiting  # others come before a newcomer
        self._scheduler.max_burst = burst_for(self._mean_step_s, self._most, has_room=has_room)


def burst_for(step_s: float, most: int, *, has_room: bool) -> int:
    """The steps of a multi-step decode.

    Args:
        step_s: seconds of a step of the model.
        most: steps of the longest multi-step decode.
        has_room: whether a request that arrives could be admitted at once.
    """
    if not has_room or step_s * most <= MOST_WAIT_S:
        return most
    return max(int(MOST_WAIT_S / step_s), 1)
