"""Preemption: takes blocks from the groups served last, when those before them are short of blocks or rows."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int32

from jpaged.contract.plan import BlockCopy
from jpaged.contract.profile import MachineProfile
from jpaged.host.admission import Admission
from jpaged.host.blocks.manager import BlockManager, OutOfBlocks
from jpaged.host.feed import Feed
from jpaged.host.growth import Growth
from jpaged.host.line import Line
from jpaged.host.offload.restore import can_split, spans_of
from jpaged.host.offload.split import BlockShape, Load, is_swap_cheaper
from jpaged.host.outcome import Outcome
from jpaged.host.policies.order import schedule_order
from jpaged.host.policies.victim import choose_victim
from jpaged.host.rows import Decodes, RowTable
from jpaged.host.sequence import SequenceGroup, SequenceState, num_shared_tokens
from jpaged.host.streaming import Streaming
from jpaged.host.windows import Windows


class Room(NamedTuple):
    """The sequences that have the blocks for the next plan.

    Args:
        decodes: steady rows.
        feeds: tokens that other sequences feed, in schedule order.
        copies: copies to make before.
    """

    decodes: Decodes
    feeds: list[Feed]
    copies: list[BlockCopy]


class Preemption:
    """Gives running sequences the blocks that they write next, and preempts groups where blocks are short.

    A preempted group is swapped to the host pool, or its blocks are freed and its tokens computed again (section 4.5).

    Args:
        blocks: the bookkeeping of the pools.
        line: the groups that wait and run.
        admission: blocks and rows that the first waiting group takes.
        outcome: frees and publishes the blocks of a sequence.
        rows: the rows of the running sequences.
        streaming: the running sequences that keep blocks on the host.
        windows: frees blocks that windows have passed.
        growth: expects the blocks that running groups will come to hold.
        kind: "swap", "recompute", or "auto": the cheaper one. A full host pool always means recompute.
    """

    def __init__(
        self,
        blocks: BlockManager,
        line: Line,
        admission: Admission,
        outcome: Outcome,
        rows: RowTable,
        streaming: Streaming,
        windows: Windows,
        growth: Growth,
        *,
        kind: str,
    ) -> None:
        self.num_preemptions = 0
        self.num_swaps_out = 0
        self._kind = kind
        self._blocks = blocks
        self._line = line
        self._admission = admission
        self._outcome = outcome
        self._rows = rows
        self._streaming = streaming
        self._windows = windows
        self._growth = growth

    def yield_to_first(self, profile: MachineProfile | None) -> None:
        """Preempt groups of lower priority than the first waiting group, if and while that lets it start.

        Args:
            profile: rates of this machine; None until they are measured: "auto" swaps then.
        """
        self._streaming.move_out(self._line.waiting)  # preempts no group
        lower = self.groups_to_yield()
        while lower:
            self._preempt(lower.pop(), profile)
            if self._admission.can_admit_first():
                return

    def groups_to_yield(self) -> list[SequenceGroup]:
        """The running groups of lower priority than the first waiting group, if preempting them lets it start."""
        first = self._line.waiting[0]
        lower = self._line.running_after(first.request.priority)
        if not lower:
            return []
        rows_short = self._admission.rows_short(first)
        if rows_short > sum(group.num_rows for group in lower):
            return []
        if not self._admission.has_room_on_host(first, without=lower):
            return []
        if self._growth.is_short(first, self._admission.num_known_taken(first)):
            return []
        seq_ids = [seq.seq_id for group in lower for seq in group.running]
        num_held = sum(len(self._blocks.holdings.held_by(seq_id).live_blocks) for seq_id in seq_ids)
        if self._admission.num_known_short(first) > num_held:
            return []
        start = self._admission.start(first)
        num_blocks = self._blocks.num_blocks_freed_by(seq_ids, match=start.match)
        num_matched = self._blocks.num_blocks_freed_by(seq_ids) - num_blocks
        if self._growth.is_short(first, start.ticket.num_blocks + num_matched):
            return []
        is_needed = rows_short > 0 or start.num_short > 0 or not self._admission.has_room_on_host(first)
        return lower if is_needed and start.num_short <= num_blocks else []

    def wanted(self, decodes: Int32[np.ndarray, " decodes"]) -> list[Feed]:
        """The tokens that each running sequence should feed next to ``decodes``, in schedule order.

        Without those that steady rows feed.
        """
        feeds = self._all_feeds()
        if self._windows.is_used:
            return self._windows.limit(feeds, decodes)
        return self._streaming.limit(feeds, decodes) if self._streaming.members else feeds

    def _all_feeds(self) -> list[Feed]:
        if not self._rows.num_restless:
            return []
        groups = sorted(self._rows.restless_groups(), key=schedule_order)
        return [feed for group in groups for feed in _feeds_of(group)]

    def make_room(self, profile: MachineProfile | None) -> Room:
        """Give every running sequence the blocks for all its tokens; preempt from the back while blocks are short.

        Args:
            profile: as in ``yield_to_first``.
        """
        self._streaming.move_out(self._line.waiting)
        decodes = self._rows.decodes()
        feeds = self.wanted(decodes.rows)
        copies = self.append(decodes.rows, np.ones_like(decodes.rows), feeds)
        if copies is None:
            copies = self._append_in_order(profile)
            decodes = self._rows.decodes()
            feeds = self.wanted(decodes.rows)
        room = self._windows if self._windows.is_used else self._streaming
        return Room(decodes, room.cut(feeds), copies)

    def _append_in_order(self, profile: MachineProfile | None) -> list[BlockCopy]:
        """Give one group after the other the blocks that it lacks, and preempt from the back. Returns the copies."""
        self._streaming.move_out((), is_short=True)
        copies, index = [], 0
        while index < len(self._line.running):
            group = self._line.running[index]
            while (group_copies := self._append_group(group)) is None:
                if self._drop_swapped_after(group):
                    continue
                victim = choose_victim(self._line.running)
                self._preempt(victim, profile)
                if victim is group:
                    return copies
                self._streaming.move_out((), is_short=True)
            copies += group_copies
            index += 1
        return copies

    def append(
        self, decodes: Int32[np.ndarray, " decodes"], num_draws: Int32[np.ndarray, " decodes"], feeds: list[Feed]
    ) -> list[BlockCopy] | None:
        """Give sequences the blocks that they lack. Returns None, without effect, if blocks are short.

        Args:
            decodes: steady rows.
            num_draws: tokens that each of them draws.
            feeds: tokens that other sequences feed.
        """
        rows = self._rows
        if self._windows.is_used:
            self._windows.slide(decodes, feeds)
        growing, num_tokens = rows.missing(decodes, rows.positions[decodes] - 1 + num_draws)
        if feeds:
            fed = np.array([feed.seq.row for feed in feeds], np.int32)
            more = np.array([feed.target for feed in feeds], np.int32) - rows.capacity[fed]
            growing = np.concatenate([growing, fed[more > 0]])
            num_tokens = np.concatenate([num_tokens, more[more > 0]])
        if len(growing) == 0:
            return []
        try:
            copies = self._blocks.append_all(
                list(zip(rows.seq_ids[growing].tolist(), num_tokens.tolist(), strict=True))
            )
        except OutOfBlocks:
            return None
        rows.grow(growing, num_tokens, copies)
        return copies

    def _append_group(self, group: SequenceGroup) -> list[BlockCopy] | None:
        steady = [seq for seq, _ in group.targets() if seq.is_steady]
        decodes = np.array([seq.row for seq in steady], np.int32)
        limit = self._windows.limit if self._windows.is_used else self._streaming.limit
        return self.append(decodes, np.ones_like(decodes), limit(_feeds_of(group), decodes))

    def _drop_swapped_after(self, group: SequenceGroup) -> bool:
        """Drop the swapped group served last, after ``group``, if its host blocks let streamed blocks move out."""
        if not self._streaming.is_host_short():
            return False
        after = [
            other for other in self._line.waiting if other.is_swapped and schedule_order(other) > schedule_order(group)
        ]
        if not after:
            return False
        self.drop_blocks(after[-1])
        self._admission.forget_refusal()
        self._streaming.move_out((), is_short=True)
        return True

    def drop_blocks(self, group: SequenceGroup, *, is_trusted: bool = True) -> None:
        """Free all blocks of an unfinished group, which will compute its tokens again."""
        for seq in group.unfinished:
            self._outcome.release(seq, is_trusted=is_trusted)
            seq.state, seq.num_computed = SequenceState.WAITING, 0
        group.fork_at = None
        if group.needs_prompt_scores:
            group.prompt_scores.clear()

    def _preempt(self, group: SequenceGroup, profile: MachineProfile | None) -> None:
        is_swapped = self._streaming.swap_out(group) if group.is_streamed else self._swap_out(group, profile)
        if is_swapped:
            self.num_swaps_out += 1
        else:
            self.drop_blocks(group)
        self._line.preempt(group)
        self.num_preemptions += 1

    def _swap_out(self, group: SequenceGroup, profile: MachineProfile | None) -> bool:
        """Move a group to the host pool, if that is the way to preempt it and the host pool has the blocks."""
        members = group.running
        seq_ids = [seq.seq_id for seq in members]
        if self._kind == "recompute" or self._blocks.num_host_blocks == 0:
            return False
        for seq in members:
            self._outcome.publish(seq)  # blocks that the host caches already are not moved
        ticket = self._blocks.to_swap_out(seq_ids)
        if self._kind == "auto" and profile is not None:
            # Blocks that others hold stay on the device, whichever way the group comes back.
            num_blocks = self._blocks.num_blocks_freed_by(seq_ids)
            num_computed = sum(seq.num_computed for seq in members) - (len(members) - 1) * num_shared_tokens(members)
            if not self._blocks.groups.is_plain:
                num_blocks = -(-num_computed // self._blocks.block_size)  # blocks of all tokens would be computed again
            is_cheaper = is_swap_cheaper(
                profile,
                spans_of(min(num_computed, num_blocks * self._blocks.block_size), members[0].num_computed),
                BlockShape(self._blocks.block_size, profile.block_bytes),
                Load(is_step_due=True),
                num_blocks_out=ticket.num_blocks,
                can_split=can_split(self._blocks, group),
            )
            if not is_cheaper:
                return False
        try:
            ticket.commit()
        except OutOfBlocks:
            return False
        for seq in members:
            seq.state = SequenceState.SWAPPED
        for seq in group.unfinished:
            self._rows.leave(seq)
        return True


def _feeds_of(group: SequenceGroup) -> list[Feed]:
    """The tokens that the sequences of a group feed, without those of steady rows."""
    return [Feed(group, seq, seq.num_computed, target) for seq, target in group.targets() if not seq.is_steady]
