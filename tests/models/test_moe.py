"""Mixture of experts: routing, every way to compute the experts, and their parameters in checkpoints."""

import json
from dataclasses import replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from jpaged.device.backends.hopper import HopperBackend
from jpaged.device.target import TARGETS
from jpaged.models import load_config, load_model, random_model, save_checkpoint
from jpaged.models.layers import moe
from jpaged.models.layers.expert_groups import MOST_COMPARED, PART, groups_by_expert
from jpaged.models.layers.moe import (
    ActivatedGate,
    Weights,
    all_experts,
    chosen_experts,
    compute_experts,
    grouped_experts,
    route,
)
from jpaged.models.layers.mxfp4 import decode_mxfp4
from jpaged.sharding import make_mesh
from pallas_kernels.grouped_matmul import grouped_matmul
from tests.support.oracles import HF_REFERENCE, load_reference, teacher_forced_logits

GATED = ActivatedGate("silu")


def _grouped(x, routes, weights, gated, *, has_all=False):
    return grouped_experts(x, routes, weights, gated, partial(grouped_matmul, implementation="xla"), has_all=has_all)


WAYS = (chosen_experts, all_experts, _grouped)


def _weights(rng, num_experts=6, ffn=5, hidden=8, *, bias):
    def draw(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    biases = (draw(num_experts, 2, ffn), draw(num_experts, hidden)) if bias else (None, None)
    return Weights(draw(num_experts, 2, ffn, hidden), draw(num_experts, ffn, hidden), *biases)


def _one_by_one(x, routes, weights):
    """The definition: a loop over tokens and over the experts of each."""
    arrays: list[Any] = [None if w is None else np.asarray(w, np.float64) for w in weights]
    gate_up, down, gate_up_bias, down_bias = arrays
    out = np.zeros(x.shape)
    for token, (experts, factors) in enumerate(zip(*map(np.asarray, routes), strict=True)):
        for e, factor in zip(experts, factors, strict=True):
            gate, up = gate_up[e] @ np.asarray(x[token], np.float64) + (0 if gate_up_bias is None else gate_up_bias[e])
            inner = gate / (1 + np.exp(-gate)) * up
            out[token] += factor * (inner @ down[e] + (0 if down_bias is None else down_bias[e]))
    return out


def _inputs(rng, tokens=7, hidden=8, num_experts=6, top_k=3):
    x = jnp.asarray(rng.standard_normal((tokens, hidden)), jnp.float32)
    logits = jnp.asarray(rng.standard_normal((tokens, num_experts)), jnp.float32)
    return x, route(logits, top_k, is_normalized=True)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize("experts", [*WAYS, partial(_grouped, has_all=True)])
def test_experts_equal_a_loop_over_tokens(experts, tokens, bias):
    rng = np.random.default_rng(0)
    (x, routes), weights = _inputs(rng, tokens=tokens), _weights(rng, bias=bias)
    np.testing.assert_allclose(experts(x, routes, weights, GATED), _one_by_one(x, routes, weights), atol=1e-4)


@pytest.mark.parametrize("experts", WAYS)
def test_token_does_not_depend_on_others_that_are_not_finite(experts):
    rng = np.random.default_rng(1)
    (x, routes), weights = _inputs(rng), _weights(rng, bias=False)
    alone = experts(x, routes, weights, GATED)
    broken = experts(x.at[2].set(jnp.nan).at[4].set(jnp.inf), routes, weights, GATED)
    kept = np.array([0, 1, 3, 5, 6])
    np.testing.assert_array_equal(broken[kept], alone[kept])


@pytest.mark.parametrize("experts", WAYS)
def test_parts_of_several_devices_add_up(experts):
    """Each device has experts of its own, or a part of the width of all; one of these adds the bias."""
    rng = np.random.default_rng(3)
    (x, routes), weights = _inputs(rng), _weights(rng, bias=True, ffn=4)
    expected = _one_by_one(x, routes, weights)
    by_number, by_width = [], []
    for i in (0, 2, 4):
        own = jax.tree.map(lambda w, i=i: w[i : i + 2], weights)
        by_number.append(experts(x, routes._replace(experts=routes.experts - i), own, GATED))
    np.testing.assert_allclose(sum(by_number), expected, atol=1e-4)
    gate_up, down, gate_up_bias, down_bias = jax.tree.leaves(weights)
    for i in (0, 2):
        own = Weights(
            gate_up[:, :, i : i + 2],
            down[:, i : i + 2],
            gate_up_bias[:, :, i : i + 2],
            down_bias * (1 if i == 0 else 0),
        )
        by_width.append(experts(x, routes, own, GATED))
    np.testing.assert_allclose(sum(by_width), expected, atol=1e-4)


@pytest.mark.parametrize("num_experts", [6, 5])  # whole experts on each of two devices, or half of their width
@pytest.mark.parametrize("tokens", [1, 7])
def test_backend_gives_each_device_its_part_of_the_experts(num_experts, tokens):
    rng = np.random.default_rng(4)
    x, routes = _inputs(rng, tokens=tokens, num_experts=num_experts, top_k=2)
    weights = _weights(rng, num_experts=num_experts, bias=True, ffn=4)
    mesh = make_mesh(2)
    backend = HopperBackend("as asked", num_devices=2, interpret=True)
    with jax.set_mesh(mesh):
        out = jax.jit(backend.experts, static_argnums=3)(x, routes, weights, GATED)
    np.testing.assert_allclose(out, _one_by_one(x, routes, weights), atol=1e-4)


def test_one_row_of_a_mixture_has_a_program_of_its_own():
    """Padding rows would read experts of their own."""
    mixture, dense = (load_config(HF_REFERENCE / case) for case in ("mixtral", "llama_gqa"))
    assert (TARGETS["gpu"].least_rows_of(mixture), TARGETS["gpu"].least_rows_of(dense)) == (1, 16)


@pytest.mark.parametrize(
    ("tokens", "top_k"),
    [(1, 1), (25, 2), (MOST_COMPARED // 2 + 1, 2), (17 * PART, 1)],
    ids=["one pair", "compared", "counted", "counted in whole parts"],
)
def test_groups_hold_pairs_by_expert_and_in_order(tokens, top_k):
    """Expert 3 has no token, and number 7 stands for the experts of other devices."""
    num_experts = 7
    experts = np.random.default_rng(5).permuted(np.tile([0, 1, 2, 4, 5, 6, 7], (tokens, 1)), axis=1)[:, :top_k]
    order = np.argsort(experts.reshape(-1), kind="stable")
    groups = groups_by_expert(jnp.asarray(experts, jnp.int32), num_experts)
    np.testing.assert_array_equal(np.asarray(groups.places)[order], np.arange(tokens * top_k))
    np.testing.assert_array_equal(groups.token_at, order // top_k)
    np.testing.assert_array_equal(groups.expert_at, np.minimum(experts.reshape(-1)[order], num_experts - 1))
    np.testing.assert_array_equal(groups.sizes, np.bincount(experts.reshape(-1), minlength=8)[:num_experts])
    assert groups.experts is None


@pytest.mark.parametrize("bias", [False, True])
def test_one_token_gives_the_same_bits_whether_its_experts_are_sorted_or_not(bias):
    rng = np.random.default_rng(7)
    (x, routes), weights = _inputs(rng, tokens=1), _weights(rng, bias=bias)
    routes = routes._replace(experts=jnp.array([[4, 0, 2]], jnp.int32))
    np.testing.assert_array_equal(
        _grouped(x, routes, weights, GATED, has_all=True), _grouped(x, routes, weights, GATED, has_all=False)
    )


@pytest.mark.parametrize(
    ("tokens", "has_product", "expected"),
    [(1, False, "chosen"), (2, False, "all"), (1, True, "grouped"), (2, True, "grouped")],
)
def test_way_to_compute_experts_follows_the_number_of_tokens(tokens, has_product, expected, monkeypatch):
    called = []
    for way in ("chosen", "all", "grouped"):
        monkeypatch.setattr(moe, f"{way}_experts", lambda x, *_, way=way, **options: called.append(way))
    rng = np.random.default_rng(6)
    x, routes = _inputs(rng, tokens=tokens, top_k=3)
    product = partial(grouped_matmul, implementation="xla") if has_product else None
    compute_experts(x, routes, _weights(rng, bias=False), GATED, product)
    assert called == [expected]


def test_expert_that_is_not_chosen_and_overflows_adds_nothing():
    rng = np.random.default_rng(2)
    x, routes = _inputs(rng, tokens=1, top_k=2)
    weights = _weights(rng, bias=False)
    others = [e for e in range(6) if e not in np.asarray(routes.experts[0])]
    huge = weights._replace(gate_up=weights.gate_up.at[jnp.array(others)].set(1e38))
    np.testing.assert_array_equal(all_experts(x, routes, huge, GATED), all_experts(x, routes, weights, GATED))


def test_weights_are_a_softmax_over_the_chosen_or_over_all_experts():
    logits = jnp.array([[1.0, 3.0, 2.0, -1.0], [0.0, 0.0, 5.0, 1.0]])
    experts, weights = route(logits, 2, is_normalized=False)
    np.testing.assert_array_equal(experts, [[1, 2], [2, 3]])
    softmax = np.asarray(jax.nn.softmax(logits, axis=-1))
    picked = np.take_along_axis(softmax, np.asarray(experts), 1)
    np.testing.assert_allclose(weights, picked, rtol=1e-6)
    normalized = route(logits, 2, is_normalized=True)
    np.testing.assert_array_equal(normalized.experts, experts)
    np.testing.assert_allclose(normalized.weights, picked / picked.sum(1, keepdims=True), rtol=1e-6)


def test_equal_logits_choose_distinct_experts():
    routes = route(jnp.zeros((2, 5)), 3, is_normalized=True)
    assert all(len(set(row.tolist())) == 3 for row in np.asarray(routes.experts))
    np.testing.assert_allclose(routes.weights, np.full((2, 3), 1 / 3), rtol=1e-6)


# Checkpoints and several devices --------------------------------------------------------------------------------------


@cache
def _load(case, tensor_parallel_size=1, path=None):
    path = path or HF_REFERENCE / case
    return load_model(path, load_config(path), "float32", make_mesh(tensor_parallel_size), use_tqdm=False)


def _leaves(model):
    return {path: np.asarray(v[...]) for path, v in nnx.to_flat_state(nnx.state(model))}


MIXTURES = ("gpt_oss", "mixtral", "qwen2_moe", "qwen3_moe")


@pytest.mark.parametrize("case", MIXTURES)
def test_saved_checkpoint_has_the_tensors_of_hugging_face(case, tmp_path):
    save_checkpoint(_load(case), load_config(HF_REFERENCE / case), tmp_path, dtype="bfloat16")
    expected, written = load_file(HF_REFERENCE / case / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert written.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(written[name], value)


def _stack(tensors, parts):
    """The tensors as transformers 5 holds them: all experts of a layer in one, gate and up joined."""
    gate, up, down = parts
    stacked = {}
    for name, value in tensors.items():
        if ".experts." not in name:
            stacked[name.replace(".block_sparse_moe.", ".mlp.")] = value
        elif name.endswith(f".0.{down}.weight"):
            module = name.removesuffix(f".0.{down}.weight")
            num_experts = sum(other.startswith(module) for other in tensors) // 3
            matrices = {p: [tensors[f"{module}.{e}.{p}.weight"] for e in range(num_experts)] for p in parts}
            module = module.replace(".block_sparse_moe.", ".mlp.")
            pairs = zip(matrices[gate], matrices[up], strict=True)
            stacked[f"{module}.gate_up_proj"] = np.stack([np.concatenate(pair) for pair in pairs])
            stacked[f"{module}.down_proj"] = np.stack(matrices[down])
    return stacked


@pytest.mark.parametrize("tensor_parallel_size", [1, 4])
@pytest.mark.parametrize(
    ("case", "parts"), [("mixtral", ("w1", "w3", "w2")), ("qwen3_moe", ("gate_proj", "up_proj", "down_proj"))]
)
def test_experts_stacked_in_one_tensor_are_the_same_weights(case, parts, tensor_parallel_size, tmp_path):
    (tmp_path / "config.json").write_bytes((HF_REFERENCE / case / "config.json").read_bytes())
    stacked = _stack(load_file(HF_REFERENCE / case / "model.safetensors"), parts)
    save_file(stacked, tmp_path / "model.safetensors", metadata={"format": "pt"})
    found = _leaves(_load(case, tensor_parallel_size, tmp_path))
    for path, value in _leaves(_load(case)).items():
        if tensor_parallel_size == 1 or {"k_proj", "v_proj"}.isdisjoint(path):  # KV heads are copied over 4 devices
            np.testing.assert_array_equal(found[path], value)


def test_missing_expert_is_named(tmp_path):
    (tmp_path / "config.json").write_bytes((HF_REFERENCE / "mixtral" / "config.json").read_bytes())
    tensors = load_file(HF_REFERENCE / "mixtral" / "model.safetensors")
    del tensors["model.layers.1.block_sparse_moe.experts.3.w3.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"'model\.layers\.1\.block_sparse_moe\.experts\.3\.w3\.weight'"):
        _load("mixtral", 1, tmp_path)


@pytest.mark.parametrize(
    ("case", "tensor_parallel_size", "share"),
    [
        ("qwen2_moe", 2, (3, 2, 12, 32)),  # whole experts
        ("mixtral", 2, (7, 2, 10, 32)),  # 7 experts: each device holds half the width of all
        ("mixtral", 4, (7, 2, 5, 32)),
        ("gpt_oss", 2, (3, 2, 20, 32)),
        ("gpt_oss_mxfp4", 4, (5, 2, 16, 32)),  # the share of a device starts within a block of MXFP4
    ],
)
def test_several_devices_give_the_logits_of_one(case, tensor_parallel_size, share):
    run = load_reference(case)[33]
    one, many = (
        teacher_forced_logits(_load(case, size), [run.prompt], [33], padded_len=33)
        for size in (1, tensor_parallel_size)
    )
    np.testing.assert_allclose(one, many, atol=1e-4, rtol=0)
    state = nnx.to_flat_state(nnx.state(_load(case, tensor_parallel_size)))
    [gate_up, *_] = [v[...] for path, v in state if path[-1] == "gate_up"]
    assert {shard.data.shape for shard in gate_up.addressable_shards} == {share}


def test_width_that_devices_cannot_split_is_refused_only_if_they_split_it():
    config = load_config(HF_REFERENCE / "mixtral")
    with pytest.raises(ValueError, match="intermediate_size=21 cannot be split over tensor_parallel_size=2"):
        random_model(replace(config, intermediate_size=21), "float32", make_mesh(2), 0)
    random_model(replace(config, intermediate_size=21, num_experts=6), "float32", make_mesh(2), 0)


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        ("mixtral", {"num_experts_per_tok": 8}, "num_experts_per_tok=8 is not valid: .* to num_experts=7"),
        ("mixtral", {"num_local_experts": 0}, "num_experts=0 is not valid"),
        ("qwen2_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step=0 is not valid"),
        ("qwen3_moe", {"moe_intermediate_size": 0}, "expert_size=0 is not valid"),
        ("gpt_oss", {"swiglu_limit": 0.0}, r"swiglu_limit=0\.0"),
        ("gpt_oss", {"quantization_config": {"quant_method": "gptq"}}, "gptq"),
        ("mixtral", {"quantization_config": {"quant_method": "mxfp4"}}, "mxfp4"),
    ],
)
def test_config_that_cannot_work_is_refused(case, changes, message, tmp_path):
    values = json.loads((HF_REFERENCE / case / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=rf"(?s)config\.json.*{message}"):
        load_config(tmp_path)


# MXFP4 ----------------------------------------------------------------------------------------------------------------

FP4_VALUES = (0, 0.5, 1, 1.5, 2, 3, 4, 6)


def test_blocks_of_mxfp4_hold_the_numbers_of_its_definition():
    codes = np.concatenate([np.arange(16), np.arange(16)[::-1]])  # every code, of which a byte holds two
    blocks = (codes[0::2] | codes[1::2] << 4).astype(np.uint8)[None]
    values = np.array([*FP4_VALUES, *(-value for value in FP4_VALUES)])[codes]
    for exponent in (-125, -3, 0, 1, 127 - 3):
        scales = np.array([exponent + 127], np.uint8)
        found = decode_mxfp4(jnp.asarray(blocks), jnp.asarray(scales), jnp.float32)
        np.testing.assert_array_equal(found, (values * 2.0**exponent).astype(np.float32))
    assert np.isnan(decode_mxfp4(jnp.asarray(blocks), jnp.array([255], jnp.uint8), jnp.float32)).all()


def test_each_block_of_mxfp4_has_its_own_scale_and_place():
    blocks = np.full((2, 3, 16), 0x2A, np.uint8)  # -1 and then 1
    scales = np.arange(127, 133, dtype=np.uint8).reshape(2, 3)
    found = decode_mxfp4(jnp.asarray(blocks), jnp.asarray(scales), jnp.bfloat16)
    assert found.dtype == jnp.bfloat16
    assert found.shape == (2, 96)
    expected = np.repeat(2.0 ** np.arange(6).reshape(2, 3), 32, axis=1) * np.tile([-1, 1], 48)[None]
    np.testing.assert_array_equal(found.astype(jnp.float32), expected)


def test_experts_in_mxfp4_are_written_as_numbers_and_load_back_equal(tmp_path):
    model, config = _load("gpt_oss_mxfp4"), load_config(HF_REFERENCE / "gpt_oss_mxfp4")
    assert config.dtype == "bfloat16"
    save_checkpoint(model, config, tmp_path, dtype="bfloat16")
    before, after = _leaves(model), _leaves(_load("gpt_oss_mxfp4", 1, tmp_path))
    for path, value in before.items():
        np.testing.assert_array_equal(value, after[path])


def test_packed_experts_of_another_type_are_refused(tmp_path):
    (tmp_path / "config.json").write_bytes((HF_REFERENCE / "gpt_oss_mxfp4" / "config.json").read_bytes())
    tensors = load_file(HF_REFERENCE / "gpt_oss_mxfp4" / "model.safetensors")
    name = "model.layers.0.mlp.experts.down_proj_scales"
    tensors[name] = tensors[name].astype(np.int8)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"{name} is stored as I8, .*: expected one of U8"):
        _load("gpt_oss_mxfp4", 1, tmp_path)
