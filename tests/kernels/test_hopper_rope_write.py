"""The Hopper kernel that norms, rotates and writes heads, in Pallas's interpreter, watched for races, against XLA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental.pallas import mosaic_gpu as plgpu

from jpaged.models.layers.common import RMSNorm, ShiftedRMSNorm, WideRMSNorm
from jpaged.models.layers.rope import rotate
from pallas_kernels import block_pool_shape, write_kv
from pallas_kernels.chips import here
from pallas_kernels.norm import NormSpec
from pallas_kernels.rope_write import HeadNorms, rope_write, why_not_rope_write
from pallas_kernels.rope_write.hopper import rope_write_hopper

pytestmark = pytest.mark.usefixtures("no_races")

WATCHED = plgpu.InterpretGPUParams(detect_races=True)
NUM_BLOCKS, NUM_LAYERS, LAYER, BLOCK_SIZE = 6, 3, 1, 8
EPSILON = 0.25  # large enough to be missed


def bits(array) -> np.ndarray:
    array = np.asarray(array)
    return array.view(np.dtype(f"u{array.dtype.itemsize}"))


def nan_pool(num_kv_heads: int, head_dim: int, dtype) -> np.ndarray:
    """A pool of NaNs that all differ, so that a moved NaN shows."""
    shape = block_pool_shape(NUM_BLOCKS, NUM_LAYERS, num_kv_heads, BLOCK_SIZE, head_dim)
    exponents = bits(np.full((), np.inf, dtype))
    return (exponents | (1 + np.arange(np.prod(shape)) % 63).astype(exponents.dtype)).reshape(shape).view(dtype)


def random_heads(num_summands: int, num_tokens: int, num_features: int, dtype) -> jax.Array:
    rng = np.random.default_rng(0)
    numbers = rng.standard_normal((num_summands, num_tokens, num_features), np.float32)
    return jnp.asarray(numbers).astype(dtype if num_summands == 1 else jnp.float32)


def random_angles(num_tokens: int, half: int) -> tuple[jax.Array, jax.Array]:
    angles = np.random.default_rng(1).uniform(0, 6, (num_tokens, half)).astype(np.float32)
    return jnp.cos(angles), jnp.sin(angles)


def make_norms(kind, head_dim: int, dtype) -> list:
    """Norms of queries and of keys, as models have them, with scales that differ."""
    norms = [kind(head_dim, EPSILON, dtype=dtype, rngs=nnx.Rngs(0)) for _ in range(2)]
    for seed, norm in enumerate(norms):
        norm.scale[...] = jnp.asarray(np.random.default_rng(seed).standard_normal(head_dim), dtype)
    return norms


def arguments_of(norms: list) -> HeadNorms | None:
    if not norms:
        return None
    return HeadNorms(*[norm.scale[...] for norm in norms], norms[0].spec)


def by_xla(pool, projected, angles, slots, norms, layer=LAYER):
    """Each operation by itself, as models have them."""
    num_kv_heads, head_dim = pool.shape[3], pool.shape[5]
    heads = jnp.sum(projected, axis=0).astype(pool.dtype).reshape(projected.shape[1], -1, head_dim)
    q, k, v = jnp.split(heads, [heads.shape[1] - 2 * num_kv_heads, heads.shape[1] - num_kv_heads], axis=1)
    if norms:
        q, k = norms[0](q), norms[1](k)
    return rotate(q, *angles), write_kv(pool, layer, rotate(k, *angles), v, slots)


def assert_close(got, expected, dtype) -> None:
    """Sums may be rounded in another order, so that a number may be rounded to the next one."""
    expected = np.asarray(expected, np.float32)
    np.testing.assert_allclose(np.asarray(got, np.float32), expected, rtol=float(jnp.finfo(dtype).eps), atol=1e-5)


def check(slots: list[int], num_heads: int, num_kv_heads: int, head_dim: int, dtype, *, kind=None, num_summands=1):
    """Queries, K and V are XLA's, in the slots of blocks from 1 on; all else holds what it held."""
    pool = nan_pool(num_kv_heads, head_dim, dtype)
    projected = random_heads(num_summands, len(slots), (num_heads + 2 * num_kv_heads) * head_dim, dtype)
    angles, at = random_angles(len(slots), head_dim // 2), jnp.asarray(slots, jnp.int32)
    norms = [] if kind is None else make_norms(kind, head_dim, dtype)
    q, written = rope_write_hopper(
        jnp.array(pool), LAYER, projected, angles, at, arguments_of(norms), interpret=WATCHED
    )
    expected_q, expected = by_xla(jnp.array(pool), projected, angles, at, norms)
    assert q.dtype == written.dtype == dtype
    assert_close(q, expected_q, dtype)
    is_written = np.zeros(pool.shape, bool)
    for slot in slots:
        block, offset = divmod(slot, BLOCK_SIZE)
        if 1 <= block < NUM_BLOCKS:
            is_written[block, LAYER, :, :, offset] = True
    np.testing.assert_array_equal(bits(written)[~is_written], bits(pool)[~is_written])
    assert_close(np.asarray(written)[is_written], np.asarray(expected)[is_written], dtype)
    v, expected_v = (np.asarray(x)[:, :, 1][is_written[:, :, 1]] for x in (written, expected))
    np.testing.assert_array_equal(bits(v), bits(expected_v))


SLOTS = [NUM_BLOCKS * BLOCK_SIZE - 1, 0, BLOCK_SIZE, 2 * BLOCK_SIZE - 1]
"""The pool's last slot, padding, and the first and last slot of a block."""


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "dtype", "options"),
    [
        (4, 2, 128, jnp.bfloat16, {}),
        (4, 2, 128, jnp.bfloat16, {"kind": RMSNorm}),
        (2, 1, 128, jnp.float16, {"kind": WideRMSNorm, "num_summands": 3}),
        (2, 2, 256, jnp.bfloat16, {"kind": ShiftedRMSNorm}),
        (4, 1, 64, jnp.bfloat16, {"num_summands": 4, "kind": RMSNorm}),
        (14, 2, 64, jnp.float16, {}),  # tiles of 2 heads
        (3, 3, 80, jnp.bfloat16, {"kind": RMSNorm}),  # tiles of a head; 5 vectors a lane
        (8, 8, 96, jnp.float16, {}),
        (5, 1, 16, jnp.bfloat16, {"num_summands": 2}),
        (64, 16, 64, jnp.bfloat16, {}),  # several tiles of queries
        (48, 2, 48, jnp.bfloat16, {}),
    ],
)  # fmt: skip
def test_heads_are_those_of_xla_and_nothing_else_changes(num_heads, num_kv_heads, head_dim, dtype, options):
    check(SLOTS, num_heads, num_kv_heads, head_dim, dtype, **options)


def test_slots_of_block_0_and_outside_the_pool_write_nothing():
    check([-1, 48, 2**31 - 1, -(2**31), 0, 7, 20], 2, 1, 32, jnp.bfloat16)


@pytest.mark.parametrize("layer", [0, 2])
def test_every_layer_has_its_own_place(layer):
    pool, projected = jnp.asarray(nan_pool(2, 32, jnp.bfloat16)), random_heads(1, 2, 6 * 32, jnp.bfloat16)
    angles, slots = random_angles(2, 16), jnp.asarray([9, 20], jnp.int32)
    _, written = rope_write(pool, layer, projected, angles, slots, interpret=True)
    _, expected = by_xla(pool, projected, angles, slots, [], layer)
    np.testing.assert_array_equal(bits(written), bits(expected))


def arguments(*, dtype=jnp.bfloat16, head_dim=32, rotary_dim=None, num_tokens=3) -> dict:
    shape = block_pool_shape(NUM_BLOCKS, NUM_LAYERS, 2, BLOCK_SIZE, head_dim)
    angles = random_angles(num_tokens, (rotary_dim or head_dim) // 2)
    return {
        "pool": jnp.zeros(shape, dtype),
        "layer": LAYER,
        "projected": jnp.zeros((1, num_tokens, 6 * head_dim), dtype),
        "angles": angles,
        "slots": jnp.zeros(num_tokens, jnp.int32),
    }


def test_without_a_hopper_gpu_the_kernel_says_so():
    assert here.why_no_hopper() is not None
    with pytest.raises(NotImplementedError, match="need an NVIDIA GPU, not cpu; norm, rotate and write in plain JAX"):
        rope_write(**arguments())


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"dtype": jnp.float32}, "heads of float32: the kernel takes bfloat16 and float16"),
        ({"head_dim": 24}, "head_dim=24: expected a multiple of 16"),
        ({"head_dim": 512}, "head_dim=512: .* at most 256"),
        ({"rotary_dim": 16}, "16 of 32 features of a head are rotated: the kernel rotates all"),
    ],
)
def test_heads_that_the_kernel_cannot_take_are_refused(options, reason):
    with pytest.raises(NotImplementedError, match=reason):
        rope_write(**arguments(**options), interpret=True)


def test_a_pool_of_another_type_than_the_heads_is_refused():
    types = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.int8)
    assert "a pool of int8" in (why_not_rope_write(128, 128, *types) or "")
    assert why_not_rope_write(128, 128, types[0], types[0]) is None


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"layer": 3}, "layer=3: expected 0 to 2"),
        ({"projected": jnp.zeros((3, 192), jnp.bfloat16)}, r"projected has shape \(3, 192\): expected \[summands, "),
        ({"projected": jnp.zeros((1, 2, 192), jnp.bfloat16)}, "of 3 tokens, as many as slots"),
        (
            {"projected": jnp.zeros((1, 3, 191), jnp.bfloat16)},
            "191 projected features: expected those of query",
        ),
        ({"projected": jnp.zeros((1, 3, 128), jnp.bfloat16)}, "128 projected features: expected those of query heads"),
        ({"projected": jnp.zeros((2, 3, 192), jnp.bfloat16)}, "2 summands of bfloat16: expected one of bfloat16"),
        ({"projected": jnp.zeros((1, 3, 192), jnp.float16)}, "1 summands of float16: expected one of bfloat16"),
        ({"angles": random_angles(2, 16)}, r"float32\[2, 16\].*expected cosine and sine of 3 tokens"),
        (
            {"norms": HeadNorms(jnp.zeros(32), jnp.zeros(16), NormSpec(1e-6))},
            r"scale of shape \(16,\): expected \(32,\)",
        ),
        ({"pool": jnp.zeros(block_pool_shape(2, 3, 2, 8, 32), jnp.int8)}, "came without kv_scales"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        rope_write(**arguments() | changed, interpret=True)


@pytest.mark.parametrize(
    ("num_tokens", "num_heads", "num_kv_heads", "head_dim", "dtype", "num_summands", "has_norms"),
    [
        (1, 32, 8, 128, jnp.bfloat16, 1, False),
        (16, 16, 8, 128, jnp.bfloat16, 4, True),  # Qwen3-0.6B
        (2048, 32, 8, 128, jnp.bfloat16, 1, False),
        (16, 4, 1, 128, jnp.float16, 4, False),
        (64, 14, 2, 64, jnp.bfloat16, 1, False),
        (64, 32, 32, 80, jnp.bfloat16, 1, True),
        (64, 32, 32, 96, jnp.bfloat16, 4, False),
        (512, 32, 16, 256, jnp.float16, 1, True),
        (3, 1, 1, 16, jnp.bfloat16, 1, False),
    ],
)
def test_compiles_for_the_gpu_at_real_sizes(
    num_tokens, num_heads, num_kv_heads, head_dim, dtype, num_summands, has_norms, monkeypatch
):
    monkeypatch.setattr(here, "why_no_hopper", lambda: None)
    num_layers = 32
    abstract = jax.ShapeDtypeStruct
    norms = HeadNorms(*[abstract((head_dim,), dtype)] * 2, NormSpec(1e-6)) if has_norms else None

    def write_layers(pool, projected, angles, slots, norms):
        for layer in range(num_layers):
            q, pool = rope_write(pool, layer, projected, angles, slots, norms)
            projected = projected.at[:, :, : q[0].size].add(q.reshape(num_tokens, -1).astype(projected.dtype)[None])
        return projected, pool

    features, half = (num_heads + 2 * num_kv_heads) * head_dim, abstract((num_tokens, head_dim // 2), jnp.float32)
    traced = jax.jit(write_layers, donate_argnums=0).trace(
        abstract(block_pool_shape(20_000, num_layers, num_kv_heads, 16, head_dim), dtype),
        abstract((num_summands, num_tokens, features), dtype if num_summands == 1 else jnp.float32),
        (half, half),
        abstract((num_tokens,), jnp.int32),
        norms,
    )
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu") == 1, "layers share one kernel"
    assert "output_operand_aliases = [#stablehlo.output_operand_alias" in text, "the pool is written in place"
