"""The contract between the halves: a StepPlan crosses to the device, a StepResult comes back.

Nothing here decides and nothing executes; lists inside a plan are read, never changed, by its receiver.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jpaged.request import SamplingParams


@dataclass(frozen=True, slots=True)
class BlockCopy:
    """Copy-on-write: physical block ``dst`` becomes a copy of ``src`` before the step writes anything."""

    src: int
    dst: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive tokens of one sequence to compute this step: a decode (one token) or a piece of a prompt.

    Args:
        seq_id: the sequence.
        token_ids: the tokens fed to the model; the first sits at position ``start``.
        start: tokens of the sequence whose KV is already in the pool.
        prompt_len: length of the sequence's prompt (some rope scalings depend on it).
        block_table: physical blocks of logical blocks 0, 1, ...; covers at least ``start + len(token_ids)`` tokens.
    """

    seq_id: int
    token_ids: Sequence[int]
    start: int
    prompt_len: int
    block_table: Sequence[int]


@dataclass(frozen=True, slots=True)
class Sample:
    """Draw one token from the logits of the last token of ``chunks[chunk]``.

    Args:
        seq_id: the sequence that will own the token. Several samples may read one chunk (a prompt about to fork).
        chunk: index into ``StepPlan.chunks``.
        position: where the new token will sit in its sequence; with ``seed`` it fixes the randomness.
        seed: this sequence's own 32-bit seed.
        params: the request's sampling parameters.
        banned_token_ids: tokens that may not be drawn now (end-of-sequence before ``min_tokens``).
        prompt_token_ids, output_token_ids: what penalties count; a view of the sequence's lists.
    """

    seq_id: int
    chunk: int
    position: int
    seed: int
    params: SamplingParams
    banned_token_ids: Sequence[int]
    prompt_token_ids: Sequence[int]
    output_token_ids: Sequence[int]


@dataclass(frozen=True, slots=True)
class PromptScore:
    """Score the prompt tokens that follow each of the first ``len(target_ids)`` tokens of ``chunks[chunk]``."""

    chunk: int
    target_ids: Sequence[int]
    num_logprobs: int


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step of the device half, complete: copies first, then all chunks in one ragged batch, then samples."""

    copies: tuple[BlockCopy, ...] = ()
    chunks: tuple[Chunk, ...] = ()
    samples: tuple[Sample, ...] = ()
    prompt_scores: tuple[PromptScore, ...] = ()

    @property
    def num_tokens(self) -> int:
        return sum(len(chunk.token_ids) for chunk in self.chunks)


@dataclass(frozen=True, slots=True)
class TokenScores:
    """Log-probabilities of chosen tokens, from the model's own logits (before penalties, temperature, filters).

    Args:
        logprobs: [rows] float32, of the chosen token.
        ranks: [rows] int32, 1 for the most probable token.
        top_ids: [rows, alternatives] int32, most probable first; zero alternatives when nobody asked.
        top_logprobs: [rows, alternatives] float32.
    """

    logprobs: np.ndarray
    ranks: np.ndarray
    top_ids: np.ndarray
    top_logprobs: np.ndarray


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step produced, on the host.

    Args:
        token_ids: [samples] int32, one per ``StepPlan.samples``.
        scores: one row per sample.
        prompt_scores: one per ``StepPlan.prompt_scores``.
    """

    token_ids: np.ndarray
    scores: TokenScores
    prompt_scores: tuple[TokenScores, ...] = ()
