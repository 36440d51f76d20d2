"""Log-probabilities of chosen tokens under the model, on the device and fetched."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from jpaged.contract.result import TokenScores
from jpaged.device.sampling.chunks import log_normaliser, summarise
from jpaged.device.sampling.filters import top_k
from jpaged.device.sampling.some_rows import of_some_rows

NO_SCORES = TokenScores.plain(np.zeros(0, np.float32))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Scores:
    """Log-probabilities of chosen tokens under the model: before biases, penalties, temperature and filters.

    Args:
        logprobs: log-probability of the chosen token; NaN if a logit of the row is NaN or +inf, or all are -inf.
        ranks: 1 + the number of tokens with a greater logit; 0 if no ranks were asked for.
        top_ids: the most probable tokens, best first.
        top_logprobs: log-probabilities of ``top_ids``.
    """

    logprobs: Float[Array, "rows"]
    ranks: Int[Array, "rows"]
    top_ids: Int[Array, "rows num_top"]
    top_logprobs: Float[Array, "rows num_top"]


def score(logits: Float[Array, "rows vocab"], targets: Int[Array, "rows"], *, num_top: int) -> Scores:
    """Score one token a row under the model; to be called under jit.

    Args:
        logits: the model's own, float32.
        targets: the tokens to score.
        num_top: most probable tokens to score besides (static; fewer if the vocabulary is smaller).
    """
    return score_with(logits, own_log_normaliser(logits), targets, num_top)


def own_log_normaliser(logits: Float[Array, "rows vocab"]) -> Float[Array, "rows"]:
    """Log of the sum of all exponentials of each row."""
    chunks = summarise(logits, jnp.ones(logits.shape[0], jnp.float32))
    return log_normaliser(*lax.optimization_barrier((chunks.maxima, chunks.masses)))


def score_with(
    logits: Float[Array, "rows vocab"],
    normaliser: Float[Array, "rows"],
    targets: Int[Array, "rows"],
    num_top: int | None,
    num_wanted: Int[Array, "rows"] | None = None,
) -> Scores:
    """Score as ``score`` does, for a known normaliser.

    Args:
        logits: the model's own, float32.
        normaliser: log of the sum of all exponentials of each row.
        targets: the tokens to score.
        num_top: as for ``score``; None for neither ranks nor alternatives.
        num_wanted: alternatives that each row asks for, -1 if not even the rank; None if all rows ask for all.
            The ranks and alternatives that a row does not ask for may be anything.
    """
    normaliser = jnp.where(jnp.isfinite(normaliser), normaliser, jnp.nan)  # tells such logits from a masked target
    target_logits = jnp.take_along_axis(logits, targets[:, None], axis=1)
    has_ranks, num_top = num_top is not None, min(num_top or 0, logits.shape[1])

    def rank() -> Int[Array, "rows"]:
        return 1 + jnp.sum(logits > target_logits, axis=1, dtype=jnp.int32)

    ranks = jnp.zeros(targets.shape, jnp.int32)
    if num_wanted is None:
        top_logits, top_ids = top_k(logits, num_top)
        ranks = rank() if has_ranks else ranks
    else:
        shape = len(logits), num_top
        none = jnp.zeros(shape, jnp.float32), jnp.zeros(shape, jnp.int32)
        wants_top = (num_wanted > 0) & (num_top > 0)
        top_logits, top_ids = of_some_rows(wants_top, lambda rows: tuple(top_k(logits[rows], num_top)), none)
        if has_ranks:
            ranks = lax.cond(jnp.any(num_wanted >= 0), rank, lambda: ranks)
    return Scores(target_logits[:, 0] - normaliser, ranks, top_ids, top_logits - normaliser[:, None])


def first_rows(scores: Scores, num_rows: int) -> TokenScores:
    """Scores fetched to the host, without padding rows."""
    return TokenScores(
        logprobs=np.asarray(scores.logprobs)[:num_rows],
        ranks=np.asarray(scores.ranks)[:num_rows],
        top_ids=np.asarray(scores.top_ids)[:num_rows],
        top_logprobs=np.asarray(scores.top_logprobs)[:num_rows],
    )


def join_scores(parts: Sequence[TokenScores]) -> TokenScores:
    """The rows of all parts, which have equally many alternatives."""
    return TokenScores(
        logprobs=np.concatenate([part.logprobs for part in parts]),
        ranks=np.concatenate([part.ranks for part in parts]),
        top_ids=np.concatenate([part.top_ids for part in parts]),
        top_logprobs=np.concatenate([part.top_logprobs for part in parts]),
    )
