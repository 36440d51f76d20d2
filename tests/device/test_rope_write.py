"""The kernel that norms, rotates and writes heads, in steps of models on the Hopper backend."""

from dataclasses import replace
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jpaged.device.backends import Backend, Rows, hopper
from jpaged.device.backends.hopper import HopperBackend
from jpaged.device.backends.xla import XlaBackend
from jpaged.device.kv import pool as kv_cache
from jpaged.device.kv.attend import PagedAttend
from jpaged.device.kv.pool import KVCache
from jpaged.models import LlamaConfig, Rope, fuse_projections, load_config, random_model
from jpaged.models.spec import Projected
from jpaged.sharding import make_mesh, pool_sharding
from pallas_kernels.rope_write import rope_write
from tests.support.oracles import HF_REFERENCE

LLAMA = LlamaConfig(
    architecture="LlamaForCausalLM",
    vocab_size=31,
    hidden_size=32,
    intermediate_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
    rope=Rope(16, 10000.0, 64),
)
NUM_TOKENS = 16  # the fewest whose summands the kernel adds
MOST_TOKENS = 512


@pytest.fixture(autouse=True)
def _turned_on(monkeypatch):
    monkeypatch.setattr(hopper, "ROPE_KERNEL_TO", MOST_TOKENS)


class WritesWithTheKernel(HopperBackend):
    """The Hopper backend, whose attention XLA computes: the interpreter would take minutes."""

    name: ClassVar[str] = "xla"


@pytest.fixture
def launches(monkeypatch) -> list[int]:
    """The numbers of summands of the kernel's launches, which are interpreted."""
    seen = []

    def interpreted(pool, layer, projected, *args):
        seen.append(len(projected))
        return rope_write(pool, layer, projected, *args, interpret=True)

    monkeypatch.setattr(kv_cache, "rope_write", interpreted)
    return seen


def logits_and_pool(model, backend: Backend, num_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Logits of one prompt, and the blocks that it has written."""
    spec = model.config.layer_specs[0]
    shape = {"num_blocks": 4, "num_kv_heads": spec.num_kv_heads, "head_dim": spec.head_dim, "block_size": 16}
    cache = KVCache.allocate(num_layers=model.config.num_layers, dtype=jnp.bfloat16, **shape)
    mesh = make_mesh(backend.num_devices)
    cache = jax.device_put(cache, pool_sharding(mesh))
    positions = jnp.arange(num_tokens, dtype=jnp.int32)
    rows = Rows(16 + positions, jnp.array([[1, 2, 3]], jnp.int32), jnp.array([num_tokens]), jnp.array([0, num_tokens]))

    @nnx.jit
    def run(model, cache, token_ids):
        attend = PagedAttend(cache, rows, backend)
        hidden = model(token_ids, positions, jnp.full_like(positions, num_tokens), attend)
        return model.logits(hidden), attend.cache.pool

    with jax.set_mesh(mesh):
        logits, pool = run(model, cache, 1 + positions % 30)
    return np.asarray(logits), np.asarray(pool[1:], np.float32)


def make_model(config, num_devices: int = 1):
    """A model in bfloat16, with joined projections, and with scales of norms that differ."""
    model = random_model(config, jnp.bfloat16, make_mesh(num_devices), seed=3)
    for path, param in nnx.to_flat_state(nnx.state(model)):
        if path[-1] == "scale":
            param[...] = param[...] + jnp.linspace(-0.5, 0.5, param[...].size, dtype=jnp.bfloat16)
    fuse_projections(model)
    return model


@pytest.mark.parametrize(
    ("config", "num_tokens", "expected"),
    [
        (LLAMA, NUM_TOKENS, [4, 4]),
        (LLAMA, NUM_TOKENS - 1, [1, 1]),
        (replace(LLAMA, architecture="Qwen3ForCausalLM", qk_norm=True), NUM_TOKENS, [4, 4]),
        (replace(LLAMA, architecture="Qwen2ForCausalLM", qkv_bias=True), NUM_TOKENS, [1, 1]),  # added after the sum
        (replace(LLAMA, hidden_size=30), NUM_TOKENS, [1, 1]),  # does not divide into 4 summands
        (replace(LLAMA, rope_layers=(True, False)), NUM_TOKENS, [4]),
        (replace(LLAMA, rope=Rope(16, 10000.0, 64, None, 0.5)), NUM_TOKENS, []),  # rotates half of each head
    ],
    ids=["llama", "few tokens", "norms", "bias", "odd sizes", "a layer without rope", "partial rope"],
)
def test_a_step_with_the_kernel_is_that_of_xla(launches, config, num_tokens, expected):
    model = make_model(config)
    (logits, pool), (right, right_pool) = (
        logits_and_pool(model, backend(""), num_tokens) for backend in (WritesWithTheKernel, XlaBackend)
    )
    assert launches == expected
    np.testing.assert_allclose(logits, right, atol=0.02 * np.abs(right).max(), rtol=0)
    np.testing.assert_allclose(pool, right_pool, atol=0.02 * np.abs(right_pool).max(), rtol=0)
    assert np.abs(right_pool).max() > 0


@pytest.mark.parametrize(("num_tokens", "num_summands"), [(NUM_TOKENS, 4), (1, 1)])
def test_each_device_takes_its_own_heads(monkeypatch, num_tokens, num_summands):
    """The heads of a device are neighbours in the joined projections: its queries, its K, then its V."""
    seen = []

    def interpreted(pool, layer, projected, *args):
        seen.append((pool.shape[3], projected.shape))
        return rope_write(pool, layer, projected, *args, interpret=True)

    monkeypatch.setattr(kv_cache, "rope_write", interpreted)
    model = make_model(replace(LLAMA, architecture="Qwen3ForCausalLM", qk_norm=True), num_devices=2)
    (logits, pool), (right, right_pool) = (
        logits_and_pool(model, backend("", num_devices=2), num_tokens) for backend in (WritesWithTheKernel, XlaBackend)
    )
    num_heads = 2 + 2 * 1  # half of the queries, and one head of each of K and V
    assert seen == [(1, (num_summands, num_tokens, num_heads * LLAMA.head_dim))] * LLAMA.num_layers
    np.testing.assert_allclose(logits, right, atol=0.02 * np.abs(right).max(), rtol=0)
    np.testing.assert_allclose(pool, right_pool, atol=0.02 * np.abs(right_pool).max(), rtol=0)


@pytest.mark.parametrize(("name", "expected"), [("gemma3", 4), ("olmo2", None)])
def test_norms_are_those_of_the_family(launches, name, expected):
    """Gemma 3 norms each head, with the scale less 1 as its parameter; OLMo 2 norms all heads of a token at once."""
    config = load_config(HF_REFERENCE / name)
    ropes = {field: getattr(config, field, None) for field in ("rope", "local_rope")}
    ropes = {field: replace(rope, head_dim=16) for field, rope in ropes.items() if rope is not None}
    model = make_model(replace(config, head_dim=16, **ropes))
    (logits, _), (right, _) = (
        logits_and_pool(model, backend(""), NUM_TOKENS) for backend in (WritesWithTheKernel, XlaBackend)
    )
    assert launches == ([] if expected is None else [expected] * config.num_layers)
    np.testing.assert_allclose(logits, right, atol=0.02 * np.abs(right).max(), rtol=0)


def projected(num_tokens: int, dtype=jnp.bfloat16, rotary_dim: int = 64) -> Projected:
    angles = [jnp.zeros((num_tokens, rotary_dim // 2))] * 2

    def summands(count: int):
        return jnp.zeros((count, num_tokens, 8 * 64))

    return Projected(jnp.zeros((num_tokens, 8 * 64), dtype), summands, *angles, None)


def a_cache(dtype=jnp.bfloat16) -> KVCache:
    return KVCache.allocate(num_blocks=2, num_layers=1, num_kv_heads=2, head_dim=64, block_size=8, dtype=dtype)


@pytest.mark.parametrize(
    ("num_tokens", "num_summands"),
    [(1, 1), (15, 1), (16, 4), (128, 4), (129, 1), (MOST_TOKENS, 1), (MOST_TOKENS + 1, None)],
)
def test_the_kernel_runs_for_steps_of_few_tokens(num_tokens, num_summands):
    unrotated = HopperBackend("").unrotated(a_cache(), projected(num_tokens))
    assert (None if unrotated is None else len(unrotated.summands)) == num_summands


@pytest.mark.parametrize(
    ("backend", "cache", "heads"),
    [
        (XlaBackend(""), a_cache(), projected(16)),
        (HopperBackend("", interpret=True), a_cache(), projected(16)),
        (HopperBackend(""), a_cache(jnp.int8), projected(16)),
        (HopperBackend(""), a_cache(jnp.float32), projected(16, jnp.float32)),
        (HopperBackend(""), a_cache(jnp.float16), projected(16)),
        (HopperBackend(""), a_cache(), projected(16, rotary_dim=32)),
    ],
    ids=["another backend", "interpreted", "8-bit pool", "float32", "another type of pool", "partial rope"],
)
def test_other_steps_stay_with_xla(backend, cache, heads):
    assert backend.unrotated(cache, heads) is None


def test_the_kernel_takes_small_steps_by_default(monkeypatch):
    monkeypatch.undo()
    assert HopperBackend("").unrotated(a_cache(), projected(16)) is not None
    assert HopperBackend("").unrotated(a_cache(), projected(2048)) is None
