"""Logits to tokens: biases, penalties, temperature, filters, and seeded draws."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jpaged.device.sampling.adjustments import adjusted
from jpaged.device.sampling.chunks import (
    Chunks,
    finite_or_zero,
    first_of_greatest,
    log_masses,
    log_normaliser,
    summarise,
)
from jpaged.device.sampling.columns import SampleInputs
from jpaged.device.sampling.filters import Filters, find_threshold
from jpaged.device.sampling.noise import draw
from jpaged.device.sampling.scores import Scores, own_log_normaliser, score_with
from jpaged.device.sampling.some_rows import of_some_rows

MIN_TEMPERATURE = 1e-5
"""Below this a row is greedy: the division would leave nothing for the noise to decide."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SampledTokens:
    """One drawn token a row, with its scores."""

    token_ids: Int[Array, "rows"]
    scores: Scores


def sample(logits: Float[Array, "rows vocab"], inputs: SampleInputs, *, num_top: int | None) -> SampledTokens:
    """Draw one token a row and score it; to be called under jit.

    The order is: biases and bans; penalties (repetition over prompt and output, CTRL, arXiv:1909.05858, section 4.1;
    presence and frequency over the output); temperature; top-k; top-p on what top-k left (Holtzman et al.,
    arXiv:1904.09751); min-p (arXiv:2407.01082), which therefore sees probabilities after temperature; then the draw. A
    filter is a logit that tokens have to reach. Tokens of equal logits are all kept or all dropped, and the most
    probable token is kept. A greedy row takes the greatest penalised logit, the lowest id among equals. A token depends
    on its row's logits, seed and position alone.

    Args:
        logits: float32; -inf marks tokens that cannot be drawn. If a row has no other, token 0 is returned.
        inputs: as many rows as the logits.
        num_top: most probable tokens to score besides the drawn one (static; fewer if the vocabulary is smaller), for
            the rows that ask for any. None if no log-probabilities were asked for. The drawn token's own then comes
            without its rank, and costs no further pass over the logits.
    """
    assert logits.dtype == jnp.float32, logits.dtype
    own = adjusted(logits, inputs)
    is_random = inputs.temperature >= MIN_TEMPERATURE
    filters = Filters(
        top_k=jnp.where(is_random, inputs.top_k, 0),
        top_p=jnp.where(is_random, inputs.top_p, 1.0),
        min_p=jnp.where(is_random, inputs.min_p, 0.0),
        temperature=jnp.where(is_random, inputs.temperature, 1.0),
    )
    # The barriers keep XLA from tearing a pass into several, by what reads its results.
    chunks = Chunks(*lax.optimization_barrier(summarise(own, 1 / filters.temperature)))
    greatest = jnp.max(chunks.maxima, axis=1)
    drawn = _draw(own, chunks, finite_or_zero(greatest), filters, inputs)
    token_ids = jnp.where(is_random, drawn, first_of_greatest(chunks, greatest, logits.shape[1]))
    normaliser = log_normaliser(chunks.maxima, chunks.masses) if own is logits else own_log_normaliser(logits)
    num_wanted = jnp.asarray(inputs.num_logprobs)
    return SampledTokens(token_ids, score_with(logits, normaliser, token_ids, num_top, num_wanted))


def _draw(
    logits: Float[Array, "rows vocab"],
    chunks: Chunks,
    greatest: Float[Array, "rows"],
    filters: Filters,
    inputs: SampleInputs,
) -> Int[Array, "rows"]:
    """Draw a token of each row."""
    coldness = 1 / filters.temperature
    unfiltered = jnp.full_like(greatest, -jnp.inf), log_masses(chunks, greatest, coldness)

    def filtered(rows: Int[Array, " few"]) -> tuple[Array, Array]:
        own_logits, own_chunks, own_filters = jax.tree.map(lambda each: each[rows], (logits, chunks, filters))
        threshold = find_threshold(own_logits, own_chunks, own_filters)
        left = summarise(jnp.where(own_logits >= threshold[:, None], own_logits, -jnp.inf), coldness[rows])
        return threshold, log_masses(left, greatest[rows], coldness[rows])

    # Rows without filters keep their own: the same sums, compiled differently, may be rounded differently.
    is_any = filters.is_any
    threshold, masses = lax.cond(
        jnp.any(is_any), lambda: of_some_rows(is_any, filtered, unfiltered), lambda: unfiltered
    )
    return draw(logits, threshold, masses, coldness, jnp.asarray(inputs.seeds), jnp.asarray(inputs.positions))
