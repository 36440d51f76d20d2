"""The line: the groups that wait and those that run, each in the order in which they are served."""

from bisect import insort

from jpaged.host.policies.order import schedule_order
from jpaged.host.sequence import SequenceGroup


class Line:
    """Two queues in schedule order. Of equal priority, every running group arrived before every waiting one.

    Attributes:
        waiting: the groups that wait, new or preempted; written here alone.
        running: the groups that run; written here alone.
        preempted: the groups that the plan under construction preempts: their blocks may still be moving. The scheduler
            empties it before each plan.
    """

    def __init__(self) -> None:
        self.waiting: list[SequenceGroup] = []
        self.running: list[SequenceGroup] = []
        self.preempted: set[SequenceGroup] = set()

    @property
    def num_rows(self) -> int:
        """Count the rows that the running groups may come to need."""
        return sum([group.num_rows for group in self.running])

    def running_after(self, priority: int) -> list[SequenceGroup]:
        """The running groups that are served after all of this priority."""
        if not self.running or self.running[-1].request.priority <= priority:
            return []
        return [group for group in self.running if group.request.priority > priority]

    def join(self, group: SequenceGroup) -> None:
        """Let a group wait."""
        insort(self.waiting, group, key=schedule_order)

    def admit_first(self) -> SequenceGroup:
        """Let the first waiting group run."""
        group = self.waiting.pop(0)
        insort(self.running, group, key=schedule_order)
        return group

    def preempt(self, group: SequenceGroup) -> None:
        """Let a running group wait again."""
        group.num_preemptions += 1
        self.running.remove(group)
        self.join(group)
        self.preempted.add(group)

    def preempt_all(self) -> int:
        """Let all groups wait again, outside of a plan. Returns how many were running."""
        num_running = len(self.running)
        for group in self.running:
            group.num_preemptions += 1
            self.join(group)
        self.running.clear()
        return num_running

    def leave(self, group: SequenceGroup) -> None:
        """Remove a group that has ended, or was pinned."""
        (self.running if group in self.running else self.waiting).remove(group)
