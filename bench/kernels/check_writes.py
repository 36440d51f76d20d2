"""Writes into the block pool and copies of blocks on the device: what our kernels leave, against what XLA leaves."""

from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from bench.kernels.case import Case
from bench.kernels.compare import ROTATED, Results, compared_case
from jpaged.models.layers.common import rms_norm
from jpaged.models.layers.rope import rotate
from pallas_kernels import block_pool_shape, copy_blocks, kv_scales_shape, write_kv, write_kv_quantized
from pallas_kernels.norm import NormSpec
from pallas_kernels.rope_write import HeadNorms, rope_write

NUM_BLOCKS, NUM_LAYERS, LAYER, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM = 1500, 4, 1, 8, 16, 128
NUM_HEADS = 32
NUM_TOKENS = (1, 37, 256, 2048)
NUM_SUMMANDS = 4
NUM_COPIED = (1, 7, 64, 700)


def cases() -> dict[str, Callable[[Collection[str]], Case]]:
    """Functions from implementations to a case, by its name."""
    named = {f"copy_blocks_{count}": _case(partial(_make_copy, count), _copy) for count in NUM_COPIED}
    for num_tokens in NUM_TOKENS:
        named[f"write_kv_{num_tokens}"] = _case(partial(_make_write, num_tokens, "bfloat16"), _write)
        for dtype in ("float8_e4m3fn", "int8"):
            case = _case(partial(_make_write, num_tokens, dtype), _write_quantized, donated=(0, 1))
            named[f"write_kv_quantized_{num_tokens}_{dtype}"] = case
        for num_summands in (1, NUM_SUMMANDS):
            case = _case(partial(_make_projected, num_tokens, num_summands), _rope_write, error=ROTATED)
            named[f"rope_write_{num_tokens}_{num_summands}"] = case
    return named


def _case(
    make: Callable[[Array], tuple[Any, ...]],
    run: Callable[..., Results],
    *,
    donated: tuple[int, ...] = (0,),
    error: float = 0,
) -> Callable[[Collection[str]], Case]:
    """The case of a function that takes the implementation's name first."""
    return partial(compared_case, make, partial(run, "hopper"), partial(run, "xla"), donated=donated, error=error)


def _keys(seed: Array, count: int) -> Any:
    return jax.random.split(jax.random.key(seed, impl="rbg"), count)


def _make_pool(dtype: str) -> tuple[Array, ...]:
    """A pool of numbers, with scales if it is quantised."""
    shape = block_pool_shape(NUM_BLOCKS, NUM_LAYERS, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM)
    numbers = jax.random.normal(jax.random.key(0, impl="rbg"), shape, jnp.float32)
    if jnp.dtype(dtype).itemsize > 1:
        return (numbers.astype(dtype),)
    scales = jnp.full(kv_scales_shape(NUM_BLOCKS, NUM_LAYERS, NUM_KV_HEADS), 2.0**-6, jnp.float32)
    return (numbers * 30).astype(dtype), scales


def _make_copy(num_copied: int, seed: Array) -> tuple[Array, ...]:
    """A third of the list is padding."""
    blocks = jax.random.permutation(_keys(seed, 1)[0], jnp.arange(1, NUM_BLOCKS, dtype=jnp.int32))
    src, dst = (jnp.pad(ids, (0, num_copied // 2)) for ids in blocks[: 2 * num_copied].reshape(2, -1))
    return *_make_pool("bfloat16"), src, dst


def _make_slots(num_tokens: int, key: Any) -> Array:
    """Slots of decodes, and as many of prompts."""
    of_blocks, of_offsets = jax.random.split(key)
    blocks = jax.random.permutation(of_blocks, jnp.arange(1, NUM_BLOCKS, dtype=jnp.int32))
    num_decodes = num_tokens // 2
    offsets = jax.random.randint(of_offsets, (num_decodes,), 0, BLOCK_SIZE, jnp.int32)
    prompts = blocks[num_decodes:, None] * BLOCK_SIZE + jnp.arange(BLOCK_SIZE, dtype=jnp.int32)[None]
    return jnp.concatenate([blocks[:num_decodes] * BLOCK_SIZE + offsets, prompts.reshape(-1)])[:num_tokens]


def _make_write(num_tokens: int, dtype: str, seed: Array) -> tuple[Array, ...]:
    """Tokens of a pool. In a quantised pool some are larger than what their blocks hold."""
    of_slots, of_sizes, *of_kv = _keys(seed, 4)
    sizes = jax.random.choice(of_sizes, jnp.array([0.01, 1.0, 100.0]), (num_tokens, NUM_KV_HEADS, 1))
    shape = num_tokens, NUM_KV_HEADS, HEAD_DIM
    k, v = ((jax.random.normal(key, shape) * sizes).astype(jnp.bfloat16) for key in of_kv)
    return *_make_pool(dtype), k, v, _make_slots(num_tokens, of_slots)


def _make_projected(num_tokens: int, num_summands: int, seed: Array) -> tuple[Any, ...]:
    """A step's projected heads. Every other seed has padding: the last quarter of the tokens."""
    of_slots, of_tokens, of_angles, *of_scales = _keys(seed, 5)
    shape = num_summands, num_tokens, (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM
    projected = jax.random.normal(of_tokens, shape).astype(jnp.bfloat16 if num_summands == 1 else jnp.float32)
    angles = jax.random.uniform(of_angles, (num_tokens, HEAD_DIM // 2), maxval=6.0)
    scales = [jax.random.uniform(key, (HEAD_DIM,), minval=0.5, maxval=1.5).astype(jnp.bfloat16) for key in of_scales]
    is_padding = (jnp.arange(num_tokens) >= num_tokens - num_tokens // 4) & (seed % 2 == 1)
    slots = jnp.where(is_padding, 0, _make_slots(num_tokens, of_slots))
    return *_make_pool("bfloat16"), projected, (jnp.cos(angles), jnp.sin(angles)), slots, *scales


def _copy(implementation: str, pool: Array, src: Array, dst: Array) -> Results:
    return {"pool": copy_blocks(pool, src, dst, implementation=implementation)}


def _write(implementation: str, pool: Array, k: Array, v: Array, slots: Array) -> Results:
    return {"pool": write_kv(pool, LAYER, k, v, slots, implementation=implementation)}


def _write_quantized(implementation: str, pool: Array, scales: Array, k: Array, v: Array, slots: Array) -> Results:
    written = write_kv_quantized(pool, scales, LAYER, k, v, slots, implementation=implementation)
    return dict(zip(("pool", "scales"), written, strict=True))


def _rope_write(
    implementation: str,
    pool: Array,
    projected: Array,
    angles: tuple[Array, Array],
    slots: Array,
    q_scale: Array,
    k_scale: Array,
) -> Results:
    """The queries, the pool and its first block, which the kernel leaves as it is; "xla" is the way of models."""
    spec = NormSpec(1e-6)
    if implementation == "hopper":
        q, pool = rope_write(pool, LAYER, projected, angles, slots, HeadNorms(q_scale, k_scale, spec))
        return {"queries": q, "pool": pool, "first block": pool[0]}
    heads = jnp.sum(projected.astype(jnp.float32), axis=0).astype(pool.dtype)
    q, k, v = jnp.split(heads.reshape(len(slots), -1, HEAD_DIM), [NUM_HEADS, NUM_HEADS + NUM_KV_HEADS], axis=1)
    q, k = (rotate(rms_norm(x, scale, spec), *angles) for x, scale in ((q, q_scale), (k, k_scale)))
    return {"queries": q, "pool": write_kv(pool, LAYER, k, v, slots), "first block": pool[0]}
