"""Blocks on the host that programs copy by DMA, as on a TPU, in Pallas's interpreter: tokens as with all on the device.

The interpreter ends all copies of a layer when they are started. ``test_tpu_aot.py`` compiles copies that outlive their
kernel.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jpaged.contract.plan import BlockCopy, Streamed
from jpaged.contract.rows import host_cell
from jpaged.device.kv.dma import DmaSlots, DmaStream
from jpaged.device.runner import ModelRunner
from jpaged.request import SamplingParams
from tests.support.plans import Chunk, Sample, make_plan
from tests.support.tiny import make_runner, tiny_config

GREEDY = SamplingParams(temperature=0)
MODEL = tiny_config()
PROMPTS = [list(np.random.default_rng(i).integers(1, 23, 20)) for i in range(2)]
KERNEL: dict[str, Any] = {"attention_implementation": "pallas_tpu", "interpret": True}


def make_streaming(**settings: Any) -> ModelRunner:
    sizes = {"num_blocks": 24, "num_host_blocks": 6, "max_num_batched_tokens": 64, "kv_placement": "host"}
    return make_runner(model_config=MODEL, has_own_programs=True, **sizes | KERNEL | settings)


def run(runner: ModelRunner, chunks: list[Chunk], **moves: Any) -> tuple[list[int], np.ndarray]:
    samples = [Sample(i, i, chunk.stop, 0, GREEDY) for i, chunk in enumerate(chunks)]
    result = runner.execute(make_plan(chunks, samples, **moves))
    return result.token_ids.tolist(), result.scores.logprobs


def test_decodes_over_streamed_blocks_equal_those_over_resident_blocks():
    """Two rows: one with both of its full blocks on the host, and one with one block there. The blocks then return."""
    tables = [[18, 19, 20], [21, 22, 23]]
    streamed = Streamed(np.array([5, 0, 2], np.int32), np.array([0, 2], np.int32))
    on_host = [[host_cell(0), host_cell(1), 20], [host_cell(0), 22, 23]]
    stored = BlockCopy(18, 5), BlockCopy(19, 0), BlockCopy(21, 2)
    results = []
    for is_streaming in (False, True):
        runner = make_streaming() if is_streaming else make_runner(model_config=MODEL, max_num_batched_tokens=64)
        cells = on_host if is_streaming else tables
        moves: dict[str, Any] = {"streamed": streamed} if is_streaming else {}
        out = [run(runner, [Chunk(i, PROMPTS[i], 0, 20, tables[i]) for i in range(2)])]
        first: dict[str, Any] = {"to_host": stored} if is_streaming else {}
        out.append(run(runner, [Chunk(i, [5], 20, 20, cells[i]) for i in range(2)], **moves | first))
        gone = jnp.array([18, 19, 21])
        before = np.asarray(runner.cache.pool[gone])
        if is_streaming:  # nothing but the window and the host is read: the blocks are gone
            assert runner.num_window_blocks < 18
            runner.cache = type(runner.cache)(runner.cache.pool.at[gone].set(jnp.nan))
        out.append(run(runner, [Chunk(i, [6], 21, 21, cells[i]) for i in range(2)], **moves))
        if is_streaming:
            runner.execute(make_plan(from_host=(BlockCopy(5, 18), BlockCopy(0, 19), BlockCopy(2, 21))))
            np.testing.assert_array_equal(runner.cache.pool[gone], before)
        results.append(out)
    for (resident_ids, resident), (streamed_ids, streamed_logprobs) in zip(*results, strict=True):
        assert resident_ids == streamed_ids
        np.testing.assert_allclose(resident, streamed_logprobs, atol=1e-5)


def test_a_stream_gives_a_program_the_slots_named_last_and_forgets_them_with_a_failed_step():
    runner = make_streaming()
    assert runner.host_pool is not None
    stream, memory = runner.programs.stream, runner.host_pool._memory
    assert isinstance(stream, DmaStream)
    assert isinstance(memory, DmaSlots)
    runner.host_pool.stream(stream, np.array([3, 1], np.int32))
    runner.host_pool.stream(stream, np.array([2], np.int32))
    scratch = memory.source().shape[0] - runner.num_host_blocks
    slots, named = stream.take_inputs()
    assert slots is memory.source()
    assert named.tolist() == [2, scratch + 3, scratch + 1, *[0] * (len(named) - 3)]
    memory.source().delete()  # as by a program that took it and failed
    runner.forget_pool()
    assert not memory.source().is_deleted()
    with pytest.raises(IndexError):
        stream.take_inputs()


def test_the_link_is_measured_by_copies_of_padding_alone():
    runner = make_streaming()
    assert runner.host_pool is not None
    before = np.asarray(runner.cache.pool[1:])
    runner.cache, to_host, from_host = runner.host_pool.measure(runner.cache)
    assert min(to_host.bytes_per_s, from_host.bytes_per_s) > 0
    np.testing.assert_array_equal(runner.cache.pool[1:], before)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        (
            {"kv_cache_dtype": "int8"},
            "pallas_tpu does not stream a pool of int8: slots hold blocks without scales; use",
        ),
        ({"offload_dtype": "int8"}, "pallas_tpu streams blocks as they are; use offload_dtype='auto', or use kv_pl"),
        ({"num_host_blocks": 100_000}, "pallas_tpu streams 98304 blocks at most, not num_host_blocks=100000; use"),
        ({"block_size": 12}, "does not stream block_size 12: expected a multiple of 8 for float32; use kv_placement="),
    ],
)
def test_what_the_kernels_cannot_stream_is_refused(settings, match):
    with pytest.raises(ValueError, match=match):
        make_streaming(**settings)


def test_activations_are_refused_with_the_setting_that_works():
    model = tiny_config(num_heads=2, hidden_size=32)
    sizes: dict[str, Any] = {"num_blocks": 24, "num_host_blocks": 6, "kv_placement": "host", "max_burst": 1}
    with pytest.raises(ValueError, match="no activations; use offload_cache='kv', or use kv_placement='device'"):
        make_runner(model_config=model, **sizes | KERNEL)
