"""Growth: whether the pool will hold a group beside those that run, once all have grown as expected."""

import numpy as np
from jaxtyping import Int64

from jpaged.host.blocks.manager import BlockManager
from jpaged.host.line import Line
from jpaged.host.policies.growth import HORIZON, WATERMARK, Stops, num_blocks_left_free, peak_tokens
from jpaged.host.rows import RowTable
from jpaged.host.sequence import Sequence, SequenceGroup
from jpaged.request import FinishReason


class Growth:
    """Expects the growth of running sequences from their limits, and from sequences that have stopped.

    Layers with windows, and sequences with blocks on the host, grow in other ways. Nothing is expected of them.

    Args:
        blocks: the bookkeeping of the pools.
        line: the groups that wait and run.
        rows: the rows of the running sequences.

    Attributes:
        horizon: tokens ahead for which growth counts. With 0 a group starts if it fits now.
    """

    def __init__(self, blocks: BlockManager, line: Line, rows: RowTable) -> None:
        self._blocks = blocks
        self._line = line
        self._rows = rows
        self._is_expected = blocks.groups.is_plain and blocks.placement.kind == "device"
        self._stops = Stops()
        self._num_ended = 0  # tokens of ended sequences that might have stopped
        self.horizon = HORIZON

    def note_end(self, group: SequenceGroup, seq: Sequence, reason: FinishReason) -> None:
        """Count a sequence that ends now."""
        if group.ends_at_limit or group.is_pin:
            return
        if reason is not FinishReason.LENGTH:
            self._stops = self._stops.after_stop(self._num_drawn(*self._rows.progress(self._rows.owned_rows())))
        self._num_ended += seq.num_outputs

    def _num_drawn(
        self,
        num_drawn: Int64[np.ndarray, " rows"],
        least_left: Int64[np.ndarray, " rows"],
        most_left: Int64[np.ndarray, " rows"],
    ) -> int:
        """Count the tokens drawn by sequences that may stop at any token, from the progress of those that run."""
        return self._num_ended + int(num_drawn[least_left < most_left].sum())

    def is_short(self, group: SequenceGroup, num_blocks: int) -> bool:
        """Whether the running groups and one more are expected to need more blocks than the pool has.

        Groups of lower priority do not count: they can be preempted.

        Args:
            group: the group that would start.
            num_blocks: blocks that it takes at once.
        """
        if not (self._is_expected and self.horizon and self._line.running):
            return False
        device, block_size = self._blocks.tiers.device, self._blocks.block_size
        num_usable, num_used = len(device.blocks), self._blocks.num_used_blocks
        most_each = -(-self.horizon // block_size) + 1
        if num_used + num_blocks + (self._line.num_rows + group.num_rows) * most_each < (1 - WATERMARK) * num_usable:
            return False  # whatever their ends
        after = [seq for other in self._line.running_after(group.request.priority) for seq in other.unfinished]
        rows = self._rows.owned_rows(without=after)
        # Sequences that share a block hold a part of it each.
        held = self._rows.capacity[rows] * (num_used / max(device.num_holders, 1))
        held_by_pins = 0.0 if after else max(num_used * block_size - held.sum(), 0.0)
        num_drawn, least_left, most_left = self._rows.progress(rows)
        num_unsure = np.count_nonzero(least_left < most_left)
        num_left_free = num_blocks_left_free(num_usable, is_running=True, num_unsure=num_unsure)
        new_held, new_drawn = np.zeros(group.num_rows), np.zeros(group.num_rows, np.int64)
        new_held[0] = num_blocks * block_size
        new_drawn[: len(group.unfinished)] = [seq.num_outputs for seq in group.unfinished]
        peak = peak_tokens(
            np.concatenate([held, new_held]),
            np.concatenate([least_left, np.maximum(group.least_tokens - new_drawn, 0)]),
            np.concatenate([most_left, np.maximum(group.max_tokens - new_drawn, 0)]),
            self._stops.tokens_left(self._num_drawn(num_drawn, least_left, most_left)),
            self.horizon,
        )
        return peak + held_by_pins > (num_usable - num_left_free) * block_size
