"""The TPU kernel in Pallas's interpreter, watched for races, against dense attention over a pool of NaN."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from pallas_kernels.chips.here import why_no_tpu
from pallas_kernels.chips.tpu import chip_of
from pallas_kernels.paged_attention import best_implementation, paged_attention, why_cannot_run, why_not_here
from pallas_kernels.paged_attention.tpu import attend_tpu, why_not_tpu
from pallas_kernels.paged_attention.tpu.launch import Sizes
from tests.support.attention import LAYER, NO_OPTIONS, Options, Shape, dense_attention, make_batch
from tests.support.attention_cases import SINKS, AttentionCases, Rows
from tests.support.tpu_interpret import EAGER, SMALL, WATCHED, assert_near, attend, check, no_tpu_races  # noqa: F401

pytestmark = pytest.mark.usefixtures("no_tpu_races")

DECODE = Shape(5, 5, 12, num_heads=4, num_kv_heads=2, head_dim=128, block_size=16)
MIXED = replace(DECODE, num_tokens=60)


class TestTpu(AttentionCases):
    SHARED, NUM_SHARED = Rows(DECODE, [1, 1], [100, 90]), 5
    # A decode, a piece of a prompt that ends with a tile, a decode at a block's end, no queries, a first token.
    MIXED = Rows(MIXED, [1, 37, 1, 0, 1], [130, 70, 160, 0, 1])
    DECODE = Rows(replace(DECODE, dtype=jnp.bfloat16), [1, 1, 1, 1], [1, 16, 17, 190])

    def attend(self, batch, options=NO_OPTIONS):
        return attend(batch, options)

    def assert_near(self, out, right, dtype):
        assert_near(out, right, dtype)


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "block_size", "dtype"),
    [
        (3, 3, 128, 32, jnp.bfloat16),
        (6, 2, 256, 128, jnp.float32),
        (20, 1, 128, 16, jnp.bfloat16),
        (12, 1, 128, 8, jnp.float32),
        (5, 1, 128, 24, jnp.bfloat16),
    ],
)
def test_heads_and_blocks_of_other_sizes(num_heads, num_kv_heads, head_dim, block_size, dtype):
    shape = Shape(24, 4, -(-100 // block_size), num_heads, num_kv_heads, head_dim, block_size, dtype)
    check(make_batch(shape, [17, 1, 3], [17, 100, 40]))


@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(8, 4, 64), (4, 4, 32), (3, 3, 64), (4, 2, 80)])
def test_heads_narrower_than_a_register(num_heads, num_kv_heads, head_dim):
    shape = replace(MIXED, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim)
    options = Options(alibi_slopes=np.linspace(-0.1, 0.1, num_heads), sinks=np.linspace(-1, 3, num_heads))
    check(make_batch(shape, [1, 20, 1], [70, 33, 16]), options)


@pytest.mark.parametrize("quantized", [jnp.int8, jnp.float8_e4m3fn])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_quantised_pool_is_attended_as_its_values(quantized, dtype):
    shape = replace(MIXED, dtype=dtype, quantized=quantized)
    check(make_batch(shape, [1, 20, 1], [130, 70, 16]), Options(sliding_window=50, sinks=SINKS))


def test_decode_over_a_quantised_pool_with_the_sizes_of_a_chip():
    check(make_batch(replace(DECODE, quantized=jnp.int8), [1, 1, 1], [130, 7, 16]), sizes=None)


def test_two_cores_share_the_tiles():
    check(make_batch(MIXED, [1, 37, 1, 0, 1], [130, 70, 160, 0, 1]), generation="v5p")


@pytest.mark.parametrize("buffers", [2, 4])
def test_copies_that_happen_at_once_overwrite_nothing_in_use(buffers):
    batch = make_batch(MIXED, [1, 37, 1, 0, 1], [130, 70, 160, 0, 1])
    check(batch, Options(sliding_window=90), sizes=Sizes(1, 2, buffers), interpret=EAGER)


def test_block_table_longer_than_one_piece():
    shape = replace(DECODE, num_seqs=2, num_tokens=2, max_blocks=140, block_size=8, num_heads=2, num_kv_heads=1)
    check(make_batch(shape, [1, 1], [1115, 1020]), sizes=Sizes(1, 32, 3))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("quantized", [None, jnp.float8_e4m3fn])
def test_overflow_in_one_row_stays_there(quantized):
    batch = make_batch(replace(DECODE, quantized=quantized), [1, 1, 1, 1], [70, 60, 50, 9])
    right = dense_attention(batch)
    batch.values[0][:] = np.nan if quantized else np.inf
    batch.keys[2][0] = np.nan
    out = attend(batch)
    assert_near(out[[1, 3]], right[[1, 3]], batch.shape.dtype)
    assert not np.isfinite(out[[0, 2]]).any()


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"q_dtype": jnp.float16}, "float16"),
        ({"pool_shape": (9, 2, 2, 4, 16, 64)}, "rows of 64"),
        ({"pool_shape": (9, 2, 2, 4, 16, 384)}, "head_dim"),
        ({"pool_shape": (9, 2, 2, 4, 12, 128)}, "block_size=12"),
    ],
)
def test_cases_that_the_kernel_does_not_take_are_named(changes, why):
    case = {"q_shape": (5, 8, 128), "q_dtype": jnp.bfloat16, "pool_shape": (9, 2, 2, 4, 16, 128)}
    assert why_not_tpu(**case, pool_dtype=jnp.bfloat16) is None
    assert why in why_not_tpu(**(case | changes), pool_dtype=jnp.bfloat16)


def test_without_a_tpu_it_is_refused():
    assert "TPU" in why_no_tpu()
    batch = make_batch(DECODE, [1], [9])
    with pytest.raises(NotImplementedError, match="need a TPU"):
        attend_tpu(batch.call(Options(0.1)))


def test_the_interpreter_refuses_the_cases_that_a_tpu_refuses():
    batch = make_batch(replace(DECODE, head_dim=64), [1], [9])
    with pytest.raises(NotImplementedError, match=r"rows of 64.* implementation='xla' takes it"):
        attend_tpu(batch.call(Options(0.1)), interpret=WATCHED)


def test_heads_that_do_not_fit_the_pools_rows_are_the_callers_mistake():
    batch = make_batch(replace(DECODE, head_dim=64), [1], [9])
    with pytest.raises(ValueError, match="lane_layout"):
        attend_tpu(batch.call(Options(0.1)), num_kv_heads=4, sizes=SMALL, chip=chip_of("v5e"), interpret=WATCHED)


def test_paged_attention_interprets_it_on_request():
    batch = make_batch(MIXED, [1, 20, 1], [70, 33, 16])
    pool, _ = batch.pool()
    args = jnp.asarray(batch.q), jnp.asarray(pool), LAYER, *batch.rows()
    out = paged_attention(*args, implementation="pallas_tpu", interpret=True)
    assert_near(np.asarray(out), dense_attention(batch), batch.shape.dtype)
    with pytest.raises(NotImplementedError, match="need a TPU"):
        paged_attention(*args, implementation="pallas_tpu")
    for name in (None, "xla"):
        with pytest.raises(ValueError, match="expected one of"):
            paged_attention(*args, implementation=name, interpret=True)


def test_a_tpu_that_is_compiled_for_gets_its_own_kernels():
    assert best_implementation().name == "xla"
    device = AbstractDevice("TPU v5 lite", num_cores=1, platform="tpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device)):
        choice = best_implementation(num_devices=1)
        assert (choice.name, why_cannot_run("pallas_tpu")) == ("pallas_tpu", None)
        narrow = why_not_here((5, 8, 64), jnp.dtype(jnp.bfloat16), (9, 2, 2, 4, 16, 64), jnp.dtype(jnp.bfloat16))
        assert best_implementation(narrow, num_devices=1).reason.startswith("the TPU kernels do not take a pool")
