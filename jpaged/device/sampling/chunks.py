"""Rows of logits cut into chunks, and the chunks' summaries, made by one pass over the vocabulary."""

from functools import reduce
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

CHUNK_LEN = 32


class Chunks(NamedTuple):
    """Summaries of a row's chunks: token ``member * num_chunks + chunk`` belongs to ``chunk``.

    Neighbouring tokens are in neighbouring chunks. The summaries are then elementwise functions of ``CHUNK_LEN`` slices
    of the row. So XLA makes one pass of all of them, and no batch changes the order of their sums.

    Args:
        maxima: the greatest logit; -inf for a chunk without a possible token.
        first_ids: the lowest token that has it.
        masses: sum of exp(logit - maximum).
        scaled_masses: sum of exp((logit - maximum) / temperature).
    """

    maxima: Float[Array, "rows chunks"]
    first_ids: Int[Array, "rows chunks"]
    masses: Float[Array, "rows chunks"]
    scaled_masses: Float[Array, "rows chunks"]


def summarise(logits: Float[Array, "rows vocab"], coldness: Float[Array, "rows"]) -> Chunks:
    """One pass over the logits; what the caller does not use is not computed.

    Args:
        logits: float32.
        coldness: 1 / temperature.
    """
    members = _members(logits)
    maxima = reduce(jnp.maximum, members)
    anchors = finite_or_zero(maxima)
    first = reduce(
        lambda first, i: jnp.where(members[i] == maxima, i, first),
        reversed(range(len(members))),
        jnp.zeros(maxima.shape, jnp.int32),
    )
    below = [member - anchors for member in members]
    return Chunks(
        maxima,
        first * maxima.shape[1] + lax.broadcasted_iota(jnp.int32, maxima.shape, 1),
        reduce(jnp.add, [jnp.exp(x) for x in below]),
        reduce(jnp.add, [jnp.exp(x * coldness[:, None]) for x in below]),
    )


def _members(logits: Float[Array, "rows vocab"]) -> list[Float[Array, "rows chunks"]]:
    """The first members of all chunks, the second, and so on; -inf where a chunk has fewer than others."""
    vocab_size = logits.shape[1]
    num_chunks = num_chunks_of(vocab_size)
    members = [logits[:, start : start + num_chunks] for start in range(0, vocab_size, num_chunks)]
    num_missing = num_chunks - members[-1].shape[1]
    members[-1] = jnp.pad(members[-1], ((0, 0), (0, num_missing)), constant_values=-jnp.inf)
    return members


def num_chunks_of(vocab_size: int) -> int:
    return -(-vocab_size // CHUNK_LEN)


def members_of(
    logits: Float[Array, "rows vocab"], chunks: Int[Array, "rows chosen"]
) -> tuple[Float[Array, "rows chosen_tokens"], Int[Array, "rows chosen_tokens"]]:
    """The logits of some chunks of each row, and their tokens; -inf where a chunk has fewer than others."""
    rows, vocab_size = logits.shape
    num_chunks = num_chunks_of(vocab_size)
    starts = jnp.arange(0, vocab_size, num_chunks, dtype=jnp.int32)
    token_ids = (starts[None, :, None] + chunks[:, None, :]).reshape(rows, starts.size * chunks.shape[1])
    found = jnp.take_along_axis(logits, token_ids, axis=1, mode="fill", fill_value=-jnp.inf)
    return found, token_ids


def finite_or_zero(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """An anchor to subtract: -inf less -inf would be NaN."""
    return jnp.where(jnp.isfinite(x), x, 0.0)


def log_normaliser(maxima: Float[Array, "rows chunks"], masses: Float[Array, "rows chunks"]) -> Float[Array, "rows"]:
    """Log of the sum of all exponentials, at temperature 1."""
    anchor = finite_or_zero(jnp.max(maxima, axis=1))
    return anchor + jnp.log(jnp.sum(masses * jnp.exp(maxima - anchor[:, None]), axis=1))


def log_masses(chunks: Chunks, anchor: Float[Array, "rows"], coldness: Float[Array, "rows"]) -> Float[Array, "rows c"]:
    """Log of each chunk's sum of exp((logit - anchor) / temperature)."""
    return (chunks.maxima - anchor[:, None]) * coldness[:, None] + jnp.log(chunks.scaled_masses)


def first_of_greatest(chunks: Chunks, greatest: Float[Array, "rows"], vocab_size: int) -> Int[Array, "rows"]:
    """The lowest token whose logit is the row's greatest."""
    is_greatest = chunks.maxima == greatest[:, None]
    return jnp.min(jnp.where(is_greatest, chunks.first_ids, vocab_size - 1), axis=1)
