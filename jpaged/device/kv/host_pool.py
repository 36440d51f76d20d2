"""The host pool: blocks in pinned host memory, asynchronous copies between them and the device pool, their cost."""

import dataclasses
import itertools
import math
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jpaged.config import EngineConfig
from jpaged.contract.costs import Costs
from jpaged.contract.plan import BlockCopy
from jpaged.device.kv.pool import KVCache
from jpaged.device.target import Target
from jpaged.sharding import block_spec

Block = Float[Array, "num_layers 2 num_kv_heads block_size head_dim"]

MOVE_SIZES = (4, 32)
"""Numbers of blocks that a program gathers or scatters; fewer blocks are padded with block 0."""

MAX_STAGED_BLOCKS = 2 * MOVE_SIZES[-1]
"""Most blocks in flight in each direction, staged in device memory: one batch is copied while the next is gathered."""

_MIN_S = 1e-9  # an observation scales a cost, so a cost of zero would never change
_WEIGHT = 0.2  # weight of an observation in the average
_MAX_GROWTH = 4.0  # a process that was stopped for a while must not make a cost a thousandfold


@dataclass(slots=True, eq=False)
class _Transfer:
    """Blocks of one step in flight in one direction. ``arrays`` are their destinations."""

    cost: Literal["to_host_block_s", "from_host_block_s"]
    num_blocks: int
    started: float
    arrays: list[Any]  # Blocks, whose stub lacks is_ready

    @property
    def is_arrival(self) -> bool:
        return self.cost == "from_host_block_s"

    def is_over(self) -> bool:
        return all(array.is_ready() for array in self.arrays)


class HostPool:
    """Blocks in pinned host memory, each an array of its own, sharded like the device pool.

    The copies of a step surround its forward pass: ``start`` before it, ``finish`` after it. Neither waits for the
    copies of this step, unless they exceed ``MAX_STAGED_BLOCKS``. ``start`` waits for copies of earlier steps where
    the limit or arrivals demand it.

    Args:
        num_blocks: host blocks, allocated here. Later writes replace arrays, and JAX's allocator recycles their memory.
            Registering new pinned memory would cost as much as copying 20 times the bytes.
        block: shape, type and device sharding of one block.
        program: compiled ``KVCache.gather`` and ``KVCache.scatter`` by ("gather" or "scatter", size).

    Attributes:
        bytes_to_host, bytes_from_host: copied since the start, over all devices.
        stalled_s: seconds in which a step waited for copies.
        costs: measured costs of copies and prefills, kept current; None until ``measure``.
    """

    def __init__(self, num_blocks: int, block: jax.ShapeDtypeStruct, program: Callable[[tuple], jax.stages.Compiled]):
        assert block.sharding is not None
        self._device_sharding = block.sharding
        self._host_sharding = block.sharding.with_memory_kind("pinned_host")
        self._program = program
        self._bytes_per_block = math.prod(block.shape) * block.dtype.itemsize
        zeros = jnp.zeros(block.shape, block.dtype, device=self._device_sharding)
        self._slots = jax.block_until_ready(jax.device_put([zeros] * num_blocks, self._host_sharding))
        self._in_flight: list[_Transfer] = []
        self._arriving: deque[tuple[tuple[BlockCopy, ...], list[Block]]] = deque()
        self.bytes_to_host = 0
        self.bytes_from_host = 0
        self.stalled_s = 0.0
        self.costs: Costs | None = None

    # A step -------------------------------------------------------------------------------------------------------

    def start(self, cache: KVCache, to_host: Sequence[BlockCopy], from_host: Sequence[BlockCopy]) -> KVCache:
        """Read the blocks that leave, and request the blocks that return. Call it before the step writes.

        Returns:
            The cache, which may already hold the first of many arrivals.
        """
        self._wait_for_earlier(cache, len(to_host), is_for_arrivals=bool(from_host))
        self._store(cache, to_host)
        cache = self._request(cache, from_host)
        self.bytes_to_host += len(to_host) * self._bytes_per_block
        self.bytes_from_host += len(from_host) * self._bytes_per_block
        return cache

    def finish(self, cache: KVCache) -> KVCache:
        """Write the blocks that ``start`` requested into the cache. Call it once the forward pass is enqueued."""
        while self._arriving:
            cache = self._land(cache)
        return cache

    def poll(self) -> None:
        """Release the copies that are over, without waiting."""
        for transfer in [transfer for transfer in self._in_flight if transfer.is_over()]:
            self._in_flight.remove(transfer)
            self._learn(transfer, is_end_seen=False)

    def forget(self) -> None:
        """Drop the copies in flight after a failed step. No slot may be read again before it is written."""
        self._in_flight.clear()
        self._arriving.clear()

    def _store(self, cache: KVCache, to_host: Sequence[BlockCopy]) -> None:
        transfer = _Transfer("to_host_block_s", len(to_host), time.perf_counter(), [])
        for batch in itertools.batched(to_host, MOVE_SIZES[-1]):
            self._stall(transfer.arrays[: MOVE_SIZES[-1] - MAX_STAGED_BLOCKS])
            stored = self._send(cache, [copy.src for copy in batch])
            transfer.arrays += stored
            for copy, block in zip(batch, stored, strict=True):
                self._slots[copy.dst] = block
        if to_host:
            self._in_flight.append(transfer)

    def _request(self, cache: KVCache, from_host: Sequence[BlockCopy]) -> KVCache:
        transfer = _Transfer("from_host_block_s", len(from_host), time.perf_counter(), [])
        for batch in itertools.batched(from_host, MOVE_SIZES[-1]):
            if len(transfer.arrays) + len(batch) > MAX_STAGED_BLOCKS:
                oldest = transfer.arrays[: MOVE_SIZES[-1]]
                del transfer.arrays[: MOVE_SIZES[-1]]
                self._stall(oldest)
                cache = self._land(cache)
            blocks = jax.device_put([self._slots[copy.src] for copy in batch], self._device_sharding)
            transfer.arrays += blocks
            self._arriving.append((batch, blocks))
        if from_host:
            self._in_flight.append(transfer)
        return cache

    def _send(self, cache: KVCache, blocks: Sequence[int]) -> list[Block]:
        """Send device blocks to the host, without their padding."""
        ids = _padded_ids(blocks)
        gathered = self._program(("gather", len(ids)))(cache, ids)
        return jax.device_put(gathered[: len(blocks)], self._host_sharding)

    def _land(self, cache: KVCache) -> KVCache:
        """Write the batch that was requested first."""
        batch, blocks = self._arriving.popleft()
        ids = _padded_ids([copy.dst for copy in batch])
        padding = [blocks[0]] * (len(ids) - len(blocks))
        return self._program(("scatter", len(ids)))(cache, ids, [*blocks, *padding])

    def _wait_for_earlier(self, cache: KVCache, num_blocks: int, *, is_for_arrivals: bool) -> None:
        """Wait for copies of earlier steps, the oldest first, until so many more blocks may be staged.

        Arrivals stay staged until they are written. So a step with arrivals waits for all copies, and so does the next.
        """
        is_for_all = is_for_arrivals or any(transfer.is_arrival for transfer in self._in_flight)
        num_staged = sum(len(transfer.arrays) for transfer in self._in_flight)
        if not self._in_flight:
            return
        while self._in_flight and (is_for_all or num_staged + num_blocks > MAX_STAGED_BLOCKS):
            transfer = self._in_flight.pop(0)
            num_staged -= len(transfer.arrays)
            is_end_seen = not transfer.is_over()
            self._stall(transfer.arrays)
            self._learn(transfer, is_end_seen=is_end_seen)
        if is_for_all:
            self._stall([cache.pool])

    def _stall(self, arrays: Sequence[Array]) -> None:
        started = time.perf_counter()
        jax.block_until_ready(arrays)
        self.stalled_s += time.perf_counter() - started

    # Costs --------------------------------------------------------------------------------------------------------

    def measure(self, cache: KVCache, *, prefill_token_s: float) -> None:
        """Measure ``costs`` by copying block 0 to the host and back, a few times. Neither pool changes."""
        few, many = 1, MOVE_SIZES[-1]
        (few_out_s, few_in_s), (many_out_s, many_in_s) = (self._time_copies(cache, n) for n in (few, many))
        to_host_block_s = max((many_out_s - few_out_s) / (many - few), _MIN_S)
        from_host_block_s = max((many_in_s - few_in_s) / (many - few), _MIN_S)
        fixed_s = (few_out_s - to_host_block_s + few_in_s - from_host_block_s) / 2
        self.costs = Costs(max(fixed_s, _MIN_S), to_host_block_s, from_host_block_s, max(prefill_token_s, _MIN_S))

    def _time_copies(self, cache: KVCache, num_blocks: int) -> tuple[float, float]:
        """Seconds of a copy to the host, and from it: the best of a few, since the first one allocates."""
        out_s, in_s = [], []
        for _ in range(4):
            jax.block_until_ready(cache.pool)
            started = time.perf_counter()
            on_host = jax.block_until_ready(self._send(cache, [0] * num_blocks))
            sent = time.perf_counter()
            jax.block_until_ready(jax.device_put(on_host, self._device_sharding))
            in_s.append(time.perf_counter() - sent)
            out_s.append(sent - started)
        return min(out_s), min(in_s)

    def learn_prefill(self, num_tokens: int, seconds: float) -> None:
        """Learn from the time of a large step."""
        if self.costs is not None:
            token_s = _average(self.costs.prefill_token_s, seconds / num_tokens)
            self.costs = dataclasses.replace(self.costs, prefill_token_s=token_s)

    def _learn(self, transfer: _Transfer, *, is_end_seen: bool) -> None:
        """Learn from a transfer that is over. If its end was not observed, the time is an upper bound."""
        if self.costs is None:
            return
        block_s = getattr(self.costs, transfer.cost)
        expected_s = self.costs.transfer_s + transfer.num_blocks * block_s
        observed = block_s * (time.perf_counter() - transfer.started) / expected_s
        block_s = _average(block_s, observed) if is_end_seen else min(block_s, observed)
        self.costs = dataclasses.replace(self.costs, **{transfer.cost: max(block_s, _MIN_S)})


def _average(old: float, new: float) -> float:
    return old + _WEIGHT * (min(new, _MAX_GROWTH * old) - old)


def _padded_ids(blocks: Sequence[int]) -> np.ndarray:
    """Pad block ids with block 0 up to the size of a program."""
    ids = np.zeros(next(size for size in MOVE_SIZES if size >= len(blocks)), np.int32)
    ids[: len(blocks)] = blocks
    return ids


def block_sharding(mesh: jax.sharding.Mesh) -> jax.sharding.NamedSharding:
    """The sharding of one block on the devices: that of the pool, without the axis that numbers blocks."""
    return jax.sharding.NamedSharding(mesh, block_spec())


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

    Where the pool lies in the machine's memory already, only "swap" has.
    """
    if config.num_host_blocks is not None or config.host_memory_bytes is not None:
        return bool(config.num_host_blocks or config.host_memory_bytes)
    has_use = config.enable_prefix_caching or config.preemption != "recompute"
    return has_use if target.has_own_memory else config.preemption == "swap"


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
        if num_blocks == 0 and config.preemption == "swap":
            raise ValueError(
                f"preemption='swap' needs a host pool, and the {free:,} bytes free on this machine leave no room for "
                f"blocks of {bytes_per_block:,}: free some, or use preemption='recompute'"
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
