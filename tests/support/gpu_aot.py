"""The real GPU compiler, for a GPU that is not there: whole steps of an engine, with the Hopper kernels.

It needs XLA's plugin for CUDA (``pip install 'jpaged[gpu-aot]'``), and neither a GPU nor CUDA's own libraries.
"""

import importlib.util
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import numpy as np
from flax import nnx
from jax._src import compiler, xla_bridge
from jax.experimental import topologies
from jax.sharding import Mesh

from bench.report import CONFIGS
from jpaged.config import EngineConfig
from jpaged.device.kv.copy_engine import PlainCopier
from jpaged.device.step.inputs import Bucket
from jpaged.device.step.programs import Programs
from jpaged.device.target import BACKENDS
from jpaged.models import fuse_norms, fuse_projections, load_config
from jpaged.models.checkpoint.registry import abstract_model
from jpaged.models.layers.moe import run_experts_by
from jpaged.sharding import TENSOR_AXIS

H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  memory_bandwidth: 4800000000000 l2_cache_size: 62914560 clock_rate_ghz: 1.98 device_memory_size: 150000000000
  cuda_compute_capability { major: 9 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 12 }
runtime_version { major: 13 }
device_description_str: "NVIDIA H200"
"""
"""The target of XLA's compiler for GPUs, in its own format."""

MAX_MODEL_LEN = 4096

NUM_LAYERS = 2
"""Layers of the models whose steps are compiled."""


def why_no_compiler() -> str | None:
    """The reason why nothing can be compiled for GPUs here; None if it can."""
    if importlib.util.find_spec("jax_plugins") and importlib.util.find_spec("jax_plugins.xla_cuda13"):
        return None
    return "no compiler for GPUs: pip install 'jpaged[gpu-aot]'"


@contextmanager
def absent_h200() -> Iterator[Mesh]:
    """One device that programs can be compiled for. JAX would otherwise ask for a GPU of this machine."""
    canonical, compile_and_load = xla_bridge.canonicalize_platform, compiler.backend_compile_and_load

    def canonicalize(platform: str) -> str:
        return "cuda" if platform in ("gpu", "cuda") else canonical(platform)

    def compile_only(backend: Any, module: Any, devices: Any, options: Any, host_callbacks: Any) -> Any:
        return compile_and_load(backend, module, devices, options, [])  # nothing runs, so that nothing calls back

    topology = topologies.get_topology_desc(platform="cuda", topology_name="H200", target_config=H200, topology="1x1x1")
    [device] = topology.devices
    with ExitStack() as stack:
        stack.enter_context(patch.object(xla_bridge, "canonicalize_platform", canonicalize))
        stack.enter_context(patch.object(compiler, "backend_compile_and_load", compile_only))
        stack.enter_context(patch("pallas_kernels.chips.here.default_device", lambda: device))
        stack.enter_context(patch("jpaged.device.step.programs.CopyEngine", PlainCopier))
        yield Mesh(np.array([device]), (TENSOR_AXIS,))


def programs_on(mesh: Mesh, shapes: str, num_blocks: int, num_host_blocks: int, **settings: Any) -> Programs:
    """The programs of a model of few layers and words, with a window for the blocks of the host.

    Args:
        mesh: the device.
        shapes: name in ``bench/configs``.
        num_blocks, num_host_blocks: blocks of both pools.
        settings: settings of the engine.
    """
    model_config = load_config(CONFIGS / shapes)
    windows = {"sliding_windows": given[:NUM_LAYERS]} if (given := getattr(model_config, "sliding_windows", ())) else {}
    model_config = replace(model_config, num_layers=NUM_LAYERS, vocab_size=1024, **windows)
    model = nnx.merge(*abstract_model(model_config, "bfloat16", mesh))
    fuse_projections(model)
    config = EngineConfig(max_num_seqs=32, max_num_batched_tokens=512, max_model_len=MAX_MODEL_LEN, **settings)
    backend = BACKENDS["hopper"]("as asked", 1)
    fuse_norms(model, backend.add_norm)
    run_experts_by(model, backend.experts)
    programs = Programs(model, model_config, config, mesh, backend, max_model_len=MAX_MODEL_LEN, num_blocks=num_blocks)
    if num_host_blocks:
        programs.open_window(num_host_blocks)
    return programs


def compiled(programs: Programs, kind: str, size: Bucket | int) -> Any:
    """The program of a step, or of a move of so many blocks."""
    options = dict(programs.target.compiler_options) | {"xla_gpu_autotune_level": 0}  # nothing can be timed
    return programs.lower((kind, size)).compile(compiler_options=options)
