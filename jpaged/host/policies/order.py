"""Who runs next."""

from jpaged.host.sequence import SequenceGroup


def schedule_order(group: SequenceGroup) -> tuple[int, int]:
    """By priority, then first come, first served: lower keys run first (PagedAttention, section 4.5)."""
    return group.request.priority, group.arrival
