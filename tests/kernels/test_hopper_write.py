"""The Hopper kernel that writes K and V, in Pallas's interpreter, watched for races, against XLA and numpy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import mosaic_gpu as plgpu

from jpaged.device.backends import Rows
from jpaged.device.backends.hopper import WRITE_KERNEL_FROM
from jpaged.device.kv import pool as kv_cache
from jpaged.device.kv.attend import PagedAttend
from jpaged.device.kv.pool import KVCache
from jpaged.device.target import BACKENDS
from jpaged.models.spec import LayerSpec
from pallas_kernels import block_pool_shape, write_kv
from pallas_kernels.block_pool.hopper import write_kv_hopper
from pallas_kernels.chips import here

pytestmark = pytest.mark.usefixtures("no_races")

WATCHED = plgpu.InterpretGPUParams(detect_races=True)
NUM_BLOCKS, NUM_LAYERS, LAYER = 6, 3, 1


@partial(jax.jit, static_argnames=("layer", "num_sms"), donate_argnums=0)
def write(pool, k, v, slots, layer=LAYER, num_sms=132):
    return write_kv_hopper(pool, layer, k, v, slots, num_sms=num_sms, interpret=WATCHED)


def bits(array) -> np.ndarray:
    array = np.asarray(array)
    return array.view(np.dtype(f"u{array.dtype.itemsize}"))


def nan_pool(num_kv_heads: int, block_size: int, head_dim: int, dtype) -> np.ndarray:
    """A pool of NaNs that all differ, so that a moved NaN shows."""
    shape = block_pool_shape(NUM_BLOCKS, NUM_LAYERS, num_kv_heads, block_size, head_dim)
    exponents = bits(np.full((), np.inf, dtype))
    return (exponents | (1 + np.arange(np.prod(shape)) % 63).astype(exponents.dtype)).reshape(shape).view(dtype)


def random_kv(num_tokens: int, num_kv_heads: int, head_dim: int, dtype) -> np.ndarray:
    """[2, num_tokens, num_kv_heads, head_dim]"""
    rng = np.random.default_rng(0)
    return rng.standard_normal((2, num_tokens, num_kv_heads, head_dim), np.float32).astype(dtype)


def check(slots: list[int], num_kv_heads: int, block_size: int, head_dim: int, dtype=jnp.bfloat16, **launch) -> None:
    """Tokens in blocks from 1 are where numpy and, block 0 aside, XLA put them; all else holds what it held."""
    pool = nan_pool(num_kv_heads, block_size, head_dim, dtype)
    k, v = random_kv(len(slots), num_kv_heads, head_dim, dtype)
    args = (jnp.asarray(k), jnp.asarray(v), jnp.asarray(slots, jnp.int32))
    by_xla = write_kv(jnp.array(pool), LAYER, *args, implementation="xla")
    written = write(jnp.array(pool), *args, **launch)
    assert written.dtype == dtype
    for token, slot in enumerate(slots):
        block, offset = divmod(slot, block_size)
        if 1 <= block < NUM_BLOCKS:
            pool[block, LAYER, 0, :, offset], pool[block, LAYER, 1, :, offset] = k[token], v[token]
    np.testing.assert_array_equal(bits(written), bits(pool))
    np.testing.assert_array_equal(bits(written)[1:], bits(by_xla)[1:])


@pytest.mark.parametrize(
    ("num_kv_heads", "block_size", "head_dim", "dtype"),
    [
        (2, 16, 64, jnp.bfloat16),
        (1, 8, 256, jnp.float16),
        (3, 32, 128, jnp.float32),
        (8, 8, 32, jnp.bfloat16),
        (2, 24, 96, jnp.float16),
        # Pieces of 160 and 192 bytes and of 48: the next one's place in shared memory is aligned nevertheless.
        (1, 16, 80, jnp.bfloat16),
        (3, 8, 32, jnp.float16),
        (1, 8, 12, jnp.float32),
    ],
)
def test_tokens_land_in_their_slots_and_nothing_else_changes(num_kv_heads, block_size, head_dim, dtype):
    # The pool's last slot, a block's first and last, two neighbours; every other one is padding.
    last = NUM_BLOCKS * block_size - 1
    slots = [last, 0, block_size, 0, 2 * block_size - 1, 1, 3 * block_size + 5, 3 * block_size + 6, 0]
    check(slots, num_kv_heads, block_size, head_dim, dtype)


@pytest.mark.parametrize("num_tokens", [1, 2, 3, 5, 64])
def test_any_number_of_tokens(num_tokens):
    check((16 + np.random.default_rng(0).permutation(5 * 16)[:num_tokens]).tolist(), 1, 16, 16)


@pytest.mark.parametrize(("num_sms", "num_kv_heads"), [(1, 2), (3, 2), (1, 128)])
def test_several_turns_of_each_warp(num_sms, num_kv_heads):
    """As many as its code has, as fill the device, as shared memory holds; and pieces that do not divide into them."""
    slots = np.random.default_rng(0).permutation(NUM_BLOCKS * 16)[:37]
    check(slots.tolist(), num_kv_heads, 16, 32, num_sms=num_sms)


@given(slots=st.lists(st.integers(-20, NUM_BLOCKS * 8 + 20), min_size=1, max_size=7, unique=True))
@settings(max_examples=10, deadline=None)
def test_slots_of_block_0_and_outside_the_pool_write_nothing(slots):
    # One number of tokens, so that one program is compiled.
    check([*slots, -1, 48, 2**31 - 1, -(2**31), 0, 7, 0][:7], 2, 8, 16)


@pytest.mark.parametrize("layer", [0, 2])
def test_every_layer_has_its_own_place(layer):
    pool, (k, v) = nan_pool(2, 8, 16, jnp.bfloat16), random_kv(3, 2, 16, jnp.bfloat16)
    slots = jnp.asarray([9, 20, 47], jnp.int32)
    by_xla = write_kv(jnp.array(pool), layer, jnp.asarray(k), jnp.asarray(v), slots)
    written = write(jnp.array(pool), jnp.asarray(k), jnp.asarray(v), slots, layer=layer)
    np.testing.assert_array_equal(bits(written), bits(by_xla))


def test_k_and_v_are_cast_to_the_pools_type():
    pool, (k, v) = nan_pool(2, 8, 16, jnp.bfloat16), random_kv(3, 2, 16, jnp.float32)
    args = (jnp.asarray(k), jnp.asarray(v), jnp.asarray([9, 20, 47], jnp.int32))
    by_xla = write_kv(jnp.array(pool), LAYER, *args)
    np.testing.assert_array_equal(bits(write(jnp.array(pool), *args)), bits(by_xla))


def test_no_tokens_leave_the_pool_as_it_is():
    pool = nan_pool(2, 8, 16, jnp.bfloat16)
    nothing = jnp.zeros((0, 2, 16), jnp.bfloat16)
    written = write(jnp.array(pool), nothing, nothing, jnp.zeros((0,), jnp.int32))
    np.testing.assert_array_equal(bits(written), bits(pool))


def arguments(num_kv_heads=2, head_dim=16, num_tokens=3, dtype=jnp.bfloat16):
    pool = jnp.zeros(block_pool_shape(NUM_BLOCKS, NUM_LAYERS, num_kv_heads, 8, head_dim), dtype)
    kv = jnp.zeros((num_tokens, num_kv_heads, head_dim), dtype)
    return pool, LAYER, kv, kv, jnp.zeros(num_tokens, jnp.int32)


def test_without_a_hopper_gpu_the_kernel_says_so():
    assert here.why_no_hopper() is not None
    with pytest.raises(NotImplementedError, match="need an NVIDIA GPU, not cpu; implementation='xla' takes it"):
        write_kv(*arguments(), implementation="hopper")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"dtype": jnp.float8_e5m2}, "a pool of float8_e5m2: the kernel writes float32"),
        ({"head_dim": 12}, "head_dim=12: expected rows of a multiple of 16 bytes"),
        ({"head_dim": 512}, "head_dim=512: expected rows of .* at most 256 elements"),
        ({"num_kv_heads": 257}, "257 KV heads: a token's are more"),
        ({"num_kv_heads": 256, "head_dim": 256}, "256 KV heads: .* or 4 than shared memory"),
    ],
)
def test_pools_that_the_kernel_cannot_write_are_refused(options, reason):
    with pytest.raises(NotImplementedError, match=reason):
        write_kv(*arguments(**options), implementation="hopper")


def test_arguments_that_do_not_fit_are_refused():
    pool, layer, k, v, slots = arguments()
    known = r"\['hopper', 'pallas_tpu', 'xla'\]"
    with pytest.raises(ValueError, match=f"implementation='triton' is unknown: expected None or one of {known}"):
        write_kv(pool, layer, k, v, slots, implementation="triton")
    with pytest.raises(ValueError, match=r"v has shape \(2, 2, 16\): expected \(3, 2, 16\)"):
        write_kv(pool, layer, k, v[:2], slots, implementation="hopper")
    for layer in (-1, 3):
        with pytest.raises(ValueError, match=f"layer={layer}: expected 0 to 2"):
            write_kv(pool, layer, k, v, slots, implementation="hopper")


@pytest.mark.parametrize(
    ("num_tokens", "num_kv_heads", "block_size", "head_dim", "dtype"),
    [
        (1, 8, 16, 128, jnp.bfloat16),
        (256, 8, 16, 128, jnp.bfloat16),
        (8192, 8, 16, 128, jnp.bfloat16),
        (2048, 40, 16, 128, jnp.float16),
        (100, 1, 8, 80, jnp.bfloat16),
        (7, 16, 128, 256, jnp.float32),
        (2048, 5, 24, 32, jnp.float32),
    ],
)
def test_compiles_for_the_gpu_at_real_sizes(num_tokens, num_kv_heads, block_size, head_dim, dtype, monkeypatch):
    monkeypatch.setattr(here, "why_no_hopper", lambda: None)
    num_layers = 32

    def write_layers(pool, k, v, slots):
        for layer in range(num_layers):
            pool = write_kv(pool, layer, k, v, slots, implementation="hopper")
        return pool

    abstract = jax.ShapeDtypeStruct
    kv = abstract((num_tokens, num_kv_heads, head_dim), dtype)
    traced = jax.jit(write_layers, donate_argnums=0).trace(
        abstract(block_pool_shape(20_000, num_layers, num_kv_heads, block_size, head_dim), dtype),
        kv,
        kv,
        abstract((num_tokens,), jnp.int32),
    )
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu") == 1, "layers share one kernel"
    assert "output_operand_aliases = [#stablehlo.output_operand_alias" in text, "the pool is written in place"


@pytest.mark.parametrize(
    ("num_tokens", "num_kv_heads", "implementation", "expected"),
    [
        (WRITE_KERNEL_FROM, 2, "hopper", "hopper"),
        (WRITE_KERNEL_FROM - 1, 2, "hopper", None),
        (WRITE_KERNEL_FROM, 257, "hopper", None),
        (WRITE_KERNEL_FROM, 2, "xla", None),
    ],
    ids=["large", "small", "more heads than it takes", "another device"],
)
def test_a_step_writes_with_the_kernel_where_it_is_faster(
    monkeypatch, num_tokens, num_kv_heads, implementation, expected
):
    used = []
    monkeypatch.setattr(kv_cache, "write_kv", lambda pool, *_, implementation: used.append(implementation) or pool)
    monkeypatch.setattr(kv_cache, "paged_attention", lambda q, *_, **__: q)
    cache = KVCache.allocate(num_blocks=1, num_layers=1, num_kv_heads=num_kv_heads, block_size=8, head_dim=64)
    zeros = jnp.zeros(num_tokens, jnp.int32)
    rows = Rows(zeros, jnp.zeros((1, 1), jnp.int32), zeros[:1], zeros[:2])
    kv = jnp.zeros((num_tokens, num_kv_heads, 64))
    spec = LayerSpec(layer=0, num_kv_heads=num_kv_heads, head_dim=64, sm_scale=1.0)
    PagedAttend(cache, rows, BACKENDS[implementation](""))(spec, kv, kv, kv)
    assert used == [expected]
