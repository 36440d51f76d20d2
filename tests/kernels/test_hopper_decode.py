"""The Hopper decode kernel in Pallas's interpreter, watched for races, against dense attention over a pool of NaN."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.block_pool.quantization import SMALLEST_SCALE
from pallas_kernels.paged_attention.call import Scoring
from pallas_kernels.paged_attention.hopper import attend_hopper
from pallas_kernels.paged_attention.hopper.decode import attend_decode
from pallas_kernels.paged_attention.hopper.decode_memory import DecodeSizes
from pallas_kernels.paged_attention.hopper.decode_quantized import LEAST_V_SCALE
from pallas_kernels.paged_attention.hopper.prefill_plan import PrefillSizes
from pallas_kernels.paged_attention.hopper.schedule import queries_of_rows, queries_of_tokens
from pallas_kernels.paged_attention.hopper.tuning import Sizes, sizes_for
from tests.support.attention import (
    LAYER,
    NO_OPTIONS,
    Batch,
    Options,
    Shape,
    abstract_call,
    dense_attention,
    make_batch,
    round_scales,
)
from tests.support.attention_cases import Rows, SharedPrefixCases

pytestmark = pytest.mark.usefixtures("no_races")

SENTINEL = 7.0
"""Where no output is due."""

SMALL = DecodeSizes(tile_tokens=64, slots=4, workers_per_sm=1)
WATCHED = plgpu.InterpretGPUParams(detect_races=True)


@partial(jax.jit, static_argnames=("of_tokens", "sizes", "num_sms", "interpret"))
def decode(call, *, of_tokens, sizes, num_sms, interpret):
    _, kv_lens, q_starts = call.batch
    if of_tokens:
        queries = queries_of_tokens(call.num_tokens, kv_lens, q_starts, call.scoring.sliding_window)
    else:
        queries = queries_of_rows(kv_lens, q_starts, call.scoring.sliding_window)
    out = jax.new_ref(jnp.full_like(call.q, SENTINEL))
    attend_decode(out, queries, call, sizes=sizes, num_sms=num_sms, interpret=interpret)
    return out[...]


def attend(
    batch: Batch,
    options: Options = NO_OPTIONS,
    *,
    of_tokens: bool = False,
    sizes: DecodeSizes = SMALL,
    num_sms: int = 2,
) -> np.ndarray:
    out = decode(batch.call(options), of_tokens=of_tokens, sizes=sizes, num_sms=num_sms, interpret=WATCHED)
    assert out.dtype == batch.shape.dtype
    return np.asarray(out).astype(np.float64)


def check(batch: Batch, options: Options = NO_OPTIONS, *, of_tokens: bool = False, **launch) -> None:
    """Attended tokens get dense attention's outputs; padding and the other kernel's tokens, nothing."""
    is_attended = np.zeros(batch.shape.num_tokens, bool)
    for start, end in zip(batch.q_starts[:-1], batch.q_starts[1:], strict=True):
        is_attended[start:end] = of_tokens or end - start == 1
    out = attend(batch, options, of_tokens=of_tokens, **launch)
    np.testing.assert_array_equal(out[~is_attended], SENTINEL)
    assert_near(out[is_attended], dense_attention(batch, options)[is_attended], batch.shape.dtype)


def assert_near(out: np.ndarray, right: np.ndarray, dtype: type) -> None:
    """Within what rounding weights and results to the type costs, and so less than what one token more or less does."""
    rounding = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(out, right, rtol=rounding, atol=rounding / 4)


RAGGED = Shape(9, 6, 10, num_heads=4, num_kv_heads=2, head_dim=64, block_size=16, dtype=jnp.bfloat16)


def test_rows_of_any_length_beside_padding_and_rows_that_are_not_its_own():
    # A decode, a piece of a prompt, a first token, no queries, a partly filled tile, a block's end; padding.
    check(make_batch(RAGGED, [1, 3, 1, 0, 1, 1], [70, 40, 1, 0, 130, 16]), num_sms=5)


def test_batch_of_padding_alone_writes_nothing():
    check(make_batch(RAGGED, [], []), num_sms=5)


def test_tiles_of_a_large_block_that_lie_behind_the_window_are_no_ones_part():
    shape = Shape(1, 1, 2, num_heads=4, num_kv_heads=2, head_dim=64, block_size=128, dtype=jnp.bfloat16)
    check(make_batch(shape, [1], [240]), Options(sliding_window=140), num_sms=4)


class TestHopper(SharedPrefixCases):
    """Both kernels together."""

    # A decode, a piece of a prompt, a decode at a block's end, no queries, a first token; padding.
    MIXED = Rows(replace(RAGGED, num_tokens=26), [1, 20, 1, 0, 1], [70, 50, 48, 0, 1])
    DECODE = Rows(replace(RAGGED, num_tokens=6), [1, 1, 1, 1], [1, 16, 17, 150])
    SHARED, NUM_SHARED = Rows(replace(RAGGED, num_tokens=6), [1, 1], [100, 90]), 5

    def attend(self, batch, options=NO_OPTIONS):
        sizes = Sizes(SMALL, PrefillSizes(kv_tile=64))
        out = attend_hopper(batch.call(options), sizes=sizes, num_sms=2, interpret=WATCHED)
        return np.asarray(out).astype(np.float64)

    def assert_near(self, out, right, dtype):
        assert_near(out, right, dtype)


@pytest.mark.parametrize(("quantized", "is_reused"), [(None, True), (jnp.int8, False)])
def test_both_kernels_together_attend_a_mixed_batch_and_give_zeros_for_padding(quantized, is_reused):
    shape = Shape(16, 4, 5, num_heads=4, num_kv_heads=2, head_dim=64, block_size=16, dtype=jnp.bfloat16)
    batch = make_batch(replace(shape, quantized=quantized), [1, 9, 0, 1], [70, 30, 0, 1])
    if quantized is not None:
        round_scales(batch)
    num_tokens = int(batch.q_starts[-1])
    before = jnp.zeros(batch.q.shape, shape.dtype).at[:num_tokens].set(7)
    call = replace(batch.call(), into=before if is_reused else None)
    out = attend_hopper(call, num_sms=2, interpret=WATCHED)
    out = np.asarray(out).astype(np.float64)
    assert_near(out[:num_tokens], dense_attention(batch)[:num_tokens], shape.dtype)
    np.testing.assert_array_equal(out[num_tokens:], 0)


def test_results_are_the_same_bits_every_time():
    batch = make_batch(RAGGED, [1, 1, 1], [130, 70, 159])
    first = attend(batch, num_sms=5)
    np.testing.assert_array_equal(attend(batch, num_sms=5), first)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_overflow_in_one_row_stays_there():
    batch = make_batch(RAGGED, [1, 1, 1, 1], [70, 30, 9, 130])
    right = dense_attention(batch)
    batch.values[1][0] = np.inf
    batch.keys[2][0] = np.nan
    out = attend(batch, num_sms=5)
    assert_near(out[[0, 3]], right[[0, 3]], batch.shape.dtype)
    assert not np.isfinite(out[[1, 2]]).any()


def test_every_token_of_a_prompt_within_its_window():
    shape = Shape(6, 4, 16, num_heads=2, num_kv_heads=2, head_dim=96, block_size=8, dtype=jnp.bfloat16)
    check(make_batch(shape, [1, 3, 1], [70, 128, 5]), Options(sliding_window=21), of_tokens=True)


def test_items_that_many_workers_share_with_cap_slopes_and_sinks():
    shape = Shape(2, 2, 41, num_heads=8, num_kv_heads=1, head_dim=128, block_size=16, dtype=jnp.bfloat16)
    rng = np.random.default_rng(0)
    slopes, sinks = 0.1 * rng.standard_normal(8), 3 * rng.standard_normal(8)
    options = Options(soft_cap=2.0, alibi_slopes=slopes, sinks=sinks)
    check(make_batch(shape, [1, 1], [650, 70]), options, num_sms=9)


def test_blocks_that_rows_share_and_that_tiles_divide_under_a_wide_group():
    shape = Shape(2, 2, 2, num_heads=12, num_kv_heads=1, head_dim=64, block_size=128, dtype=jnp.float16)
    batch = make_batch(shape, [1, 1], [200, 130])
    batch.tables[1, 0] = batch.tables[0, 0]
    batch.keys[1][:128], batch.values[1][:128] = batch.keys[0][:128], batch.values[0][:128]
    check(batch, num_sms=3)


def test_heads_narrower_than_their_tile():
    shape = Shape(3, 3, 10, num_heads=12, num_kv_heads=2, head_dim=80, block_size=16, dtype=jnp.bfloat16)
    check(make_batch(shape, [1, 1], [150, 17]), Options(sliding_window=100, sinks=np.linspace(-2, 5, 12)))


def test_large_tiles_of_several_workers_of_a_multiprocessor_under_an_odd_group():
    shape = Shape(2, 2, 20, num_heads=10, num_kv_heads=2, head_dim=64, block_size=32, dtype=jnp.float16)
    check(make_batch(shape, [1, 1], [600, 130]), sizes=DecodeSizes(128, 3, 2))


@pytest.mark.parametrize(
    ("quantized", "head_dim", "block_size"),
    [
        (jnp.int8, 128, 16),
        (jnp.float8_e4m3fn, 64, 16),
        (jnp.float8_e4m3fn, 96, 8),
        (jnp.int8, 32, 64),
    ],
)
def test_quantised_pool_is_attended_as_its_values(quantized, head_dim, block_size):
    shape = replace(RAGGED, head_dim=head_dim, block_size=block_size, max_blocks=-(-160 // block_size))
    options = Options(sliding_window=100, sinks=np.array([-1.0, 0.0, 2.0, 5.0]))
    check(make_batch(replace(shape, quantized=quantized), [1, 1, 1], [130, 70, 1]), options)


def test_large_tiles_of_a_quantised_pool_with_cap_and_slopes():
    shape = Shape(2, 2, 20, num_heads=10, num_kv_heads=2, head_dim=64, block_size=32, dtype=jnp.bfloat16)
    options = Options(soft_cap=2.0, alibi_slopes=np.linspace(-0.1, 0.1, 10))
    batch = make_batch(replace(shape, quantized=jnp.float8_e4m3fn), [1, 1], [600, 130])
    check(batch, options, sizes=DecodeSizes(128, 3, 2))


ONE_ROW = Shape(1, 1, 8, num_heads=4, num_kv_heads=2, head_dim=64, block_size=16, dtype=jnp.bfloat16)


def scale_values(batch: Batch, of_block: np.ndarray) -> None:
    """Multiply the V of each of the first row's blocks, and its scale, by a factor."""
    blocks = np.arange(len(batch.values[0])) // batch.shape.block_size
    batch.values[0][:] *= of_block[blocks, None, None]
    batch.scales[batch.tables[0, : len(of_block)], LAYER, 1] *= of_block[:, None].astype(np.float32)


@pytest.mark.parametrize("exponent", [-94, -20, 20])
def test_tokens_of_nothing_but_zeros_take_their_share_whatever_the_scales(exponent):
    batch = make_batch(replace(ONE_ROW, quantized=jnp.int8), [1], [100])
    scale_values(batch, np.full(7, 2.0**exponent))
    batch.values[0][16:80] = 0
    batch.scales[batch.tables[0, 1:5], LAYER, 1] = SMALLEST_SCALE
    check_dims(batch)


@pytest.mark.parametrize(("quantized", "exponent"), [(jnp.int8, -65), (jnp.float8_e4m3fn, -88)])
def test_values_of_tiny_scales_are_attended_as_they_are(quantized, exponent):
    batch = make_batch(replace(ONE_ROW, quantized=quantized), [1], [100])
    scale_values(batch, 2.0 ** (exponent - np.array([0, 2, 1, 0, 5, 1, 0])))
    assert batch.scales[batch.tables[0, :7], LAYER, 1].min() > LEAST_V_SCALE
    check_dims(batch)


@pytest.mark.parametrize("quantized", [jnp.int8, jnp.float8_e4m3fn])
def test_dims_that_only_values_of_small_scales_have_keep_their_precision(quantized):
    batch = make_batch(replace(ONE_ROW, quantized=quantized), [1], [100])
    scale_values(batch, np.array([1, 2.0**10, 1, 2.0**10, 1, 1, 2.0**10]))
    for first in (16, 48, 96):
        batch.values[0][first : first + 16, :, 1::2] = 0
    right = dense_attention(batch)
    assert np.abs(right[..., ::2]).mean() > 100 * np.abs(right[..., 1::2]).mean()
    check_dims(batch)


def check_dims(batch: Batch) -> None:
    """Like ``check`` for a row whose even dims may be of another size than its odd ones."""
    out, right = attend(batch), dense_attention(batch)
    size = np.empty(right.shape)
    for nth in range(2):
        size[..., nth::2] = np.abs(right[..., nth::2]).max(axis=2, keepdims=True)
    assert_near(out / size, right / size, batch.shape.dtype)


def test_queries_as_large_as_bfloat16_can_hold():
    batch = make_batch(replace(ONE_ROW, quantized=jnp.int8), [1], [100])
    batch.scales[:, LAYER, 0] *= np.float32(2.0**-60)
    batch.keys[0][:] *= 2.0**-60
    largest = np.abs(batch.q.astype(np.float32)).max(axis=2, keepdims=True)
    batch.q[:] = (batch.q.astype(np.float32) / largest * (1.99 * 2.0**127)).astype(jnp.bfloat16)
    options = Options(sm_scale=2.0**-70)
    assert_near(attend(batch, options), dense_attention(batch, options), batch.shape.dtype)


@pytest.mark.parametrize("quantized", [jnp.int8, jnp.float8_e4m3fn])
def test_numbers_far_from_1_keep_their_precision_in_float16(quantized):
    shape = Shape(2, 2, 9, num_heads=2, num_kv_heads=1, head_dim=64, block_size=16, dtype=jnp.bfloat16)
    batch = make_batch(replace(shape, quantized=quantized), [1, 1], [130, 40])
    factors = 2.0 ** np.random.default_rng(0).integers(-30, 30, len(batch.scales))
    batch.scales[:, LAYER, 1] *= factors[:, None]
    for values, table in zip(batch.values, batch.tables, strict=True):
        values *= factors[table[np.arange(len(values)) // 16], None, None]
    batch.q[:, 0] *= 2.0**40
    out, right = attend(batch, Options(sm_scale=2.0**-43)), dense_attention(batch, Options(sm_scale=2.0**-43))
    largest = np.abs(right).max(axis=(1, 2), keepdims=True)
    assert_near(out / largest, right / largest, shape.dtype)


@pytest.mark.parametrize(
    ("num_heads", "head_dim", "block_size", "dtype", "quantized"),
    [
        (40, 64, 8, jnp.bfloat16, None),
        (32, 80, 16, jnp.float16, None),
        (8, 96, 128, jnp.bfloat16, None),
        (64, 128, 64, jnp.bfloat16, jnp.int8),
        (32, 128, 16, jnp.bfloat16, jnp.float8_e4m3fn),
        (96, 256, 32, jnp.bfloat16, None),
        (32, 256, 8, jnp.bfloat16, jnp.int8),
        (40, 96, 16, jnp.bfloat16, jnp.float8_e4m3fn),
        (320, 32, 128, jnp.bfloat16, jnp.int8),
    ],
)
def test_compiles_for_the_gpu_at_real_sizes(num_heads, head_dim, block_size, dtype, quantized):
    shape = Shape(128, 128, 256, num_heads, 8, head_dim, block_size, dtype, quantized)
    traced = decode.trace(
        abstract_call(shape, scoring=Scoring(0.1, 1000, 30.0)),
        of_tokens=True,
        sizes=fitting_sizes(num_heads // 8, head_dim, block_size, jnp.dtype(quantized or dtype)),
        num_sms=132,
        interpret=None,
    )
    traced.lower(lowering_platforms=("cuda",))


def fitting_sizes(group: int, head_dim: int, block_size: int, pool_dtype: jnp.dtype) -> DecodeSizes:
    return sizes_for(group=group, head_dim=head_dim, block_size=block_size, pool_dtype=pool_dtype).decode
