"""The TPU kernels through the real TPU compiler: some of the grid of tpu_aot.py, and what the grid does not hold."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from bench.tpu.compiler import (
    TOPOLOGIES,
    Case,
    compile_for,
    mesh_of,
    trace_attention,
    trace_for,
    why_no_compiler,
)
from pallas_kernels import block_pool_shape
from pallas_kernels.block_pool.tpu import (
    copy_blocks_tpu,
    gather_blocks_tpu,
    scatter_blocks_tpu,
    write_kv_quantized_tpu,
    write_kv_tpu,
)
from pallas_kernels.chips.here import current_tpu
from pallas_kernels.chips.tpu import chip_of
from pallas_kernels.paged_attention.call import Batch, Call, KvLayer, Scoring
from pallas_kernels.paged_attention.tpu import attend_tpu, write_and_attend_tpu
from pallas_kernels.paged_attention.tpu.launch import Sizes
from tests.support import tpu_aot
from tests.support.tpu_aot import compile_case, grid

pytestmark = [
    pytest.mark.skipif(why_no_compiler() is not None, reason=str(why_no_compiler())),
    pytest.mark.usefixtures("nothing_kept_by_jax"),  # it cannot be loaded for devices that are not there
]

EVERY = 184
"""Nine cases, with each value of each axis among them, and two thirds of all pairs of values."""

BF16 = jnp.dtype(jnp.bfloat16)
POOL = (block_pool_shape(1024, 8, 8, 16, 128), BF16)
POOL_BYTES = 1024 * 8 * 2 * 8 * 16 * 128 * 2


def call_of(q, pool, layer, *rows) -> Call:
    return Call(q=q, kv=KvLayer(pool, layer), batch=Batch(*rows), scoring=Scoring(0.1))


@pytest.mark.parametrize("generation", TOPOLOGIES)
def test_the_device_compiled_for_is_the_chip_that_is_planned_for(generation):
    with jax.sharding.use_abstract_mesh(mesh_of(generation).abstract_mesh):
        assert current_tpu() == chip_of(generation)


@pytest.mark.parametrize("case", list(grid())[::EVERY], ids=str)
def test_case_of_the_grid_compiles(case):
    compile_case(case)


def test_saved_grid_counts_every_outcome_with_its_reasons(monkeypatch, tmp_path):
    def compile_or_not(case: Case) -> None:
        if case.head_dim == 64:
            raise NotImplementedError("too narrow")
        if case.head_dim == 256 and case.group == 8:
            raise RuntimeError("out of memory")

    monkeypatch.setattr(tpu_aot, "compile_case", compile_or_not)
    path = tmp_path / "grid.json"
    assert tpu_aot.main(["--generation", "v6e", "--save", str(path), "--commit", "a commit"]) == 1
    saved = json.loads(path.read_text())
    reasons = {"too narrow": 108, "RuntimeError: out of memory": 36}
    assert saved["generations"] == {"v6e": {"compiled": 180, "refused": 108, "failed": 36, "reasons": reasons}}
    assert saved["num_cases"] == 324
    assert saved["environment"]["commit"] == "a commit"
    assert "libtpu" in saved["environment"]


MIXED = Case("v5e", 128, 4, 16, BF16, num_tokens=1024, num_seqs=256)


@pytest.mark.parametrize(
    "case",
    [
        replace(MIXED, max_blocks=65536),
        replace(MIXED, generation="7x", num_tokens=256, max_blocks=65536),
        replace(MIXED, generation="v4", has_options=True),
        replace(MIXED, generation="v6e", q_dtype=jnp.float32, pool_dtype=jnp.dtype(jnp.float32), has_options=True),
        replace(MIXED, generation="v5p", group=1, num_kv_heads=96),
        replace(MIXED, generation="v4", group=1, num_kv_heads=40),
        replace(MIXED, group=12, num_kv_heads=1, pool_dtype=jnp.dtype(jnp.int8), has_options=True),
        replace(MIXED, group=5, num_kv_heads=3, block_size=24),
        replace(MIXED, head_dim=80, num_kv_heads=32, group=1),
        replace(MIXED, generation="v6e", head_dim=96, block_size=8),
    ],
    ids=[
        "a million tokens of 256 sequences",
        "a million tokens of 256 sequences, decode",
        "options",
        "float32",
        "96 KV heads",
        "40 KV heads",
        "group 12 over int8",
        "block of 24",
        "head_dim 80",
        "head_dim 96",
    ],
)
def test_case_beyond_the_grid_compiles(case):
    compile_case(case)


@pytest.mark.parametrize("generation", TOPOLOGIES)
def test_writes_are_in_place(generation):
    tokens = ((300, 8, 128), BF16)
    slots = ((300,), jnp.int32)

    def write(pool, k, v, slots):
        return write_kv_tpu(pool, 3, k, v, slots)

    assert_in_place(compile_for(generation, write, POOL, tokens, tokens, slots, donate=(0,)))


# The kernel of both dtypes is one; generations with 8-bit floats of their own, and without, compile both.
@pytest.mark.parametrize(
    ("generation", "dtype"),
    [*((generation, jnp.int8) for generation in TOPOLOGIES), ("v5e", jnp.float8_e4m3fn), ("7x", jnp.float8_e4m3fn)],
)
def test_quantised_writes_are_in_place(generation, dtype):
    def write(pool, kv_scales, k, v, slots):
        return write_kv_quantized_tpu(pool, kv_scales, 3, k, v, slots)

    tokens, scales = ((300, 8, 128), BF16), (POOL[0][:4], jnp.float32)
    arrays = (POOL[0], dtype), scales, tokens, tokens, ((300,), jnp.int32)
    memory = compile_for(generation, write, *arrays, donate=(0, 1)).memory_analysis()
    assert memory.alias_size_in_bytes >= POOL_BYTES / 2
    assert memory.temp_size_in_bytes < POOL_BYTES / 10


# Every generation writes with decodes; one of each number of cores, and the newest, with prompts too.
@pytest.mark.parametrize(
    ("generation", "is_decode"),
    [*((generation, True) for generation in TOPOLOGIES), ("v4", False), ("v5e", False), ("7x", False)],
)
def test_fused_writes_are_in_place(generation, is_decode):
    def step(q, k, v, pool, tables, kv_lens, cu_q_lens):
        call = call_of(q, pool, 3, tables, kv_lens, cu_q_lens)
        out, pool, _ = write_and_attend_tpu(call, k, v, is_decode=is_decode)
        return out, pool

    num_tokens = 64 if is_decode else 300
    new = ((num_tokens, 8, 128), BF16)
    rows = ((64, 128), jnp.int32), ((64,), jnp.int32), ((65,), jnp.int32)
    assert_in_place(compile_for(generation, step, ((num_tokens, 32, 128), BF16), new, new, POOL, *rows, donate=(3,)))


@pytest.mark.parametrize("generation", TOPOLOGIES)
def test_blocks_are_moved_in_place(generation):
    ids, blocks = ((32,), jnp.int32), ((32, *POOL[0][1:]), BF16)
    assert_in_place(compile_for(generation, copy_blocks_tpu, POOL, ids, ids, donate=(0,)))
    assert_in_place(compile_for(generation, scatter_blocks_tpu, POOL, ids, blocks, donate=(0,)))
    gathered = compile_for(generation, gather_blocks_tpu, POOL, ids).memory_analysis()
    assert gathered.temp_size_in_bytes < POOL_BYTES / 100


@pytest.mark.parametrize("generation", ["v5e", "v5p", "v6e"])
def test_blocks_go_to_the_host_and_come_back_by_memory_kind(generation):
    mesh = mesh_of(generation)
    on_device = NamedSharding(mesh, PartitionSpec())
    on_host = on_device.with_memory_kind("pinned_host")
    for source, target in ((on_device, on_host), (on_host, on_device)):
        block = jax.ShapeDtypeStruct(POOL[0][1:], BF16, sharding=source)
        memory = jax.jit(lambda x: x, out_shardings=target).lower(block).compile().memory_analysis()
        on_each = memory.host_argument_size_in_bytes, memory.host_output_size_in_bytes
        assert sorted(on_each) == [0, POOL_BYTES // POOL[0][0]]
        assert memory.temp_size_in_bytes == 0


def assert_in_place(compiled) -> None:
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes == POOL_BYTES
    assert memory.temp_size_in_bytes < POOL_BYTES / 10


def test_compiler_does_refuse_what_overruns_vmem():
    def attend(q, pool, *rows):
        return attend_tpu(call_of(q, pool, 0, *rows), sizes=Sizes(8, 128, 16))

    rows = ((64, 512), jnp.int32), ((64,), jnp.int32), ((65,), jnp.int32)
    with pytest.raises(Exception, match="vmem"):
        compile_for("v5e", attend, ((64, 32, 128), BF16), POOL, *rows)


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (replace(MIXED, q_dtype=jnp.float16), "queries in float16"),
        (replace(MIXED, pool_dtype=jnp.dtype(jnp.float16)), "a pool in float16"),
        (replace(MIXED, num_tokens=65536, num_seqs=65536, max_blocks=4), "make 65536 tiles.*split the batch"),
        (replace(MIXED, block_size=12), "block_size=12: expected a multiple of 8"),
        (replace(MIXED, head_dim=320), "head_dim=320: expected at most 256"),
        (replace(MIXED, num_tokens=256, pool_dtype=jnp.dtype(jnp.int8), is_fused=True), "write_kv_quantized"),
        (replace(MIXED, generation="v4", block_size=128, group=1, num_kv_heads=512), "a TPU v4 has 14; shard"),
    ],
    ids=lambda x: None if isinstance(x, Case) else x[:20],
)
def test_what_the_kernel_does_not_take_is_refused_before_anything_is_compiled(case, reason):
    with pytest.raises(NotImplementedError, match=reason):
        trace_attention(case)


def test_narrow_pool_is_refused_before_anything_is_compiled():
    def attend(q, pool, *rows):
        return attend_tpu(call_of(q, pool, 0, *rows))

    rows = ((64, 512), jnp.int32), ((64,), jnp.int32), ((65,), jnp.int32)
    with pytest.raises(NotImplementedError, match="lane_layout"):
        trace_for("v5e", attend, ((64, 32, 64), BF16), (block_pool_shape(64, 2, 8, 16, 64), BF16), *rows)
