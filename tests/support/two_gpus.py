"""Lowers a model's step for two Hopper GPUs, and leaves in a directory how XLA partitions and optimises them.

    python -m tests.support.two_gpus DIRECTORY NUM_TOKENS KV_CACHE_DTYPE

The compiler is that of CPUs, for there is no other without a GPU. It partitions, fuses and places copies, writes that
down, and then ends the process, since it cannot emit a kernel for GPUs.
"""

import os
import sys
from functools import partial

import jax
from flax import nnx

from jpaged.config import EngineConfig
from jpaged.device.step.inputs import Bucket
from jpaged.device.step.programs import Programs, abstract_state
from jpaged.device.target import BACKENDS
from jpaged.models import LlamaConfig, Rope, fuse_norms, fuse_projections
from jpaged.models.checkpoint.registry import abstract_model
from jpaged.sharding import make_mesh
from pallas_kernels.chips import here

NUM_BLOCKS = 500

MODEL = LlamaConfig(
    architecture="LlamaForCausalLM",
    vocab_size=64,
    hidden_size=1024,
    intermediate_size=256,
    num_layers=3,
    num_heads=8,
    num_kv_heads=4,
    head_dim=64,
    max_position_embeddings=1024,
    rms_norm_eps=1e-5,
    rope=Rope(64, 10000.0, 1024),
)


def main(directory: str, num_tokens: int, kv_cache_dtype: str) -> None:
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
    jax.config.update("jax_platforms", "cpu")
    here.why_no_hopper = lambda: None
    mesh = make_mesh(2)
    model = nnx.merge(*abstract_model(MODEL, "bfloat16", mesh))
    backend = BACKENDS["hopper"]("", mesh.size)
    fuse_projections(model)
    fuse_norms(model, backend.add_norm)
    sizes = {"max_num_seqs": 16, "max_num_batched_tokens": 512, "tensor_parallel_size": 2}
    config = EngineConfig(**sizes, kv_cache_dtype=kv_cache_dtype)
    programs = Programs(model, MODEL, config, mesh, backend, max_model_len=1024, num_blocks=NUM_BLOCKS)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        step = jax.jit(partial(programs.steps.forward, Bucket(num_tokens, 16), None), donate_argnums=(1, 2))
        traced = step.trace(programs.weights, programs.abstract_cache(), abstract_state(programs))
        lowered = traced.lower(lowering_platforms=("cuda",))
    lowered.compile(compiler_options={"xla_dump_to": directory, "xla_dump_hlo_as_text": True})


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
