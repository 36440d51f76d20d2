"""Layer groups: the layers that share a block table, and the blocks that sequences take for each group."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """Layers whose K and V lie in the same blocks.

    Args:
        num_layers: layers of the group; a block has as many slots a token as the largest group has layers.
        window: tokens that each layer sees at most, the newest included; None if all layers see all tokens.
    """

    num_layers: int
    window: int | None = None

    def first_live(self, position: int, block_size: int) -> int:
        """The first logical block that tokens from this position on attend to."""
        return 0 if self.window is None else max(position - self.window + 1, 0) // block_size

    def num_blocks(self, num_tokens: int, block_size: int, chunk: int) -> int:
        """Count the blocks of a sequence of ``num_tokens``, which grows by at most ``chunk`` tokens in a step."""
        num_blocks = -(-num_tokens // block_size)
        if self.window is None:
            return num_blocks
        # The tokens that a chunk sees and writes may begin and end inside a block.
        num_live = self.window - 1 + chunk
        return min(num_blocks, (num_live + block_size - 2) // block_size + 1)


@dataclass(frozen=True, slots=True)
class LayerGroups:
    """The groups of a model. All blocks have the same size, so that any group can take any block.

    A sequence has one block table for each group. The tables of a row are interleaved: the cells of logical block 0 in
    all groups come first, then those of logical block 1. Cell ``logical_block * num_groups + group`` is 0 where the
    sequence holds no block.

    Args:
        groups: the groups; layers without a window, if there are any, are in the first ones.
    """

    groups: tuple[LayerGroup, ...]

    @classmethod
    def single(cls, num_layers: int = 1) -> Self:
        """One group of layers that see all tokens."""
        return cls((LayerGroup(num_layers),))

    def __len__(self) -> int:
        return len(self.groups)

    @property
    def is_plain(self) -> bool:
        """Whether all layers share one block table and see all tokens."""
        return len(self.groups) == 1 and self.groups[0].window is None

    @property
    def num_full(self) -> int:
        """Count the groups whose layers see all tokens."""
        return sum([group.window is None for group in self.groups])

    @property
    def layers_per_block(self) -> int:
        """Layers that a block has slots for."""
        return max([group.num_layers for group in self.groups])

    @property
    def windowed(self) -> range:
        """The groups whose layers have a window."""
        return range(self.num_full, len(self))

    @property
    def has_windows(self) -> bool:
        """Whether sequences free blocks while they run."""
        return self.num_full < len(self.groups)

    def share_of(self, group: int) -> float:
        """The part of a block that the layers of a group fill."""
        return self.groups[group].num_layers / self.layers_per_block

    @property
    def share_used(self) -> float:
        """The sum of ``share_of`` over all groups."""
        return sum(map(self.share_of, range(len(self.groups))))

    def num_blocks(self, num_tokens: int, block_size: int, chunk: int = 1) -> int:
        """Count the blocks of one sequence; see ``LayerGroup.num_blocks``."""
        return sum([group.num_blocks(num_tokens, block_size, chunk) for group in self.groups])

    def num_forked_blocks(self, shared_len: int, lens: Sequence[int], block_size: int, chunk: int) -> int:
        """Count the blocks of sequences that share their first tokens: full shared blocks count once.

        Windows move on at different times, so that their blocks may be shared or not: they count for each sequence.
        """
        shared = shared_len // block_size
        num_forked = shared + sum([-(-num_tokens // block_size) - shared for num_tokens in lens])
        num_blocks = 0
        for group in self.groups:
            own = sum([group.num_blocks(num_tokens, block_size, chunk) for num_tokens in lens])
            num_blocks += num_forked if group.window is None else min(num_forked, own)
        return num_blocks

    def most_tokens(self, num_blocks: int, block_size: int, chunk: int = 1) -> int:
        """Count the tokens of the longest sequence that so many blocks hold."""
        low, high = 0, num_blocks * block_size + 1
        if self.num_blocks(2**40, block_size, chunk) <= num_blocks:
            return 2**31 - 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.num_blocks(middle, block_size, chunk) <= num_blocks else (low, middle)
        return low
