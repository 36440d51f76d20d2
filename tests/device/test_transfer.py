"""Blocks that leave for the host and come back: bit for bit, in the order the plan promises, and their times."""

from functools import partial
from types import SimpleNamespace
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jpaged.config import EngineConfig
from jpaged.contract.plan import BlockCopy
from jpaged.contract.profile import Transferred
from jpaged.device.kv import host_pool as transfer
from jpaged.device.kv.host_memory import StagedMemory
from jpaged.device.kv.host_pool import MAX_STAGED_BLOCKS, MOVE_SIZES, agreed_pool
from jpaged.device.kv.pool import KVCache
from jpaged.device.runner import ModelRunner
from jpaged.device.step.inputs import Bucket
from jpaged.device.step.program_store import Background, ProgramStore
from jpaged.device.target import TARGETS
from jpaged.engine.loop import Engine
from jpaged.request import SamplingParams
from jpaged.sharding import make_mesh, pool_sharding
from tests.support import tiny
from tests.support.plans import Chunk, Sample, make_plan


def make_runner(dtype=jnp.float32, *, tensor_parallel_size=1, **settings) -> ModelRunner:
    """A runner whose device pool holds random numbers, different in every block."""
    sizes = {"num_blocks": 257, "num_host_blocks": 128} | settings
    runner = tiny.make_runner(dtype, tensor_parallel_size=tensor_parallel_size, **sizes)
    content = np.random.default_rng(0).standard_normal(runner.cache.pool.shape, np.float32).astype(dtype)
    runner.cache = jax.block_until_ready(KVCache(jax.device_put(content, pool_sharding(runner.mesh))))
    return runner


def content(runner: ModelRunner) -> np.ndarray:
    return np.array(runner.cache.pool)


def moves(src, dst) -> tuple[BlockCopy, ...]:
    return tuple(BlockCopy(int(s), int(d)) for s, d in zip(src, dst, strict=True))


def assert_same_bits(actual: np.ndarray, expected: np.ndarray) -> None:
    assert actual.tobytes() == expected.tobytes()


@pytest.mark.parametrize("tensor_parallel_size", [1, 2])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_blocks_come_back_bit_for_bit(dtype, tensor_parallel_size):
    runner = make_runner(dtype, tensor_parallel_size=tensor_parallel_size)
    before = content(runner)
    out, back = [5, 200, 9, 1, 77, 30], [11, 12, 13, 14, 15, 16]
    runner.execute(make_plan(to_host=moves(out, [3, 120, 0, 7, 8, 9])))
    runner.execute(make_plan(from_host=moves([3, 120, 0, 7, 8, 9], back)))
    expected = before.copy()
    expected[back] = before[out]
    assert_same_bits(content(runner)[1:], expected[1:])
    assert len(runner.cache.pool.sharding.device_set) == tensor_parallel_size


@pytest.mark.parametrize("num_blocks", [1, MOVE_SIZES[0], MOVE_SIZES[0] + 1, MOVE_SIZES[1] + 1, 2 * MAX_STAGED_BLOCKS])
def test_any_number_of_blocks_moves_in_one_plan(num_blocks):
    """More than are staged at once, too."""
    runner = make_runner()
    before = content(runner)
    out, back = np.arange(1, num_blocks + 1), np.arange(num_blocks + 1, 2 * num_blocks + 1)
    slots = np.arange(num_blocks)[::-1]
    runner.execute(make_plan(to_host=moves(out, slots)))
    runner.execute(make_plan(from_host=moves(slots, back)))
    assert_same_bits(content(runner)[back], before[out])
    assert_same_bits(content(runner)[out], before[out])


def test_what_leaves_is_read_before_the_step_writes():
    """Before its copies and its chunks, and before what arrives in the same block."""
    runner = make_runner()
    before = content(runner)
    runner.execute(make_plan(to_host=moves([20], [0])))
    chunk = Chunk(0, [1, 2, 3, 4, 5], 0, 5, [7])
    runner.execute(
        make_plan(
            to_host=moves([7, 9, 30], [1, 2, 3]), copies=moves([7], [9]), chunks=(chunk,), from_host=moves([0], [30])
        )
    )
    changed = content(runner)
    assert not np.array_equal(changed[7], before[7])
    assert_same_bits(changed[9], before[7])
    assert_same_bits(changed[30], before[20])
    runner.execute(make_plan(from_host=moves([1, 2, 3], [41, 42, 43])))
    assert_same_bits(content(runner)[41:44], before[[7, 9, 30]])


def test_what_arrives_sees_what_the_same_plan_sent():
    runner = make_runner()
    before = content(runner)
    runner.execute(make_plan(to_host=moves([3], [6])))
    runner.execute(make_plan(to_host=moves([4], [6]), from_host=moves([6], [50])))
    assert_same_bits(content(runner)[50], before[4])


def test_a_step_computes_the_same_while_blocks_move_around_it():
    params = SamplingParams(temperature=0)
    results = []
    for moving in ({}, {"to_host": moves([20, 21], [0, 1]), "from_host": moves([5], [22])}):
        runner = make_runner()
        chunk = Chunk(0, [1, 2, 3], 0, 3, [7])
        plan = make_plan(chunks=(chunk,), samples=(Sample(0, 0, 3, 0, params, (), (), ()),), **moving)
        results.append((runner.execute(plan), content(runner)[7]))
    (still, still_block), (moved, moved_block) = results
    assert still.token_ids.tolist() == moved.token_ids.tolist()
    assert still.scores.logprobs.tolist() == moved.scores.logprobs.tolist()
    assert_same_bits(still_block, moved_block)


def test_a_plan_without_chunks_has_an_empty_result():
    result = make_runner().execute(make_plan(to_host=moves([1], [0])))
    assert result.token_ids.tolist() == []
    assert result.scores.logprobs.tolist() == []
    assert result.beams == result.prompt_scores == ()


@pytest.mark.parametrize("size", MOVE_SIZES)
def test_moving_programs_allocate_nothing_of_the_pools_size(size):
    runner = make_runner(num_blocks=4096, num_host_blocks=1)
    pool_bytes, staged_bytes = runner.cache.pool.nbytes, size * runner.bytes_per_block
    gather = runner.programs.get(("gather", size)).memory_analysis()
    scatter = runner.programs.get(("scatter", size)).memory_analysis()
    assert max(gather.temp_size_in_bytes, scatter.temp_size_in_bytes) <= 2 * staged_bytes < pool_bytes / 10
    assert gather.output_size_in_bytes <= staged_bytes + 16 * size
    assert scatter.alias_size_in_bytes >= pool_bytes, "the donated pool is written in place"
    assert scatter.output_size_in_bytes <= scatter.alias_size_in_bytes + 64, "and what says that it is over"


def test_bytes_are_counted_each_way_over_all_devices_without_padding():
    runner = make_runner(tensor_parallel_size=2)
    block_bytes = 2 * 2 * 2 * 8 * 16 * 4
    assert runner.bytes_per_block == block_bytes
    runner.execute(make_plan(to_host=moves([1, 2, 3], [0, 1, 2])))
    runner.execute(make_plan(to_host=moves([4], [3]), from_host=moves([0, 1], [8, 9])))
    assert runner.host_pool.bytes_to_host == 4 * block_bytes
    assert runner.host_pool.bytes_from_host == 2 * block_bytes


class Unfinished:
    """Stands for an array that is not ready until it is waited for."""

    def __init__(self, seconds: float, clock: list[float]):
        self.seconds, self.clock, self.is_over = seconds, clock, False

    def is_ready(self) -> bool:
        return self.is_over

    def wait(self) -> None:
        if not self.is_over:
            self.end_after(self.seconds)

    def end_after(self, seconds: float) -> None:
        self.clock[0] += seconds
        self.is_over = True


@pytest.fixture
def slow_link(monkeypatch):
    """A runner whose copies to the host seem to take 3 s, on a clock that only waiting moves on."""
    runner = make_runner()
    pool, clock, sent = runner.host_pool, [0.0], []
    monkeypatch.setattr(transfer.time, "perf_counter", lambda: clock[0])
    store = pool._memory.store

    def slow_store(cache, copies):
        store(cache, copies)
        sent.append(Unfinished(3.0, clock))
        return sent[-1]

    def wait(array):
        if isinstance(array, Unfinished):
            array.wait()

    monkeypatch.setattr(pool._memory, "store", slow_store)
    monkeypatch.setattr(transfer.jax, "block_until_ready", wait)
    return runner, sent


def test_a_step_waits_for_no_copy_but_when_too_many_would_be_staged_and_before_arrivals(slow_link):
    runner, sent = slow_link
    runner.execute(make_plan(to_host=moves([1, 2], [0, 1])))
    assert runner.host_pool.stalled_s == 0
    runner.execute(make_plan(chunks=(Chunk(0, [1], 0, 1, [3]),)))
    runner.execute(make_plan(to_host=moves(range(3, 35), range(2, 34))))
    assert not any(array.is_over for array in sent)
    runner.execute(make_plan(to_host=moves(range(35, 67), range(34, 66))))
    assert sent[0].is_over, "the oldest make room"
    assert not any(array.is_over for array in sent[1:])
    assert runner.host_pool.stalled_s == 3.0
    runner.execute(make_plan(from_host=moves([100], [3])))
    assert [array.is_over for array in sent] == [True, True, False], "one arrival needs no more room"


def test_staged_blocks_are_bounded_within_a_plan(slow_link):
    runner, sent = slow_link
    runner.execute(make_plan(to_host=moves(range(1, 129), range(128))))
    assert len(sent) == 4
    assert sum(array.is_over for array in sent) * MOVE_SIZES[-1] == 128 - MAX_STAGED_BLOCKS
    assert runner.host_pool.stalled_s == pytest.approx(2 * 3.0)


def test_a_copy_that_was_waited_for_is_observed_with_its_time(slow_link):
    runner, _ = slow_link
    pool, num_bytes = runner.host_pool, runner.bytes_per_block
    runner.execute(make_plan(to_host=moves([1], [0])))
    runner.execute(make_plan(to_host=moves(range(1, 1 + MAX_STAGED_BLOCKS), range(MAX_STAGED_BLOCKS))))
    assert pool.take_transfers() == [Transferred("to_host", num_bytes, 3.0, is_end_seen=True)]
    assert pool.take_transfers() == []


def test_a_copy_that_was_found_over_is_observed_if_it_was_not_over_shortly_before(slow_link):
    runner, sent = slow_link
    pool, num_bytes = runner.host_pool, runner.bytes_per_block
    for seconds, passed, is_end_seen in ((9.0, 1.0, True), (1.0, 9.0, False)):
        runner.execute(make_plan(to_host=moves([1], [0])))
        sent[-1].clock[0] += seconds
        pool.poll()
        sent[-1].end_after(passed)
        pool.poll()
        assert pool.take_transfers() == [Transferred("to_host", num_bytes, 10.0, is_end_seen)]


def test_a_copy_to_the_host_behind_a_step_or_a_copy_is_no_measure_of_the_link(slow_link, monkeypatch):
    runner, sent = slow_link
    pool, step = runner.host_pool, Unfinished(2.0, [0.0])
    monkeypatch.setattr(pool._memory, "store", lambda cache, copies: sent.append(Unfinished(3.0, [0.0])) or sent[-1])
    pool.start(KVCache(step), moves([1], [0]), ())
    step.wait()
    pool.start(KVCache(step), moves([2], [1]), ())
    for array in sent:
        array.wait()
    pool.poll(has_waited=True)
    assert [each.is_end_seen for each in pool.take_transfers()] == [False, False]
    pool.start(KVCache(step), moves([3], [2]), ())
    sent[-1].wait()
    pool.poll(has_waited=True)
    assert [each.is_end_seen for each in pool.take_transfers()] == [True]


def test_transfers_are_forgotten_without_a_fetch():
    """As by the processes that follow the leading one."""
    runner = make_runner()
    for _ in range(100):
        jax.block_until_ready(runner.host_pool.start(runner.cache, moves([1, 2], [0, 1]), ()))
        jax.block_until_ready([array for _, array in runner.host_pool._staged])
    assert len(runner.host_pool._in_flight) == 1
    assert len(runner.host_pool.take_transfers()) < 99, "the oldest times are dropped"


def test_the_measured_profile_is_positive_and_leaves_the_pools_as_they_were():
    runner = make_runner()
    assert runner.profile is None
    runner.execute(make_plan(to_host=moves([1], [0])))
    before = content(runner)
    runner.measure_profile()
    profile = runner.profile
    assert profile.block_bytes == runner.bytes_per_block
    for link in (profile.to_host, profile.from_host):
        assert link.fixed_s >= 0
        assert min(link.bytes_per_s, link.shared_bytes_per_s) > 0
    assert profile.prefill_fixed_s > 0
    assert min(profile.prefill_token_s, profile.prefill_context_s) >= 0
    assert_same_bits(content(runner)[1:], before[1:])
    runner.execute(make_plan(from_host=moves([0], [9])))
    assert_same_bits(content(runner)[9], before[1])


def prefill_observed(runner, num_tokens, start=0):
    """Compute a chunk; returns what was observed since the last one."""
    params = SamplingParams(temperature=0)
    chunk = Chunk(0, [1] * num_tokens, start, start + num_tokens, [1, 2, 3])
    runner.execute(make_plan(chunks=(chunk,), samples=(Sample(0, 0, start + num_tokens, 0, params, (), (), ()),)))
    return [(each.num_tokens, each.context_len) for each in runner.take_observations().prefills]


def test_large_steps_are_observed_and_small_ones_are_not():
    runner = make_runner()
    prefill = partial(prefill_observed, runner)
    for num_tokens in (3, 16):  # compiles, which no time is to include
        prefill(num_tokens)
    assert prefill(3) == []
    assert prefill(8) == [(8, 0)]
    assert prefill(8, start=8) == [(8, 8)]
    runner.programs.background.pending = frozenset(runner.buckets[:1])
    assert prefill(8) == [], "it may be padded, or slowed down by what is compiled"
    runner.programs.background.pending = frozenset()
    assert prefill(8) == [(8, 0)]


def test_steps_are_observed_though_a_size_failed_for_good():
    def fail(key):
        raise RuntimeError("it does not compile")

    runner, missing = make_runner(), Bucket(1, 1)
    background = Background(ProgramStore(fail, fail), {missing: [("forward", missing)]})
    runner.programs.background = background
    for num_tokens in (3, 16, 8):
        assert prefill_observed(runner, num_tokens) == [], "it is still to be compiled"
    background.start(runner)
    assert background.wait(60)
    assert background.pending == {missing}
    assert prefill_observed(runner, 8) == [(8, 0)]


@pytest.mark.parametrize("reason", [None, "2 bytes could not be pinned"])
def test_a_process_without_its_host_pool_tells_all_processes(reason, caplog, monkeypatch):
    pool = make_runner().host_pool
    with monkeypatch.context() as patch:
        if reason is not None:
            patch.setattr(pool, "wait", Mock(side_effect=RuntimeError(reason)))
        gathered = Mock(side_effect=lambda own: [None, own])
        assert agreed_pool(pool, gathered) is (pool if reason is None else None)
        gathered.assert_called_once_with(reason)
    assert agreed_pool(pool, lambda own: [own, reason]) is (pool if reason is None else None)
    logged = [record.message for record in caplog.records if f"process 1: {reason}" in record.message]
    assert len(logged) == (0 if reason is None else 2)


def test_a_runner_goes_on_without_the_host_pool_that_another_process_cannot_have():
    channel = SimpleNamespace(least=lambda number: number, gather=lambda own: [own, "it could not be pinned"])
    config = EngineConfig(block_size=8, num_blocks=8, max_num_seqs=1, max_num_batched_tokens=8, num_host_blocks=2)
    runner = ModelRunner(nnx.clone(tiny.tiny_model()), tiny.TINY, config, make_mesh(1), channel=channel)
    assert (runner.host_pool, runner.num_host_blocks) == (None, 0)
    assert Engine(runner, config).stats().num_host_blocks == 0


def test_a_forgotten_pool_takes_what_was_under_way_with_it():
    runner = make_runner()
    runner.execute(make_plan(to_host=moves([1, 2], [0, 1])))
    runner.host_pool.start(runner.cache, (), moves([0], [9]))
    runner.forget_pool()
    runner.execute(make_plan(from_host=moves([0], [5])))
    assert not content(runner)[[9]].any(), "the arrival that was never finished"


# Sizes


def test_host_memory_in_bytes_is_rounded_down_to_blocks():
    runner = make_runner(num_host_blocks=None, host_memory_bytes=10 * 4096 + 4095)
    assert runner.num_host_blocks == 10


@pytest.mark.parametrize("settings", [{}, {"host_memory_bytes": 0}, {"num_host_blocks": 0}])
def test_no_host_pool_on_a_cpu_unless_asked_for(settings):
    runner = make_runner(**{"num_host_blocks": None} | settings)
    assert runner.num_host_blocks == 0
    assert runner.host_pool is None
    assert runner.profile is None


def test_swap_on_a_cpu_has_a_host_pool_for_all_rows_at_full_length():
    assert make_runner(num_host_blocks=None, preemption="swap").num_host_blocks == 4 * 128 // 8


def test_an_accelerators_default_is_4_gib_and_less_if_the_machine_or_the_rows_need_less(monkeypatch):
    monkeypatch.setattr(transfer, "free_machine_bytes", lambda: 100 << 30)
    config = EngineConfig()

    def default(useful_blocks):
        return transfer.num_host_blocks_for(config, TARGETS["gpu"], 2 << 20, useful_blocks=useful_blocks)

    assert default(10**6) == 2048
    assert default(100) == 100
    monkeypatch.setattr(transfer, "free_machine_bytes", lambda: 1 << 30)
    assert default(10**6) == 256


def test_recomputing_without_a_prefix_cache_needs_no_host_pool():
    config = EngineConfig(preemption="recompute", enable_prefix_caching=False)
    assert not transfer.has_host_pool(config, TARGETS["gpu"])
    assert transfer.has_host_pool(EngineConfig(preemption="recompute"), TARGETS["gpu"])


def test_the_workspace_has_room_for_staged_blocks():
    with_pool, without = make_runner(), make_runner(num_host_blocks=0)
    room = with_pool.programs.workspace_bytes() - without.programs.workspace_bytes()
    assert room >= 2 * MAX_STAGED_BLOCKS * with_pool.bytes_per_block


@pytest.mark.parametrize("settings", [{"num_host_blocks": 11}, {"host_memory_bytes": 11 * 4096}])
def test_a_host_pool_larger_than_the_machine_is_refused_with_the_arithmetic(monkeypatch, settings):
    monkeypatch.setattr(transfer, "free_machine_bytes", lambda: 10 * 4096)
    with pytest.raises(ValueError, match=r"does not fit: 11 blocks x 4,096 bytes = 45,056.*40,960.*at most 10 blocks"):
        make_runner(**{"num_host_blocks": None} | settings)


def test_host_memory_that_holds_no_block_is_refused():
    with pytest.raises(ValueError, match="host_memory_bytes=4,095 holds no block of 4,096 bytes"):
        make_runner(num_host_blocks=None, host_memory_bytes=4095)


def test_swap_without_room_for_a_host_pool_is_refused(monkeypatch):
    monkeypatch.setattr(transfer, "free_machine_bytes", lambda: 4096)
    with pytest.raises(ValueError, match="preemption='swap' needs a host pool"):
        make_runner(num_host_blocks=None, preemption="swap")


@pytest.mark.parametrize("num_devices", [1, 2])
def test_blocks_move_by_dma_as_they_do_without(num_devices):
    kernel = {"attention_implementation": "pallas_tpu", "interpret": True}
    runner = make_runner(tensor_parallel_size=num_devices, num_blocks=33, num_host_blocks=8, **kernel)
    before = content(runner)
    runner.execute(make_plan(to_host=moves([1, 2, 3], [5, 6, 7]), copies=moves([4, 5, 9], [9, 10, 11])))
    runner.execute(make_plan(from_host=moves([5, 7], [20, 21])))
    expected = before.copy()
    expected[[9, 10, 11, 20, 21]] = before[[4, 5, 9, 1, 3]]
    assert_same_bits(content(runner), expected)


@pytest.mark.parametrize("setting", [{"preemption": "swap"}, {"kv_placement": "host"}, {"kv_placement": "auto"}])
def test_a_setting_that_needs_a_host_pool_is_refused_where_no_memory_is_free(monkeypatch, setting):
    monkeypatch.setattr(transfer, "free_machine_bytes", lambda: 4096)
    with pytest.raises(ValueError, match=r"needs a host pool, and the 4,096 bytes .* no room for blocks of 4,096"):
        make_runner(num_host_blocks=None, **setting)


def test_a_start_waits_for_no_host_memory_and_the_first_copy_does(monkeypatch):
    waits = []
    monkeypatch.setattr(StagedMemory, "wait", lambda memory: waits.append(runner.programs.compiling.is_running))
    runner = make_runner(num_host_blocks=2)
    assert waits == []
    runner.execute(make_plan(to_host=(BlockCopy(1, 0),)))
    runner.execute(make_plan(from_host=(BlockCopy(0, 1),)))
    assert waits == [True]
    assert not runner.programs.compiling.is_running
