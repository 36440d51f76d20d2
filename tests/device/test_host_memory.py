"""Slots in host memory: whatever is in flight, a slot is read as it was stored last, in either kind of memory."""

from dataclasses import dataclass
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jpaged.contract.plan import BlockCopy
from jpaged.contract.profile import Transferred
from jpaged.device.kv import host_memory
from jpaged.device.kv.copy_engine import Copies, PlainCopier, Timed
from jpaged.device.kv.host_memory import PinnedSlots, StagedMemory
from jpaged.device.kv.host_pool import HostPool, num_slots_for
from jpaged.device.kv.narrow_slots import for_narrow_blocks
from jpaged.device.kv.pool import KVCache
from jpaged.device.target import TARGETS
from jpaged.sharding import pool_sharding
from tests.support import tiny

NUM_BLOCKS, NUM_SLOTS = 80, 96
SLOTS_PER_PIECE = 40
DIRECTIONS = "to_host", "from_host"

plain_start = PlainCopier.start


class LateCopier:
    """Stands for a copy engine: copies start when a test says so, or when a program waits for them."""

    def __init__(self) -> None:
        self.waiting: list[tuple[int, Copies, Late]] = []

    def start(self, stream: int | None, buffer: int, copies: Copies) -> None:
        self.start_timed(stream, buffer, copies)

    def start_timed(self, stream: int | None, buffer: int, copies: Copies) -> Timed:
        self.waiting.append((buffer, copies, late := Late(self)))
        return late

    def wait(self, stream: int | None, buffer: int) -> None:
        numbers = [number for number, (other, _, _) in enumerate(self.waiting, 1) if other == buffer]
        self.end(max(numbers, default=0))

    def finish(self) -> None:
        self.end(len(self.waiting))

    def end(self, num_starts: int) -> None:
        """Run the oldest copies, in order."""
        for _, copies, late in self.waiting[:num_starts]:
            PlainCopier().start(None, 0, copies)
            late.has_ended = True
        del self.waiting[:num_starts]


@dataclass
class Late:
    """Copies of a ``LateCopier``."""

    copier: LateCopier
    has_ended: bool = False

    def is_over(self) -> bool:
        return self.has_ended

    def wait(self) -> None:
        self.copier.end(len(self.copier.waiting))

    def seconds(self) -> float:
        assert self.has_ended
        return 2.0


class MemoryOfTheCpu:
    """Stands for ``PinnedMemory``."""

    def __init__(self, num_bytes: int, unit: int, device: object) -> None:
        self.piece_bytes = SLOTS_PER_PIECE * unit
        self.content = np.zeros(num_bytes, np.uint8)
        self.address = self.content.ctypes.data

    def wait(self) -> None:
        pass


@pytest.fixture(scope="module")
def runner():
    return tiny.make_runner(jnp.bfloat16, num_blocks=NUM_BLOCKS, num_host_blocks=0)


@pytest.fixture(scope="module")
def narrow_runner():
    return tiny.make_runner(jnp.bfloat16, num_blocks=NUM_BLOCKS, num_host_blocks=0, offload_dtype="int8")


def make_pool(kind: str, runner, *, is_narrow: bool = False) -> Any:
    copiers: list[LateCopier] = []

    def new_copier() -> LateCopier:
        copiers.append(LateCopier())
        return copiers[-1]

    def memory(slots, program) -> Any:
        if kind == "staged":
            return StagedMemory(slots, program)
        return PinnedSlots(slots, program, MemoryOfTheCpu, new_copier)  # pyright: ignore

    made = for_narrow_blocks(memory) if is_narrow else memory
    pool: Any = HostPool(runner.programs.abstract_blocks(NUM_SLOTS), made, runner.programs.get)
    pool.copiers = copiers
    return pool


def random_cache(runner, seed: int) -> KVCache:
    shape = runner.programs.abstract_cache().pool.shape
    return KVCache(jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32), jnp.bfloat16))


def bits(cache: KVCache) -> np.ndarray:
    return np.array(cache.pool).view(np.uint16)


blocks = st.lists(st.integers(1, NUM_BLOCKS - 1), unique=True, max_size=50)
runs = st.tuples(st.integers(1, NUM_BLOCKS - 40), st.integers(1, 40)).map(lambda run: list(range(run[0], sum(run))))


@st.composite
def moves(draw):
    """Blocks that leave to slots side by side or apart, and slots that return."""
    out, back = draw(blocks), draw(blocks)
    slots = draw(st.one_of(runs, blocks)) or [1]
    to_host = tuple(BlockCopy(block, slot % 64) for block, slot in zip(out, slots, strict=False))
    to_host = tuple({copy.dst: copy for copy in to_host}.values())
    slots = draw(st.one_of(runs, blocks))
    from_host = tuple(BlockCopy(slot % 64, block) for slot, block in zip(slots, back, strict=False))
    return to_host, from_host


@pytest.mark.parametrize("kind", ["staged", "pinned"])
@settings(max_examples=60)
@given(plans=st.lists(st.tuples(moves(), st.integers(0, 4)), max_size=6))
def test_blocks_come_back_as_they_left(runner, kind, plans):
    check_moves(make_pool(kind, runner), random_cache(runner, 1), plans)


@pytest.mark.parametrize("kind", ["staged", "pinned"])
@settings(max_examples=60)
@given(plans=st.lists(st.tuples(moves(), st.integers(0, 4)), max_size=6))
def test_blocks_of_8_bits_come_back_once_rounded_however_often_they_move(narrow_runner, kind, plans):
    pool = make_pool(kind, narrow_runner, is_narrow=True)
    check_moves(pool, random_cache(narrow_runner, 1), plans, rounded)


def rounded(blocks: np.ndarray) -> np.ndarray:
    """The bits of blocks whose values are whole multiples of a power of two for each head, at most 127 of them."""
    values = np.asarray(blocks.view(jnp.bfloat16), np.float64)
    steps = 2.0 ** np.ceil(np.log2(np.maximum(np.abs(values).max(axis=(-2, -1), keepdims=True), 1e-30) / 127))
    return np.asarray(np.round(values / steps) * steps + 0.0, jnp.bfloat16).view(np.uint16)  # int8 has one zero


def check_moves(pool: Any, cache: KVCache, plans: Any, stored_as: Any = lambda blocks: blocks) -> None:
    """Run plans, some copies late, and compare every block with those that numpy moves."""
    expected, stored = bits(cache), np.zeros((64, *cache.pool.shape[1:]), np.uint16)
    for (to_host, from_host), num_ended in plans:
        cache = pool.start(cache, to_host, from_host)
        for copy in to_host:
            stored[copy.dst] = stored_as(expected[copy.src])
        cache = pool.finish(cache)
        for copy in from_host:
            expected[copy.dst] = stored[copy.src]
        jax.block_until_ready(cache.pool)
        for copier in pool.copiers:
            copier.end(num_ended)
        pool.poll()
    np.testing.assert_array_equal(bits(cache)[1:], expected[1:])


@pytest.mark.parametrize("is_narrow", [False, True])
@pytest.mark.parametrize("kind", ["staged", "pinned"])
def test_forgotten_memory_is_written_again(runner, narrow_runner, kind, is_narrow):
    runner = narrow_runner if is_narrow else runner
    pool, cache = make_pool(kind, runner, is_narrow=is_narrow), random_cache(runner, 1)
    pool.start(cache, [BlockCopy(1, 0)], ())
    pool.forget()
    cache = pool.start(cache, [BlockCopy(2, 0)], ())
    expected = rounded(bits(cache)[2]) if is_narrow else bits(cache)[2]
    cache = pool.finish(pool.start(cache, (), [BlockCopy(0, 9)]))
    np.testing.assert_array_equal(bits(cache)[9], expected)


def test_no_copy_is_in_flight_once_it_is_forgotten(runner):
    """The pool that it would write to is deleted next."""
    pool, cache = make_pool("pinned", runner), random_cache(runner, 1)
    pool.start(cache, (), [BlockCopy(0, 9)])
    pool.forget()
    [copier] = pool.copiers
    assert not copier.waiting


def test_no_copy_is_in_flight_once_another_one_has_failed(runner):
    moving = [mock.Mock(is_ready=lambda: False) for _ in range(3)]
    moving[0].block_until_ready.side_effect = RuntimeError("lost")
    memory = mock.Mock(is_staged=False, store=mock.Mock(side_effect=moving))
    pool, cache = HostPool(runner.programs.abstract_blocks(NUM_SLOTS), lambda *_: memory, mock.Mock()), runner.cache
    for block in range(3):
        pool.start(cache, [BlockCopy(block, block)], ())
    pool.forget()
    assert [each.block_until_ready.call_count for each in moving] == [1, 1, 1]
    memory.forget.assert_called_once()


def test_a_plan_that_did_not_run_leaves_no_moves(runner):
    pool, cache = make_pool("pinned", runner), random_cache(runner, 1)
    lost = random_cache(runner, 2)
    lost.pool.delete()
    with pytest.raises(RuntimeError, match="deleted"):
        pool.start(lost, [BlockCopy(1, 0)], ())
    pool.forget()
    cache = pool.start(cache, [BlockCopy(2, 5)], [BlockCopy(5, 9)])
    expected = bits(cache)[2]
    np.testing.assert_array_equal(bits(pool.finish(cache))[9], expected)


def test_stores_are_over_before_the_next_program_and_loads_when_they_land(runner):
    pool, cache = make_pool("pinned", runner), random_cache(runner, 1)
    jax.block_until_ready(pool._memory.store(cache, [BlockCopy(1, 0)]))
    [copier] = pool.copiers
    assert not copier.waiting
    arrival = pool._memory.request(cache, [BlockCopy(0, 9)])
    jax.block_until_ready(arrival.moving.token)
    assert not arrival.moving.is_ready()
    cache, is_over = pool._memory.land(cache, arrival)
    jax.block_until_ready(is_over)
    assert arrival.moving.is_ready()
    np.testing.assert_array_equal(bits(cache)[9], bits(cache)[1])


def test_neighbouring_blocks_come_in_one_copy_from_neighbouring_slots_of_one_piece(runner):
    pool, cache = make_pool("pinned", runner), random_cache(runner, 1)
    slots = [36, 37, 38, 39, 40, 41, 60]
    pool._memory.store(cache, [BlockCopy(block, slot) for block, slot in enumerate(slots, 1)])
    arrival = pool._memory.request(cache, [BlockCopy(slot, 20 + i + (i > 1)) for i, slot in enumerate(slots)])
    jax.block_until_ready(arrival.moving.token)
    [copier] = pool.copiers
    [(_, copies, _)] = copier.waiting
    assert copies["num_rows"].tolist() == [2, 2, 2, 1], (
        "a hole among the blocks, the end of a piece, and one among slots"
    )
    cache, _ = pool._memory.land(cache, arrival)
    np.testing.assert_array_equal(bits(cache)[[20, 21, *range(23, 28)]], bits(cache)[1:8])


@pytest.mark.parametrize("is_narrow", [False, True])
def test_the_link_is_measured_by_copies_that_change_no_block(runner, narrow_runner, is_narrow):
    runner = narrow_runner if is_narrow else runner
    pool, cache = make_pool("pinned", runner, is_narrow=is_narrow), random_cache(runner, 1)
    before, nums_of_rows = bits(cache), set()
    [copier] = pool.copiers
    with mock.patch.object(PlainCopier, "start", autospec=True) as start:
        start.side_effect = lambda *args: nums_of_rows.update(args[-1]["num_rows"].tolist()) or plain_start(*args)
        cache, *links = pool.measure(cache)
    assert not copier.waiting
    assert min(link.bytes_per_s for link in links) > 0
    np.testing.assert_array_equal(bits(cache)[1:], before[1:])
    assert nums_of_rows == {4, 32}, "neighbours move at once"


def test_the_copier_tells_the_time_of_a_transfer(runner):
    pool, cache = make_pool("pinned", runner), random_cache(runner, 1)
    cache = pool.finish(pool.start(cache, [BlockCopy(1, 0)], [BlockCopy(0, 9)]))
    jax.block_until_ready(cache.pool)
    pool.poll()
    of_block = bits(cache)[1].nbytes
    assert pool.take_transfers() == [Transferred(way, of_block, 2.0, is_end_seen=True) for way in DIRECTIONS]


def test_a_store_that_failed_is_told(runner):
    """At once, or by the array that no other program takes."""
    pool, cache = make_pool("pinned", runner), random_cache(runner, 1)
    [part] = pool._memory.parts.values()
    part.copier = None
    with pytest.raises(RuntimeError, match="start_timed"):
        pool._memory.store(cache, [BlockCopy(1, 0)]).block_until_ready()


def test_a_jax_that_does_not_write_in_place_is_refused(runner):
    pool, cache = make_pool("pinned", runner), random_cache(runner, 1)
    jax.block_until_ready(pool.start(cache, (), [BlockCopy(0, 9)]).pool)
    elsewhere = random_cache(runner, 2)
    with pytest.raises(RuntimeError, match="num_host_blocks=0"):
        jax.block_until_ready(pool.finish(elsewhere))


def test_a_slot_is_a_block_and_its_scales_on_each_device():
    """Layer l of a block lies l layers after the start of the slot: the stream reads it there."""
    runner = tiny.make_runner(
        jnp.bfloat16, num_blocks=16, num_host_blocks=0, kv_cache_dtype="fp8", tensor_parallel_size=2
    )
    pool, rng, sharding = make_pool("pinned", runner), np.random.default_rng(0), pool_sharding(runner.mesh)
    shapes = runner.programs.abstract_cache()
    stored = rng.standard_normal(shapes.pool.shape, np.float32).astype(shapes.pool.dtype)
    scales = rng.standard_normal(shapes.kv_scales.shape, np.float32)
    cache = KVCache(jax.device_put(stored, sharding), jax.device_put(scales, sharding))
    cache = pool.finish(pool.start(cache, [BlockCopy(3, 7), BlockCopy(4, 8)], [BlockCopy(7, 9)]))
    for array, expected in ((cache.pool, stored), (cache.kv_scales, scales)):
        expected[9] = expected[3]
        assert np.asarray(array).tobytes() == expected.tobytes()
    slot = 8 + num_slots_for(0)
    for part, heads in zip(pool._memory.parts.values(), np.split(stored, 2, 3), strict=True):
        of_slot = part.memory.content[slot * part.slot_bytes :][: part.slot_bytes]
        assert of_slot[: heads[4].nbytes].tobytes() == heads[4].tobytes()


def test_a_copy_engine_of_each_device_copies_the_rounded_blocks_of_its_own_heads():
    settings: dict[str, Any] = {"offload_dtype": "int8", "tensor_parallel_size": 2}
    runner = tiny.make_runner(jnp.bfloat16, num_blocks=NUM_BLOCKS, num_host_blocks=0, **settings)
    pool, cache = make_pool("pinned", runner, is_narrow=True), random_cache(runner, 1)
    cache = jax.device_put(cache, pool_sharding(runner.mesh))
    expected = rounded(bits(cache)[[36, 3]])
    cache = pool.finish(pool.start(cache, [BlockCopy(block + 1, block) for block in range(37)], ()))
    cache = pool.finish(pool.start(cache, (), [BlockCopy(35, 60), BlockCopy(2, 61)]))
    np.testing.assert_array_equal(bits(cache)[[60, 61]], expected)


def test_all_processes_land_in_the_same_order_whatever_is_ready(runner, monkeypatch):
    """By numbers alone: an arrival that is over here may be in flight elsewhere."""
    orders = []
    for is_ready in (True, False):
        pool, cache = make_pool("staged", runner), random_cache(runner, 1)
        pool.start(cache, [BlockCopy(block, block) for block in range(1, 64)], ())
        keys, get = [], runner.programs.get
        pool._memory._program = lambda key, keys=keys, get=get: keys.append(key) or get(key)
        monkeypatch.setattr(pool, "_num_staged", lambda pool=pool, n=is_ready: pool._num_arriving() if n else 64)
        for _ in range(3):
            cache = pool.start(cache, (), [BlockCopy(slot, slot) for slot in range(1, 40)])
            keys.append(("forward",))
            cache = pool.finish(cache)
        orders.append(keys)
    assert orders[0] == orders[1]


def test_pinned_slots_are_for_gpus_with_a_cuda_driver(monkeypatch):
    assert [name for name, target in TARGETS.items() if target.addresses_host_memory] == ["gpu"]
    monkeypatch.setattr(host_memory, "why_no_pinned_memory", lambda: "no driver")
    assert host_memory.memory_for(TARGETS["gpu"]) is StagedMemory
    monkeypatch.setattr(host_memory, "why_no_pinned_memory", lambda: None)
    assert host_memory.memory_for(TARGETS["gpu"]) is PinnedSlots
    assert host_memory.memory_for(TARGETS["tpu"]) is StagedMemory
