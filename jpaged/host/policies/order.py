"""The order in which sequence groups are served."""

from jpaged.host.sequence import SequenceGroup


def schedule_order(group: SequenceGroup) -> tuple[int, int]:
    """The sort key: priority, then arrival; lower keys run first (PagedAttention, section 4.5)."""
    return group.request.priority, group.arrival
