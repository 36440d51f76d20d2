"""The one answer to which platform the devices are, and what the engine does by default there."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jpaged.config import EngineConfig
from jpaged.device.backends import Backend
from jpaged.device.backends.hopper import HopperBackend
from jpaged.device.backends.tpu import TpuBackend
from jpaged.device.backends.xla import XlaBackend
from jpaged.device.kv.layout import grouping_of, heads_of_pool, kv_dtype, pool_block_size
from jpaged.device.kv.pinned import why_no_pinned_memory
from jpaged.models.checkpoint.config import ModelConfig
from pallas_kernels import best_implementation, block_pool_shape
from pallas_kernels.paged_attention import kernels_here, why_not_here

GIB = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Target:
    """Defaults of one platform, where the settings say nothing.

    Args:
        platform: JAX's name.
        has_own_memory: whether the devices' memory is apart from the machine's, and reports how much of it is free.
        dtype: dtype that "auto" means; None is the checkpoint's, or bfloat16 for a checkpoint in float32.
        max_burst: steps of a multi-step decode.
        max_inter_token_ms: milliseconds that a step with decodes should take at most; None is no bound.
        least_rows: rows of the smallest program for decodes; see also ``least_rows_of``.
        halfway_from: tokens from which there is a program about halfway between two powers of two; None for no such.
        warms_up: whether an engine begins with the programs of a few sizes, and compiles the others while it serves.
        keeps_programs: whether compiled programs are kept between runs.
        tunes_programs: whether the compiler times kernels on the device, and keeps the fastest.
        pool_bytes: bytes of the block pool at most; None leaves that to ``memory_fraction``.
        host_pool_bytes: bytes of the host pool at most.
        addresses_host_memory: whether devices read and write pinned memory of the host at its own addresses.
        calls_back: whether programs can call back, and so let the host start copies.
        streamed_dtypes: the ``kv_cache_dtype`` of pools into which blocks on the host can be streamed.
        compiler_options: options of XLA, by name.
    """

    platform: str
    has_own_memory: bool = True
    dtype: str | None = None
    max_burst: int = 4  # planning a step takes the host about as long as a small step runs
    max_inter_token_ms: float | None = 100.0
    least_rows: int = 16  # fewer rows read the same weights, and take as long
    # Llama-3-8B on an H200 decodes 64 rows in 5.9 ms and 256 in 10.9, less than half of it attention. So padding costs.
    halfway_from: int | None = 64
    warms_up: bool = True
    keeps_programs: bool = True
    tunes_programs: bool = False
    pool_bytes: int | None = None
    host_pool_bytes: int = 4 * GIB
    addresses_host_memory: bool = False
    calls_back: bool = True
    streamed_dtypes: tuple[str, ...] = ("auto", "int8", "fp8")
    compiler_options: tuple[tuple[str, Any], ...] = ()

    def least_rows_of(self, model: ModelConfig) -> int:
        """Rows of the smallest program for decodes of a model. Each row of a mixture of experts reads more weights."""
        return self.least_rows if model.experts is None else 1

    def resolve_dtype(self, wanted: str, stored: str) -> jnp.dtype:
        """The dtype to run in.

        Args:
            wanted: the setting.
            stored: dtype of the checkpoint.
        """
        if wanted == "auto":
            wanted = self.dtype or ("bfloat16" if stored == "float32" else stored)
        return jnp.dtype(wanted)

    def dtype_note(self, wanted: str, stored: str) -> str | None:
        """A line for users whose float32 checkpoint runs in another dtype that they did not ask for; None for others.

        Args:
            wanted: the setting.
            stored: dtype of the checkpoint.
        """
        dtype = self.resolve_dtype(wanted, stored).name
        if wanted != "auto" or stored != "float32" or dtype == "float32":
            return None
        return f"the checkpoint is in float32, and runs in {dtype}: dtype='float32' runs it as it is stored"


_GPU_OPTIONS = (
    # Loops run inside CUDA graphs, even if a program is nothing but a loop. Otherwise the host reads after every
    # iteration whether there is another.
    (
        "xla_gpu_enable_command_buffer",
        "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION,CONDITIONAL,WHILE",
    ),
    ("xla_gpu_graph_min_graph_size", 1),
    # XLA counts the pool once for each layer that writes it in place, and would compute values again to save memory.
    # It would also write the elementwise products of one row and a matrix of at most 10 million weights to memory,
    # and then sum them: 28 us on an H200 for a projection of 17 MB, which takes 4 to read.
    ("xla_disable_hlo_passes", "rematerialization,dot-strength-reduction"),
)

TARGETS = {
    target.platform: target
    for target in (
        # The machine only emulates shorter types, and its memory is not the pool's own. It compiles about as fast as it
        # traces.
        Target(
            platform="cpu",
            has_own_memory=False,
            dtype="float32",
            max_burst=1,
            max_inter_token_ms=None,
            least_rows=1,
            halfway_from=None,
            warms_up=False,
            keeps_programs=False,
            pool_bytes=GIB,
            streamed_dtypes=("auto", "int8"),  # XLA copies a pool of fp8 to write to it
        ),
        Target(platform="gpu", compiler_options=_GPU_OPTIONS, addresses_host_memory=True, tunes_programs=True),
        Target(platform="tpu", calls_back=False, streamed_dtypes=("auto",)),
    )
}
"""Every platform that the engine has defaults for."""


def why_no_streaming(config: EngineConfig) -> str | None:
    """The reason why the devices of this process cannot stream blocks under these settings; None if they can."""
    target = TARGETS.get(jax.default_backend())
    if target is not None and target.addresses_host_memory and (reason := why_no_pinned_memory()) is not None:
        return reason
    if target is not None and config.kv_cache_dtype not in target.streamed_dtypes:
        allowed = ", ".join(map(repr, target.streamed_dtypes))
        streamed = f"a {target.platform.upper()} streams blocks of kv_cache_dtype {allowed}"
        return f"{streamed}, not {config.kv_cache_dtype!r}"
    if config.tensor_parallel_size > 1:
        return f"tensor_parallel_size={config.tensor_parallel_size}: blocks are streamed from the host to one device"
    return None


def target_of(mesh: Mesh) -> Target:
    """The target of a mesh.

    Raises:
        ValueError: devices of a platform without defaults.
    """
    platform = mesh.devices.flat[0].platform
    if platform not in TARGETS:
        raise ValueError(f"the devices are of platform {platform!r}: expected one of {', '.join(TARGETS)}")
    return TARGETS[platform]


BACKENDS: dict[str, type[Backend]] = {backend.name: backend for backend in (XlaBackend, HopperBackend, TpuBackend)}
"""Every backend by the name that the settings know."""


def placement_note(config: EngineConfig, target: Target) -> str | None:
    """A line for users whose settings place KV or weights where the devices compute anyway; None for all others."""
    if target.has_own_memory:
        return None
    names = [name for name in ("kv_placement", "weight_placement") if getattr(config, name) != "device"]
    if not names:
        return None
    placements = " and ".join(f"{name}={getattr(config, name)!r}" for name in names)
    return f"{placements} {'gains' if len(names) == 1 else 'gain'} nothing here: the device computes in host memory"


def choose_backend(model: ModelConfig, config: EngineConfig, dtype: jax.typing.DTypeLike, mesh: Mesh) -> Backend:
    """The backend for a model on the devices of a mesh: the one asked for, or the fastest that takes the model.

    Args:
        model: shape of the model.
        config: the engine's settings.
        dtype: type of the activations.
        mesh: the devices.
    """
    if config.attention_implementation is not None:
        return BACKENDS[config.attention_implementation]("as asked", mesh.size, config.interpret)
    num_kv_heads, head_dim = heads_of_pool(model.layer_specs, mesh.size)
    stored = kv_dtype(config.kv_cache_dtype, dtype)
    with jax.default_device(mesh.devices.flat[0]):
        own = BACKENDS[kernels_here()]("", mesh.size)
        heads = own.pool_heads(num_kv_heads, head_dim)
        # Each device runs the kernels over its own heads.
        num_layers = grouping_of(model, config).groups.layers_per_block
        pool = block_pool_shape(1, num_layers, heads[0] // mesh.size, pool_block_size(model, config), heads[1])
        queries = (1, model.num_heads // mesh.size, head_dim)
        reason = why_not_here(queries, jnp.dtype(dtype), pool, stored)
        choice = best_implementation(reason, num_devices=1)
    return BACKENDS[choice.name](choice.reason, mesh.size)


def describe_devices(devices: Sequence[Any]) -> list[str]:
    """Kind, platform and number of each device, for people."""
    return [f"{device.device_kind} ({device.platform}:{device.id})" for device in devices]
