"""Time that the engine takes to start, part by part."""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from bench.serving.stopwatch import Stopwatch, replaced
from jpaged import LLM, EngineConfig
from jpaged.device.runner import ModelRunner
from jpaged.device.target import target_of
from jpaged.engine.loop import Engine
from jpaged.models import ModelConfig, random_model
from jpaged.sharding import make_mesh

CACHE_EVENTS = {"/jax/compilation_cache/cache_hits": "hits", "/jax/compilation_cache/cache_misses": "misses"}


@dataclasses.dataclass(frozen=True, slots=True)
class StartUp:
    """Seconds of the parts of a start, and the source of its programs.

    Args:
        total_s: from nothing on the device to an engine that takes requests.
        weights_s: until all weights are on the device.
        sizing_s: the runner without its programs. These are joining projections, the device pool, and the part of the
            host pool's allocation that outlasts compiling.
        compiling_s: the programs that the engine begins with.
        engine_s: the engine over them, which measures the cost of copies to the host.
        imports_s: before all that and not in ``total_s``: Python's modules, and the first touch of the device.
        num_programs: programs that serve, once all are there.
        num_from_cache: programs that an earlier process compiled.
        num_compiled: others. JAX does not keep a program that compiles in less than 0.1 s.
        all_programs_s: from nothing on the device until the background has compiled the last program.
        busy_cores: cores that this process kept busy in that time.
    """

    total_s: float
    weights_s: float
    sizing_s: float
    compiling_s: float
    engine_s: float
    imports_s: float
    num_programs: int
    num_from_cache: int
    num_compiled: int
    all_programs_s: float
    busy_cores: float

    def __str__(self) -> str:
        return (
            f"start-up {self.total_s:.1f} s: weights {self.weights_s:.1f}, sizing the pool {self.sizing_s:.1f}, "
            f"compiling {self.compiling_s:.1f}, engine {self.engine_s:.1f}; before it, imports {self.imports_s:.1f}; "
            f"all {self.num_programs} programs {self.all_programs_s:.1f}, with {self.busy_cores:.1f} cores busy; "
            f"{self.num_from_cache} programs from the cache, {self.num_compiled} compiled"
        )


def keep_sizes(runner: ModelRunner, batches: Iterable[int]) -> None:
    """Leave a runner the largest step, and the decodes of some batches: all others would only be compiled."""
    decodes = [bucket for bucket in runner.buckets if bucket.is_decode]
    kept = {next((bucket for bucket in decodes if bucket.num_rows >= batch), decodes[-1]) for batch in batches}
    runner.buckets[:] = [*(bucket for bucket in decodes if bucket in kept), runner.buckets[-1]]


@contextmanager
def only_sizes(batches: Sequence[int]) -> Iterator[None]:
    """Let runners that are made in the block warm up the sizes of ``keep_sizes`` alone, all at once."""
    warm_up = ModelRunner.warm_up

    def warm_up_kept(runner: ModelRunner, *, few: bool = False, use_tqdm: bool = True) -> None:
        keep_sizes(runner, batches)
        warm_up(runner, use_tqdm=use_tqdm)

    with replaced(ModelRunner, "warm_up", warm_up_kept):
        yield


def start(
    model_config: ModelConfig,
    config: EngineConfig,
    imports_s: float,
    num_devices: int,
    batches: Sequence[int] | None = None,
) -> tuple[LLM, StartUp]:
    """Make an LLM with random weights over the devices, and wait for its programs.

    Args:
        model_config, config: the model and the engine.
        imports_s: seconds before, for the record.
        num_devices: devices that share the model.
        batches: decodes whose sizes are compiled, with the largest step; None compiles every size.

    Returns:
        The LLM and its times.
    """
    watch, mesh = Stopwatch(), make_mesh(num_devices)
    # As an LLM by default, except that no step compiles anything.
    warm_up = None if batches is None and target_of(mesh).warms_up else True
    began, cpu_before = time.perf_counter(), _cpu_s()
    with (
        _cache_events() as programs,
        nullcontext() if batches is None else only_sizes(batches),
        watch.watch(ModelRunner, "__init__", "sizing"),
        watch.watch(ModelRunner, "warm_up", "compiling"),
        watch.watch(Engine, "__init__", "engine"),
    ):
        # No name holds the model: the runner joins its projections, and the single ones would take the pool's place.
        llm = LLM.from_model(_weights(model_config, mesh, watch), model_config, config, mesh=mesh, warm_up=warm_up)
        total_s = time.perf_counter() - began
        background = llm.engine.runner.programs.background
        if (progress := background.progress) is not None:
            print(
                f"started in {total_s:.1f} s; waits for {progress.of - progress.done} programs of further sizes "
                "(--few-sizes makes only those of decode and prefill32)",
                flush=True,
            )
        background.wait()
        all_programs_s = time.perf_counter() - began
    return llm, StartUp(
        total_s=total_s,
        weights_s=watch.seconds["weights"],
        sizing_s=watch.seconds["sizing"] - watch.seconds["compiling"],
        compiling_s=watch.seconds["compiling"],
        engine_s=watch.seconds["engine"],
        imports_s=imports_s,
        num_programs=len(llm.engine.runner.programs),
        num_from_cache=llm.engine.runner.programs.num_loaded + programs["hits"],
        num_compiled=programs["misses"],
        all_programs_s=all_programs_s,
        busy_cores=(_cpu_s() - cpu_before) / all_programs_s,
    )


def _cpu_s() -> float:
    """Processor time of this process, and of its children that have ended, such as assemblers of GPU code."""
    return sum(os.times()[:4])


def start_cold(args: argparse.Namespace, directory: Path) -> StartUp:
    """Start in another process with an empty compile cache, before this one takes the device's memory.

    This process then starts warm, from the cache that the other one left.

    Args:
        args: options of this run; the command is repeated for its start alone.
        directory: empty; it must exist until this process has started.

    Raises:
        subprocess.CalledProcessError: the other process failed.
    """
    os.environ["XDG_CACHE_HOME"] = str(directory / "cache")
    os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)
    command = [sys.executable, "-m", "bench", *(each for each in args.argv if each != "--warm-start")]
    command += ["--startup-only", "--out", str(directory), "--name", "cold"]
    subprocess.run(command, cwd=Path(__file__).parents[2], check=True)
    return StartUp(**json.loads((directory / "cold.json").read_text())["startup"])


def _weights(model_config: ModelConfig, mesh: jax.sharding.Mesh, watch: Stopwatch) -> Any:
    began = time.perf_counter()
    model = random_model(model_config, jnp.dtype(model_config.dtype), mesh, 0)
    jax.block_until_ready(jax.tree.leaves(nnx.state(model)))
    watch.seconds["weights"] = time.perf_counter() - began
    return model


@contextmanager
def _cache_events() -> Iterator[Counter[str]]:
    """Count the hits and misses of the persistent cache."""
    counts: Counter[str] = Counter()

    def count(event: str, **_: Any) -> None:
        if event in CACHE_EVENTS:
            counts[CACHE_EVENTS[event]] += 1

    jax.monitoring.register_event_listener(count)
    try:
        yield counts
    finally:
        jax.monitoring.unregister_event_listener(count)
