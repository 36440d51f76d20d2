"""Windows: running sequences of models whose layers see the newest tokens alone, and the blocks that they give up."""

import numpy as np
from jaxtyping import Int32

from jpaged.host.blocks.manager import BlockManager
from jpaged.host.feed import Feed
from jpaged.host.rows import RowTable
from jpaged.host.sequence import Sequence, SequenceGroup


class Windows:
    """Frees blocks that windows have passed, and lets prompts take blocks chunk by chunk.

    A prompt that took blocks for all of its tokens at once would hold far more than its windows need. So a prompt takes
    the blocks of its next chunk alone, and first gives up those that no token of this chunk attends to.

    Args:
        blocks: the bookkeeping of the pools.
        rows: the rows of the running sequences.
        max_chunk: tokens of a plan at most.
    """

    def __init__(self, blocks: BlockManager, rows: RowTable, max_chunk: int) -> None:
        self._blocks = blocks
        self._rows = rows
        self._max_chunk = max_chunk
        windows = [group.window for group in blocks.groups.groups if group.window is not None]
        self._least_window = min(windows, default=0)
        self.is_used: bool = bool(windows)
        """Whether the model has windows; nothing else may be called otherwise."""

    def slide(self, decodes: Int32[np.ndarray, " decodes"], feeds: list[Feed]) -> None:
        """Free the blocks that no token of the next plan, or of a later one, attends to.

        Args:
            decodes: steady rows that the plan feeds.
            feeds: tokens of other sequences that it feeds.
        """
        rows = self._rows
        for row in decodes[rows.positions[decodes] > rows.next_slide[decodes]].tolist():
            self._slide(*rows.member(row))
        for feed in feeds:
            if feed.start >= rows.next_slide[feed.seq.row]:
                self._slide(feed.group, feed.seq)

    def _slide(self, group: SequenceGroup, seq: Sequence) -> None:
        position = seq.num_computed
        if group.is_pin:  # keeps what a request sees that shares its full blocks
            block_size = self._blocks.block_size
            position = min(position, seq.prompt_len // block_size * block_size)
        if self._blocks.enable_prefix_caching:
            passed = max(position - self._least_window + 1, 0)
            self._blocks.publish(seq.seq_id, seq.hashed, min(seq.num_known, passed))
        self._blocks.windows.slide(seq.seq_id, position)
        assert seq.row is not None
        self._rows.next_slide[seq.row] = self._blocks.windows.next_slide(seq.seq_id)

    def limit(self, feeds: list[Feed], decodes: Int32[np.ndarray, " decodes"]) -> list[Feed]:
        """Cut prompts to the chunks of the next plan, in schedule order.

        Args:
            feeds: the tokens that running sequences should feed.
            decodes: steady rows that the plan feeds too.
        """
        unit = self._blocks.block_size if self._blocks.is_quantized else 1
        budget = self._max_chunk - len(decodes) - sum([feed.num_tokens == 1 for feed in feeds])
        limited = []
        for feed in feeds:
            if feed.num_tokens > 1:
                stop = min(feed.target, (feed.start + max(budget, 0)) // unit * unit)
                if stop <= feed.start:
                    continue
                feed = feed._replace(target=stop)
                budget -= feed.num_tokens
            limited.append(feed)
        return limited

    def cut(self, feeds: list[Feed]) -> list[Feed]:
        """Cut prompts to the tokens that their blocks hold."""
        capacity = self._rows.capacity
        feeds = [feed._replace(target=min(feed.target, int(capacity[feed.seq.row]))) for feed in feeds]
        return [feed for feed in feeds if feed.num_tokens > 0]
