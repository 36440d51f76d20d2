"""Slots for blocks in host memory, and the ways between them and the device pool: one interface, two ways.

A GPU reads and writes host memory itself (``MappedMemory``). Elsewhere blocks are staged (``StagedMemory``).
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jaxtyping import Array, Int32

from jpaged.contract.plan import BlockCopy
from jpaged.device.kv.pinned import PinnedMemory, why_no_pinned_memory
from jpaged.device.kv.pool import Blocks, KVCache
from jpaged.device.target import Target

MOVE_SIZES = (4, 32)
"""Numbers of blocks that a program moves; fewer blocks are padded."""

Program = Callable[[tuple], Callable[..., Any]]


def has_mapped_memory(target: Target) -> bool:
    """Whether devices of this target address the host memory of this process."""
    return target.addresses_host_memory and why_no_pinned_memory() is None


@dataclass(slots=True, eq=False)
class Arrival:
    """Blocks on their way to the device pool.

    Args:
        copies: their slots and their blocks.
        staged: the blocks in device memory, or on their way to it; None if a program reads them from host memory.
    """

    copies: tuple[BlockCopy, ...]
    staged: Blocks | None = None


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
        stages_stores: whether blocks on their way to the host take device memory.
    """

    stages_stores: bool

    def store(self, cache: KVCache, copies: Sequence[BlockCopy]) -> Array:
        """Copy at most ``MOVE_SIZES[-1]`` blocks (src) to slots (dst).

        Returns:
            An array that is ready when the device has read the blocks, and the slots of ``MappedMemory`` hold them.
        """
        ...

    def batches(self, copies: Sequence[BlockCopy], room: int) -> Iterator[tuple[tuple[BlockCopy, ...], bool]]:
        """Divide copies of slots (src) to blocks (dst) into batches of one program, and say which are staged.

        Args:
            copies: the copies.
            room: blocks that may be staged without waiting.
        """
        ...

    def request(self, copies: tuple[BlockCopy, ...], *, is_staged: bool) -> Arrival:
        """Begin to copy a batch."""
        ...

    def land(self, cache: KVCache, arrival: Arrival) -> tuple[KVCache, Array]:
        """Write a batch into the cache, which is donated.

        Returns:
            The cache, and an array that is ready when the batch is written.
        """
        ...

    def source(self) -> Source:
        """The slots as programs of the one device read them, once ``settle`` was called."""
        ...

    def settle(self) -> None:
        """Make slots hold, for the programs that are enqueued next, what was stored."""
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


class StagedMemory:
    """Slots in ordinary host memory, one array for each device; JAX copies blocks through staging arrays.

    Args:
        slots: bits of all slots as one array: shape, dtype, and sharding over the devices.
        program: compiled programs by key: ("gather", size) and ("scatter", size).
    """

    stages_stores = True

    def __init__(self, slots: jax.ShapeDtypeStruct, program: Program) -> None:
        assert slots.sharding is not None
        self._shape, self._sharding = slots.shape, slots.sharding
        self._program = program
        local_shape = _local_shape(slots)
        self._slots = {device: np.zeros(local_shape, slots.dtype) for device in _local_devices(slots)}
        self._leaving: list[tuple[list[int], Any]] = []  # in the order in which they are to be written

    def store(self, cache: KVCache, copies: Sequence[BlockCopy]) -> Array:
        self._settle(0)
        blocks = self._program(("gather", size_for(copies)))(cache, _padded([copy.src for copy in copies], 0))
        blocks = jax.device_put(blocks, self._sharding.with_memory_kind("pinned_host"))
        self._leaving.append(([copy.dst for copy in copies], blocks))
        return blocks

    def batches(self, copies: Sequence[BlockCopy], room: int) -> Iterator[tuple[tuple[BlockCopy, ...], bool]]:
        del room
        for batch in itertools.batched(copies, MOVE_SIZES[-1]):
            yield batch, True

    def request(self, copies: tuple[BlockCopy, ...], *, is_staged: bool) -> Arrival:
        del is_staged  # all batches are
        slots = [copy.src for copy in copies]
        awaited = [number for number, (stored, _) in enumerate(self._leaving, 1) if not set(stored).isdisjoint(slots)]
        self._settle(max(awaited, default=0))
        padded = _padded(slots, slots[0])
        # Indexing copies: a later store does not change what is in flight.
        parts = [jax.device_put(array[padded], device) for device, array in self._slots.items()]
        shape = (len(padded), *self._shape[1:])
        return Arrival(copies, jax.make_array_from_single_device_arrays(shape, self._sharding, parts))

    def land(self, cache: KVCache, arrival: Arrival) -> tuple[KVCache, Array]:
        return _scatter(self._program, cache, arrival)

    def source(self) -> Source:
        [slots] = self._slots.values()
        return Source(slots.ctypes.data, slots[0].nbytes, len(slots))

    def settle(self) -> None:
        self._settle(len(self._leaving))

    def forget(self) -> None:
        self._leaving.clear()

    def wait(self) -> None:
        pass  # it is ready at once

    def _settle(self, least: int) -> None:
        """Write blocks that left into their slots: the first ``least`` batches, and those after them that are ready."""
        while self._leaving and (least > 0 or self._leaving[0][1].is_ready()):
            slots, blocks = self._leaving.pop(0)
            for shard in blocks.addressable_shards:
                self._slots[shard.device][slots] = np.asarray(shard.data)[: len(slots)]
            least -= 1


class MappedMemory:
    """Slots in pinned memory that GPUs address themselves.

    Programs write to it in place. Runs of slots come back by the copy engine, beside running programs. Scattered
    slots, and slots that are still being written, come back by a program.

    Args:
        slots: as ``StagedMemory`` takes it.
        program: compiled programs by key: ("to_host", size), ("from_host", size) and ("scatter", size).
        allocate: makes the memory of one device: of bytes, unit, device.
    """

    stages_stores = False

    def __init__(
        self,
        slots: jax.ShapeDtypeStruct,
        program: Program,
        allocate: Callable[[int, int, Any], PinnedMemory] = PinnedMemory,
    ) -> None:
        self._shape, self._sharding, self._itemsize = slots.shape, slots.sharding, slots.dtype.itemsize
        self._local_shape, devices = _local_shape(slots), _local_devices(slots)
        self._program = program
        self._slot_bytes = math.prod(self._local_shape[1:]) * self._itemsize
        num_bytes = self._shape[0] * self._slot_bytes
        self._memories = {device: allocate(num_bytes, self._slot_bytes, device) for device in devices}
        self._slots_per_piece = self._memories[devices[0]].piece_bytes // self._slot_bytes
        self._slots = self._map()
        self._checked: set[int] = set()  # sizes of programs that were seen to write in place
        self._storing: list[tuple[frozenset[int], Any]] = []

    def store(self, cache: KVCache, copies: Sequence[BlockCopy]) -> Array:
        src, dst = [copy.src for copy in copies], [copy.dst for copy in copies]
        program = self._program(("to_host", size_for(copies)))
        self._slots, is_over = program(self._slots, cache, _padded(src, 0), _padded(dst, self._shape[0]))
        if size_for(src) not in self._checked:
            self._check_in_place()
            self._checked.add(size_for(src))
        self._storing = [(slots, array) for slots, array in self._storing if not array.is_ready()]
        self._storing.append((frozenset(dst), is_over))
        return is_over

    def batches(self, copies: Sequence[BlockCopy], room: int) -> Iterator[tuple[tuple[BlockCopy, ...], bool]]:
        if jax.process_count() > 1:
            room = 0  # what is ready here may not be ready elsewhere, and all processes are to run the same programs
        self._storing = [(slots, is_over) for slots, is_over in self._storing if not is_over.is_ready()]
        written = frozenset[int]().union(*(slots for slots, _ in self._storing))
        scattered = [copy for copy in copies if copy.src in written]
        for run in _runs([copy for copy in copies if copy.src not in written], self._slots_per_piece):
            start = 0
            for size in reversed(MOVE_SIZES):
                while min(len(run) - start, room) >= size:
                    yield tuple(run[start : start + size]), True
                    start += size
                    room -= size
            scattered += run[start:]
        for batch in itertools.batched(scattered, MOVE_SIZES[-1]):
            yield batch, False

    def request(self, copies: tuple[BlockCopy, ...], *, is_staged: bool) -> Arrival:
        if not is_staged:
            return Arrival(copies)
        shape, start = (len(copies), *self._local_shape[1:]), copies[0].src * self._slot_bytes
        parts = [
            jax.device_put(
                memory.array(start, shape, self._itemsize, on_device=False),
                jax.sharding.SingleDeviceSharding(device, memory_kind="device"),
            )
            for device, memory in self._memories.items()
        ]
        shape = (len(copies), *self._shape[1:])
        return Arrival(copies, jax.make_array_from_single_device_arrays(shape, self._sharding, parts))

    def land(self, cache: KVCache, arrival: Arrival) -> tuple[KVCache, Array]:
        if arrival.staged is not None:
            return _scatter(self._program, cache, arrival)
        src, dst = [copy.src for copy in arrival.copies], [copy.dst for copy in arrival.copies]
        return self._program(("from_host", size_for(src)))(cache, _padded(dst, 0), self._slots, _padded(src, src[0]))

    def source(self) -> Source:
        [memory] = self._memories.values()
        return Source(memory.address, self._slot_bytes, self._slots_per_piece)

    def settle(self) -> None:
        pass  # programs that store run before those that are enqueued next

    def forget(self) -> None:
        self._storing.clear()
        self._slots = self._map()  # a program that failed may have taken the array with it

    def wait(self) -> None:
        for memory in self._memories.values():
            memory.wait()

    def _map(self) -> Blocks:
        """All slots as one array of the devices."""
        memories = self._memories.values()
        parts = [memory.array(0, self._local_shape, self._itemsize, on_device=True) for memory in memories]
        return jax.make_array_from_single_device_arrays(self._shape, self._sharding, parts)

    def _check_in_place(self) -> None:
        """Check that the last program wrote to the memory itself: copies from it would read nothing otherwise.

        Raises:
            RuntimeError: it wrote elsewhere.
        """
        parts = {shard.device: shard.data for shard in self._slots.addressable_shards}
        if not all(memory.holds(parts[device]) for device, memory in self._memories.items()):
            raise RuntimeError(
                "this version of JAX does not write to donated host memory in place: use num_host_blocks=0"
            )


def memory_for(target: Target) -> Callable[[jax.ShapeDtypeStruct, Program], HostMemory]:
    """The host memory of a target: makes it of its slots, and of the programs that move blocks."""
    return MappedMemory if has_mapped_memory(target) else StagedMemory


def _scatter(program: Program, cache: KVCache, arrival: Arrival) -> tuple[KVCache, Array]:
    assert arrival.staged is not None
    blocks = _padded([copy.dst for copy in arrival.copies], 0)
    return program(("scatter", len(blocks)))(cache, blocks, arrival.staged)


def _runs(copies: Sequence[BlockCopy], slots_per_piece: int) -> Iterator[list[BlockCopy]]:
    """Divide copies, in the order of their slots, into runs of slots side by side in one piece of memory."""
    run: list[BlockCopy] = []
    for copy in sorted(copies, key=lambda copy: copy.src):
        if run and (copy.src != run[-1].src + 1 or copy.src % slots_per_piece == 0):
            yield run
            run = []
        run.append(copy)
    if run:
        yield run


def size_for(blocks: Sequence[object]) -> int:
    """The size of the program that moves so many blocks."""
    return next(size for size in MOVE_SIZES if size >= len(blocks))


def _padded(ids: Sequence[int], padding: int) -> Int32[np.ndarray, " n"]:
    padded = np.full(size_for(ids), padding, np.int32)
    padded[: len(ids)] = ids
    return padded


def _local_devices(slots: jax.ShapeDtypeStruct) -> list[Any]:
    """The devices of this process, in the order of the mesh."""
    assert isinstance(slots.sharding, jax.sharding.NamedSharding)
    mesh = slots.sharding.mesh
    assert isinstance(mesh, jax.sharding.Mesh)
    return [device for device in mesh.devices.flat if device.process_index == jax.process_index()]


def _local_shape(slots: jax.ShapeDtypeStruct) -> tuple[int, ...]:
    """The part of the slots that one device holds."""
    assert slots.sharding is not None
    return slots.sharding.shard_shape(slots.shape)
