"""Entry: starts waiting groups, whose blocks are taken, shared, or loaded from the host.

A group may share blocks that the same plan computes for another group. Like a group whose blocks are loaded, it
computes from the next iteration on.
"""

from time import monotonic

from jpaged.contract.profile import MachineProfile
from jpaged.host.admission import Admission, Start
from jpaged.host.blocks.manager import BlockManager
from jpaged.host.line import Line
from jpaged.host.offload.restore import can_split, recompute_first
from jpaged.host.outcome import Outcome
from jpaged.host.plan_builder import PlanBuilder
from jpaged.host.rows import RowTable
from jpaged.host.sequence import Sequence, SequenceGroup, SequenceState
from jpaged.host.streaming import Streaming


class Entry:
    """Admits groups from the line into a plan, and keeps the sequences whose blocks are still on their way.

    Args:
        blocks: the bookkeeping of the pools.
        line: the groups that wait and run.
        admission: blocks and rows that the first waiting group takes.
        outcome: publishes the blocks that a plan fills.
        rows: the rows of the running sequences.
        streaming: the running sequences that keep blocks on the host.
    """

    def __init__(
        self,
        blocks: BlockManager,
        line: Line,
        admission: Admission,
        outcome: Outcome,
        rows: RowTable,
        streaming: Streaming,
    ) -> None:
        self._outcome = outcome
        self._streaming = streaming
        self.num_swaps_in = 0
        self.num_tokens_recomputed = 0  # by restores, instead of a transfer
        self._blocks = blocks
        self._line = line
        self._admission = admission
        self._rows = rows
        self._loading: list[Sequence] = []  # their blocks arrive with the plan in flight

    @property
    def loading(self) -> list[Sequence]:
        """The sequences whose blocks are on their way into the pool."""
        return self._loading

    def admit(self, plan: PlanBuilder, profile: MachineProfile | None) -> None:
        """Start waiting groups in order while rows, blocks and, for tokens to compute, the budget allow.

        Args:
            plan: the plan under construction.
            profile: rates of the machine, by which a restore is divided; without it all is transferred.
        """
        line = self._line
        num_rows = line.num_rows if line.waiting else 0
        while line.waiting:
            group = line.waiting[0]
            num_rows += group.num_rows
            if group in line.preempted or num_rows > self._admission.max_num_seqs:
                return
            is_loaded = group.is_swapped and not group.is_streamed
            if not plan.has_budget and not is_loaded:
                return
            if (start := self._admission.find(group)) is None:
                return
            line.admit_first()
            if is_loaded:
                self._swap_in(group, start)
            else:
                self._start(plan, group, start)
            first = group.sequences[0]
            if first.state is SequenceState.LOADING and profile is not None and can_split(self._blocks, group):
                self.num_tokens_recomputed += recompute_first(plan, self._blocks, profile, group, first)

    def land(self) -> None:
        """Let sequences run whose blocks have arrived."""
        self._blocks.tiers.finish_transfers()
        for seq in self._loading:
            if seq.state is SequenceState.LOADING:
                seq.state = SequenceState.RUNNING
        self._loading.clear()

    def forget(self) -> None:
        """Forget the sequences on their way: the content of the pools is lost."""
        self._loading.clear()

    def _swap_in(self, group: SequenceGroup, start: Start) -> None:
        """Load the blocks of a swapped group, which computes again from the next step on."""
        members = [seq for seq in group.sequences if seq.state is SequenceState.SWAPPED]
        start.ticket.commit()
        for seq in members:
            seq.state = SequenceState.LOADING
        for seq in group.unfinished:
            self._rows.enter(group, seq)
        for seq in members:
            self._rows.hold(seq)
        self._loading += members
        self.num_swaps_in += 1

    def _start(self, plan: PlanBuilder, group: SequenceGroup, start: Start) -> None:
        """Give a group's leader its blocks and its first chunk; its siblings wait for the tokens that all share."""
        leader, *others = group.unfinished
        self.num_swaps_in += group.is_swapped
        group.fork_at = start.target if others else None
        leader.state = SequenceState.RUNNING if start.is_ready else SequenceState.LOADING
        for seq in others:
            seq.state = SequenceState.UNFORKED
        plan.copies += start.ticket.commit() or []
        for seq in (leader, *others):
            self._rows.enter(group, seq)
        self._rows.hold(leader)
        if group.is_streamed:
            self._streaming.enter(group, leader)
        num_cached = leader.num_computed = start.num_cached
        if group.num_cached_tokens is None:
            group.num_cached_tokens = num_cached
            group.first_scheduled = monotonic()
        if leader.state is SequenceState.LOADING:
            self._loading.append(leader)
        else:
            plan.add(group, leader, start.num_reserved - num_cached)
            self._outcome.publish_planned(leader, num_cached)
