"""The block pool against numpy, and the compiled memory of everything that writes to it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import block_pool_shape, copy_blocks, gather_blocks, paged_attention, scatter_blocks, write_kv

DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)
BLOCK_SIZE = 8


def random_pool(dtype=jnp.float32) -> np.ndarray:
    shape = block_pool_shape(num_blocks=6, num_layers=3, num_kv_heads=2, block_size=BLOCK_SIZE, head_dim=16)
    return np.random.default_rng(0).standard_normal(shape, np.float32).astype(dtype)


def random_kv(num_tokens: int, dtype=jnp.float32) -> tuple[np.ndarray, np.ndarray]:
    k, v = np.random.default_rng(1).standard_normal((2, num_tokens, 2, 16), np.float32).astype(dtype)
    return k, v


@pytest.mark.parametrize("dtype", DTYPES)
def test_write_kv_stores_each_token_in_its_slot_and_nothing_else(dtype):
    pool, (k, v) = random_pool(dtype), random_kv(5, dtype)
    slots = [47, 8, 15, 16, 30]  # the pool's last slot, a block's first and last
    written = write_kv(jnp.asarray(pool), 1, jnp.asarray(k), jnp.asarray(v), jnp.asarray(slots, jnp.int32))
    for token, slot in enumerate(slots):
        block, offset = divmod(slot, BLOCK_SIZE)
        pool[block, 1, 0, :, offset] = k[token]
        pool[block, 1, 1, :, offset] = v[token]
    np.testing.assert_array_equal(np.asarray(written), pool)


def test_write_kv_casts_to_the_pools_type():
    pool, (k, v) = random_pool(jnp.bfloat16), random_kv(1)
    written = write_kv(jnp.asarray(pool), 0, jnp.asarray(k), jnp.asarray(v), jnp.asarray([9], jnp.int32))
    np.testing.assert_array_equal(np.asarray(written)[1, 0, 0, :, 1], k[0].astype(jnp.bfloat16))


def test_padding_tokens_may_share_a_slot_of_block_0():
    pool, (k, v) = random_pool(), random_kv(5)
    slots = jnp.asarray([20, 0, 0, 0, 0], jnp.int32)
    written = np.asarray(write_kv(jnp.asarray(pool), 2, jnp.asarray(k), jnp.asarray(v), slots))
    pool[2, 2, 0, :, 4], pool[2, 2, 1, :, 4] = k[0], v[0]
    np.testing.assert_array_equal(written[1:], pool[1:])


@pytest.mark.parametrize("slot", [-1, 48, 2**31 - 1, -(2**31)])
def test_slots_outside_the_pool_write_nothing(slot):
    pool, (k, v) = random_pool(), random_kv(1)
    written = write_kv(jnp.asarray(pool), 0, jnp.asarray(k), jnp.asarray(v), jnp.asarray([slot], jnp.int32))
    np.testing.assert_array_equal(np.asarray(written), pool)


def test_copies_read_every_source_before_they_write():
    pool = random_pool()
    src, dst = jnp.asarray([1, 2, 3, 0, 0], jnp.int32), jnp.asarray([2, 3, 5, 0, 0], jnp.int32)
    copied = np.asarray(jax.jit(copy_blocks, donate_argnums=0)(jnp.array(pool), src, dst))
    np.testing.assert_array_equal(copied, pool[[0, 1, 1, 2, 4, 3]])


def test_gathered_blocks_scatter_back():
    pool = random_pool()
    data = gather_blocks(jnp.asarray(pool), jnp.asarray([4, 1], jnp.int32))
    np.testing.assert_array_equal(np.asarray(data), pool[[4, 1]])
    moved = np.asarray(scatter_blocks(jnp.asarray(pool), jnp.asarray([2, 3], jnp.int32), data))
    np.testing.assert_array_equal(moved, pool[[0, 1, 4, 1, 4, 5]])


BIG = block_pool_shape(num_blocks=4096, num_layers=3, num_kv_heads=2, block_size=16, head_dim=64)


def write_layers(pool, k, v, slots):
    for layer in range(3):
        pool = write_kv(pool, layer, k * 2, v + k, slots)
    return pool


def attend_layers(pool, q, slots, block_tables, kv_lens, cu_q_lens):
    for layer in range(2):
        pool = write_kv(pool, layer, q[:, :2] * 2, q[:, 2:] + q[:, :2], slots)
        q = q + paged_attention(q, pool, layer, block_tables, kv_lens, cu_q_lens)
    return pool, q


def assert_in_place(function, pool, *args):
    compiled = jax.jit(function, donate_argnums=0).lower(pool, *args).compile()
    memory, pool_bytes = compiled.memory_analysis(), pool.size * pool.dtype.itemsize
    assert memory.alias_size_in_bytes >= pool_bytes, "the pool was not updated in place"
    assert memory.temp_size_in_bytes < pool_bytes / 20, (
        f"{memory.temp_size_in_bytes} temporary for {pool_bytes} of pool"
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_of_the_pools_size_is_allocated(dtype):
    shaped = jax.ShapeDtypeStruct
    pool, kv, ids = shaped(BIG, dtype), shaped((32, 2, 64), dtype), shaped((4,), jnp.int32)
    assert_in_place(write_layers, pool, kv, kv, shaped((32,), jnp.int32))
    assert_in_place(copy_blocks, pool, ids, ids)
    assert_in_place(scatter_blocks, pool, ids, shaped((4, *BIG[1:]), dtype))


@pytest.mark.parametrize(
    ("dtype", "num_tokens"), [(jnp.float32, 8), (jnp.float32, 32), (jnp.bfloat16, 32), (jnp.float16, 32)]
)
def test_layers_of_writes_and_attention_stay_far_below_the_pools_size(dtype, num_tokens):
    def ints(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    q = jax.ShapeDtypeStruct((num_tokens, 4, 64), dtype)
    pool = jax.ShapeDtypeStruct(BIG, dtype)
    assert_in_place(attend_layers, pool, q, ints(num_tokens), ints(8, 128), ints(8), ints(9))
