"""The stream: copies blocks on the host, one layer at a time, into a window of the pool while layers before run.

The window is the first blocks of the pool. A cell of the window holds K and V of one block in one layer, as a block of
a pool of one layer does. So attention reads the window and the pool by one block table, in one call.

Cells of even layers and of odd layers lie apart: while one layer attends, the cells of the next are filled (KVPR, arXiv
2411.17089, overlaps copies and compute in the same way). Where a layer of a block is small, the same holds for
neighbouring layers, which arrive together.

Scales of a quantised pool are small, so that one copy brings them for all layers.
"""

import math
from bisect import bisect_right
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.buffer_callback import buffer_callback
from jaxtyping import Array, Float32, Int, Int32, Int64

from jpaged.device.kv.copy_engine import Copier, Copies, runs_of, stream_of, strided
from jpaged.device.kv.host_memory import Source
from jpaged.device.kv.pinned import pointer_of
from jpaged.device.kv.pool import KVCache

NUM_BUFFERS = 2
"""Parts of the window: one is filled while another is read."""

WINDOW_START = 1
"""The first block of the window: block 0 is padding."""

WIDENED_AT_ONCE = 256
"""Cells of narrow blocks that are widened at once: their temporaries are small, and a GPU is busy."""


class Batches(NamedTuple):
    """The blocks that a layer streams at most, in batches that arrive in whole cells.

    Args:
        number: batches.
        size: blocks of a batch, side by side.
        num_cells: cells that a batch fills as it arrives.
    """

    number: int
    size: int
    num_cells: int


@dataclass(frozen=True)
class Window:
    """Blocks ``WINDOW_START`` and following of a pool, as cells of one layer of a block.

    A cell is a block of the pool's view with one layer (``KVCache.as_layers``).

    Narrow blocks (``kv/narrow.py``) arrive in less than a cell each. They are then widened, into the first cells.

    Args:
        num_blocks: blocks of the window.
        num_layers: layers of the pool.
        share: part of a cell that a layer of a block takes as it arrives.
        layers_at_once: neighbouring layers that arrive together, in neighbouring cells for each block.
    """

    num_blocks: int
    num_layers: int
    share: Fraction = Fraction(1)
    layers_at_once: int = 1

    @property
    def num_cells(self) -> int:
        """Cells of the window."""
        return self.num_blocks * self.num_layers

    @property
    def is_narrow(self) -> bool:
        """Whether blocks arrive narrow."""
        return self.share < 1

    @property
    def batches(self) -> Batches:
        """The most blocks that a layer streams."""
        if not self.is_narrow:
            size = self.num_cells // (NUM_BUFFERS * self.layers_at_once)
            return Batches(1, size, size * self.layers_at_once)
        wanted = max(int(self.num_cells / (1 + NUM_BUFFERS * self._arriving_share)) // WIDENED_AT_ONCE, 1)
        found = [self._in_batches(number) for number in (max(wanted - 1, 1), wanted)]
        return max(found, key=lambda batches: batches.number * batches.size)

    def _in_batches(self, number: int) -> Batches:
        """The largest of so many batches, with a cell for each block beside those in which it arrives."""
        most, share = self.num_cells // number, self._arriving_share
        sizes = range(1, most + 1)
        size = bisect_right(sizes, most, key=lambda size: size + NUM_BUFFERS * math.ceil(size * share))
        return Batches(number, size, math.ceil(size * share))

    @property
    def _arriving_share(self) -> Fraction:
        """The cells that a block takes as it arrives."""
        return self.share * self.layers_at_once

    @property
    def first(self) -> int:
        """The first cell."""
        return WINDOW_START * self.num_layers

    def arriving_with(self, layer: int) -> range:
        """The layers that arrive together with this one."""
        first = layer - layer % self.layers_at_once
        return range(first, min(first + self.layers_at_once, self.num_layers))

    def buffer_of(self, layer: int) -> int:
        """The number of the part in which a layer arrives."""
        return layer // self.layers_at_once % NUM_BUFFERS

    def places(self, layer: int, blocks: Int[Array, "..."]) -> Int[Array, "..."]:
        """The blocks of the view that are one layer of these blocks of the pool."""
        return blocks * self.num_layers + layer

    def slots(self, layer: int, slots: Int[Array, " tokens"], block_size: int) -> Int[Array, " tokens"]:
        """Slots of the view, for slots of the pool. Padding stays in block 0, of any layer."""
        return self.places(layer, slots // block_size) * block_size + slots % block_size


def num_cells_for(num_blocks: int, share: Fraction) -> int:
    """Cells of a window that holds so many narrow blocks.

    Args:
        num_blocks: the blocks.
        share: cells that a block takes as it arrives.
    """
    number = max(num_blocks // WIDENED_AT_ONCE, 1)
    size = -(-num_blocks // number)
    return number * (size + NUM_BUFFERS * math.ceil(size * share))


class Stream(Protocol):
    """Fills the window, inside a program that calls ``start`` and ``wait`` for each layer."""

    @property
    def window(self) -> Window:
        """The cells."""
        ...

    def start(self, cache: KVCache, layer: int, cells: range, *after: Array) -> tuple[KVCache, Any]:
        """Start to fill the cells of layers that arrive together. The first layers come first.

        Args:
            cache: the cache.
            layer: the first of these layers.
            cells: the cells for all the blocks that a layer streams at most.
            after: the token of the start before, and an array that depends on every earlier reader of the cells.

        Returns:
            The cache, and a token for ``wait``.
        """
        ...

    def wait[T](self, cache: KVCache, layer: int, arrays: T, *after: Array) -> tuple[KVCache, T]:
        """Wait until the cells of layers that arrive together are filled.

        Args:
            cache: the cache.
            layer: the first of these layers.
            arrays: arrays that every later reader and writer of the pool takes, and returned for them.
            after: the token of the layers, then arrays that come first.
        """
        ...


class BlockStream(Protocol):
    """Streams blocks into the window, for the programs that are traced with it.

    A program finds the blocks that ``load`` named last before it was enqueued. Programs are enqueued in the order of
    these calls.
    """

    window: Window

    @property
    def inputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """The last arguments of a program."""
        ...

    def load(self, source: Any, slots: Int32[np.ndarray, " streamed"]) -> None:
        """Name the blocks of the program that is enqueued next, by their slots."""
        ...

    def take_inputs(self) -> tuple[Array, ...]:
        """The last arguments of the program that is enqueued next."""
        ...

    def given(self, *inputs: Array) -> Stream:
        """The stream inside a program that has these inputs."""
        ...

    def forget(self) -> None:
        """Drop what was named for programs that did not run, and wait for the copies of one that failed."""
        ...


class _Load(NamedTuple):
    """The blocks of one program, as runs of slots.

    Args:
        source: the slots.
        firsts: first slot of each run.
        lengths: slots of each run.
    """

    source: Source
    firsts: Int64[np.ndarray, " runs"]
    lengths: Int64[np.ndarray, " runs"]


class HostStream:
    """Streams blocks by callbacks, which start the copies; see ``BlockStream``.

    Args:
        window: the cells.
        copier: copies.
    """

    inputs = ()

    def __init__(self, window: Window, copier: Copier) -> None:
        self.window = window
        self._copier = copier
        self._loaded: deque[_Load] = deque()
        self._running: _Load | None = None
        self._addresses: list[int] = []  # of the pool and, in a quantised one, of the scales that arrive

    def load(self, source: Source, slots: Int32[np.ndarray, " streamed"]) -> None:
        """Name the blocks of the program that is enqueued next, by their slots."""
        batches = self.window.batches
        assert len(slots) <= batches.number * batches.size
        self._loaded.append(_Load(source, *_runs(slots, source.slots_per_piece, batches.size)))

    def take_inputs(self) -> tuple[Array, ...]:
        return ()

    def given(self, *inputs: Array) -> "_Callbacks":
        del inputs
        return _Callbacks(self)

    def forget(self) -> None:
        """Drop what was named for programs that did not run, and wait for the copies of one that failed."""
        self._loaded.clear()
        with suppress(RuntimeError):  # of the device
            self._copier.finish()  # no copy may write to a pool that is gone

    # For callbacks ------------------------------------------------------------------------------------------------

    def start(self, stream: int | None, layer: int, first_cell: int, pool: Any, *scales: Any) -> None:
        """Start the copies of layers that arrive together.

        Args:
            stream: as for ``Copier``.
            layer: the first of these layers.
            first_cell: the first cell to fill.
            pool: the pool.
            scales: the array for the scales of all layers, if they come with these layers.
        """
        if layer == 0:
            self._running = self._loaded.popleft()
            self._addresses = [pointer_of(array) for array in (pool, *scales)]
        self._require_in_place(pool)
        cell_bytes = _bytes_of_each(pool)
        copies = [self._copies(layer, first_cell, cell_bytes)]
        copies += [self._copies_of_scales(cell_bytes, _bytes_of_each(array)) for array in scales]
        self._copier.start(stream, self.window.buffer_of(layer), np.concatenate(copies))

    def wait(self, stream: int | None, layer: int, pool: Any, *scales: Any) -> None:
        """Let the program go on once the copies are over that ``start`` started. Arguments as for ``start``."""
        self._require_in_place(pool, *scales)
        self._copier.wait(stream, self.window.buffer_of(layer))

    def _require_in_place(self, *arrays: Any) -> None:
        """Raise RuntimeError if the program moved the arrays: the copies would be elsewhere."""
        if [pointer_of(array) for array in arrays] != self._addresses[: len(arrays)]:
            raise RuntimeError(
                "this version of JAX does not write to a donated pool in place: use kv_placement='device'"
            )

    def _copies(self, layer: int, first_cell: int, cell_bytes: int) -> Copies:
        """The copies of K and V of layers that arrive together, with the scales that a narrow block has among them."""
        assert self._running is not None
        (address, pitch, _), firsts, lengths = self._running
        window, batches = self.window, self.window.batches
        layer_bytes = int(cell_bytes * window.share)
        block_bytes = window.layers_at_once * layer_bytes
        batch, place = np.divmod(np.cumsum(lengths) - lengths, batches.size)
        src = address + layer * layer_bytes + firsts * pitch
        dst = self._addresses[0] + (first_cell + batch * batches.num_cells) * cell_bytes + place * block_bytes
        return strided(src, pitch, dst, block_bytes, len(window.arriving_with(layer)) * layer_bytes, lengths)

    def _copies_of_scales(self, cell_bytes: int, block_bytes: int) -> Copies:
        """The copies of the scales of all layers, which lie behind all layers of K and V in a slot.

        Args:
            cell_bytes: bytes of a cell.
            block_bytes: bytes of a block's scales.
        """
        assert self._running is not None
        (address, pitch, _), firsts, lengths = self._running
        src = address + self.window.num_layers * cell_bytes + firsts * pitch
        dst = self._addresses[1] + (np.cumsum(lengths) - lengths) * block_bytes
        return strided(src, pitch, dst, block_bytes, block_bytes, lengths)


class _Callbacks:
    """The ``Stream`` inside one program, whose callbacks copy. Lives during one trace, which meets layers in order.

    XLA does not know that cells and scales change: for XLA, these callbacks only read the pool. So whatever reads or
    writes the pool after a callback takes the callback's result, and a callback takes the result of every earlier
    reader. The scales that arrive pass through every wait, in place, to whatever reads them.

    Args:
        host: starts the copies, and waits for them.
    """

    def __init__(self, host: HostStream) -> None:
        self.window = host.window
        self._host = host
        self._cells: dict[int, range] = {}  # by the first of the layers that arrive together
        self._scales: Float32[Array, "most_streamed num_layers 2 num_kv_heads"] | None = None

    def start(self, cache: KVCache, layer: int, cells: range, *after: Array) -> tuple[KVCache, Int[Array, " 1"]]:
        host, self._cells[layer] = self._host, cells
        shapes = [jax.ShapeDtypeStruct((1,), jnp.int32)]
        if layer == 0 and cache.kv_scales is not None:
            sizes = len(cells) // self.window.layers_at_once, self.window.num_layers, *cache.kv_scales.shape[2:]
            shapes.append(jax.ShapeDtypeStruct(sizes, cache.kv_scales.dtype))

        def run(context: Any, out: Any, pool: Any, *others: Any) -> None:
            del others
            host.start(stream_of(context), layer, cells.start, pool, *out[1:])

        token, *made = buffer_callback(run, shapes)(cache.pool, *after)
        if made:
            [self._scales] = made
        return cache, token

    def wait[T](self, cache: KVCache, layer: int, arrays: T, *after: Array) -> tuple[KVCache, T]:
        host, num_scales = self._host, 0 if self._scales is None else 1
        passed, tree = jax.tree.flatten((self._scales, arrays))

        def run(context: Any, out: Any, pool: Any, *others: Any) -> None:
            del out
            host.wait(stream_of(context), layer, pool, *others[:num_scales])

        shapes = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in passed]
        aliases = {1 + i: i for i in range(len(passed))}
        waited = buffer_callback(run, shapes, input_output_aliases=aliases)(cache.pool, *passed, *after)
        self._scales, arrays = jax.tree.unflatten(tree, waited)
        return self._with_scales(cache, layer), arrays

    def _with_scales(self, cache: KVCache, layer: int) -> KVCache:
        """Store the scales of layers that have arrived in their cells. Cells that no block fills take any number."""
        if self._scales is None or cache.kv_scales is None:
            return cache
        layers, most = self.window.arriving_with(layer), self.window.layers_at_once
        scales = self._scales[:, layers.start : layers.stop]
        scales = jnp.pad(scales, ((0, 0), (0, most - len(layers)), (0, 0), (0, 0))).reshape(-1, 1, *scales.shape[2:])
        stored = lax.dynamic_update_slice_in_dim(cache.kv_scales, scales, self._cells[layer].start, 0)
        return replace(cache, kv_scales=stored)


def _bytes_of_each(array: Any) -> int:
    """Bytes of each element of an array's first axis."""
    return math.prod(array.shape[1:]) * array.dtype.itemsize


def _runs(
    slots: Int32[np.ndarray, " streamed"], slots_per_piece: int, batch: int
) -> tuple[Int64[np.ndarray, " runs"], Int64[np.ndarray, " runs"]]:
    """Divide slots into runs of neighbours in one piece and in one batch: the first slot of each, and its slots."""
    starts, lengths = runs_of(slots, slots_per_piece, np.arange(len(slots)) % batch == 0)
    return slots[starts].astype(np.int64), lengths
