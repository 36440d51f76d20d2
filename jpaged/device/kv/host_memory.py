"""Slots for blocks in host memory, and the ways between them and the device pool: one interface.

The copy engine of a GPU copies blocks in place (``PinnedSlots``). Elsewhere blocks are staged (``StagedMemory``),
unless a TPU streams them (``dma.DmaSlots``).
"""

import math
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.buffer_callback import buffer_callback
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int, Int32

from jpaged.contract.plan import BlockCopy
from jpaged.device.kv.copy_engine import Copier, Copies, CopyEngine, PlainCopier, Timed, runs_of, stream_of, strided
from jpaged.device.kv.pinned import PinnedMemory, pointer_of, why_no_pinned_memory
from jpaged.device.kv.pool import KVCache
from jpaged.device.target import Target

MOVE_SIZES = (4, 32)
"""Numbers of blocks that a program moves; fewer blocks are padded."""

Program = Callable[[tuple], Callable[..., Any]]


def has_copy_engine(target: Target) -> bool:
    """Whether this process can let the devices of this target copy by themselves, from and to pinned memory."""
    return target.addresses_host_memory and why_no_pinned_memory() is None


class Moving(Protocol):
    """Blocks in flight."""

    def is_ready(self) -> bool:
        """Whether the copies are over."""
        ...

    def block_until_ready(self) -> Any:
        """Wait until the copies are over."""
        ...


class Arrival(NamedTuple):
    """Blocks on their way to the device pool.

    Args:
        copies: their slots and their blocks.
        moving: the copies in flight.
        blocks: an array of the blocks, once they are there, if they are staged.
    """

    copies: tuple[BlockCopy, ...]
    moving: Any
    blocks: Any = None


class Source(NamedTuple):
    """Slots in the host's address space, those of one device.

    Args:
        address: address of slot 0.
        slot_bytes: bytes of a slot.
        slots_per_piece: no copy spans slots of two pieces of so many.
    """

    address: int
    slot_bytes: int
    slots_per_piece: int


class HostMemory(Protocol):
    """Slots for blocks in host memory. A slot is read as it was stored last, whatever is in flight.

    Attributes:
        is_staged: whether blocks in flight take device memory. A call moves ``MOVE_SIZES[-1]`` of them at most then.
        most_staged: most blocks in flight at once, if they are staged.
    """

    is_staged: bool
    most_staged: int

    def store(self, cache: KVCache, copies: Sequence[BlockCopy]) -> Moving:
        """Copy blocks (src) to slots (dst). Programs that are enqueued later may overwrite the blocks."""
        ...

    def request(self, cache: KVCache, copies: Sequence[BlockCopy]) -> Arrival:
        """Begin to copy slots (src) to blocks (dst), which no program may read or write until they have landed."""
        ...

    def land(self, cache: KVCache, arrival: Arrival) -> tuple[KVCache, Array]:
        """Make the cache, which is donated, hold the blocks.

        Returns:
            The cache, and an array that is ready when the cache holds the blocks.
        """
        ...

    def forget(self) -> None:
        """Drop what is in flight. No slot is read again before it is written."""
        ...

    def wait(self) -> None:
        """Wait until the memory can be used, once, before anything else.

        Raises:
            RuntimeError: it cannot be had.
        """
        ...

    def failure(self) -> BaseException | None:
        """The error for which the memory cannot be had; None while it may come. Does not wait."""
        ...


class StagedMemory:
    """Slots in ordinary host memory, one array for each device; JAX copies blocks through staging arrays.

    Args:
        slots: bits of all slots as one array: shape, dtype, and sharding over the devices.
        program: compiled programs by key: ("gather", size) and ("scatter", size).
    """

    is_staged = True
    most_staged = 2 * MOVE_SIZES[-1]  # one batch is copied while another is gathered or written

    def __init__(self, slots: jax.ShapeDtypeStruct, program: Program) -> None:
        assert slots.sharding is not None
        self._shape, self._sharding = slots.shape, slots.sharding
        self._program = program
        shape = local_shape(slots)
        self._slots = {device: np.zeros(shape, slots.dtype) for device in _local_devices(slots)}
        self._leaving: list[tuple[list[int], Any]] = []  # in the order in which they are to be written

    def store(self, cache: KVCache, copies: Sequence[BlockCopy]) -> Moving:
        self._settle(0)
        blocks: Any = self._program(("gather", size_for(copies)))(cache, padded([copy.src for copy in copies], 0))
        blocks = jax.device_put(blocks, self._sharding.with_memory_kind("pinned_host"))
        self._leaving.append(([copy.dst for copy in copies], blocks))
        return blocks

    def request(self, cache: KVCache, copies: Sequence[BlockCopy]) -> Arrival:
        del cache
        slots = [copy.src for copy in copies]
        awaited = [number for number, (stored, _) in enumerate(self._leaving, 1) if not set(stored).isdisjoint(slots)]
        self._settle(max(awaited, default=0))
        rows = padded(slots, slots[0])
        # Indexing copies: a later store does not change what is in flight.
        parts = [jax.device_put(array[rows], device) for device, array in self._slots.items()]
        blocks = jax.make_array_from_single_device_arrays((len(rows), *self._shape[1:]), self._sharding, parts)
        return Arrival(tuple(copies), blocks, blocks)

    def land(self, cache: KVCache, arrival: Arrival) -> tuple[KVCache, Array]:
        blocks = padded([copy.dst for copy in arrival.copies], 0)
        return self._program(("scatter", len(blocks)))(cache, blocks, arrival.blocks)

    def forget(self) -> None:
        self._leaving.clear()

    def wait(self) -> None:
        pass  # it is ready at once

    def failure(self) -> None:
        return None

    def _settle(self, least: int) -> None:
        """Write blocks that left into their slots: the first ``least`` batches, and those after them that are ready."""
        while self._leaving and (least > 0 or self._leaving[0][1].is_ready()):
            slots, blocks = self._leaving.pop(0)
            for shard in blocks.addressable_shards:
                self._slots[shard.device][slots] = np.asarray(shard.data)[: len(slots)]
            least -= 1


class Copying:
    """Blocks that the copy engines of some devices move.

    Args:
        token: result of the program that starts the copies.
        parts: copies of each device, once the token is ready.
    """

    def __init__(self, token: Int[Array, " devices"], parts: Sequence[Timed]) -> None:
        self.token: Any = token  # its stub lacks is_ready
        self.parts = parts

    def is_ready(self) -> bool:
        """Whether the copies are over. Raises the error of a program that could not start them."""
        if not self.token.is_ready():
            return False
        self.token.block_until_ready()  # nothing else may take the token, and so its error
        return all(part.is_over() for part in self.parts)

    def block_until_ready(self) -> None:
        """Wait until the copies are over."""
        self.token.block_until_ready()
        for part in self.parts:
            part.wait()

    def seconds(self) -> float:
        """The duration of copies that are over, on the device that took longest."""
        return max(part.seconds() for part in self.parts)


class PinnedSlots:
    """Slots in pinned memory, from and to which the copy engine of each device copies blocks in place.

    A slot is the bytes of a block, followed by those of its scales. The copies of a device run one after the other,
    in the order of the calls.

    XLA does not know of the copies: for XLA, the program that starts them only reads the cache. So ``store`` lets the
    next programs wait for its copies, and ``land`` lets them wait for those of ``request``.

    Args:
        slots: as ``StagedMemory`` takes it.
        program: not used; a program that calls back cannot be kept.
        allocate: makes the memory of one device: of bytes, unit, device.
        new_copier: makes the copier of one device.

    Attributes:
        parts: the slots of each device, by its number.
        latest: the copies that started last; None if there are none.
    """

    is_staged = False
    most_staged = 0

    def __init__(
        self,
        slots: jax.ShapeDtypeStruct,
        program: Program,
        allocate: Callable[[int, int, Any], "PinnedMemory | PlainMemory"] = PinnedMemory,
        new_copier: Callable[[], Copier] = CopyEngine,
    ) -> None:
        del program
        self._slot_bytes = math.prod(local_shape(slots)[1:]) * slots.dtype.itemsize
        self.parts: dict[int, Part] = {}
        for device in _local_devices(slots):
            memory = allocate(slots.shape[0] * self._slot_bytes, self._slot_bytes, device)
            self.parts[device.local_hardware_id] = Part(memory, self._slot_bytes, new_copier())
        self.latest: Copying | None = None
        assert isinstance(slots.sharding, jax.sharding.NamedSharding)
        mesh, split = slots.sharding.mesh, slots.sharding.spec
        on_devices = partial(jax.shard_map, mesh=mesh, in_specs=(split,), check_vma=False)
        tokens = P(mesh.axis_names)
        self._store = jax.jit(on_devices(partial(_call, self.parts, Part.store), out_specs=tokens))
        self._load = jax.jit(on_devices(partial(_call, self.parts, Part.load), out_specs=tokens))
        land = on_devices(partial(_call_in_place, self.parts, Part.land), out_specs=(split, tokens))
        self._land = jax.jit(land, donate_argnums=0)

    def store(self, cache: KVCache | Array, copies: Sequence[BlockCopy]) -> Copying:
        """``HostMemory.store``; an array of blocks may stand for a cache."""
        return self._start(self._store, cache, copies)

    def request(self, cache: KVCache, copies: Sequence[BlockCopy]) -> Arrival:
        return Arrival(tuple(copies), self._start(self._load, cache, copies))

    def land(self, cache: KVCache, arrival: Arrival) -> tuple[KVCache, Array]:
        del arrival  # a device copies in order
        return self._land(cache)

    def source(self) -> Source:
        """The slots as programs of the one device read them. Programs wait for what was stored before."""
        [part] = self.parts.values()
        return Source(part.memory.address, self._slot_bytes, part.memory.piece_bytes // self._slot_bytes)

    def forget(self) -> None:
        with suppress(RuntimeError):  # of the step that failed
            if self.latest is not None:
                self.latest.block_until_ready()  # no copy may write to a pool that is gone
        self.latest = None
        for part in self.parts.values():
            part.moves.clear()

    def wait(self) -> None:
        for part in self.parts.values():
            part.memory.wait()

    def failure(self) -> BaseException | None:
        failures = (part.memory.failure() for part in self.parts.values())
        return next((error for error in failures if error is not None), None)

    def _start(self, program: Callable[..., Array], arrays: KVCache | Array, copies: Sequence[BlockCopy]) -> Copying:
        timed = self.announce(copies)
        self.latest = Copying(program(arrays), timed)
        return self.latest

    def announce(self, copies: Sequence[BlockCopy]) -> list[Timed]:
        """Name the copies that the next program starts. Returns the list that the program fills."""
        timed: list[Timed] = []
        for part in self.parts.values():
            part.moves.append((copies, timed))
        return timed


_STORES, _LOADS = 0, 1  # buffers of a copier


@dataclass(eq=False)
class Part:
    """The slots of one device. The methods but the last run in its programs.

    Args:
        memory: the slots.
        slot_bytes: bytes of a slot.
        copier: copies.
        moves: copies that the next programs start, and the list that tells the host of them.
        pool_address: address of the pool when the last load started.
    """

    memory: "PinnedMemory | PlainMemory"
    slot_bytes: int
    copier: Copier
    moves: deque[tuple[Sequence[BlockCopy], list[Timed]]] = field(default_factory=deque)
    pool_address: int = 0

    def store(self, stream: int | None, arrays: Sequence[Any]) -> None:
        copies, timed = self.moves.popleft()
        moved = self._copies(arrays, [(copy.src, copy.dst) for copy in copies], to_host=True)
        timed.append(self.copier.start_timed(stream, _STORES, moved))
        self.copier.wait(stream, _STORES)

    def load(self, stream: int | None, arrays: Sequence[Any]) -> None:
        self.pool_address = pointer_of(arrays[0])
        self.fill(stream, arrays)

    def fill(self, stream: int | None, arrays: Sequence[Any]) -> None:
        copies, timed = self.moves.popleft()
        moved = self._copies(arrays, [(copy.dst, copy.src) for copy in copies], to_host=False)
        timed.append(self.copier.start_timed(stream, _LOADS, moved))

    def land(self, stream: int | None, arrays: Sequence[Any]) -> None:
        if pointer_of(arrays[0]) != self.pool_address:
            raise RuntimeError("this version of JAX does not write to a donated pool in place: use num_host_blocks=0")
        self.wait_for_loads(stream)

    def wait_for_loads(self, stream: int | None) -> None:
        self.copier.wait(stream, _LOADS)

    def _copies(self, arrays: Sequence[Any], pairs: Sequence[tuple[int, int]], *, to_host: bool) -> Copies:
        """The copies of blocks, each with its slot: one for each array of the cache and run of neighbours."""
        blocks, slots = np.array(pairs, np.int64).reshape(-1, 2).T
        is_apart = np.diff(blocks, prepend=-2) != 1
        starts, lengths = runs_of(slots, self.memory.piece_bytes // self.slot_bytes, is_apart)
        copies, piece = [], self.memory.address + slots[starts] * self.slot_bytes
        for array in arrays:
            width = math.prod(array.shape[1:]) * array.dtype.itemsize
            ends = (pointer_of(array) + blocks[starts] * width, width), (piece, self.slot_bytes)
            src, dst = ends if to_host else reversed(ends)
            copies.append(strided(*src, *dst, width, lengths))
            piece = piece + width
        return np.concatenate(copies)


_Method = Callable[[Part, int | None, Sequence[Any]], None]
_TOKEN = jax.ShapeDtypeStruct((1,), jnp.int32)


def _called(parts: dict[int, Part], method: _Method) -> Callable[..., None]:
    """A callback that calls a method for the device whose program runs it, with the arrays of the cache."""

    def run(context: Any, out: Any, *arrays: Any) -> None:
        del out
        _, ordinal = arrays[0].__dlpack_device__()
        method(parts[ordinal], stream_of(context), arrays)

    return run


def _call(parts: dict[int, Part], method: _Method, cache: KVCache) -> Int[Array, " 1"]:
    """A program that calls back and reads the cache, as XLA sees it."""
    return buffer_callback(_called(parts, method), _TOKEN)(*jax.tree.leaves(cache))


def _call_in_place(parts: dict[int, Part], method: _Method, cache: KVCache) -> tuple[KVCache, Int[Array, " 1"]]:
    """A program that calls back and changes the cache, as XLA sees it."""
    arrays, tree = jax.tree.flatten(cache)
    shapes = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in arrays]
    aliases = {i: i for i in range(len(arrays))}
    *arrays, token = buffer_callback(_called(parts, method), [*shapes, _TOKEN], input_output_aliases=aliases)(*arrays)
    return jax.tree.unflatten(tree, arrays), token


class PlainMemory:
    """Ordinary memory in place of ``PinnedMemory``, for devices whose memory is the machine's."""

    def __init__(self, num_bytes: int, unit: int, device: Any) -> None:
        del unit, device
        self._content = np.zeros(num_bytes, np.uint8)
        self.address, self.piece_bytes = self._content.ctypes.data, num_bytes

    def wait(self) -> None:
        pass  # it is ready at once

    def failure(self) -> None:
        return None


def memory_for(target: Target, *, is_streamed: bool = False) -> Callable[[jax.ShapeDtypeStruct, Program], HostMemory]:
    """The host memory of a target: makes it of its slots, and of the programs that move blocks.

    Args:
        target: target of the devices.
        is_streamed: whether steps stream slots, which then hold a block as the pool does.
    """
    if has_copy_engine(target):
        return PinnedSlots
    return partial(PinnedSlots, allocate=PlainMemory, new_copier=PlainCopier) if is_streamed else StagedMemory


def size_for(blocks: Sequence[object]) -> int:
    """The size of the program that moves so many blocks."""
    return next(size for size in MOVE_SIZES if size >= len(blocks))


def padded(ids: Sequence[int], padding: int) -> Int32[np.ndarray, " n"]:
    """The ids of blocks or slots, as the program that moves so many takes them."""
    padded = np.full(size_for(ids), padding, np.int32)
    padded[: len(ids)] = ids
    return padded


def _local_devices(slots: jax.ShapeDtypeStruct) -> list[Any]:
    """The devices of this process, in the order of the mesh."""
    assert isinstance(slots.sharding, jax.sharding.NamedSharding)
    mesh = slots.sharding.mesh
    assert isinstance(mesh, jax.sharding.Mesh)
    return [device for device in mesh.devices.flat if device.process_index == jax.process_index()]


def local_shape(slots: jax.ShapeDtypeStruct) -> tuple[int, ...]:
    """The part of the slots that one device holds."""
    assert slots.sharding is not None
    return slots.sharding.shard_shape(slots.shape)
