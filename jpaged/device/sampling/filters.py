"""Top-k, top-p and min-p as one logit a row, which a token must reach; and the greatest values of rows.

The vocabulary is never sorted. A short list of each row's greatest logits settles most thresholds; a search with a
bracket and many pivots a pass settles the others.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jpaged.device.sampling.chunks import Chunks, finite_or_zero, members_of

_MAX_LISTED = 128
_NUM_PIVOTS = 7  # about as much arithmetic as hides behind reading the logits
_LOWEST = float(jnp.finfo(jnp.float32).min)


class Filters(NamedTuple):
    """The filters of each row.

    Args:
        top_k: 0 is off.
        top_p: 1 is off.
        min_p: 0 is off.
        temperature: at least 1e-5.
    """

    top_k: Int[Array, "rows"]
    top_p: Float[Array, "rows"]
    min_p: Float[Array, "rows"]
    temperature: Float[Array, "rows"]

    @property
    def is_any(self) -> Bool[Array, "rows"]:
        return (self.top_k > 0) | (self.top_p < 1) | (self.min_p > 0)


def find_threshold(logits: Float[Array, "rows vocab"], chunks: Chunks, filters: Filters) -> Float[Array, "rows"]:
    """The lowest logit that all filters let pass: top-k, then top-p on what is left, and min-p.

    Args:
        logits: float32.
        chunks: summaries of the logits, at the filters' temperatures.
        filters: filters of each row.
    """
    greatest = finite_or_zero(jnp.max(chunks.maxima, axis=1))

    def counted_and_weighed() -> Float[Array, "rows"]:
        listed = _list_greatest(logits, chunks)
        kth = _top_k_threshold(logits, chunks, listed, filters.top_k)
        return _top_p_threshold(logits, chunks, listed, kth, greatest, filters)

    is_wanted = jnp.any((filters.top_k > 0) | (filters.top_p < 1))
    nucleus = lax.cond(is_wanted, counted_and_weighed, lambda: jnp.full_like(greatest, -jnp.inf))
    likely = greatest + filters.temperature * jnp.log(filters.min_p)  # log(0): -inf
    return jnp.maximum(nucleus, likely)


def _list_greatest(logits: Float[Array, "rows vocab"], chunks: Chunks) -> Float[Array, "rows listed"]:
    """The greatest logits in order: n of them are in the n chunks of the greatest maxima."""
    num_chunks = chunks.maxima.shape[1]
    num_listed = min(_MAX_LISTED, num_chunks)
    if num_listed == num_chunks:  # they are all tokens
        return lax.top_k(logits, num_listed)[0]
    _, best = lax.top_k(chunks.maxima, num_listed)
    found, _ = members_of(logits, best)
    return lax.top_k(found, num_listed)[0]


def _top_k_threshold(
    logits: Float[Array, "rows vocab"], chunks: Chunks, listed: Float[Array, "rows listed"], top_k: Int[Array, "rows"]
) -> Float[Array, "rows"]:
    """The ``top_k``-th greatest logit, ties counted; -inf without top-k."""
    num_listed, num_chunks = listed.shape[1], chunks.maxima.shape[1]
    at = jnp.clip(top_k - 1, 0, num_listed - 1)
    kth = jnp.take_along_axis(listed, at[:, None], axis=1)[:, 0]
    is_open = top_k > num_listed
    # Each chunk has a logit that reaches the least of their maxima.
    low = jnp.where(top_k <= num_chunks, jnp.min(chunks.maxima, axis=1), _LOWEST)
    found = _search(
        logits,
        jnp.ones_like,
        top_k.astype(jnp.float32),  # counts in float32 are exact up to 2**24
        low=jnp.where(is_open, jnp.maximum(low, _LOWEST), kth),
        top=kth,
    )
    return jnp.where(top_k > 0, found, -jnp.inf)


def _top_p_threshold(
    logits: Float[Array, "rows vocab"],
    chunks: Chunks,
    listed: Float[Array, "rows listed"],
    kth: Float[Array, "rows"],
    greatest: Float[Array, "rows"],
    filters: Filters,
) -> Float[Array, "rows"]:
    """The greatest logit such that the tokens that reach it have ``top_p`` of the mass of those that reach ``kth``.

    It is ``kth`` without top-p. Masses are relative to the most probable token's.
    """
    coldness = 1 / filters.temperature

    def weigh(x: Float[Array, "rows columns"]) -> Float[Array, "rows columns"]:
        return jnp.exp((x - greatest[:, None]) * coldness[:, None])

    is_wanted = filters.top_p < 1
    masses = jnp.cumsum(weigh(listed), axis=1)
    num_left = jnp.sum(listed >= kth[:, None], axis=1, dtype=jnp.int32)
    is_whole = num_left < listed.shape[1]  # all tokens that reach kth are listed
    everything = jnp.sum(weigh(chunks.maxima) * chunks.scaled_masses, axis=1)
    of_listed = jnp.take_along_axis(masses, jnp.maximum(num_left - 1, 0)[:, None], axis=1)[:, 0]
    is_beyond = is_wanted & (filters.top_k > 0) & ~is_whole
    left = lax.cond(
        jnp.any(is_beyond),
        lambda: jnp.where(
            is_beyond, jnp.sum(jnp.where(logits >= kth[:, None], weigh(logits), 0.0), axis=1), everything
        ),
        lambda: everything,
    )
    left = jnp.where((filters.top_k > 0) & is_whole, of_listed, left)
    target = filters.top_p * left
    is_reached = masses >= target[:, None]
    is_settled = jnp.any(is_reached, axis=1)
    at = jnp.where(is_settled, jnp.argmax(is_reached, axis=1), listed.shape[1] - 1)
    reached = jnp.take_along_axis(listed, at[:, None], axis=1)[:, 0]
    # Lighter than this, all tokens of the row together would not have half of what top-p cuts off.
    cut = 0.5 * (1 - filters.top_p) * left / logits.shape[1]
    low = greatest + filters.temperature * jnp.log(jnp.maximum(cut, jnp.finfo(jnp.float32).tiny))
    found = _search(
        logits,
        weigh,
        target,
        low=jnp.where(is_wanted & ~is_settled, jnp.maximum(jnp.maximum(low, kth), _LOWEST), reached),
        top=reached,
    )
    return jnp.where(is_wanted, found, kth)


class _Bracket(NamedTuple):
    """The threshold sought is ``low`` or a logit in (``low``, ``top``].

    Args:
        low: the tokens that reach it measure enough, or nothing is known.
        top: no logit above is a candidate.
        fail: the tokens that reach it measure too little; at least ``top``.
    """

    low: Float[Array, "rows"]
    top: Float[Array, "rows"]
    fail: Float[Array, "rows"]


def _search(
    logits: Float[Array, "rows vocab"],
    weigh: Callable[[Float[Array, "rows vocab"]], Float[Array, "rows vocab"]],
    target: Float[Array, "rows"],
    low: Float[Array, "rows"],
    top: Float[Array, "rows"],
) -> Float[Array, "rows"]:
    """The greatest logit up to ``top`` such that the tokens that reach it weigh ``target``; ``low`` if none does.

    A pass tries ``_NUM_PIVOTS`` evenly spaced thresholds, and finds which logits the bracket begins and ends with. A
    row is done when these are one; as the last pivot is ``top``, the bracket loses a logit at least in two passes. Rows
    that begin with ``low == top`` need none.
    """

    def narrow(bracket: _Bracket) -> _Bracket:
        low, top, fail = bracket
        fractions = [i / _NUM_PIVOTS for i in range(1, _NUM_PIVOTS + 1)]
        pivots = [jnp.clip(low * (1 - x) + top * x, low, top) for x in fractions]  # low + (top - low) * x overflows
        weights = weigh(logits)
        *sums, least, greatest = _reduce_together(
            [jnp.where(logits >= pivot[:, None], weights, 0.0) for pivot in pivots],
            jnp.where(logits >= low[:, None], logits, jnp.inf),
            jnp.where(logits < fail[:, None], logits, -jnp.inf),
        )
        for pivot, total in zip(pivots, sums, strict=True):
            is_reached = total >= target
            low = jnp.where(is_reached, jnp.maximum(low, pivot), low)
            fail = jnp.where(is_reached, fail, jnp.minimum(fail, pivot))
        return _Bracket(jnp.maximum(low, least), jnp.minimum(jnp.minimum(top, fail), greatest), fail)

    start = _Bracket(jnp.maximum(low, _LOWEST), jnp.maximum(top, _LOWEST), jnp.full_like(top, jnp.inf))
    return lax.while_loop(lambda bracket: jnp.any(bracket.low < bracket.top), narrow, start).low


def _reduce_together(
    to_add: list[Float[Array, "rows vocab"]],
    to_minimise: Float[Array, "rows vocab"],
    to_maximise: Float[Array, "rows v"],
) -> list[Float[Array, "rows"]]:
    """Sums, a minimum and a maximum of each row by one reduction: XLA reads its inputs' own input once.

    Of reductions side by side it fuses eight at most, and follows each of them with a kernel of its own.
    """
    num_sums = len(to_add)

    def combine(a: tuple, b: tuple) -> tuple:
        sums = [x + y for x, y in zip(a[:num_sums], b[:num_sums], strict=True)]
        return *sums, jnp.minimum(a[-2], b[-2]), jnp.maximum(a[-1], b[-1])

    zero, infinity = jnp.float32(0), jnp.float32(jnp.inf)
    return list(
        lax.reduce((*to_add, to_minimise, to_maximise), (*[zero] * num_sums, infinity, -infinity), combine, (1,))
    )


def top_k(values: Float[Array, "rows vocab"], k: int) -> tuple[Float[Array, "rows k"], Int[Array, "rows k"]]:
    """The ``k`` greatest values of each row and where they are, the lower index first among equals.

    ``lax.top_k`` sorts whole rows on an accelerator. Here the row is cut into chunks, and only the ``k`` chunks of the
    greatest maxima are searched. A value of any other chunk is preceded by one from each of these.

    Args:
        values: the rows; a row with NaN returns some of its values.
        k: at most the vocabulary (static).
    """
    rows, size = values.shape
    values = jnp.where(values == 0, 0.0, values)  # lax.top_k orders 0.0 before -0.0, a maximum does not
    # Two sorts, of size / chunk maxima and of k * chunk values: shortest when they are equally long.
    chunk = 1 << round(math.log2(size / max(k, 1)) / 2)
    if k == 0 or chunk == 1:
        return lax.top_k(values, k)
    num_chunks = -(-size // chunk)
    chunks = jnp.pad(values, ((0, 0), (0, num_chunks * chunk - size)), constant_values=-jnp.inf)
    chunks = chunks.reshape(rows, num_chunks, chunk)
    _, best = lax.top_k(jnp.max(chunks, axis=-1), k)
    best = jnp.sort(best, axis=-1)  # in the order of the row, so that ties still go to the lower index
    searched = jnp.take_along_axis(chunks, best[:, :, None], axis=1).reshape(rows, k * chunk)
    top, at = lax.top_k(searched, k)
    indices = jnp.take_along_axis(best, at // chunk, axis=-1) * chunk + at % chunk
    return top, jnp.minimum(indices, size - 1)  # padding, in a row of NaN
