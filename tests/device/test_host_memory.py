"""Slots in host memory: whatever is in flight, a slot is read as it was stored last, in either kind of memory."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jpaged.contract.plan import BlockCopy
from jpaged.device.kv import host_memory
from jpaged.device.kv.host_memory import MOVE_SIZES, MappedMemory, StagedMemory
from jpaged.device.kv.host_pool import HostPool
from jpaged.device.kv.pool import KVCache
from jpaged.device.target import TARGETS
from tests.support import tiny

NUM_BLOCKS, NUM_SLOTS = 80, 96
SLOTS_PER_PIECE = 40


class Unfinished:
    """Stands for the array of a store that may not be over yet."""

    is_over = False

    def is_ready(self) -> bool:
        return self.is_over


class SlowStores:
    """The content of ``MappedMemory`` as the copy engine sees it: a store is not there until it is over.

    Programs see it at once, since they run in order. So the content of the copy engine lags behind.
    """

    def __init__(self) -> None:
        self.content: np.ndarray | None = None
        self.pending: list[tuple[Unfinished, jax.Array]] = []

    def program(self, compiled):
        def of_key(key):
            run = compiled(key)
            if key[0] != "to_host":
                return run

            def store(*args):
                slots, _ = run(*args)
                self.pending.append((Unfinished(), slots))
                return slots, self.pending[-1][0]

            return store

        return of_key

    def end(self, num_stores: int) -> None:
        """Let the oldest stores end."""
        for is_over, slots in self.pending[:num_stores]:
            is_over.is_over = True
            if not slots.is_deleted():  # a later store, which was given these slots, has not ended
                self.content = np.array(slots)
        del self.pending[:num_stores]


class MemoryOfTheCpu:
    """Stands for ``PinnedMemory``. On a CPU, programs do not write to memory of others in place."""

    def __init__(self, stores: SlowStores, num_bytes: int, unit: int, device: object) -> None:
        self.piece_bytes = SLOTS_PER_PIECE * unit
        self.stores = stores
        self.is_in_place = True

    def wait(self) -> None:
        pass

    def array(self, start: int, shape: tuple[int, ...], itemsize: int, *, on_device: bool) -> jax.Array:
        if on_device:
            self.stores.content = np.zeros(shape, f"uint{8 * itemsize}")
            return jnp.asarray(self.stores.content)
        end = start + int(np.prod(shape)) * itemsize
        assert start // self.piece_bytes == (end - 1) // self.piece_bytes, "no copy spans two pieces"
        assert self.stores.content is not None
        part = self.stores.content.reshape(-1).view(np.uint8)[start:end]
        return jnp.asarray(part.view(f"uint{8 * itemsize}").reshape(shape))

    def holds(self, array: jax.Array) -> bool:
        return self.is_in_place


@pytest.fixture(scope="module")
def runner():
    runner = tiny.make_runner(jnp.bfloat16, num_blocks=NUM_BLOCKS, num_host_blocks=0)
    runner.programs.num_host_slots = NUM_SLOTS
    return runner


def make_pool(kind: str, runner) -> Any:
    slots, stores = runner.programs.abstract_blocks(NUM_SLOTS), SlowStores()

    def memory(slots, program) -> Any:
        if kind == "staged":
            return StagedMemory(slots, program)
        return MappedMemory(slots, stores.program(program), partial(MemoryOfTheCpu, stores))  # pyright: ignore

    pool: Any = HostPool(slots, memory, runner.programs.get)
    pool.stores = stores
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


@pytest.mark.parametrize("kind", ["staged", "mapped"])
@settings(max_examples=60)
@given(plans=st.lists(st.tuples(moves(), st.integers(0, 4)), max_size=6))
def test_blocks_come_back_as_they_left(runner, kind, plans):
    pool, cache = make_pool(kind, runner), random_cache(runner, 1)
    expected, stored = bits(cache), np.zeros((64, *cache.pool.shape[1:]), np.uint16)
    for (to_host, from_host), num_ended in plans:
        cache = pool.start(cache, to_host, from_host)
        for copy in to_host:
            stored[copy.dst] = expected[copy.src]
        cache = pool.finish(cache)
        for copy in from_host:
            expected[copy.dst] = stored[copy.src]
        pool.stores.end(num_ended)
        pool.poll()
    np.testing.assert_array_equal(bits(cache)[1:], expected[1:])


def test_runs_are_copied_and_scattered_slots_are_read_by_a_program(runner):
    pool, cache = make_pool("mapped", runner), random_cache(runner, 1)
    memory: Any = pool._memory
    size = MOVE_SIZES[0]
    memory.store(cache, [BlockCopy(block, block) for block in range(1, 30)])
    pool.stores.end(1)
    run = [BlockCopy(slot, slot) for slot in range(1, 1 + 2 * size)]
    apart = [BlockCopy(slot, slot) for slot in (20, 22, 24)]
    batches = list(memory.batches([*run, *apart], room=64))
    assert [(len(copies), is_staged) for copies, is_staged in batches] == [(size, True), (size, True), (3, False)]
    assert [is_staged for _, is_staged in memory.batches([*run, *apart], room=size)] == [True, False]


def test_slots_that_are_being_written_are_read_by_a_program_after_it(runner):
    pool, cache = make_pool("mapped", runner), random_cache(runner, 1)
    memory: Any = pool._memory
    memory.store(cache, [BlockCopy(block, block) for block in range(1, 20)])

    back = [BlockCopy(slot, slot) for slot in range(1, 30)]
    staged = [copy.src for copies, is_staged in memory.batches(back, room=64) if is_staged for copy in copies]
    assert staged, "the others are copied"
    assert min(staged) >= 20


@pytest.mark.parametrize("kind", ["staged", "mapped"])
def test_forgotten_memory_is_written_again(runner, kind):
    pool, cache = make_pool(kind, runner), random_cache(runner, 1)
    pool.start(cache, [BlockCopy(1, 0)], ())
    if kind == "mapped":
        pool._memory._slots.delete()  # donated to a program that failed
    pool.forget()
    cache = pool.start(cache, [BlockCopy(2, 0)], ())
    expected = bits(cache)[2]
    cache = pool.finish(pool.start(cache, (), [BlockCopy(0, 9)]))
    np.testing.assert_array_equal(bits(cache)[9], expected)


def test_stores_that_are_over_are_forgotten_without_a_load(runner):
    pool, cache = make_pool("mapped", runner), random_cache(runner, 1)
    for _ in range(20):
        pool.start(cache, [BlockCopy(1, 0)], ())
        pool.stores.end(1)
    assert len(pool._memory._storing) <= 1


def test_a_jax_that_does_not_write_in_place_is_refused(runner):
    pool, cache = make_pool("mapped", runner), random_cache(runner, 1)
    [memory] = pool._memory._memories.values()
    memory.is_in_place = False
    with pytest.raises(RuntimeError, match="num_host_blocks=0"):
        pool.start(cache, [BlockCopy(1, 0)], ())


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


def test_mapped_memory_is_for_gpus_with_a_cuda_driver(monkeypatch):
    assert [name for name, target in TARGETS.items() if target.addresses_host_memory] == ["gpu"]
    monkeypatch.setattr(host_memory, "why_no_pinned_memory", lambda: "no driver")
    assert host_memory.memory_for(TARGETS["gpu"]) is StagedMemory
    monkeypatch.setattr(host_memory, "why_no_pinned_memory", lambda: None)
    assert host_memory.memory_for(TARGETS["gpu"]) is MappedMemory
    assert host_memory.memory_for(TARGETS["tpu"]) is StagedMemory
