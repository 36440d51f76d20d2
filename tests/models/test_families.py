"""Families beside Llama and OPT: over two devices and back to a checkpoint, and every option that changes numbers."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from jpaged.models import fuse_projections, load_config, load_model, save_checkpoint
from jpaged.models.checkpoint.joined import _Part
from jpaged.models.checkpoint.registry import abstract_model
from jpaged.sharding import make_mesh
from tests.support.oracles import HF_REFERENCE, dense_attend, load_reference

CASES = [
    "smollm3",
    "granite",
    "olmo2",
    "starcoder2",
    "gemma2",
    "gemma3",
    "phi3",
    "phi3_longrope",
    "gpt2",
    "gpt2_scaled",
]


class _CheckedAttend:
    """Dense attention, which compares K and V with what the source gives that each layer shows."""

    def __init__(self, positions):
        self.attend, self.positions, self.errors = dense_attend(), positions, []

    def take_source(self, source):
        self.source = source

    def __call__(self, spec, q, k, v):
        again = self.source.project(self.source.inputs, self.positions)
        self.errors += [jnp.abs(one - other).max() for one, other in zip((k, v), again, strict=True)]
        return self.attend(spec, q, k, v)


def _run(model, tokens):
    """The logits of a prompt, and the errors of its sources."""
    graphdef, state = nnx.split(model)

    @jax.jit
    def forward(state, tokens):
        model, positions = nnx.merge(graphdef, state), jnp.arange(len(tokens))
        attend = _CheckedAttend(positions)
        hidden = model(tokens, positions, jnp.full_like(tokens, len(tokens)), attend)
        return model.logits(hidden), attend.errors

    return forward(state, tokens)


@pytest.mark.parametrize("case", CASES)
def test_two_devices_equal_hugging_face_and_save_what_it_saved(case, tmp_path):
    """The model runs with joined projections, as in the engine; its KV heads are copied if there is one."""
    config, run = load_config(HF_REFERENCE / case), load_reference(case)[70]
    model = load_model(HF_REFERENCE / case, config, "float32", make_mesh(2), use_tqdm=False)
    fuse_projections(model)
    rows, errors = _run(model, run.prompt)
    assert len(errors) == 2 * config.num_layers
    if config.shows_sources:
        assert max(errors) < 1e-5
    logprobs = np.asarray(jax.nn.log_softmax(rows[:-1]))
    got = np.take_along_axis(logprobs, run.prompt[1:, None], 1)[:, 0]
    np.testing.assert_allclose(got, run.prompt_logprobs, atol=1e-4, rtol=0)

    save_checkpoint(model, config, tmp_path, dtype=config.dtype)
    expected, written = load_file(HF_REFERENCE / case / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert written.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(written[name], value)
    assert load_config(tmp_path) == config


PUBLISHED = json.loads(Path(__file__).with_name("published.json").read_text(encoding="utf-8"))["checkpoints"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configuration_has_the_published_number_of_parameters(name, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[name]["config"]))
    config = load_config(tmp_path)
    _, state = abstract_model(config, "bfloat16", make_mesh())
    assert sum(param.size for param in jax.tree.leaves(state)) == PUBLISHED[name]["num_params"]
    (tmp_path / "config.json").write_text(json.dumps(config.to_hf()))
    assert load_config(tmp_path) == config


def _described(rope):
    """What ``expected`` of published.json says of a rotary embedding."""
    start = jnp.zeros(1, jnp.int32)
    return {
        "kind": rope.to_hf()["rope_type"],
        "theta": rope.theta,
        "rotary_dim": 2 * len(rope.plain_inv_freq()),
        "factor": getattr(rope.scaling, "factor", None),
        "magnitude": pytest.approx(float(rope.cos_sin(start, start)[0][0, 0]), rel=1e-6),
    }


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configuration_means_what_its_authors_say(name, tmp_path):
    """Windows, scales, caps and rotary embeddings of the first layers, and what else numbers depend on."""
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[name]["config"]))
    config, expected = load_config(tmp_path), PUBLISHED[name]["expected"]
    first = config.layer_specs[: len(expected["windows"])]
    assert [spec.sliding_window for spec in first] == expected["windows"]
    assert [spec.sm_scale for spec in first] == pytest.approx([expected["sm_scale"]] * len(first))
    assert {spec.soft_cap for spec in first} == {expected["soft_cap"]}
    assert {spec.sinks for spec in first} == {name.startswith("openai/gpt-oss")}

    ropes = getattr(config, "layer_ropes", (None,) * config.num_layers)[: len(first)]
    for rope, index in zip(ropes, expected["rope_of_layer"], strict=True):
        assert (rope and _described(rope)) == (None if index is None else expected["ropes"][index])

    for option, value in expected["options"].items():
        assert getattr(config, option) == (tuple(value) if isinstance(value, list) else value), option


def test_window_that_no_context_exceeds_is_full_attention(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED["microsoft/Phi-4-mini-instruct"]["config"]))
    config = load_config(tmp_path)
    assert config.to_hf()["sliding_window"] == 262144 > config.max_model_len
    assert {spec.sliding_window for spec in config.layer_specs} == {None}


def _edited(tmp_path, case, **changes):
    """A directory with the config.json of a case, with ``changes`` made to it."""
    values = json.loads((HF_REFERENCE / case / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(values))
    return tmp_path


def _part(factor):
    return {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": factor}


def _ropes(**changes):
    local = {"rope_type": "default", "rope_theta": 100.0}
    return {"full_attention": {"rope_type": "default", "rope_theta": 1e4, **changes}, "sliding_attention": local}


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        ("smollm3", {"no_rope_layers": [1, 0]}, "rope_layers has 2 entries: expected one for each of 5"),
        ("smollm3", {"use_sliding_window": False}, "layer_types asks for sliding_attention, but no sliding_window"),
        ("granite", {"logits_scaling": 0}, "logits_scaling=0 is not valid: expected a number above 0"),
        ("granite", {"residual_multiplier": -1.0}, r"residual_multiplier=-1\.0 is not valid"),
        ("gemma2", {"attn_logit_softcapping": 0.0}, r"attn_logit_softcapping=0\.0 is not valid"),
        ("gemma2", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar=0 is not valid"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True is not valid"),
        ("gemma3", {"attn_logit_softcapping": 30.0}, r"attn_logit_softcapping=30\.0 is not valid: expected null"),
        ("gemma3", {"sliding_window": None}, "layer_types asks for sliding_attention, but no sliding_window"),
        ("gemma3", {"rope_parameters": _ropes(rope_type="linear", factor="2")}, "factor='2' is not valid"),
        ("gemma3", {"rope_parameters": _ropes(rope_type="spiral")}, "rope_type='spiral' is not supported"),
        ("gemma3", {"rope_parameters": _ropes(rope_theta=-1)}, "rope_theta=-1 is not valid"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention=True is not valid: expected false"),
        ("gpt2", {"n_head": 5}, "n_embd=36 is not n_head=5 times a head_dim"),
        ("gpt2", {"activation_function": "tanh"}, "activation 'tanh' is not supported"),
        ("gpt2", {"layer_norm_epsilon": -1.0}, r"layer_norm_epsilon=-1\.0 is not valid"),
        ("phi3", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "refused by transformers"),
        ("phi3", {"sliding_window": 0}, "sliding_window=0 is not valid"),
        ("phi3", {"rope_parameters": _part(0.1)}, r"head_dim=8 times 0\.1 is 0: rotary embeddings pair dimensions"),
        ("phi3", {"rope_parameters": _part(0.4)}, r"head_dim=8 times 0\.4 is odd"),
        ("phi3", {"rope_parameters": _part(1.5)}, r"partial_rotary_factor=1\.5 is not valid"),
        ("starcoder2", {"norm_epsilon": 0.0}, r"norm_epsilon=0\.0 is not valid"),
        ("starcoder2", {"hidden_act": "quick_gelu"}, "activation 'quick_gelu' is not supported"),
    ],
)
def test_option_that_cannot_be_followed_is_refused(case, changes, message, tmp_path):
    with pytest.raises(ValueError, match=rf"(?s)config\.json: .*{message}"):
        load_config(_edited(tmp_path, case, **changes))


def test_layers_without_rotary_embedding_follow_from_an_interval(tmp_path):
    path = _edited(tmp_path, "smollm3", no_rope_layers=None, no_rope_layer_interval=2, layer_types=None)
    config = load_config(path)
    assert [rope is not None for rope in config.layer_ropes] == [True, False, True, False, True]
    assert [spec.sliding_window for spec in config.layer_specs] == [None, 24, None, 24, None]


def test_global_layers_of_gemma3_have_the_other_rope_and_the_context_counts_its_scaling():
    config = load_config(HF_REFERENCE / "gemma3")
    thetas = [rope.theta for rope in config.layer_ropes]
    assert thetas == [100.0, 100.0, 10000.0, 100.0, 100.0]
    assert config.max_model_len == 128  # not 128 * factor


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_text_part_of_a_multimodal_checkpoint_is_the_text_model(prefix, tmp_path):
    case = HF_REFERENCE / "gemma3"
    text = json.loads((case / "config.json").read_text())
    del text["architectures"], text["eos_token_id"]
    whole = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "text_config": text}
    (tmp_path / "config.json").write_text(json.dumps({**whole, "eos_token_id": [5, 6], "vision_config": {}}))
    tensors = load_file(case / "model.safetensors")
    named = {name.replace("model.", prefix, 1): value for name, value in tensors.items()}
    save_file({**named, "vision_tower.x.weight": np.ones(2, np.float32)}, tmp_path / "model.safetensors")

    config, expected = load_config(tmp_path), load_config(case)
    assert config == replace(expected, eos_token_ids=(5, 6))
    models = [load_model(path, expected, "float32", make_mesh(), use_tqdm=False) for path in (case, tmp_path)]
    for one, other in zip(*(jax.tree.leaves(nnx.state(model)) for model in models), strict=True):
        np.testing.assert_array_equal(one, other)


def test_text_part_that_is_no_object_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"architectures": ["Gemma3ForConditionalGeneration"], "text_config": 1}')
    with pytest.raises(ValueError, match=r"config\.json: text_config=1 is not valid"):
        load_config(tmp_path)


def test_bare_gpt2_with_its_masks_loads(tmp_path):
    """As the first checkpoints have it: no prefix, and the causal mask as a buffer of each layer."""
    case = HF_REFERENCE / "gpt2_scaled"
    tensors = load_file(case / "model.safetensors")
    bare = {name.removeprefix("transformer."): value for name, value in tensors.items()}
    masks = {f"h.{layer}.attn.bias": np.ones((1, 1, 112, 112), np.float32) for layer in range(3)}
    save_file({**bare, **masks}, tmp_path / "model.safetensors")
    config = load_config(case)
    models = [load_model(path, config, "float32", make_mesh(), use_tqdm=False) for path in (case, tmp_path)]
    for one, other in zip(*(jax.tree.leaves(nnx.state(model)) for model in models), strict=True):
        np.testing.assert_array_equal(one, other)


def test_joined_tensor_of_another_size_is_named(tmp_path):
    case = HF_REFERENCE / "phi3"
    tensors = load_file(case / "model.safetensors")
    name = "model.layers.1.self_attn.qkv_proj.weight"
    save_file({**tensors, name: tensors[name][:-1]}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.layers\.1\.self_attn\.qkv_proj\.weight.*\[95, 32\].*axis 0 96"):
        load_model(tmp_path, load_config(case), "float32", make_mesh(), use_tqdm=False)


def test_each_device_reads_its_share_of_a_joined_tensor_only(monkeypatch):
    """Two devices with a head of K each: of q 2 x 16 rows, of k and v 2 x 8 each, of gate and up 2 x 22 each."""
    rows = []
    read = _Part.__getitem__
    monkeypatch.setattr(_Part, "__getitem__", lambda part, index: rows.append(len(got := read(part, index))) or got)
    load_model(HF_REFERENCE / "phi3", load_config(HF_REFERENCE / "phi3"), "float32", make_mesh(2), use_tqdm=False)
    assert sorted(rows) == sorted([16, 16, 16, 22, 22] * 2 * 2)


@pytest.mark.parametrize("rope_type", ["longrope", "su"])
def test_longrope_spelled_the_old_way_means_the_same(rope_type, tmp_path):
    values = json.loads((HF_REFERENCE / "phi3_longrope" / "config.json").read_text())
    rope = values.pop("rope_parameters")
    scaling = {"type": rope_type, "short_factor": rope["short_factor"], "long_factor": rope["long_factor"]}
    values |= {"rope_scaling": scaling, "rope_theta": rope["rope_theta"], "partial_rotary_factor": 0.75}
    (tmp_path / "config.json").write_text(json.dumps(values))
    config = load_config(tmp_path)
    assert config == load_config(HF_REFERENCE / "phi3_longrope")
    assert config.rope.rotary_dim == 12
    assert (config.prefix_salt(64), config.prefix_salt(65)) == (b"", b"long rope")
    assert not config.shows_sources
