"""One tiny model, and runners and engines over it: a program of theirs compiles in about a second."""

import dataclasses
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jpaged import LLM
from jpaged.config import EngineConfig
from jpaged.device.runner import ModelRunner
from jpaged.engine.loop import Engine
from jpaged.models import LlamaConfig, ModelConfig, Rope, random_model
from jpaged.sharding import make_mesh


def tiny_config(**changes: Any) -> LlamaConfig:
    """The tiny model's configuration with some fields changed; the rotary embedding follows ``head_dim``."""
    fields: dict[str, Any] = {
        "architecture": "LlamaForCausalLM",
        "vocab_size": 23,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
    } | changes
    rope = Rope(fields["head_dim"], 10000.0, fields["max_position_embeddings"])
    return LlamaConfig(**{"rope": rope} | fields)


TINY = tiny_config()


@cache
def tiny_model(config: ModelConfig = TINY, dtype: Any = jnp.float32, tensor_parallel_size: int = 1) -> nnx.Module:
    """Random weights, made once a process: callers that change the model take a clone."""
    return random_model(config, dtype, make_mesh(tensor_parallel_size), 0)


def make_runner(
    dtype: Any = jnp.float32,
    *,
    model_config: ModelConfig = TINY,
    tensor_parallel_size: int = 1,
    warm_up: bool = False,
    has_own_programs: bool = False,
    **settings: Any,
) -> ModelRunner:
    """A runner over the tiny model; ``settings`` are those of ``EngineConfig``.

    Equal runners share their programs, as far as no test counts what is compiled: ``has_own_programs`` or ``warm_up``.
    """
    sizes = {"block_size": 8, "num_blocks": 64, "max_num_seqs": 4, "max_num_batched_tokens": 16}
    config = EngineConfig(**sizes | settings)
    model = nnx.clone(tiny_model(model_config, dtype, tensor_parallel_size))
    mesh = make_mesh(tensor_parallel_size)
    runner = ModelRunner(model, model_config, config, mesh, warm_up=warm_up, use_tqdm=False)
    if not (warm_up or has_own_programs):
        own = runner.programs
        sizes = own.num_blocks, own.max_model_len
        shared = _programs(model_config, dtype, mesh, config, own.target, sizes)
        shared |= own.store.programs
        own.store.programs = shared
    return runner


@cache
def _programs(*made_of: Any) -> dict:
    """The programs of all runners that are made of the same, filled by whichever runs first."""
    return {}


def with_few_sizes(llm: LLM) -> LLM:
    """Leave an LLM the largest step of prompts and that of decodes: a test would mostly compile the others."""
    keep_few_sizes(llm.engine.runner)
    return llm


def keep_few_sizes(runner: ModelRunner) -> ModelRunner:
    """Leave a runner the largest step of prompts and that of decodes."""
    buckets = runner.buckets
    buckets[:] = [[bucket for bucket in buckets if bucket.is_decode][-1], buckets[-1]]
    return runner


ENGINE_SIZES = EngineConfig(
    block_size=4, num_blocks=40, max_num_seqs=4, max_num_batched_tokens=16, num_host_blocks=24, max_burst=3
)
"""The sizes of the runner that all tiny engines of a process share."""

ENGINE_MODEL = tiny_config(max_position_embeddings=64, eos_token_ids=(3,))
"""The model of the tiny engines."""


@cache
def engine_model() -> nnx.Module:
    """Weights large enough that logits differ by far more than rounding."""
    return enlarged(tiny_model(ENGINE_MODEL))


def enlarged(model: nnx.Module) -> nnx.Module:
    """A model with large weights, so that no rounding changes a greedy token."""
    graphdef, state = nnx.split(model)
    return nnx.merge(graphdef, jax.tree.map(lambda x: x * 12 if x.ndim > 1 else x, state))


@cache
def engine_runner() -> ModelRunner:
    """The one runner of all tiny engines: its programs are compiled once a process."""
    model = nnx.clone(engine_model())
    return ModelRunner(model, ENGINE_MODEL, ENGINE_SIZES, make_mesh(1))


def tiny_engine(**settings: Any) -> Engine:
    """An engine over the shared runner; ``settings`` may ask for no more than the runner's blocks, rows and tokens."""
    return Engine(engine_runner(), dataclasses.replace(ENGINE_SIZES, **settings))
