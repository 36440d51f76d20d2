"""Which free block is overwritten first, and how much of what is lost is saved: one decision, stated as pure functions.

Free blocks wait in one queue per tier and are taken from its front. Together the functions below give this order of
reuse: blocks nobody can find again (in any order), then cached blocks, least recently released first and, of one
sequence, its tail first. A block without its predecessors can never be matched, so a tail is always worth less than its
head. A cached device block that is overwritten moves to the host tier, which forgets in the same order.
"""

from collections.abc import Iterable, Sequence

MAX_SPILLS_PER_STEP = 32
"""Cached blocks one step may save to the host tier; more are dropped, so that saving never delays a step for long."""

LEAST_HIT_INSIDE = 0.25
"""Of a block: a hit that ends inside one costs a copy or a load, which fewer tokens are not worth."""


def order_release(block_table: Sequence[int]) -> Iterable[int]:
    """The order in which a finished sequence's blocks enter the free queue: tail first."""
    return reversed(block_table)


def enters_at_front(is_cached: bool) -> bool:
    """Whether a freed block enters the free queue at the front (reused next) rather than at the back (reused last)."""
    return not is_cached
