"""Tickets: acts on blocks that were checked and counted, and are not done yet."""

from collections.abc import Callable

from jpaged.host.blocks.tier import BlockTier, TwoTiers


class OutOfBlocks(Exception):
    """Too few free blocks for this call, which changed nothing. The scheduler preempts or waits (section 4.5)."""


class Ticket[Result]:
    """An act that takes free blocks of one tier. Valid until the next call that changes blocks.

    Args:
        num_blocks: free blocks that the act takes, cached ones that no sequence holds included.
        tiers: the two tiers; they count the calls that change blocks.
        tier: the tier that the blocks are taken from.
        act: the act, which cannot fail if the tier has the blocks.
    """

    __slots__ = ("_act", "_num_changes", "_tier", "_tiers", "num_blocks")

    def __init__(self, num_blocks: int, tiers: TwoTiers, tier: BlockTier, act: Callable[[], Result]) -> None:
        self.num_blocks = num_blocks
        self._tiers = tiers
        self._tier = tier
        self._num_changes = tiers.num_changes
        self._act = act

    @property
    def is_valid(self) -> bool:
        """Whether no block has changed since the ticket was made."""
        return self._tiers.num_changes == self._num_changes

    def commit(self) -> Result:
        """Do it.

        Raises:
            OutOfBlocks: fewer free blocks than ``num_blocks``; nothing has changed.
            ValueError: blocks have changed since the ticket was made; nothing has changed now.
        """
        if not self.is_valid:
            raise ValueError("blocks have changed since this ticket was made: ask for a new one")
        if self.num_blocks > (num_free := len(self._tier.free)):
            raise OutOfBlocks(f"{self.num_blocks} blocks needed, {num_free} free of {len(self._tier.blocks)}")
        self._tiers.num_changes += 1
        return self._act()
