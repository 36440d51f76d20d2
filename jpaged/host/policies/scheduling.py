"""Who runs next."""

from jpaged.host.sequence import SequenceGroup


def schedule_order(group: SequenceGroup) -> int:
    """First come, first served: groups with a lower key run first (PagedAttention, section 4.5)."""
    return group.arrival
