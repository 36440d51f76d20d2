"""EngineConfig refuses every setting it cannot honour, by name."""

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jpaged.config import DEFAULT_TOKEN_BUDGET, EngineConfig

NOT_COUNTS = [True, 1.0, "1", [1], math.nan, 0, -1, 10**400]

INVALID = {
    "dtype": [None, "float64", "int8", "", 32, ["float32"]],
    "kv_cache_dtype": [None, "float8", "", 8, ["int8"]],
    "block_size": [*NOT_COUNTS, None, 1025],
    "num_blocks": [*NOT_COUNTS, 1, 2**31],
    "memory_fraction": [None, True, "0.9", math.nan, math.inf, 0, 0.0, -0.5, 1.01, 10**400],
    "max_num_seqs": [*NOT_COUNTS, 10**9],
    "max_num_batched_tokens": [*NOT_COUNTS, 10**9],
    "max_inter_token_ms": [True, "100", [1], math.nan, math.inf, 0, -1.0, 10**400],
    "max_model_len": [*NOT_COUNTS, 2**31],
    "enable_prefix_caching": [None, 0, 1, "no"],
    "seed": [None, True, 1.0, "1", math.nan, -1, 2**32],
    "tensor_parallel_size": [*NOT_COUNTS, None],
    "max_burst": [*NOT_COUNTS, 65],
    "attention_implementation": [1, True, ["xla"], ""],
    "interpret": [None, 1, "yes"],
    "preemption": [None, True, "", "always", ["swap"]],
    "num_host_blocks": [True, 1.0, "1", [1], math.nan, -1, 2**31],
    "host_memory_bytes": [False, 1e9, "4GiB", math.inf, -1, 10**400],
    "kv_placement": [None, True, "", "disk", ["host"]],
    "offload_cache": [None, True, "", "both", ["kv"]],
    "offload_dtype": [None, True, "", "fp8", 8, ["int8"]],
    "weight_placement": [None, True, "", "auto", ["host"]],
    "generation_config": [None, True, "", "vllm", ["auto"]],
}

VALID = {
    "dtype": ["auto", "float32", "bfloat16", "float16"],
    "kv_cache_dtype": ["auto", "fp8", "int8"],
    "block_size": [1, 16, 1024],
    "num_blocks": [None, 2, 10**6],
    "memory_fraction": [1, 0.5, 1e-6],
    "max_num_seqs": [None, 1, 2048],
    "max_num_batched_tokens": [None, 256, 8192],
    "max_inter_token_ms": [None, 1, 50.0],
    "max_model_len": [None, 1, 131_072],
    "enable_prefix_caching": [True, False],
    "seed": [0, 2**32 - 1],
    "tensor_parallel_size": [1, 8],
    "max_burst": [None, 1, 64],
    "attention_implementation": [None, "xla"],
    "interpret": [False, True],
    "preemption": ["auto", "swap", "recompute"],
    "num_host_blocks": [None, 0, 1, 10**6],
    "host_memory_bytes": [None, 0, 1 << 40],
    "kv_placement": ["device", "auto", "host"],
    "offload_cache": ["auto", "kv", "activations"],
    "offload_dtype": ["auto", "int8"],
    "weight_placement": ["device", "host"],
    "generation_config": ["auto", "none"],
}


def cases(table):
    return [pytest.param(name, value, id=f"{name}={value!r:.20}") for name, values in table.items() for value in values]


def test_every_field_has_invalid_and_valid_values():
    names = {field.name for field in dataclasses.fields(EngineConfig)}
    assert names == INVALID.keys() == VALID.keys()


@pytest.mark.parametrize(("name", "value"), cases(INVALID))
def test_invalid_value_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=rf"{name}=.*expected"):
        EngineConfig(**{name: value})


@pytest.mark.parametrize(("name", "value"), cases(VALID))
def test_valid_value_is_kept(name, value):
    assert getattr(EngineConfig(**{name: value}), name) == value


anything = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.lists(st.integers(), max_size=2)
)


@given(name=st.sampled_from(sorted(INVALID)), value=anything)
def test_any_value_is_kept_or_refused_with_a_value_error(name, value):
    kept, refusal = None, ""
    try:
        kept = EngineConfig(**{name: value})
    except ValueError as error:
        refusal = str(error)
    assert name in refusal if kept is None else getattr(kept, name) == value


def test_token_budget_covers_every_sequence():
    assert EngineConfig().token_budget == DEFAULT_TOKEN_BUDGET
    assert EngineConfig(max_num_seqs=4096).token_budget == 4096
    assert EngineConfig(max_num_seqs=8, max_num_batched_tokens=8).token_budget == 8
    with pytest.raises(ValueError, match=r"max_num_batched_tokens=7 is less than max_num_seqs=8"):
        EngineConfig(max_num_seqs=8, max_num_batched_tokens=7)


def test_pool_whose_slots_exceed_int32_is_refused():
    with pytest.raises(ValueError, match="num_blocks"):
        EngineConfig(num_blocks=2**27, block_size=16)
    assert EngineConfig(num_blocks=2**27 - 1, block_size=16).num_blocks == 2**27 - 1


def test_host_pool_is_sized_once():
    with pytest.raises(ValueError, match="num_host_blocks=2 and host_memory_bytes=0 both size the host pool"):
        EngineConfig(num_host_blocks=2, host_memory_bytes=0)


@pytest.mark.parametrize("name", ["num_host_blocks", "host_memory_bytes"])
def test_swap_without_a_host_pool_is_refused(name):
    with pytest.raises(ValueError, match="preemption='swap' needs a host pool, and it is turned off"):
        EngineConfig(preemption="swap", **{name: 0})
    assert EngineConfig(preemption="recompute", **{name: 0}).preemption == "recompute"
