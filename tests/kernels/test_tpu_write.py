"""Writes into the pool and moves of its blocks by the TPU kernels, in Pallas's interpreter, watched for races."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import (
    block_pool_shape,
    copy_blocks,
    gather_blocks,
    kv_scales_shape,
    scatter_blocks,
    write_and_attend,
    write_kv,
    write_kv_quantized,
)
from pallas_kernels.block_pool.tpu import (
    copy_blocks_tpu,
    gather_blocks_tpu,
    scatter_blocks_tpu,
    write_kv_quantized_tpu,
    write_kv_tpu,
)
from pallas_kernels.chips.tpu import chip_of
from pallas_kernels.paged_attention import pool_rows
from pallas_kernels.paged_attention.call import KvLayer
from pallas_kernels.paged_attention.tpu import attend_tpu, write_and_attend_tpu
from pallas_kernels.paged_attention.tpu.launch import Sizes
from tests.support.attention import LAYER, Options, Shape, dense_attention, make_batch
from tests.support.tpu_interpret import EAGER, WATCHED, assert_near, no_tpu_races  # noqa: F401

pytestmark = pytest.mark.usefixtures("no_tpu_races")

NUM_BLOCKS = 9


def random_pool(dtype: type, block_size: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.standard_normal(block_pool_shape(NUM_BLOCKS, 2, 2, block_size, 128), np.float32).astype(dtype)


def ids(*blocks: int) -> jnp.ndarray:
    return jnp.asarray(blocks, jnp.int32)


def assert_same_bits(got, right) -> None:
    """Equal except for block 0, which no sequence reads."""
    got, right = (np.asarray(x)[1:] for x in (got, right))
    np.testing.assert_array_equal(got.view(np.uint8), right.view(np.uint8))


@pytest.mark.parametrize("interpret", [WATCHED, EAGER], ids=["lazy", "eager"])
@pytest.mark.parametrize(
    ("dtype", "block_size", "slots"),
    [
        # Padding, two pieces' ends, whole blocks in between, single tokens at a block's end and start, padding.
        (jnp.float32, 16, [0, 0, *range(37, 77), 31, 112, 0]),
        (jnp.bfloat16, 16, [*range(37, 77), 31, 80, 10**6, -5, 112, 113]),
        (jnp.bfloat16, 24, [*range(30, 75), 190]),
    ],
)
def test_tokens_land_in_their_slots_and_nothing_else_changes(dtype, block_size, slots, interpret):
    pool = jnp.asarray(random_pool(dtype, block_size))
    rng = np.random.default_rng(1)
    k, v = (jnp.asarray(rng.standard_normal((len(slots), 2, 128), np.float32).astype(dtype)) for _ in range(2))
    k = k.at[3].set(jnp.nan)
    got = write_kv_tpu(pool, LAYER, k, v, ids(*slots), interpret=interpret)
    assert_same_bits(got, write_kv(pool, LAYER, k, v, ids(*slots)))


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.float8_e4m3fn])
def test_quantised_pool_and_scales_become_those_of_write_kv_quantized(dtype):
    pool = jnp.zeros(block_pool_shape(NUM_BLOCKS, 2, 2, 16, 128), dtype)
    scales = jnp.zeros(kv_scales_shape(NUM_BLOCKS, 2, 2))
    right, right_scales = pool, scales
    rng = np.random.default_rng(2)
    # A prompt's piece, more of it and larger, a decode beside padding, a block that starts again.
    for slots, size in ([*range(32, 75)], 1), ([*range(75, 90), 0, 0], 5), ([90, 0, 112], 0.1), ([32, 33], 2):
        k, v = (jnp.asarray(size * rng.standard_normal((len(slots), 2, 128), np.float32)) for _ in range(2))
        right, right_scales = write_kv_quantized(right, right_scales, LAYER, k, v, ids(*slots))
        pool, scales = write_kv_quantized_tpu(pool, scales, LAYER, k, v, ids(*slots), interpret=WATCHED)
        assert_same_bits(pool, right)
        assert_same_bits(scales, right_scales)


def test_quantised_pool_is_refused():
    pool = jnp.zeros(block_pool_shape(4, 2, 2, 16, 128), jnp.int8)
    k = jnp.zeros((1, 2, 128), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="int8"):
        write_kv_tpu(pool, LAYER, k, k, ids(16), interpret=WATCHED)


def test_without_a_tpu_every_operation_is_refused():
    pool, scales = jnp.zeros(block_pool_shape(4, 2, 2, 16, 128)), jnp.zeros(kv_scales_shape(4, 2, 2))
    k, blocks, named = jnp.zeros((1, 2, 128)), ids(1), {"implementation": "pallas_tpu"}
    for run in (
        lambda: write_kv(pool, LAYER, k, k, ids(16), **named),
        lambda: write_kv_quantized(pool.astype(jnp.int8), scales, LAYER, k, k, ids(16), **named),
        lambda: copy_blocks(pool, blocks, blocks, **named),
        lambda: gather_blocks(pool, blocks, **named),
        lambda: scatter_blocks(pool, blocks, pool[:1], **named),
    ):
        with pytest.raises(NotImplementedError, match=r"need a TPU.* implementation='xla' takes it"):
            run()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.int8])
def test_blocks_are_moved_as_they_are(dtype):
    pool = jnp.asarray((100 * random_pool(jnp.float32, 16)).clip(-127, 127).astype(dtype))
    src, dst = ids(1, 2, 0, 2, -1, 3), ids(5, 6, 0, 7, 4, NUM_BLOCKS)
    assert_same_bits(copy_blocks_tpu(pool, src, dst, interpret=WATCHED), copy_blocks(pool, src, dst))

    wanted = ids(*(np.arange(20) * 7 % NUM_BLOCKS), 99)
    gathered = gather_blocks_tpu(pool, wanted, interpret=WATCHED)
    right = gather_blocks(pool, wanted)
    np.testing.assert_array_equal(np.asarray(gathered), np.asarray(right))

    to = ids(7, 3, NUM_BLOCKS, -1)
    assert_same_bits(scatter_blocks_tpu(pool, to, right[:4], interpret=WATCHED), scatter_blocks(pool, to, right[:4]))


DECODE = Shape(5, 5, 10, num_heads=4, num_kv_heads=2, head_dim=128, block_size=16)


@pytest.mark.parametrize(
    ("shape", "q_lens", "kv_lens", "options", "launch"),
    [
        (DECODE, [1, 1, 1, 1], [130, 70, 1, 32], Options(), {"sizes": Sizes(1, 4, 3), "is_decode": True}),
        (
            replace(DECODE, dtype=jnp.bfloat16, block_size=32),
            [1, 1, 1, 1],
            [130, 70, 1, 64],
            Options(sliding_window=5),
            {"sizes": Sizes(1, 2, 2), "is_decode": True, "interpret": EAGER},
        ),
        (
            replace(DECODE, num_tokens=50),
            [1, 37, 1, 0, 1],
            [130, 70, 160, 0, 1],
            Options(sliding_window=40),
            {"sizes": Sizes(2, 4, 3), "chip": chip_of("v5p")},
        ),
    ],
    ids=["decode", "decode_window_bfloat16", "mixed_on_two_cores"],
)
def test_fused_write_attends_and_leaves_the_pool_as_write_kv_does(shape, q_lens, kv_lens, options, launch):
    batch = make_batch(shape, q_lens, kv_lens)
    after, _ = batch.pool()
    before = after.copy()
    k, v = (np.zeros((shape.num_tokens, shape.num_kv_heads, shape.head_dim), shape.dtype) for _ in range(2))
    for row, (start, end) in enumerate(zip(batch.q_starts[:-1], batch.q_starts[1:], strict=True)):
        position = np.arange(kv_lens[row] - (end - start), kv_lens[row]) if row < len(kv_lens) else np.arange(0)
        k[start:end], v[start:end] = batch.keys[row][position], batch.values[row][position]
        blocks = batch.tables[row][position // shape.block_size]
        before[blocks, LAYER, :, :, position % shape.block_size] = np.nan
    out, pool, _ = write_and_attend_tpu(
        batch.call(options, before),
        jnp.asarray(k),
        jnp.asarray(v),
        **({"chip": chip_of("v5e"), "interpret": WATCHED} | launch),
    )
    assert_same_bits(pool, after)
    assert_near(np.asarray(out).astype(np.float64), dense_attention(batch, options), shape.dtype)


@pytest.mark.parametrize("head_dim", [128, 64])
@pytest.mark.parametrize("quantized", [jnp.int8, jnp.float8_e4m3fn])
def test_quantised_write_and_attend_is_the_write_and_then_attention(quantized, head_dim):
    shape = replace(DECODE, num_tokens=30, head_dim=head_dim)
    batch = make_batch(shape, [1, 20, 1], [70, 33, 16])
    num_kv_heads, pool_dim = pool_rows(shape.num_kv_heads, head_dim, "pallas_tpu")
    pool = jnp.zeros(block_pool_shape(shape.num_blocks, 2, num_kv_heads, shape.block_size, pool_dim), quantized)
    scales = jnp.zeros(kv_scales_shape(shape.num_blocks, 2, num_kv_heads))
    tokens, slots, new_slots = [], [], []
    new = np.zeros((2, shape.num_tokens, shape.num_kv_heads, head_dim), np.float32)
    for row, q_len in enumerate(batch.q_lens[:3]):
        position = np.arange(batch.kv_lens[row])
        of_row = batch.tables[row][position // shape.block_size] * shape.block_size + position % shape.block_size
        both = np.stack([batch.keys[row], batch.values[row]])
        slots += of_row[:-q_len].tolist()
        tokens.append(both[:, :-q_len])
        new_slots += of_row[-q_len:].tolist()
        new[:, batch.q_starts[row] : batch.q_starts[row + 1]] = both[:, -q_len:]

    def lanes(x):
        return jnp.asarray(x).reshape(-1, num_kv_heads, pool_dim)

    k, v = np.concatenate(tokens, axis=1)
    pool, scales = write_kv_quantized(pool, scales, LAYER, lanes(k), lanes(v), ids(*slots))
    num_new = len(new_slots)
    right, right_scales = write_kv_quantized(
        pool, scales, LAYER, lanes(new[0, :num_new]), lanes(new[1, :num_new]), ids(*new_slots)
    )
    got = write_and_attend(
        jnp.asarray(batch.q), *jnp.asarray(new), pool, LAYER, *batch.rows(), kv_scales=scales, interpret=True
    )
    assert_same_bits(got.pool, right)
    assert_same_bits(got.kv_scales, right_scales)
    attended = attend_tpu(
        replace(batch.call(), kv=KvLayer(right, LAYER, right_scales)),
        num_kv_heads=shape.num_kv_heads,
        interpret=WATCHED,
    )
    np.testing.assert_array_equal(np.asarray(got.out), np.asarray(attended))
    atol = 0.05 if quantized == jnp.int8 else 0.2
    np.testing.assert_allclose(np.asarray(got.out)[:num_new], dense_attention(batch)[:num_new], atol=atol, rtol=0)


def test_blocks_are_moved_by_name():
    pool = jnp.asarray(random_pool(jnp.float32, 16))
    by_dma = {"implementation": "pallas_tpu", "interpret": True}
    assert_same_bits(copy_blocks(pool, ids(1), ids(5), **by_dma), copy_blocks(pool, ids(1), ids(5)))
    data = gather_blocks(pool, ids(3, 1), **by_dma)
    np.testing.assert_array_equal(np.asarray(data), np.asarray(pool)[[3, 1]])
    assert_same_bits(scatter_blocks(pool, ids(4, 2), data, **by_dma), scatter_blocks(pool, ids(4, 2), data))
    k = jnp.ones((2, 2, 128))
    written = write_kv(pool, LAYER, k, k, ids(17, 18), **by_dma)
    assert_same_bits(written, write_kv(pool, LAYER, k, k, ids(17, 18)))
    scales = jnp.ones(kv_scales_shape(NUM_BLOCKS, 2, 2))
    np.testing.assert_array_equal(np.asarray(copy_blocks(scales, ids(1), ids(5), **by_dma)), np.asarray(scales))
    for options in ({"interpret": True}, {"implementation": "triton"}):
        with pytest.raises(ValueError, match="expected"):
            copy_blocks(pool, ids(1), ids(5), **options)
    with pytest.raises(ValueError, match="expected"):
        gather_blocks(pool, ids(1), implementation="hopper")
