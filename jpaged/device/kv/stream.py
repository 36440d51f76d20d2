"""The stream: copies blocks on the host, one layer at a time, into a window of the pool while layers before run.

The window is the first blocks of the pool. A cell of the window holds K and V of one block in one layer, as a block of
a pool of one layer does. So attention reads the window and the pool by one block table, in one call.

Cells of even layers and of odd layers lie apart: while one layer attends, the cells of the next are filled (KVPR, arXiv
2411.17089, overlaps copies and compute in the same way).
"""

import math
from bisect import bisect_right
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.buffer_callback import buffer_callback
from jaxtyping import Array, Int, Int32, Int64

from jpaged.device.kv.copy_engine import Copier, Copies, stream_of, strided
from jpaged.device.kv.host_memory import Source
from jpaged.device.kv.pinned import pointer_of
from jpaged.device.kv.pool import KVCache

NUM_BUFFERS = 2
"""Parts of the window: one is filled while another is read."""

Token = Int[Array, " 1"]
"""The result of a callback, by which another one comes later."""

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
        share: part of a cell that a block takes as it arrives.
    """

    num_blocks: int
    num_layers: int
    share: Fraction = Fraction(1)

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
            return Batches(1, self.num_cells // NUM_BUFFERS, self.num_cells // NUM_BUFFERS)
        wanted = max(int(self.num_cells / (1 + NUM_BUFFERS * self.share)) // WIDENED_AT_ONCE, 1)
        found = [self._in_batches(number) for number in (max(wanted - 1, 1), wanted)]
        return max(found, key=lambda batches: batches.number * batches.size)

    def _in_batches(self, number: int) -> Batches:
        """The largest of so many batches, with a cell for each block beside those in which it arrives."""
        most, share = self.num_cells // number, self.share
        sizes = range(1, most + 1)
        size = bisect_right(sizes, most, key=lambda size: size + NUM_BUFFERS * math.ceil(size * share))
        return Batches(number, size, math.ceil(size * share))

    @property
    def first(self) -> int:
        """The first cell."""
        return WINDOW_START * self.num_layers

    def places(self, layer: int, blocks: Int[Array, "..."]) -> Int[Array, "..."]:
        """The blocks of the view that are one layer of these blocks of the pool."""
        return blocks * self.num_layers + layer

    def slots(self, layer: int, slots: Int[Array, " tokens"], block_size: int) -> Int[Array, " tokens"]:
        """Slots of the view, for slots of the pool. Padding stays in block 0, of any layer."""
        return self.places(layer, slots // block_size) * block_size + slots % block_size


def num_cells_for(num_blocks: int, share: Fraction) -> int:
    """Cells of a window that holds so many narrow blocks."""
    number = max(num_blocks // WIDENED_AT_ONCE, 1)
    size = -(-num_blocks // number)
    return number * (size + NUM_BUFFERS * math.ceil(size * share))


class Stream(Protocol):
    """Fills the window, inside a program that calls ``start`` and ``wait`` for each layer."""

    @property
    def window(self) -> Window:
        """The cells."""
        ...

    def start(self, cache: KVCache, layer: int, first_cell: int, *after: Array) -> tuple[KVCache, Any]:
        """Start to fill the cells of a layer. The first layer comes first.

        Args:
            cache: the cache.
            layer: the layer.
            first_cell: the first of the neighbouring cells to fill.
            after: the token of the start before, and an array that depends on every earlier reader of the cells.

        Returns:
            The cache, and a token for ``wait``.
        """
        ...

    def wait[T](self, cache: KVCache, layer: int, arrays: T, *after: Array) -> tuple[KVCache, T]:
        """Wait until the cells of a layer are filled.

        Args:
            cache: the cache.
            layer: the layer.
            arrays: arrays that every later reader and writer of the pool takes, and returned for them.
            after: the token of the layer, then arrays that come first.
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
    """Streams blocks by callbacks, which start the copies; see ``BlockStream`` and ``Stream``.

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
        self._addresses: list[int] = []  # of the arrays of the cache

    def load(self, source: Source, slots: Int32[np.ndarray, " streamed"]) -> None:
        """Name the blocks of the program that is enqueued next, by their slots."""
        assert len(slots) <= self.window.num_cells
        self._loaded.append(_Load(source, *_runs(slots, source.slots_per_piece, self.window.batches.size)))

    def take_inputs(self) -> tuple[Array, ...]:
        return ()

    def given(self, *inputs: Array) -> "HostStream":
        del inputs
        return self

    def forget(self) -> None:
        """Drop what was named for programs that did not run, and wait for the copies of one that failed."""
        self._loaded.clear()
        with suppress(RuntimeError):  # of the device
            self._copier.finish()  # no copy may write to a pool that is gone

    # Inside a program ---------------------------------------------------------------------------------------------
    #
    # XLA does not know that the cells change: for XLA, these callbacks only read the pool. So whatever reads or writes
    # the pool after a callback takes the callback's result, and a callback takes the result of every earlier reader.

    def start(self, cache: KVCache, layer: int, first_cell: int, *after: Array) -> tuple[KVCache, Token]:
        leaves = jax.tree.leaves(cache)
        widths = [_bytes_of_cell(leaf) for leaf in leaves]

        def run(context: Any, out: Any, *arrays: Any) -> None:
            del out
            pool = arrays[: len(leaves)]
            if layer == 0:
                self._running = self._loaded.popleft()
                self._addresses = [pointer_of(array) for array in pool]
            self._require_in_place(pool)
            self._copier.start(stream_of(context), layer % NUM_BUFFERS, self._copies(layer, first_cell, widths))

        return cache, buffer_callback(run, jax.ShapeDtypeStruct((1,), jnp.int32))(*leaves, *after)

    def wait[T](self, cache: KVCache, layer: int, arrays: T, *after: Array) -> tuple[KVCache, T]:
        leaves, (passed, tree) = jax.tree.leaves(cache), jax.tree.flatten(arrays)

        def run(context: Any, out: Any, *arrays: Any) -> None:
            del out
            self._require_in_place(arrays[: len(leaves)])
            self._copier.wait(stream_of(context), layer % NUM_BUFFERS)

        shapes = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in passed]
        aliases = {len(leaves) + i: i for i in range(len(passed))}
        waited = buffer_callback(run, shapes, input_output_aliases=aliases)(*leaves, *passed, *after)
        return cache, jax.tree.unflatten(tree, waited)

    def _require_in_place(self, leaves: Sequence[Any]) -> None:
        """Raise RuntimeError if the program moved the pool: the cells would be elsewhere."""
        if [pointer_of(leaf) for leaf in leaves] != self._addresses:
            raise RuntimeError(
                "this version of JAX does not write to a donated pool in place: use kv_placement='device'"
            )

    def _copies(self, layer: int, first_cell: int, widths: Sequence[int]) -> Copies:
        """The copies of a layer: a slot holds all layers of K and V, then all layers of their scales, if there are any.

        A slot of a narrow block holds all layers, each with its scales.

        Args:
            layer: the layer.
            first_cell: the first cell to fill.
            widths: bytes of a cell, in each array of the cache.
        """
        assert self._running is not None
        (start, pitch, _), firsts, lengths = self._running
        batches = self.window.batches
        batch, place = np.divmod(np.cumsum(lengths) - lengths, batches.size)
        copies = []
        for address, cell_bytes in zip(self._addresses, widths, strict=True):
            width = int(cell_bytes * self.window.share)
            src = start + layer * width + firsts * pitch
            dst = address + (first_cell + batch * batches.num_cells) * cell_bytes + place * width
            copies.append(strided(src, pitch, dst, width, width, lengths))
            start += self.window.num_layers * width
        return np.concatenate(copies)


def _bytes_of_cell(layers: Any) -> int:
    """Bytes of one block of an array of the cache as one layer."""
    return math.prod(layers.shape[1:]) * layers.dtype.itemsize


def _runs(
    slots: Int32[np.ndarray, " streamed"], slots_per_piece: int, batch: int
) -> tuple[Int64[np.ndarray, " runs"], Int64[np.ndarray, " runs"]]:
    """Divide slots into runs of neighbours in one piece and in one batch: the first slot of each, and its slots."""
    is_first = np.arange(len(slots)) % batch == 0
    is_first[1:] |= (np.diff(slots) != 1) | (slots[1:] % slots_per_piece == 0)
    starts = np.flatnonzero(is_first)
    return slots[starts].astype(np.int64), np.diff(starts, append=len(slots))
