"""Beam search: which continuations live on, which are finished, and when the search is over.

This module owns the arithmetic of scores. The block manager shares and copies the blocks of beams; the scheduler
decides which beams run. The semantics are those of Hugging Face ``generate(num_beams=...)``: results can be compared.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from jpaged.contract.result import BeamCandidates
from jpaged.request import FinishReason, SamplingParams


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """A finished sequence of a search.

    Args:
        token_ids: generated tokens, the last one included.
        cumulative_logprob: sum of the tokens' log-probabilities.
        score: cumulative_logprob / length ** length_penalty.
        finish_reason: STOP or LENGTH.
    """

    token_ids: list[int]
    cumulative_logprob: float
    score: float
    finish_reason: FinishReason


@dataclass(frozen=True, slots=True)
class Continuation:
    """A beam of the next step: beam ``parent`` of this step and one more token."""

    parent: int
    token_id: int
    cumulative_logprob: float


class BeamSearch:
    """One search in progress. Written by the scheduler, which keeps its live sequences in the order of ``scores``.

    Args:
        params: width, length penalty and early stopping.
        max_tokens: tokens to generate at most.
        stop_token_ids: tokens that finish a sequence.
    """

    def __init__(self, params: SamplingParams, max_tokens: int, stop_token_ids: frozenset[int]):
        self.width = params.num_sequences
        self.max_tokens = max_tokens
        self.length_penalty = params.length_penalty
        self.stop_token_ids = stop_token_ids
        # A width of 1 is greedy decoding, which ends with its first end-of-sequence.
        self.early_stopping = True if self.width == 1 else params.early_stopping
        self.scores = [0.0]
        """Cumulative log-probability of each live sequence, best first; one sequence until the prompt is computed."""
        self.finished: list[Hypothesis] = []
        """The best finished sequences, ``width`` at most, best first."""

    @property
    def num_candidates(self) -> int:
        """Continuations to look at in a step: ``width`` of them go on even if they include every stop token."""
        return max(2, 1 + len(self.stop_token_ids)) * self.width

    def score(self, cumulative_logprob: float, length: int) -> float:
        """The score that ranks finished sequences (Wu et al., arXiv:1609.08144, with a plain power of the length)."""
        return cumulative_logprob / length**self.length_penalty

    def advance(self, outputs: Sequence[Sequence[int]], candidates: BeamCandidates) -> list[Continuation]:
        """Apply the candidates of one step.

        Args:
            outputs: tokens generated so far by each live sequence, all of one length.
            candidates: their best continuations, best first.

        Returns:
            The live sequences of the next step, best first; empty when the search is over.
        """
        length = len(outputs[0]) + 1
        live: list[Continuation] = []
        rows = zip(candidates.beams.tolist(), candidates.token_ids.tolist(), candidates.scores.tolist(), strict=True)
        for rank, (parent, token_id, logprob) in enumerate(rows):
            if logprob == float("-inf"):
                break  # the vocabulary had no more to offer
            is_stop = token_id in self.stop_token_ids
            if is_stop or length >= self.max_tokens:
                # One that the width would have dropped is no result: it only shows that others go on.
                if rank < self.width:
                    reason = FinishReason.STOP if is_stop else FinishReason.LENGTH
                    tokens = [*outputs[parent], token_id]
                    self.finished.append(Hypothesis(tokens, logprob, self.score(logprob, length), reason))
            elif len(live) < self.width:
                live.append(Continuation(parent, token_id, logprob))
        self.finished = sorted(self.finished, key=lambda hypothesis: -hypothesis.score)[: self.width]
        self.scores = [beam.cumulative_logprob for beam in live]
        return [] if self._is_over(length) else live

    def _is_over(self, length: int) -> bool:
        """Whether no live sequence is expected to beat the worst of ``width`` finished ones."""
        if not self.scores:
            return True
        if len(self.finished) < self.width:
            return False
        if self.early_stopping is True:
            return True
        # "never" asks what could be at most: with a penalty above 0, the score of today's sum at full length.
        may_grow = self.early_stopping == "never" and self.length_penalty > 0
        best_possible = self.score(self.scores[0], self.max_tokens if may_grow else length)
        return best_possible <= self.finished[-1].score
