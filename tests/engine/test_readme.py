"""The documents: their examples run and compute what attention without a cache computes; links, tables and figures."""

import json
import re
from dataclasses import MISSING
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from bench.peers import SERVING
from bench.report import RESULTS
from jpaged import BeamSearchParams, EngineConfig, SamplingParams
from jpaged.rules import settings_of
from jpaged.server.protocol.sampling import MAX_CHARACTERS, MAX_STOP_TOKEN_IDS

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "jpaged" / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
README = (ROOT / "README.md").read_text()
LIBRARY = (DOCS / "library.md").read_text()


def examples(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page, re.S)


def example(sign: str) -> str:
    """The one example of the library page with this text in it."""
    [code] = [code for code in examples(LIBRARY) if sign in code]
    return code


def rows(page: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line[:1] == "|"]


def causal_attention(q, k, v) -> np.ndarray:
    """[tokens, heads, head_dim] in float64, without a cache."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(q.shape[-1])
    scores = np.where(np.tri(len(q), dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("hqk,khd->qhd", weights / weights.sum(-1, keepdims=True), v)


@pytest.mark.parametrize("name", ["nnx", "linen"])
def test_examples_are_short(name):
    for code in examples(LIBRARY):
        if f"import {name}" in code or f"import linen as {name}" in code:
            assert code.count("\n") <= 40


def test_readme_shows_an_example_of_the_library_page():
    assert example("copies = blocks.append") in examples(README)


@pytest.fixture(scope="module")
def nnx_example():
    """The names that the example leaves; ``num_traces`` counts how often its layer was traced."""
    found = {"num_traces": 0}

    def count():
        found["num_traces"] += 1

    found["count"] = count
    exec(example("copies = blocks.append").replace("q, k, v = (layer", "count()\n        q, k, v = (layer"), found)
    return found


def test_nnx_example_equals_dense_attention(nnx_example):
    found = nnx_example
    layer, x = found["attention"], found["x"]
    # Both sequences continue the same prompt, each with its own next token.
    for row, tokens in enumerate((x[:41], np.concatenate([x[:40], x[41:]]))):
        q, k, v = (np.asarray(project(tokens)).reshape(-1, *layer.heads) for project in (layer.q, layer.k, layer.v))
        dense = np.asarray(layer.out(causal_attention(q, k, v).reshape(tokens.shape).astype(np.float32)))
        np.testing.assert_allclose(found["prompt"], dense[:40], atol=1e-4)
        np.testing.assert_allclose(found["decode"][row], dense[40], atol=1e-4)
    found["blocks"].check_invariants()
    assert found["blocks"].stats().num_shared == 2, "40 tokens are two full blocks and a last one that was copied"


def test_nnx_example_compiles_once_and_copies_in_place(nnx_example):
    assert nnx_example["num_traces"] == 1, "prompts and decodes share one program"
    cache, indices = nnx_example["cache"], np.array([1])
    compiled = nnx_example["copy"].lower(cache, indices, indices).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < cache.pool.nbytes / 2
    assert compiled.memory_analysis().alias_size_in_bytes >= cache.pool.nbytes


def test_linen_example_equals_dense_attention():
    found = {}
    exec(example("import linen"), found)
    weights, x = jax.tree.map(np.asarray, found["params"]["params"]), found["x"]
    q, k, v = (np.einsum("tf,fhd->thd", x, weights[n]["kernel"]) + weights[n]["bias"] for n in "qkv")
    dense = causal_attention(q, k, v).reshape(x.shape) @ weights["out"]["kernel"] + weights["out"]["bias"]
    np.testing.assert_allclose(found["prompt"][:20], dense[:20], atol=1e-4)
    np.testing.assert_allclose(found["decode"][:1], dense[20:], atol=1e-4)


def test_training_example_has_gradients_and_equals_the_cache(nnx_example):
    found = {}
    exec(example("value_and_grad"), found)
    for gradient in jax.tree.leaves(found["gradients"]):
        assert np.isfinite(gradient).all()
    assert np.abs(found["gradients"].q.kernel).max() > 0
    batch = nnx_example["blocks"].batch([("a", 0, 40)], num_tokens=40, num_rows=1, max_blocks=3)
    attention, x = found["attention"], found["x"]
    out, _ = nnx.jit(found["paged_step"])(attention, nnx_example["cache"], x, *batch)
    np.testing.assert_allclose(out, attention(x, found["dense_attend"]), atol=1e-4)


def test_own_model_example_generates():
    found = {}
    [code] = [code for code in examples((DOCS / "models.md").read_text()) if "from_model" in code]
    exec(code, found)
    assert len(found["output"].outputs[0].token_ids) == 8


def test_example_of_several_devices_shards_the_pool_by_heads():
    found = {}
    exec(example("AxisType.Auto"), found)
    pool = found["cache"].pool
    assert pool.sharding.shard_shape(pool.shape)[3] == 8 // jax.device_count()


def test_rooms_of_the_architecture_page_exist():
    [tree] = re.findall(r"```\n(jpaged/\n.*?)```", (DOCS / "architecture.md").read_text(), re.S)
    around: dict[int, Path] = {}
    for line in tree.splitlines():
        depth = len(line) - len(line.lstrip())
        folder = around.get(depth - 2, ROOT)
        for name in re.match(r" *((?:[\w.]+(?:\.py|/) ?)+)", line)[1].split():
            assert (folder / name).exists(), folder / name
            around[depth] = folder / name


def test_pool_over_explicit_axes_is_refused():
    code = example("AxisType.Auto").replace("AxisType.Auto", "AxisType.Explicit")
    with pytest.raises(ValueError, match=r"Explicit.*expected Auto"):
        exec(code, {})


def test_divergence_of_8_bit_pools_is_that_of_the_result_file():
    pools = json.loads((RESULTS / "kv_quantization.json").read_text())["pools"]
    said = f"{pools['int8']['mean']:.4f} for int8 and {pools['fp8']['mean']:.4f} for fp8"
    assert said in (DOCS / "serving.md").read_text()
    said = f"have a mean KL divergence of {pools['int8 on the host']['decodes']:.4f} nats"
    assert said in (DOCS / "offload.md").read_text()
    kept, computed = (
        {name: f"{pools[name + of]['mean']:.4f}" for name in ("int8", "fp8")} for of in ("", ", activations")
    )
    said = f"from {kept['int8']} to {computed['int8']} nats in int8, and from {kept['fp8']} to {computed['fp8']} in fp8"
    assert said in " ".join((DOCS / "offload.md").read_text().split())


def test_readme_is_short():
    assert len(README.encode()) <= 8192


def test_ci_finds_the_test_command():
    commands = [line for line in README.splitlines() if line.endswith("bin/pytest")]
    assert len(commands) == 1


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_resolve(page):
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if not link.startswith("https://"):
            assert (page.parent / link).exists(), link


def test_every_page_is_linked_from_the_readme_or_another_page():
    linked = {Path(link).name for page in PAGES for link in re.findall(r"\]\(([^)]+)\)", page.read_text())}
    assert {page.name for page in PAGES} - linked <= {"README.md"}


def settings_rows(cls) -> list[str]:
    """The table of a class of settings."""
    lines = []
    for each in settings_of(cls).values():
        default = "required" if each.default is MISSING else f"`{each.default!r}`"
        meaning = each.help.replace("``", "`") + (f"; default: {each.unset}".replace("``", "`") if each.unset else "")
        lines.append(f"| `{each.name}` | {default} | {meaning} |")
    return lines


@pytest.mark.parametrize("cls", [EngineConfig, SamplingParams, BeamSearchParams])
def test_settings_are_those_of_the_code(cls):
    [section] = [part for part in (DOCS / "settings.md").read_text().split("\n## ") if f"`{cls.__name__}`\n" in part]
    expected = settings_rows(cls)
    shown = [line for line in section.splitlines() if line.startswith("| `")]
    assert shown == expected, "the table in jpaged/docs/settings.md has to be:\n" + "\n".join(expected)


def test_bounds_of_the_server_are_those_of_the_code():
    text = " ".join((DOCS / "settings.md").read_text().split())
    assert f"`stop` and `bad_words` have at most {MAX_CHARACTERS} characters each" in text
    assert f"`stop_token_ids` at most {MAX_STOP_TOKEN_IDS} entries" in text


def test_table_of_tpus_is_that_of_the_measurements():
    shown = [row for row in rows((DOCS / "tpu.md").read_text()) if " x v" in row[1]]
    assert shown
    assert shown == [row for row in rows((RESULTS.parent / "README.md").read_text()) if " x v" in row[1]]


MEASURED = {
    "decode step, batch 1, 1k context, ms": ("decode_1_ms", 2),
    "decode step, batch 256, ms": ("decode_256_ms", 2),
    "prefill of 32 prompts of 1024 tokens, s": ("prefill32_s", 3),
    "1,000 requests of ShareGPT lengths, tokens/s": ("sharegpt1000_tokens_per_s", 0),
    "64 beam searches of width 4, beam tokens/s": ("beam4_64x64_tokens_per_s", 0),
    "start-up, cold, s": ("startup_s", 0),
}
"""Row of the README's table -> its figure, and its decimals."""


def test_figures_are_those_of_the_result_files():
    names = "serving_llama3-8b_nvidia-h200.json", "serving_llama3-8b_1024rows_nvidia-h200.json"
    beams, own_settings = (json.loads((RESULTS / name).read_text())["figures"] for name in names)
    ours = beams | own_settings
    table = {row[0]: row[1:] for row in rows(README)}
    for title, (name, decimals) in MEASURED.items():
        values = [ours[name]["value"], *(peer["figures"]["llama3-8b"][name] for peer in SERVING.values())]
        assert table[title] == [f"{value:,.{decimals}f}" for value in values], title
    assert table[""] == ["jpaged", *SERVING]
    text = " ".join(README.split())
    for peer in SERVING.values():
        for setting in re.findall(r"\w+=\w+|1,024 rows|16,384 tokens", peer["settings"]):
            assert setting in text, setting
