"""The engine's ``attend``: the door between a model and the block pool."""

from dataclasses import replace
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jpaged.device.backends import Backend, HeadArrays, Rows
from jpaged.device.kv.activations import read_inputs, write_inputs
from jpaged.device.kv.pool import KVCache
from jpaged.device.kv.stream import HostStream
from jpaged.models.spec import LayerSpec, Source, check_head_arrays


class PagedAttend:
    """Stores a layer's K and V, then attends over all of each sequence's context.

    Lives during one trace, and alone replaces the cache.

    Args:
        cache: the block pool before this step.
        rows: where the step's tokens lie in the pool.
        backend: writes and attends.
    """

    def __init__(self, cache: KVCache, rows: Rows, backend: Backend):
        self._cache = cache
        self._rows = rows
        self._backend = backend
        self._out: Array | None = None  # output of the layer before, which its output projection has read

    @property
    def cache(self) -> KVCache:
        """The newest value of the cache."""
        return self._cache

    def __call__(
        self,
        spec: LayerSpec,
        q: Float[Array, "tokens num_heads head_dim"],
        k: Float[Array, "tokens num_kv_heads head_dim"],
        v: Float[Array, "tokens num_kv_heads head_dim"],
        *,
        sinks: Float[Array, " num_heads"] | None = None,
        alibi_slopes: Float[Array, " num_heads"] | None = None,
    ) -> Float[Array, "tokens num_heads head_dim"]:
        check_head_arrays(spec, sinks, alibi_slopes)
        self._out = self._attend(spec, q, k, v, HeadArrays(sinks, alibi_slopes))
        return self._out

    def _attend(self, spec: LayerSpec, q: Array, k: Array, v: Array, head_arrays: HeadArrays) -> Array:
        out, self._cache = self._backend.attend(self._cache, spec, q, k, v, self._rows, head_arrays, self._out)
        return out


class Pages(NamedTuple):
    """Activations of a step: see ``ActivationPages``.

    Args:
        positions: position of each page's first token.
        starts: first page of each row.
        slots: slot of the pages for each token of the step.
    """

    positions: Int[Array, " pages"]
    starts: Int[Array, " rows"]
    slots: Int[Array, " tokens"]


class StreamingAttend(PagedAttend):
    """Attends over blocks on the host too, which it streams: those of the next layer arrive while this layer runs.

    Args:
        cache, rows, backend: as for ``PagedAttend``; ``rows.block_tables`` has cells for blocks on the host.
        stream: streams the blocks.
        starts: first streamed block of each row, as in ``Streamed``.
        pages: activations, from which some blocks are computed; None if no row keeps any.
    """

    def __init__(
        self,
        cache: KVCache,
        rows: Rows,
        backend: Backend,
        stream: HostStream,
        starts: Int[Array, " rows"],
        pages: Pages | None = None,
    ) -> None:
        super().__init__(cache.as_layers(), rows, backend)
        self._stream = stream
        self._window = stream.window if pages is None else replace(stream.window, num_pages=len(pages.positions))
        self._starts = starts
        self._pages = pages
        self._source: Source | None = None
        self._arriving = stream.start(self._cache, self._window, 0, starts)

    @property
    def cache(self) -> KVCache:
        return self._cache.as_blocks(self._window.num_layers)

    def take_source(self, source: Source) -> None:
        """Keep the source of the next layer's K and V."""
        self._source = source

    def _attend(self, spec: LayerSpec, q: Array, k: Array, v: Array, head_arrays: HeadArrays) -> Array:
        stream, window, layer = self._stream, self._window, spec.layer
        after = [self._arriving, q]
        if layer + 1 < window.num_layers:
            # The layer before has read the same cells.
            self._arriving = stream.start(self._cache, window, layer + 1, *after)
            after.append(self._arriving)
        arrays = self._starts, self._rows.slots, self._pages
        self._starts, slots, self._pages = stream.wait(self._cache, layer, arrays, *after)
        self._rows = self._rows._replace(slots=slots)
        page_starts = None
        if self._pages is not None:
            self._compute_blocks(layer, self._pages)
            page_starts = self._pages.starts
        rows = self._rows._replace(
            block_tables=window.table(layer, self._rows.block_tables, self._starts, page_starts),
            slots=window.slots(layer, slots, self._cache.block_size),
        )
        single = replace(spec, layer=0)
        out, self._cache = self._backend.attend(self._cache, single, q, k, v, rows, head_arrays, self._out)
        return out

    def _compute_blocks(self, layer: int, pages: Pages) -> None:
        """Keep the inputs of this step's tokens, and compute K and V of those on the host."""
        window, source, num_tokens = self._window, self._source, 2 * self._cache.block_size
        assert source is not None, "the model shows the sources of its K and V"
        self._cache = write_inputs(self._cache, window.slots(layer, pages.slots, num_tokens), source.inputs)
        if window.num_pages:
            inputs = read_inputs(self._cache, window.first_page(layer), window.num_pages)
            positions = pages.positions[:, None] + jnp.arange(num_tokens, dtype=jnp.int32)[None, :]
            k, v = source.project(inputs.astype(source.inputs.dtype), positions.reshape(-1))
            slots = window.first_computed * self._cache.block_size + jnp.arange(len(k), dtype=jnp.int32)
            self._cache = self._backend.write(self._cache, 0, k, v, slots)
