"""Attention over blocks on the host, which a step streams: those of the next layer arrive while this layer runs."""

from dataclasses import replace
from fractions import Fraction
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from jpaged.device.backends import Backend, HeadArrays, Rows
from jpaged.device.kv.attend import PagedAttend
from jpaged.device.kv.pages import PAGES_AT_ONCE, PageCapacity, locate_pages, read_inputs, write_computed, write_inputs
from jpaged.device.kv.pool import KVCache
from jpaged.device.kv.stream import NUM_BUFFERS, Stream, Window, num_cells_for
from jpaged.models.spec import LayerSpec, Source


class StreamingAttend(PagedAttend):
    """Attends over blocks of K and V on the host too. Works on the cache as one layer.

    Args:
        cache, rows, backend: as for ``PagedAttend``; ``rows.block_tables`` has ``host_cell`` for streamed blocks.
        stream: streams the blocks.
        starts: first streamed block of each row, as in ``Streamed``.
    """

    def __init__(
        self, cache: KVCache, rows: Rows, backend: Backend, stream: Stream, starts: Int[Array, " rows"]
    ) -> None:
        super().__init__(cache.as_layers(), rows, backend)
        self._stream = stream
        self._window = stream.window
        self._starts = starts
        self._cache, self._arriving = stream.start(self._cache, 0, self._arriving_cells(0), starts)

    @property
    def cache(self) -> KVCache:
        return self._cache.as_blocks(self._window.num_layers)

    def _arriving_cells(self, layer: int) -> range:
        """The cells that the streamed blocks of a layer, and of those that arrive with it, fill as they arrive."""
        return self._part(layer, self._window.first, self._window.batches.num_cells)

    def _part(self, layer: int, first: int, num_cells: int) -> range:
        """The cells of a layer's part, for parts of so many cells that lie side by side from the first on."""
        start = first + self._window.buffer_of(layer) * num_cells
        return range(start, start + num_cells)

    def _cells_of(self, layer: int, ranks: Int[Array, "*shape"]) -> Int[Array, "*shape"]:
        """The cells of a layer of streamed blocks, as attention reads them, by the ranks of the blocks."""
        num_layers = self._window.layers_at_once
        return self._arriving_cells(layer).start + ranks * num_layers + layer % num_layers

    def _attend(self, spec: LayerSpec, q: Array, k: Array, v: Array, head_arrays: HeadArrays) -> Array:
        layer, window = spec.layer, self._window
        assert self._rows.slots is not None
        self._starts, slots = self._receive(layer, q, (self._starts, self._rows.slots))
        self._rows = self._rows._replace(slots=slots)
        tables = self._rows.block_tables
        self._take_in(layer)
        cells = self._cells_of(layer, self._starts[:, None] - 1 - tables)
        rows = self._rows._replace(
            block_tables=jnp.where(tables < 0, cells, window.places(layer, tables)),
            slots=window.slots(layer, slots, self._cache.block_size),
        )
        return self._attend_in_view(spec, q, k, v, rows, head_arrays)

    def _take_in(self, layer: int) -> None:
        """Make cells hold the blocks of a layer that have arrived, as attention reads them."""

    def _receive[T](self, layer: int, q: Array, arrays: T) -> T:
        """Let the next layers' blocks come, and wait for this layer's, unless they came with the layer before.

        Args:
            layer: the layer.
            q: depends on all that read the pool before.
            arrays: arrays that every later reader and writer of the pool takes, and returned for them.
        """
        together, after = self._window.arriving_with(layer), [self._arriving, q]
        if layer > together.start:
            return lax.optimization_barrier((arrays, q))[0]
        if (next_layer := together.stop) < self._window.num_layers:
            # The layers before have read the same cells.
            self._cache, self._arriving = self._stream.start(
                self._cache, next_layer, self._arriving_cells(next_layer), *after
            )
            after.append(self._arriving)
        self._cache, arrays = self._stream.wait(self._cache, layer, arrays, *after)
        return arrays

    def _attend_in_view(
        self, spec: LayerSpec, q: Array, k: Array, v: Array, rows: Rows, head_arrays: HeadArrays
    ) -> Array:
        single = replace(spec, layer=0)
        out, self._cache = self._backend.attend(self._cache, single, q, k, v, rows, head_arrays, self._out)
        return out


class RecomputingAttend(StreamingAttend):
    """Computes K and V of the whole context from the inputs of the layer, which pages keep.

    K and V of all pages fill cells of the window, are attended to, and are then forgotten.

    Args:
        cache, rows, backend, stream, starts: as for ``StreamingAttend``, with pages in place of blocks.
    """

    def __init__(
        self, cache: KVCache, rows: Rows, backend: Backend, stream: Stream, starts: Int[Array, " rows"]
    ) -> None:
        self._most = most_pages(stream.window, len(cache.pool))
        super().__init__(cache, rows, backend, stream, starts)
        places = self._window.num_blocks, self._window.first
        self._pages = locate_pages(self._most, rows, starts, 2 * cache.block_size, *places)

    def _arriving_cells(self, layer: int) -> range:
        num_cells = self._most.num_streamed * self._window.layers_at_once
        return self._part(layer, self._window.first + self._most.num_computed, num_cells)

    def _attend(self, spec: LayerSpec, q: Array, k: Array, v: Array, head_arrays: HeadArrays) -> Array:
        layer, window = spec.layer, self._window
        assert self._rows.slots is not None
        source = self._require_source(layer)
        slots, self._pages = self._receive(layer, q, (self._rows.slots, self._pages))
        self._rows = self._rows._replace(slots=slots)
        page_slots = window.slots(layer, slots, 2 * self._cache.block_size)
        self._cache = write_inputs(self._cache, page_slots, source.inputs)
        self._compute(layer, source)
        # K and V of the step's own tokens are among those computed.
        rows = self._rows._replace(block_tables=self._pages.tables, slots=None)
        return self._attend_in_view(spec, q, k, v, rows, head_arrays)

    def _require_source(self, layer: int) -> Source:
        source = self._taken_source()
        if source is None:
            raise ValueError(
                f"layer {layer} does not show the source of its K and V, which model_config.shows_sources promises: "
                "call jpaged.models.spec.attend_from in every layer, or use offload_cache='kv'"
            )
        return source

    def _compute(self, layer: int, source: Source) -> None:
        """Fill the computed cells with K and V of the inputs of all pages, as many at a time as ``PAGES_AT_ONCE``."""
        block_size, (pages, *details, num_pages, _) = self._cache.block_size, self._pages
        pages = jnp.where(pages < 0, self._cells_of(layer, -1 - pages), self._window.places(layer, pages))
        offsets = jnp.arange(2 * block_size, dtype=jnp.int32)

        def compute(first: Int[Array, ""], size: int, number: Int[Array, ""], cache: KVCache) -> KVCache:
            first = jnp.minimum(first + number * size, len(pages) - size)  # the last ones may be computed twice
            own_pages, positions, num_tokens = (
                jax.lax.dynamic_slice(array, (first,), (size,)) for array in (pages, *details)
            )
            inputs = read_inputs(cache, own_pages, source.inputs.dtype)
            k, v = source.project(inputs, (positions[:, None] + offsets[None, :]).reshape(-1))
            first_block = self._window.first + 2 * first
            if cache.kv_scales is not None:
                return write_computed(cache, first_block, k, v, num_tokens)
            slots = first_block * block_size + jnp.arange(len(inputs), dtype=jnp.int32)
            return self._backend.write(cache, 0, k, v, slots)

        sizes = [size for size in PAGES_AT_ONCE if size < len(pages)] or [len(pages)]
        first = jnp.zeros((), jnp.int32)
        for size in sizes:
            num_left = num_pages - first
            num_products = -(-num_left // size) if size == sizes[-1] else num_left // size
            self._cache = jax.lax.fori_loop(0, num_products, partial(compute, first, size), self._cache)
            first += num_products * size


# Windows ----------------------------------------------------------------------------------------------------------


def window_for(
    num_host_blocks: int,
    num_blocks: int,
    num_layers: int,
    *,
    with_pages: bool,
    share: Fraction = Fraction(1),
    layers_at_once: int = 1,
) -> Window:
    """Size a window so that one step streams all blocks of the host pool, unless that takes too much of the pool.

    Args:
        num_host_blocks: blocks of the host pool.
        num_blocks: blocks of the device's pool, of which a window takes half at most, and three quarters for pages.
        num_layers: layers of a block.
        with_pages: whether blocks hold activations.
        share: part of a cell that a layer of a block takes as it arrives.
        layers_at_once: layers that arrive together, or fewer if the window would take more than half of its most: a
            faster link is no reason to hold fewer tokens.
    """
    most = 3 * (num_blocks - 1) // 4 if with_pages else (num_blocks - 1) // 2
    num_cells = NUM_BUFFERS * layers_at_once * num_host_blocks
    if with_pages:  # K and V of a page take two cells
        num_cells += 2 * (num_host_blocks + num_blocks)
    if share < 1:  # narrow blocks are widened into cells of their own
        num_cells = num_cells_for(num_host_blocks, share * layers_at_once)
    wanted = -(-num_cells // num_layers)
    if wanted > most // 2 and layers_at_once > 1:
        sizes, fewer = (num_host_blocks, num_blocks, num_layers), layers_at_once - 1
        return window_for(*sizes, with_pages=with_pages, share=share, layers_at_once=fewer)
    return Window(min(wanted, most), num_layers, share, layers_at_once)


def most_streamed_blocks(window: Window) -> int:
    """Most blocks of K and V on the host that one step streams."""
    return window.batches.number * window.batches.size


def most_blocks_on_host(window: Window, num_host_blocks: int, num_blocks: int, *, with_pages: bool) -> int:
    """Most blocks on the host that a context has. Arguments as for ``window_for``."""
    pages = most_pages(window, num_blocks)
    return min(num_host_blocks, pages.num_streamed if with_pages else most_streamed_blocks(window))


def most_pages(window: Window, num_blocks: int) -> PageCapacity:
    """Most pages of one step: in all blocks of the pool beside the window, and as many on the host as it then holds.

    K and V of a page take two cells. A page on the host takes a cell of each part besides, for each layer that arrives
    together.
    """
    num_resident = num_blocks - window.num_blocks
    cells_each = 2 + NUM_BUFFERS * window.layers_at_once
    return PageCapacity(max((window.num_cells - 2 * num_resident) // cells_each, 0), num_resident)
