"""Blocks of 8 bits on the host: what rounding changes, what it leaves as it is, and what such a block takes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jpaged.contract.plan import BlockCopy
from jpaged.device.kv.host_memory import MOVE_SIZES
from jpaged.device.kv.narrow_slots import MAX_NARROW_BLOCKS
from jpaged.device.kv.pool import KVCache
from jpaged.device.runner import ModelRunner
from jpaged.device.step import programs
from jpaged.sharding import pool_sharding
from pallas_kernels.block_pool.quantization import dequantize_blocks, quantize_blocks
from tests.support import tiny
from tests.support.plans import make_plan

ROUNDED = jax.jit(lambda blocks: dequantize_blocks(*quantize_blocks(blocks), blocks.dtype))


def make_runner(dtype=jnp.float32, **settings) -> ModelRunner:
    """A runner whose device pool holds random numbers."""
    runner = tiny.make_runner(dtype, **{"num_blocks": 65, "num_host_blocks": 64, "offload_dtype": "int8"} | settings)
    content = np.random.default_rng(0).standard_normal(runner.cache.pool.shape, np.float32).astype(dtype)
    runner.cache = jax.block_until_ready(KVCache(jax.device_put(content, pool_sharding(runner.mesh))))
    return runner


def moves(src, dst) -> tuple[BlockCopy, ...]:
    return tuple(BlockCopy(int(s), int(d)) for s, d in zip(src, dst, strict=True))


def values(array: Any) -> np.ndarray:
    return np.asarray(array).astype(np.float64)


def assert_rounded(actual: np.ndarray, expected: np.ndarray) -> None:
    """Within 1/127 of the largest magnitude of the same head, and not the same."""
    largest = np.abs(expected).max(axis=(-2, -1), keepdims=True)
    assert (np.abs(actual - expected) <= largest / 127).all()
    assert (actual != expected).any()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@given(exponent=st.integers(-40, 13), seed=st.integers(0, 9))
def test_a_block_changes_by_a_127th_of_its_largest_value_and_only_once(dtype, exponent, seed):
    shape = 3, 2, 2, 2, 4, 8
    exact = np.random.default_rng(seed).standard_normal(shape, np.float32) * np.float32(2.0**exponent)
    blocks = jnp.asarray(exact, dtype)
    once = ROUNDED(blocks)
    smallest = float(jnp.finfo(dtype).smallest_subnormal)
    largest = np.abs(values(blocks)).max(axis=(-2, -1), keepdims=True)
    assert (np.abs(values(once) - values(blocks)) <= largest / 127 + smallest).all()
    if largest.min() / 127 > smallest:  # the type has a place for every multiple of the scale
        assert np.asarray(ROUNDED(once)).tobytes() == np.asarray(once).tobytes()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_values_that_are_not_finite_leave_the_others_as_they_are(dtype):
    blocks = jnp.asarray(np.random.default_rng(0).standard_normal((1, 1, 2, 2, 4, 8), np.float32), dtype)
    expected = np.array(ROUNDED(blocks.at[0, 0, 1, 1, 2, :3].set(0)))
    expected[0, 0, 1, 1, 2, :3] = np.nan
    spoilt = blocks.at[0, 0, 1, 1, 2, :3].set(jnp.array([jnp.nan, jnp.inf, -jnp.inf], dtype))
    np.testing.assert_array_equal(values(ROUNDED(spoilt)), values(expected))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_the_largest_values_stay_finite_and_zeros_stay_zeros(dtype):
    largest = jnp.finfo(dtype).max
    blocks = jnp.full((1, 1, 2, 1, 2, 4), largest, dtype).at[0, 0, 1].set(0).at[0, 0, 0, 0, 1].set(-largest)
    rounded = ROUNDED(blocks)
    assert np.isfinite(values(rounded)).all()
    assert (rounded[0, 0, 1] == 0).all()


@pytest.mark.parametrize("num_devices", [1, 2])
@pytest.mark.parametrize("settings", [{}, {"attention_implementation": "pallas_tpu", "interpret": True}])
def test_blocks_come_back_rounded_and_others_do_not_change(num_devices, settings):
    runner = make_runner(tensor_parallel_size=num_devices, **settings)
    before = values(runner.cache.pool)
    out, back = [5, 20, 9, 1, 33, 30], [11, 12, 13, 14, 15, 16]
    runner.execute(make_plan(to_host=moves(out, [3, 60, 0, 7, 8, 9])))
    runner.execute(make_plan(from_host=moves([3, 60, 0, 7, 8, 9], back)))
    after = values(runner.cache.pool)
    assert_rounded(after[back], before[out])
    others = [block for block in range(1, 65) if block not in back]
    np.testing.assert_array_equal(after[others], before[others])
    assert len(runner.cache.pool.sharding.device_set) == num_devices


def test_a_pool_on_the_host_is_sized_by_its_own_bytes():
    plain, narrow = make_runner(offload_dtype="auto"), make_runner(jnp.bfloat16)
    heads, in_block = 2 * 2 * 2, 8 * 16  # layers, K and V, heads; values
    assert plain.host_bytes_per_block == plain.bytes_per_block == heads * in_block * 4
    assert narrow.host_bytes_per_block == heads * (in_block + 4)
    assert narrow.bytes_per_block == heads * in_block * 2
    sized = make_runner(num_host_blocks=None, host_memory_bytes=10 * narrow.host_bytes_per_block)
    assert sized.num_host_blocks == 10
    sized.execute(make_plan(to_host=moves([1, 2], [3, 4])))
    assert sized.host_pool is not None
    assert sized.host_pool.bytes_to_host == 2 * narrow.host_bytes_per_block


def test_rounding_allocates_no_more_than_a_few_batches(monkeypatch):
    runner = make_runner(num_blocks=4096)
    for kind in ("gather", "scatter"):
        memory = runner.programs.get((kind, MOVE_SIZES[-1])).memory_analysis()
        assert memory is not None
        assert memory.temp_size_in_bytes <= 3 * MOVE_SIZES[-1] * runner.bytes_per_block
    assert runner.programs.move_kinds == ("gather", "scatter")
    monkeypatch.setattr(programs, "has_copy_engine", lambda target: True)
    assert runner.programs.move_kinds == ("gather", "scatter"), "a copy engine rounds nothing"
    assert runner.programs.workspace_bytes() >= 2 * MAX_NARROW_BLOCKS * runner.host_bytes_per_block


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"kv_cache_dtype": "fp8"}, "offload_dtype='int8' cannot be had: kv_cache_dtype='fp8' has 8 bits already"),
        ({"kv_cache_dtype": "int8"}, "kv_cache_dtype='int8' has 8 bits already, .*; use offload_dtype='auto'"),
        ({"offload_cache": "activations"}, "offload_cache='activations' keeps the inputs of layers"),
    ],
)
def test_what_is_8_bits_wide_or_no_k_and_v_is_not_rounded(settings, match):
    with pytest.raises(ValueError, match=match):
        make_runner(**settings)
