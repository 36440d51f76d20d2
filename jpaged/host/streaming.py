"""Streaming: running sequences that keep their full blocks on the host, where every step reads them."""

from collections.abc import Collection, Iterable
from dataclasses import replace

import numpy as np
from jaxtyping import Int32

from jpaged.contract.plan import StepPlan, Streamed
from jpaged.contract.profile import MachineProfile
from jpaged.host.blocks.holdings import Holding
from jpaged.host.blocks.manager import BlockManager
from jpaged.host.feed import Feed
from jpaged.host.offload.placement import end_of_chunk
from jpaged.host.outcome import Outcome
from jpaged.host.policies.growth import num_blocks_left_free
from jpaged.host.policies.order import schedule_order
from jpaged.host.rows import RowTable
from jpaged.host.sequence import Sequence, SequenceGroup, SequenceState


class Streaming:
    """Moves the blocks that streamed sequences have filled to the host, and names those that a plan reads there.

    A block moves once its tokens are known and a plan that computes them has been made. With ``kv_placement="auto"`` it
    stays on the device as long as no sequence needs its place, since blocks there cost no transfer. Blocks that find no
    room on the host, or in the window, stay too; when the device is full, the group served last is preempted.

    Args:
        blocks: the bookkeeping of the pools.
        outcome: publishes the blocks of a sequence.
        rows: the rows of the running sequences.
        max_chunk: tokens of a plan at most.
    """

    def __init__(self, blocks: BlockManager, outcome: Outcome, rows: RowTable, max_chunk: int) -> None:
        self._blocks = blocks
        self._outcome = outcome
        self._rows = rows
        self._max_chunk = max_chunk
        self._most_blocks = blocks.placement.max_streamed_blocks
        self._members: dict[int, tuple[SequenceGroup, Sequence]] = {}  # by sequence id; some may have left

    def enter(self, group: SequenceGroup, seq: Sequence) -> None:
        """Keep the blocks of a streamed sequence on the host from now on, as long as it runs."""
        self._members[seq.seq_id] = group, seq

    @property
    def members(self) -> list[tuple[SequenceGroup, Sequence]]:
        """The streamed sequences that run, in schedule order."""
        if not self._members:
            return []
        members = [member for member in self._members.values() if member[1].row is not None]
        if len(members) < len(self._members):
            self._members = {seq.seq_id: (group, seq) for group, seq in members}
        return sorted(members, key=lambda member: schedule_order(member[0]))

    # Blocks -------------------------------------------------------------------------------------------------------

    def move_out(self, waiting: Collection[SequenceGroup], *, is_short: bool = False) -> None:
        """Move the first full blocks of streamed sequences to the host while it, and the window, have room.

        Args:
            waiting: groups that need their place to start.
            is_short: whether all of them should leave, since running sequences found too few free blocks.
        """
        members = self.members
        if not members:
            return
        num_left, num_together = self._num_window_left(members), 1
        if not is_short:
            num_lacking = self._num_lacking(members, waiting)
            if self._blocks.placement.kind == "auto":
                num_left = min(num_left, num_lacking)
            elif num_lacking == 0:
                num_together = self._blocks.placement.num_together
        for _, seq in members:
            holding = self._holding(seq)
            first = len(holding.host_blocks)
            num_full = min(seq.num_known // self._blocks.block_size - first, num_left)
            num_moved = self._move_out(seq, num_full // num_together * num_together)
            if num_moved > 0:
                assert seq.row is not None
                self._rows.change_from(seq.row, first)
            num_left -= num_moved

    def _num_lacking(self, members: list[tuple[SequenceGroup, Sequence]], waiting: Collection[SequenceGroup]) -> int:
        """Count the blocks, beyond the free ones, that rows, chunks and waiting groups may take in the next plan."""
        num_taken = np.count_nonzero(self._rows.seq_ids >= 0)
        if waiting:
            num_taken += num_blocks_left_free(len(self._blocks.tiers.device.blocks), is_running=True)
        for group in waiting:
            num_tokens = max([len(seq.token_ids) for seq in group.unfinished])
            if group.is_streamed:
                num_tokens = min(num_tokens, self._max_chunk)
            num_taken += group.num_rows * (self._blocks.holdings.num_covering(num_tokens) + 1)
        for _, seq in members:
            stop = min(seq.num_tokens, seq.num_computed + self._max_chunk)
            num_taken += max(self._blocks.holdings.num_covering(stop) - self._num_held(seq), 0)
        return max(int(num_taken) - self._blocks.num_free_blocks, 0)

    def is_host_short(self) -> bool:
        """Whether blocks stay on the device, after all should have left it, for want of host blocks."""
        members = self.members
        if self._num_window_left(members) <= 0:
            return False
        block_size = self._blocks.block_size
        return any(seq.num_known // block_size > len(self._holding(seq).host_blocks) for _, seq in members)

    def swap_out(self, group: SequenceGroup) -> bool:
        """Preempt a streamed sequence, which keeps its blocks on the host. Tokens in its other blocks are recomputed.

        Returns:
            False, without effect on the sequence, if no block of it is on the host.
        """
        [seq] = group.running
        most = min(seq.num_known // self._blocks.block_size, self._most_blocks)
        self._move_out(seq, most - len(self._holding(seq).host_blocks))
        num_blocks = len(self._holding(seq).host_blocks)
        if num_blocks == 0:
            return False
        self._blocks.streamed.swap_out(seq.seq_id)
        self._rows.leave(seq)
        seq.state, seq.num_computed = SequenceState.SWAPPED, num_blocks * self._blocks.block_size
        return True

    def _move_out(self, seq: Sequence, num_blocks: int) -> int:
        if num_blocks <= 0:
            return 0
        self._outcome.publish(seq)
        return self._blocks.streamed.move_out(seq.seq_id, num_blocks)

    def _num_window_left(self, members: Iterable[tuple[SequenceGroup, Sequence]]) -> int:
        """Count the blocks that steps can stream beside those of the running sequences."""
        return self._most_blocks - sum([len(self._holding(seq).host_blocks) for _, seq in members])

    def _holding(self, seq: Sequence) -> Holding:
        return self._blocks.holdings.held_by(seq.seq_id)

    # Chunks -------------------------------------------------------------------------------------------------------

    def limit(self, feeds: list[Feed], decodes: Int32[np.ndarray, " decodes"]) -> list[Feed]:
        """Cut the prompts of streamed sequences to chunks that the free blocks hold: to one block at least.

        Args:
            feeds: the tokens that running sequences should feed, in schedule order.
            decodes: steady rows that grow beside.
        """
        if not self._members:
            return feeds
        growing, _ = self._rows.missing(decodes, self._rows.positions[decodes])
        block_size, num_free = self._blocks.block_size, self._blocks.num_free_blocks - len(growing)
        limited = []
        for feed in feeds:
            if feed.group.is_streamed and feed.num_tokens > 1:
                num_held = self._num_held(feed.seq)
                room = max(num_held + max(num_free, 0), feed.start // block_size + 1) * block_size
                stop = end_of_chunk(feed.start, self._max_chunk, block_size)
                feed = feed._replace(target=min(feed.target, room, stop))
                num_free -= max(self._blocks.holdings.num_covering(feed.target) - num_held, 0)
            limited.append(feed)
        return limited

    def cut(self, feeds: list[Feed]) -> list[Feed]:
        """Cut the prompts of streamed sequences to what their blocks hold."""
        if not self._members:
            return feeds
        capacity = self._rows.capacity
        feeds = [
            feed._replace(target=min(feed.target, int(capacity[feed.seq.row]))) if feed.group.is_streamed else feed
            for feed in feeds
        ]
        return [feed for feed in feeds if feed.num_tokens > 0]

    def _num_held(self, seq: Sequence) -> int:
        return self._blocks.holdings.num_covering(int(self._rows.capacity[seq.row]))

    # Plans --------------------------------------------------------------------------------------------------------

    def link_s(self, profile: MachineProfile | None) -> float:
        """Seconds in which the host blocks of all streamed sequences arrive, and the device waits for them.

        Where they hold activations, the device makes K and V of them meanwhile, and has no time for more.
        """
        members = self.members
        if not members or profile is None or self._blocks.placement.keeps_activations:
            return 0.0
        num_blocks = sum([len(self._holding(seq).host_blocks) for _, seq in members])
        return num_blocks * profile.block_bytes / profile.from_host.bytes_per_s

    def name_blocks(self, plan: StepPlan) -> StepPlan:
        """The plan with the host blocks that its chunks attend to."""
        held = {seq.row: blocks for _, seq in self.members if (blocks := self._holding(seq).host_blocks)}
        if not held:
            return plan
        starts, parts, num_blocks = np.zeros(len(plan.chunks), np.int32), [], 0
        for chunk, row in enumerate(plan.chunks.rows.tolist()):
            if (blocks := held.get(row)) is not None:
                starts[chunk] = num_blocks
                parts.append(np.frombuffer(blocks, np.int32))
                num_blocks += len(blocks)
        if not parts:
            return plan
        assert num_blocks <= self._most_blocks
        assert plan.num_steps == 1
        return replace(plan, streamed=Streamed(np.concatenate(parts), starts))
