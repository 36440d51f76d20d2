"""The README's examples run, and compute what attention without a cache computes."""

import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest

README_PATH = Path(__file__).parents[1] / "README.md"
README = README_PATH.read_text()
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


def test_measured_figures_are_those_of_the_result_files():
    results = README_PATH.parent / "bench" / "results"
    demo = json.loads((results / "serving_demo_cpu.json").read_text())
    batching, waste = demo["continuous_batching"], demo["waste"]
    shown = [
        f"{batching['one_at_a_time_tokens_per_s']:.0f} tokens/s",
        f"{batching['batched_tokens_per_s']:,.0f} tokens/s, **{batching['ratio']:.1f} times**",
        f"{waste['mean_percent']:.1f}% (at most {waste['max_percent']:.1f}% in any step)",
    ]
    for text in shown:
        assert text in README
    llama = json.loads((results / "serving_llama3-8b_nvidia-h200.json").read_text())
    shown_rows = [tuple(cell.strip() for cell in line.split("|")[2:6]) for line in README.splitlines() if "| " in line]
    for name, figure in llama["figures"].items():
        *_, unit = name.removesuffix("_per_s").rpartition("_")
        unit += "/s" * name.endswith("_per_s")

        def show(value, unit=unit):
            return "" if value is None else (f"{value:,.0f}" if value >= 100 else f"{value:.3g}") + f" {unit}"

        row = (show(figure["value"]), show(figure["peer"]), f"{figure['ratio_to_peer']:.2f}", show(figure["floor"]))
        assert row in shown_rows, name
    limits = llama["limits"]
    assert f"({limits['read_bytes_per_s'] / 1e12:.2f} TB/s)" in README
    assert f"({limits['matmul_flops_per_s'] / 1e12:.0f} TFLOP/s)" in README
