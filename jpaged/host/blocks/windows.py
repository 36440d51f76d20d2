"""Windows: frees the blocks of running sequences that no later token attends to."""

from collections.abc import Hashable

from jpaged.host.blocks.holdings import Holdings
from jpaged.host.blocks.prefix_ends import keep_ends, touch_twins
from jpaged.host.blocks.tier import TwoTiers

NEVER = 2**31 - 1


class WindowedBlocks:
    """Frees blocks that windows have passed.

    Args:
        tiers: the two tiers of blocks.
        holdings: the blocks of every sequence.
    """

    def __init__(self, tiers: TwoTiers, holdings: Holdings) -> None:
        self.num_freed = 0
        """Blocks that sequences gave up while they ran, since the start."""
        self._tiers = tiers
        self._holdings = holdings

    def slide(self, seq_id: Hashable, position: int) -> None:
        """Free the blocks of a sequence that tokens from ``position`` on do not attend to.

        A step in flight may still read them, since devices run steps in order. The cells of the blocks become 0.

        Raises:
            ValueError: an unknown or swapped sequence, or a position that it has no room for.
        """
        self._holdings.require_positions(seq_id, position, position)
        holding, groups, block_size = self._holdings.held_by(seq_id), self._holdings.groups, self._tiers.block_size
        cells: list[int] = []
        for group, start in enumerate(holding.starts):
            stop = max(groups.groups[group].first_live(position, block_size), start)
            cells += range(start * len(groups) + group, stop * len(groups), len(groups))
            holding.starts[group] = stop  # pyright: ignore[reportIndexIssue]
        if cells:
            cells.sort()  # all groups of a logical block are reused before the next
            freed = [holding.blocks[cell] for cell in cells]
            for cell in cells:
                holding.blocks[cell] = 0
            self.num_freed += len(freed)
            self._tiers.num_changes += 1
            self._tiers.release(freed)

    def keep_ends(self, seq_id: Hashable) -> None:
        """Count the cached blocks that the prefix ends of a sequence need as needed: it is about to give up its blocks.

        Does nothing without windows, or if the sequence is not on the device.
        """
        holding, groups = self._holdings.on_device.get(seq_id), self._holdings.groups
        if holding is not None and groups.has_windows:
            touch_twins(self._tiers, groups, holding)
            keep_ends(self._tiers, groups, holding, {holding.num_published, *holding.ends})

    def next_slide(self, seq_id: Hashable) -> int:
        """The first position at which ``slide`` frees a block; ``NEVER`` without windows."""
        positions = [
            (start + 1) * self._tiers.block_size + group.window - 1
            for start, group in zip(self._holdings.held_by(seq_id).starts, self._holdings.groups.groups, strict=False)
            if group.window is not None
        ]
        return min(positions, default=NEVER)
