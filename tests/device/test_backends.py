"""Backends: every feature of a layer reaches the kernels, and several devices give the tokens of one."""

import re
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.sharding import AxisType

from jpaged.config import EngineConfig
from jpaged.device.backends import Rows
from jpaged.device.kv.attend import PagedAttend
from jpaged.device.kv.layout import heads_of_pool
from jpaged.device.kv.pool import KVCache
from jpaged.device.runner import ModelRunner
from jpaged.device.target import BACKENDS, TARGETS, target_of
from jpaged.engine.loop import Engine
from jpaged.models import LlamaConfig, LlamaForCausalLM, Rope, random_model
from jpaged.models.spec import LayerSpec, check_head_arrays
from jpaged.request import SamplingParams
from jpaged.sharding import make_mesh, pool_sharding, replicated
from pallas_kernels.chips import here
from tests.support import two_gpus
from tests.support.oracles import greedy_without_cache, teacher_forced_logits

TINY = LlamaConfig(
    architecture="LlamaForCausalLM",
    vocab_size=31,
    hidden_size=32,
    intermediate_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
    rope=Rope(32, 10000.0, 64),
)


@dataclass(frozen=True, kw_only=True)
class SpecialConfig(LlamaConfig):
    """A model whose layers attend as they are told."""

    specs: tuple[LayerSpec, ...]

    @property
    def layer_specs(self) -> tuple[LayerSpec, ...]:
        return self.specs


class SpecialModel(LlamaForCausalLM):
    """Hands sinks and slopes to the layers that have them."""

    def __init__(self, config: SpecialConfig, *, rngs: nnx.Rngs) -> None:
        super().__init__(config, dtype=jnp.float32, rngs=rngs)
        self.sinks = nnx.Param(jax.random.normal(rngs.params(), (config.num_layers, config.num_heads)))
        self.slopes = nnx.Param(jax.random.uniform(rngs.params(), (config.num_layers, config.num_heads)))

    def __call__(self, token_ids, positions, prompt_lens, attend):
        def with_arrays(spec, q, k, v, sinks=None):
            del sinks  # the layer's own
            sinks = self.sinks[spec.layer] if spec.sinks else None
            return attend(spec, q, k, v, sinks=sinks, alibi_slopes=self.slopes[spec.layer] if spec.alibi else None)

        return super().__call__(token_ids, positions, prompt_lens, with_arrays)


def special_model(**features) -> SpecialModel:
    """A model whose second layer has some features, and weights large enough that they matter."""
    plain = TINY.layer_specs
    config = SpecialConfig(**vars(TINY), specs=(plain[0], replace(plain[1], **features)))
    model = SpecialModel(config, rngs=nnx.Rngs(1))
    graphdef, state = nnx.split(model)
    large = jax.tree.map(lambda x: jax.device_put(5 * x, replicated(make_mesh())), state)
    return nnx.merge(graphdef, large)


def make_runner(model, model_config, *, tensor_parallel_size=1, **settings) -> ModelRunner:
    config = EngineConfig(
        **{
            "block_size": 8,
            "num_blocks": 32,
            "max_num_seqs": 2,
            "max_num_batched_tokens": 16,
            "tensor_parallel_size": tensor_parallel_size,
        }
        | settings
    )
    return ModelRunner(model, model_config, config, make_mesh(tensor_parallel_size), use_tqdm=False)


def greedy(runner: ModelRunner, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
    engine = Engine(runner, runner.config)
    for index, prompt in enumerate(prompts):
        params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
        engine.add(engine.make_request(str(index), {"prompt_token_ids": prompt}, params))
    finished = []
    while engine.has_unfinished:
        finished += engine.step().finished
    return [output.outputs[0].token_ids for output in sorted(finished, key=lambda output: output.request_id)]


PROMPTS = [[1 + (7 * i) % 30 for i in range(11)], [1 + (5 * i) % 30 for i in range(3)]]

FEATURES = {
    "window": {"sliding_window": 5},
    "scale": {"sm_scale": 0.5},
    "cap": {"soft_cap": 2.0},
    "sinks": {"sinks": True},
    "alibi": {"alibi": True},
    "all": {"sliding_window": 6, "sm_scale": 0.4, "soft_cap": 3.0, "sinks": True, "alibi": True},
}
TPU = {"attention_implementation": "pallas_tpu", "interpret": True}


@pytest.mark.parametrize(("features", "name"), [*((name, "xla") for name in FEATURES), ("all", "pallas_tpu")])
def test_every_feature_of_a_layer_reaches_the_kernels(features, name):
    """Logits through the engine's attend are those of dense attention."""
    model = special_model(**FEATURES[features])
    [spec, *_], num_tokens = model.config.layer_specs, len(PROMPTS[0])
    backend = BACKENDS[name]("", interpret=name != "xla")
    num_kv_heads, head_dim = backend.pool_heads(spec.num_kv_heads, spec.head_dim)
    cache = KVCache.allocate(num_blocks=4, num_layers=2, num_kv_heads=num_kv_heads, head_dim=head_dim, block_size=8)
    positions = jnp.arange(num_tokens, dtype=jnp.int32)
    rows = Rows(16 + positions, jnp.array([[2, 3]], jnp.int32), jnp.array([num_tokens]), jnp.array([0, num_tokens]))

    @nnx.jit
    def logits_of(model, cache, token_ids):
        attend = PagedAttend(cache, rows, backend)
        return model.logits(model(token_ids, positions, jnp.full_like(positions, num_tokens), attend))

    def dense(model):
        return teacher_forced_logits(model, [np.array(PROMPTS[0])], [num_tokens], num_tokens)[0]

    logits, expected = logits_of(model, cache, jnp.array(PROMPTS[0])), dense(model)
    assert np.abs(expected - dense(special_model())).max() > 1e-2, "the feature matters"
    np.testing.assert_allclose(np.asarray(logits), expected, rtol=1e-4, atol=1e-4)


def test_a_model_with_features_in_the_engine_draws_the_tokens_of_dense_attention():
    model = special_model(**FEATURES["all"])
    expected = [greedy_without_cache(model, prompt, 8, padded_len=32)[0] for prompt in PROMPTS]
    assert greedy(make_runner(model, model.config), PROMPTS, 8) == expected


@pytest.mark.parametrize("given", [{"sinks": jnp.zeros(4)}, {"alibi_slopes": jnp.zeros(4)}], ids=str)
def test_arrays_that_the_spec_does_not_announce_are_refused(given):
    arrays = {"sinks": None, "alibi_slopes": None} | given
    with pytest.raises(ValueError, match="layer 0 attends with an array"):
        check_head_arrays(TINY.layer_specs[0], **arrays)
    announced = replace(TINY.layer_specs[0], sinks=True, alibi=True)
    with pytest.raises(ValueError, match="layer 0 attends without an array"):
        check_head_arrays(announced, **arrays)


def test_layers_that_one_pool_cannot_hold_are_refused():
    first, second = TINY.layer_specs
    with pytest.raises(ValueError, match="expected one for all layers"):
        heads_of_pool((first, replace(second, num_kv_heads=4)), 1)
    with pytest.raises(ValueError, match="numbered"):
        heads_of_pool((second, first), 1)
    assert heads_of_pool((first, second), 4) == (4, 32), "a head for each device"


@pytest.mark.parametrize(
    "wrong", [{"layer": -1}, {"num_kv_heads": 0}, {"sm_scale": 0.0}, {"sliding_window": 0}, {"soft_cap": 0.0}], ids=str
)
def test_a_layer_that_cannot_be_is_refused(wrong):
    [name] = wrong
    with pytest.raises(ValueError, match=f"{name}=.*expected"):
        replace(TINY.layer_specs[0], **wrong)


@pytest.mark.parametrize("layer", [-1, 2, 7])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.int8])
def test_writing_a_layer_that_the_pool_has_not_is_refused(layer, dtype):
    cache = KVCache.allocate(num_blocks=2, num_layers=2, num_kv_heads=1, head_dim=8, block_size=8, dtype=dtype)
    kv = jnp.zeros((1, 1, 8))
    with pytest.raises(ValueError, match=f"layer={layer}: expected 0 to 1"):
        cache.write(layer, kv, kv, jnp.array([8]))


def test_a_mesh_of_explicit_axes_is_refused():
    mesh = jax.make_mesh((2,), ("tensor",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:2])
    match = "axes of types tensor=Explicit: expected Auto"
    with pytest.raises(ValueError, match=match):
        KVCache.allocate(num_blocks=2, num_layers=1, num_kv_heads=2, head_dim=8, sharding=pool_sharding(mesh))
    with pytest.raises(ValueError, match=match):
        ModelRunner(special_model(), TINY, EngineConfig(tensor_parallel_size=2), mesh)


def test_whole_mesh_is_one_target():
    assert target_of(make_mesh(2)) is TARGETS["cpu"]
    assert TARGETS["cpu"].resolve_dtype("auto", "bfloat16") == jnp.float32
    assert TARGETS["gpu"].resolve_dtype("auto", "bfloat16") == jnp.bfloat16
    assert TARGETS["cpu"].resolve_dtype("float16", "bfloat16") == jnp.float16


@pytest.mark.parametrize(
    ("platform", "wanted", "stored", "dtype", "is_noted"),
    [
        ("cpu", "auto", "float32", "float32", False),
        ("cpu", "auto", "bfloat16", "float32", False),
        ("cpu", "bfloat16", "float32", "bfloat16", False),
        *((platform, *case) for platform in ("gpu", "tpu") for case in [
            ("auto", "float32", "bfloat16", True),
            ("auto", "bfloat16", "bfloat16", False),
            ("auto", "float16", "float16", False),
            ("float32", "float32", "float32", False),
            ("float16", "float32", "float16", False),
        ]),
    ],
)  # fmt: skip
def test_a_float32_checkpoint_runs_in_bfloat16_on_an_accelerator(platform, wanted, stored, dtype, is_noted):
    assert TARGETS[platform].resolve_dtype(wanted, stored) == jnp.dtype(dtype)
    note = TARGETS[platform].dtype_note(wanted, stored)
    assert (note is not None and f"runs in {dtype}: dtype='float32'" in note) == is_noted


HOPPER = {"attention_implementation": "hopper", "interpret": True}


@pytest.fixture
def hopper_interpreted(monkeypatch):
    """Pallas's interpreter with one multiprocessor a device, on several devices.

    A device that ends first would assert that no other device has barriers left.
    """
    monkeypatch.setattr(here, "num_sms", lambda: 1)
    monkeypatch.setattr(gpu_callbacks, "call_assert_no_barriers_allocated", lambda token: token)
    yield
    gpu_callbacks.reset_gpu_interpret_mode_state()


@pytest.mark.starts_first
@pytest.mark.usefixtures("hopper_interpreted")
def test_two_devices_with_interpreted_hopper_kernels_give_the_tokens_of_one():
    config, tokens = replace(TINY, num_layers=1), []
    for size in (1, 2):
        model = random_model(config, jnp.bfloat16, make_mesh(size), seed=3)
        runner = make_runner(model, config, tensor_parallel_size=size, **HOPPER)
        assert {shard.data.shape[3] for shard in runner.cache.pool.addressable_shards} == {2 // size}
        tokens.append(greedy(runner, PROMPTS[1:], 2))
    assert tokens[0] == tokens[1]


def partitioned(directory: Path, num_tokens: int, kv_cache_dtype: str) -> str:
    """A step for two Hopper GPUs, as XLA partitions and optimises it."""
    command = [sys.executable, "-m", "tests.support.two_gpus", str(directory), str(num_tokens), kv_cache_dtype]
    subprocess.run(command, capture_output=True, check=False, cwd=Path(__file__).parents[2])
    [dump] = directory.glob("*.cpu_after_optimizations.txt")
    return dump.read_text()


@pytest.mark.parametrize(("num_tokens", "setting"), [(16, "auto"), (512, "auto"), (16, "int8")])
def test_a_step_for_two_hopper_gpus_has_two_all_reduces_a_layer_and_no_copy_of_the_pool(tmp_path, num_tokens, setting):
    hlo, num_layers = partitioned(tmp_path, num_tokens, setting), two_gpus.MODEL.num_layers
    collectives = Counter(re.findall(r" (all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)\(", hlo))
    assert collectives == {"all-reduce": 2 * num_layers + 1}, "one for the embedding, whose rows are split"
    # Both read the cache in two kernels. An unquantised decode also writes, a prefill attends to prompts and norms.
    num_kernels = {(16, "auto"): 3, (512, "auto"): 5, (16, "int8"): 2}[num_tokens, setting]
    assert hlo.count('custom_call_target="mosaic_gpu_v2"') >= num_kernels * num_layers
    # Each device has its own heads. The blocks begin the shape of the pool and of its scales, here and nowhere else.
    pool = rf"\w+\[{two_gpus.NUM_BLOCKS},{num_layers},2,{two_gpus.MODEL.num_kv_heads // 2}\b"
    assert re.search(pool, hlo)
    # No layer copies it. The compiler of CPUs moves it out of a writing kernel once a program, whatever the devices.
    assert len(re.findall(rf"= {pool}\S* copy\(", hlo)) <= (0 if setting == "int8" else 1)
