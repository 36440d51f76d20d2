"""A user's own module in the whole engine: its contract, and what breaks it."""

import gc
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import pytest
from flax import linen, nnx

from jpaged import LLM, EngineConfig, SamplingParams
from jpaged.device.kv.sizing import PoolSizer
from jpaged.models import LayerSpec, ModelConfig, random_model
from jpaged.sharding import make_mesh
from tests.support.oracles import greedy_without_cache
from tests.support.tiny import TINY, with_few_sizes


@dataclass(frozen=True, kw_only=True)
class OwnConfig(ModelConfig):
    """The second layer attends to the last few tokens, through a soft cap."""

    @property
    def layer_specs(self) -> tuple[LayerSpec, ...]:
        first, second = super().layer_specs
        return first, replace(second, sliding_window=5, soft_cap=4.0)


SHAPE = {
    "vocab_size": 29, "hidden_size": 16, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8,
    "max_position_embeddings": 64,
}  # fmt: skip
CONFIG = OwnConfig(**SHAPE)
SETTINGS = EngineConfig(num_blocks=24, block_size=4, max_num_seqs=3, max_num_batched_tokens=8)


class Own(nnx.Module):
    """A decoder as a user would write it: nothing of it is from jpaged."""

    def __init__(self, config: ModelConfig = CONFIG, dtype=jnp.float32):
        size, rngs = config.hidden_size, nnx.Rngs(0)
        more = {"use_bias": False, "dtype": dtype, "param_dtype": dtype, "rngs": rngs}
        self.config = config
        self.tokens = nnx.Embed(config.vocab_size, size, dtype=dtype, param_dtype=dtype, rngs=rngs)
        self.places = nnx.Embed(config.max_position_embeddings, size, dtype=dtype, param_dtype=dtype, rngs=rngs)
        widths = config.num_heads, config.num_kv_heads, config.num_kv_heads
        self.qkv = nnx.List(
            [nnx.List([nnx.Linear(size, n * config.head_dim, **more) for n in widths]) for _ in config.layer_specs]
        )
        self.out = nnx.List([nnx.Linear(config.num_heads * config.head_dim, size, **more) for _ in config.layer_specs])

    def __call__(self, token_ids, positions, prompt_lens, attend):
        x = 3 * self.tokens(token_ids) + self.places(positions)
        for spec, qkv, out in zip(self.config.layer_specs, self.qkv, self.out, strict=True):
            q, k, v = (layer(x).reshape(x.shape[0], -1, spec.head_dim) for layer in qkv)
            x = x + out(attend(spec, q, k, v).reshape(x.shape[0], -1))
        return x

    def logits(self, hidden):
        return (hidden @ self.tokens.embedding[...].T).astype(jnp.float32)


def llm_of(model, config=CONFIG, settings=SETTINGS, **options) -> LLM:
    return with_few_sizes(LLM.from_model(model, config, settings, use_tqdm=False, **options))


PROMPTS = [[1, 2, 3], [7] * 11, [5, 6, 7, 8, 9, 10, 11, 12, 13]]


@pytest.mark.parametrize("num_devices", [1, 2])
def test_its_tokens_are_those_of_a_loop_without_cache(num_devices):
    """On two devices as on one, although its weights were made on one."""
    model = Own()
    expected = [greedy_without_cache(model, prompt, 12, padded_len=32)[0] for prompt in PROMPTS]
    llm = llm_of(model, settings=replace(SETTINGS, tensor_parallel_size=num_devices))
    params = SamplingParams(temperature=0, max_tokens=12)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], params, use_tqdm=False)
    assert [output.outputs[0].token_ids for output in outputs] == expected
    assert model.tokens.embedding[...].devices() == {jax.devices()[0]}, "the module itself is not changed"


def test_it_may_be_written_for_another_dtype():
    model = Own(dtype=jnp.bfloat16)
    llm = llm_of(model)
    assert llm.engine.runner.dtype == jnp.bfloat16
    [output] = llm.generate({"prompt_token_ids": [1, 2]}, SamplingParams(max_tokens=3, seed=0), use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 3


class Wrong(Own):
    """A model with one mistake."""

    def __init__(self, mistake: str):
        super().__init__()
        self.mistake = mistake

    def __call__(self, token_ids, positions, prompt_lens, attend):
        hidden = super().__call__(token_ids, positions, prompt_lens, self.attend_as(attend))
        return hidden[:, :-1] if self.mistake == "hidden" else hidden

    def attend_as(self, attend):
        def wrong(spec, q, k, v):
            match self.mistake:
                case "heads":
                    return attend(spec, q, k[:, :1], v)
                case "dtype":
                    return attend(spec, q, k.astype(jnp.bfloat16), v)
                case "one layer":
                    return attend(CONFIG.layer_specs[0], q, k, v)
                case "own spec":
                    return attend(replace(spec, sm_scale=1.0), q, k, v)
                case "sinks":
                    return attend(spec, q, k, v, sinks=jnp.zeros(4))
            return attend(spec, q, k, v)

        return wrong

    def logits(self, hidden):
        logits = super().logits(hidden)
        match self.mistake:
            case "vocabulary":
                return logits[:, :-1]
            case "half":
                return logits.astype(jnp.bfloat16)
        return logits


@pytest.mark.parametrize(
    ("mistake", "match"),
    [
        ("hidden", r"__call__ is of shape \(3, 15\) .* expected \(3, 16\)"),
        ("heads", r"k of layer 0 is of shape \(3, 1, 8\) .* expected \(3, 2, 8\)"),
        ("dtype", "k of layer 0 is .* dtype bfloat16: expected .* float32"),
        ("one layer", r"attends in layers \[0, 0\]: expected each of the 2 layers"),
        ("own spec", "layer_specs once, in order, with its own spec"),
        ("sinks", "layer 0 attends with an array for sinks"),
        ("vocabulary", r"logits is of shape \(3, 28\) .* expected \(3, 29\)"),
        ("half", "logits is .* dtype bfloat16: expected .* float32"),
    ],
)
def test_a_model_that_breaks_the_contract_is_refused_before_anything_is_compiled(mistake, match):
    with pytest.raises(ValueError, match=match):
        llm_of(Wrong(mistake))


class Short(nnx.Module):
    """A model with another signature."""

    def __init__(self):
        self.weight = nnx.Param(jnp.ones(3))

    def __call__(self, token_ids):
        return token_ids

    def logits(self, hidden):
        return hidden


class Mute(nnx.Module):
    def __call__(self, token_ids, positions, prompt_lens, attend):
        return token_ids


class Weightless(Mute):
    def logits(self, hidden):
        return hidden


class OldStyle(linen.Module):
    def __call__(self, token_ids):
        return token_ids


@pytest.mark.parametrize(
    ("model", "match"),
    [
        (Short, r"Short cannot be called as model\(token_ids, positions, prompt_lens, attend\)"),
        (Mute, "Mute has no method logits"),
        (Weightless, "Weightless has no weights"),
        (OldStyle, "OldStyle is a flax.linen module, which holds no weights: write it as a flax.nnx.Module"),
        (dict, "expected a flax.nnx.Module"),
    ],
)
def test_what_is_no_model_is_refused_by_name(model, match):
    with pytest.raises(ValueError, match=match):
        llm_of(model())


def test_settings_that_disagree_with_the_model_are_refused():
    with pytest.raises(ValueError, match="dtype='bfloat16', but the weights are float32"):
        llm_of(Own(), settings=replace(SETTINGS, dtype="bfloat16"))
    with pytest.raises(ValueError, match="num_kv_heads=2 cannot be split over tensor_parallel_size=4"):
        llm_of(Own(), settings=replace(SETTINGS, tensor_parallel_size=4))
    with pytest.raises(ValueError, match=r"expected a jpaged\.models\.ModelConfig"):
        llm_of(Own(), config=SHAPE)


@pytest.mark.parametrize("model", [Own, OldStyle, dict], ids=lambda model: model.__name__)
def test_a_module_given_for_a_checkpoint_directory_is_refused(model):
    with pytest.raises(ValueError, match=rf"model is a {model.__name__}: .* LLM.from_model"):
        LLM(model())


def test_a_config_made_by_hand_is_of_no_checkpoint():
    config = ModelConfig(**SHAPE)
    with pytest.raises(NotImplementedError, match="ModelConfig is no family of checkpoints"):
        config.to_hf()
    with pytest.raises(NotImplementedError, match="ModelConfig is not read from checkpoints"):
        ModelConfig.from_hf(None, {})


def test_weights_with_logical_axes_are_split_over_the_devices():
    model = Own()
    for layer in model.qkv:
        for linear in layer:
            linear.kernel.set_metadata(logical_axes=(None, "heads"))
    for linear in model.out:
        linear.kernel.set_metadata(logical_axes=("heads", None))
    llm = llm_of(model, mesh=make_mesh(2))
    params = SamplingParams(temperature=0, max_tokens=5)
    [output] = llm.generate({"prompt_token_ids": PROMPTS[0]}, params, use_tqdm=False)
    assert output.outputs[0].token_ids == greedy_without_cache(model, PROMPTS[0], 5, padded_len=32)[0]
    assert llm.engine.runner.weight_bytes == sum(x.nbytes for x in jax.tree.leaves(nnx.state(model)))


@pytest.mark.parametrize("placement", ["device", "host"])
def test_weights_that_no_caller_holds_exist_once_when_the_pool_is_sized(placement, monkeypatch):
    def live_bytes() -> int:
        gc.collect()
        return sum(x.nbytes for x in jax.live_arrays())

    live, guess = [live_bytes()], PoolSizer.guess
    monkeypatch.setattr(PoolSizer, "guess", lambda self: (live.append(live_bytes()), guess(self))[1])
    llm = LLM.from_model(
        random_model(TINY, jnp.float32, make_mesh(1), 0, weight_placement=placement),
        TINY,
        replace(SETTINGS, weight_placement=placement),
        warm_up=False,
        use_tqdm=False,
    )
    assert live[1] - live[0] == llm.engine.runner.weight_bytes
