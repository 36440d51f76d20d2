"""``jpaged info``: what a machine and a checkpoint offer, without reading weights or allocating a KV cache."""

import argparse
import os
import platform
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from jpaged.cli.layer_groups import GroupsInfo, describe_groups
from jpaged.cli.options import engine_settings
from jpaged.cli.terminal import to_json
from jpaged.config import EngineConfig
from jpaged.contract.layer_groups import LayerGroups
from jpaged.device.kv.host_memory import has_copy_engine
from jpaged.device.kv.host_pool import num_host_blocks_for
from jpaged.device.kv.layout import grouping_of, host_layout, pool_layout
from jpaged.device.kv.limits import with_limits
from jpaged.device.kv.sizing import check_pools, num_blocks_that_fit
from jpaged.device.profile_file import load_profile, profile_path
from jpaged.device.runner import check_settings
from jpaged.device.step.compile_cache import enable_compile_cache
from jpaged.device.target import Target, choose_backend, describe_devices, placement_note, target_of
from jpaged.device.weights import check_host_weights, device_bytes
from jpaged.engine.sampling_defaults import read_sampling_defaults
from jpaged.host.offload.profile import report
from jpaged.llm import DEMO_MODEL
from jpaged.models import ModelConfig, load_config
from jpaged.models.checkpoint.hub import CONFIG_FILES, find_checkpoint
from jpaged.models.checkpoint.registry import abstract_model, is_dtype_known
from jpaged.sharding import make_mesh

PACKAGES = ("jpaged", "jax", "jaxlib", "flax", "transformers")


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A checkpoint's shape, and its weights in the dtype they would run in; some may be streamed from host memory.

    ``experts`` are those of a layer, and those of a token; None without a mixture of experts. ``dtype_note`` says why
    the dtype is not the checkpoint's, or what the dtype depends on; None where neither is so.
    """

    path: str
    architecture: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    experts: tuple[int, int] | None
    max_model_len: int
    num_parameters: int
    weight_bytes: int
    host_weight_bytes: int
    dtype: str
    dtype_note: str | None


@dataclass(frozen=True, slots=True)
class PoolInfo:
    """The KV cache of an LLM with these settings.

    ``num_tokens`` is the capacity of all blocks but block 0, which is padding; with windows, in sequences of the
    longest context. ``bytes_per_token`` are the bytes of a new token. On an accelerator all sizes are upper bounds: the
    workspace of a step, which only the compiler knows, is not subtracted.
    """

    block_size: int
    bytes_per_token: int
    num_blocks: int
    pool_bytes: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class LimitsInfo:
    """Limits of a step.

    ``max_inter_token_ms`` is None where prompts beside decodes have no bound of their own: by the settings, or without
    the rates of the device. ``least_step_ms`` is the time of a step of one token, if an earlier run kept it.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    max_inter_token_ms: float | None
    least_step_ms: float | None

    def __str__(self) -> str:
        limits = f"{self.max_num_seqs:,} sequences and {self.max_num_batched_tokens:,} tokens at most"
        if self.max_inter_token_ms is None:
            return f"{limits}; no bound beside decodes"
        bound = f"{limits}; {self.max_inter_token_ms:g} ms beside decodes"
        return bound if self.least_step_ms is None else f"{bound}, of which one token takes {self.least_step_ms:.3g}"


@dataclass(frozen=True, slots=True)
class HostPoolInfo:
    """The host pool, sized by the memory that is free now unless the settings say otherwise."""

    num_blocks: int
    pool_bytes: int
    memory_kind: str


@dataclass(frozen=True, slots=True)
class Info:
    """Everything ``jpaged info`` shows; as text, one line for each.

    ``numa_node`` is that of the host pool, or None where processes of several nodes could have it. ``profile`` has the
    rates that an earlier run with these settings kept in ``profile_path``, or is None. ``placement_note`` says whether
    the placements asked for gain nothing here. ``sampling_defaults`` are the parameters that the checkpoint recommends.
    """

    versions: dict[str, str]
    devices: list[str]
    attention_implementation: str
    attention_reason: str
    compile_cache_dir: str | None
    model: ModelInfo
    kv_cache: PoolInfo
    limits: LimitsInfo
    layer_groups: GroupsInfo | None
    host_pool: HostPoolInfo
    numa_node: int | None
    profile: dict[str, float] | None
    profile_path: str | None
    preemption: str
    placement_note: str | None
    sampling_defaults: dict[str, Any]

    def __str__(self) -> str:
        model, pool = self.model, self.kv_cache
        on_host = f", {_size(model.host_weight_bytes)} of it in host memory" if model.host_weight_bytes else ""
        rows = {
            "versions": ", ".join(f"{name} {number}" for name, number in self.versions.items()),
            "devices": ", ".join(self.devices),
            "attention": f"{self.attention_implementation} ({self.attention_reason})",
            "compile cache": self.compile_cache_dir or "none: no directory of this user's own could be made",
            "model": f"{model.architecture} in {model.path}",
            "shape": f"{model.num_layers} layers of {model.hidden_size}, {model.num_heads} heads and "
            f"{model.num_kv_heads} KV heads of {model.head_dim}, vocabulary {model.vocab_size:,}, "
            f"context {model.max_model_len:,} tokens",
            "weights": f"{model.num_parameters:,} parameters, {_size(model.weight_bytes)} in {model.dtype}" + on_host,
            "experts": "{} in a layer, {} for each token".format(*model.experts) if model.experts else None,
            "dtype": model.dtype_note,
            "KV cache": f"{pool.bytes_per_token:,} bytes a token; {pool.num_blocks:,} blocks of {pool.block_size} "
            f"are {_size(pool.pool_bytes)} and hold {pool.num_tokens:,} tokens",
            "step": str(self.limits),
            "layer groups": str(self.layer_groups or ""),
            "rates": _describe_rates(self.profile),
            "host pool": _describe_host_pool(self.host_pool, self.numa_node),
            "preemption": _describe_preemption(self.preemption, self.host_pool),
            "placement": self.placement_note,
            "sampling": ", ".join(f"{name} {value}" for name, value in self.sampling_defaults.items()),
        }
        return "\n".join(f"{name:<14} {value}" for name, value in rows.items() if value)


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the memory is left to others
    info = gather_info(args.model, EngineConfig(**engine_settings(args)))
    if args.is_leader:
        print(to_json(asdict(info)) if args.json else info)


def gather_info(path: str | Path | None, config: EngineConfig) -> Info:
    """Look at this machine and at a checkpoint's config.json.

    Args:
        path: a checkpoint directory, or the name of a repository; None is the model in the package.
        config: the settings of the LLM.

    Raises:
        ValueError: no checkpoint, an unknown architecture, or settings that the machine or the model cannot meet.
    """
    path = DEMO_MODEL if path is None else find_checkpoint(path, files=CONFIG_FILES, use_tqdm=False)
    model_config = load_config(path)
    mesh = make_mesh(config.tensor_parallel_size)
    dtype = target_of(mesh).resolve_dtype(config.dtype, model_config.dtype)
    graphdef, state = abstract_model(model_config, dtype, mesh, weight_placement=config.weight_placement)
    if config.weight_placement == "host":
        check_host_weights(nnx.merge(graphdef, state), model_config.num_layers, mesh)
    weights = jax.tree.leaves(state)
    weight_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in weights)
    backend = choose_backend(model_config, config, dtype, mesh)
    config = with_limits(model_config, config, dtype, mesh, backend, weight_bytes=device_bytes(weights))
    check_pools(model_config, config, dtype, mesh)
    layout = pool_layout(model_config, config, dtype, backend)
    groups = grouping_of(model_config, config).groups
    kv_cache = _plan_pool(model_config, config, groups, layout.block_bytes, device_bytes(weights), mesh)
    host_bytes_per_block = host_layout(layout, config).block_bytes // jax.process_count()
    cache_dir = enable_compile_cache()
    kept_at = profile_path(model_config, config, dtype, backend.name, mesh)
    profile = load_profile(kept_at)
    host_pool = _plan_host_pool(model_config, config, groups, kv_cache, host_bytes_per_block, target_of(mesh))
    # Without these, an engine measures no rates.
    is_measured = host_pool.num_blocks > 0 and config.preemption == "auto"
    inter_token_ms = config.max_inter_token_ms or target_of(mesh).max_inter_token_ms
    return Info(
        versions={"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        devices=describe_devices(jax.devices()),
        attention_implementation=backend.name,
        attention_reason=backend.reason,
        compile_cache_dir=None if cache_dir is None else str(cache_dir),
        model=ModelInfo(
            path=str(path),
            architecture=model_config.architecture,
            num_layers=model_config.num_layers,
            hidden_size=model_config.hidden_size,
            num_heads=model_config.num_heads,
            num_kv_heads=model_config.num_kv_heads,
            head_dim=model_config.head_dim,
            vocab_size=model_config.vocab_size,
            experts=model_config.experts,
            max_model_len=model_config.max_model_len,
            num_parameters=sum(leaf.size for leaf in weights),
            weight_bytes=weight_bytes,
            host_weight_bytes=weight_bytes - device_bytes(weights),
            dtype=dtype.name,
            dtype_note=_dtype_note(path, model_config, config, target_of(mesh)),
        ),
        kv_cache=kv_cache,
        limits=LimitsInfo(
            config.most_rows,
            config.token_budget,
            inter_token_ms if is_measured else None,
            None if profile is None else 1e3 * profile.prefill_fixed_s,
        ),
        layer_groups=describe_groups(model_config, config, dtype, backend, kv_cache.num_blocks),
        host_pool=host_pool,
        numa_node=find_numa_node(),
        profile=None if profile is None else report(profile),
        profile_path=None if profile is None else str(kept_at),
        preemption=config.preemption,
        placement_note=placement_note(config, target_of(mesh)),
        sampling_defaults=read_sampling_defaults(path) if config.generation_config == "auto" else {},
    )


def _dtype_note(path: Path, model: ModelConfig, config: EngineConfig, target: Target) -> str | None:
    """Explain a dtype that is not the checkpoint's, or depends on weights that are not here; None for any other."""
    note = target.dtype_note(config.dtype, model.dtype)
    if note is None or is_dtype_known(path):
        return note
    return "config.json names none, and the weights are not here: those in float16 run in float16"


def _plan_pool(
    model: ModelConfig, config: EngineConfig, groups: LayerGroups, bytes_per_block: int, weight_bytes: int, mesh: Mesh
) -> PoolInfo:
    """The pool that ``ModelRunner`` would allocate, without regard to the workspace."""
    max_model_len, block_size = check_settings(model, config), config.block_size
    most_blocks = groups.num_blocks(max_model_len, block_size, config.token_budget)
    num_blocks = config.num_blocks or num_blocks_that_fit(
        bytes_per_block,
        mesh,
        target_of(mesh),
        config.memory_fraction,
        reserved_bytes=weight_bytes,
        least_blocks=most_blocks + 1,
        useful_blocks=config.most_rows * most_blocks + 1,
    )
    num_blocks, num_usable = max(0, num_blocks), max(0, num_blocks - 1)
    num_tokens = num_usable * block_size
    if not groups.is_plain:
        num_tokens = num_usable * max_model_len // groups.num_blocks(max_model_len, block_size)
    return PoolInfo(
        block_size=block_size,
        bytes_per_token=bytes_per_block * len(groups) // block_size,
        num_blocks=num_blocks,
        pool_bytes=num_blocks * bytes_per_block,
        num_tokens=num_tokens,
    )


def _plan_host_pool(
    model: ModelConfig,
    config: EngineConfig,
    groups: LayerGroups,
    kv_cache: PoolInfo,
    bytes_per_block: int,
    target: Target,
) -> HostPoolInfo:
    """The host pool of each host that ``ModelRunner`` would allocate beside ``kv_cache``."""
    max_model_len = check_settings(model, config)
    if config.kv_placement == "device":  # otherwise contexts may be longer than the pool
        held = groups.most_tokens(max(kv_cache.num_blocks - 1, 0), config.block_size, config.token_budget)
        max_model_len = min(max_model_len, held)
    num_blocks = num_host_blocks_for(
        config,
        target,
        bytes_per_block,
        useful_blocks=config.most_rows * groups.num_blocks(max_model_len, config.block_size, config.token_budget),
    )
    kind = "pinned_host" if has_copy_engine(target) else "unpinned_host"
    return HostPoolInfo(num_blocks, num_blocks * bytes_per_block, kind)


def find_numa_node() -> int | None:
    """Find the NUMA node whose memory this process takes: that of all CPUs it may run on. None if there are several."""
    if not hasattr(os, "sched_getaffinity"):
        return None
    allowed, nodes = os.sched_getaffinity(0), []
    for path in Path("/sys/devices/system/node").glob("node*/cpulist"):
        if allowed & _cpus_in(path.read_text()):
            nodes.append(int(path.parent.name.removeprefix("node")))
    return nodes[0] if len(nodes) == 1 else None


def _cpus_in(text: str) -> set[int]:
    """The numbers of a list such as "0-3,8"."""
    cpus: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        cpus.update(range(int(first), int(last or first) + 1))
    return cpus


def _describe_host_pool(pool: HostPoolInfo, numa_node: int | None) -> str:
    if pool.num_blocks == 0:
        return "none; --num-host-blocks or --host-memory-bytes makes one"
    text = f"{pool.num_blocks:,} blocks are {_size(pool.pool_bytes)} of {pool.memory_kind.replace('_', ' ')} memory"
    if pool.memory_kind != "pinned_host" or numa_node is None:
        return text
    return f"{text} of NUMA node {numa_node}"


def _describe_rates(profile: dict[str, float] | None) -> str:
    """The rates that matter most, as an earlier run measured them; empty if none did."""
    if profile is None:
        return ""
    to_host, from_host = (profile[f"{way}_bytes_per_s"] / 1e9 for way in ("to_host", "from_host"))
    prompts = 1 / max(profile["prefill_token_s"], 1e-12)
    return f"{to_host:.3g} GB/s to the host, {from_host:.3g} GB/s from it, {prompts:,.0f} prompt tokens/s (kept)"


def _describe_preemption(preemption: str, pool: HostPoolInfo) -> str:
    if preemption == "auto" and pool.num_blocks == 0:
        return "auto: recompute, as there is no host pool"
    return "auto: swap or recompute, whichever is quicker here" if preemption == "auto" else preemption


def _size(num_bytes: int) -> str:
    """A size in the larger of MiB and GiB that leaves a digit before the point."""
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.2f} MiB"
