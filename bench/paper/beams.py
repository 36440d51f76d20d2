"""Made-up continuations for beam searches: a seeded model of the probabilities of next tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from jpaged.contract.plan import BeamSelect
from jpaged.contract.result import BeamCandidates

NUM_TABLED = 1 << 14
"""Number of distributions drawn beforehand; a beam takes one at random in every step."""


@dataclass(frozen=True)
class CandidateModel:
    """Next-token distributions of a language model, as a beam search sees them.

    A distribution is a Poisson-Dirichlet one, the heavy-tailed law of the shares of infinitely many rivals. Often one
    token has nearly everything; sometimes many compete. Which beams survive follows from cumulative log-probabilities.

    Args:
        concentration: parameter of the law; the mean entropy is digamma(concentration + 1) + 0.577 nats (1.28 for 1.5).
        alikeness: probability that all beams of a search face the same distribution in a step. Beams that differ in an
            old word alone do. Otherwise each draws its own. Rivals live longer side by side if this is larger.
        seed: seed of all draws.
    """

    concentration: float = 1.5
    alikeness: float = 0.5
    seed: int = 0

    def describe(self) -> str:
        """The model in a sentence."""
        return (
            f"Beams' next-token probabilities are Poisson-Dirichlet({self.concentration:g}), the same for all beams of "
            f"a search in {100 * self.alikeness:.0f}% of its steps and independent in the others (seed {self.seed})."
        )


DEFAULT_CANDIDATES = CandidateModel()


class CandidateSource:
    """Draws the candidates of each search in a plan; one source serves one replay."""

    def __init__(self, model: CandidateModel) -> None:
        self._model = model
        self._rng = np.random.default_rng(model.seed)

    def choose(self, selects: Sequence[BeamSelect]) -> tuple[BeamCandidates, ...]:
        """The best continuations of every search, best first. A token's id is its rank in its distribution."""
        return tuple(self._choose(select) for select in selects)

    def _choose(self, select: BeamSelect) -> BeamCandidates:
        table = _draw_logprobs(self._model, select.num_candidates)
        num_beams, is_alike = len(select.chunks), self._rng.random() < self._model.alikeness
        rows = self._rng.integers(NUM_TABLED, size=1 if is_alike else num_beams)
        scores = np.asarray(select.scores)[:, None] + table[rows]
        best = np.argsort(-scores, axis=None, kind="stable")[: select.num_candidates]
        beams, token_ids = np.divmod(best, select.num_candidates)
        return BeamCandidates(
            beams.astype(np.int32), token_ids.astype(np.int32), scores.ravel()[best].astype(np.float32)
        )


@lru_cache(maxsize=4)
def _draw_logprobs(model: CandidateModel, num_tokens: int) -> np.ndarray:
    """[distributions, tokens] log-probabilities of each distribution's most probable tokens, best first.

    Stick breaking: each token takes a Beta(1, concentration) share of the rest that the earlier ones left.
    """
    rng = np.random.default_rng(model.seed)
    shares = rng.beta(1, model.concentration, (NUM_TABLED, 8 * num_tokens))
    log_left = np.cumsum(np.log1p(-shares), axis=1)
    logprobs = np.log(shares) + np.hstack([np.zeros((NUM_TABLED, 1)), log_left[:, :-1]])
    return -np.sort(-logprobs, axis=1)[:, :num_tokens]
