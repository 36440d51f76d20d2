"""Portable paged attention against dense attention in float64, on ragged batches over a pool of NaN; and its choice."""

import importlib
import math
from dataclasses import dataclass, replace
from itertools import product
from types import SimpleNamespace
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels import (
    KV_HEAD_AXIS,
    best_implementation,
    block_pool_shape,
    kv_scales_shape,
    paged_attention,
    write_kv_quantized,
)
from pallas_kernels.chips import here
from pallas_kernels.dispatch import Kernel
from pallas_kernels.paged_attention import IMPLEMENTATIONS, INTERPRETERS
from pallas_kernels.paged_attention.hopper import why_not
from tests.support.attention import (
    LAYER,
    NO_OPTIONS,
    NUM_LAYERS,
    TOLERANCE,
    Batch,
    Options,
    Shape,
    dense_attention,
    jitted_attention,
    make_batch,
)
from tests.support.attention_cases import OPTIONS, AttentionCases, Rows, SharedPrefixCases

ANYWHERE = [name for name in IMPLEMENTATIONS if name not in INTERPRETERS]
"""The implementations that need no device of their own; test_hopper_*.py and test_tpu_*.py interpret the others."""


def assert_right(batch: Batch, implementation: str, options: Options = NO_OPTIONS) -> None:
    atol = TOLERANCE[batch.shape.dtype]
    np.testing.assert_allclose(
        batch.attend(implementation, options), dense_attention(batch, options), atol=atol, rtol=0
    )


MIXED = Shape(num_tokens=150, num_seqs=6, max_blocks=40)
DECODE = Shape(num_tokens=6, num_seqs=6, max_blocks=40)


class PortableCases(AttentionCases):
    SHARED = Rows(MIXED, [1, 1, 9], [20, 23, 25])
    # A decode, a prompt, a decode at a block's end, the tail of a prompt, a first token; a padding row and 13 tokens.
    MIXED = Rows(MIXED, [1, 70, 1, 64, 1], [130, 70, 256, 300, 1])
    DECODE = Rows(DECODE, [1, 1, 1, 1, 1], [1, 8, 9, 320, 17])
    implementation: ClassVar[str]

    def attend(self, batch, options=NO_OPTIONS):
        return batch.attend(self.implementation, options)

    def assert_near(self, out, right, dtype):
        np.testing.assert_allclose(out, right, atol=TOLERANCE[dtype], rtol=0)


class TestXla(PortableCases, SharedPrefixCases):
    implementation = "xla"


class TestReference(PortableCases):
    implementation = "reference"


MULTI_HEAD = Shape(20, 3, 4, num_heads=3, num_kv_heads=3, head_dim=16, block_size=8)
MULTI_QUERY = Shape(20, 3, 3, num_heads=8, num_kv_heads=1, head_dim=80, block_size=16)
GROUPED = Shape(20, 3, 2, num_heads=6, num_kv_heads=2, head_dim=128, block_size=32)


@pytest.mark.parametrize(
    "shape",
    [
        MULTI_HEAD,
        MULTI_QUERY,
        GROUPED,
        Shape(20, 3, 1, num_heads=2, num_kv_heads=2, head_dim=256, block_size=128),
        Shape(20, 3, 4, num_heads=2, num_kv_heads=1, head_dim=64, block_size=24),
        replace(MULTI_QUERY, dtype=jnp.bfloat16),
        replace(MULTI_QUERY, dtype=jnp.float16),
        replace(GROUPED, dtype=jnp.bfloat16),
        replace(GROUPED, dtype=jnp.float16),
    ],
    ids=lambda s: f"{s.num_heads}-{s.num_kv_heads}-heads-of-{s.head_dim}-block-{s.block_size}-{s.dtype.__name__}",
)
@pytest.mark.parametrize("implementation", ANYWHERE)
def test_every_head_layout_block_size_and_type(implementation, shape):
    capacity = shape.max_blocks * shape.block_size
    assert_right(make_batch(shape, [17, 1, 2], [17, capacity, 16]), implementation)


@pytest.mark.parametrize(
    ("dtype", "options"),
    [(jnp.float32, OPTIONS["all"]), (jnp.bfloat16, Options()), (jnp.float16, Options(sliding_window=20))],
    ids=["float32-all", "bfloat16-plain", "float16-window"],
)
@pytest.mark.parametrize("quantized", [jnp.float8_e4m3fn, jnp.int8])
@pytest.mark.parametrize("implementation", ANYWHERE)
def test_quantised_pool_is_attended_as_its_values(implementation, quantized, dtype, options):
    shape = replace(MIXED, dtype=dtype, quantized=quantized)
    assert_right(make_batch(shape, [1, 70, 1, 64, 1], [130, 70, 256, 300, 1]), implementation, options)


@pytest.mark.parametrize("scale", [1e-3, 3e3])
@pytest.mark.parametrize("implementation", ANYWHERE)
def test_values_far_from_1_keep_their_precision_in_float16(implementation, scale):
    shape = replace(DECODE, dtype=jnp.float16, quantized=jnp.int8)
    batch = make_batch(shape, [1, 1], [200, 9])
    batch.scales[:, LAYER, 1] *= scale
    for values in batch.values:
        values *= np.float32(scale)
    out, right = batch.attend(implementation), dense_attention(batch)
    np.testing.assert_allclose(out, right, atol=3e-3 * np.abs(right).max(), rtol=0)


@pytest.mark.parametrize(("quantized", "atol"), [(jnp.float8_e4m3fn, 0.1), (jnp.int8, 0.03)])
@pytest.mark.parametrize("implementation", ANYWHERE)
def test_quantised_writes_attend_like_what_was_written(implementation, quantized, atol):
    batch = make_batch(DECODE, [1, 1], [37, 70])
    float_pool, _ = batch.pool()
    pool = jnp.full(float_pool.shape, -128 if quantized == jnp.int8 else jnp.nan, quantized)
    scales = jnp.full(batch.scales.shape, jnp.nan)
    write = jax.jit(write_kv_quantized, static_argnames="layer")
    for first, last in [(0, 30), (30, 31), (31, 50), (50, 70)]:
        for keys, values, table in zip(batch.keys[:2], batch.values[:2], batch.tables[:2], strict=True):
            position = np.arange(len(keys))
            slots = np.where((first <= position) & (position < last), table[position // 8] * 8 + position % 8, 0)
            pool, scales = write(pool, scales, LAYER, keys, values, jnp.asarray(slots, jnp.int32))
    rows = (jnp.asarray(x) for x in (batch.tables, batch.kv_lens, batch.q_starts))
    out = paged_attention(jnp.asarray(batch.q), pool, LAYER, *rows, kv_scales=scales, implementation=implementation)
    np.testing.assert_allclose(np.asarray(out), dense_attention(batch), atol=atol, rtol=0)


@pytest.mark.parametrize("implementation", ANYWHERE)
def test_contexts_too_long_for_one_turn_of_a_loop(implementation):
    shape = Shape(2, 2, 130, num_heads=2, num_kv_heads=1)
    assert_right(make_batch(shape, [1, 1], [1040, 3]), implementation)
    assert_right(make_batch(shape, [1, 1], [1000, 1033]), implementation)


@pytest.mark.parametrize("implementation", ANYWHERE)
def test_more_tiles_of_queries_than_one_turn_holds(implementation):
    shape = Shape(200, 4, 20, num_heads=32, num_kv_heads=2)
    assert_right(make_batch(shape, [3, 130, 1, 60], [150, 140, 9, 160]), implementation)


@pytest.mark.parametrize("implementation", ANYWHERE)
def test_no_tokens_and_no_rows(implementation):
    assert make_batch(Shape(0, 2, 2), [0, 0], [0, 0]).attend(implementation).shape == (0, 4, 16)
    assert not make_batch(Shape(3, 0, 2), [], []).attend(implementation).any()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("shape", [MIXED, DECODE], ids=["mixed", "decode"])
@pytest.mark.parametrize("implementation", ANYWHERE)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_overflow_in_one_row_stays_there(implementation, shape, bad):
    batch = make_batch(shape, [1, 2, 1, 2], [30, 20, 3, 9])
    right = dense_attention(batch)
    batch.values[1][0] = bad
    batch.keys[2][0] = bad
    out = batch.attend(implementation)
    np.testing.assert_allclose(out[[0, 4, 5]], right[[0, 4, 5]], atol=1e-5, rtol=0)
    assert not np.isfinite(out[1:4]).any()


@st.composite
def ragged_rows(draw, max_tokens: int, max_seqs: int, max_kv_len: int) -> tuple[list[int], list[int]]:
    q_lens, kv_lens, left = [], [], max_tokens
    for _ in range(draw(st.integers(0, max_seqs))):
        q_len = draw(st.one_of(st.just(min(1, left)), st.integers(0, left)))
        left -= q_len
        q_lens.append(q_len)
        kv_lens.append(draw(st.integers(q_len, max_kv_len)) if q_len else 0)
    return q_lens, kv_lens


@pytest.mark.parametrize("shape", [MIXED, DECODE], ids=["mixed", "decode"])
@given(data=st.data())
@settings(max_examples=20, deadline=None)
def test_any_ragged_batch(shape, data):
    q_lens, kv_lens = data.draw(ragged_rows(shape.num_tokens, shape.num_seqs, shape.max_blocks * shape.block_size))
    options = OPTIONS[data.draw(st.sampled_from(["plain", "window", "all"]))]
    batch = make_batch(shape, q_lens, kv_lens, seed=data.draw(st.integers(0, 3)))
    right = dense_attention(batch, options)
    for implementation in ANYWHERE:
        np.testing.assert_allclose(batch.attend(implementation, options), right, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "shape", [MIXED, DECODE, replace(MIXED, quantized=jnp.int8)], ids=["mixed", "decode", "mixed-int8"]
)
def test_heads_sharded_over_a_mesh_need_no_communication(shape):
    batch = make_batch(shape, [1, 2, 1], [30, 20, 9])
    mesh = Mesh(np.array(jax.devices()[:2]), ("tensor",))

    def place(x, axis=None):
        spec = PartitionSpec(*("tensor" if i == axis else None for i in range(x.ndim)))
        return jax.device_put(jnp.asarray(x), NamedSharding(mesh, spec))

    pool, scales = batch.pool()
    args = (place(batch.q, 1), place(pool, KV_HEAD_AXIS), LAYER)
    args += tuple(place(x) for x in (batch.tables, batch.kv_lens, batch.q_starts))
    kv_scales = None if scales is None else place(scales, KV_HEAD_AXIS)
    compiled = jitted_attention.lower(*args, kv_scales=kv_scales).compile()
    assert not any(name in compiled.as_text() for name in ("all-gather", "all-reduce", "all-to-all", "permute("))
    out = compiled(*(arg for arg in args if arg is not LAYER), kv_scales=kv_scales)
    np.testing.assert_allclose(np.asarray(out), dense_attention(batch), atol=1e-5, rtol=0)


def test_reference_refuses_to_be_traced():
    with pytest.raises(NotImplementedError, match="outside jit"):
        jitted_attention(**good_arguments(), implementation="reference")


def test_hopper_kernels_say_what_they_need_and_what_takes_the_case_instead():
    with pytest.raises(NotImplementedError, match="need an NVIDIA GPU, not cpu; implementation='xla' takes it"):
        paged_attention(**arguments_of(GOOD_CASE), implementation="hopper")
    with pytest.raises(NotImplementedError, match=r"queries in float32.* implementation='xla' takes it"):
        paged_attention(**good_arguments(), implementation="hopper")


@dataclass(frozen=True)
class Case:
    """Properties that decide whether the Hopper kernels take a batch; the defaults make a case that they take."""

    num_heads: int = 8
    num_kv_heads: int = 2
    head_dim: int = 64
    block_size: int = 16
    dtype: type = jnp.bfloat16
    quantized: type | None = None

    def why_not(self) -> str | None:
        q_shape = (3, self.num_heads, self.head_dim)
        pool_shape = block_pool_shape(4, NUM_LAYERS, self.num_kv_heads, self.block_size, self.head_dim)
        return why_not(q_shape, jnp.dtype(self.dtype), pool_shape, jnp.dtype(self.quantized or self.dtype))


GOOD_CASE = Case()


def arguments_of(case: Case) -> dict:
    pool_shape = block_pool_shape(4, NUM_LAYERS, case.num_kv_heads, case.block_size, case.head_dim)
    scales = None if case.quantized is None else jnp.ones(kv_scales_shape(4, NUM_LAYERS, case.num_kv_heads))
    q = jnp.ones((3, case.num_heads, case.head_dim), case.dtype)
    return good_arguments() | {"q": q, "pool": jnp.zeros(pool_shape, case.quantized or case.dtype), "kv_scales": scales}


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (replace(GOOD_CASE, dtype=jnp.float32), "queries in float32"),
        (replace(GOOD_CASE, dtype=jnp.float16, quantized=jnp.int8), "a quantised pool under queries in float16"),
        (replace(GOOD_CASE, dtype=jnp.float32, quantized=jnp.int8), "queries in float32"),
        (replace(GOOD_CASE, head_dim=72), "head_dim=72: expected a multiple of 16 from 32 to 256"),
        (replace(GOOD_CASE, head_dim=16), "head_dim=16"),
        (replace(GOOD_CASE, head_dim=272), "head_dim=272"),
        (replace(GOOD_CASE, head_dim=80, quantized=jnp.int8), "head_dim=80: expected a multiple of 32"),
        (replace(GOOD_CASE, block_size=4), "block_size=4: expected a power of two from 8"),
        (replace(GOOD_CASE, block_size=12), "block_size=12"),
        (replace(GOOD_CASE, block_size=48), "block_size=48"),
        (
            replace(GOOD_CASE, num_heads=128, num_kv_heads=1, head_dim=128),
            "128 query heads of head_dim 128 for each KV head",
        ),
        (replace(GOOD_CASE, num_heads=10, head_dim=80), "head_dim=80 with 5 query heads for each KV head"),
    ],
    ids=str,
)
def test_hopper_kernels_say_what_a_case_lacks(case, reason):
    assert reason in case.why_not()


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 192, 256])
def test_hopper_kernels_take_the_shapes_of_real_models(head_dim):
    for block_size, group in product((8, 16, 32, 64, 128), (1, 2, 4, 5, 8, 12, 16)):
        case = Case(2 * group, 2, head_dim, block_size)
        if head_dim == 80 and group % 2:
            continue
        assert case.why_not() is None
        assert replace(case, dtype=jnp.float16).why_not() is None
        for quantized in (jnp.int8, jnp.float8_e4m3fn) if head_dim != 80 else ():
            assert replace(case, quantized=quantized).why_not() is None


def test_xla_is_chosen_where_there_is_no_hopper_gpu_without_a_warning(caplog):
    for case in (GOOD_CASE, replace(GOOD_CASE, dtype=jnp.float32)):
        choice = best_implementation(case.why_not())
        assert choice.name == "xla"
        assert "need an NVIDIA GPU, not cpu" in choice.reason
        paged_attention(**arguments_of(case))
    assert not caplog.records


@pytest.mark.parametrize(
    ("platform", "capability", "reason"),
    [
        ("gpu", "9.0", None),
        ("gpu", "8.0", "capability 9.0, not 8.0"),
        ("gpu", "10.0", "10.0"),
        ("tpu", "9.0", "TPU kernels need"),
    ],
)
def test_hopper_kernels_run_on_hopper_gpus_alone(monkeypatch, platform, capability, reason):
    device = SimpleNamespace(platform=platform, compute_capability=capability)
    monkeypatch.setattr(jax, "devices", lambda: [device])
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    choice = best_implementation()
    assert choice.name == ("xla" if reason else "hopper")
    assert reason is None or reason in choice.reason


@pytest.fixture
def hopper_calls(monkeypatch):
    """A Hopper GPU, pretended: the queries that its kernels were given. No warning has been logged before or after."""
    attention = importlib.import_module("pallas_kernels.paged_attention")  # the package has a function of this name
    calls = []
    monkeypatch.setattr(here, "why_no_hopper", lambda: None)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    pretended = Kernel("hopper", lambda call: calls.append(call.q) or call.q, why_not)
    monkeypatch.setitem(IMPLEMENTATIONS, "hopper", pretended)
    attention._log_fallback.cache_clear()
    yield calls
    attention._log_fallback.cache_clear()


def test_arrays_over_several_devices_take_the_portable_path_except_under_shard_map(hopper_calls, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    assert "over 2 devices" in best_implementation().reason
    assert best_implementation(num_devices=1).name == "hopper"
    names = []

    def shard(x):
        names.append(best_implementation().name)
        return x

    mesh = Mesh(np.array(jax.devices()[:2]), ("tensor",))
    spec = PartitionSpec("tensor")
    jax.jit(jax.shard_map(shard, mesh=mesh, in_specs=spec, out_specs=spec))(jnp.arange(2))
    assert names == ["hopper"]


def test_hopper_gpu_runs_its_kernels_and_warns_once_of_each_reason_why_not(hopper_calls, caplog):
    paged_attention(**arguments_of(GOOD_CASE))
    assert len(hopper_calls) == 1
    assert not caplog.records
    for _ in range(2):
        for lacking in (replace(GOOD_CASE, dtype=jnp.float32), replace(GOOD_CASE, head_dim=72)):
            assert best_implementation(lacking.why_not()).name == "xla"
            paged_attention(**arguments_of(lacking))
    assert len(hopper_calls) == 1
    in_float32, of_72 = (record.getMessage() for record in caplog.records)
    assert "XLA, which is slower: the Hopper kernels do not take queries in float32" in in_float32
    assert "head_dim=72" in of_72


INT8_POOL = jnp.zeros(block_pool_shape(4, 2, 2, 8, 16), jnp.int8)


def good_arguments() -> dict:
    return {
        "q": jnp.zeros((3, 4, 16)),
        "pool": jnp.zeros(block_pool_shape(4, 2, 2, 8, 16)),
        "layer": 0,
        "block_tables": jnp.zeros((2, 2), jnp.int32),
        "kv_lens": jnp.zeros(2, jnp.int32),
        "cu_q_lens": jnp.zeros(3, jnp.int32),
    }


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"q": jnp.zeros((3, 64))}, r"q has shape \(3, 64\): expected 3 axes"),
        ({"pool": jnp.zeros((4, 2, 8, 16))}, "block_pool_shape"),
        ({"pool": jnp.zeros((4, 2, 3, 2, 8, 16))}, "third axis"),
        ({"q": jnp.zeros((3, 4, 16), jnp.bfloat16)}, "q is bfloat16 and the pool float32"),
        ({"q": jnp.zeros((3, 4, 16), jnp.int32)}, "q is int32"),
        ({"q": jnp.zeros((3, 5, 16))}, "5 heads and the pool 2 KV heads"),
        ({"q": jnp.zeros((3, 0, 16))}, "0 heads"),
        ({"q": jnp.zeros((3, 4, 32))}, "head_dim 32 and the pool 16"),
        ({"layer": 2}, "layer=2: expected 0 to 1"),
        ({"layer": -1}, "layer=-1"),
        ({"layer": 0.5}, r"layer=0\.5"),
        ({"block_tables": jnp.zeros((2, 2))}, "block_tables is float32: expected int32"),
        ({"block_tables": jnp.zeros(2, jnp.int32)}, "block_tables has shape"),
        ({"kv_lens": jnp.zeros(3, jnp.int32)}, "kv_lens 3"),
        ({"cu_q_lens": jnp.zeros(2, jnp.int32)}, "expected 2 and 3"),
        ({"sm_scale": math.nan}, "sm_scale=nan"),
        ({"sliding_window": 0}, "sliding_window=0"),
        ({"soft_cap": -1.0}, r"soft_cap=-1\.0"),
        ({"alibi_slopes": jnp.zeros(2)}, r"alibi_slopes has shape \(2,\): expected \(4,\)"),
        ({"sinks": jnp.zeros((1, 4))}, "sinks has shape"),
        ({"kv_scales": jnp.zeros((4, 2, 2, 2))}, "kv_scales came with a pool of float32"),
        ({"pool": INT8_POOL}, "int8 came without kv_scales"),
        ({"pool": INT8_POOL, "kv_scales": jnp.zeros((4, 2, 2, 1))}, r"expected float32 of shape \(4, 2, 2, 2\)"),
        ({"pool": INT8_POOL, "kv_scales": jnp.zeros((4, 2, 2, 2), jnp.bfloat16)}, "kv_scales is bfloat16"),
        ({"pool": INT8_POOL, "q": jnp.zeros((3, 4, 16), jnp.int8)}, "q is int8 and the pool int8"),
        ({"into": jnp.zeros((2, 4, 16))}, r"into is float32\[2, 4, 16\]: expected what q is, float32\[3, 4, 16\]"),
        ({"shared_lens": jnp.zeros(3, jnp.int32)}, r"shared_lens is int32\[3\]: expected int32\[2\]"),
        (
            {"implementation": "cuda"},
            r"implementation='cuda' is unknown: expected None or one of \['hopper', 'pallas_tpu', 'reference', 'xla'\]",
        ),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_wrong_arguments_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        paged_attention(**good_arguments() | wrong)
