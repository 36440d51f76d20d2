"""Which free block is overwritten first: one decision, stated as two pure functions.

Free blocks wait in one queue and are taken from its front. Together the functions below give this order of reuse:
blocks nobody can find again (in any order), then cached blocks, least recently released first and, of one sequence,
its tail first. A block without its predecessors can never be matched, so a tail is always worth less than its head.
"""

from collections.abc import Iterable, Sequence


def order_release(block_table: Sequence[int]) -> Iterable[int]:
    """The order in which a finished sequence's blocks enter the free queue: tail first."""
    return reversed(block_table)


def enters_at_front(is_cached: bool) -> bool:
    """Whether a freed block enters the free queue at the front (reused next) rather than at the back (reused last)."""
    return not is_cached
