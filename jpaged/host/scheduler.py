"""Decides, every step, which sequences run and with which blocks: admit, chunk, preempt, resume, finish."""

import math
from bisect import insort
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from jpaged.contract.plan import (
    BeamCandidates,
    BlockCopy,
    Chunk,
    Costs,
    DecodeChunks,
    Decodes,
    DecodeSamples,
    StepPlan,
    StepResult,
)
from jpaged.host.admission import Capacity, num_blocks_covering, num_forked_blocks, width_name
from jpaged.host.blocks.manager import NO_MATCH, BlockManager, OutOfBlocks, PrefixMatch
from jpaged.host.decode_batch import DecodeBatch
from jpaged.host.plan_builder import PlanBuilder
from jpaged.host.policies.eviction import LEAST_HIT_INSIDE
from jpaged.host.policies.order import schedule_order
from jpaged.host.policies.victim import choose_victim, is_swap_cheaper
from jpaged.host.search.beam import BeamSearch
from jpaged.host.sequence import Sequence, SequenceGroup, SequenceState, common_len, num_shared_tokens
from jpaged.request import MAX_BEAM_CANDIDATES, FinishReason, Request, derive_seed

WATERMARK = 0.01
"""Fraction of the pool an admission leaves free, so that running sequences can grow before anyone is preempted."""


@dataclass(frozen=True, slots=True)
class SchedulerStats:
    """Counters since the start, and the queues now (in sequence groups).

    ``num_logical_blocks`` and ``num_physical_blocks`` are sums over all steps: blocks in the tables of running
    sequences, and distinct blocks among them. What sharing saves is one minus their ratio (section 6.3).
    """

    num_waiting: int
    num_running: int
    num_pins: int
    num_preemptions: int
    num_swaps_out: int
    num_swaps_in: int
    num_steps: int
    num_logical_blocks: int
    num_physical_blocks: int


class Feed(NamedTuple):
    """A running sequence, and how many of its tokens the next step is to bring into the pool, if the budget allows."""

    group: SequenceGroup
    seq: Sequence
    target: int


def _feeds_of(group: SequenceGroup) -> list[Feed]:
    return [Feed(group, seq, target) for seq, target in group.targets()]


class Scheduler:
    """Continuous batching over a block manager (PagedAttention, section 4.5; iteration-level as in Orca).

    Each step: every running sequence that has a token to feed decodes it, prompts under way take the next chunk of what
    the token budget leaves, then waiting groups are admitted, by priority and then in order of arrival. When blocks run
    out, the group that would be served last is preempted whole: swapped to the host pool, or freed and its tokens kept
    to be recomputed. Nothing is admitted before it. Of equal priority, every running group therefore arrived before
    every waiting one.

    ``plan = schedule()`` must be followed by ``update(plan, result)`` before the next ``schedule()``. In between
    ``schedule_ahead()`` may plan the step after it, which is updated after it. The device must run them in order:
    blocks that an update frees may be written by the next plan, while the one under way still computes, in vain, a
    token of the sequence that had them.

    Args:
        blocks: the pools' bookkeeping; the scheduler is its one writer.
        max_num_seqs: sequences in one step at most.
        max_num_batched_tokens: tokens in one step at most; at least ``max_num_seqs``.
        max_model_len: tokens of prompt and output a sequence may reach.
        eos_token_ids: the model's end-of-sequence ids.
        max_burst: steps that a plan made ahead may run in a row while nobody can be admitted.
        step_sizes: tokens and rows of the compiled steps that take prompts, for those who pad to them.
        preemption: "swap", "recompute", or "auto": what ``costs`` say is cheaper. Without room in the host pool it is
            always recompute.
        costs: of this machine; None until somebody has measured them, when "auto" swaps.
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
        costs: Costs | None = None,
    ):
        assert max_num_batched_tokens >= max_num_seqs
        self.blocks = blocks
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_model_len = max_model_len
        self.eos_token_ids = frozenset(eos_token_ids)
        self.max_burst = max_burst
        self.step_sizes = tuple(step_sizes)
        self.preemption = preemption
        self.costs = costs
        self._groups: dict[str, SequenceGroup] = {}  # unfinished, by request id
        self._sequences: dict[int, tuple[SequenceGroup, Sequence]] = {}  # the same, by sequence id
        self._waiting: list[SequenceGroup] = []  # new or preempted, in schedule_order
        self._running: list[SequenceGroup] = []  # in schedule_order
        self._loading: list[Sequence] = []  # the sequences that this step brings back from the host
        self._preempted: set[SequenceGroup] = set()  # by this step: their blocks are still on their way out
        self._pins: dict[str, SequenceGroup] = {}  # by request id, from when they are asked for until unpinned
        # The last admission refused, and the blocks then free and cached.
        self._refused: tuple[SequenceGroup, tuple[int, int]] | None = None
        self.num_output_tokens = 0  # since the start; of searches, one for each live beam and step
        self._num_under_way = 0  # plans scheduled and not updated
        self._can_be_followed = False  # the newest of them
        self._batch: DecodeBatch | None = None  # what goes on from it, if it came from a batch
        self._num_arrivals = 0
        self._num_seqs = 0
        self._num_preemptions = 0
        self._num_swaps_out = 0
        self._num_swaps_in = 0
        self._num_steps = 0
        self._num_logical_blocks = 0
        self._num_physical_blocks = 0

    # Requests -----------------------------------------------------------------------------------------------------

    def check(self, request: Request) -> None:
        """Raise ValueError, with the arithmetic, if ``request`` could never run to its end here."""
        params = request.params
        self._check_new(request)
        if params.num_sequences > self.max_num_seqs:
            name = width_name(request.params)
            raise ValueError(
                f"{name}={params.num_sequences} is more than max_num_seqs={self.max_num_seqs}: "
                f"lower {name} or raise max_num_seqs"
            )
        self._capacity(request).check(request)
        stop_token_ids = self._stop_token_ids(request)
        if params.use_beam_search and (1 + len(stop_token_ids)) * params.num_sequences > MAX_BEAM_CANDIDATES:
            raise ValueError(
                f"a beam of {params.num_sequences} with {len(stop_token_ids)} stop tokens looks at "
                f"{(1 + len(stop_token_ids)) * params.num_sequences} continuations in a step: at most "
                f"{MAX_BEAM_CANDIDATES} are taken; give a narrower beam or fewer stop_token_ids"
            )

    def add(self, request: Request) -> SequenceGroup:
        """Queue a request, its seed settled. Raises what ``check`` raises, changing nothing."""
        self.check(request)
        params, prompt_len = request.params, len(request.prompt_token_ids)
        if params.max_tokens is None:
            max_tokens = self._capacity(request).most_tokens(prompt_len, params.num_sequences)
        else:
            max_tokens = min(params.max_tokens, self.max_model_len - prompt_len)
        stops = self._stop_token_ids(request)
        group = self._new_group(request, max_tokens, stops)
        if params.use_beam_search:
            group.beam = BeamSearch(params, max_tokens, stops)
        self._new_sequences(group, 1 if group.beam else params.num_sequences)
        self._enqueue(group)
        return group

    def abort(self, request_id: str) -> SequenceGroup | None:
        """Finish a request now and free its blocks; None if it is unknown or already finished.

        Of a beam search remain its live sequences as they are, not those that had finished.
        """
        group = self._groups.get(request_id)
        self._pins.pop(request_id, None)
        if group is not None:
            for seq in group.unfinished:
                self.finish(group, seq, FinishReason.ABORT)
        return group

    def finish(self, group: SequenceGroup, seq: Sequence, reason: FinishReason) -> None:
        """End one sequence and free its blocks; the group ends with its last sequence.

        For a sequence that has finished (its last token also completed a stop string) only the reason changes.
        """
        seq.finish_reason = reason
        if seq.is_finished:
            return
        self._release(group, seq)
        seq.state = SequenceState.FINISHED
        del self._sequences[seq.seq_id]
        if group.is_finished:
            self._leave(group)

    def pin(self, request: Request) -> SequenceGroup:
        """Queue the computation of a prompt whose blocks are then kept in the pool until ``unpin``.

        Raises:
            ValueError: it does not fit beside what is pinned and under way.
        """
        self._check_new(request)
        others = [self._most_blocks(group) for group in self._groups.values() if not group.is_pin]
        self._capacity(request).check_pin(len(request.prompt_token_ids), others)
        group = self._new_group(request, 0, frozenset())
        group.is_pin = True
        self._new_sequences(group, 1)
        self._pins[request.request_id] = group
        self._enqueue(group)
        return group

    def is_pinned(self, request_id: str) -> bool:
        """Whether the blocks of a pin are in the pool."""
        return request_id in self._pins and request_id not in self._groups

    @property
    def _pinned_seq_ids(self) -> list[int]:
        """The sequences that hold the blocks of pins."""
        return [pin.sequences[0].seq_id for request_id, pin in self._pins.items() if self.is_pinned(request_id)]

    def unpin(self, request_id: str) -> None:
        """Let go of a pin's blocks, which stay in the prefix cache; end its computation if it is still under way.

        Raises:
            ValueError: unknown, or unpinned already.
        """
        group = self._pins.pop(request_id, None)
        if group is None:
            raise ValueError(f"{request_id!r} is not pinned: it never was, or it was unpinned already")
        if request_id in self._groups:
            self.abort(request_id)
        else:
            self.blocks.free(group.sequences[0].seq_id)
        self._refused = None

    def forget_pool(self) -> None:
        """The pools' content is lost (a step failed): all groups recompute, nothing cached is trusted."""
        for group in self._running:
            insort(self._waiting, group, key=schedule_order)
            self._num_preemptions += 1
        self._running.clear()
        self._num_under_way = 0
        for group in self._groups.values():
            for seq in group.unfinished:
                seq.num_pending = 0
            self._drop_blocks(group, is_trusted=False)
        self._loading.clear()
        for request_id, group in self._pins.items():
            if self.is_pinned(request_id):
                self.blocks.free(group.sequences[0].seq_id)
                self._enqueue(group)
        self.blocks.forget_all()
        self._refused = None

    @property
    def has_unfinished(self) -> bool:
        return bool(self._groups)

    def stats(self) -> SchedulerStats:
        return SchedulerStats(
            num_waiting=len(self._waiting),
            num_running=len(self._running),
            num_pins=len(self._pins),
            num_preemptions=self._num_preemptions,
            num_swaps_out=self._num_swaps_out,
            num_swaps_in=self._num_swaps_in,
            num_steps=self._num_steps,
            num_logical_blocks=self._num_logical_blocks,
            num_physical_blocks=self._num_physical_blocks,
        )

    def _stop_token_ids(self, request: Request) -> frozenset[int]:
        params = request.params
        return frozenset(params.stop_token_ids or ()) | (frozenset() if params.ignore_eos else self.eos_token_ids)

    def _check_new(self, request: Request) -> None:
        if request.request_id in self._groups or request.request_id in self._pins:
            raise ValueError(f"request_id {request.request_id!r} is already in use by an unfinished request")
        if not request.prompt_token_ids:
            raise ValueError("the prompt has no tokens: give at least one")

    def _new_group(self, request: Request, max_tokens: int, stop_token_ids: frozenset[int]) -> SequenceGroup:
        assert request.seed is not None
        self._num_arrivals += 1
        return SequenceGroup(
            request=request,
            arrival=self._num_arrivals - 1,
            sequences=[],
            max_tokens=max_tokens,
            stop_token_ids=stop_token_ids,
        )

    def _new_sequences(self, group: SequenceGroup, count: int) -> None:
        for index in range(count):
            self._new_sequence(group, index, list(group.request.prompt_token_ids))

    def _new_sequence(self, group: SequenceGroup, index: int, token_ids: list[int]) -> Sequence:
        assert group.request.seed is not None
        seed = derive_seed(group.request.seed, index)
        seq = Sequence(self._num_seqs, index, seed, token_ids, prompt_len=group.prompt_len)
        self._num_seqs += 1
        group.sequences.append(seq)
        return seq

    def _enqueue(self, group: SequenceGroup) -> None:
        for seq in group.sequences:
            seq.state, seq.num_computed = SequenceState.WAITING, 0
            self._sequences[seq.seq_id] = group, seq
        self._groups[group.request.request_id] = group
        insort(self._waiting, group, key=schedule_order)

    def _leave(self, group: SequenceGroup) -> None:
        """The group is finished, or pinned: it is no concern of the queues any more."""
        self._refused = None
        del self._groups[group.request.request_id]
        (self._running if group in self._running else self._waiting).remove(group)

    # A step -------------------------------------------------------------------------------------------------------

    def schedule(self) -> StepPlan:
        """Plan one step. Without chunks only if nothing is unfinished, or what is comes back in the next step."""
        assert self._num_under_way == 0, "the results of the step before come first"
        self._preempted.clear()
        self._make_way()
        num_preemptions = self._num_preemptions
        feeds, copies = self._make_room()
        plan = self._plan(feeds, copies, may_admit=self._num_preemptions == num_preemptions)
        self._send_off(plan)
        return plan

    def schedule_ahead(self) -> StepPlan | None:
        """Plan the step after the one under way; None if the results of that come first, or if there is nothing to do.

        Nobody is preempted before it is known who ends.
        """
        assert self._num_under_way == 1
        if not self._can_be_followed or self._groups_to_make_way():
            return None
        self._land()  # the step under way brings nothing from the host: who resumes found all its blocks on the device
        self._preempted.clear()
        if (plan := self._decode_on()) is not None:
            return plan
        feeds = [feed for group in self._running for feed in _feeds_of(group)]
        copies = self._append(self._missing(feeds))
        if copies is None:
            return None
        plan = self._plan(feeds, copies)
        if plan.is_empty:
            return None
        self._send_off(plan)
        return plan

    def _decode_on(self) -> StepPlan | None:
        """Let all that run draw their next tokens, if that is all there is to do and there is room: a step or a burst.

        This is what most steps are. They cost the less the less is done for each sequence.
        """
        if self._can_admit():
            return None
        batch = self._batch or DecodeBatch.find(self._running, self.blocks)
        batch = batch and batch.those_that_go_on()
        if not batch or not batch.seqs:
            return None
        seq_ids = [seq.seq_id for seq in batch.seqs]
        for most in (self.max_burst, 1):
            num_draws = batch.num_draws(most)
            copies = self._append(list(zip(seq_ids, num_draws.tolist(), strict=True)))
            if copies is not None:
                break
        else:
            return None
        assert not copies, "who writes to a block in the plan before owns it"
        batch, decodes = batch.draw(num_draws)
        transfers = self.blocks.take_transfers()
        assert not transfers.from_host, "only an admission brings blocks back"
        plan = StepPlan(
            chunks=DecodeChunks(decodes),
            samples=DecodeSamples(decodes),
            to_host=transfers.to_host,
            num_steps=int(num_draws.max()),
        )
        self._send_off(plan, batch)
        return plan

    def _plan(self, feeds: list[Feed], copies: list[BlockCopy], *, may_admit: bool = True) -> StepPlan:
        """One step: decodes, chunks of prompts under way, and whoever can be admitted."""
        plan = PlanBuilder(self._find_budget(feeds, may_admit=may_admit), copies)
        self._compute_all(plan, feeds)
        if may_admit:
            self._admit(plan)
        transfers = self.blocks.take_transfers()
        return plan.build(transfers.to_host, transfers.from_host)

    def _find_budget(self, feeds: list[Feed], *, may_admit: bool) -> int:
        """Tokens of the next step at most.

        Padding costs as much as tokens do. So where prompts beside decodes fill one of ``step_sizes``, and less than as
        much again is left of them, the rest waits for the next step, which those decodes need anyway. An estimate: what
        a prompt will find in the prefix cache is not known yet, nor whether its blocks will be there.
        """
        lens = [feed.target - feed.seq.num_computed for feed in feeds]
        num_tokens, num_rows, num_decodes = sum(lens), len(lens), lens.count(1)
        if num_decodes == 0:
            return self.max_num_batched_tokens
        for group in self._waiting if may_admit else ():
            if num_rows + group.num_rows > self.max_num_seqs or num_tokens >= self.max_num_batched_tokens:
                break
            num_rows += group.num_rows
            num_tokens += group.prompt_len
        limit = self.max_num_batched_tokens
        full = (
            size
            for size, rows in self.step_sizes
            if num_decodes < size <= min(num_tokens, limit)
            and rows >= num_rows
            and size - num_decodes >= num_tokens - size
        )
        return max(full, default=limit)

    def _compute_all(self, plan: PlanBuilder, feeds: list[Feed]) -> None:
        """Decodes first, then chunks of prompts while the budget lasts."""
        chunks: list[Feed] = []
        for feed in feeds:
            num_tokens = feed.target - feed.seq.num_computed
            if num_tokens == 1:
                self._compute(plan, feed.group, feed.seq, 1)
            elif num_tokens > 1:
                chunks.append(feed)
        for group, seq, target in chunks:
            if plan.budget > 0:
                self._compute(plan, group, seq, target - seq.num_computed)

    def _can_admit(self) -> bool:
        """Whether the first in the queue could be admitted now."""
        if not self._waiting:
            return False
        group = self._waiting[0]
        if self._rows_short(group) > 0 or self._refused == (group, self._pool):
            return False
        if self._blocks_short(group, self._match(group)) > 0:
            self._refused = group, self._pool
            return False
        return True

    @property
    def _pool(self) -> tuple[int, int]:
        """What an admission depends on, beside the rows: blocks free and cached."""
        return self.blocks.num_free_blocks, self.blocks.num_cached_blocks

    def _send_off(self, plan: StepPlan, batch: DecodeBatch | None = None) -> None:
        """The plan is under way. Its blocks are added to the sums; those that only pins hold are nobody's."""
        self._num_under_way += 1
        self._batch = batch
        self._can_be_followed = plan.can_be_followed
        self._num_steps += plan.num_steps
        pins = self._pinned_seq_ids
        num_pinned = sum(len(self.blocks.block_table(seq_id)) for seq_id in pins)
        self._num_logical_blocks += self.blocks.num_logical_blocks - num_pinned
        self._num_physical_blocks += self.blocks.num_used_blocks - self.blocks.num_blocks_freed_by(pins)

    def drop(self) -> None:
        """The oldest plan is not under way any more: instead of ``update``, where nobody waits for what it brings."""
        self._num_under_way -= 1
        if self._num_under_way == 0:  # otherwise nothing came from the host
            self._batch = None
            self._land()

    def update(self, plan: StepPlan, result: StepResult) -> list[SequenceGroup]:
        """Take in what the step of ``plan`` produced.

        Publishes the blocks it filled, forks groups whose shared tokens are done, appends the tokens, moves beams on
        and ends the sequences that are complete.

        Returns:
            The groups that gained tokens, each once, in plan order.
        """
        self.drop()
        if plan.decodes is None:
            self._settle_chunks(plan.chunks)
        for score, piece in zip(plan.prompt_scores, result.prompt_scores, strict=True):
            seq_id = plan.chunks[score.chunk].seq_id
            if seq_id in self._sequences:
                self._sequences[seq_id][0].prompt_scores.append(piece)
        touched = dict.fromkeys(self._take_tokens(plan, result))
        if plan.decodes is not None:
            self._publish_drawn(plan.decodes)
        for select, candidates in zip(plan.beams, result.beams, strict=True):
            seq_ids = [plan.chunks[chunk].seq_id for chunk in select.chunks]
            if seq_ids[0] not in self._sequences:
                continue
            group, live = self._sequences[seq_ids[0]][0], [self._sequences[seq_id][1] for seq_id in seq_ids]
            self.num_output_tokens += len(live)
            self._advance_beams(group, live, candidates)
            touched[group] = None
        return list(touched)

    def _settle_chunks(self, chunks: Iterable[Chunk]) -> None:
        """Publish the blocks that chunks filled; fork the groups, and settle the pins, that waited for their last."""
        block_size = self.blocks.block_size
        for chunk in chunks:
            if (member := self._sequences.get(chunk.seq_id)) is None:
                continue  # ended since this was planned
            group, seq = member
            stop = chunk.stop
            if stop // block_size > chunk.start // block_size:
                self._publish(group, seq)
            if stop == group.fork_at:
                self._fork_siblings(group, seq)
            if group.is_pin and stop == seq.prompt_len:
                self._settle_pin(group, seq)

    def _take_tokens(self, plan: StepPlan, result: StepResult) -> list[SequenceGroup]:
        """Append what was drawn, and end the sequences that are complete.

        Returns:
            The group of each sequence that gained tokens, in plan order.
        """
        step_token_ids, scores = zip((result.token_ids, result.scores), *result.later, strict=True)
        drawn = np.stack(step_token_ids, axis=1).tolist()
        touched: list[SequenceGroup] = []
        num_taken = 0
        for row, (seq_id, num_draws, token_ids) in enumerate(zip(*plan.draws, drawn, strict=True)):
            if (member := self._sequences.get(seq_id)) is None:
                continue  # ended since this was planned
            group, seq = member
            touched.append(group)
            del token_ids[num_draws:]
            seq.num_pending -= num_draws
            seq.scores.append(scores)
            seq.score_rows.append(row)
            if (  # mostly none of them is the last: kept free of other work
                len(seq.token_ids) + num_draws < seq.prompt_len + group.max_tokens
                and group.stop_token_ids.isdisjoint(token_ids)
            ):
                seq.token_ids += token_ids
                num_taken += num_draws
            else:
                self._take_last(group, seq, token_ids)
        self.num_output_tokens += num_taken
        return touched

    def _take_last(self, group: SequenceGroup, seq: Sequence, token_ids: list[int]) -> None:
        """Append what was drawn, up to the token that ends the sequence, if there is one."""
        for token_id in token_ids:
            seq.token_ids.append(token_id)
            self.num_output_tokens += 1
            if token_id in group.stop_token_ids and seq.num_outputs > group.request.params.min_tokens:
                return self.finish(group, seq, FinishReason.STOP)
            if seq.num_outputs >= group.max_tokens:
                return self.finish(group, seq, FinishReason.LENGTH)

    def _publish_drawn(self, decodes: Decodes) -> None:
        """Publish the blocks that decodes filled."""
        block_size, starts = self.blocks.block_size, decodes.positions - 1
        is_filled = (starts + decodes.num_draws) // block_size > starts // block_size
        for row in np.flatnonzero(is_filled).tolist():
            seq_id = decodes.decoders[row].seq_id
            if seq_id in self._sequences:
                self._publish(*self._sequences[seq_id])

    # Inside a step ------------------------------------------------------------------------------------------------

    def _make_way(self) -> None:
        """Preempt groups of lower priority than the first in the queue, if and while that is what it takes."""
        lower = self._groups_to_make_way()
        if not lower:
            return
        first = self._waiting[0]
        while lower:
            self._preempt(lower.pop())
            match = self._match(first)  # what was freed may have been part of it
            if self._rows_short(first) <= 0 and self._blocks_short(first, match) <= 0:
                return

    def _groups_to_make_way(self) -> list[SequenceGroup]:
        """Running groups of lower priority than the first in the queue, if it needs their room and that would do."""
        if not self._waiting:
            return []
        first = self._waiting[0]
        priority = first.request.priority
        if not self._running or self._running[-1].request.priority <= priority:
            return []
        lower = [group for group in self._running if group.request.priority > priority]
        if self._rows_short(first) > sum(group.num_rows for group in lower):
            return []
        match = self._match(first)
        num_short = self._blocks_short(first, match)
        seq_ids = [seq.seq_id for group in lower for seq in group.running]
        num_blocks = self.blocks.num_blocks_freed_by(seq_ids, match=match)
        is_needed = self._rows_short(first) > 0 or num_short > 0
        return lower if is_needed and num_short <= num_blocks else []

    def _missing(self, feeds: list[Feed]) -> list[tuple[int, int]]:
        """The room that sequences still need for the tokens they feed: (seq_id, number of tokens)."""
        held = self.blocks.num_tokens
        return [(seq.seq_id, target - num_held) for _, seq, target in feeds if (num_held := held(seq.seq_id)) < target]

    def _make_room(self) -> tuple[list[Feed], list[BlockCopy]]:
        """Give every running sequence room for all its tokens, preempting from the back while blocks are short.

        Returns:
            What those that still run feed, and the copies to be made before.
        """
        feeds: list[Feed] = []
        copies: list[BlockCopy] = []
        index = 0
        while index < len(self._running):
            group = self._running[index]
            group_feeds = _feeds_of(group)
            while (group_copies := self._append(self._missing(group_feeds))) is None:
                victim = choose_victim(self._running)
                self._preempt(victim)
                if victim is group:
                    return feeds, copies
            feeds += group_feeds
            copies += group_copies
            index += 1
        return feeds, copies

    def _append(self, missing: list[tuple[int, int]]) -> list[BlockCopy] | None:
        """Give sequences the room they miss; None, and nothing, when blocks are short."""
        try:
            return self.blocks.append_all(missing)
        except OutOfBlocks:
            return None

    def _preempt(self, group: SequenceGroup) -> None:
        """Take all device blocks from a group and queue it (PagedAttention, section 4.5)."""
        assert self._num_under_way == 0, "who ends is known before anybody is preempted"
        self._running.remove(group)
        if self._swap_out(group):
            self._num_swaps_out += 1
        else:
            self._drop_blocks(group)
        insort(self._waiting, group, key=schedule_order)
        self._preempted.add(group)
        self._num_preemptions += 1

    def _swap_out(self, group: SequenceGroup) -> bool:
        """Move a group to the host pool, if that is the way to preempt it and there is room."""
        members = group.running
        seq_ids = [seq.seq_id for seq in members]
        if self.preemption == "recompute" or self.blocks.num_host_blocks == 0:
            return False
        if self.preemption == "auto" and self.costs is not None:
            # What others hold will still be there, whichever way the group comes back.
            num_blocks = self.blocks.num_blocks_freed_by(seq_ids)
            num_computed = sum(seq.num_computed for seq in members) - (len(members) - 1) * num_shared_tokens(members)
            is_cheaper = is_swap_cheaper(
                self.costs,
                num_blocks_out=self.blocks.num_host_blocks_to_swap_out(seq_ids),
                num_blocks_in=num_blocks,
                num_tokens=min(num_computed, num_blocks * self.blocks.block_size),
            )
            if not is_cheaper:
                return False
        try:
            self.blocks.swap_out(seq_ids)
        except OutOfBlocks:
            return False
        for seq in members:
            seq.state = SequenceState.SWAPPED
        return True

    def _drop_blocks(self, group: SequenceGroup, *, is_trusted: bool = True) -> None:
        """Free all that an unfinished group holds; it will compute its tokens again."""
        for seq in group.unfinished:
            self._release(group, seq, is_trusted=is_trusted)
            seq.state, seq.num_computed = SequenceState.WAITING, 0
        group.fork_at = None
        if group.needs_prompt_scores:
            group.prompt_scores.clear()

    def _release(self, group: SequenceGroup, seq: Sequence, *, is_trusted: bool = True) -> None:
        """Free a sequence's blocks, if it holds any; what they contain can be found in the prefix cache."""
        if seq.state is SequenceState.RUNNING and is_trusted:
            self._publish(group, seq, include_partial=True)
        if seq.state.holds_blocks:
            self.blocks.free(seq.seq_id)

    def _publish(self, group: SequenceGroup, seq: Sequence, *, include_partial: bool = False) -> None:
        salt = group.request.prefix_salt
        self.blocks.publish(seq.seq_id, seq.token_ids, seq.num_known, salt=salt, include_partial=include_partial)

    def _admit(self, plan: PlanBuilder) -> None:
        """Start waiting groups in order while the rows, the pool and, for those to be computed, the budget allow."""
        num_rows = self._num_rows
        while self._waiting:
            group = self._waiting[0]
            if group in self._preempted:
                return
            if self._refused == (group, self._pool):
                return  # no block was freed or published since: matching its prompt again would end the same way
            if num_rows + group.num_rows > self.max_num_seqs or (plan.budget == 0 and not group.is_swapped):
                return
            match = self._match(group)
            if self._blocks_short(group, match) > 0:
                self._refused = group, self._pool
                return
            num_rows += group.num_rows
            self._waiting.pop(0)
            insort(self._running, group, key=schedule_order)
            if group.is_swapped:
                self._swap_in(group)
            else:
                self._start(plan, group, match)

    def _swap_in(self, group: SequenceGroup) -> None:
        """Bring a swapped group back: it computes again from the next step on."""
        members = [seq for seq in group.sequences if seq.state is SequenceState.SWAPPED]
        self.blocks.swap_in([seq.seq_id for seq in members])
        for seq in members:
            seq.state = SequenceState.LOADING
        self._loading += members
        self._num_swaps_in += 1

    def _start(self, plan: PlanBuilder, group: SequenceGroup, match: PrefixMatch) -> None:
        """Give a group's leader its blocks and its first chunk; the others wait for the tokens they share."""
        leader, *others = group.unfinished
        group.fork_at = group.fork_len() if others else None
        leader.state = SequenceState.LOADING if match.is_on_host else SequenceState.RUNNING
        for seq in others:
            seq.state = SequenceState.UNFORKED
        target = group.fork_at or len(leader.token_ids)
        plan.copies += self.blocks.reserve(leader.seq_id, target, match=match)
        leader.num_computed = match.num_tokens
        if group.num_cached_tokens is None:
            group.num_cached_tokens = leader.num_computed
        if leader.state is SequenceState.LOADING:
            self._loading.append(leader)
        else:
            self._compute(plan, group, leader, target - leader.num_computed)

    def _land(self) -> None:
        """Blocks on their way from the host are in the pool: their sequences run."""
        self.blocks.finish_transfers()
        for seq in self._loading:
            if seq.state is SequenceState.LOADING:
                seq.state = SequenceState.RUNNING
        self._loading.clear()

    def _match(self, group: SequenceGroup) -> PrefixMatch:
        """What the prefix cache has of what the group's leader must compute; one token is always left to compute."""
        if group.needs_prompt_scores or group.is_swapped:
            return NO_MATCH
        leader = group.unfinished[0]
        target = group.fork_len() if len(group.unfinished) > 1 else len(leader.token_ids)
        return self.blocks.match_prefix(
            leader.token_ids[: target - 1],
            salt=group.request.prefix_salt,
            least_inside=math.ceil(LEAST_HIT_INSIDE * self.blocks.block_size),
        )

    def _compute(self, plan: PlanBuilder, group: SequenceGroup, seq: Sequence, num_tokens: int) -> None:
        plan.add(group, seq, num_tokens, self.blocks.block_table(seq.seq_id))

    def _fork_siblings(self, group: SequenceGroup, leader: Sequence) -> None:
        """The shared tokens are in the pool: every sibling shares their blocks (PagedAttention, section 4.4)."""
        for seq in group.unfinished:
            if seq.state is SequenceState.UNFORKED:
                self.blocks.fork(leader.seq_id, seq.seq_id)
                seq.state, seq.num_computed = SequenceState.RUNNING, leader.num_computed
        group.fork_at = None

    def _advance_beams(self, group: SequenceGroup, live: list[Sequence], candidates: BeamCandidates) -> None:
        """Fork, continue and free beams (PagedAttention, section 4.4): no block moves until two children write."""
        assert group.beam is not None
        continuations = group.beam.advance([seq.output_token_ids for seq in live], candidates)
        successors: list[Sequence] = []
        group.sequences = successors
        kept: set[int] = set()
        for beam in continuations:
            parent = live[beam.parent]
            if parent.seq_id in kept:
                child = self._new_sequence(group, 0, parent.token_ids[: parent.num_computed])
                self.blocks.fork(parent.seq_id, child.seq_id)
                child.state, child.num_computed = SequenceState.RUNNING, parent.num_computed
                self._sequences[child.seq_id] = group, child
            else:
                kept.add(parent.seq_id)
                child = parent
                successors.append(child)
            child.token_ids.append(beam.token_id)
            child.cumulative_logprob = beam.cumulative_logprob
        for seq in live:
            if seq.seq_id not in kept:
                self.blocks.free(seq.seq_id)
                del self._sequences[seq.seq_id]
        if not continuations:
            self._end_search(group)

    def _end_search(self, group: SequenceGroup) -> None:
        """Put the results of a search in the place of its live sequences."""
        assert group.beam is not None
        for index, hypothesis in enumerate(group.beam.finished[: group.request.params.n]):
            token_ids = [*group.request.prompt_token_ids, *hypothesis.token_ids]
            seq = self._new_sequence(group, index, token_ids)
            seq.state, seq.finish_reason = SequenceState.FINISHED, hypothesis.finish_reason
            seq.cumulative_logprob, seq.score = hypothesis.cumulative_logprob, hypothesis.score
        self._leave(group)

    def _settle_pin(self, group: SequenceGroup, seq: Sequence) -> None:
        """Hold the very blocks that the prefix cache finds: somebody else may have published the same content first."""
        self._release(group, seq)
        match = self.blocks.match_prefix(seq.token_ids, salt=group.request.prefix_salt)
        assert match.num_tokens == seq.prompt_len
        assert not match.is_on_host
        self.blocks.reserve(seq.seq_id, seq.prompt_len, match=match, is_query=False)
        del self._sequences[seq.seq_id]
        self._leave(group)

    # Arithmetic ---------------------------------------------------------------------------------------------------

    def _rows_short(self, group: SequenceGroup) -> int:
        """Rows missing to start a group, 0 or less if it can start."""
        return self._num_rows + group.num_rows - self.max_num_seqs

    @property
    def _num_rows(self) -> int:
        return sum(group.num_rows for group in self._running)

    def _blocks_short(self, group: SequenceGroup, match: PrefixMatch) -> int:
        """Blocks missing to start the first group of the queue, 0 or less if it can start."""
        watermark = math.ceil(WATERMARK * (self.blocks.num_blocks - 1)) if self._running else 0
        members = group.unfinished
        if group.is_swapped:
            held = [seq.seq_id for seq in members if seq.state is SequenceState.SWAPPED]
            # One more for each, to write its next token.
            needed = self.blocks.num_blocks_to_swap_in(held) + (len(held) if self._running else 0)
        else:
            leader, shared = members[0], group.fork_len()
            target = shared if len(members) > 1 else len(leader.token_ids)
            lens = [len(seq.token_ids) for seq in members] if len(members) > 1 else [target] * group.num_rows
            block_size = self.blocks.block_size
            to_grow = num_forked_blocks(shared, lens, block_size) - num_blocks_covering(target, block_size)
            needed = self.blocks.num_fresh_blocks(target, match) + to_grow
        return needed + watermark - self.blocks.num_free_blocks

    def _capacity(self, request: Request | None) -> Capacity:
        """The pool without what is pinned, but with what ``request`` would share of it."""
        block_size, num_usable = self.blocks.block_size, self.blocks.num_blocks - 1  # block 0 is padding
        # Pins share full blocks always, and others perhaps: not any more once a failed step has lost the pool.
        num_pinned = len(self._pinned_blocks())
        queued = (pin for request_id, pin in self._pins.items() if request_id in self._groups)
        num_pinned += sum(num_blocks_covering(pin.prompt_len, block_size) for pin in queued)
        if request is not None and request.params.prompt_logprobs is None:
            num_pinned -= max((self._num_common_blocks(pin.request, request) for pin in self._pins.values()), default=0)
        return Capacity(num_usable - num_pinned, num_pinned, block_size, self.max_model_len)

    def _pinned_blocks(self) -> set[tuple[int, int]]:
        """What pins hold: full blocks, each once, and each pin's last one that is not full."""
        held: set[tuple[int, int]] = set()
        for request_id, pin in self._pins.items():
            if self.is_pinned(request_id):
                seq_id = pin.sequences[0].seq_id
                table, num_full = self.blocks.block_table(seq_id), pin.prompt_len // self.blocks.block_size
                held |= {(block, -1) for block in table[:num_full]} | {(block, seq_id) for block in table[num_full:]}
        return held

    def _num_common_blocks(self, pin: Request, request: Request) -> int:
        """Full blocks of a pin that a request shares."""
        if pin.prefix_salt != request.prefix_salt:
            return 0
        # One token of the prompt is computed at least: a block that ends with it is copied, not shared.
        common = common_len(pin.prompt_token_ids, request.prompt_token_ids)
        return min(common, len(request.prompt_token_ids) - 1) // self.blocks.block_size

    def _most_blocks(self, group: SequenceGroup) -> int:
        """Blocks that an unfinished group may come to need of its own."""
        capacity = self._capacity(None)
        return capacity.most_blocks(group.prompt_len, group.max_tokens, group.request.params.num_sequences)
