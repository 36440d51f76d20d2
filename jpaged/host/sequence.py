"""Sequences and sequence groups: the host's state of an unfinished request."""

import enum
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from jaxtyping import Int32

from jpaged.contract.result import TokenScores
from jpaged.host.blocks.hashed_tokens import HashedTokens
from jpaged.host.blocks.holdings import common_len
from jpaged.host.search.beam import BeamSearch
from jpaged.request import FinishReason, Request


class SequenceState(enum.Enum):
    """The place of a sequence and of its KV."""

    WAITING = enum.auto()  # new, or preempted to be recomputed: in no pool
    UNFORKED = enum.auto()  # its group runs, but its leader still computes the tokens they share: in no pool of its own
    LOADING = enum.auto()  # in the device pool when this step has run: loaded, or computed for another sequence
    RUNNING = enum.auto()  # in the device pool
    SWAPPED = enum.auto()  # preempted: in the host pool
    FINISHED = enum.auto()

    @property
    def holds_blocks(self) -> bool:
        return self in (SequenceState.LOADING, SequenceState.RUNNING, SequenceState.SWAPPED)


class Columns(Protocol):
    """The columns of the row table that own the state of a steady sequence."""

    positions: Int32[np.ndarray, " rows"]
    known: Int32[np.ndarray, " rows"]
    tail: Int32[np.ndarray, "rows tail"]

    def flush(self, row: int) -> None: ...


class Sequence:
    """One completion of a request: its tokens and how many of them are in the pool. Written by the scheduler alone.

    While the sequence is steady (``RowTable``), the columns of its row own its state, and what is read here comes from
    there.

    Attributes:
        seq_id: unique in the engine; the key of its block table.
        index: number of the completion within its request.
        seed: its own 32-bit seed.
        prompt_len: how many of ``token_ids`` are the prompt.
        rows: the table that it has a row of; None while it does not run. Written by the row table.
        row: its row id while it runs; None otherwise. Written by the row table.
        is_steady: whether columns own its state; written by the row table.
        state: where the sequence is.
        finish_reason: why it ended; None before.
        cumulative_logprob: log-probability of the output tokens of a beam; None outside of a beam search.
        score: score of a finished beam; None otherwise.
    """

    __slots__ = (
        "_hashed",
        "_num_computed",
        "_num_pending",
        "_num_scored",
        "_scores",
        "_token_ids",
        "cumulative_logprob",
        "finish_reason",
        "index",
        "is_steady",
        "prompt_len",
        "row",
        "rows",
        "score",
        "seed",
        "seq_id",
        "state",
    )

    def __init__(self, seq_id: int, index: int, seed: int, token_ids: list[int], prompt_len: int) -> None:
        self.seq_id = seq_id
        self.index = index
        self.seed = seed
        self.prompt_len = prompt_len
        self.rows: Columns | None = None
        self.row: int | None = None
        self.is_steady = False
        self.state = SequenceState.WAITING
        self.finish_reason: FinishReason | None = None
        self.cumulative_logprob: float | None = None
        self.score: float | None = None
        self._token_ids = token_ids
        self._hashed: HashedTokens | None = None
        self._num_computed = 0
        self._num_pending = 0
        self._scores: list[tuple[TokenScores, range]] = []  # of the output tokens, in order, with their rows in them
        self._num_scored = 0

    def append(self, token_ids: list[int], scores: TokenScores, rows: range) -> None:
        """Append tokens that were drawn, each with its row of ``scores``."""
        self.extend(token_ids, [(scores, rows)])

    def extend(self, token_ids: list[int], scores: list[tuple[TokenScores, range]]) -> None:
        """Append tokens that were drawn, with their scores in order: each part has some rows of its scores."""
        self._token_ids += token_ids
        self._scores += scores
        self._num_scored += len(token_ids)

    def follow(self, parent: "Sequence") -> None:
        """Continue the computed tokens of another sequence with the same prompt, instead of its own."""
        start, stop = self.prompt_len, parent.num_computed
        self.token_ids[start:] = parent.token_ids[start:stop]
        self.hashed.follow(parent.hashed, start, stop)
        self.num_computed = stop

    def cut(self, num_outputs: int) -> None:
        """Drop the output tokens behind the first ``num_outputs`` of a sequence that has ended."""
        assert self.is_finished
        del self._token_ids[self.prompt_len + num_outputs :]

    @property
    def token_ids(self) -> list[int]:
        """Prompt and output, in order."""
        if self.is_steady:
            assert self.rows is not None
            assert self.row is not None
            self.rows.flush(self.row)
        return self._token_ids

    def token_ids_from(self, start: int) -> list[int]:
        """``token_ids`` from ``start`` on; those that a steady sequence has drawn stay with its row."""
        token_ids = self._token_ids[start:]
        if self.is_steady:
            assert self.rows is not None
            num_flushed = len(self._token_ids)
            num_left = self.rows.known[self.row] - num_flushed
            token_ids += self.rows.tail[self.row, max(start - num_flushed, 0) : num_left].tolist()
        return token_ids

    @property
    def hashed(self) -> HashedTokens:
        """``token_ids`` with the hashes of their blocks."""
        assert self._hashed is not None
        if self.is_steady:
            assert self.rows is not None
            assert self.row is not None
            self.rows.flush(self.row)
        return self._hashed

    @hashed.setter
    def hashed(self, value: HashedTokens) -> None:
        self._hashed = value

    @property
    def num_computed(self) -> int:
        """Leading tokens whose K/V are in the pool, counting those of the steps planned."""
        if self.is_steady:
            assert self.rows is not None
            return int(self.rows.positions[self.row]) - 1
        return self._num_computed

    @num_computed.setter
    def num_computed(self, value: int) -> None:
        assert not self.is_steady
        self._num_computed = value

    @property
    def num_pending(self) -> int:
        """Tokens that the steps planned will add to ``token_ids``."""
        if self.is_steady:
            assert self.rows is not None
            return int(self.rows.positions[self.row] - self.rows.known[self.row])
        return self._num_pending

    @num_pending.setter
    def num_pending(self, value: int) -> None:
        assert not self.is_steady
        self._num_pending = value

    @property
    def num_outputs(self) -> int:
        return len(self.token_ids) - self.prompt_len

    @property
    def num_tokens(self) -> int:
        """Prompt and output, with pending tokens."""
        if self.is_steady:
            assert self.rows is not None
            return int(self.rows.positions[self.row])
        return len(self._token_ids) + self._num_pending

    @property
    def num_known(self) -> int:
        """Leading tokens whose K/V are in the pool and which are known."""
        return min(self.num_computed, len(self.token_ids))

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[self.prompt_len :]

    @property
    def output_scores(self) -> list[tuple[TokenScores, int]]:
        """The scores that each output token came with, and its row in them. Empty in beam search."""
        return self.scores_from(0)

    def scores_from(self, start: int) -> list[tuple[TokenScores, int]]:
        """``output_scores`` from output token ``start`` on, in time that does not depend on the tokens before it."""
        num_outputs = self.num_outputs
        found, num_left = [], self._num_scored - start
        for scores, rows in reversed(self._scores):
            if num_left <= 0:
                break
            found += [(scores, row) for row in reversed(rows[max(len(rows) - num_left, 0) :])]
            num_left -= len(rows)
        # A sequence that ended in a burst may have taken no more than the beginning of the burst.
        return found[::-1][: max(num_outputs - start, 0)]

    @property
    def is_finished(self) -> bool:
        return self.state is SequenceState.FINISHED


@dataclass(slots=True, eq=False)
class SequenceGroup:
    """The sequences of one request: admitted, preempted and resumed together (PagedAttention, section 4.5).

    Args:
        request: the request that the group serves.
        arrival: counts requests; lower came first.
        sequences: one per completion. Of a beam search: its live sequences, best first; in the end, its results.
        max_tokens: output tokens a sequence may reach, ``params.max_tokens`` or what fits.
        stop_token_ids: tokens that end a sequence.
        beam: the search, if it is one.
        is_pin: nothing is generated: the prompt is to stay in the pool.
        is_streamed: while it runs, its full blocks stay on the host, and every step reads them there.
        fork_at: while some sequences are UNFORKED, how many tokens the leader computes for all of them.
        num_cached_tokens: prompt tokens found in the prefix cache when first admitted.
        prompt_scores: scores of prompt tokens 1, 2, ...; in pieces, one per chunk.
        first_scheduled: when it was first admitted, of ``time.monotonic``.
        num_preemptions: times that it was preempted.
        error: why sequences ended with ``FinishReason.ERROR`` or ``ABORT``; None where there is no more to say.
    """

    request: Request
    arrival: int
    sequences: list[Sequence]
    max_tokens: int
    stop_token_ids: frozenset[int]
    beam: BeamSearch | None = None
    is_pin: bool = False
    is_streamed: bool = False
    fork_at: int | None = None
    num_cached_tokens: int | None = None
    prompt_scores: list[TokenScores] = field(default_factory=list)
    first_scheduled: float | None = None
    num_preemptions: int = 0
    error: str | None = None

    @property
    def prompt_len(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def unfinished(self) -> list[Sequence]:
        return [seq for seq in self.sequences if seq.state is not SequenceState.FINISHED]

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
        return SequenceState.SWAPPED in [seq.state for seq in self.sequences]

    @property
    def is_finished(self) -> bool:
        # Asked of every group in every step: a generator would cost more than the answer.
        for seq in self.sequences:  # noqa: SIM110
            if seq.state is not SequenceState.FINISHED:
                return False
        return True

    @property
    def is_steady(self) -> bool:
        """Whether each token is drawn as the one before: nothing is forked, and the host bans nothing."""
        return not (self.beam is not None or self.is_pin or self.fork_at is not None or self.request.banned_sequences)

    @property
    def is_adjusted(self) -> bool:
        """Whether draws have adjustments: biases, bans or penalties. Searches ban tokens themselves."""
        request, params = self.request, self.request.params
        if self.beam is not None:
            return False
        is_late = params.min_tokens > 0 and bool(self.stop_token_ids)
        has_bans = bool(len(request.banned_token_ids) or request.banned_sequences)
        return is_late or has_bans or params.has_penalties or bool(params.logit_bias)

    @property
    def ends_at_limit(self) -> bool:
        """Whether no token ends its sequences before their longest length."""
        return not (self.stop_token_ids or self.request.params.stop)

    @property
    def least_tokens(self) -> int:
        """Output tokens that each sequence reaches."""
        return self.max_tokens if self.ends_at_limit else min(self.request.params.min_tokens, self.max_tokens)

    @property
    def may_stop(self) -> bool:
        """Whether a token may end its sequences before their longest length."""
        return self.least_tokens < self.max_tokens

    @property
    def needs_prompt_scores(self) -> bool:
        """Whether prompt log-probabilities were asked for and are not complete."""
        if self.request.params.prompt_logprobs is None:
            return False
        return sum(len(piece.logprobs) for piece in self.prompt_scores) < self.prompt_len - 1

    def targets(self) -> list[tuple[Sequence, int]]:
        """The running sequences, and how many tokens of each to bring into the pool now.

        A leader stops at what its siblings share until they have forked, and a sequence whose last token is pending
        needs no more. All beams feed their last token in one step, since the choice among them takes the logits of all.
        Beams that come back sooner wait for the others.
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
