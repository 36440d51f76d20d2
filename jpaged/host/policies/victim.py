"""The sequence group to preempt when blocks run out."""

from collections.abc import Sequence

from jpaged.host.policies.order import schedule_order
from jpaged.host.sequence import SequenceGroup


def choose_victim(running: Sequence[SequenceGroup]) -> SequenceGroup:
    """Choose the group that would be served last, so that the earliest arrivals never starve."""
    return max(running, key=schedule_order)
