"""Joined projections: the results and the communication of separate ones, at no more than a module's memory."""

import gc
import re
from collections import Counter
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jpaged.models import OPTConfig, fuse_projections, random_model
from jpaged.models.checkpoint.registry import abstract_model
from jpaged.models.layers import fused
from jpaged.models.layers.fused import GATE_UP, QKV, allocation_order
from jpaged.sharding import make_mesh, replicated
from tests.support.oracles import dense_attend, teacher_forced_logits
from tests.support.tiny import tiny_config

TINY = tiny_config(num_heads=6, head_dim=4, intermediate_size=12)
EVERYTHING = replace(
    TINY, num_heads=4, qkv_bias=True, o_bias=True, mlp_bias=True, qk_norm=True, tie_word_embeddings=True
)
OPT = OPTConfig(
    architecture="OPTForCausalLM",
    vocab_size=11,
    hidden_size=8,
    intermediate_size=12,
    num_layers=2,
    num_heads=2,
    num_kv_heads=2,
    head_dim=4,
    max_position_embeddings=32,
    word_embed_proj_dim=8,
)
CASES = {
    "plain": TINY,
    "everything": EVERYTHING,
    "opt": OPT,
    "opt without biases": replace(OPT, bias=False),
}


def _joined(model):
    """A copy of a model whose projections are joined."""
    model = nnx.clone(model)
    fuse_projections(model)
    return model


def _scrambled(config, tensor_parallel_size=1):
    """A model without a parameter of zeros or ones: each shows where it goes."""
    model = random_model(config, "float32", make_mesh(tensor_parallel_size), 0)
    state = nnx.state(model)
    keys = iter(jax.random.split(jax.random.key(1), len(jax.tree.leaves(state))))
    noise = jax.tree.map(lambda x: jax.device_put(0.3 * jax.random.normal(next(keys), x.shape), x.sharding), state)
    nnx.update(model, noise)
    return model


@pytest.mark.parametrize("tensor_parallel_size", [1, 2])
@pytest.mark.parametrize("config", CASES.values(), ids=CASES)
def test_joined_projections_give_the_same_logits(config, tensor_parallel_size):
    model = _scrambled(config, tensor_parallel_size)
    joined = _joined(model)
    names = {name for path, _ in nnx.to_flat_state(nnx.state(joined)) for name in path}
    assert not names & {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}
    prompt = np.arange(24, dtype=np.int32) % config.vocab_size
    expected, got = (teacher_forced_logits(m, [prompt], [24], padded_len=24) for m in (model, joined))
    np.testing.assert_allclose(got, expected, atol=1e-6 * np.abs(expected).max(), rtol=0)


def test_joined_projections_add_no_communication():
    model = _scrambled(EVERYTHING, 2)
    expected, got = (_collectives(m) for m in (model, _joined(model)))
    assert expected["all-reduce"] >= 2 * EVERYTHING.num_layers  # after attention, and after the feed-forward
    assert got == expected


def _collectives(model):
    """How often the compiled forward pass communicates, by kind."""
    tokens = jax.ShapeDtypeStruct((24,), jnp.int32, sharding=replicated(make_mesh(2)))
    graphdef, state = nnx.split(model)

    def forward(state, tokens):
        return nnx.merge(graphdef, state)(tokens, tokens, tokens, dense_attend())

    hlo = jax.jit(forward).lower(state, tokens).compile().as_text() or ""
    return Counter(re.findall(r"\b(all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)\(", hlo))


def test_each_device_holds_its_share_of_every_joined_projection():
    model = _scrambled(EVERYTHING, 2)
    joined = _joined(model)
    attention, qkv = model.model.layers[1].self_attn, joined.model.layers[1].self_attn.qkv_proj
    for leaf in ("kernel", "bias"):
        parts = [getattr(getattr(attention, name), leaf)[...] for name in ("q_proj", "k_proj", "v_proj")]
        shards = zip(*(part.addressable_shards for part in parts), strict=True)
        for shard, own in zip(getattr(qkv, leaf)[...].addressable_shards, shards, strict=True):
            np.testing.assert_array_equal(shard.data, np.concatenate([np.asarray(x.data) for x in own], axis=-1))


def test_joining_a_copy_leaves_the_model_alone_and_shares_the_rest():
    model = _scrambled(EVERYTHING)
    before = dict(nnx.to_flat_state(nnx.state(model)))
    joined = _joined(model)
    after = dict(nnx.to_flat_state(nnx.state(model)))
    assert before.keys() == after.keys()
    assert all(after[path][...] is variable[...] for path, variable in before.items())
    kept = {path: v for path, v in nnx.to_flat_state(nnx.state(joined)) if path in before}
    assert len(kept) == 2 + 8 * EVERYTHING.num_layers  # all norms, o_proj, down_proj and the embedding
    assert all(variable[...] is before[path][...] for path, variable in kept.items())


def test_joining_twice_changes_nothing():
    model = _joined(_scrambled(EVERYTHING))
    before = jax.tree.leaves(nnx.state(model))
    fuse_projections(model)
    assert all(a is b for a, b in zip(before, jax.tree.leaves(nnx.state(model)), strict=True))


def test_joining_keeps_at_most_one_modules_weights_twice(monkeypatch):
    model = _scrambled(replace(EVERYTHING, num_layers=5))
    most, join = 0, fused._join_params
    gc.collect()
    gc.freeze()  # what earlier tests left takes seconds to look through, each time

    def watched(*args):
        nonlocal most
        joined = join(*args)
        most = max(most, _live_bytes())
        return joined

    monkeypatch.setattr(fused, "_join_params", watched)
    before = _live_bytes()
    fuse_projections(model)
    largest = max(
        sum(x.nbytes for x in jax.tree.leaves(nnx.state(module)))
        for layer in model.model.layers
        for module in (layer.self_attn.qkv_proj, layer.mlp.gate_up_proj)
    )
    assert most == before + largest
    assert _live_bytes() == before


def _live_bytes():
    gc.collect()
    return sum(x.nbytes for x in jax.live_arrays())


def test_projections_that_are_spread_differently_stay_apart():
    """Keys and values on every device, say, because there is one head of them."""
    model = _scrambled(TINY, 2)
    attention = model.model.layers[0].self_attn
    for projection in (attention.k_proj, attention.v_proj):
        projection.kernel.set_value(jax.device_put(projection.kernel[...], replicated(make_mesh(2))))
    joined = _joined(model)
    assert hasattr(joined.model.layers[0].self_attn, "q_proj")
    assert hasattr(joined.model.layers[0].mlp, "gate_up_proj")
    prompt = np.arange(11, dtype=np.int32)
    expected, got = (teacher_forced_logits(m, [prompt], [11], padded_len=11) for m in (model, joined))
    np.testing.assert_allclose(got, expected, atol=1e-6 * np.abs(expected).max(), rtol=0)


@pytest.mark.parametrize("config", [EVERYTHING, OPT], ids=["llama", "opt"])
def test_what_will_be_joined_is_allocated_side_by_side(config):
    _, state = abstract_model(config, "float32", make_mesh())
    flat = list(nnx.to_flat_state(state))
    order = [path for path, _ in allocation_order(flat)]
    assert sorted(order, key=str) == sorted((path for path, _ in flat), key=str)
    for fusible in (QKV, GATE_UP):
        at = {}
        for index, path in enumerate(order):
            if path[-2] in fusible.parts:
                at.setdefault(path[:-2], []).append(index)
        assert all(indices[-1] - indices[0] == len(indices) - 1 for indices in at.values())
