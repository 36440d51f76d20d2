"""Models against Hugging Face, configurations against transformers, and every refusal of a config.json."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jpaged.models import SUPPORTED_ARCHITECTURES, LlamaConfig, Rope, load_config, load_model, random_model
from jpaged.models.layers.rope import Dynamic, LongRope, Yarn
from jpaged.sharding import make_mesh, pool_sharding
from tests.support.oracles import HF_CASES, HF_REFERENCE, greedy_without_cache, load_reference, teacher_forced_logits
from tests.support.tiny import tiny_config

TINY = tiny_config(num_layers=1, num_heads=2, num_kv_heads=2, head_dim=4, intermediate_size=12)


@cache
def _load(case, tensor_parallel_size=1):
    path = HF_REFERENCE / case
    return load_model(path, load_config(path), "float32", make_mesh(tensor_parallel_size), use_tqdm=False)


def _logprobs(logits, ids):
    return np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), ids[:, None], 1)[:, 0]


@pytest.mark.parametrize("case", HF_CASES)
def test_logprobs_and_greedy_tokens_equal_hugging_face(case):
    runs = load_reference(case)
    sequences = [np.concatenate([run.prompt, run.tokens]) for run in runs.values()]
    logits = teacher_forced_logits(_load(case), sequences, list(runs), padded_len=112)
    for (prompt_len, run), ids, rows in zip(runs.items(), sequences, logits, strict=True):
        rows = rows[: len(ids) - 1]  # each predicts the next token
        expected = np.concatenate([run.prompt_logprobs, run.logprobs])
        np.testing.assert_allclose(_logprobs(rows, ids[1:]), expected, atol=1e-4, rtol=0)
        np.testing.assert_array_equal(rows[prompt_len - 1 :].argmax(-1), run.tokens)


def test_reference_cases_cover_every_architecture():
    assert {load_config(HF_REFERENCE / case).architecture for case in HF_CASES} == set(SUPPORTED_ARCHITECTURES)


def test_greedy_loop_without_cache_equals_hugging_face():
    run = load_reference("llama_dynamic")[31]  # crosses the original length of 48 while decoding
    tokens, logits = greedy_without_cache(_load("llama_dynamic"), run.prompt.tolist(), len(run.tokens), padded_len=80)
    assert tokens == run.tokens.tolist()
    np.testing.assert_allclose(_logprobs(logits, run.tokens), run.logprobs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", ["qwen2_window", "opt", "gemma3", "olmo2", "starcoder2"])
def test_half_precision_stays_half_and_gives_float32_logits(case):
    path = HF_REFERENCE / case
    model = load_model(path, load_config(path), "bfloat16", make_mesh(), use_tqdm=False)
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))} == {jnp.dtype(jnp.bfloat16)}
    run = load_reference(case)[33]
    logits = teacher_forced_logits(model, [run.prompt], [33], padded_len=33)
    assert logits.dtype == np.float32
    np.testing.assert_allclose(_logprobs(logits[0, :-1], run.prompt[1:]), run.prompt_logprobs, atol=0.4, rtol=0)


# Tensor parallelism ---------------------------------------------------------------------------------------------------


def test_two_devices_give_the_logits_of_one():
    run = load_reference("llama_gqa")[33]
    one, two = (teacher_forced_logits(_load("llama_gqa", size), [run.prompt], [33], padded_len=33) for size in (1, 2))
    np.testing.assert_allclose(one, two, atol=1e-4, rtol=0)
    kernel = _load("llama_gqa", 2).model.layers[0].mlp.gate_proj.kernel[...]
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(32, 18)}


def test_random_weights_do_not_depend_on_the_mesh():
    one, two = (jax.tree.leaves(nnx.state(random_model(TINY, "float32", make_mesh(n), 7))) for n in (1, 2))
    for a, b in zip(one, two, strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-5)


def test_block_pool_is_split_by_kv_head():
    pool = jax.device_put(jnp.zeros((3, 2, 2, 4, 8, 16)), pool_sharding(make_mesh(2)))
    assert {shard.data.shape for shard in pool.addressable_shards} == {(3, 2, 2, 2, 8, 16)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 3, "num_kv_heads": 3}, "num_heads=3 cannot be split over tensor_parallel_size=2"),
        ({"intermediate_size": 13}, "intermediate_size=13 cannot be split"),
    ],
)
def test_sizes_the_mesh_does_not_divide_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        random_model(replace(TINY, **changes), "float32", make_mesh(2), 0)


def test_kv_heads_that_neither_divide_the_devices_nor_are_divided_by_them_are_refused():
    config = replace(TINY, num_heads=12, num_kv_heads=3, hidden_size=24)
    with pytest.raises(ValueError, match="num_kv_heads=3 cannot be split over tensor_parallel_size=4 devices"):
        random_model(config, "float32", make_mesh(4), 0)


def test_random_weights_of_copied_kv_heads_are_those_of_the_heads():
    shape = {"num_heads": 8, "num_kv_heads": 2, "hidden_size": 32, "intermediate_size": 16}
    config = replace(TINY, **shape, qkv_bias=True, architecture="Qwen2ForCausalLM")
    one, many = (random_model(config, "float32", make_mesh(n), 7).model.layers[0].self_attn for n in (1, 8))
    heads = np.asarray(one.k_proj.kernel[...]).reshape(32, 2, 1, 4)
    copied = np.asarray(many.k_proj.kernel[...])
    np.testing.assert_allclose(copied, np.broadcast_to(heads, (32, 2, 4, 4)).reshape(32, 32), rtol=1e-5)
    assert many.v_proj.bias[...].shape == (32,)
    assert {shard.data.shape for shard in many.k_proj.kernel[...].addressable_shards} == {(32, 4)}


@pytest.mark.parametrize("size", [0, 9])
def test_mesh_of_devices_that_do_not_exist_is_refused(size):
    with pytest.raises(ValueError, match=f"tensor_parallel_size={size} is not valid"):
        make_mesh(size)


# Configurations -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", HF_CASES)
def test_written_configuration_reads_back_equal(case, tmp_path):
    config = load_config(HF_REFERENCE / case)
    (tmp_path / "config.json").write_text(json.dumps(config.to_hf()))
    assert load_config(tmp_path) == config


def _edited(tmp_path, case="llama_mha", **changes):
    """A directory with the config.json of a case, with ``changes`` made to it (None removes)."""
    values = json.loads((HF_REFERENCE / case / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(
        json.dumps({k: v for k, v in values.items() if v is not None or k not in changes})
    )
    return tmp_path


@pytest.mark.parametrize("case", [case for case in HF_CASES if case.startswith("llama")])
def test_rope_scaling_spelled_the_old_way_means_the_same(case, tmp_path):
    scaling = json.loads((HF_REFERENCE / case / "config.json").read_text())["rope_parameters"]
    theta, rope_type = scaling.pop("rope_theta"), scaling.pop("rope_type")
    old = {"rope_theta": theta, "rope_scaling": {"type": rope_type, **scaling} if scaling else None}
    path = _edited(tmp_path, case, rope_parameters=None, dtype=None, torch_dtype="float32", **old)
    assert load_config(path) == load_config(HF_REFERENCE / case)


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("llama_mha", 128),
        ("llama_linear", 64 * 2),
        ("llama_dynamic", 48 * 3),
        ("llama_yarn", 32 * 4),
        ("llama_longrope", 128),
        ("llama_llama3", 128),
        ("opt", 112),
    ],
)
def test_context_is_what_the_scaling_is_meant_for(case, expected):
    assert load_config(HF_REFERENCE / case).max_model_len == expected


def test_tokenizers_are_loaded_without_advice_to_install_pytorch():
    code = "from jpaged.models import import_transformers; import_transformers().AutoTokenizer"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "PyTorch" not in done.stdout + done.stderr


def test_generation_config_names_the_end_of_sequence(tmp_path):
    path = _edited(tmp_path, eos_token_id=2)
    assert load_config(path).eos_token_ids == (2,)
    (path / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    assert load_config(path).eos_token_ids == (5, 6)
    (path / "generation_config.json").write_text("{}")
    assert load_config(path).eos_token_ids == (2,)


@pytest.mark.parametrize("case", ["llama_dynamic", "llama_longrope", "llama_yarn", "phi3_longrope", "opt"])
def test_salts_of_two_prompts_are_equal_where_their_keys_are(case):
    config = load_config(HF_REFERENCE / case)
    lengths = (16, 47, 48, 49, 64, 65, 90)
    positions = jnp.arange(lengths[-1], dtype=jnp.int32)
    tables = {n: np.zeros((2, lengths[-1], 1)) for n in lengths}  # OPT's keys know nothing of the prompt's length
    if isinstance(config, LlamaConfig):
        tables = {n: np.stack(config.rope.cos_sin(positions, jnp.full_like(positions, n))) for n in lengths}
    for first in lengths:
        for second in lengths:
            shared = min(first, second)
            are_equal = np.array_equal(tables[first][:, :shared], tables[second][:, :shared])
            assert (config.prefix_salt(first) == config.prefix_salt(second)) == are_equal, (first, second)


def test_given_magnitude_wins_over_the_computed_one():
    assert Yarn(4.0, 32, attention_factor=0.5).magnitude() == 0.5
    assert LongRope((1.0,), (2.0,), 32, attention_factor=0.5).magnitude(64) == 0.5
    assert LongRope((1.0,), (2.0,), 32).magnitude(64) == LongRope((1.0,), (2.0,), 32, factor=2.0).magnitude(128)


# Bad input ------------------------------------------------------------------------------------------------------------


def test_what_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(
        ValueError,
        match=r"does not exist: expected a Hugging Face checkpoint directory .*, or for LLM and --model a repository",
    ):
        load_config(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"has no config\.json"):
        load_config(tmp_path)
    shutil.copy(HF_REFERENCE / "opt" / "config.json", tmp_path)
    with pytest.raises(ValueError, match="is a file"):
        load_config(tmp_path / "config.json")


@pytest.mark.parametrize(("text", "message"), [("{", "cannot be read as JSON"), ("[]", "expected an object")])
def test_config_that_is_no_json_object_is_refused(text, message, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=rf"config\.json .*{message}"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"architectures": ["BloomForCausalLM"]},
            "BloomForCausalLM.* is not supported: .*LlamaForCausalLM.*OPTForCausalLM",
        ),
        ({"architectures": None}, "architectures=None"),
        ({"model_type": "mistral"}, "disagrees with architectures"),
        ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
        ({"hidden_act": "quick_gelu"}, "activation 'quick_gelu' is not supported"),
        ({"num_hidden_layers": 0}, "num_layers=0"),
        ({"num_hidden_layers": "two"}, "refused by transformers.*num_hidden_layers"),
        ({"num_attention_heads": 5}, "refused by transformers.*36"),
        ({"num_key_value_heads": 2}, "num_attention_heads=3 is not a multiple of num_key_value_heads=2"),
        ({"head_dim": 7}, "head_dim.*7"),
        ({"layer_types": 1}, "layer_types=1 is not valid"),
        ({"num_attention_heads": 0}, "num_attention_heads=0 is not valid"),
        ({"head_dim": 0}, "head_dim=0 is not valid"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan is not valid"),
        ({"eos_token_id": [2, -1]}, "eos_token_id=-1 is not valid"),
        ({"eos_token_id": 2**31}, "eos_token_id=2147483648 is not valid"),
        ({"dtype": "int8"}, "dtype='int8'"),
        ({"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}}, "rope_type='spiral' is not supported"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 0.5}}, r"factor=0\.5"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "factor"),
        ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor=0\.5"),
        (
            {
                "rope_parameters": {
                    "rope_type": "longrope",
                    "rope_theta": 1e4,
                    "short_factor": [1.0],
                    "long_factor": [1.0],
                    "original_max_position_embeddings": 64,
                }
            },
            "short_factor has 1 entries: expected head_dim / 2 = 6",
        ),
    ],
)
def test_config_that_cannot_work_is_refused(changes, message, tmp_path):
    with pytest.raises(ValueError, match=rf"(?s)config\.json.*{message}"):
        load_config(_edited(tmp_path, **changes))


_SCALINGS = {
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 2.0, "original_max_position_embeddings": 64},
    "longrope": {"short_factor": [1.0] * 6, "long_factor": [2.0] * 6, "original_max_position_embeddings": 64},
    "llama3": {
        "factor": 2.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}


@pytest.mark.parametrize("spelling", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize(
    ("rope_type", "changes", "message"),
    [
        ("linear", {"factor": None}, "rope_type='linear' needs factor"),
        ("dynamic", {"factor": None}, "rope_type='dynamic' needs factor"),
        *(
            (rope_type, {"factor": value}, re.escape(f"factor={value!r} is not valid: expected a number"))
            for rope_type in ("linear", "dynamic", "yarn", "longrope")
            for value in ("2", True, [2.0], 0.5, float("nan"), float("inf"))
        ),
        ("linear", {"factor": 1e9}, r"factor=1000000000\.0 is not valid: expected a context"),
        *(
            (
                "linear",
                {"rope_theta": value},
                re.escape(f"rope_theta={value!r} is not valid: expected a number above 1"),
            )
            for value in (-1, 0, 1, True, "x", None, float("nan"), float("inf"), 1e39)
        ),
        ("linear", {"rope_theta": 10**400}, "rope_theta=10+.* is not valid"),
        ("yarn", {"original_max_position_embeddings": 0}, "original_max_position_embeddings=0 is not valid"),
        ("yarn", {"original_max_position_embeddings": None}, "original_max_position_embeddings=None is not valid"),
        ("yarn", {"beta_fast": "a"}, "beta_fast='a' is not valid"),
        ("yarn", {"beta_fast": 1, "beta_slow": 32}, "beta_fast=1 is not valid: expected beta_slow=32 or more"),
        ("yarn", {"attention_factor": []}, r"attention_factor=\[\] is not valid"),
        ("yarn", {"mscale": "1", "mscale_all_dim": 1.0}, "mscale='1' is not valid"),
        ("yarn", {"mscale": -1, "mscale_all_dim": 1.0}, "mscale=-1 is not valid"),
        ("yarn", {"truncate": "no"}, "truncate='no' is not valid"),
        ("longrope", {"short_factor": "123456"}, "short_factor='123456' is not valid: expected a list"),
        ("longrope", {"short_factor": ["1"] * 6}, r"short_factor=\['1', .* is not valid: expected a list"),
        ("longrope", {"long_factor": [0.0] * 6}, r"long_factor=\[0\.0, .* is not valid: expected a list"),
        ("longrope", {"long_factor": [1.0] * 5}, "long_factor has 5 entries: expected head_dim / 2 = 6"),
        ("longrope", {"long_factor": None}, "long_factor=None is not valid: expected a list"),
        ("longrope", {"attention_factor": 0}, "attention_factor=0 is not valid"),
        ("longrope", {"original_max_position_embeddings": 1}, "original_max_position_embeddings=1 is not valid"),
        ("llama3", {"original_max_position_embeddings": 6.5}, r"original_max_position_embeddings=6\.5 is not valid"),
        ("llama3", {"low_freq_factor": "1"}, "low_freq_factor='1' is not valid"),
        ("llama3", {"low_freq_factor": 4.0}, r"high_freq_factor=4\.0 is not valid: expected .* low_freq_factor=4\.0"),
        ("llama3", {"high_freq_factor": 0.5}, r"high_freq_factor=0\.5 is not valid"),
    ],
)
def test_rope_parameter_that_cannot_be_computed_with_is_named(spelling, rope_type, changes, message, tmp_path):
    rope = {"rope_type": rope_type, "rope_theta": 1e4, **_SCALINGS[rope_type], **changes}
    others = {"rope_parameters": None} if spelling == "rope_scaling" else {}
    with pytest.raises(ValueError, match=rf"(?s)config\.json: .*{message}"):
        load_config(_edited(tmp_path, "llama_mha", **others, **{spelling: rope}))


def test_null_parameter_of_another_rope_type_is_not_looked_at(tmp_path):
    rope = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0, "low_freq_factor": None, "short_factor": None}
    assert load_config(_edited(tmp_path, rope_parameters=rope)).max_model_len == 256


def test_rope_theta_beside_the_parameters_is_checked(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json: rope_theta=-1 is not valid"):
        load_config(_edited(tmp_path, rope_parameters=None, rope_theta=-1))


def test_rope_type_that_is_no_string_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json: rope_type=\['linear'\] is not supported"):
        load_config(_edited(tmp_path, rope_parameters={"rope_type": ["linear"], "rope_theta": 1e4}))


def test_yarn_without_a_factor_extends_to_the_whole_context(tmp_path):
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": None, "original_max_position_embeddings": 64}
    assert load_config(_edited(tmp_path, rope_parameters=rope)).max_model_len == 128


@pytest.mark.parametrize("value", [1.5, "a", True, {"a": 1}, [1.5], [None], [True], -1, [2**31]])
def test_generation_config_without_token_ids_is_refused(value, tmp_path):
    path = _edited(tmp_path)
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(ValueError, match=r"generation_config\.json: eos_token_id=.* is not valid: expected a token id"):
        load_config(path)


def test_dtype_of_another_type_is_refused(tmp_path):
    for value in ([], 0, {"text": "bfloat16"}):
        with pytest.raises(ValueError, match=r"config\.json: dtype=.* is not valid"):
            load_config(_edited(tmp_path, dtype=value))


@pytest.mark.parametrize("case", ["mistral", "qwen2_window"])
def test_window_of_no_tokens_is_refused(case, tmp_path):
    with pytest.raises(ValueError, match=r"config\.json: sliding_window=0 is not valid"):
        load_config(_edited(tmp_path, case, sliding_window=0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_sliding_window": False}, "layer_types asks for sliding_attention, but no sliding_window is given"),
        (
            {"layer_types": ["chunked_attention"] * 3},
            "layer_types entry='chunked_attention' is not valid",
        ),
    ],
)
def test_layer_type_that_cannot_be_followed_is_refused(changes, message, tmp_path):
    with pytest.raises(ValueError, match=rf"config\.json: {message}"):
        load_config(_edited(tmp_path, "qwen2_window", **changes))


@pytest.mark.parametrize("error", [KeyError("a"), TypeError("b"), AttributeError("c"), ZeroDivisionError("d")])
def test_error_that_no_check_foresaw_names_the_file(error, tmp_path, monkeypatch):
    def fail(*_):
        raise error

    monkeypatch.setattr(LlamaConfig, "from_hf", fail)
    with pytest.raises(ValueError, match=rf"config\.json .*{type(error).__name__}.*: correct it or download"):
        load_config(_edited(tmp_path))


def test_scaling_built_without_a_file_is_checked_too():
    with pytest.raises(ValueError, match="factor=None is not valid"):
        Rope(4, 10000.0, 32, Dynamic(None))  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="max_position_embeddings=0 is not valid"):
        Rope(4, 10000.0, 0)


def test_window_and_head_sizes_are_checked():
    with pytest.raises(ValueError, match="sliding_window=0"):
        replace(TINY, sliding_windows=(0,))
    with pytest.raises(ValueError, match="2 layer types are given for 1 layers"):
        replace(TINY, sliding_windows=(None, None))
    with pytest.raises(ValueError, match=r"rope\.head_dim=6 differs from head_dim=4"):
        replace(TINY, rope=Rope(6, 10000.0, 32))
    with pytest.raises(ValueError, match="head_dim above 2"):
        Rope(2, 10000.0, 32, Dynamic(2.0))
