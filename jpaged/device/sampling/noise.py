"""Seeded draws from rows of logits: noise for a few thousandths of the vocabulary.

A row is cut into chunks. A draw takes a chunk by the chunks' masses, then a token of that chunk by the tokens' own
masses. Both use the Gumbel-max trick. The product of the two probabilities is exactly the token's. Only the chunks'
summaries and one chunk a row ever meet noise.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, UInt32

from jpaged.device.sampling.chunks import finite_or_zero, members_of, num_chunks_of

_ROTATIONS = (13, 15, 26, 6), (17, 29, 16, 24)
_PARITY = 0x1BD11BDA
_CHUNK_LEVEL, _TOKEN_LEVEL = 0, 1


def draw(
    logits: Float[Array, "rows vocab"],
    threshold: Float[Array, "rows"],
    chunk_log_masses: Float[Array, "rows chunks"],
    coldness: Float[Array, "rows"],
    seeds: UInt32[Array, "rows"],
    positions: Int[Array, "rows"],
) -> Int[Array, "rows"]:
    """Draw a token of each row with probability proportional to exp(logit / temperature).

    Args:
        logits: a row without a finite one gets token 0.
        threshold: tokens with a lower logit cannot be drawn.
        chunk_log_masses: log of the mass of each chunk's tokens that can be drawn.
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
