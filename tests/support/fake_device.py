"""A device made of numbers: each slot of its pools names the token, and all before it, whose KV it stands for.

The KV of a token depends on every token before it, so the number is a hash of the whole prefix. A block that is read
too early, overwritten while somebody needs it, or found under a wrong prefix is thus seen at once, not as tokens that
are subtly wrong later on. Tokens are drawn from these numbers: any schedule must give those of ``expected_tokens``.
"""

from collections.abc import Collection
from functools import lru_cache

import numpy as np
from jaxtyping import Float, Int, Int64

from jpaged.contract.plan import BeamSelect, BlockCopy, StepPlan
from jpaged.contract.result import BeamCandidates, StepResult, TokenScores
from jpaged.contract.rows import ON_DEVICE, host_cell
from jpaged.host.scheduler import Scheduler
from jpaged.host.sequence import Sequence, SequenceGroup, SequenceState
from jpaged.request import Request, SamplingParams, derive_seed
from tests.support.oracles import beam_search_without_cache
from tests.support.plans import Chunk, Rows

VOCAB_SIZE = 16
EOS = 3
LOST = -1
"""Content of a slot that was never written, or is being written."""


# The model ------------------------------------------------------------------------------------------------------------


def extend(prefix: int, token_id: int) -> int:
    """The number of a token after ``prefix``, the number of the token before it."""
    return hash((prefix, token_id))


def hash_prefixes(token_ids: list[int], salt: bytes) -> list[int]:
    """The number of every token. The salt counts like a token in front: KV found under another one is wrong."""
    prefix, numbers = _before(salt), []
    for token_id in token_ids:
        prefix = extend(prefix, token_id)
        numbers.append(prefix)
    return numbers


def content_of(number: int, group: int) -> int:
    """The content of the slot that a layer group has for a token: no group reads that of another."""
    return number if group == 0 else hash((number, group))


def _before(salt: bytes) -> int:
    """The prefix before the first token."""
    return int.from_bytes(salt, "big")


@lru_cache(maxsize=10_000)
def logprobs_after(prefix: int) -> Float[np.ndarray, "vocab"]:
    """Made-up log-probabilities of the next token, in (-4, 0].

    They are multiples of 2**-16, so that sums of some dozens of them are exact in float32 too.
    """
    mixed = np.uint64(prefix % 2**64) ^ (np.arange(1, VOCAB_SIZE + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # splitmix64
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    logprobs = -((mixed >> np.uint64(64 - 18)).astype(np.float64) / 2**16)
    logprobs.setflags(write=False)
    return logprobs


def draw(prefix: int, position: int, seed: int, temperature: float, banned_token_ids: Collection[int]) -> int:
    """The token a sequence draws after ``prefix``. At temperature 0 all samples of a request draw the same."""
    allowed = [token_id for token_id in range(VOCAB_SIZE) if token_id not in banned_token_ids]
    return allowed[hash((prefix, position, seed if temperature > 0 else -1)) % len(allowed)]


# What any schedule must give ------------------------------------------------------------------------------------------


def stops_of(params: SamplingParams, eos_token_ids: Collection[int]) -> tuple[int, ...]:
    return (*(params.stop_token_ids or ()), *(() if params.ignore_eos else eos_token_ids))


def expected_tokens(request: Request, index: int, max_tokens: int, eos_token_ids: Collection[int]) -> list[int]:
    """The tokens of sample ``index`` of a request, without scheduler, blocks or batches."""
    assert request.seed is not None
    params, seed = request.params, derive_seed(request.seed, index)
    stops = stops_of(params, eos_token_ids)
    prefix = hash_prefixes(request.prompt_token_ids, request.prefix_salt)[-1]
    tokens: list[int] = []
    while len(tokens) < max_tokens and not (tokens and tokens[-1] in stops):
        banned = stops if len(tokens) < params.min_tokens else ()
        position = len(request.prompt_token_ids) + len(tokens)
        tokens.append(draw(prefix, position, seed, params.temperature, banned))
        prefix = extend(prefix, tokens[-1])
    return tokens


def expected_hypotheses(
    request: Request, max_tokens: int, eos_token_ids: Collection[int]
) -> list[tuple[list[int], float]]:
    """The results of a beam search and their scores, best first, without scheduler, blocks or batches."""
    params, prompt = request.params, request.prompt_token_ids
    stops = stops_of(params, eos_token_ids)

    def logprobs_of(sequences: list[list[int]]) -> Float[np.ndarray, "sequences vocab"]:
        rows = np.stack([logprobs_after(hash_prefixes(tokens, request.prefix_salt)[-1]) for tokens in sequences])
        if len(sequences[0]) - len(prompt) < params.min_tokens:
            rows[:, list(stops)] = -np.inf
        return rows

    assert params.early_stopping in (True, False, "never")
    return beam_search_without_cache(
        logprobs_of,
        prompt,
        params.num_sequences,
        max_tokens,
        params.length_penalty,
        params.early_stopping,  # pyright: ignore[reportArgumentType]
        tuple(set(stops)),
    )[: params.n]


def expected_logprobs(token_ids: list[int], salt: bytes) -> list[float]:
    """The log-probability of every token but the first."""
    numbers = hash_prefixes(token_ids, salt)
    return [logprobs_after(number)[token] for number, token in zip(numbers, token_ids[1:], strict=False)]


# The device -----------------------------------------------------------------------------------------------------------


class FakeDevice:
    """Executes the plans of one scheduler, and asserts that they keep the contract of ``StepPlan`` to the letter.

    Args:
        scheduler: whose sequences say what each slot must hold. ``execute`` keeps nothing of them between steps.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        blocks = scheduler.blocks
        self.scheduler = scheduler
        self.block_size = blocks.block_size
        self.pool = np.full((blocks.num_blocks, self.block_size), LOST)
        self.host_pool = np.full((blocks.num_host_blocks, self.block_size), LOST)
        self.groups = blocks.groups
        self.rows = Rows(len(blocks.groups))  # told of nothing but plans' changes
        self._window = self.host_pool[:0]  # blocks that the step streams, numbered after those of the pool
        self._latest: dict[int, int] = {}  # the token last drawn for each row
        self._drawn: dict[int, list[int]] = {}  # the tokens of each sequence (by id), with what was drawn last

    def execute(self, plan: StepPlan) -> StepResult:
        self.rows.enter(plan)
        chunks = self._resolved(self.rows.chunks(plan, self.block_size))
        self._check_rows(plan)
        self._check_chunks(plan, chunks)
        self._check_shared(plan, chunks)
        chunks = self._streaming(plan, chunks)
        self._check_moves(plan, chunks)
        to_host, from_host, copies = (_columns(moves) for moves in (plan.to_host, plan.from_host, plan.copies))
        self.host_pool[to_host[1]] = self.pool[to_host[0]]
        landing = self.host_pool[from_host[0]]
        self.pool[copies[1]] = self.pool[copies[0]]
        self.pool[from_host[1]] = LOST
        self._window = self.host_pool[[] if plan.streamed is None else plan.streamed.blocks]
        if plan.num_steps > 1:
            result = self._burst(plan, chunks)
        else:
            result = self._step(plan, chunks, list(range(len(plan.draws))))
        self.pool[from_host[1]] = landing
        self._window = self._window[:0]
        return result

    def _step(self, plan: StepPlan, chunks: list[Chunk], draws: list[int]) -> StepResult:
        """Run one step, and draw as some draws of the plan say."""
        numbers = self._compute(chunks)
        drawn = [self._draw(plan, draw, chunks, numbers) for draw in draws]
        read = plan.draws.chunks.tolist()
        for draw, token_id in zip(draws, drawn, strict=True):
            chunk, row, seq_id = chunks[read[draw]], int(plan.draws.rows[draw]), int(plan.draws.seq_ids[draw])
            _, seq = self.scheduler.roster.sequences[seq_id]
            self._latest[row] = token_id
            self._drawn[seq_id] = [*self._tokens_fed(seq, chunk)[: chunk.stop], token_id]
        scored = [list(zip(numbers[piece.chunk], piece.target_ids, strict=False)) for piece in plan.prompt_scores]
        return StepResult(
            token_ids=np.array(drawn, np.int32),
            scores=_scores([(numbers[read[draw]][-1], token) for draw, token in zip(draws, drawn, strict=True)]),
            prompt_scores=tuple(map(_scores, scored)),
            beams=tuple(_candidates(select, [numbers[chunk][-1] for chunk in select.chunks]) for select in plan.beams),
        )

    def _burst(self, plan: StepPlan, chunks: list[Chunk]) -> StepResult:
        """Run the steps of a burst, each of which feeds what the one before drew."""
        assert plan.draws.chunks.tolist() == list(range(len(chunks)))
        assert (plan.chunks.lens == 1).all()
        assert not plan.beams
        assert not plan.prompt_scores
        assert not plan.from_host
        assert plan.draws.num_tokens.max() == plan.num_steps
        latest, results = [0] * len(chunks), []
        for step in range(plan.num_steps):
            draws = [draw for draw, num_tokens in enumerate(plan.draws.num_tokens.tolist()) if step < num_tokens]
            fed: list[Chunk] = [chunk._replace(token_ids=[], block_table=[], start=0) for chunk in chunks]
            for draw in draws:
                chunk = chunks[draw]
                token_ids = [latest[draw]] if step else chunk.token_ids
                fed[draw] = chunk._replace(start=chunk.start + step, token_ids=token_ids)
            result = self._step(plan, fed, draws)
            logprobs = np.zeros(len(latest), np.float32)
            for draw, token_id, logprob in zip(draws, result.token_ids, result.scores.logprobs, strict=True):
                latest[draw], logprobs[draw] = int(token_id), logprob
            results.append((np.array(latest, np.int32), TokenScores.plain(logprobs)))
        return StepResult(*results[0], later=tuple(results[1:]))

    def _resolved(self, chunks: list[Chunk]) -> list[Chunk]:
        """The chunks with the tokens that were drawn for their rows."""
        return [
            chunk._replace(token_ids=[self._latest[chunk.row]]) if list(chunk.token_ids) == [ON_DEVICE] else chunk
            for chunk in chunks
        ]

    def lose(self) -> None:
        """Forget the content of both pools, as a device does whose step failed."""
        self.pool[:] = LOST
        self.host_pool[:] = LOST

    def audit(self) -> None:
        """Between steps: assert the content of every block that somebody holds or could find, in either tier."""
        scheduler, blocks = self.scheduler, self.scheduler.blocks
        for group, seq in scheduler.roster.sequences.values():
            if seq.state is SequenceState.RUNNING:
                holding = blocks.holdings.held_by(seq.seq_id)
                host_blocks = np.array(holding.host_blocks, int)
                table = [self._numbered(block, 0) for block in holding.blocks]
                held = np.concatenate([self.pool, self.host_pool[host_blocks]])
                self._check_starts(holding.starts, seq)
                self._check_content(held, table, group, seq.token_ids, seq.num_known, holding.starts)
            elif seq.state is SequenceState.SWAPPED:
                holding = blocks.holdings.on_host[seq.seq_id]
                self._check_starts(holding.starts, seq)
                content = group, seq.token_ids, seq.num_computed, holding.starts
                self._check_content(self.host_pool, holding.blocks, *content)
        for pin in scheduler.pins.held.values():
            if scheduler.is_pinned(pin.request.request_id):
                holding = blocks.holdings.held_by(pin.sequences[0].seq_id)
                num_tokens = blocks.num_tokens(pin.sequences[0].seq_id)
                assert num_tokens == pin.prompt_len or not self.groups.is_plain
                content = pin, pin.request.prompt_token_ids, num_tokens, holding.starts
                self._check_content(self.pool, holding.blocks, *content)
        for block in blocks.tiers.device.free:
            if block not in blocks.tiers.device.cache:
                self.pool[block] = LOST  # nothing may read it before it is written
        for tier, pool in ((blocks.tiers.device, self.pool), (blocks.tiers.host, self.host_pool)):
            for block, prefix in tier.cache._prefixes.items():
                tokens = np.frombuffer(b"".join(link.tokens for link in prefix.chain()), "<i8").tolist()
                numbers = hash_prefixes(tokens, prefix.salt)[-prefix.num_last_tokens :]
                expected = [content_of(number, prefix.group) for number in numbers]
                assert pool[block, : len(expected)].tolist() == expected, f"cached block {block} holds something else"

    def _check_content(
        self,
        pool: Int64[np.ndarray, "num_blocks block_size"],
        block_table: list[int],
        group: SequenceGroup,
        token_ids: list[int],
        num_tokens: int,
        starts: Collection[int] = (),
    ) -> None:
        """Assert that the first ``num_tokens`` slots of block tables hold what the tokens say.

        Args:
            starts: first logical block that is read in each layer group; empty for all from the first on.
        """
        request, num_groups = group.request, len(self.groups)
        numbers = hash_prefixes(token_ids[:num_tokens], request.prefix_salt)
        for index, start in enumerate(starts or [0] * num_groups):
            first, table = start * self.block_size, block_table[index::num_groups]
            held = pool[table[start:]].ravel()[: max(num_tokens - first, 0)].tolist()
            expected = [content_of(number, index) for number in numbers[first:]]
            if held != expected:
                wrong = [first + i for i, number in enumerate(expected) if i >= len(held) or held[i] != number]
                raise AssertionError(
                    f"{request.request_id}: of {num_tokens} tokens in blocks {table} of group {index} those at {wrong} "
                    "are not there"
                )

    def _check_starts(self, starts: Collection[int], seq: Sequence) -> None:
        """Assert that a sequence holds all that its next token sees, and no block that its last step did not see."""
        for start, group in zip(starts, self.groups.groups, strict=False):
            assert start <= group.first_live(seq.num_computed, self.block_size)

    def _check_rows(self, plan: StepPlan) -> None:
        """Assert that the table says of every row what its sequence does."""
        chunks, draws, rows = plan.chunks, plan.draws, self.rows
        assert len(set(chunks.rows.tolist())) == len(chunks.rows), "one chunk a row"
        assert len(set(draws.rows.tolist())) == len(draws.rows), "one draw a row"
        owned, owners = np.concatenate([chunks.rows, draws.rows]), np.concatenate([chunks.seq_ids, draws.seq_ids])
        for row, seq_id in zip(owned.tolist(), owners.tolist(), strict=True):
            assert 0 <= row < self.scheduler.max_num_seqs
            group, seq = self.scheduler.roster.sequences[seq_id]
            assert seq.row == row
            assert rows.prompt_len(row) == group.prompt_len
            assert rows.seed(row) == seq.seed
            assert rows.temperature(row) == np.float32(group.request.params.temperature)

    def _check_chunks(self, plan: StepPlan, chunks: list[Chunk]) -> None:
        """Assert that the plan keeps the limits of a step, and that each chunk is what its sequence has to feed."""
        scheduler = self.scheduler
        assert plan.num_tokens <= scheduler.max_num_batched_tokens
        assert len(plan.chunks) <= scheduler.max_num_seqs
        assert plan.num_logit_rows <= scheduler.max_num_seqs
        assert len({chunk.seq_id for chunk in chunks}) == len(chunks), "one chunk a sequence"
        for chunk in chunks:
            group, seq = scheduler.roster.sequences[chunk.seq_id]
            assert chunk.start < chunk.stop <= scheduler.max_model_len
            assert list(chunk.token_ids) == self._tokens_fed(seq, chunk)[chunk.start : chunk.stop]
            assert chunk.prompt_len == group.prompt_len
            assert len(chunk.block_table) // len(self.groups) * self.block_size >= chunk.stop
            holding = scheduler.blocks.holdings.held_by(chunk.seq_id)
            seen = self._seen(chunk)
            assert [holding.blocks[cell] for cell in seen] == [chunk.block_table[cell] for cell in seen], (
                "the device knows other blocks"
            )
            # A pin keeps what a request sees that shares its full blocks.
            most = group.prompt_len // self.block_size * self.block_size if group.is_pin else chunk.start
            live = [of.first_live(min(chunk.start, most), self.block_size) for of in self.groups.groups]
            assert list(holding.starts) == ([] if self.groups.is_plain else live), "windows leave no block behind"

    def _check_shared(self, plan: StepPlan, chunks: list[Chunk]) -> None:
        """Assert that rows which share tokens have them in the same blocks, where the step writes nothing."""
        if plan.shared_lens is None:
            return
        assert plan.shared_lens.dtype == np.int32
        lens = plan.shared_lens.tolist()
        assert (plan.chunks.lens == 1).all()
        [num_tokens] = set(lens) - {0}
        sharing = [chunk for chunk, length in zip(chunks, lens, strict=True) if length]
        assert len(sharing) > 1
        assert all(num_tokens <= chunk.start for chunk in sharing)
        num_blocks, rest = divmod(num_tokens, self.block_size)
        assert rest == 0
        for index, group in enumerate(self.groups.groups):
            fronts = {tuple(chunk.block_table[index :: len(self.groups)][:num_blocks]) for chunk in sharing}
            assert group.window is not None or len(fronts) == 1

    def _seen(self, chunk: Chunk) -> list[int]:
        """The cells of its row that a chunk reads or writes."""
        starts = [group.first_live(chunk.start, self.block_size) for group in self.groups.groups]
        return [cell for cell in range(len(chunk.block_table)) if cell // len(starts) >= starts[cell % len(starts)]]

    def _streaming(self, plan: StepPlan, chunks: list[Chunk]) -> list[Chunk]:
        """The chunks, whose tables name streamed blocks by their numbers after those of the pool.

        Asserts that the plan streams what the tables name, in order, and as much as a step can.
        """
        nums = [sum(chunk.block_table[cell] < 0 for cell in self._seen(chunk)) for chunk in chunks]
        if plan.streamed is None:
            assert not any(nums), "a table names streamed blocks"
            return chunks
        assert plan.num_steps == 1, "a burst streams nothing"
        placement, streamed = self.scheduler.blocks.placement, plan.streamed
        assert 0 < len(streamed.blocks) == sum(nums) <= placement.max_streamed_blocks
        assert streamed.blocks.dtype == streamed.starts.dtype == np.int32
        assert len(streamed.starts) == len(chunks)
        assert set(streamed.blocks.tolist()) <= set(range(len(self.host_pool)))
        named = []
        for chunk, num_blocks, start in zip(chunks, nums, streamed.starts.tolist(), strict=True):
            table = chunk.block_table
            assert list(table[:num_blocks]) == [host_cell(index) for index in range(num_blocks)]
            assert num_blocks * self.block_size <= chunk.start, "only blocks on the device are written"
            held = self.scheduler.blocks.holdings.held_by(chunk.seq_id).host_blocks
            assert streamed.blocks[start : start + num_blocks].tolist() == list(held)
            named.append(chunk._replace(block_table=[self._numbered(block, start) for block in table]))
        return named

    def _numbered(self, block: int, start: int) -> int:
        """A cell of a block table: a streamed block counts from the end of the pool."""
        return block if block >= 0 else len(self.pool) + start - 1 - block

    def _tokens_fed(self, seq: Sequence, chunk: Chunk) -> list[int]:
        """A sequence's tokens, with those drawn since that the scheduler was not told of."""
        return seq.token_ids if chunk.stop <= len(seq.token_ids) else self._drawn[seq.seq_id]

    def _check_moves(self, plan: StepPlan, chunks: list[Chunk]) -> None:
        """Assert that blocks are read and written only where, and as often as, ``StepPlan`` allows."""
        for moves in (plan.to_host, plan.from_host, plan.copies):
            assert len({move.dst for move in moves}) == len(moves), "two writes to one block"
        stored, loaded = {move.dst for move in plan.to_host}, {move.src for move in plan.from_host}
        assert stored | loaded <= set(range(len(self.host_pool)))
        assert not stored & loaded, "a host block is read and written"
        landing = {move.dst for move in plan.from_host}
        used = {block for copy in plan.copies for block in (copy.src, copy.dst)}
        for chunk in chunks:
            used.update([chunk.block_table[cell] for cell in self._seen(chunk)])
        used -= set(range(len(self.pool), len(self.pool) + (0 if plan.streamed is None else len(plan.streamed.blocks))))
        handed_out = set(range(1 + self.scheduler.blocks.placement.num_window_blocks, len(self.pool)))
        assert used | landing | {move.src for move in plan.to_host} <= handed_out, "0 is padding, then comes the window"
        assert not used & landing, "a block is used before it has landed"

    def _compute(self, chunks: list[Chunk]) -> list[list[int]]:
        """Write the numbers of all chunks, once their contexts are what they must be. Returns those of each chunk."""
        slots = [self._slots(chunk) for chunk in chunks]
        is_written = np.zeros(self.pool.size + self._window.size, bool)
        for chunk, groups in zip(chunks, slots, strict=True):
            for own in groups:
                assert not is_written[own[chunk.start :]].any(), "two tokens are written to one slot"
                assert (own[chunk.start :] < self.pool.size).all(), "a token is written to a streamed block"
                is_written[own[chunk.start :]] = True
        held, flat, numbers = np.concatenate([self.pool, self._window]), self.pool.reshape(-1), []
        for chunk, groups in zip(chunks, slots, strict=True):
            starts = [group.first_live(chunk.start, self.block_size) for group in self.groups.groups]
            for own, start in zip(groups, starts, strict=True):
                read = own[start * self.block_size : chunk.start]
                assert not is_written[read].any(), "a slot is read and written in one step"
            group, seq = self.scheduler.roster.sequences[chunk.seq_id]
            token_ids = self._tokens_fed(seq, chunk)
            self._check_content(held, list(chunk.block_table), group, token_ids, chunk.start, starts)
            salt = group.request.prefix_salt
            prefix = hash_prefixes(token_ids[: chunk.start], salt)[-1] if chunk.start else _before(salt)
            numbers.append([prefix := extend(prefix, token_id) for token_id in chunk.token_ids])
        for chunk, groups, written in zip(chunks, slots, numbers, strict=True):
            for index, own in enumerate(groups):
                flat[own[chunk.start :]] = [content_of(number, index) for number in written]
        return numbers

    def _slots(self, chunk: Chunk) -> list[Int64[np.ndarray, "tokens"]]:
        """The slots of all tokens of a chunk's sequence, in each layer group; those before a window are not there."""
        logical, offsets = np.divmod(np.arange(chunk.start + len(chunk.token_ids)), self.block_size)
        tables = np.asarray(chunk.block_table, int).reshape(-1, len(self.groups)).T
        return [table[logical] * self.block_size + offsets for table in tables]

    def _draw(self, plan: StepPlan, draw_index: int, chunks: list[Chunk], numbers: list[list[int]]) -> int:
        group, seq = self.scheduler.roster.sequences[int(plan.draws.seq_ids[draw_index])]
        index = int(plan.draws.chunks[draw_index])
        chunk, prefix, row = chunks[index], numbers[index][-1], int(plan.draws.rows[draw_index])
        token_ids = self._tokens_fed(seq, chunk)
        assert len(token_ids) == chunk.stop
        assert prefix == hash_prefixes(token_ids, group.request.prefix_salt)[-1], "drawn from another's logits"
        bans = self.rows.bans(row, chunk.stop)
        return draw(prefix, chunk.stop, self.rows.seed(row), self.rows.temperature(row), bans)


def _columns(moves: tuple[BlockCopy, ...]) -> tuple[Int[np.ndarray, "moves"], Int[np.ndarray, "moves"]]:
    return np.array([move.src for move in moves], int), np.array([move.dst for move in moves], int)


def _scores(rows: list[tuple[int, int]]) -> TokenScores:
    """Log-probabilities of (prefix, token)s; no alternatives, and made-up ranks."""
    logprobs = np.array([logprobs_after(prefix)[token_id] for prefix, token_id in rows], np.float32)
    none = np.zeros((len(rows), 0))
    return TokenScores(logprobs, np.ones(len(rows), np.int32), none.astype(np.int32), none.astype(np.float32))


def _candidates(select: BeamSelect, prefixes: list[int]) -> BeamCandidates:
    """The exact best continuations; of equal ones the earlier beam's, then the lower token."""
    totals = np.stack([logprobs_after(prefix) for prefix in prefixes]) + np.array(select.scores)[:, None]
    totals[:, list(select.banned_token_ids)] = -np.inf
    best = np.argsort(-totals.ravel(), kind="stable")[: select.num_candidates]
    scores = np.full(select.num_candidates, -np.inf)
    scores[: len(best)] = totals.ravel()[best]
    best = np.pad(best, (0, select.num_candidates - len(best)))
    rounded = scores.astype(np.float32)
    assert (rounded == scores).all(), "sums are exact"
    return BeamCandidates((best // VOCAB_SIZE).astype(np.int32), (best % VOCAB_SIZE).astype(np.int32), rounded)
