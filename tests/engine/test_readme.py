"""The README's examples run, and compute what attention without a cache computes."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest

README = (Path(__file__).parents[2] / "README.md").read_text()
EXAMPLES = {
    "nnx": next(code for code in re.findall(r"```python\n(.*?)```", README, re.S) if "import nnx" in code),
    "linen": next(code for code in re.findall(r"```python\n(.*?)```", README, re.S) if "import linen" in code),
}


def causal_attention(q, k, v) -> np.ndarray:
    """[tokens, heads, head_dim] in float64, without a cache."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(q.shape[-1])
    scores = np.where(np.tri(len(q), dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("hqk,khd->qhd", weights / weights.sum(-1, keepdims=True), v)


@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_examples_are_short(name):
    assert EXAMPLES[name].count("\n") <= 40


def test_nnx_example_equals_dense_attention():
    found = {}
    exec(EXAMPLES["nnx"], found)
    layer, x = found["attention"], found["x"]
    # Both sequences continue the same prompt, each with its own next token.
    for row, tokens in enumerate((x[:41], np.concatenate([x[:40], x[41:]]))):
        q, k, v = (np.asarray(project(tokens)).reshape(-1, *layer.heads) for project in (layer.q, layer.k, layer.v))
        dense = np.asarray(layer.out(causal_attention(q, k, v).reshape(tokens.shape).astype(np.float32)))
        np.testing.assert_allclose(found["prompt"], dense[:40], atol=1e-4)
        np.testing.assert_allclose(found["decode"][row], dense[40], atol=1e-4)
    found["blocks"].check_invariants()
    assert found["blocks"].stats().num_shared == 2, "40 tokens are two full blocks and a last one that was copied"


def test_linen_example_equals_dense_attention():
    found = {}
    exec(EXAMPLES["linen"], found)
    weights, x = jax.tree.map(np.asarray, found["params"]["params"]), found["x"]
    q, k, v = (np.einsum("tf,fhd->thd", x, weights[n]["kernel"]) + weights[n]["bias"] for n in "qkv")
    dense = causal_attention(q, k, v).reshape(x.shape) @ weights["out"]["kernel"] + weights["out"]["bias"]
    np.testing.assert_allclose(found["prompt"], dense[:20], atol=1e-4)
    np.testing.assert_allclose(found["decode"], dense[20:], atol=1e-4)


def test_ci_finds_the_test_command():
    commands = [line for line in README.splitlines() if line.endswith("bin/pytest")]
    assert len(commands) == 1
