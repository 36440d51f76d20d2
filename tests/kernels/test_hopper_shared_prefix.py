"""Decodes that share a prefix on Hopper, in Pallas's interpreter, watched for races; and their compilation."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.paged_attention.call import Scoring
from pallas_kernels.paged_attention.hopper import _attend, attend_hopper
from pallas_kernels.paged_attention.hopper.decode_memory import DecodeSizes
from pallas_kernels.paged_attention.hopper.prefill_plan import PrefillSizes
from pallas_kernels.paged_attention.hopper.tuning import Sizes, sizes_for
from tests.support.attention import (
    NO_OPTIONS,
    Batch,
    Options,
    Shape,
    abstract_call,
    dense_attention,
    make_batch,
    share_front,
)

pytestmark = pytest.mark.usefixtures("no_races")

SMALL = Sizes(DecodeSizes(tile_tokens=64, slots=4, workers_per_sm=1), PrefillSizes(kv_tile=64))


def assert_near(out: np.ndarray, right: np.ndarray) -> None:
    rounding = float(jnp.finfo(jnp.bfloat16).eps)
    np.testing.assert_allclose(out, right, rtol=rounding, atol=rounding / 4)


def attend(batch: Batch, options: Options, num_sms: int) -> np.ndarray:
    interpret = plgpu.InterpretGPUParams(detect_races=True)
    out = attend_hopper(batch.call(options), sizes=SMALL, num_sms=num_sms, interpret=interpret)
    return np.asarray(out).astype(np.float64)


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "block_size", "num_rows", "num_sms"),
    [
        (8, 1, 64, 16, 18, 3),  # more queries than an item has
        (6, 1, 80, 8, 3, 7),  # several units for a KV head, narrow heads, and contexts in parts
        (3, 3, 96, 128, 3, 2),  # a single query head, and blocks larger than tiles
    ],
)
def test_rows_go_on_from_the_tokens_that_they_share(num_heads, num_kv_heads, head_dim, block_size, num_rows, num_sms):
    num_shared = -(-72 // block_size)
    shape = Shape(num_rows + 1, num_rows + 1, num_shared + -(-100 // block_size), num_heads, num_kv_heads, head_dim)
    shape = replace(shape, block_size=block_size, dtype=jnp.bfloat16)
    start = num_shared * block_size
    lens = [start + 1 + (61 * row) % 95 for row in range(num_rows - 1)]
    batch = make_batch(shape, [1] * num_rows, [*lens, 33])
    batch = share_front(batch, list(range(num_rows - 1)), num_shared, is_read_once=True)
    options = Options(sinks=np.linspace(-2, 3, num_heads))
    out = attend(batch, options, num_sms)
    assert_near(out[:num_rows], dense_attention(batch, options)[:num_rows])
    np.testing.assert_array_equal(out[num_rows:], 0)


def test_value_that_is_no_number_stays_in_the_rows_that_see_it():
    shape = Shape(4, 4, 10, num_heads=4, num_kv_heads=2, head_dim=64, block_size=16, dtype=jnp.bfloat16)
    batch = share_front(make_batch(shape, [1, 1, 1, 1], [90, 100, 20, 130]), [0, 1, 3], 4)
    right = dense_attention(batch)
    batch.values[2][3] = np.nan
    batch.keys[1][80] = np.nan
    out = attend(batch, NO_OPTIONS, 3)
    assert_near(out[[0, 3]], right[[0, 3]])
    assert np.isnan(out[[1, 2]]).any(axis=(1, 2)).all()


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "block_size"),
    [(32, 8, 128, 16), (40, 40, 128, 64), (32, 16, 256, 8), (48, 8, 96, 16)],
)
def test_compiles_for_the_gpu_at_real_sizes(num_heads, num_kv_heads, head_dim, block_size):
    shape = Shape(256, 256, 512, num_heads, num_kv_heads, head_dim, block_size, jnp.bfloat16)
    call = abstract_call(shape, scoring=Scoring(0.1, None, 30.0))
    call = replace(
        call,
        heads=call.heads._replace(alibi_slopes=None),
        kv=call.kv._replace(layer=jax.ShapeDtypeStruct((), jnp.int32)),
        into=call.q,
        shared_lens=call.batch.kv_lens,
    )
    group = num_heads // num_kv_heads
    sizes = sizes_for(group=group, head_dim=head_dim, block_size=block_size, pool_dtype=jnp.dtype(jnp.bfloat16))
    text = _attend.trace(call, sizes=sizes, num_sms=132, interpret=None).lower(lowering_platforms=("cuda",)).as_text()
    assert "paged_decode" in text
    assert "paged_prefill" in text
