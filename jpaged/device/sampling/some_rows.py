"""Work for some rows of a batch: a few at a time, so that the others cost nothing."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

_LEAST_ROWS = 8


def of_some_rows[T](is_wanted: Bool[Array, "rows"], compute: Callable[[Int[Array, " few"]], T], others: T) -> T:
    """Results of a function for the rows that want it.

    A quarter of the rows are computed at a time, always as many: a row's result depends on its own input alone.

    Args:
        is_wanted: the rows that want a result.
        compute: the function, of row numbers. Its results have a line for each.
        others: results of all rows, of which the others keep theirs.
    """
    rows = len(is_wanted)
    few = min(rows, max(-(-rows // 4), _LEAST_ROWS))
    row_ids = jnp.arange(rows, dtype=jnp.int32)
    places = jnp.cumsum(is_wanted, dtype=jnp.int32) - 1

    def step(number: Int[Array, ""], found: T) -> T:
        # Neither step updates in place: XLA would copy, and take the loop out of a GPU's graph.
        nth = number * few + jnp.arange(few, dtype=jnp.int32)
        is_nth = is_wanted[None, :] & (places[None, :] == nth[:, None])
        results = compute(jnp.sum(jnp.where(is_nth, row_ids[None, :], 0), axis=1))
        is_found = is_wanted & (places // few == number)
        lines = jnp.clip(places - number * few, 0, few - 1)

        def merged(whole: Array, part: Array) -> Array:
            return jnp.where(jnp.expand_dims(is_found, tuple(range(1, whole.ndim))), part[lines], whole)

        return jax.tree.map(merged, found, results)

    return lax.fori_loop(0, (places[-1] + few) // few, step, others)
