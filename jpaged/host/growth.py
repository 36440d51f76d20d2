"""Growth: whether the pool will hold a group beside those that run, once all have grown as expected."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int32, Int64

from jpaged.host.blocks.manager import BlockManager
from jpaged.host.line import Line
from jpaged.host.policies.growth import HORIZON, WATERMARK, Stops, num_blocks_left_free, peak_tokens
from jpaged.host.rows import RowTable
from jpaged.host.sequence import SequenceGroup
from jpaged.request import FinishReason


class Growth:
    """Expects the growth of running sequences from their limits, and from sequences that have stopped.

    Layers with windows, and sequences with blocks on the host, grow in other ways. Nothing is expected of them.
    Searches start if they fit now, since their beams go on to share most of the blocks that they fill.

    Args:
        blocks: the bookkeeping of the pools.
        line: the groups that wait and run.
        rows: the rows of the running sequences.

    Attributes:
        horizon: tokens ahead for which growth counts. With 0 a group starts if it fits now.
        num_drawn: tokens drawn since the start by sequences that may stop at any token; written here alone.
    """

    def __init__(self, blocks: BlockManager, line: Line, rows: RowTable) -> None:
        self._blocks = blocks
        self._line = line
        self._rows = rows
        self._is_expected = blocks.groups.is_plain and blocks.placement.kind == "device"
        self._stops = Stops()
        self.num_drawn = 0
        self.horizon = HORIZON

    @property
    def tokens_left(self) -> float:
        """The tokens that a sequence which may stop at any token is expected to draw still."""
        return self._stops.tokens_left(self.num_drawn)

    def note_draw(self, group: SequenceGroup) -> None:
        """Count a token that a sequence of a group has drawn."""
        self.num_drawn += group.may_stop

    def note_draws(self, rows: Int32[np.ndarray, " draws"], num_tokens: Int32[np.ndarray, " draws"]) -> None:
        """Count the tokens that the sequences of some rows have drawn: so many each."""
        may_stop = self._rows.least_ends[rows] < self._rows.limits[rows]
        self.num_drawn += int(num_tokens[may_stop].sum())

    def note_end(self, group: SequenceGroup, reason: FinishReason) -> None:
        """Count a sequence that ends now, if it stopped by itself. An abort says nothing about its length."""
        if reason is FinishReason.STOP and group.may_stop:
            self._stops = self._stops.after_stop(self.num_drawn)

    def is_short(self, group: SequenceGroup, num_blocks: int) -> bool:
        """Whether the running groups and one more are expected to need more blocks than the pool has.

        Groups of lower priority do not count: they can be preempted.

        Args:
            group: the group that would start.
            num_blocks: blocks that it takes at once.
        """
        after = self._line.running_after(group.request.priority)
        is_beside = len(self._line.running) > len(after)
        if not (self._is_expected and self.horizon and is_beside) or group.beam is not None:
            return False
        device, block_size = self._blocks.tiers.device, self._blocks.block_size
        num_usable, num_used, num_holders = len(device.blocks), self._blocks.num_used_blocks, device.num_holders
        most_each = -(-self.horizon // block_size) + 1
        if num_used + num_blocks + (self._line.num_rows + group.num_rows) * most_each < (1 - WATERMARK) * num_usable:
            return False  # whatever their ends
        is_running = self._rows.seq_ids >= 0
        if after:
            seqs = [seq for other in after for seq in other.unfinished]
            is_running[[seq.row for seq in seqs if seq.row is not None]] = False
            seq_ids = [seq.seq_id for seq in seqs if seq.state.holds_blocks]
            num_used -= self._blocks.num_blocks_freed_by(seq_ids)
            num_holders -= sum([len(self._blocks.holdings.held_by(seq_id).device_blocks) for seq_id in seq_ids])
        rows = np.flatnonzero(is_running)
        # Sequences that share a block hold a part of it each.
        held = self._rows.capacity[rows] * (num_used / max(num_holders, 1))
        held_by_pins = max(num_used * block_size - held.sum(), 0.0)
        running = self._progress(rows)
        num_left_free = num_blocks_left_free(num_usable, is_running=True, num_unsure=running.num_unsure)
        new_held, new_drawn = np.zeros(group.num_rows), np.array([seq.num_outputs for seq in group.unfinished])
        new_held[0] = num_blocks * block_size
        peak = peak_tokens(
            np.concatenate([held, new_held]),
            np.concatenate([running.least_left, np.maximum(group.least_tokens - new_drawn, 0)]),
            np.concatenate([running.most_left, np.maximum(group.max_tokens - new_drawn, 0)]),
            self.tokens_left,
            self.horizon,
        )
        return peak + held_by_pins > (num_usable - num_left_free) * block_size

    def _progress(self, rows: Int64[np.ndarray, " rows"]) -> "_Progress":
        """The progress of the sequences of some rows. One that is not steady counts as full as its last block."""
        table = self._rows
        starts, limits = table.prompt_lens[rows].astype(np.int64), table.limits[rows]
        tokens = np.where(table.is_steady[rows], table.positions[rows], np.maximum(table.capacity[rows], starts))
        tokens = np.minimum(tokens, limits)
        least_left, most_left = np.maximum(table.least_ends[rows] - tokens, 0), limits - tokens
        return _Progress(least_left, most_left, int((least_left < most_left).sum()))


class _Progress(NamedTuple):
    """Progress of running sequences.

    Args:
        least_left: tokens that each draws before it may end.
        most_left: tokens that each draws at most.
        num_unsure: number of those that may end at any token.
    """

    least_left: Int64[np.ndarray, " rows"]
    most_left: Int64[np.ndarray, " rows"]
    num_unsure: int
