"""Programs that stream blocks by DMA, through the real TPU compiler: whole steps, for chips that are not there."""

import math
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from bench.report import CONFIGS
from bench.tpu.compiler import TOPOLOGIES, mesh_in, mesh_of, why_no_compiler
from jpaged.config import EngineConfig
from jpaged.device.step.inputs import Bucket
from jpaged.device.step.programs import Programs
from jpaged.device.target import choose_backend
from jpaged.models import ModelConfig, fuse_projections, load_config
from jpaged.models.checkpoint.registry import abstract_model
from jpaged.sharding import TENSOR_AXIS
from pallas_kernels.block_pool.tpu import MOST_SLOTS, slots_for, start_layer_tpu, wait_layer_tpu
from tests.support.tiny import tiny_config

pytestmark = [
    pytest.mark.skipif(why_no_compiler() is not None, reason=str(why_no_compiler())),
    pytest.mark.usefixtures("nothing_kept_by_jax"),  # it cannot be loaded for devices that are not there
]

SMALL = tiny_config(num_heads=4, num_kv_heads=2, head_dim=128, hidden_size=512, vocab_size=512, num_layers=3)

SMALL_POOL = ((4096, 1, 2, 2, 16, 128), jnp.bfloat16)
"""A pool of one layer."""


def wide() -> ModelConfig:
    """Two layers of Llama-3-8B, with few words: the test is of its blocks."""
    return replace(load_config(CONFIGS / "llama3-8b"), num_layers=2, vocab_size=1024)


def programs_of(config: ModelConfig, generation: str, num_blocks: int, num_host_blocks: int) -> Programs:
    mesh = mesh_in(TOPOLOGIES[generation], 1, TENSOR_AXIS)
    model = nnx.merge(*abstract_model(config, "bfloat16", mesh))
    fuse_projections(model)
    settings = EngineConfig(
        max_num_seqs=16,
        max_num_batched_tokens=64,
        max_model_len=4096,
        attention_implementation="pallas_tpu",
        kv_placement="host",
    )
    backend = choose_backend(config, settings, "bfloat16", mesh)
    programs = Programs(model, config, settings, mesh, backend, max_model_len=4096, num_blocks=num_blocks)
    programs.open_window(num_host_blocks)
    return programs


def bytes_of(array) -> int:
    return math.prod(array.shape) * array.dtype.itemsize


@pytest.mark.parametrize("generation", ["v5e", "v6e"])
@pytest.mark.parametrize(
    ("is_small", "num_blocks", "num_host_blocks"),
    [(True, 4096, 512), (False, 32 * 1024, 2048)],
    ids=["small", "blocks of llama3-8b, 4 GiB of them with all layers"],
)
def test_a_decode_starts_the_copies_of_the_next_layer_before_it_waits_for_those_of_this_one(
    is_small, num_blocks, num_host_blocks, generation
):
    config = SMALL if is_small else wide()
    programs = programs_of(config, generation, num_blocks, num_host_blocks)
    pool = programs.abstract_cache().pool
    compiled = programs.lower(("stream", Bucket(16, 16))).compile()
    memory = compiled.memory_analysis()
    assert memory.host_argument_size_in_bytes >= programs.bytes_per_block * num_host_blocks
    assert memory.host_temp_size_in_bytes == 0
    assert memory.alias_size_in_bytes >= bytes_of(pool), "the donated pool is written in place"
    assert memory.temp_size_in_bytes < bytes_of(pool) / 20
    hlo = compiled.as_text()
    shape = ",".join(map(str, (pool.shape[0] * config.num_layers, 1, *pool.shape[2:])))
    assert not re.search(rf"= \(?bf16\[{shape}\]\S* copy", hlo), "nothing moves the pool while copies fill it"
    kernels = re.findall(r"%(start_layer|wait_layer|paged_attention)\S* = .*custom-call\(", hlo)
    between = ["start_layer", "wait_layer", "paged_attention"] * (config.num_layers - 1)
    assert kernels == ["start_layer", *between, "wait_layer", "paged_attention"]


def test_a_chunk_streams_in_place_too():
    programs = programs_of(SMALL, "v5e", 4096, 512)
    pool_bytes = bytes_of(programs.abstract_cache().pool)
    memory = programs.lower(("stream", Bucket(64, 16))).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= pool_bytes
    assert memory.temp_size_in_bytes < pool_bytes / 20


@pytest.mark.parametrize("generation", ["v5e", "v6e"])
def test_whole_blocks_move_in_place_and_without_staging(generation):
    programs = programs_of(SMALL, generation, 4096, 512)
    memory = programs.lower(("restore", 32)).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= bytes_of(programs.abstract_cache().pool)
    assert memory.temp_size_in_bytes + memory.host_temp_size_in_bytes == 0
    memory = programs.lower(("store", 32)).compile().memory_analysis()
    assert memory.host_alias_size_in_bytes >= bytes_of(programs.host_slots(512)), "the slots are written in place"
    assert memory.temp_size_in_bytes + memory.host_temp_size_in_bytes == 0


@pytest.mark.parametrize("generation", ["v5e", "v6e"])
def test_a_launch_takes_the_most_slots_there_may_be(generation):
    def run(layers, slots, named, after):
        layers, semaphore = start_layer_tpu(layers, slots, named, 1, 4)
        return wait_layer_tpu(layers, named, semaphore, after)

    pool, named = SMALL_POOL, ((1 + MOST_SLOTS,), jnp.int32)
    slots = slots_for(jax.ShapeDtypeStruct((1, 2, *pool[0][2:]), pool[1]), MOST_SLOTS)
    mesh = mesh_of(generation)
    on_device = NamedSharding(mesh, PartitionSpec())
    arguments = [jax.ShapeDtypeStruct(*x, sharding=on_device) for x in (pool, named, ((8, 128), jnp.float32))]
    in_host = jax.ShapeDtypeStruct(slots.shape, slots.dtype, sharding=on_device.with_memory_kind("pinned_host"))
    arguments.insert(1, in_host)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        compiled = jax.jit(run, donate_argnums=0).lower(*arguments).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 1 << 20
