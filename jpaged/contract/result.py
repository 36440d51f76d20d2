"""The results of a step, on the host."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int32


@dataclass(frozen=True, slots=True)
class TokenScores:
    """Log-probabilities of chosen tokens under the model, before penalties, temperature and filters.

    Args:
        logprobs: log-probability of each chosen token; NaN if the logits were no distribution.
        ranks: 1 for the most probable token; 0 if no ranks were asked for.
        top_ids: alternatives, most probable first; none if none were asked for.
        top_logprobs: log-probabilities of the alternatives.
    """

    logprobs: Float32[np.ndarray, " rows"]
    ranks: Int32[np.ndarray, " rows"]
    top_ids: Int32[np.ndarray, "rows alternatives"]
    top_logprobs: Float32[np.ndarray, "rows alternatives"]

    @classmethod
    def plain(cls, logprobs: Float32[np.ndarray, " rows"]) -> "TokenScores":
        """Log-probabilities alone."""
        rows = len(logprobs)
        return cls(logprobs, np.zeros(rows, np.int32), np.zeros((rows, 0), np.int32), np.zeros((rows, 0), np.float32))


@dataclass(frozen=True, slots=True)
class BeamCandidates:
    """The continuations of one ``BeamSelect``, best first.

    Args:
        beams: index into ``BeamSelect.chunks`` of the beam that each continues.
        token_ids: the token that each adds.
        scores: cumulative log-probabilities; -inf where the vocabulary had no more to offer. All are NaN if the logits
            of a beam were no distribution.
    """

    beams: Int32[np.ndarray, " candidates"]
    token_ids: Int32[np.ndarray, " candidates"]
    scores: Float32[np.ndarray, " candidates"]


@dataclass(frozen=True, slots=True)
class StepResult:
    """The results of one plan.

    Args:
        token_ids: one token for each of the plan's draws.
        scores: one row for each draw.
        prompt_scores: one for each of ``StepPlan.prompt_scores``.
        beams: one for each of ``StepPlan.beams``.
        later: tokens and scores of each further step of a burst.
    """

    token_ids: Int32[np.ndarray, " draws"]
    scores: TokenScores
    prompt_scores: tuple[TokenScores, ...] = ()
    beams: tuple[BeamCandidates, ...] = ()
    later: tuple[tuple[Int32[np.ndarray, " draws"], TokenScores], ...] = ()
