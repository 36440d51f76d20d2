"""Decides, every step, which sequences run and with which blocks: admit, chunk, preempt, resume, finish."""

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from jpaged.host.block_manager import BlockManager, OutOfBlocks
from jpaged.host.policies.preemption import choose_victim
from jpaged.host.sequence import Sequence, SequenceGroup, SequenceState
from jpaged.host.step_plan import BlockCopy, Chunk, PromptScore, Sample, StepPlan, StepResult
from jpaged.request import FinishReason, Request, derive_seed

WATERMARK = 0.01
"""Fraction of the pool an admission leaves free, so that running sequences can grow before anyone is preempted."""


@dataclass(frozen=True, slots=True)
class SchedulerStats:
    """Counters since the start, and the queues now (in sequence groups)."""

    num_waiting: int
    num_running: int
    num_preemptions: int
    num_steps: int


class Scheduler:
    """Continuous batching over a block manager (PagedAttention, section 4.5; iteration-level as in Orca).

    Each step: every running sequence that has a token to feed decodes it, prompts under way take the next chunk of what
    the token budget leaves, then waiting groups are admitted in order of arrival. When blocks run out, the latest
    arrival is preempted whole, its blocks freed and its tokens kept to be recomputed, and nothing is admitted while it
    waits. Every running group therefore arrived before every waiting one.

    ``plan = schedule()`` must be followed by ``update(plan, result)`` before the next ``schedule()``.

    Args:
        blocks: the pool's bookkeeping; the scheduler is its one writer.
        max_num_seqs: sequences in one step at most.
        max_num_batched_tokens: tokens in one step at most; at least ``max_num_seqs``.
        max_model_len: tokens of prompt and output a sequence may reach.
        eos_token_ids: the model's end-of-sequence ids.
    """

    def __init__(
        self,
        blocks: BlockManager,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        eos_token_ids: Iterable[int] = (),
    ):
        assert max_num_batched_tokens >= max_num_seqs
        self.blocks = blocks
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_model_len = max_model_len
        self.eos_token_ids = frozenset(eos_token_ids)
        self._groups: dict[str, SequenceGroup] = {}  # unfinished, by request id
        self._sequences: dict[int, tuple[SequenceGroup, Sequence]] = {}  # the same, by sequence id
        self._waiting: deque[SequenceGroup] = deque()  # by arrival; preempted groups return to the front
        self._running: list[SequenceGroup] = []  # by arrival
        # The last admission refused, and the blocks then free and cached.
        self._refused: tuple[SequenceGroup, tuple[int, int]] | None = None
        self._num_arrivals = 0
        self._num_seqs = 0
        self._num_preemptions = 0
        self._num_steps = 0

    # Requests -----------------------------------------------------------------------------------------------------

    def check(self, request: Request) -> None:
        """Raise ValueError, with the arithmetic, if ``request`` could never run to its end here."""
        prompt_len, params = len(request.prompt_token_ids), request.params
        if request.request_id in self._groups:
            raise ValueError(f"request_id {request.request_id!r} is already in use by an unfinished request")
        if prompt_len == 0:
            raise ValueError("the prompt has no tokens: give at least one")
        if params.n > self.max_num_seqs:
            raise ValueError(
                f"n={params.n} is more than max_num_seqs={self.max_num_seqs}: lower n or raise max_num_seqs"
            )
        room = self.max_model_len - prompt_len
        if room < 1:
            raise ValueError(
                f"the prompt has {prompt_len} tokens, but max_model_len={self.max_model_len} leaves room for at most "
                f"{self.max_model_len - 1} and one to generate: shorten the prompt"
            )
        for name in ("max_tokens", "min_tokens"):
            value = getattr(params, name)
            if value is not None and value > self.max_model_len:
                raise ValueError(f"{name}={value} is more than max_model_len={self.max_model_len}: lower it")
        wanted = 1 if params.max_tokens is None else min(params.max_tokens, room)
        if self._group_blocks(prompt_len, [prompt_len + wanted - 1] * params.n) > self._num_usable_blocks:
            raise ValueError(self._never_fits(prompt_len, wanted, params.n))

    def add(self, request: Request) -> SequenceGroup:
        """Queue a request, its seed settled. Raises what ``check`` raises, changing nothing."""
        self.check(request)
        assert request.seed is not None
        params, prompt_len = request.params, len(request.prompt_token_ids)
        sequences = [
            Sequence(
                seq_id=self._num_seqs + i,
                index=i,
                seed=derive_seed(request.seed, i),
                token_ids=list(request.prompt_token_ids),
                prompt_len=prompt_len,
            )
            for i in range(params.n)
        ]
        room = self.max_model_len - prompt_len
        stops = frozenset(params.stop_token_ids or ()) | (frozenset() if params.ignore_eos else self.eos_token_ids)
        group = SequenceGroup(
            request=request,
            arrival=self._num_arrivals,
            sequences=sequences,
            max_tokens=self._most_tokens(prompt_len, params.n)
            if params.max_tokens is None
            else min(params.max_tokens, room),
            stop_token_ids=stops,
        )
        self._num_seqs += params.n
        self._num_arrivals += 1
        self._groups[request.request_id] = group
        self._sequences |= {seq.seq_id: (group, seq) for seq in sequences}
        self._waiting.append(group)
        return group

    def abort(self, request_id: str) -> SequenceGroup | None:
        """Finish a request now and free its blocks; None if it is unknown or already finished."""
        group = self._groups.get(request_id)
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
        if seq.state is SequenceState.RUNNING:
            self.blocks.free(seq.seq_id)
        seq.state = SequenceState.FINISHED
        del self._sequences[seq.seq_id]
        if group.is_finished:
            self._refused = None
            del self._groups[group.request.request_id]
            (self._running if group in self._running else self._waiting).remove(group)

    def forget_pool(self) -> None:
        """The pool's content is lost (a step failed): every running group recomputes, nothing cached is trusted."""
        while self._running:
            self._preempt(self._running[-1])
        self.blocks.clear_prefix_cache()

    @property
    def has_unfinished(self) -> bool:
        return bool(self._groups)

    def stats(self) -> SchedulerStats:
        return SchedulerStats(len(self._waiting), len(self._running), self._num_preemptions, self._num_steps)

    # A step -------------------------------------------------------------------------------------------------------

    def schedule(self) -> StepPlan:
        """Plan one step. Empty only if nothing is unfinished."""
        num_preempted = self._num_preemptions
        copies = self._make_room()
        plan = _PlanBuilder(self.max_num_batched_tokens, copies)
        active = [(group, seq) for group in self._running for seq in group.running]
        for group, seq in active:
            if self._num_to_compute(group, seq) == 1:
                self._compute(plan, group, seq)
        for group, seq in active:
            if self._num_to_compute(group, seq) > 0 and plan.budget > 0:
                self._compute(plan, group, seq)
        if self._num_preemptions == num_preempted:
            self._admit(plan)
        self._num_steps += 1
        return plan.build()

    def update(self, plan: StepPlan, result: StepResult) -> list[SequenceGroup]:
        """Take in what the step of ``plan`` produced.

        Publishes the blocks it filled, forks groups whose prompt is done, appends the tokens and ends the sequences
        that are complete.

        Returns:
            The groups that gained tokens, each once, in plan order.
        """
        block_size = self.blocks.block_size
        for chunk in plan.chunks:
            group, seq = self._sequences[chunk.seq_id]
            if seq.num_computed // block_size > chunk.start // block_size:
                salt = group.request.prefix_salt
                self.blocks.publish(seq.seq_id, seq.token_ids, seq.num_computed, salt=salt)
            if seq.num_computed == seq.prompt_len:
                self._fork_siblings(group, seq)
        for score, piece in zip(plan.prompt_scores, result.prompt_scores, strict=True):
            self._sequences[plan.chunks[score.chunk].seq_id][0].prompt_scores.append(piece)
        touched: dict[int, SequenceGroup] = {}
        token_ids = result.token_ids.tolist()
        for row, sample in enumerate(plan.samples):
            group, seq = self._sequences[sample.seq_id]
            seq.token_ids.append(token_ids[row])
            seq.scores.append((result.scores, row))
            touched[group.arrival] = group
            reason = self._finish_reason(group, seq)
            if reason is not None:
                self.finish(group, seq, reason)
        return list(touched.values())

    # Inside a step ------------------------------------------------------------------------------------------------

    def _make_room(self) -> list[BlockCopy]:
        """Give every running sequence room for all its tokens, preempting from the back while blocks are short."""
        copies: list[BlockCopy] = []
        index = 0
        while index < len(self._running):
            group = self._running[index]
            group_copies: list[BlockCopy] = []
            while not self._append(group, group_copies):
                victim = choose_victim(self._running)
                self._preempt(victim)
                if victim is group:  # its copies are void: the blocks are free again
                    return copies
            copies += group_copies
            index += 1
        return copies

    def _append(self, group: SequenceGroup, copies: list[BlockCopy]) -> bool:
        """Give each of the group's sequences the room it still misses; False when blocks ran out on the way."""
        try:
            for seq in group.running:
                missing = self._target(group, seq) - self.blocks.num_tokens(seq.seq_id)
                if missing > 0:
                    copies += self.blocks.append(seq.seq_id, missing)
        except OutOfBlocks:
            return False
        return True

    def _preempt(self, group: SequenceGroup) -> None:
        """Take all blocks from a group and queue it to recompute them (PagedAttention, section 4.5)."""
        assert group is self._running[-1]
        for seq in group.unfinished:
            if seq.state is SequenceState.RUNNING:
                self.blocks.free(seq.seq_id)
            seq.state, seq.num_computed = SequenceState.WAITING, 0
        if group.needs_prompt_scores:
            group.prompt_scores.clear()
        self._running.pop()
        self._waiting.appendleft(group)
        self._num_preemptions += 1

    def _admit(self, plan: "_PlanBuilder") -> None:
        """Start waiting groups in order while the budget, the rows and the pool allow."""
        num_rows = sum(len(group.unfinished) for group in self._running)
        while self._waiting and plan.budget > 0:
            group = self._waiting[0]
            members = group.unfinished
            pool = self.blocks.num_free_blocks, self.blocks.num_cached_blocks
            if self._refused == (group, pool):
                return  # no block was freed or published since: matching its prompt again would end the same way
            if num_rows + len(members) > self.max_num_seqs:
                return
            leader = members[0]
            target = leader.prompt_len if len(members) > 1 else len(leader.token_ids)
            cached = self._cached_prefix(group, leader, target)
            to_grow = self._group_blocks(group.prompt_len, [len(seq.token_ids) for seq in members])
            fresh = self.blocks.num_fresh_blocks(target, cached) + to_grow - self._num_blocks(target)
            watermark = math.ceil(WATERMARK * self._num_usable_blocks) if self._running else 0
            if fresh + watermark > self.blocks.num_free_blocks:
                self._refused = group, pool
                return
            self.blocks.reserve(leader.seq_id, target, cached_blocks=cached)
            leader.num_computed = len(cached) * self.blocks.block_size
            if group.num_cached_tokens is None:
                group.num_cached_tokens = leader.num_computed
            for seq in members:
                seq.state = SequenceState.UNFORKED
            leader.state = SequenceState.RUNNING
            self._waiting.popleft()
            self._running.append(group)
            num_rows += len(members)
            self._compute(plan, group, leader)

    def _cached_prefix(self, group: SequenceGroup, leader: Sequence, target: int) -> list[int]:
        """Blocks of the prefix cache the group may start from; one token is always left to compute."""
        if group.needs_prompt_scores:
            return []
        return self.blocks.match_prefix(leader.token_ids[: target - 1], salt=group.request.prefix_salt)

    def _compute(self, plan: "_PlanBuilder", group: SequenceGroup, seq: Sequence) -> None:
        """Add the next chunk of ``seq`` to the plan, with the samples and scores it allows."""
        start = seq.num_computed
        stop = start + min(self._num_to_compute(group, seq), plan.budget)
        chunk = plan.add_chunk(
            Chunk(seq.seq_id, seq.token_ids[start:stop], start, seq.prompt_len, self.blocks.block_table(seq.seq_id))
        )
        seq.num_computed = stop
        if group.needs_prompt_scores and start < seq.prompt_len - 1:
            targets = seq.token_ids[start + 1 : min(stop + 1, seq.prompt_len)]
            plan.prompt_scores.append(PromptScore(chunk, targets, group.request.params.prompt_logprobs or 0))
        if stop < len(seq.token_ids):
            return
        # A prompt just finished serves its unforked siblings too: they have no token of their own yet.
        siblings = [s for s in group.unfinished if s.state is SequenceState.UNFORKED and s.num_outputs == 0]
        for owner in [seq, *siblings]:
            plan.samples.append(_sample(group, owner, chunk))

    def _fork_siblings(self, group: SequenceGroup, leader: Sequence) -> None:
        """The prompt is in the pool: every waiting sibling shares its blocks (PagedAttention, section 4.4)."""
        for seq in group.unfinished:
            if seq.state is SequenceState.UNFORKED:
                self.blocks.fork(leader.seq_id, seq.seq_id)
                seq.state, seq.num_computed = SequenceState.RUNNING, seq.prompt_len

    def _finish_reason(self, group: SequenceGroup, seq: Sequence) -> FinishReason | None:
        if seq.token_ids[-1] in group.stop_token_ids and seq.num_outputs > group.request.params.min_tokens:
            return FinishReason.STOP
        if seq.num_outputs >= group.max_tokens:
            return FinishReason.LENGTH
        return None

    def _target(self, group: SequenceGroup, seq: Sequence) -> int:
        """Tokens of ``seq`` to bring into the pool now; a leader stops at the prompt until its siblings have forked."""
        is_leader = (
            any(s.state is SequenceState.UNFORKED for s in group.sequences) if len(group.sequences) > 1 else False
        )
        return seq.prompt_len if is_leader else len(seq.token_ids)

    def _num_to_compute(self, group: SequenceGroup, seq: Sequence) -> int:
        return self._target(group, seq) - seq.num_computed

    # Arithmetic ---------------------------------------------------------------------------------------------------

    @property
    def _num_usable_blocks(self) -> int:
        return self.blocks.num_blocks - 1  # block 0 is padding

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.blocks.block_size)

    def _group_blocks(self, prompt_len: int, lens: list[int]) -> int:
        """Blocks of a forked group: full prompt blocks once, the rest per sequence of ``lens`` tokens."""
        shared = prompt_len // self.blocks.block_size
        return shared + sum(self._num_blocks(n) - shared for n in lens)

    def _most_tokens(self, prompt_len: int, n: int) -> int:
        """Output tokens each of ``n`` sequences can reach alone in the pool, within the model's context."""
        shared = prompt_len // self.blocks.block_size
        blocks_each = shared + (self._num_usable_blocks - shared) // n
        return min(self.max_model_len - prompt_len, blocks_each * self.blocks.block_size - prompt_len + 1)

    def _never_fits(self, prompt_len: int, max_tokens: int, n: int) -> str:
        block_size, usable = self.blocks.block_size, self._num_usable_blocks
        shared = prompt_len // block_size
        last = prompt_len + max_tokens - 1  # the last token drawn is never fed back
        own = self._num_blocks(last) - shared
        return (
            f"the request can never fit: a prompt of {prompt_len} and max_tokens={max_tokens} put {last} tokens in the "
            f"pool; in blocks of {block_size} that is {shared} full prompt blocks + n={n} x {own} more = "
            f"{shared + n * own} blocks, and the pool has {usable}. Lower max_tokens or n, or raise num_blocks or "
            "memory_fraction"
        )


class _PlanBuilder:
    """A StepPlan under construction and what is left of the token budget."""

    def __init__(self, budget: int, copies: list[BlockCopy]):
        self.budget = budget
        self.copies = copies
        self.chunks: list[Chunk] = []
        self.samples: list[Sample] = []
        self.prompt_scores: list[PromptScore] = []

    def add_chunk(self, chunk: Chunk) -> int:
        self.budget -= len(chunk.token_ids)
        self.chunks.append(chunk)
        return len(self.chunks) - 1

    def build(self) -> StepPlan:
        return StepPlan(tuple(self.copies), tuple(self.chunks), tuple(self.samples), tuple(self.prompt_scores))


def _sample(group: SequenceGroup, seq: Sequence, chunk: int) -> Sample:
    params = group.request.params
    is_early = seq.num_outputs < params.min_tokens
    return Sample(
        seq_id=seq.seq_id,
        chunk=chunk,
        position=len(seq.token_ids),
        seed=seq.seed,
        params=params,
        banned_token_ids=tuple(group.stop_token_ids) if is_early else (),
        prompt_token_ids=group.request.prompt_token_ids if params.has_penalties else (),
        output_token_ids=seq.output_token_ids if params.has_penalties else (),
    )
