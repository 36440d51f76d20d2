"""How long the engine takes to start, part by part."""

import dataclasses
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from bench.serving.stopwatch import Stopwatch
from jpaged import LLM, EngineConfig
from jpaged.device.runner import ModelRunner
from jpaged.engine.loop import Engine
from jpaged.models import ModelConfig, random_model
from jpaged.sharding import make_mesh

CACHE_EVENTS = {"/jax/compilation_cache/cache_hits": "hits", "/jax/compilation_cache/cache_misses": "misses"}


@dataclasses.dataclass(frozen=True, slots=True)
class StartUp:
    """Seconds of the parts of a start, and where its programs came from.

    Args:
        total_s: from nothing on the device to an engine that takes requests.
        weights_s: until all weights are on the device.
        sizing_s: the runner but for its programs: joining projections, the device pool, what is left of the host pool's
            allocation once they are compiled.
        compiling_s: all programs.
        engine_s: the engine over them, which measures what copies to the host cost.
        imports_s: before all that and not in ``total_s``: Python's modules, and the first touch of the device.
        num_programs: that serve.
        num_from_cache, num_compiled: programs that an earlier process compiled, and others: what JAX compiles in less
            than 0.1 s, it does not keep.
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

    def __str__(self) -> str:
        return (
            f"start-up {self.total_s:.1f} s: weights {self.weights_s:.1f}, sizing the pool {self.sizing_s:.1f}, "
            f"compiling {self.num_programs} programs {self.compiling_s:.1f}, engine {self.engine_s:.1f}; before it, "
            f"imports {self.imports_s:.1f}; {self.num_from_cache} programs from the cache, {self.num_compiled} compiled"
        )


def start(model_config: ModelConfig, config: EngineConfig, imports_s: float) -> tuple[LLM, StartUp]:
    """An LLM with random weights, every program compiled, and what that took."""
    watch, mesh = Stopwatch(), make_mesh(1)
    began = time.perf_counter()
    with (
        _cache_events() as programs,
        watch.watch(ModelRunner, "__init__", "sizing"),
        watch.watch(ModelRunner, "warm_up", "compiling"),
        watch.watch(Engine, "__init__", "engine"),
    ):
        # Nobody keeps the model: the runner joins its projections, and the single ones would take the pool's place.
        llm = LLM.from_model(_weights(model_config, mesh, watch), model_config, config, mesh=mesh, warm_up=True)
    return llm, StartUp(
        total_s=time.perf_counter() - began,
        weights_s=watch.seconds["weights"],
        sizing_s=watch.seconds["sizing"] - watch.seconds["compiling"],
        compiling_s=watch.seconds["compiling"],
        engine_s=watch.seconds["engine"],
        imports_s=imports_s,
        num_programs=len(llm.engine.runner.programs),
        num_from_cache=llm.engine.runner.programs.num_loaded + programs["hits"],
        num_compiled=programs["misses"],
    )


def _weights(model_config: ModelConfig, mesh: jax.sharding.Mesh, watch: Stopwatch) -> Any:
    began = time.perf_counter()
    model = random_model(model_config, jnp.dtype(model_config.dtype), mesh, 0)
    jax.block_until_ready(jax.tree.leaves(nnx.state(model)))
    watch.seconds["weights"] = time.perf_counter() - began
    return model


@contextmanager
def _cache_events() -> Iterator[Counter[str]]:
    """Counts what the persistent cache has and has not."""
    counts: Counter[str] = Counter()

    def count(event: str, **_: Any) -> None:
        if event in CACHE_EVENTS:
            counts[CACHE_EVENTS[event]] += 1

    jax.monitoring.register_event_listener(count)
    try:
        yield counts
    finally:
        jax.monitoring.unregister_event_listener(count)
