"""Weights in host memory: the tokens of weights on the device, one layer computing while the next arrives."""

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from bench.tpu.compiler import mesh_in, why_no_compiler
from jpaged import LLM, EngineConfig, SamplingParams
from jpaged.device import weights
from jpaged.device.step.inputs import Bucket
from jpaged.device.step.programs import Programs
from jpaged.device.target import TARGETS, choose_backend
from jpaged.engine.loop import Engine
from jpaged.models import OPTConfig, load_model, random_model, save_checkpoint
from jpaged.models.checkpoint.registry import abstract_model
from jpaged.models.contract import place
from jpaged.models.layers.common import Branch
from jpaged.models.layers.streamed import StreamedLayer, stream_layers, streamed_params
from jpaged.sharding import HOST_MEMORY, make_mesh
from tests.support.oracles import greedy_without_cache
from tests.support.tiny import enlarged, tiny_config, tiny_model, with_few_sizes

LLAMA = tiny_config(num_layers=3, max_position_embeddings=64)
OPT = OPTConfig(
    architecture="OPTForCausalLM",
    vocab_size=23,
    hidden_size=32,
    intermediate_size=48,
    num_layers=3,
    num_heads=4,
    num_kv_heads=4,
    head_dim=8,
    max_position_embeddings=64,
    word_embed_proj_dim=16,
)
MODELS = {"llama": LLAMA, "opt": OPT}
SETTINGS = EngineConfig(
    block_size=4,
    num_blocks=40,
    max_num_seqs=4,
    max_num_batched_tokens=16,
    num_host_blocks=24,
    weight_placement="host",
)
GREEDY = SamplingParams(temperature=0, max_tokens=7, ignore_eos=True)
PROMPTS = [[1, 2, 3, 4, 5, 6, 7, 8, 9], [1, 2, 3, 4, 5, 6, 7, 8, 11, 12], [20, 21], [4, 4, 4, 4, 4, 4, 19]]


@cache
def large_model(name: str) -> nnx.Module:
    """Weights so large that no rounding changes a token."""
    return enlarged(tiny_model(MODELS[name]))


@cache
def streaming_llm(name: str) -> LLM:
    """One for each model: its programs are compiled once."""
    llm = LLM.from_model(large_model(name), MODELS[name], SETTINGS, warm_up=False, use_tqdm=False)
    if name == "llama":
        return with_few_sizes(llm)
    del llm.engine.runner.buckets[:-1]  # compiling dominates here, and one model with programs for decodes is enough
    return llm


def tokens_of(llm: LLM) -> list[list[int]]:
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], GREEDY, use_tqdm=False)
    return [output.outputs[0].token_ids for output in outputs]


@cache
def expected_tokens(name: str) -> list[list[int]]:
    """Greedy tokens of the same weights on the device, without a KV cache."""
    return [greedy_without_cache(large_model(name), prompt, 7, padded_len=32)[0] for prompt in PROMPTS]


@pytest.mark.parametrize("name", MODELS)
def test_tokens_equal_those_of_weights_on_the_device(name):
    llm = streaming_llm(name)
    assert tokens_of(llm) == expected_tokens(name)
    assert tokens_of(llm) == expected_tokens(name)  # from cached prefixes
    assert llm.stats().prefix_cache_hit_rate > 0


@pytest.mark.usefixtures("no_growth")
@pytest.mark.parametrize("preemption", ["swap", "recompute"])
def test_tokens_are_the_same_after_preemption(preemption):
    settings = replace(SETTINGS, num_blocks=9, preemption=preemption, enable_prefix_caching=False)
    llm = LLM.from_engine(Engine(streaming_llm("llama").engine.runner, settings))
    assert tokens_of(llm) == expected_tokens("llama")
    assert llm.stats().num_preemptions > 0


def memory_of(model: nnx.Module) -> dict[str, tuple[str, int]]:
    """The memory and the number of axes of each parameter, by its path."""
    return {
        ".".join(map(str, path)): (variable.get_value().sharding.memory_kind, variable.ndim)
        for path, variable in nnx.to_flat_state(nnx.state(model))
    }


@pytest.mark.parametrize("name", MODELS)
def test_matrices_of_layers_are_in_host_memory_and_nothing_else(name):
    runner = streaming_llm(name).engine.runner
    expected = sum(x.nbytes for x in streamed_params(large_model(name), 3))
    assert sum(x.nbytes for x in runner._weights if x.sharding.memory_kind == HOST_MEMORY) == expected
    assert weights.device_bytes(runner._weights) == runner.weight_bytes - expected
    drawn = memory_of(random_model(MODELS[name], "float32", make_mesh(), 0, weight_placement="host"))
    assert {path for path, (kind, _) in drawn.items() if kind == HOST_MEMORY} == {
        path for path, (_, ndim) in drawn.items() if ".layers." in path and ndim > 1
    }
    assert all(x.sharding.memory_kind != HOST_MEMORY for x in jax.tree.leaves(nnx.state(large_model(name))))


@pytest.mark.parametrize("name", MODELS)
def test_a_checkpoint_is_read_into_host_memory(name, tmp_path):
    config, mesh = MODELS[name], make_mesh()
    model = random_model(config, "float32", mesh, 3)
    save_checkpoint(model, config, tmp_path)
    loaded = load_model(tmp_path, config, "float32", mesh, weight_placement="host", use_tqdm=False)
    assert {kind for kind, ndim in memory_of(loaded).values()} == {
        HOST_MEMORY,
        mesh.devices.flat[0].default_memory().kind,
    }
    drawn = random_model(config, "float32", mesh, 3, weight_placement="host")
    for got in (loaded, drawn):
        for array, expected in zip(*(jax.tree.leaves(nnx.state(each)) for each in (got, model)), strict=True):
            np.testing.assert_array_equal(array, expected)


def test_an_llm_of_a_checkpoint_streams_its_weights(tmp_path, caplog):
    save_checkpoint(large_model("llama"), LLAMA, tmp_path)
    with caplog.at_level(logging.WARNING):
        llm = LLM(tmp_path, weight_placement="host", num_blocks=40, use_tqdm=False)
    assert [record.message for record in caplog.records] == [
        "weight_placement='host' gains nothing here: the device computes in host memory"
    ]
    found, expected = llm.engine.runner, streaming_llm("llama").engine.runner
    for array, own in zip(found._weights, expected._weights, strict=True):
        assert array.sharding.memory_kind == own.sharding.memory_kind
        np.testing.assert_array_equal(array, own)


class Layer(nnx.Module):
    def __init__(self, size: int = 8) -> None:
        self.out = nnx.Param(jnp.eye(size))
        self.qkv_proj = nnx.Param(2 * jnp.eye(size))

    def __call__(self, x: jax.Array, *, scale: float) -> jax.Array:
        return jnp.tanh(x @ self.qkv_proj[...]) @ self.out[...] * scale


class Model(nnx.Module):
    def __init__(self, layers: Callable[[], Any] = Layer, num_layers: int = 4) -> None:
        self.inner = nnx.Dict(blocks=nnx.List([layers() for _ in range(num_layers)]))

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.inner["blocks"]:
            x = layer(x, scale=0.5)
        return x


def test_copies_of_a_layer_wait_for_the_inputs_of_the_layer_before():
    model = place(Model(), make_mesh())
    stream_layers(model, 4)
    graphdef, state = nnx.split(model)
    jaxpr = jax.make_jaxpr(lambda state, x: nnx.merge(graphdef, state)(x))(state, jnp.ones((2, 8))).jaxpr
    products = [eqn.outvars[0] for eqn in jaxpr.eqns if eqn.primitive.name == "mul"]
    inputs = [jaxpr.invars[-1], *products]
    barriers = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "optimization_barrier"]
    assert [eqn.invars[2:] for eqn in barriers] == [[], *([x] for x in inputs[:3])]
    by_layer = [jaxpr.invars[2 * layer : 2 * layer + 2] for layer in range(4)]
    assert [eqn.invars[:2] for eqn in barriers] == [[qkv, out] for out, qkv in by_layer]  # Q, K and V come first


def test_copies_of_a_layer_wait_for_inputs_in_tuples_too():
    class Pairs(Layer):
        def __call__(self, pair: tuple[jax.Array, Branch]) -> tuple[jax.Array, Branch]:
            x, branch = pair
            return x + branch.out, Branch(super().__call__(x, scale=0.5))

    layers = [Pairs() for _ in range(3)]
    model = place(nnx.Dict(blocks=nnx.List(layers)), make_mesh())
    stream_layers(model, 3)
    graphdef, state = nnx.split(model)

    def run(state: Any, x: jax.Array) -> Any:
        pair = x, Branch(x)
        for layer in nnx.merge(graphdef, state)["blocks"]:
            pair = layer(pair)
        return pair[0]

    jaxpr = jax.make_jaxpr(run)(state, jnp.ones((2, 8))).jaxpr
    barriers = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "optimization_barrier"]
    assert [len(eqn.invars[2:]) for eqn in barriers] == [0, 2, 2]


def test_each_matrix_is_placed_on_the_device_by_the_program_that_reads_it():
    """As lowered for a GPU: on a CPU, host memory is the device's own."""
    model = place(Model(), make_mesh())
    stream_layers(model, 4)
    graphdef, state = nnx.split(model)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    traced = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x)).trace(shapes, jnp.ones((2, 8)))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@annotate_device_placement") == 8
    assert text.count('mhlo.memory_kind = "pinned_host"') == 8


def test_a_tpu_takes_the_weights_of_a_step_from_host_memory():
    if (reason := why_no_compiler()) is not None:
        pytest.skip(reason)
    mesh = mesh_in("v5e:2x2", 1, "tensor")
    config = tiny_config(
        num_layers=3, hidden_size=256, intermediate_size=512, num_heads=4, head_dim=128, vocab_size=256
    )
    settings = EngineConfig(
        max_num_seqs=16, max_num_batched_tokens=64, attention_implementation="pallas_tpu", weight_placement="host"
    )
    model = nnx.merge(*abstract_model(config, "bfloat16", mesh, weight_placement="host"))
    backend = choose_backend(config, settings, "bfloat16", mesh)
    weights.fuse_projections(model)
    stream_layers(model, config.num_layers)
    programs = Programs(model, config, settings, mesh, backend, max_model_len=128, num_blocks=200)
    assert programs.max_burst == 1
    memory = programs.lower(("forward", Bucket(16, 16))).compile().memory_analysis()
    assert memory is not None
    on_host = sum(x.size * x.dtype.itemsize for x in programs.weights if x.sharding.memory_kind == HOST_MEMORY)
    assert memory.host_argument_size_in_bytes == on_host
    assert memory.host_temp_size_in_bytes == 0


def test_a_model_without_a_list_of_layers_is_refused():
    class Flat(nnx.Module):
        def __init__(self) -> None:
            self.wide = nnx.List([nnx.Linear(8, 8, rngs=nnx.Rngs(0)) for _ in range(4)])
            self.narrow = nnx.List([nnx.Linear(8, 8, rngs=nnx.Rngs(0)) for _ in range(4)])

    with pytest.raises(ValueError, match=r"expected exactly one nnx.List of 4 modules.* are: narrow, wide"):
        stream_layers(Flat(), 4)
    with pytest.raises(ValueError, match=r"lists of 5 are: none; keep each layer in a module of its own"):
        stream_layers(Model(), 5)
    nested = Model(lambda: nnx.List([Layer() for _ in range(4)]))
    with pytest.raises(ValueError, match=r"lists of 4 are: inner.blocks"):
        stream_layers(nested, 4)
    assert not any(isinstance(module, StreamedLayer) for _, module in nnx.iter_modules(nested))


def test_a_model_that_reads_parts_of_its_layers_is_told_so():
    model = place(Model(), make_mesh())
    stream_layers(model, 4)
    with pytest.raises(AttributeError, match=r"reads 'qkv_proj' of a layer.* expects a model that only calls"):
        _ = model.inner["blocks"][0].qkv_proj


def test_lists_within_layers_are_no_layers():
    class Mixture(Layer):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nnx.List([nnx.Linear(8, 8, rngs=nnx.Rngs(0)) for _ in range(4)])

    model = Model(Mixture)
    stream_layers(place(model, make_mesh()), 4)


@pytest.mark.parametrize(
    ("free", "limit_gb", "match"),
    [
        (1000, "64", r"layers take 46,080 bytes, 46,080 of them .* and 1,000 bytes of it are free"),
        (1 << 30, "0", r"XLA pins 0 for arrays at most; set XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB=2 before Python"),
    ],
)
def test_host_memory_that_is_not_there_is_refused_before_loading(free, limit_gb, match, monkeypatch, tmp_path):
    monkeypatch.setattr(weights, "free_machine_bytes", lambda: free)
    monkeypatch.setattr(weights, "target_of", lambda mesh: TARGETS["gpu"])
    monkeypatch.setenv(weights.LIMIT_VARIABLE, limit_gb)
    with pytest.raises(ValueError, match=match):
        LLM.from_model(tiny_model(LLAMA), LLAMA, SETTINGS, use_tqdm=False)
    save_checkpoint(tiny_model(LLAMA), LLAMA, tmp_path)
    (tmp_path / "model.safetensors").unlink()  # or this would be the error
    with pytest.raises(ValueError, match=match):
        LLM(tmp_path, weight_placement="host", num_blocks=40, use_tqdm=False)


def test_weights_in_host_memory_already_need_no_more_of_it(monkeypatch):
    model = random_model(LLAMA, "float32", make_mesh(), 0, weight_placement="host")
    monkeypatch.setattr(weights, "free_machine_bytes", lambda: 0)
    weights.check_host_weights(model, LLAMA.num_layers, make_mesh())


def test_several_devices_are_refused(tmp_path):
    save_checkpoint(tiny_model(LLAMA), LLAMA, tmp_path)
    with pytest.raises(ValueError, match="weight_placement='host' with 2 devices"):
        LLM(tmp_path, weight_placement="host", tensor_parallel_size=2, num_blocks=40, use_tqdm=False)
    with pytest.raises(ValueError, match="weight_placement='host' with 2 devices"):
        LLM.from_model(tiny_model(LLAMA), LLAMA, SETTINGS, mesh=make_mesh(2), use_tqdm=False)
