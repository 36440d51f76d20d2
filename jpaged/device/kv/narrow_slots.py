"""Slots in pinned memory for blocks of 8 bits, which programs round and widen (``kv/narrow.py``)."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.buffer_callback import buffer_callback
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int, Int32

from jpaged.contract.plan import BlockCopy
from jpaged.device.kv.copy_engine import stream_of
from jpaged.device.kv.host_memory import (
    MOVE_SIZES,
    Arrival,
    Copying,
    HostMemory,
    Part,
    PinnedSlots,
    Program,
    Source,
    local_shape,
    padded,
    size_for,
)
from jpaged.device.kv.pool import KVCache

MAX_NARROW_BLOCKS = 8 * MOVE_SIZES[-1]
"""Most narrow blocks beside the pool at once: a step that moves no more never waits for them."""


class NarrowSlots:
    """Slots for narrow blocks, which pass through arrays beside the pool.

    A program rounds blocks that leave into an array, from which the copy engine copies. What arrives fills an array
    beside the steps that run, and is widened into the pool when it lands.

    Args:
        slots: as ``PinnedSlots`` takes it.
        pinned: the slots, which this object alone uses.
        program: compiled programs by key: ("gather", size) rounds, and ("scatter", size) widens.
    """

    is_staged = True
    most_staged = MAX_NARROW_BLOCKS

    def __init__(self, slots: jax.ShapeDtypeStruct, pinned: PinnedSlots, program: Program) -> None:
        self._pinned = pinned
        self._program = program
        assert isinstance(slots.sharding, jax.sharding.NamedSharding)
        mesh, split = slots.sharding.mesh, slots.sharding.spec
        on_devices, tokens = partial(jax.shard_map, mesh=mesh, check_vma=False), P(mesh.axis_names)
        self._fill = {}
        for size in MOVE_SIZES:
            shape = jax.ShapeDtypeStruct((size, *local_shape(slots)[1:]), slots.dtype)
            fill = on_devices(partial(_fill, pinned.parts, shape), in_specs=tokens, out_specs=(split, tokens))
            self._fill[size] = jax.jit(fill)
        self._await = jax.jit(on_devices(partial(_await, pinned.parts), in_specs=(split, P()), out_specs=P()))
        sharding = jax.sharding.NamedSharding(mesh, tokens)
        self._first_token = jax.jit(lambda: jnp.zeros(mesh.size, jnp.int32), out_shardings=sharding)

    def store(self, cache: KVCache, copies: Sequence[BlockCopy]) -> Copying:
        blocks = padded([copy.src for copy in copies], 0)
        narrow = self._program(("gather", len(blocks)))(cache, blocks)
        return self._pinned.store(narrow, [BlockCopy(place, copy.dst) for place, copy in enumerate(copies)])

    def request(self, cache: KVCache, copies: Sequence[BlockCopy]) -> Arrival:
        del cache
        latest = self._pinned.latest
        after = self._first_token() if latest is None else latest.token
        timed = self._pinned.announce([BlockCopy(copy.src, place) for place, copy in enumerate(copies)])
        narrow, token = self._fill[size_for(copies)](after)
        self._pinned.latest = Copying(token, timed)
        return Arrival(tuple(copies), self._pinned.latest, narrow)

    def land(self, cache: KVCache, arrival: Arrival) -> tuple[KVCache, Array]:
        blocks = self._await(arrival.blocks, padded([copy.dst for copy in arrival.copies], 0))
        return self._program(("scatter", len(blocks)))(cache, blocks, arrival.blocks)

    def source(self) -> Source:
        """``PinnedSlots.source``."""
        return self._pinned.source()

    def forget(self) -> None:
        self._pinned.forget()

    def wait(self) -> None:
        self._pinned.wait()

    def failure(self) -> BaseException | None:
        return self._pinned.failure()


def _fill(
    parts: dict[int, Part], shape: jax.ShapeDtypeStruct, token: Int[Array, " 1"]
) -> tuple[Array, Int[Array, " 1"]]:
    """A program that returns a new array, which copies fill, after the program of an earlier token."""

    def run(context: Any, out: Any, token: Any) -> None:
        del token
        _, ordinal = out[0].__dlpack_device__()
        parts[ordinal].fill(stream_of(context), out[:1])

    return buffer_callback(run, (shape, jax.ShapeDtypeStruct(token.shape, token.dtype)))(token)


def _await(parts: dict[int, Part], narrow: Array, blocks: Int32[Array, " n"]) -> Int32[Array, " n"]:
    """A program that returns its ids once the array is filled, on the stream of the programs that take these ids."""

    def run(context: Any, out: Any, narrow: Any, blocks: Any) -> None:
        del out, blocks
        _, ordinal = narrow.__dlpack_device__()
        parts[ordinal].wait_for_loads(stream_of(context))

    shape = jax.ShapeDtypeStruct(blocks.shape, blocks.dtype)
    return buffer_callback(run, shape, input_output_aliases={1: 0})(narrow, blocks)


def for_narrow_blocks(
    memory: Callable[[jax.ShapeDtypeStruct, Program], HostMemory],
) -> Callable[[jax.ShapeDtypeStruct, Program], HostMemory]:
    """The host memory for narrow blocks, where this one is that for blocks as the pool holds them.

    Staged memory takes whatever bits the programs gather.
    """

    def make(slots: jax.ShapeDtypeStruct, program: Program) -> HostMemory:
        made = memory(slots, program)
        return NarrowSlots(slots, made, program) if isinstance(made, PinnedSlots) else made

    return make
