"""Sequences and sequence groups: what the scheduler knows of a request under way."""

import enum
from dataclasses import dataclass, field

from jpaged.contract.plan import TokenScores
from jpaged.host.blocks.hashed_tokens import HashedTokens
from jpaged.host.search.beam import BeamSearch
from jpaged.request import FinishReason, Request


class SequenceState(enum.Enum):
    """Where a sequence is, and where its KV."""

    WAITING = enum.auto()  # new, or preempted to be recomputed: in no pool
    UNFORKED = enum.auto()  # its group runs, but its leader still computes the tokens they share: in no pool of its own
    LOADING = enum.auto()  # in the device pool when this step has run: loaded, or computed for another sequence
    RUNNING = enum.auto()  # in the device pool
    SWAPPED = enum.auto()  # preempted: in the host pool
    FINISHED = enum.auto()

    @property
    def holds_blocks(self) -> bool:
        return self in (SequenceState.LOADING, SequenceState.RUNNING, SequenceState.SWAPPED)


@dataclass(slots=True, eq=False)
class Sequence:
    """One completion of a request: its tokens and how many of them are in the pool. Written by the scheduler alone.

    Args:
        seq_id: unique in the engine; the key of its block table.
        index: which of its request's completions it is.
        seed: its own 32-bit seed.
        token_ids: prompt and output, in order.
        prompt_len: how many of ``token_ids`` are the prompt.
        num_computed: leading tokens whose K/V are in the pool, counting those of the steps planned.
        num_pending: tokens that the steps planned will add to ``token_ids``.
        pending_row: the sample of the newest plan that brings the last of them.
        scores, score_rows: of each plan that brought tokens, the scores of its steps, and this sequence's row in them.
            Empty in beam search.
        cumulative_logprob: of beam search: of the output tokens.
        score: of beam search, once finished.
        hashed: ``token_ids`` with the hashes of their blocks.
    """

    seq_id: int
    index: int
    seed: int
    token_ids: list[int]
    prompt_len: int
    num_computed: int = 0
    num_pending: int = 0
    pending_row: int = 0
    state: SequenceState = SequenceState.WAITING
    finish_reason: FinishReason | None = None
    scores: list[tuple[TokenScores, ...]] = field(default_factory=list)
    score_rows: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    score: float | None = None
    hashed: HashedTokens = field(init=False)

    @property
    def num_outputs(self) -> int:
        return len(self.token_ids) - self.prompt_len

    @property
    def num_tokens(self) -> int:
        """Prompt and output, with what is pending."""
        return len(self.token_ids) + self.num_pending

    @property
    def num_known(self) -> int:
        """Leading tokens whose K/V are in the pool and which are known."""
        return min(self.num_computed, len(self.token_ids))

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[self.prompt_len :]

    @property
    def output_scores(self) -> list[tuple[TokenScores, int]]:
        """Of each output token, the scores it came with and its row in them. Empty in beam search."""
        drawn = zip(self.scores, self.score_rows, strict=True)
        # Of the last burst, a sequence that ended may have taken no more than the beginning.
        return [(scores, row) for steps, row in drawn for scores in steps][: self.num_outputs]

    @property
    def is_finished(self) -> bool:
        return self.state is SequenceState.FINISHED


@dataclass(slots=True, eq=False)
class SequenceGroup:
    """The sequences of one request: admitted, preempted and resumed together (PagedAttention, section 4.5).

    Args:
        request: what was asked.
        arrival: counts requests; lower came first.
        sequences: one per completion. Of a beam search: its live sequences, best first; in the end, its results.
        max_tokens: output tokens a sequence may reach, ``params.max_tokens`` or what fits.
        stop_token_ids: tokens that end a sequence.
        beam: the search, if it is one.
        is_pin: nothing is generated: the prompt is to stay in the pool.
        fork_at: while some sequences are UNFORKED, how many tokens the leader computes for all of them.
        num_cached_tokens: prompt tokens found in the prefix cache when first admitted.
        prompt_scores: of prompt tokens 1, 2, ...; in pieces, one per chunk.
    """

    request: Request
    arrival: int
    sequences: list[Sequence]
    max_tokens: int
    stop_token_ids: frozenset[int]
    beam: BeamSearch | None = None
    is_pin: bool = False
    fork_at: int | None = None
    num_cached_tokens: int | None = None
    prompt_scores: list[TokenScores] = field(default_factory=list)

    @property
    def prompt_len(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def unfinished(self) -> list[Sequence]:
        return [seq for seq in self.sequences if not seq.is_finished]

    @property
    def running(self) -> list[Sequence]:
        return [seq for seq in self.sequences if seq.state is SequenceState.RUNNING]

    @property
    def num_rows(self) -> int:
        """Rows of a batch that the group may come to need: a search has one sequence first, and then ``width``."""
        if self.beam is not None:
            return self.beam.width
        return 1 if len(self.sequences) == 1 else len(self.unfinished)

    @property
    def is_swapped(self) -> bool:
        return any(seq.state is SequenceState.SWAPPED for seq in self.sequences)

    @property
    def is_finished(self) -> bool:
        # Asked of every group in every step: a generator would cost more than the answer.
        for seq in self.sequences:  # noqa: SIM110
            if seq.state is not SequenceState.FINISHED:
                return False
        return True

    @property
    def is_steady(self) -> bool:
        """Whether its sequences draw each token as they drew the one before: nothing is forked, banned or penalised."""
        params = self.request.params
        if self.beam is not None or self.is_pin or self.fork_at is not None or params.has_penalties:
            return False
        return not (
            params.min_tokens and any(seq.num_tokens - seq.prompt_len < params.min_tokens for seq in self.unfinished)
        )

    @property
    def needs_prompt_scores(self) -> bool:
        """Whether prompt log-probabilities were asked for and are not complete."""
        if self.request.params.prompt_logprobs is None:
            return False
        return sum(len(piece.logprobs) for piece in self.prompt_scores) < self.prompt_len - 1

    def targets(self) -> list[tuple[Sequence, int]]:
        """The running sequences, and how many tokens of each to bring into the pool now.

        A leader stops at what its siblings share until they have forked, and a sequence whose last token is pending
        needs no more. Beams feed their last token all in one step,
        since it takes the logits of all to choose among them: those that come back sooner wait for the others.
        """
        if len(self.sequences) == 1 and self.beam is None:  # most are of this kind: kept free of other work
            seq = self.sequences[0]
            is_fed = seq.state is SequenceState.RUNNING and not self.is_ending(seq)
            return [(seq, seq.num_tokens)] if is_fed else []
        if self.fork_at is not None:
            return [(seq, self.fork_at) for seq in self.running]
        is_search = self.beam is not None and len(self.sequences) > 1
        is_held_back = is_search and any(len(seq.token_ids) - seq.num_computed > 1 for seq in self.sequences)
        return [(seq, seq.num_tokens - is_held_back) for seq in self.running if not self.is_ending(seq)]

    def is_ending(self, seq: Sequence) -> bool:
        """Whether a pending token is the last that a sequence may have."""
        return seq.num_pending > 0 and seq.num_tokens - seq.prompt_len >= self.max_tokens

    def fork_len(self) -> int:
        """Tokens the leader computes for all: the prompt, or when the group comes back, all they have in common."""
        members = self.unfinished
        if members[0].num_outputs == 0:
            return self.prompt_len
        # Each keeps a token of its own to compute, to have its logits.
        return min(num_shared_tokens(members), min(len(seq.token_ids) for seq in members) - 1)


def num_shared_tokens(sequences: list[Sequence]) -> int:
    """Tokens that all sequences begin with."""
    first, *others = (seq.token_ids for seq in sequences)
    return min((common_len(first, other) for other in others), default=len(first))


def common_len(a: list[int], b: list[int]) -> int:
    """Length of the common beginning."""
    length = min(len(a), len(b))
    if a[:length] == b[:length]:
        return length
    return next(i for i in range(length) if a[i] != b[i])
