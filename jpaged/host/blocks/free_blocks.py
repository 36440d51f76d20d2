"""The free blocks of a tier, in the order of reuse that ``policies.eviction`` states."""

from collections import OrderedDict
from collections.abc import Container, Iterable, Iterator
from itertools import chain


class FreeBlocks:
    """Blocks without a holder. One writer: the tier of the blocks.

    Args:
        blocks: blocks that are not cached.
    """

    def __init__(self, blocks: Iterable[int]) -> None:
        self._early: OrderedDict[int, None] = OrderedDict.fromkeys(blocks)
        """Blocks that are not cached, then those that no prefix end needs."""
        self._late: OrderedDict[int, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._early) + len(self._late)

    def __contains__(self, block: int) -> bool:
        return block in self._early or block in self._late

    def __iter__(self) -> Iterator[int]:
        return chain(self._early, self._late)

    def add(self, blocks: Iterable[int], cached: Container[int], unneeded: Container[int]) -> None:
        """Add blocks that have lost their last holder, in this order.

        Args:
            blocks: the blocks.
            cached: all blocks that are cached.
            unneeded: those of them that no prefix end needs.
        """
        early, late = self._early, self._late
        for block in blocks:
            if block not in cached:
                early[block] = None
                early.move_to_end(block, last=False)
            elif block in unneeded:
                early[block] = None
            else:
                late[block] = None

    def take(self, count: int) -> list[int]:
        """Remove and return the blocks that are reused next; there must be as many."""
        return [(self._early or self._late).popitem(last=False)[0] for _ in range(count)]

    def discard(self, block: int) -> None:
        """Remove a block, if it is here."""
        if block in self._late:
            del self._late[block]
        else:
            self._early.pop(block, None)

    def touch(self, block: int) -> None:
        """Let a block that is cached and needed, if it is here, be reused last."""
        if block in self:
            self.discard(block)
            self._late[block] = None

    def check_invariants(self, cached: Container[int], unneeded: Container[int]) -> None:
        """Assert the order, where the arguments are as in ``add``."""
        ranks = [0 if block not in cached else 1 if block in unneeded else 2 for block in self]
        assert ranks == sorted(ranks), "blocks that are not cached are reused first, and needed ones last"
        assert self._early.keys().isdisjoint(self._late)
