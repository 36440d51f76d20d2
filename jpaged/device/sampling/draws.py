"""Seeded draws from rows of logits: one pass over the vocabulary, and noise for a few thousandths of it.

A row is cut into chunks. A draw takes a chunk by the chunks' masses, then a token of that chunk by the tokens' own,
both times by the Gumbel-max trick: the product of the two probabilities is the token's, exactly. Only the chunks'
summaries and one chunk a row ever meet noise.
"""

from functools import reduce
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, UInt32

CHUNK_LEN = 32

_ROTATIONS = (13, 15, 26, 6), (17, 29, 16, 24)
_PARITY = 0x1BD11BDA
_CHUNK_LEVEL, _TOKEN_LEVEL = 0, 1


class Chunks(NamedTuple):
    """Summaries of a row's chunks: token ``member * num_chunks + chunk`` belongs to ``chunk``.

    Neighbouring tokens are in neighbouring chunks, so that the summaries are elementwise functions of ``CHUNK_LEN``
    slices of the row: XLA makes one pass of all of them, and no batch changes the order of their sums.

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


def draw(
    logits: Float[Array, "rows vocab"],
    threshold: Float[Array, "rows"],
    chunk_log_masses: Float[Array, "rows chunks"],
    coldness: Float[Array, "rows"],
    seeds: UInt32[Array, "rows"],
    positions: Int[Array, "rows"],
) -> Int[Array, "rows"]:
    """Draws a token of each row with probability proportional to exp(logit / temperature).

    Args:
        logits: a row without a finite one gets token 0.
        threshold: tokens with a lower logit cannot be drawn.
        chunk_log_masses: of the tokens that can be drawn.
        coldness: 1 / temperature.
        seeds: with ``positions``, all that a row's noise depends on.
        positions: any.
    """
    vocab_size = logits.shape[1]
    chunk_ids = jnp.arange(chunk_log_masses.shape[1], dtype=jnp.uint32)[None, :]
    noisy = chunk_log_masses + gumbel(seeds, positions, _CHUNK_LEVEL, chunk_ids)
    chunk = _first_argmax(noisy)
    found, token_ids = members_of(logits, chunk[:, None])
    anchor = finite_or_zero(jnp.max(found, axis=1))[:, None]
    noise = gumbel(seeds, positions, _TOKEN_LEVEL, token_ids.astype(jnp.uint32))
    noisy = jnp.where(found >= threshold[:, None], (found - anchor) * coldness[:, None] + noise, -jnp.inf)
    member = _first_argmax(noisy)
    return jnp.minimum(member * num_chunks_of(vocab_size) + chunk, vocab_size - 1)


def _first_argmax(x: Float[Array, "rows columns"]) -> Int[Array, "rows"]:
    """Two plain reductions are several times faster in XLA than one over pairs."""
    ids = lax.broadcasted_iota(jnp.int32, x.shape, 1)
    is_greatest = x == jnp.max(x, axis=1, keepdims=True)
    return jnp.min(jnp.where(is_greatest, ids, x.shape[1] - 1), axis=1)  # a row of NaN: a column all the same


def gumbel(
    seeds: UInt32[Array, "rows"], positions: Int[Array, "rows"], level: int, ids: UInt32[Array, "..."]
) -> Float[Array, "rows columns"]:
    """Standard Gumbel noise of (seed, position, level, id), up to 22.9: 32 bits go into the tail that decides draws.

    Args:
        seeds: one word of the key.
        positions: the other.
        level: one word of the counter: a stream of its own for every use within a draw.
        ids: the other; a row for all rows, or one for each.
    """
    key = seeds[:, None], positions.astype(jnp.uint32)[:, None]
    bits, _ = threefry_2x32(key, (jnp.full_like(ids, level), ids))
    uniform = jnp.minimum((bits.astype(jnp.float32) + 0.5) * 2.0**-32, 1 - 2.0**-24)  # in (0, 1)
    return -jnp.log(-jnp.log1p(-uniform))


def threefry_2x32(key: tuple[Array, Array], counter: tuple[Array, Array]) -> tuple[Array, Array]:
    """Threefry-2x32 with 20 rounds (Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, SC 2011).

    As arithmetic, so that XLA fuses it into what reads the noise: JAX's own is a kernel apart on a GPU. Key and counter
    are words of uint32 that broadcast.
    """
    schedule = *key, key[0] ^ key[1] ^ jnp.uint32(_PARITY)
    x, y = counter[0] + schedule[0], counter[1] + schedule[1]
    for i in range(5):
        for distance in _ROTATIONS[i % 2]:
            x = x + y
            y = ((y << distance) | (y >> (32 - distance))) ^ x
        x = x + schedule[(i + 1) % 3]
        y = y + schedule[(i + 2) % 3] + jnp.uint32(i + 1)
    return x, y
