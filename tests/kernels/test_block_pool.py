"""The block pool against numpy, and the compiled memory of everything that writes to it."""

from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import (
    block_pool_shape,
    copy_blocks,
    gather_blocks,
    kv_scales_shape,
    paged_attention,
    scatter_blocks,
    write_and_attend,
    write_kv,
    write_kv_quantized,
)
from pallas_kernels.block_pool import QUANTIZED_WRITES, WRITES
from pallas_kernels.paged_attention import IMPLEMENTATIONS

DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)
QUANTIZED_DTYPES = (jnp.float8_e4m3fn, jnp.int8)
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


def test_scales_travel_with_their_blocks():
    scales = np.random.default_rng(0).random(kv_scales_shape(6, 3, 2), np.float32)
    src, dst = jnp.asarray([1, 2, 0], jnp.int32), jnp.asarray([2, 4, 0], jnp.int32)
    copied = np.asarray(jax.jit(copy_blocks, donate_argnums=0)(jnp.array(scales), src, dst))
    np.testing.assert_array_equal(copied, scales[[0, 1, 1, 3, 2, 5]])
    back = scatter_blocks(jnp.asarray(copied), src, gather_blocks(jnp.asarray(scales), src))
    np.testing.assert_array_equal(np.asarray(back), scales[[0, 1, 2, 3, 2, 5]])


LARGEST = {jnp.float8_e4m3fn: 448, jnp.int8: 127}
CAPACITY = 4  # tokens of a block that these tests write, however many more it holds
write_quantized = jax.jit(write_kv_quantized, static_argnames="layer", donate_argnums=(0, 1))


@dataclass
class QuantizedPool:
    """A pool and its scales, and beside them what each block should hold by the rules of write_kv_quantized.

    Nothing is zero at first: what no token has been written to is NaN, or the lowest number of int8.
    """

    dtype: type
    block_size: int
    num_blocks: int = 6
    held: dict[int, list[np.ndarray]] = field(default_factory=dict)
    least: dict[int, np.ndarray] = field(default_factory=dict)

    def __post_init__(self):
        shape = block_pool_shape(self.num_blocks, 2, 2, self.block_size, 3)
        stale = jnp.full(shape, -128 if self.dtype == jnp.int8 else jnp.nan, self.dtype)
        self.pool, self.scales = stale, jnp.full(kv_scales_shape(self.num_blocks, 2, 2), jnp.nan)

    def write(self, runs: list[tuple[int, int, np.ndarray]], num_tokens: int) -> None:
        """Each run is a block, an offset, and the tokens [n, 2, heads, head_dim] that go there; padded with NaN."""
        slots, tokens = [], []
        for block, start, values in runs:
            slots += [block * self.block_size + start + i for i in range(len(values))]
            tokens += list(values)
            if start == 0:
                self.held[block], self.least[block] = [], np.zeros((2, 2))
            self.held[block][start : start + len(values)] = list(values)
            self.least[block] = np.maximum(self.least[block], np.abs(values).max(axis=(0, 3)) / LARGEST[self.dtype])
        padding = num_tokens - len(slots)
        slots += [i % 3 for i in range(padding)]
        kv = np.concatenate([np.array(tokens).reshape(-1, 2, 2, 3), np.full((padding, 2, 2, 3), np.nan)])
        k, v = jnp.asarray(kv[:, 0], jnp.float32), jnp.asarray(kv[:, 1], jnp.float32)
        self.pool, self.scales = write_quantized(self.pool, self.scales, 1, k, v, jnp.asarray(slots, jnp.int32))

    def read(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """The values [tokens, 2, heads, head_dim] of a block, and its scales [2, heads]."""
        scales = np.asarray(self.scales)[block, 1].astype(np.float64)
        stored = np.asarray(self.pool)[block, 1].astype(np.float64)[:, :, : len(self.held[block])]
        return np.moveaxis(stored * scales[:, :, None, None], 2, 0), scales

    def check(self) -> None:
        for block, held in self.held.items():
            values, scales = self.read(block)
            power = 2.0 ** np.ceil(np.log2(np.maximum(self.least[block], 2.0**-126)))
            np.testing.assert_array_equal(scales, power)
            # Half a step of the last scale for the last rounding, and half of that for the one before, and so on.
            half_step = scales[None, :, :, None] * (0.5 if self.dtype == jnp.int8 else 2.0**-10)
            relative = 0 if self.dtype == jnp.int8 else 2.0**-4
            error = np.abs(values - np.array(held))
            assert (error <= 2 * half_step + relative * np.abs(held)).all(), (error.max(), half_step.max())


def random_tokens(num_tokens: int, magnitude: float, seed: int = 0) -> np.ndarray:
    """[num_tokens, 2, heads, head_dim] of mostly different magnitudes, as float32 holds them."""
    rng = np.random.default_rng(seed)
    shape = (num_tokens, 2, 2, 3)
    return (magnitude * rng.normal(size=shape) * 2.0 ** rng.integers(-3, 4, (num_tokens, 2, 2, 1))).astype(np.float32)


# Blocks of 2048 tokens are rescaled two at a time.
@pytest.mark.parametrize("block_size", [4, 2048])
@pytest.mark.parametrize("dtype", QUANTIZED_DTYPES)
@given(data=st.data())
@settings(max_examples=20, deadline=None)
def test_quantised_writes_read_back_within_the_error_of_their_scale(dtype, block_size, data):
    pool = QuantizedPool(dtype, block_size)
    for seed in range(data.draw(st.integers(1, 6))):
        runs = []
        for block in data.draw(st.permutations(range(1, pool.num_blocks))):
            start = data.draw(st.integers(0, min(len(pool.held.get(block, [])), CAPACITY - 1)))
            num_tokens = data.draw(st.integers(0, CAPACITY - start))
            magnitude = data.draw(st.sampled_from([0, 1e-30, 1e-3, 1, 1e3, 1e30]))
            if num_tokens:
                runs.append((block, start, random_tokens(num_tokens, magnitude, seed * 10 + block)))
        pool.write(runs, num_tokens=24)
        pool.check()


@pytest.mark.parametrize("dtype", QUANTIZED_DTYPES)
def test_more_blocks_grow_than_are_rescaled_at_once(dtype):  # 43 blocks, eight at a time
    pool = QuantizedPool(dtype, block_size=512, num_blocks=44)
    for offset, magnitude in enumerate([1, 3, 100]):
        pool.write([(b, offset, random_tokens(1, magnitude, b)) for b in range(1, 44)], num_tokens=43)
        pool.check()


@pytest.mark.parametrize("dtype", QUANTIZED_DTYPES)
def test_growing_scales_cost_e4m3_nothing_and_int8_less_than_one_step(dtype):
    pool = QuantizedPool(dtype, block_size=16)
    first = np.full((1, 2, 2, 3), 1.375, np.float32)  # eleven eighths: e4m3 has three bits for the fraction
    pool.write([(1, 0, first)], num_tokens=1)
    for offset in range(1, 7):
        pool.write([(1, offset, first * 2.0**offset)], num_tokens=1)
        pool.check()
    values, scales = pool.read(1)
    if dtype == jnp.int8:
        assert (np.abs(values[0] - first[0]) < scales[:, :, None]).all()
    else:
        np.testing.assert_array_equal(values[0], first[0])


@pytest.mark.parametrize("dtype", QUANTIZED_DTYPES)
def test_a_token_at_offset_0_forgets_the_blocks_scale(dtype):
    pool = QuantizedPool(dtype, block_size=4)
    pool.write([(2, 0, random_tokens(4, 1e6))], num_tokens=4)
    pool.write([(2, 0, random_tokens(1, 1e-6))], num_tokens=4)
    pool.check()
    assert (pool.read(2)[1] < 1e-6).all()


@pytest.mark.parametrize("dtype", QUANTIZED_DTYPES)
def test_zeros_have_a_scale_and_read_back_as_zeros(dtype):
    pool = QuantizedPool(dtype, block_size=4)
    pool.write([(2, 0, np.zeros((2, 2, 2, 3)))], num_tokens=4)
    values, scales = pool.read(2)
    assert not values.any()
    assert (scales > 0).all()
    assert np.isfinite(1 / scales.astype(np.float32)).all()
    pool.write([(2, 2, random_tokens(2, 1.0))], num_tokens=4)
    pool.check()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", QUANTIZED_DTYPES)
def test_what_is_not_finite_marks_its_head_and_block_until_that_starts_anew(dtype, bad):
    pool = QuantizedPool(dtype, block_size=4)
    pool.write([(2, 0, random_tokens(2, 1.0)), (3, 0, random_tokens(2, 1.0))], num_tokens=4)
    overflow = random_tokens(1, 1.0)
    overflow[0, 1, 0, 2] = bad
    pool.write([(2, 2, overflow), (3, 2, random_tokens(1, 1.0))], num_tokens=4)
    values, _ = pool.read(2)
    assert np.isnan(values[:, 1, 0]).all()
    assert np.isfinite(values[:, [0, 0, 1], [0, 1, 1]]).all()
    del pool.held[2]
    pool.check()
    pool.write([(2, 0, random_tokens(2, 1.0))], num_tokens=4)
    pool.check()


@pytest.mark.parametrize("dtype", QUANTIZED_DTYPES)
def test_quantised_writes_touch_no_other_block_and_no_other_layer(dtype):
    pool = QuantizedPool(dtype, block_size=4)
    for block in range(1, 6):
        pool.write([(block, 0, random_tokens(2, 1.0, block))], num_tokens=2)
    before, scales_before = np.asarray(pool.pool).view(np.uint8), np.asarray(pool.scales)
    pool.write([(3, 2, random_tokens(2, 50.0))], num_tokens=4)
    after, scales_after = np.asarray(pool.pool).view(np.uint8), np.asarray(pool.scales)
    others = [1, 2, 4, 5]
    np.testing.assert_array_equal(after[others], before[others])
    np.testing.assert_array_equal(after[:, 0], before[:, 0])
    np.testing.assert_array_equal(scales_after[others], scales_before[others])
    np.testing.assert_array_equal(scales_after[:, 0], scales_before[:, 0])


@pytest.mark.parametrize("slot", [-1, -4, 24, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("dtype", QUANTIZED_DTYPES)
def test_quantised_writes_outside_the_pool_write_nothing(dtype, slot):
    pool = QuantizedPool(dtype, block_size=4)
    k = v = jnp.ones((1, 2, 3))
    written, scales = write_kv_quantized(pool.pool, pool.scales, 1, k, v, jnp.asarray([slot], jnp.int32))
    np.testing.assert_array_equal(np.asarray(written).view(np.uint8), np.asarray(pool.pool).view(np.uint8))
    np.testing.assert_array_equal(np.asarray(scales), np.asarray(pool.scales))


def test_writes_refuse_a_pool_of_the_wrong_kind():
    quantized = QuantizedPool(jnp.int8, block_size=4)
    k = v = jnp.ones((1, 2, 3))
    slots = jnp.zeros(1, jnp.int32)
    with pytest.raises(ValueError, match="int8 came without kv_scales: write it with write_kv_quantized"):
        write_kv(quantized.pool, 0, k, v, slots)
    with pytest.raises(ValueError, match="kv_scales came with a pool of float32"):
        write_kv_quantized(jnp.zeros(quantized.pool.shape), quantized.scales, 0, k, v, slots)
    with pytest.raises(
        ValueError, match=r"kv_scales is float32 of shape \(6, 2, 2\): expected float32 of shape \(6, 2, 2, 2\)"
    ):
        write_kv_quantized(quantized.pool, quantized.scales[..., 0], 0, k, v, slots)


@pytest.mark.parametrize("layer", [-1, 2, 7])
def test_layer_that_the_pool_does_not_have_is_refused_by_every_implementation(layer):
    pool, quantized = jnp.zeros(block_pool_shape(4, 2, 2, 8, 16)), jnp.zeros(block_pool_shape(4, 2, 2, 8, 16), jnp.int8)
    scales, k, slots = jnp.zeros(kv_scales_shape(4, 2, 2)), jnp.ones((1, 2, 16)), jnp.asarray([9], jnp.int32)
    rows = jnp.zeros((1, 2), jnp.int32), jnp.ones(1, jnp.int32), jnp.asarray([0, 1], jnp.int32)

    def refuses(function, *args, **options):
        with pytest.raises(ValueError, match=f"layer={layer}: expected 0 to 1, .* one of the pool's 2 layers"):
            function(*args, **options)

    for name in (None, *WRITES):
        refuses(write_kv, pool, layer, k, k, slots, implementation=name)
    for name in (None, *QUANTIZED_WRITES):
        refuses(write_kv_quantized, quantized, scales, layer, k, k, slots, implementation=name)
    for name in (None, *IMPLEMENTATIONS):
        refuses(paged_attention, k, pool, layer, *rows, implementation=name)
    refuses(write_and_attend, k, k, k, pool, layer, *rows)


def test_layer_that_is_an_array_is_refused_traced_or_not():
    pool, k, slots = jnp.zeros(block_pool_shape(4, 2, 2, 8, 16)), jnp.ones((1, 2, 16)), jnp.asarray([9], jnp.int32)
    with pytest.raises(ValueError, match="layer=7: expected 0 to 1, a static number"):
        write_kv(pool, jnp.int32(7), k, k, slots)
    with pytest.raises(ValueError, match="expected 0 to 1, a static number"):
        jax.jit(write_kv)(pool, jnp.int32(1), k, k, slots)


def test_moves_of_other_shapes_or_types_are_refused():
    pool = jnp.zeros(block_pool_shape(4, 2, 2, 8, 16))
    one, two = jnp.asarray([1], jnp.int32), jnp.asarray([2, 3], jnp.int32)
    with pytest.raises(ValueError, match=r"src has shape \(1,\) and dst \(2,\)"):
        copy_blocks(pool, one, two)
    for data in (pool[:1], pool[:2].astype(jnp.bfloat16)):
        with pytest.raises(ValueError, match="as gather_blocks returns it"):
            scatter_blocks(pool, two, data)


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


def write_quantized_layers(cache, k, v, slots):
    for layer in range(3):
        cache = write_kv_quantized(*cache, layer, k * 2, v + k, slots)
    return cache


# int8 alone: XLA for CPUs widens the whole of a float8 pool.
@pytest.mark.parametrize("num_tokens", [32, 8192])
def test_quantised_writes_allocate_in_proportion_to_what_they_write(num_tokens):
    shape = block_pool_shape(num_blocks=2**16, num_layers=3, num_kv_heads=2, block_size=16, head_dim=64)
    pool, scales = jax.ShapeDtypeStruct(shape, jnp.int8), jax.ShapeDtypeStruct(shape[:4], jnp.float32)
    kv = jax.ShapeDtypeStruct((num_tokens, 2, 64), jnp.float32)
    slots = jax.ShapeDtypeStruct((num_tokens,), jnp.int32)
    compiled = jax.jit(write_quantized_layers, donate_argnums=0).lower((pool, scales), kv, kv, slots).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= pool.size + 4 * scales.size, "the pool was not updated in place"
    # Few tokens may each need a block of their own rescaled, so they count for as many as a block holds.
    kv_bytes = 2 * kv.size * 4 * (16 if num_tokens == 32 else 1)
    assert memory.temp_size_in_bytes < 8 * kv_bytes


def test_attention_over_a_quantised_pool_widens_only_what_it_reads():
    def ints(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    q, pool = jax.ShapeDtypeStruct((32, 4, 64), jnp.bfloat16), jax.ShapeDtypeStruct(BIG, jnp.int8)
    scales = jax.ShapeDtypeStruct(BIG[:4], jnp.float32)
    attend = jax.jit(partial(paged_attention, layer=1, implementation="xla"))
    rows = {"block_tables": ints(8, 128), "kv_lens": ints(8), "cu_q_lens": ints(9)}
    compiled = attend.lower(q, pool, **rows, kv_scales=scales).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < pool.size / 20
