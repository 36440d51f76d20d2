"""The Hopper prefill kernel in Pallas's interpreter, watched for races, against dense attention over a pool of NaN."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.chips import here
from pallas_kernels.paged_attention.call import Scoring
from pallas_kernels.paged_attention.hopper import attend_hopper
from pallas_kernels.paged_attention.hopper.prefill import attend_prefill
from pallas_kernels.paged_attention.hopper.prefill_plan import DEFAULT_SIZES, Case, PrefillSizes, Run, plan_prefill
from tests.support.attention import (
    NO_OPTIONS,
    TOLERANCE,
    Batch,
    Options,
    Shape,
    abstract_call,
    dense_attention,
    make_batch,
    round_scales,
)

pytestmark = pytest.mark.usefixtures("no_races")

SENTINEL = 7.0
"""Where no output is due."""

SMALL = PrefillSizes(kv_tile=64)


@partial(jax.jit, static_argnames=("sizes", "num_sms", "interpret"))
def prefill(call, *, sizes, num_sms, interpret):
    out = jax.new_ref(jnp.full_like(call.q, SENTINEL))
    attend_prefill(out, call, sizes=sizes, num_sms=num_sms, interpret=interpret)
    return out[...]


def check(batch: Batch, options: Options = NO_OPTIONS, sizes: PrefillSizes = SMALL, num_sms: int = 2) -> None:
    """Rows of several queries get dense attention's outputs, and nothing else is written to."""
    interpret = plgpu.InterpretGPUParams(detect_races=True)
    out = prefill(batch.call(options), sizes=sizes, num_sms=num_sms, interpret=interpret)
    expected = dense_attention(batch, options)
    is_ours = np.zeros(batch.shape.num_tokens, bool)
    for start, end in zip(batch.q_starts, batch.q_starts[1:], strict=False):
        is_ours[start:end] = end - start > 1
    tolerance = TOLERANCE[batch.shape.dtype]
    got = np.asarray(out).astype(np.float64)
    np.testing.assert_allclose(got[is_ours], expected[is_ours], rtol=tolerance, atol=tolerance)
    np.testing.assert_array_equal(got[~is_ours], SENTINEL)


def test_rows_of_any_length_beside_rows_that_are_not_its_own() -> None:
    shape = Shape(112, 6, 10, num_heads=2, num_kv_heads=2, head_dim=64, block_size=16, dtype=jnp.bfloat16)
    # A decode, a piece of a prompt after its cached context (its last tile is longer than the table), no queries, a
    # whole prompt, two queries; padding.
    check(make_batch(shape, [1, 20, 0, 70, 2], [40, 150, 30, 70, 65]))


def test_one_block_takes_many_items_through_every_stage() -> None:
    shape = Shape(72, 2, 32, num_heads=8, num_kv_heads=2, head_dim=64, block_size=8, dtype=jnp.float16)
    sizes = PrefillSizes(kv_tile=64, stages=3, ping_pong=False)
    check(make_batch(shape, [40, 30], [230, 30]), sizes=sizes, num_sms=1)


def test_window_reads_nothing_behind_it() -> None:
    shape = Shape(96, 2, 16, num_heads=2, num_kv_heads=1, head_dim=64, block_size=16, dtype=jnp.bfloat16)
    check(make_batch(shape, [20, 70], [230, 90]), Options(sliding_window=40))


def test_cap_slopes_and_sinks_of_each_head() -> None:
    shape = Shape(40, 2, 32, num_heads=8, num_kv_heads=1, head_dim=64, block_size=8, dtype=jnp.float16)
    rng = np.random.default_rng(0)
    slopes, sinks = 0.1 * rng.standard_normal((2, 8))
    check(make_batch(shape, [30, 5], [130, 5]), Options(soft_cap=2.0, alibi_slopes=slopes, sinks=10 * sinks))


def test_blocks_larger_than_tiles_and_rows_of_an_odd_width() -> None:
    shape = Shape(40, 1, 2, num_heads=3, num_kv_heads=1, head_dim=96, block_size=128, dtype=jnp.bfloat16)
    check(make_batch(shape, [40], [200]), Options(sliding_window=100))


def test_outputs_wider_than_their_shared_memory() -> None:
    shape = Shape(16, 1, 8, num_heads=4, num_kv_heads=1, head_dim=256, block_size=16, dtype=jnp.bfloat16)
    check(make_batch(shape, [11], [75]), sizes=DEFAULT_SIZES)


@pytest.mark.parametrize(
    ("quantized", "head_dim", "block_size", "options"),
    [
        (jnp.float8_e4m3fn, 96, 8, Options(sliding_window=40)),
        (jnp.int8, 128, 128, Options(soft_cap=2.0, sinks=np.linspace(-2, 5, 4))),
    ],
)
def test_quantised_pool_is_attended_as_its_values(quantized, head_dim, block_size, options) -> None:
    shape = Shape(60, 4, -(-176 // block_size), 4, 2, head_dim, block_size, jnp.bfloat16, quantized)
    # A decode, a piece of a prompt after its context, a whole prompt; padding. One thread block takes many items.
    check(make_batch(shape, [1, 20, 34], [40, 150, 34]), options, num_sms=1)


def test_prompts_over_a_quantised_pool_get_the_bits_of_a_pool_that_holds_the_values() -> None:
    shape = Shape(40, 2, 8, num_heads=4, num_kv_heads=2, head_dim=64, block_size=16, dtype=jnp.bfloat16)
    quantized = make_batch(replace(shape, quantized=jnp.int8), [30, 7], [100, 7])
    round_scales(quantized)  # bfloat16 then holds the values as they are
    outputs = [
        prefill(batch.call(), sizes=SMALL, num_sms=2, interpret=plgpu.InterpretGPUParams())
        for batch in (quantized, replace(quantized, shape=shape))
    ]
    np.testing.assert_array_equal(*(np.asarray(out).view(np.uint16) for out in outputs))


@pytest.mark.parametrize(
    ("head_dim", "quantized"),
    [
        *((head_dim, None) for head_dim in (64, 80, 96, 128, 192, 256)),
        (96, jnp.int8),
        (192, jnp.float8_e4m3fn),
    ],
)
def test_compiles_for_the_gpu_at_real_sizes(head_dim, quantized) -> None:
    shape = Shape(4096, 8, 256, 32, 8, head_dim, 16, jnp.bfloat16, quantized)
    call = abstract_call(shape, scoring=Scoring(0.1, 1000, 30.0))
    traced = prefill.trace(call, sizes=DEFAULT_SIZES, num_sms=132, interpret=None)
    traced.lower(lowering_platforms=("cuda",))


def test_sizes_that_cannot_be_are_refused() -> None:
    shape = Shape(8, 1, 1, num_heads=8, num_kv_heads=1, head_dim=128, block_size=16)
    with pytest.raises(ValueError, match="kv_tile=96"):
        case_of(shape, PrefillSizes(kv_tile=96))
    with pytest.raises(NotImplementedError, match="blocks of 48"):
        case_of(replace(shape, block_size=48))
    with pytest.raises(NotImplementedError, match="an even group"):
        case_of(replace(shape, head_dim=80, num_heads=3))
    with pytest.raises(NotImplementedError, match="shared memory"):
        case_of(shape, PrefillSizes(stages=4))
    with pytest.raises(NotImplementedError, match="head_dim=224 over a quantised pool: expected at most 192"):
        case_of(replace(shape, head_dim=224, quantized=jnp.int8))


@pytest.mark.parametrize(("head_dim", "is_taken"), [(192, True), (224, False)])
def test_prompts_of_the_widest_heads_over_a_quantised_pool_are_attended_by_the_decode_kernel(
    head_dim, is_taken, monkeypatch
) -> None:
    monkeypatch.setattr(here, "why_no_hopper", lambda: None)
    call = abstract_call(Shape(64, 2, 8, 8, 2, head_dim, 16, jnp.bfloat16, jnp.int8), scoring=Scoring(0.1))
    traced = jax.jit(lambda call: attend_hopper(replace(call, kv=call.kv._replace(layer=0)))).trace(call)
    assert ("paged_prefill" in str(traced.jaxpr)) == is_taken


def case_of(shape: Shape, sizes: PrefillSizes = DEFAULT_SIZES) -> Case:
    return Case(
        scoring=Scoring(1.0, None, None),
        sizes=sizes,
        dtype=jnp.dtype(jnp.bfloat16),
        pool_dtype=jnp.dtype(shape.quantized or jnp.bfloat16),
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        num_layers=1,
        block_size=shape.block_size,
        is_interpreted=False,
    )


def test_every_token_of_a_row_with_several_is_in_one_run_the_longest_context_first() -> None:
    rng = np.random.default_rng(0)
    q_lens = rng.choice([0, 1, 2, 15, 16, 17, 100], 40)
    kv_lens = q_lens + rng.integers(0, 1000, 40)
    num_tokens = int(q_lens.sum()) + 5
    case = case_of(Shape(num_tokens, 40, 1, num_heads=8, num_kv_heads=1, head_dim=64, block_size=16))
    assert case.item_tokens == 16
    q_starts = jnp.asarray(np.concatenate([[0], np.cumsum(q_lens)]), jnp.int32)
    plan = plan_prefill(case, num_tokens, jnp.asarray(kv_lens, jnp.int32), q_starts)

    contexts, covered = [], np.zeros(num_tokens, int)
    for numbers in np.asarray(plan.runs)[: plan.dealing[0]]:
        row, first, count, first_pos, row_pos, kv_len = Run(*numbers)
        assert q_starts[row] <= first
        assert first + count <= q_starts[row + 1]
        assert (row_pos, kv_len) == (kv_lens[row] - q_lens[row], kv_lens[row])
        assert first_pos == row_pos + first - q_starts[row]
        covered[first : first + count] += 1
        contexts.append(first_pos + count)
    assert contexts == sorted(contexts, reverse=True)
    np.testing.assert_array_equal(covered[:-5], np.repeat(q_lens > 1, q_lens))


@pytest.mark.parametrize(("kv_tokens", "units"), [(100, 8), (40_000, 2), (10_000_000, 1)])
def test_sections_have_the_most_units_whose_context_stays_in_the_cache(kv_tokens: int, units: int) -> None:
    case = case_of(Shape(8, 1, 1, num_heads=32, num_kv_heads=8, head_dim=64, block_size=16))
    plan = plan_prefill(case, 8, jnp.asarray([kv_tokens], jnp.int32), jnp.asarray([0, 8], jnp.int32))
    assert plan.dealing[1] == units
