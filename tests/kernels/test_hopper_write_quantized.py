"""Writes into quantised pools with the Hopper kernel that rescales blocks, in Pallas's interpreter, against XLA's."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from jpaged.device.kv.pool import KVCache
from jpaged.device.target import BACKENDS
from pallas_kernels import block_pool_shape, kv_scales_shape, write_kv_quantized
from pallas_kernels.block_pool.hopper import write_kv_quantized_hopper
from pallas_kernels.block_pool.hopper import write_quantized as kernel
from pallas_kernels.chips import here
from tests.support.ptx import LANES, STORED, WARPS
from tests.support.warpgroup import STAND_INS, Memory

pytestmark = pytest.mark.usefixtures("no_races")

NUM_BLOCKS, NUM_LAYERS, LAYER, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM = 6, 2, 1, 2, 16, 32


@partial(jax.jit, static_argnames="by", donate_argnums=(0, 1))
def write(pool, scales, k, v, slots, by):
    run = partial(write_kv_quantized_hopper, interpret=plgpu.InterpretGPUParams()) if by else write_kv_quantized
    return run(pool, scales, LAYER, k, v, slots)


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.float8_e4m3fn])
def test_tokens_of_any_size_leave_the_bits_that_xla_leaves(dtype):
    """Prompts of one block and more, and tokens in blocks that hold some, each larger than those before; padding."""
    rng = np.random.default_rng(0)
    shape = block_pool_shape(NUM_BLOCKS, NUM_LAYERS, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM)
    pools = [jnp.zeros(shape, dtype), jnp.zeros(kv_scales_shape(NUM_BLOCKS, NUM_LAYERS, NUM_KV_HEADS))]
    both = [[jnp.array(x) for x in pools] for _ in range(2)]
    starts = np.array([16, 32, 48])
    for step, slots in enumerate(
        ([*range(16, 21), *range(32, 48), *range(48, 51)], [*(starts + 7 - 2), 0, 0], [*range(53, 58), 21 + 1], [0, 5])
    ):
        size = (len(slots), NUM_KV_HEADS, HEAD_DIM)
        grows = 3.0**step * rng.choice([1.0, 100.0], (len(slots), NUM_KV_HEADS, 1))
        k, v = (jnp.asarray(rng.standard_normal(size) * grows, jnp.bfloat16) for _ in range(2))
        both = [list(write(*pair, k, v, jnp.asarray(slots, jnp.int32), by)) for by, pair in enumerate(both)]
        for got, right in zip(both[1], both[0], strict=True):
            np.testing.assert_array_equal(np.asarray(got).view(np.uint8)[1:], np.asarray(right).view(np.uint8)[1:])


def test_pools_that_the_kernel_cannot_rescale_are_refused():
    def refuse(dtype, block_size, match):
        pool = jnp.zeros(block_pool_shape(4, 1, 1, block_size, 32), dtype)
        kv, scales = jnp.zeros((1, 1, 32)), jnp.zeros(kv_scales_shape(4, 1, 1))
        with pytest.raises(NotImplementedError, match=match):
            write_kv_quantized(pool, scales, 0, kv, kv, jnp.zeros(1, jnp.int32), implementation="hopper")

    refuse(jnp.int8, 8, "blocks of 8 tokens of head_dim 32: expected a multiple of 512")
    refuse(jnp.int8, 16, "need an NVIDIA GPU, not cpu; implementation='xla' takes it")


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.float8_e4m3fn])
def test_compiles_for_the_gpu_at_real_sizes(dtype, monkeypatch):
    monkeypatch.setattr(here, "why_no_hopper", lambda: None)
    shaped = jax.ShapeDtypeStruct
    pool = shaped(block_pool_shape(20_000, 32, 8, 16, 128), dtype)
    scales, kv = shaped(kv_scales_shape(20_000, 32, 8), jnp.float32), shaped((256, 8, 128), jnp.bfloat16)

    def write_layers(pool, scales, k, v, slots):
        for layer in range(2):
            pool, scales = write_kv_quantized(pool, scales, layer, k, v, slots, implementation="hopper")
        return pool, scales

    traced = jax.jit(write_layers, donate_argnums=(0, 1)).trace(pool, scales, kv, kv, shaped((256,), jnp.int32))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu") == 1, "layers share one kernel"
    assert "output_operand_aliases = [#stablehlo.output_operand_alias" in text, "the pool is written in place"


@pytest.mark.parametrize(("block_size", "num_kernels"), [(16, 1), (8, 0)])
def test_the_backend_rescales_by_the_kernel_where_it_can(block_size, num_kernels, monkeypatch):
    monkeypatch.setattr(here, "why_no_hopper", lambda: None)
    cache = KVCache.allocate(
        num_blocks=4, num_layers=1, num_kv_heads=1, block_size=block_size, head_dim=32, dtype=jnp.int8
    )
    kv = jnp.ones((2, 1, 32))
    write = jax.jit(partial(BACKENDS["hopper"]("").write, layer=0), donate_argnums=0)
    traced = write.trace(cache, k=kv, v=kv, slots=jnp.asarray([9, 17], jnp.int32))
    assert traced.lower(lowering_platforms=("cuda",)).as_text().count("@mosaic_gpu") == num_kernels


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("size", [512, 1024, 2048, 4096])
def test_every_number_is_rescaled_and_rounded_as_xla_rounds(stored, size, monkeypatch):
    """On a warpgroup of numpy arrays: the interpreter passes this code by."""
    for name, stand_in in STAND_INS.items():
        monkeypatch.setattr(kernel, name, stand_in)
    rng = np.random.default_rng(0)
    numbers = rng.integers(0, 256, size, np.uint8).view(STORED[stored])
    numbers = np.where(np.isnan(numbers.astype(np.float32)), STORED[stored](1), numbers)
    right = kernel.to_stored(jnp.asarray(numbers).astype(jnp.float32) * 0.125, jnp.dtype(stored))
    memory = Memory(numbers.view(np.uint8).copy())
    kernel._multiply(memory, np.full((WARPS, LANES), 0.125, np.float32), size, jnp.dtype(stored))
    np.testing.assert_array_equal(memory.image, np.asarray(right).view(np.uint8))
