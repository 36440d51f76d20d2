"""Whom to preempt when blocks run out."""

from collections.abc import Sequence

from jpaged.host.policies.scheduling import schedule_order
from jpaged.host.sequence import SequenceGroup


def choose_victim(running: Sequence[SequenceGroup]) -> SequenceGroup:
    """The group that would be served last, so that the earliest arrivals are never starved."""
    return max(running, key=schedule_order)
