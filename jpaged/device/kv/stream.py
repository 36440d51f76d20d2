"""The stream: copies blocks on the host, one layer at a time, into a window of the pool while layers before run.

The window is the first blocks of the pool. A cell of the window holds K and V of one block in one layer, as a block of
a pool of one layer does. So attention reads the window and the pool by one block table, in one call.

Cells of even layers and of odd layers lie apart: while one layer attends, the cells of the next are filled (KVPR, arXiv
2411.17089, overlaps copies and compute in the same way).
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.buffer_callback import buffer_callback
from jaxtyping import Array, Int, Int32

from jpaged.device.kv.copy_engine import Copier, Strided
from jpaged.device.kv.host_memory import Source
from jpaged.device.kv.pinned import pointer_of
from jpaged.device.kv.pool import KVCache

NUM_BUFFERS = 2
"""Parts of the window: one is filled while another is read."""

Token = Int[Array, " 1"]
"""The result of a callback, by which another one comes later."""

WINDOW_START = 1
"""The first block of the window: block 0 is padding."""


@dataclass(frozen=True)
class Window:
    """Blocks ``WINDOW_START`` and following of a pool, as cells of one layer of a block.

    The cells of a program are, in this order: blocks computed from activations, two for each page; pages, in two
    parts; streamed blocks, in two parts. A page that is streamed takes as many cells as its two blocks would.

    Args:
        num_blocks: blocks of the window; 0 is no window.
        num_layers: layers of the pool.
        num_pages: most pages of activations that a program streams.
    """

    num_blocks: int
    num_layers: int
    num_pages: int = 0

    @property
    def num_cells(self) -> int:
        """Most blocks that one program streams, besides those of the pages."""
        return self.num_blocks * self.num_layers // NUM_BUFFERS - 2 * self.num_pages

    @property
    def first_computed(self) -> int:
        """The first cell of blocks that are computed from activations, as a block of the view with one layer."""
        return WINDOW_START * self.num_layers

    def first_page(self, layer: int) -> int:
        """The first cell of the pages of a layer."""
        return self.first_computed + 2 * self.num_pages + layer % NUM_BUFFERS * self.num_pages

    def first_cell(self, layer: int) -> int:
        """The first cell of the streamed blocks of a layer."""
        return self.first_computed + 4 * self.num_pages + layer % NUM_BUFFERS * self.num_cells

    def table(
        self,
        layer: int,
        block_tables: Int[Array, "rows max_blocks"],
        starts: Int[Array, " rows"],
        page_starts: Int[Array, " rows"] | None = None,
    ) -> Int[Array, "rows max_blocks"]:
        """Block tables of the view with one layer: blocks on the host by their cells, others by their place.

        Args:
            layer: the layer.
            block_tables: ``host_cell`` and ``activation_cell`` for blocks on the host, blocks of the pool elsewhere.
            starts: as in ``Streamed``, by row.
            page_starts: as in ``ActivationPages``, by row; None if there are none.
        """
        code = -1 - block_tables
        places = self.first_cell(layer) + starts[:, None] + code // 2
        if page_starts is not None:
            computed = self.first_computed + 2 * page_starts[:, None] + code // 2
            places = jnp.where(code % 2 == 1, computed, places)
        return jnp.where(block_tables < 0, places, block_tables * self.num_layers + layer)

    def slots(self, layer: int, slots: Int[Array, " tokens"], block_size: int) -> Int[Array, " tokens"]:
        """Slots of the view with one layer. Padding stays in block 0, of any layer."""
        blocks, offsets = slots // block_size, slots % block_size
        return (blocks * self.num_layers + layer) * block_size + offsets


class _Load(NamedTuple):
    """The blocks and the pages of one program: runs of slots, each by its first slot and its number of slots."""

    source: Source
    blocks: tuple[tuple[int, int], ...]
    pages: tuple[tuple[int, int], ...]


class HostStream:
    """Streams blocks into the window, for the programs that are traced with it.

    A program calls ``start`` and ``wait`` for each layer, and finds the blocks that ``load`` named last before it was
    enqueued. Programs are enqueued in the order of these calls.

    Args:
        window: the cells of a program without pages.
        layer_bytes: bytes of a cell.
        copier: copies.
    """

    def __init__(self, window: Window, layer_bytes: int, copier: Copier) -> None:
        self.window = window
        self._layer_bytes = layer_bytes
        self._copier = copier
        self._loaded: deque[_Load] = deque()
        self._running: _Load | None = None
        self._pool_address = 0

    def load(self, source: Source, blocks: Int32[np.ndarray, " streamed"], pages: Int32[np.ndarray, " pages"]) -> None:
        """Name the blocks and the pages of the program that is enqueued next, by their slots."""
        assert len(blocks) + 2 * len(pages) <= self.window.num_cells
        runs = [tuple(_runs(slots, source.slots_per_piece)) for slots in (blocks, pages)]
        self._loaded.append(_Load(source, *runs))

    def forget(self) -> None:
        """Drop what was named for programs that did not run."""
        self._loaded.clear()

    # Inside a program ---------------------------------------------------------------------------------------------
    #
    # XLA does not know that the cells change: for XLA, these callbacks only read the pool. So whatever reads or writes
    # the pool after a callback takes the callback's result, and a callback takes the result of every earlier reader.

    def start(self, cache: KVCache, window: Window, layer: int, *after: Array) -> Token:
        """Start to fill the cells of a layer. The first layer comes first.

        Args:
            cache: the cache.
            window: the cells of the program.
            layer: the layer.
            after: the result of the start before, and an array that depends on every earlier reader of the cells.

        Returns:
            A result for ``wait``.
        """

        def run(context: Any, out: Any, pool: Any, *_: Any) -> None:
            del out
            if layer == 0:
                self._running, self._pool_address = self._loaded.popleft(), pointer_of(pool)
            self._require_in_place(pool)
            self._copier.start(_stream_of(context), layer % NUM_BUFFERS, list(self._copies(window, layer)))

        return buffer_callback(run, jax.ShapeDtypeStruct((1,), jnp.int32))(cache.pool, *after)

    def wait[T](self, cache: KVCache, layer: int, arrays: T, *after: Array) -> T:
        """Wait until the cells of a layer are filled.

        Args:
            cache: the cache.
            layer: the layer.
            arrays: arrays that every later reader and writer of the pool takes, and returned for them.
            after: results that come first.
        """
        leaves, tree = jax.tree.flatten(arrays)

        def run(context: Any, out: Any, pool: Any, *_: Any) -> None:
            del out
            self._require_in_place(pool)
            self._copier.wait(_stream_of(context), layer % NUM_BUFFERS)

        shapes = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]
        aliases = {1 + i: i for i in range(len(leaves))}
        waited = buffer_callback(run, shapes, input_output_aliases=aliases)(cache.pool, *leaves, *after)
        return jax.tree.unflatten(tree, waited)

    def _require_in_place(self, pool: Any) -> None:
        """Raise RuntimeError if the program moved the pool: the cells would be elsewhere."""
        if pointer_of(pool) != self._pool_address:
            raise RuntimeError(
                "this version of JAX does not write to a donated pool in place: use kv_placement='device'"
            )

    def _copies(self, window: Window, layer: int) -> Iterator[Strided]:
        assert self._running is not None
        (source, blocks, pages), width = self._running, self._layer_bytes
        src = source.address + layer * width
        for runs, first_cell in ((pages, window.first_page(layer)), (blocks, window.first_cell(layer))):
            dst = self._pool_address + first_cell * width
            for first, num_slots in runs:
                yield Strided(src + first * source.slot_bytes, source.slot_bytes, dst, width, width, num_slots)
                dst += num_slots * width


def num_window_blocks_for(num_host_blocks: int, num_blocks: int, num_layers: int) -> int:
    """Size a window: it streams all blocks of the host pool at once, unless that takes half of the device's pool."""
    return min(-(-NUM_BUFFERS * num_host_blocks // num_layers), (num_blocks - 1) // 2)


def _stream_of(context: Any) -> int | None:
    """The handle of a program's stream; None on a CPU, whose programs have none."""
    try:
        return context.stream
    except jax.errors.JaxRuntimeError:
        return None


def _runs(slots: Int32[np.ndarray, " streamed"], slots_per_piece: int) -> Iterator[tuple[int, int]]:
    """Divide slots into runs of neighbours in one piece: the first slot of each, and its slots."""
    if len(slots) == 0:
        return
    is_first = (np.diff(slots) != 1) | (slots[1:] % slots_per_piece == 0)
    for start, stop in pairwise([0, *(np.flatnonzero(is_first) + 1).tolist(), len(slots)]):
        yield int(slots[start]), stop - start
