"""The profiler: measures the link and the device with the programs of the engine."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from jpaged.config import EngineConfig
from jpaged.contract.profile import MachineProfile, fit_prefill
from jpaged.device.kv.host_pool import HostPool
from jpaged.device.kv.pool import KVCache
from jpaged.device.profile_file import load_profile, profile_path, save_profile
from jpaged.device.step.inputs import Bucket
from jpaged.device.step.programs import Programs
from jpaged.models import ModelConfig

SHORT_CHUNKS = 8
"""Short chunks in the place of a long one; the difference of their times is what context adds."""

PROJECTED_S = 0.2
"""Projections are timed together for so long, or once: a device lowers its clock only under lasting work."""

MOST_CALLS = 256
"""Most projections that are timed together."""

FEW = 8
"""The smaller projection has this fraction of a step's tokens."""


class Measurable(Protocol):
    """The parts of a runner that the profiler uses."""

    cache: KVCache
    host_pool: HostPool | None
    config: EngineConfig
    model_config: ModelConfig
    mesh: jax.sharding.Mesh
    programs: Programs

    @property
    def buckets(self) -> list[Bucket]: ...
    @property
    def dtype(self) -> jnp.dtype: ...
    @property
    def max_model_len(self) -> int: ...
    @property
    def num_blocks(self) -> int: ...
    @property
    def host_bytes_per_block(self) -> int: ...
    def time_prefill(self, num_chunks: int, length: int) -> float: ...


def make_profile(runner: Measurable) -> MachineProfile:
    """Read the profile that an earlier run kept, or else measure one and keep it."""
    profile = load_profile(_path_for(runner))
    if profile is None:
        profile = measure_profile(runner)
        keep_profile(runner, profile)
    return profile


def keep_profile(runner: Measurable, profile: MachineProfile) -> None:
    """Keep a profile for later runs."""
    save_profile(_path_for(runner), profile)


def _path_for(runner: Measurable) -> Path | None:
    return profile_path(runner.model_config, runner.config, runner.dtype, runner.programs.backend.name, runner.mesh)


def measure_profile(runner: Measurable) -> MachineProfile:
    """Measure copies both ways, and prefills that write to block 0 at most.

    Three steps are timed: one of a single token, one of the largest size with short chunks, and one with long chunks,
    whose tokens attend to more. Both fill the largest size, so that neither times padding: smaller sizes may not be
    compiled yet. Where decodes stream KV, projections and reads of the pool are timed too.

    Args:
        runner: has a host pool; no step is in flight.
    """
    assert runner.host_pool is not None
    bucket = runner.buckets[-1]
    num_long = min(-(-bucket.num_tokens // runner.max_model_len), bucket.num_rows)
    longest = min(runner.max_model_len, bucket.num_tokens // num_long)
    num_short = min(SHORT_CHUNKS * num_long, bucket.num_rows)
    shortest = max(num_long * longest // num_short, 1)
    fixed_s = runner.time_prefill(1, 1)
    short_s, long_s = runner.time_prefill(num_short, shortest), runner.time_prefill(num_long, longest)
    token_s, context_s = fit_prefill(
        (shortest, fixed_s + (short_s - fixed_s) / num_short),
        (longest, fixed_s + (long_s - fixed_s) / num_long),
        fixed_s=fixed_s,
    )
    runner.cache, to_host, from_host = runner.host_pool.measure(runner.cache)
    is_streamed = runner.config.kv_placement != "device"
    return MachineProfile(
        block_bytes=runner.host_bytes_per_block,
        to_host=to_host,
        from_host=from_host,
        projection_flops_per_s=_measure_projections(runner) if is_streamed else (),
        prefill_fixed_s=fixed_s,
        prefill_token_s=token_s,
        prefill_context_s=context_s,
        layer_fixed_s=fixed_s / runner.model_config.num_layers,
        layer_token_s=_measure_token_read(runner) if is_streamed else 0.0,
    )


def _measure_projections(runner: Measurable) -> tuple[tuple[int, float], ...]:
    """Time the projections of one layer to K and V, of a few tokens and of a step's tokens.

    Factors are random: products of zeros need less power, and run faster on a GPU that lowers its clock to save it.
    """
    model, most = runner.model_config, runner.buckets[-1].num_tokens
    width, device = 2 * model.num_kv_heads * model.head_dim, runner.mesh.devices.flat[0]
    weight = _random((model.hidden_size, width), runner.dtype, device)
    project = jax.jit(lambda hidden, weight: hidden @ weight)
    rates = []
    for num_tokens in sorted({max(most // FEW, 1), most}):
        hidden = _random((num_tokens, model.hidden_size), runner.dtype, device)
        flops = 2 * num_tokens * model.hidden_size * width
        num_calls = min(max(int(PROJECTED_S / _time(1, project, hidden, weight)), 1), MOST_CALLS)
        rates.append((num_tokens, flops / _time(num_calls, project, hidden, weight)))
    return tuple(rates)


def _random(shape: tuple[int, ...], dtype: jnp.dtype, device: Any) -> jax.Array:
    return jax.device_put(jax.random.normal(jax.random.key(0), shape, dtype), device)


def _measure_token_read(runner: Measurable) -> float:
    """Time the read of K and V of one token in one layer, as a share of a read of the pool."""
    num_tokens = runner.num_blocks * runner.config.block_size
    return _time(1, jax.jit(jnp.max), runner.cache.pool) / (num_tokens * runner.model_config.num_layers)


def _time(num_calls: int, program: Callable[..., Any], *args: Any) -> float:
    """Seconds of one call, of several that are enqueued at once."""
    result = jax.block_until_ready(program(*args))
    started = time.perf_counter()
    for _ in range(num_calls):
        result = program(*args)  # the one before is dropped: together they may not fit beside the pool
    jax.block_until_ready(result)
    return (time.perf_counter() - started) / num_calls
