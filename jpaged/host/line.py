"""The line: the groups that wait and those that run, each in the order in which they are served."""

from bisect import insort
from collections.abc import Sequence

from jpaged.host.policies.order import schedule_order
from jpaged.host.sequence import SequenceGroup


class Line:
    """Two queues in schedule order. Of equal priority, every running group arrived before every waiting one."""

    def __init__(self) -> None:
        self._waiting: list[SequenceGroup] = []  # new or preempted
        self._running: list[SequenceGroup] = []
        self._preempted: set[SequenceGroup] = set()  # by the plan under construction

    @property
    def waiting(self) -> Sequence[SequenceGroup]:
        """The groups that wait, new or preempted."""
        return self._waiting

    @property
    def running(self) -> Sequence[SequenceGroup]:
        """The groups that run."""
        return self._running

    @property
    def first(self) -> SequenceGroup | None:
        """The group that is admitted next."""
        return self._waiting[0] if self._waiting else None

    @property
    def num_rows(self) -> int:
        """Count the rows that the running groups may come to need."""
        return sum(group.num_rows for group in self._running)

    def running_after(self, priority: int) -> list[SequenceGroup]:
        """The running groups that are served after all of this priority."""
        if not self._running or self._running[-1].request.priority <= priority:
            return []
        return [group for group in self._running if group.request.priority > priority]

    def begin_plan(self) -> None:
        """Start a plan: no group has been preempted by it."""
        self._preempted.clear()

    def is_preempted_now(self, group: SequenceGroup) -> bool:
        """Whether the plan under construction preempts this group, whose blocks may therefore still be moving."""
        return group in self._preempted

    def join(self, group: SequenceGroup) -> None:
        """Let a group wait."""
        insort(self._waiting, group, key=schedule_order)

    def admit_first(self) -> SequenceGroup:
        """Let the first waiting group run."""
        group = self._waiting.pop(0)
        insort(self._running, group, key=schedule_order)
        return group

    def preempt(self, group: SequenceGroup) -> None:
        """Let a running group wait again."""
        self._running.remove(group)
        self.join(group)
        self._preempted.add(group)

    def preempt_all(self) -> int:
        """Let all groups wait again, outside of a plan. Returns how many were running."""
        num_running = len(self._running)
        for group in self._running:
            self.join(group)
        self._running.clear()
        return num_running

    def leave(self, group: SequenceGroup) -> None:
        """Remove a group that has ended, or was pinned."""
        (self._running if group in self._running else self._waiting).remove(group)
