"""Mixture of experts: routing, every way to compute the experts, and their parameters in checkpoints."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpaged.models.layers.moe import ActivatedGate, Weights, all_experts, chosen_experts, route

GATED = ActivatedGate("silu")


def _weights(rng, num_experts=6, ffn=5, hidden=8, *, bias):
    def draw(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    biases = (draw(num_experts, 2, ffn), draw(num_experts, hidden)) if bias else (None, None)
    return Weights(draw(num_experts, 2, ffn, hidden), draw(num_experts, ffn, hidden), *biases)


def _one_by_one(x, routes, weights):
    """The definition: a loop over tokens and over the experts of each."""
    gate_up, down, gate_up_bias, down_bias = (None if w is None else np.asarray(w, np.float64) for w in weights)
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
@pytest.mark.parametrize("experts", [chosen_experts, all_experts])
def test_experts_equal_a_loop_over_tokens(experts, bias):
    rng = np.random.default_rng(0)
    (x, routes), weights = _inputs(rng), _weights(rng, bias=bias)
    np.testing.assert_allclose(experts(x, routes, weights, GATED), _one_by_one(x, routes, weights), atol=1e-4)


@pytest.mark.parametrize("experts", [chosen_experts, all_experts])
def test_token_does_not_depend_on_others_that_are_not_finite(experts):
    rng = np.random.default_rng(1)
    (x, routes), weights = _inputs(rng), _weights(rng, bias=False)
    alone = experts(x, routes, weights, GATED)
    broken = experts(x.at[2].set(jnp.nan).at[4].set(jnp.inf), routes, weights, GATED)
    kept = np.array([0, 1, 3, 5, 6])
    np.testing.assert_array_equal(broken[kept], alone[kept])


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
