"""Decides, for each iteration, which sequences run and with which blocks: admit, chunk, preempt, resume, finish."""

import math
from collections.abc import Iterable

import numpy as np
from jaxtyping import Int32

from jpaged.contract.plan import BlockCopy, StepPlan
from jpaged.contract.profile import MachineProfile
from jpaged.contract.result import StepResult
from jpaged.host.admission import Admission
from jpaged.host.blocks.manager import BlockManager, BlockStats
from jpaged.host.entry import Entry
from jpaged.host.feed import Feed, compute_all, longest_context
from jpaged.host.growth import Growth
from jpaged.host.line import Line
from jpaged.host.outcome import Outcome
from jpaged.host.pins import Pins
from jpaged.host.plan_builder import PlanBuilder
from jpaged.host.policies.budget import find_token_budget, tokens_within
from jpaged.host.preemption import Preemption
from jpaged.host.roster import Roster
from jpaged.host.rows import NO_DECODES, Decodes, RowTable
from jpaged.host.search.beam import BeamSearch
from jpaged.host.sequence import Sequence, SequenceGroup
from jpaged.host.shared_prefix import SharedPrefix
from jpaged.host.stats import SchedulerStats, StepSums, read_stats
from jpaged.host.streaming import Streaming
from jpaged.host.windows import Windows
from jpaged.request import FinishReason, Request, Terms


class Scheduler:
    """Continuous batching over a block manager (PagedAttention, section 4.5; iteration-level as in Orca).

    In each iteration, every running sequence that has a token to feed decodes it. Then chunked prompts take their next
    chunk of the token budget left, and waiting groups are admitted by priority and arrival. When blocks run out, the
    group served last is preempted whole: swapped, or freed to be computed again. No group is admitted before it. Of
    equal priority, every running group therefore arrived before every waiting one.

    ``plan = schedule()`` must be followed by ``update(plan, result)`` before the next ``schedule()``. In between,
    ``schedule_ahead()`` may plan the following step, which is updated after the first. Devices must run plans in order:
    the next plan may write blocks that an update frees, of a sequence that the plan in flight still computes.

    Args:
        blocks: the bookkeeping of the pools; the scheduler is its one writer.
        max_num_seqs: sequences in one iteration at most.
        max_num_batched_tokens: tokens in one iteration at most; at least ``max_num_seqs``, and a block more if 8-bit.
        max_model_len: tokens of prompt and output that a sequence may reach.
        eos_token_ids: the model's end-of-sequence ids.
        max_burst: steps of one multi-step decode at most, which only runs while no group can be admitted.
        step_sizes: tokens and rows of the compiled steps that take prompts, which may change; empty without padding.
        preemption: "swap", "recompute", or "auto": the cheaper by ``profile``. A full host pool always means recompute.
        profile: rates of this machine; None until they are measured: "auto" swaps then, and a restore transfers all.
    """

    def __init__(
        self,
        blocks: BlockManager,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        eos_token_ids: Iterable[int] = (),
        max_burst: int = 1,
        step_sizes: Iterable[tuple[int, int]] = (),
        preemption: str = "auto",
        profile: MachineProfile | None = None,
    ):
        self._chunk_unit = blocks.block_size if blocks.is_quantized else 1  # a scale depends on all tokens of a block
        assert max_num_batched_tokens >= max_num_seqs + self._chunk_unit - 1
        self.blocks = blocks
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_model_len = max_model_len
        self.eos_token_ids = frozenset(eos_token_ids)
        self.max_burst = max_burst
        self.step_sizes = tuple(step_sizes)
        self.preemption = preemption
        self.profile = profile
        self.max_step_s = math.inf  # of a step with decodes and prompts, by the profile
        self.roster = Roster(blocks.block_size)
        self.line = Line()
        self.pins = Pins(blocks)
        self.rows = RowTable(max_num_seqs, blocks, max_burst)
        self.shared_prefix = SharedPrefix(blocks)
        self.growth = Growth(blocks, self.line, self.rows)
        self._admission = Admission(
            blocks,
            self.roster,
            self.line,
            self.pins,
            self.growth,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=max_model_len,
            eos_token_ids=self.eos_token_ids,
        )
        self.outcome = Outcome(blocks, self.roster, self.line, self.pins, self.rows, self.growth)
        self._streaming = Streaming(blocks, self.outcome, self.rows, max_num_batched_tokens)
        rooms = blocks, self.line, self._admission, self.outcome, self.rows, self._streaming
        windows = Windows(blocks, self.rows, max_num_batched_tokens)
        self._preemption = Preemption(*rooms, windows, self.growth, kind=preemption)
        self._entry = Entry(*rooms)
        self._num_in_flight = 0  # plans scheduled and not updated
        self._can_be_followed = False  # whether the newest plan in flight can
        self._sums = StepSums(blocks, self.pins)

    # Requests -----------------------------------------------------------------------------------------------------

    def check(self, request: Request) -> Terms:
        """Raise ValueError, with the arithmetic, if ``request`` could never run to its end here.

        Returns:
            The terms of the request; with these, ``add`` does not check it again.
        """
        return self._admission.check(request)

    def add(self, request: Request) -> SequenceGroup:
        """Queue a request, its seed settled. Raises what ``check`` raises, changing nothing."""
        terms = self._admission.settle(request)
        group = self.roster.new_group(request, terms.max_tokens, terms.stop_token_ids)
        if request.params.use_beam_search:
            group.beam = BeamSearch(request.params, terms.max_tokens, terms.stop_token_ids)
        group.is_streamed = terms.is_streamed
        self._enter(group, 1 if group.beam else request.params.num_sequences)
        return group

    def pin(self, request: Request) -> SequenceGroup:
        """Queue the computation of a prompt whose blocks are then kept in the pool until ``unpin``.

        Raises:
            ValueError: it does not fit beside the pinned prefixes and the unfinished requests.
        """
        self._admission.check_pin(request)
        group = self.roster.new_group(request, 0, frozenset())
        group.is_pin = True
        self.pins.queue(group)
        self._enter(group, 1)
        return group

    def is_pin(self, request_id: str) -> bool:
        """Whether a pin has this name, computed or not."""
        return request_id in self.pins

    def is_pinned(self, request_id: str) -> bool:
        """Whether the blocks of a pin are in the pool."""
        return self.pins.is_held(request_id)

    def unpin(self, request_id: str) -> None:
        """Release the blocks of a pin, which stay in the prefix cache; end its computation if it still runs.

        Raises:
            ValueError: unknown, or unpinned already.
        """
        if request_id not in self.pins:
            raise ValueError(f"{request_id!r} is not pinned: it never was, or it was unpinned already")
        if self.pins.is_held(request_id):
            self.pins.release(request_id)
        else:
            self.abort(request_id)

    def abort(self, request_id: str, reason: FinishReason = FinishReason.ABORT) -> SequenceGroup | None:
        """Finish a request now and free its blocks; None if it is unknown or already finished.

        A beam search keeps its live sequences as they are, and loses those that had finished.
        """
        group = self.roster.requests.get(request_id)
        if group is not None:
            self.pins.discard(request_id)
            for seq in group.unfinished:
                self.finish(group, seq, reason)
        return group

    def finish(self, group: SequenceGroup, seq: Sequence, reason: FinishReason) -> None:
        """End one sequence and free its blocks; the group ends with its last sequence.

        If the sequence has already finished (its last token also completed a stop string), only the reason changes.
        """
        self.outcome.finish(group, seq, reason)

    def forget_pool(self) -> None:
        """Compute everything again: the content of the pools is lost because a step failed."""
        self._preemption.num_preemptions += self.line.preempt_all()
        self._num_in_flight = 0
        for group in self.roster.groups:
            self._preemption.drop_blocks(group, is_trusted=False)
            for seq in group.unfinished:
                seq.num_pending = 0
        self._entry.forget()
        for pin in self.pins.requeue_all():
            self.roster.enter(pin)
            self.line.join(pin)
        self.blocks.forget_all()
        self._admission.forget_refusal()

    @property
    def has_unfinished(self) -> bool:
        """Whether some request is unfinished, or some pin not computed."""
        return bool(self.roster.requests)

    def stats(self) -> SchedulerStats:
        """The counters now."""
        return read_stats(self.line, self.pins, self._preemption, self._entry, self._sums)

    def block_stats(self) -> BlockStats:
        """Count what the pools hold; a steady row has its last block to itself, and fills it step by step."""
        self.outcome.publish_due()
        return self.blocks.stats().without(self.rows.num_unwritten, self.blocks.block_size, self.blocks.groups)

    def _enter(self, group: SequenceGroup, num_sequences: int) -> None:
        for index in range(num_sequences):
            self.roster.new_sequence(group, index, list(group.request.prompt_token_ids))
        self.roster.enter(group)
        self.line.join(group)

    # Planning a step ----------------------------------------------------------------------------------------------

    def schedule(self) -> StepPlan:
        """Plan one step. It has no chunks only if no request is unfinished, or if all come back in the next step."""
        assert self._num_in_flight == 0, "the results of the step before come first"
        self.line.preempted.clear()
        if self.line.waiting:
            self.outcome.publish_due()
            if self.line.running:
                self._preemption.yield_to_first(self.profile)
        num_preemptions = self._preemption.num_preemptions
        room = self._preemption.make_room(self.profile)
        may_admit = self._preemption.num_preemptions == num_preemptions
        plan = self._plan(room.decodes, np.ones_like(room.decodes.rows), room.feeds, room.copies, may_admit=may_admit)
        return self._send_off(plan)

    def schedule_ahead(self) -> StepPlan | None:
        """Plan the step after the one in flight; None if that one's results come first, or if there is nothing to do.

        If decoding is all there is to do, several steps are planned at once. No group is preempted before it is known
        which sequences end.
        """
        assert self._num_in_flight == 1
        has_waiting = bool(self.line.waiting)
        if has_waiting:
            self.outcome.publish_due()  # a waiting group may match these blocks
        if not self._can_be_followed or (has_waiting and self._preemption.groups_to_yield()):
            return None
        self._entry.land()  # the plan in flight loads nothing: groups that resumed found all their blocks on the device
        self._streaming.move_out(self.line.waiting)
        decodes = self.rows.decodes()
        feeds = self._preemption.wanted(decodes.rows)
        if len(decodes.rows) == 0 and not (feeds or has_waiting or self._streaming.members):
            return None
        self.line.preempted.clear()
        may_admit = has_waiting and self._admission.can_admit_first()
        may_burst = self.max_burst > 1 and not (may_admit or self.rows.num_restless or self._streaming.members)
        for most in (self.max_burst, 1) if may_burst else (1,):
            num_draws = self.rows.num_draws(decodes, most)
            copies = self._preemption.append(decodes.rows, num_draws, feeds)
            if copies is not None:
                break
        else:  # blocks that leave the device let the next plan go on
            decodes, num_draws, feeds, copies, may_admit = NO_DECODES, NO_DECODES.rows, [], [], False
        plan = self._plan(decodes, num_draws, feeds, copies, may_admit=may_admit)
        if plan.is_empty:
            return None
        return self._send_off(plan)

    def _plan(
        self,
        decodes: Decodes,
        num_draws: Int32[np.ndarray, " decodes"],
        feeds: list[Feed],
        copies: list[BlockCopy],
        *,
        may_admit: bool,
    ) -> StepPlan:
        """Plan one step: decodes, chunks of running prompts, and the groups that can be admitted."""
        budget = self.max_num_batched_tokens
        if feeds or (may_admit and len(num_draws) > 0):
            link_s = self._streaming.link_s(self.profile)  # the device computes prompts meanwhile for nothing
            budget = find_token_budget(
                [1] * len(num_draws) + [feed.num_tokens for feed in feeds],
                ((group.num_rows, group.prompt_len) for group in (self.line.waiting if may_admit else ())),
                max_num_seqs=self.max_num_seqs,
                max_num_tokens=self.max_num_batched_tokens,
                step_sizes=self.step_sizes,
                least_prompt=self._chunk_unit,
                most_beside=tokens_within(self.profile, max(self.max_step_s, link_s), longest_context(feeds)),
            )
        plan = PlanBuilder(self.rows, self.shared_prefix, budget, copies, self._chunk_unit)
        plan.decode(decodes, num_draws)
        if feeds:
            compute_all(plan, feeds, self.outcome)
        if may_admit:
            self._entry.admit(plan, self.profile)
        transfers = self.blocks.tiers.take_transfers()
        return self._streaming.name_blocks(plan.build(transfers.to_host, transfers.from_host))

    def _send_off(self, plan: StepPlan) -> StepPlan:
        """Mark the plan as in flight. Returns the plan."""
        self._num_in_flight += 1
        self._can_be_followed = plan.can_be_followed
        self._sums.count(plan.num_steps)
        return plan

    # Results ------------------------------------------------------------------------------------------------------

    def drop(self) -> None:
        """Forget the oldest plan in flight, instead of ``update``: its results are not needed."""
        self._num_in_flight -= 1
        if self._num_in_flight == 0:  # otherwise it loaded nothing
            self._entry.land()

    def update(self, plan: StepPlan, result: StepResult) -> list[SequenceGroup]:
        """Apply the results of the step of ``plan``.

        Publishes the blocks that it filled, and forks groups whose shared tokens are done. Then appends the tokens,
        moves beams on and ends the sequences that are complete.

        Returns:
            The groups that gained tokens, each once, in plan order.
        """
        self.drop()
        if self.rows.num_restless:
            self.outcome.settle_chunks(plan)
        touched: dict[SequenceGroup, None] = {}
        if plan.prompt_scores:
            touched |= dict.fromkeys(self.outcome.take_prompt_scores(plan, result))
        touched |= dict.fromkeys(self.outcome.take_tokens(plan, result))
        if self.blocks.enable_prefix_caching:
            self.outcome.note_decoded(plan)
        if plan.beams:
            touched |= dict.fromkeys(self.outcome.take_beams(plan, result))
        return list(touched)
