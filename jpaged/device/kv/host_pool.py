"""The host pool: blocks in host memory, asynchronous copies between them and the device pool, their rates."""

import itertools
import logging
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Int32

from jpaged.config import EngineConfig
from jpaged.contract.plan import BlockCopy
from jpaged.contract.profile import Direction, Link, Transferred, fit_link
from jpaged.device.kv.dma import DmaSlots
from jpaged.device.kv.host_memory import (
    MOVE_SIZES,
    Arrival,
    Copying,
    HostMemory,
    Moving,
    PinnedSlots,
    Program,
    StagedMemory,
    size_for,
)
from jpaged.device.kv.narrow_slots import NarrowSlots
from jpaged.device.kv.pool import KVCache
from jpaged.device.kv.stream import BlockStream
from jpaged.device.target import Target

log = logging.getLogger(__name__)

MAX_STAGED_BLOCKS = StagedMemory.most_staged
"""Most blocks that staged memory stages at once."""

_MOST_UNSEEN = 0.2  # share of a transfer's time in which its end may lie, to count as observed
_MOST_KEPT = 64  # transfers noted: a process that follows another one never takes them
_NUM_SCRATCH = MOVE_SIZES[-1]  # the first slots, which ``measure`` overwrites


@dataclass(slots=True, eq=False)
class _Transfer:
    """Blocks of one step in flight in one direction."""

    direction: Direction
    num_blocks: int
    started: float
    moving: list[Moving]
    has_waited: bool = False  # for a step or for another copy
    last_unready: float | None = None

    def is_over(self) -> bool:
        return all(moving.is_ready() for moving in self.moving)


class HostPool:
    """Blocks in host memory, sharded like the device pool.

    The copies of a step surround its forward pass: ``start`` before it, ``finish`` after it. Neither waits for the
    copies of this step, unless they exceed ``HostMemory.most_staged``. ``start`` waits for copies of earlier steps
    where the limit demands it.

    Args:
        slots: bits of the host's slots for blocks as one array: shape, dtype and device sharding. ``num_slots_for``
            says how many.
        memory: makes the host memory.
        program: compiled programs that move blocks, by kind and size.
        waiting: surrounds the wait of a step for the host's memory.

    Attributes:
        bytes_to_host, bytes_from_host: copied since the start, over all devices.
        stalled_s: seconds in which a step waited for copies, or for the host's memory.
    """

    def __init__(
        self,
        slots: jax.ShapeDtypeStruct,
        memory: Callable[[jax.ShapeDtypeStruct, Program], HostMemory],
        program: Program,
        waiting: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._memory = memory(slots, program)
        self._bytes_per_block = math.prod(slots.shape[1:]) * slots.dtype.itemsize
        self._in_flight: list[_Transfer] = []
        self._arriving: deque[Arrival] = deque()
        self._staged: deque[tuple[int, Any]] = deque()  # blocks, and an array that is ready when they are not staged
        self._is_there = False
        self._waiting = waiting
        self.bytes_to_host = 0
        self.bytes_from_host = 0
        self.stalled_s = 0.0
        self._over: deque[Transferred] = deque(maxlen=_MOST_KEPT)

    # A step -------------------------------------------------------------------------------------------------------

    def start(self, cache: KVCache, to_host: Sequence[BlockCopy], from_host: Sequence[BlockCopy]) -> KVCache:
        """Read the blocks that leave, and request the blocks that return. Call it before the step writes.

        Returns:
            The cache, which may already hold the first of many arrivals.
        """
        if not self._is_there:
            started = time.perf_counter()
            with self._waiting():
                self.wait()
            self.stalled_s += time.perf_counter() - started
        self.poll()
        self._store(cache, [BlockCopy(copy.src, copy.dst + _NUM_SCRATCH) for copy in to_host])
        cache = self._request(cache, [BlockCopy(copy.src + _NUM_SCRATCH, copy.dst) for copy in from_host])
        self.bytes_to_host += len(to_host) * self._bytes_per_block
        self.bytes_from_host += len(from_host) * self._bytes_per_block
        return cache

    def stream(self, stream: BlockStream, blocks: Int32[np.ndarray, " streamed"]) -> None:
        """Name the blocks that the program enqueued next streams. Call it after ``start``."""
        assert isinstance(self._memory, PinnedSlots | NarrowSlots | DmaSlots)  # others do not stream
        stream.load(self._memory.source(), blocks + _NUM_SCRATCH)
        self.bytes_from_host += len(blocks) * self._bytes_per_block

    def finish(self, cache: KVCache) -> KVCache:
        """Write the blocks that ``start`` requested into the cache. Call it once the forward pass is enqueued."""
        while self._arriving:
            cache = self._land(cache)
        return cache

    def wait(self) -> None:
        """Wait until the host's memory can be used, before the first copy.

        Raises:
            RuntimeError: it cannot be had.
        """
        self._memory.wait()
        self._is_there = True

    def failure(self) -> BaseException | None:
        """The error for which the host's memory cannot be had; None while it may come. Does not wait."""
        return None if self._is_there else self._memory.failure()

    def poll(self, *, has_waited: bool = False) -> None:
        """Release the copies that are over, without waiting, and note their times.

        Args:
            has_waited: whether this thread waited for a copy until now, and so saw the end of those that are over.
        """
        for transfer in self._in_flight[:]:
            if transfer.is_over():
                self._in_flight.remove(transfer)
                self._note(transfer, is_end_seen=has_waited)
            else:
                transfer.last_unready = time.perf_counter()

    def forget(self) -> None:
        """Drop the copies in flight after a failed step. No block may be read again before it is written."""
        if not self._memory.is_staged:
            for moving in itertools.chain.from_iterable(transfer.moving for transfer in self._in_flight):
                with suppress(RuntimeError):  # of the step that failed
                    moving.block_until_ready()  # it must not write to a pool that is gone
        self._in_flight.clear()
        self._arriving.clear()
        self._staged.clear()
        self._memory.forget()

    def _store(self, cache: KVCache, to_host: Sequence[BlockCopy]) -> None:
        pool: Any = cache.pool
        # A copy to the host reads what the steps before it write.
        has_waited = bool(self._in_flight) or not pool.is_ready()
        transfer = _Transfer("to_host", len(to_host), time.perf_counter(), [], has_waited)
        for batch in self._batches(to_host):
            if self._memory.is_staged:
                self._make_room(size_for(batch))
            moving = self._memory.store(cache, batch)
            transfer.moving.append(moving)
            if self._memory.is_staged:
                self._staged.append((size_for(batch), moving))
        if to_host:
            self._in_flight.append(transfer)

    def _request(self, cache: KVCache, from_host: Sequence[BlockCopy]) -> KVCache:
        transfer = _Transfer("from_host", len(from_host), time.perf_counter(), [])
        for batch in self._batches(from_host):
            if self._memory.is_staged:
                # By numbers alone: all processes run the same programs in the same order.
                while self._num_arriving() + size_for(batch) > self._memory.most_staged:
                    cache = self._land(cache)
                self._make_room(size_for(batch))
            arrival = self._memory.request(cache, batch)
            self._arriving.append(arrival)
            transfer.moving.append(arrival.moving)
        if from_host:
            self._in_flight.append(transfer)
        return cache

    def _batches(self, copies: Sequence[BlockCopy]) -> Iterator[Sequence[BlockCopy]]:
        """Divide copies into those of one call."""
        return itertools.batched(copies, MOVE_SIZES[-1] if self._memory.is_staged else max(len(copies), 1))

    def _land(self, cache: KVCache) -> KVCache:
        """Write the batch that was requested first."""
        arrival = self._arriving.popleft()
        cache, is_over = self._memory.land(cache, arrival)
        if self._memory.is_staged:
            self._staged.append((size_for(arrival.copies), is_over))
        return cache

    def _num_arriving(self) -> int:
        return sum(size_for(arrival.copies) for arrival in self._arriving)

    def _num_staged(self) -> int:
        while self._staged and self._staged[0][1].is_ready():
            self._staged.popleft()
        return self._num_arriving() + sum(num_blocks for num_blocks, _ in self._staged)

    def _make_room(self, num_blocks: int) -> None:
        """Wait for copies, the oldest first, until so many more blocks may be staged."""
        while self._staged and self._num_staged() + num_blocks > self._memory.most_staged:
            _, is_over = self._staged.popleft()
            started = time.perf_counter()
            jax.block_until_ready(is_over)
            self.stalled_s += time.perf_counter() - started
            self.poll(has_waited=True)

    # Rates --------------------------------------------------------------------------------------------------------

    def measure(self, cache: KVCache) -> tuple[KVCache, Link, Link]:
        """Measure the link by copying the first blocks to the host and back, a few times. Only block 0 may change.

        Returns:
            The cache, the link to the host, and the link from it.
        """
        self.wait()
        times = []
        for num_blocks in MOVE_SIZES:
            cache, *seconds = self._time_copies(cache, num_blocks)
            times.append((num_blocks * self._bytes_per_block, *seconds))
        (few, *few_s), (many, *many_s) = times
        to_host, from_host, together = (
            fit_link((few, short), (many, long), shared_bytes_per_s=0.0)
            for short, long in zip(few_s, many_s, strict=True)
        )
        shared = together.bytes_per_s
        return cache, replace(to_host, shared_bytes_per_s=shared), replace(from_host, shared_bytes_per_s=shared)

    def _time_copies(self, cache: KVCache, num_blocks: int) -> tuple[KVCache, float, float, float]:
        """Seconds of a copy to the host, of one from it, and of both at once: the best of a few."""
        # Most blocks that move are neighbours. Where blocks may come back rounded, block 0 stands for them.
        most = 1 if self._memory.is_staged else len(cache.pool)
        out = [BlockCopy(slot % most, slot) for slot in range(num_blocks)]
        back = [BlockCopy(slot, slot % most) for slot in range(num_blocks)]
        out_s, in_s, both_s = [], [], []
        for _ in range(4):
            jax.block_until_ready(cache.pool)
            started = time.perf_counter()
            self._memory.store(cache, out).block_until_ready()
            out_s.append(time.perf_counter() - started)
            cache = self._time_arrivals(cache, back, in_s)
            self._memory.store(cache, out)
            cache = self._time_arrivals(cache, back, both_s)
        return cache, min(out_s), min(in_s), min(both_s)

    def _time_arrivals(self, cache: KVCache, copies: list[BlockCopy], times: list[float]) -> KVCache:
        """Append the seconds in which blocks arrive and are written."""
        started = time.perf_counter()
        for batch in self._batches(copies):
            cache, is_over = self._memory.land(cache, self._memory.request(cache, batch))
            jax.block_until_ready(is_over)
        times.append(time.perf_counter() - started)
        return cache

    def take_transfers(self) -> list[Transferred]:
        """The transfers that are over, since the last call."""
        over = list(self._over)
        self._over.clear()
        return over

    def _note(self, transfer: _Transfer, *, is_end_seen: bool) -> None:
        """Note a transfer that is over. The time is an upper bound if it ended long before, or waited for others.

        A copy engine tells the time itself, without what the copies waited for.
        """
        num_bytes, now = transfer.num_blocks * self._bytes_per_block, time.perf_counter()
        seconds, is_observed = now - transfer.started, is_end_seen
        if not is_observed and transfer.last_unready is not None:
            is_observed = now - transfer.last_unready < _MOST_UNSEEN * seconds
        is_observed = is_observed and not transfer.has_waited
        if isinstance(copying := transfer.moving[0], Copying):
            seconds, is_observed = copying.seconds(), True
        self._over.append(Transferred(transfer.direction, num_bytes, seconds, is_observed))


def num_slots_for(num_blocks: int) -> int:
    """Slots of a host pool of so many blocks."""
    return num_blocks + _NUM_SCRATCH


# Sizes ------------------------------------------------------------------------------------------------------------


def free_machine_bytes() -> int:
    """Bytes that a pool may take of the free memory, of the machine or of the container.

    A tenth of the free memory is left for loading and compiling.
    """
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            name, _, amount = line.partition(":")
            if name == "MemAvailable":
                free = int(amount.split()[0]) * 1024
    limit, used = (Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current"))
    if limit.exists() and used.exists() and limit.read_text().strip() != "max":
        free = min(free, max(int(limit.read_text()) - int(used.read_text()), 0))
    return free * 9 // 10


def has_host_pool(config: EngineConfig, target: Target) -> bool:
    """Whether the settings ask for a host pool or, by default, have a use for one.

    Where the pool lies in the machine's memory already, only "swap" and the streaming of KV have.
    """
    if config.num_host_blocks is not None or config.host_memory_bytes is not None:
        return bool(config.num_host_blocks or config.host_memory_bytes)
    if config.kv_placement != "device":
        return True
    has_use = config.enable_prefix_caching or config.preemption != "recompute"
    return has_use if target.has_own_memory else config.preemption == "swap"


def agreed_pool(pool: HostPool | None, gather: Callable[[str | None], list[str | None]]) -> HostPool | None:
    """The host pool, if all processes have theirs: a process without it could not take part in a step that copies.

    Waits until the memory of each can be used. The log of every process says which of them has none, and why.

    Args:
        pool: this process's.
        gather: returns the values of all processes, in order; see ``Channel.gather``.
    """
    reason = None
    try:
        if pool is not None:
            pool.wait()
    except RuntimeError as error:
        reason = str(error)
    failures = [f"process {number}: {each}" for number, each in enumerate(gather(reason)) if each is not None]
    if not failures:
        return pool
    log.error("there is no host pool, and preempted requests are computed again: %s", "; ".join(failures))
    return None


def num_host_blocks_for(config: EngineConfig, target: Target, bytes_per_block: int, *, useful_blocks: int) -> int:
    """The size of the host pool.

    Args:
        config: the engine's settings.
        target: target of the devices.
        bytes_per_block: bytes of one block, over this process's devices.
        useful_blocks: most blocks that are taken by default.

    Raises:
        ValueError: a pool that does not fit the machine's memory, or memory that holds no block.
    """
    if not has_host_pool(config, target):
        return 0
    free = free_machine_bytes()
    wanted, wanted_bytes = config.num_host_blocks, config.host_memory_bytes
    if wanted is None and wanted_bytes is None:
        num_blocks = min(min(target.host_pool_bytes, free // 2) // bytes_per_block, useful_blocks)
        needing = {"preemption": ("swap",), "kv_placement": ("host", "auto")}
        for name, values in needing.items():
            if num_blocks == 0 and (value := getattr(config, name)) in values:
                raise ValueError(
                    f"{name}={value!r} needs a host pool, and the {free:,} bytes free on this machine leave no room "
                    f"for blocks of {bytes_per_block:,}: free some, or use another {name}"
                )
        return num_blocks
    num_blocks = wanted if wanted is not None else (wanted_bytes or 0) // bytes_per_block
    asked = f"num_host_blocks={wanted}" if wanted is not None else f"host_memory_bytes={wanted_bytes:,}"
    if num_blocks == 0:
        raise ValueError(f"{asked} holds no block of {bytes_per_block:,} bytes: give more, or 0 for no host pool")
    if num_blocks * bytes_per_block > free:
        raise ValueError(
            f"{asked} does not fit: {num_blocks:,} blocks x {bytes_per_block:,} bytes = "
            f"{num_blocks * bytes_per_block:,}, and {free:,} bytes of the machine's memory are free: "
            f"at most {free // bytes_per_block:,} blocks would"
        )
    return num_blocks
