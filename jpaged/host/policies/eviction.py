"""Eviction: which free block is overwritten first, and how much of the lost content is saved.

Free blocks wait in one queue per tier and are taken from its front. Together the functions below give this order of
reuse. First come blocks that are not cached, in any order. Then come cached blocks, least recently released first; of
one sequence, its tail first. A block without its predecessors can never be matched, so a tail is worth less than its
head. A cached device block that is overwritten moves to the host tier, which evicts in the same order.
"""

from collections.abc import Iterable, Sequence

MAX_SPILLS_PER_STEP = 32
"""Cached blocks that one step may save to the host tier at most, so that saving never delays a step for long."""

LEAST_HIT_INSIDE = 0.25
"""Least part of a block that a hit inside it must cover: such a hit costs a copy or a load."""


def order_release(block_table: Sequence[int]) -> Iterable[int]:
    """The order in which a finished sequence's blocks enter the free queue: tail first."""
    return reversed(block_table)


def enters_at_front(is_cached: bool) -> bool:
    """Whether a freed block enters the free queue at the front (reused next) rather than at the back (reused last)."""
    return not is_cached
