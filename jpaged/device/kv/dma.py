"""Blocks on the host that programs of a TPU copy by DMA: these programs cannot call back.

All slots are one array in pinned memory. Every program that reads or writes a slot takes this array.
"""

import itertools
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Int32

from jpaged.contract.plan import BlockCopy
from jpaged.device.backends import Backend
from jpaged.device.kv.host_memory import MOVE_SIZES, Arrival, Program, padded, size_for
from jpaged.device.kv.pool import KVCache
from jpaged.device.kv.stream import NUM_BUFFERS, Window
from jpaged.sharding import replicated
from pallas_kernels.block_pool.tpu import (
    Slots,
    load_blocks_tpu,
    slots_for,
    start_layer_tpu,
    store_blocks_tpu,
    wait_layer_tpu,
)
from pallas_kernels.dispatch import INTERPRETERS

_PADDING = -1
"""A block that no program copies."""


def abstract_slots(blocks: jax.ShapeDtypeStruct, cache: KVCache, backend: Backend) -> jax.ShapeDtypeStruct:
    """The array of slots for blocks: shape, type and sharding.

    Args:
        blocks: the shape of as many blocks outside of the pool.
        cache: the shapes of the pool.
        backend: its kernels copy. Pallas's interpreter takes no arrays in pinned memory.
    """
    sharding = blocks.sharding
    assert isinstance(sharding, jax.sharding.NamedSharding)
    slots = slots_for(cache.pool, blocks.shape[0], is_interpreted=backend.interpret)
    if not backend.interpret:
        sharding = sharding.with_memory_kind("pinned_host")
    return jax.ShapeDtypeStruct(slots.shape, slots.dtype, sharding=sharding)


# Programs that move whole blocks ------------------------------------------------------------------------------------


def lower_move(
    kind: str,
    cache: KVCache,
    slots: jax.ShapeDtypeStruct,
    blocks: jax.ShapeDtypeStruct,
    *,
    is_interpreted: bool,
) -> jax.stages.Lowered:
    """The program that copies blocks to slots ("store") or slots to blocks ("restore"), in place.

    Its last result is a number, which is ready when the copies are over.

    Args:
        kind: "store" or "restore".
        cache, slots, blocks: shapes of the arguments; there are as many blocks as slots.
        is_interpreted: whether Pallas's interpreter runs the kernels.
    """
    interpret = _interpreter(is_interpreted)

    def store(
        slots: Slots, cache: KVCache, blocks: Int[Array, " n"], into: Int[Array, " n"]
    ) -> tuple[Slots, Int[Array, ""]]:
        return store_blocks_tpu(slots, cache.pool, blocks, into, interpret=interpret), blocks.sum()

    def restore(
        cache: KVCache, slots: Slots, blocks: Int[Array, " n"], source: Int[Array, " n"]
    ) -> tuple[KVCache, Int[Array, ""]]:
        return KVCache(load_blocks_tpu(cache.pool, slots, blocks, source, interpret=interpret)), blocks.sum()

    if kind == "restore":
        return jax.jit(restore, donate_argnums=0).lower(cache, slots, blocks, blocks)
    # XLA would otherwise return the slots in device memory.
    shardings = slots.sharding, blocks.sharding
    return jax.jit(store, donate_argnums=0, out_shardings=shardings).lower(slots, cache, blocks, blocks)


class _Landing:
    """Blocks that a later program copies."""

    token: Any = None  # of the last program that copies them

    def is_ready(self) -> bool:
        return self.token is not None and self.token.is_ready()

    def block_until_ready(self) -> None:
        if self.token is not None:
            self.token.block_until_ready()


class DmaSlots:
    """Slots in pinned memory, between which and the pool programs copy. So copies and steps take turns.

    Args:
        slots: the array of slots; see ``abstract_slots``.
        program: compiled programs by key: ("store", size) and ("restore", size).
    """

    is_staged = False
    most_staged = 0

    def __init__(self, slots: jax.ShapeDtypeStruct, program: Program) -> None:
        self._shape = slots
        self._program = program
        self._slots = self._empty()

    def store(self, cache: KVCache, copies: Sequence[BlockCopy]) -> Any:
        token = None
        for batch in itertools.batched(copies, MOVE_SIZES[-1]):
            blocks, into = padded([copy.src for copy in batch], _PADDING), padded([copy.dst for copy in batch], 0)
            self._slots, token = self._program(("store", size_for(batch)))(self._slots, cache, blocks, into)
        return token

    def request(self, cache: KVCache, copies: Sequence[BlockCopy]) -> Arrival:
        del cache
        return Arrival(tuple(copies), _Landing())

    def land(self, cache: KVCache, arrival: Arrival) -> tuple[KVCache, Array]:
        for batch in itertools.batched(arrival.copies, MOVE_SIZES[-1]):
            blocks, source = padded([copy.dst for copy in batch], _PADDING), padded([copy.src for copy in batch], 0)
            program = self._program(("restore", size_for(batch)))
            cache, arrival.moving.token = program(cache, self._slots, blocks, source)
        return cache, arrival.moving.token

    def source(self) -> Slots:
        """The slots as the next program reads them."""
        return self._slots

    def forget(self) -> None:
        if self._slots.is_deleted():  # a program that failed had taken them
            self._slots = self._empty()

    def wait(self) -> None:
        self._slots.block_until_ready()

    def failure(self) -> None:
        return None

    def _empty(self) -> Any:
        return jax.device_put(np.zeros(self._shape.shape, self._shape.dtype), self._shape.sharding)


# Streaming ----------------------------------------------------------------------------------------------------------


class DmaStream:
    """Streams blocks into the window, for programs that copy by DMA; see ``BlockStream``.

    Args:
        window: the cells.
        slots: the array of slots.
        mesh: the devices.
        is_interpreted: whether Pallas's interpreter runs the kernels.
    """

    def __init__(
        self, window: Window, slots: jax.ShapeDtypeStruct, mesh: jax.sharding.Mesh, *, is_interpreted: bool
    ) -> None:
        self.window = window
        self._is_interpreted = is_interpreted
        self._num_most = window.num_cells // NUM_BUFFERS
        self.inputs = slots, jax.ShapeDtypeStruct((1 + self._num_most,), jnp.int32, sharding=replicated(mesh))
        self._loaded: deque[tuple[Any, Any]] = deque()

    def load(self, source: Slots, slots: Int32[np.ndarray, " streamed"]) -> None:
        """Name the blocks of the program that is enqueued next, by their slots."""
        assert len(slots) <= self._num_most
        named = np.zeros(1 + self._num_most, np.int32)
        named[0], named[1 : 1 + len(slots)] = len(slots), slots
        self._loaded.append((source, named))

    def take_inputs(self) -> tuple[Any, ...]:
        """The last arguments of the program that is enqueued next."""
        return self._loaded.popleft()

    def given(self, *inputs: Array) -> "_Arriving":
        """The stream inside a program that has these inputs."""
        slots, named = inputs
        return _Arriving(self.window, slots, named, _interpreter(self._is_interpreted))

    def forget(self) -> None:
        """Drop what was named for programs that did not run."""
        self._loaded.clear()


@dataclass(frozen=True)
class _Arriving:
    """The stream inside one program. Kernels take the pool and return it, and so run in order.

    Args:
        window: the cells.
        slots: all slots.
        named: the slots to stream.
        interpret: settings of Pallas's interpreter; None on a TPU.
    """

    window: Window
    slots: Slots
    named: Int[Array, " most_plus_1"]
    interpret: Any

    def start(self, cache: KVCache, layer: int, cells: range, *after: Array) -> tuple[KVCache, Any]:
        del after  # the pool comes from every earlier reader of the cells
        pool, semaphore = start_layer_tpu(
            cache.pool, self.slots, self.named, layer, cells.start, interpret=self.interpret
        )
        return KVCache(pool), semaphore

    def wait[T](self, cache: KVCache, layer: int, arrays: T, *after: Array) -> tuple[KVCache, T]:
        del layer
        semaphore, computed = after[:2]
        pool = wait_layer_tpu(cache.pool, self.named, semaphore, computed, interpret=self.interpret)
        return KVCache(pool), arrays


def _interpreter(is_interpreted: bool) -> Any:
    return INTERPRETERS["pallas_tpu"]() if is_interpreted else None
