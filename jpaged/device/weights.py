"""Weights of a model made ready to run: projections joined, norms fused, layers streamed from host memory if asked."""

import os
from collections.abc import Iterable

import jax
from flax import nnx
from jax.sharding import Mesh

from jpaged.config import EngineConfig
from jpaged.device.backends import Backend
from jpaged.device.kv.host_pool import free_machine_bytes
from jpaged.device.target import GIB, target_of
from jpaged.models import ModelConfig, fuse_norms, fuse_projections
from jpaged.models.layers.moe import run_experts_by
from jpaged.models.layers.streamed import stream_layers, streamed_params
from jpaged.sharding import is_on_host

LIMIT_VARIABLE = "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"
DEFAULT_LIMIT_GB = 64
"""Host memory that XLA pins for GPUs at most, unless ``LIMIT_VARIABLE`` says otherwise when JAX starts."""

_USABLE = 0.95
"""Share of XLA's pinned memory that arrays can fill: an array that does not fit a region's end goes to the next one."""


def prepare_weights(
    model: nnx.Module, model_config: ModelConfig, config: EngineConfig, mesh: Mesh, backend: Backend
) -> None:
    """Make a model ready to run on a backend, in place.

    Raises:
        ValueError: as ``check_host_weights``.
    """
    fuse_projections(model)
    if backend.add_norm is not None:
        fuse_norms(model, backend.add_norm)
    run_experts_by(model, backend.experts)
    if config.weight_placement == "host":
        check_host_weights(model, model_config.num_layers, mesh)
        stream_layers(model, model_config.num_layers)


def check_host_weights(model: nnx.Module, num_layers: int, mesh: Mesh) -> None:
    """Check that the matrices of a model's layers can be streamed from host memory.

    Args:
        model: its weights are arrays, or shapes of arrays that are to be loaded.
        num_layers: number of its layers.
        mesh: the devices.

    Raises:
        ValueError: several devices, a model without one list of layers, or not enough host memory.
    """
    if mesh.size > 1:
        raise ValueError(
            f"weight_placement='host' with {mesh.size} devices: weights are streamed to one device; use "
            "weight_placement='device', or one device"
        )
    params = streamed_params(model, num_layers)
    num_bytes = _num_bytes(params)
    needed = num_bytes - _num_bytes(x for x in params if isinstance(x, jax.Array) and is_on_host(x))
    free = free_machine_bytes()
    if needed > free:
        raise ValueError(
            f"weight_placement='host' does not fit: the matrices of {num_layers} layers take {num_bytes:,} bytes, "
            f"{needed:,} of them are not in host memory yet, and {free:,} bytes of it are free; free some, or use "
            "weight_placement='device'"
        )
    limit_gb = int(os.environ.get(LIMIT_VARIABLE, DEFAULT_LIMIT_GB))
    if target_of(mesh).addresses_host_memory and num_bytes > (usable := int(limit_gb * GIB * _USABLE)):
        wanted_gb = int(num_bytes / _USABLE / GIB) + 2
        raise ValueError(
            f"weight_placement='host' does not fit: the matrices of {num_layers} layers take {num_bytes:,} bytes, and "
            f"XLA pins {usable:,} for arrays at most; set {LIMIT_VARIABLE}={wanted_gb} before Python starts"
        )


def device_bytes(weights: Iterable[jax.Array]) -> int:
    """Bytes of the weights that are in device memory."""
    return _num_bytes(x for x in weights if not is_on_host(x))


def _num_bytes(arrays: Iterable[jax.Array | jax.ShapeDtypeStruct]) -> int:
    return sum(x.size * x.dtype.itemsize for x in arrays)
