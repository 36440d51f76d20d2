"""Attention over blocks on the host that arrive narrow: each layer widens them into cells before it attends."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from jpaged.device.kv.narrow import narrow_in, widen
from jpaged.device.kv.pool import KVCache
from jpaged.device.kv.stream import NUM_BUFFERS
from jpaged.device.kv.streaming import StreamingAttend, most_streamed_blocks


class WideningAttend(StreamingAttend):
    """Widens the blocks of a layer that have arrived into the first cells of the window, which attention reads.

    The next layer's blocks arrive meanwhile, in cells of their own. Arguments are those of ``StreamingAttend``.
    """

    def _first_cell(self, layer: int) -> int:
        batches = self._window.batches
        first = self._window.first + most_streamed_blocks(self._window)
        return first + layer % NUM_BUFFERS * batches.number * batches.num_cells

    def _take_in(self, layer: int) -> int:
        first, arrived, batches = self._window.first, self._first_cell(layer), self._window.batches

        def take_in(batch: Int[Array, ""], cache: KVCache) -> KVCache:
            cells = lax.dynamic_slice_in_dim(cache.pool, arrived + batch * batches.num_cells, batches.num_cells)
            # Otherwise XLA may read and write the pool in one operation, for which it copies the pool.
            narrow = narrow_in(lax.optimization_barrier(cells), batches.size)
            values = widen(narrow, cache.pool)
            return KVCache(lax.dynamic_update_slice_in_dim(cache.pool, values, first + batch * batches.size, 0))

        tables, starts = self._rows.block_tables, self._starts
        num_on_host = jnp.sum(tables < 0, axis=1, dtype=jnp.int32)
        # Rows without blocks on the host have any start.
        num_streamed = jnp.max(jnp.where(num_on_host > 0, starts + num_on_host, 0))
        self._cache = jax.lax.fori_loop(0, -(-num_streamed // batches.size), take_in, self._cache)
        return first
