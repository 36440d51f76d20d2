"""The Hopper kernel that copies blocks, in Pallas's interpreter, watched for races, against numpy and XLA."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from jpaged.device.kv.pool import KVCache
from jpaged.device.target import BACKENDS
from jpaged.sharding import make_mesh, pool_sharding
from pallas_kernels import block_pool_shape, copy_blocks, kv_scales_shape
from pallas_kernels.block_pool.hopper import copy as kernel
from pallas_kernels.block_pool.hopper import copy_blocks_hopper
from pallas_kernels.chips import here

pytestmark = pytest.mark.usefixtures("no_races")

WATCHED = plgpu.InterpretGPUParams(detect_races=True)
NUM_BLOCKS = 9


@partial(jax.jit, static_argnames=("num_sms", "piece_bytes"), donate_argnums=0)
def copy(pool, src, dst, num_sms=2, piece_bytes=kernel.PIECE_BYTES):
    return copy_blocks_hopper(pool, src, dst, num_sms=num_sms, piece_bytes=piece_bytes, interpret=WATCHED)


def random_bits(dtype, shape: tuple[int, ...]) -> np.ndarray:
    """Any bits, NaN too."""
    dtype = np.dtype(dtype)
    return np.random.default_rng(0).integers(0, 256, (*shape[:-1], shape[-1] * dtype.itemsize), np.uint8).view(dtype)


def bits(array) -> np.ndarray:
    return np.asarray(array).view(np.uint8)


def ids(*numbers: int) -> jax.Array:
    return jnp.asarray(numbers, jnp.int32)


@pytest.mark.parametrize(
    ("dtype", "axes", "launch"),
    [
        (jnp.bfloat16, (3, 2, 8, 16), {}),
        (jnp.float8_e4m3fn, (2, 1, 16, 32), {}),
        (jnp.int8, (1, 3, 8, 48), {"num_sms": 1}),
        (jnp.float32, (2, 2, 8, 80), {"num_sms": 1, "piece_bytes": 1024}),  # each warp's ring turns round
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, tuple) else None,
)
def test_blocks_are_copied_bit_for_bit_and_all_else_stays(dtype, axes, launch):
    num_layers, num_kv_heads, block_size, head_dim = axes
    pool = random_bits(dtype, block_pool_shape(NUM_BLOCKS, num_layers, num_kv_heads, block_size, head_dim))
    # One source of two copies, padding in the middle and at the end, and destinations that no pool has.
    src, dst = ids(1, 0, 1, 3, 4, 2, 0, 0), ids(5, 0, 8, 6, NUM_BLOCKS, -1, 0, 0)
    right = pool.copy()
    right[[5, 8, 6]] = pool[[1, 1, 3]]
    copied = copy(jnp.array(pool), src, dst, **launch)
    np.testing.assert_array_equal(bits(copied), bits(right))
    np.testing.assert_array_equal(bits(copied)[1:], bits(copy_blocks(jnp.array(pool), src, dst))[1:])


def test_padding_alone_and_no_copies_leave_the_pool_as_it_is():
    pool = random_bits(jnp.bfloat16, block_pool_shape(NUM_BLOCKS, 1, 1, 8, 16))
    for blocks in (ids(0, 0), ids()):
        np.testing.assert_array_equal(bits(copy(jnp.array(pool), blocks, blocks)), bits(pool))


def test_blocks_are_copied_by_name_and_scales_by_xla():
    pool, scales = random_bits(jnp.int8, block_pool_shape(4, 1, 1, 8, 32)), np.arange(8, dtype=np.float32)
    scales = scales.reshape(kv_scales_shape(4, 1, 1))
    run = partial(copy_blocks, src=ids(1), dst=ids(3), implementation="hopper", interpret=True)
    for array in (pool, scales):
        np.testing.assert_array_equal(bits(run(jnp.asarray(array))), bits(array[[0, 1, 2, 1]]))


def test_without_a_hopper_gpu_the_kernel_says_so():
    assert here.why_no_hopper() is not None
    pool = jnp.zeros(block_pool_shape(4, 1, 1, 8, 16), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="need an NVIDIA GPU, not cpu; implementation='xla' takes it"):
        copy_blocks(pool, ids(1), ids(2), implementation="hopper")


@pytest.mark.parametrize(
    ("dtype", "block_size", "head_dim", "reason"),
    [
        (jnp.float8_e5m2, 8, 16, "a pool of float8_e5m2: the kernel copies float32, .* int8"),
        (jnp.bfloat16, 8, 10, r"blocks of shape \(1, 2, 1, 8, 10\): expected a multiple of 128 bytes"),
        (jnp.int8, 3, 5, "expected a multiple of 128 bytes"),
    ],
)
def test_pools_that_the_kernel_cannot_copy_are_refused(dtype, block_size, head_dim, reason):
    pool = jnp.zeros(block_pool_shape(4, 1, 1, block_size, head_dim), dtype)
    with pytest.raises(NotImplementedError, match=reason):
        copy_blocks(pool, ids(1), ids(2), implementation="hopper")


@pytest.mark.parametrize(
    ("num_copies", "axes", "dtype"),
    [
        (64, (32, 8, 16, 128), jnp.bfloat16),
        (8, (32, 8, 16, 128), jnp.float8_e4m3fn),
        (1, (28, 8, 16, 128), jnp.int8),
        (256, (40, 40, 16, 128), jnp.float16),
        (8, (12, 5, 8, 80), jnp.bfloat16),
        (8, (2, 1, 32, 256), jnp.float32),
    ],
)
def test_compiles_for_the_gpu_at_real_sizes(num_copies, axes, dtype, monkeypatch):
    monkeypatch.setattr(here, "why_no_hopper", lambda: None)
    num_layers, num_kv_heads, block_size, head_dim = axes
    pool = jax.ShapeDtypeStruct(block_pool_shape(20_000, num_layers, num_kv_heads, block_size, head_dim), dtype)
    shape = kernel.copy_shape(pool, num_copies)
    assert kernel.PIECE_BYTES // 2 <= shape.rows * shape.width * pool.dtype.itemsize <= kernel.PIECE_BYTES
    blocks = jax.ShapeDtypeStruct((num_copies,), jnp.int32)
    run = jax.jit(partial(copy_blocks, implementation="hopper"), donate_argnums=0)
    text = run.trace(pool, blocks, blocks).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu") == 1
    assert "output_operand_aliases = [#stablehlo.output_operand_alias" in text, "the pool is written in place"


@pytest.mark.parametrize(
    ("num_devices", "dtype", "head_dim", "num_kernels"),
    [(1, jnp.bfloat16, 16, 1), (2, jnp.int8, 32, 1), (2, jnp.bfloat16, 2, 0)],
    ids=["one device", "two devices", "a device's share is no multiple of 128 bytes"],
)
def test_the_backend_copies_by_the_kernel_where_it_can(num_devices, dtype, head_dim, num_kernels, monkeypatch):
    monkeypatch.setattr(here, "why_no_hopper", lambda: None)
    mesh = make_mesh(num_devices)
    sizes = {"num_blocks": 8, "num_layers": 1, "num_kv_heads": 2, "block_size": 8, "head_dim": head_dim}
    cache = KVCache.allocate(**sizes, dtype=dtype, sharding=pool_sharding(mesh))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        traced = jax.jit(BACKENDS["hopper"]("", num_devices).copy, donate_argnums=0).trace(cache, ids(1), ids(2))
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu") == num_kernels
