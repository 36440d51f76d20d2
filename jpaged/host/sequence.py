"""Sequences and sequence groups: what the scheduler knows of a request under way."""

import enum
from dataclasses import dataclass, field

from jpaged.host.step_plan import TokenScores
from jpaged.request import FinishReason, Request


class SequenceState(enum.Enum):
    """Where a sequence is. Only RUNNING sequences hold blocks."""

    WAITING = enum.auto()  # new or preempted: nothing in the pool
    UNFORKED = enum.auto()  # its group runs, but its leader still computes the prompt they share
    RUNNING = enum.auto()
    FINISHED = enum.auto()


@dataclass(slots=True, eq=False)
class Sequence:
    """One completion of a request: its tokens and how many of them are in the pool. Written by the scheduler alone.

    Args:
        seq_id: unique in the engine; the key of its block table.
        index: which of its request's completions it is.
        seed: its own 32-bit seed.
        token_ids: prompt and output, in order.
        prompt_len: how many of ``token_ids`` are the prompt.
        num_computed: leading tokens whose K/V are in the pool, counting those of the step being planned.
        scores: (scores, row) of each output token; read by whoever turns tokens into results.
    """

    seq_id: int
    index: int
    seed: int
    token_ids: list[int]
    prompt_len: int
    num_computed: int = 0
    state: SequenceState = SequenceState.WAITING
    finish_reason: FinishReason | None = None
    scores: list[tuple[TokenScores, int]] = field(default_factory=list)

    @property
    def num_outputs(self) -> int:
        return len(self.token_ids) - self.prompt_len

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[self.prompt_len :]

    @property
    def is_finished(self) -> bool:
        return self.state is SequenceState.FINISHED


@dataclass(slots=True, eq=False)
class SequenceGroup:
    """The sequences of one request: admitted, preempted and resumed together (PagedAttention, section 4.5).

    Args:
        request: what was asked.
        arrival: counts requests; lower came first.
        sequences: one per completion.
        max_tokens: output tokens a sequence may reach, ``params.max_tokens`` or what fits.
        stop_token_ids: tokens that end a sequence.
        num_cached_tokens: prompt tokens found in the prefix cache when first admitted.
        prompt_scores: of prompt tokens 1, 2, ...; in pieces, one per chunk.
    """

    request: Request
    arrival: int
    sequences: list[Sequence]
    max_tokens: int
    stop_token_ids: frozenset[int]
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
    def is_finished(self) -> bool:
        return all(seq.is_finished for seq in self.sequences)

    @property
    def needs_prompt_scores(self) -> bool:
        """Whether prompt log-probabilities were asked for and are not complete."""
        if self.request.params.prompt_logprobs is None:
            return False
        return sum(len(piece.logprobs) for piece in self.prompt_scores) < self.prompt_len - 1
