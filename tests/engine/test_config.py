"""EngineConfig refuses every value it cannot honour, by name; LLM and its help say the same settings."""

import inspect
import math

import pytest

from jpaged import LLM, EngineConfig
from jpaged.rules import settings_of
from tests.support.setting_cases import cases

NOT_INTEGERS = [True, 1.5, "1", [1], math.nan]

INVALID = {
    "dtype": [None, "float8", 32, []],
    "kv_cache_dtype": [None, "int4", 8],
    "block_size": [*NOT_INTEGERS, None, 0, 1025],
    "num_blocks": [*NOT_INTEGERS, 0, 1, 2**27 + 1],
    "memory_fraction": [None, True, "1", 0, 0.0, -0.1, 1.01, math.nan],
    "max_num_seqs": [*NOT_INTEGERS, 0, 2**16 + 1],
    "max_num_batched_tokens": [*NOT_INTEGERS, 0, 2**20 + 1, 255],
    "max_inter_token_ms": [True, "1", 0, -1, 0.001, math.nan, 1e7],
    "max_model_len": [*NOT_INTEGERS, 0, 2**31],
    "enable_prefix_caching": [None, 1, "yes"],
    "seed": [*NOT_INTEGERS, None, -1, 2**32],
    "tensor_parallel_size": [*NOT_INTEGERS, None, 0],
    "attention_implementation": ["", 5],
    "interpret": [None, 1],
    "max_burst": [*NOT_INTEGERS, 0, 65],
    "preemption": [None, "drop", []],
    "num_host_blocks": [*NOT_INTEGERS, -1, 2**31],
    "host_memory_bytes": [*NOT_INTEGERS, -1, 2**63],
    "kv_placement": [None, "disk", True],
    "offload_cache": [None, "both", 1],
    "offload_dtype": [None, "fp8", 8],
    "weight_placement": [None, "auto", True],
    "generation_config": [None, True, "", "vllm", ["auto"]],
}

VALID = {
    "dtype": ["auto", "float32", "bfloat16", "float16"],
    "kv_cache_dtype": ["auto", "fp8", "int8"],
    "block_size": [1, 1024],
    "num_blocks": [None, 2, 2**26],
    "memory_fraction": [1, 1.0, 1e-9],
    "max_num_seqs": [None, 1, 2**16],
    "max_num_batched_tokens": [None, 256, 2**20],
    "max_inter_token_ms": [None, 0.1, 0.5, 100, 1e6],
    "max_model_len": [None, 1, 2**31 - 1],
    "enable_prefix_caching": [True, False],
    "seed": [0, 2**32 - 1],
    "tensor_parallel_size": [1, 256],
    "attention_implementation": [None, "xla"],
    "interpret": [True, False],
    "max_burst": [None, 1, 64],
    "preemption": ["auto", "swap", "recompute"],
    "num_host_blocks": [None, 0, 7],
    "host_memory_bytes": [None, 0, 2**63 - 1],
    "kv_placement": ["device", "auto", "host"],
    "offload_cache": ["auto", "kv", "activations"],
    "offload_dtype": ["auto", "int8"],
    "weight_placement": ["device", "host"],
    "generation_config": ["auto", "none"],
}


def test_every_setting_has_invalid_and_valid_values():
    assert set(settings_of(EngineConfig)) == INVALID.keys() == VALID.keys()


@pytest.mark.parametrize(("name", "value"), cases(INVALID))
def test_invalid_value_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=name):
        EngineConfig(**{name: value})


@pytest.mark.parametrize(("name", "value"), cases(VALID))
def test_valid_value_is_kept(name, value):
    assert getattr(EngineConfig(**{name: value}), name) == value


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"block_size": 1024, "num_blocks": 2**21}, "num_blocks=2097152 .* at most 2097151 blocks of 1024"),
        ({"max_num_seqs": 9, "max_num_batched_tokens": 8}, "max_num_batched_tokens=8 is less than max_num_seqs=9"),
        (
            {"kv_cache_dtype": "int8", "max_num_seqs": 9, "max_num_batched_tokens": 23},
            "max_num_batched_tokens=23 with kv_cache_dtype='int8': expected at least 24",
        ),
        ({"num_host_blocks": 1, "host_memory_bytes": 1}, "give one of them"),
        ({"preemption": "swap", "host_memory_bytes": 0}, "preemption='swap' needs a host pool"),
        ({"kv_placement": "host", "num_host_blocks": 0}, "kv_placement='host' needs a host pool"),
        ({"weight_placement": "host", "max_burst": 2}, "every step streams the weights"),
    ],
)
def test_settings_that_exclude_each_other_are_refused(settings, match):
    with pytest.raises(ValueError, match=match):
        EngineConfig(**settings)


def test_an_llm_takes_every_setting_with_its_type_and_default():
    """Written out in LLM, so that an editor completes them."""
    own = {"self", "model", "tokenizer", "warm_up", "use_tqdm"}
    taken = {name: p for name, p in inspect.signature(LLM.__init__).parameters.items() if name not in own}
    settings = inspect.signature(EngineConfig).parameters
    assert taken.keys() == settings.keys()
    for name, parameter in taken.items():
        assert (parameter.default, parameter.annotation) == (settings[name].default, settings[name].annotation)


def test_an_llm_passes_every_setting_on(monkeypatch):
    loaded = []
    monkeypatch.setattr("jpaged.llm.load_checkpoint", lambda path, config, *_, **options: loaded.append(config))
    values = {
        name: next(v for v in VALID[name] if v != each.default) for name, each in settings_of(EngineConfig).items()
    }
    values |= {"num_host_blocks": None, "host_memory_bytes": 5}
    LLM(**values)
    assert loaded == [EngineConfig(**values)]


def test_the_help_of_an_llm_names_every_setting():
    for name, each in settings_of(EngineConfig).items():
        assert f"    {name}: {each.help} (default: {each.shown_default})." in (LLM.__doc__ or "")
