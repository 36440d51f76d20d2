"""Attention over blocks on the host that arrive narrow: each layer widens them into cells before it attends."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from jpaged.device.kv.narrow import narrow_in, widen
from jpaged.device.kv.pool import KVCache
from jpaged.device.kv.streaming import StreamingAttend, most_streamed_blocks


class WideningAttend(StreamingAttend):
    """Widens the blocks of a layer that have arrived into the first cells of the window, which attention reads.

    The next layer's blocks arrive meanwhile, in cells of their own. Arguments are those of ``StreamingAttend``.
    """

    def _arriving_cells(self, layer: int) -> range:
        batches = self._window.batches
        first = self._window.first + most_streamed_blocks(self._window)
        return self._part(layer, first, batches.number * batches.num_cells)

    def _cells_of(self, layer: int, ranks: Int[Array, "*shape"]) -> Int[Array, "*shape"]:
        del layer
        return self._window.first + ranks

    def _take_in(self, layer: int) -> None:
        first, arrived, batches = self._window.first, self._arriving_cells(layer).start, self._window.batches
        num_layers = self._window.layers_at_once

        def take_in(batch: Int[Array, ""], cache: KVCache) -> KVCache:
            cells = lax.dynamic_slice_in_dim(cache.pool, arrived + batch * batches.num_cells, batches.num_cells)
            # Otherwise XLA may read and write the pool in one operation, for which it copies the pool.
            narrow = narrow_in(lax.optimization_barrier(cells), batches.size, num_layers)
            values = widen(narrow[:, layer % num_layers, None], cache.pool)
            return KVCache(lax.dynamic_update_slice_in_dim(cache.pool, values, first + batch * batches.size, 0))

        tables, starts = self._rows.block_tables, self._starts
        num_on_host = jnp.sum(tables < 0, axis=1, dtype=jnp.int32)
        # Rows without blocks on the host have any start.
        num_streamed = jnp.max(jnp.where(num_on_host > 0, starts + num_on_host, 0))
        self._cache = jax.lax.fori_loop(0, -(-num_streamed // batches.size), take_in, self._cache)
