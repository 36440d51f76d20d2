"""Eviction: which free block is overwritten first, and how much of the lost content is saved.

Each tier reuses its free blocks in this order (``blocks.free_blocks``). First come blocks that are not cached, in any
order. Then come cached blocks that no prefix end needs (``blocks.prefix_ends``), and last all others. Of both kinds the
block released least recently comes first; of one sequence, its tail. A block without its predecessors can never be
matched, so a tail is worth less than its head. A needed device block that is overwritten moves to the host tier.
"""

from collections.abc import Iterable, Sequence

MAX_SPILLS_PER_STEP = 32
"""Cached blocks that one step may save to the host tier at most, so that saving never delays a step for long."""

LEAST_HIT_INSIDE = 0.25
"""Least part of a block that a hit inside it must cover: such a hit costs a copy or a load."""


def order_release(block_table: Sequence[int]) -> Iterable[int]:
    """The order in which a finished sequence's blocks enter the free queue: tail first."""
    return reversed(block_table)
