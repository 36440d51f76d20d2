"""Blocks of prompts that take them chunk by chunk, since the layers of the model have windows."""

from jpaged.host.blocks.manager import BlockManager
from jpaged.host.blocks.prefix_cache import PrefixMatch
from jpaged.host.line import Line
from jpaged.host.sequence import SequenceState


class PromptBlocks:
    """Counts the blocks that prompts have still to take, so that no more prompts start than can be computed.

    Args:
        blocks: the bookkeeping of the pools.
        line: the groups that wait and run.
        max_chunk: tokens of a plan at most.
    """

    def __init__(self, blocks: BlockManager, line: Line, max_chunk: int) -> None:
        self._blocks = blocks
        self._line = line
        self._max_chunk = max_chunk

    def end_of_chunk(self, start: int) -> int:
        """The end of the longest chunk from ``start`` on; all tokens of an 8-bit block are written at once."""
        unit = self._blocks.block_size if self._blocks.is_quantized else 1
        return (start + self._max_chunk) // unit * unit

    def num_blocks(self, match: PrefixMatch, num_tokens: int) -> int:
        """Count the blocks that a sequence takes until its tokens are computed.

        Blocks of a window that others hold are no gain: the sequence gives them up without making them free.
        """
        groups, free = self._blocks.groups, self._blocks.tiers.device.free
        num_held = sum(
            [
                cell % len(groups) < groups.num_full and not hit.is_on_host and hit.block not in free
                for cell, hit in enumerate(match.hits)
            ]
        )
        return groups.num_blocks(num_tokens, self._blocks.block_size, self._max_chunk) - num_held

    def num_promised(self) -> int:
        """Count the blocks that running prompts have still to take."""
        blocks, num_promised = self._blocks, 0
        for group in self._line.running:
            for seq in group.unfinished:
                if seq.is_steady or seq.state not in (SequenceState.RUNNING, SequenceState.LOADING):
                    continue
                target = len(seq.token_ids) if group.fork_at is None else group.fork_at
                if target - seq.num_computed > 1:
                    wanted = blocks.groups.num_blocks(target, blocks.block_size, self._max_chunk)
                    num_promised += max(wanted - len(blocks.holdings.held_by(seq.seq_id).live_blocks), 0)
        return num_promised
