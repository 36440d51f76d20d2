"""Writes into the block pool and copies of blocks on the device: the bits that our kernels leave, against XLA's.

Norms and rotations are rounded, so that their numbers are compared within a tolerance.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

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
NUM_REPEATS = 3
"""Runs of each kernel, each over other blocks: a race shows now and then."""

ROUNDING = 2.0**-3
"""Largest difference of numbers that are rounded in two ways: twice the last place of bfloat16 below 16."""

_Pools = tuple[Array, ...]


def cases() -> Iterator[tuple[str, Callable[[str], str | None]]]:
    """Names, and functions from the implementation to the problem found, if any."""
    for num_copied in NUM_COPIED:
        yield f"copy_blocks_{num_copied}", partial(_check, partial(_copied, num_copied), jnp.bfloat16)
    for num_tokens in NUM_TOKENS:
        yield f"write_kv_{num_tokens}", partial(_check, partial(_written, num_tokens), jnp.bfloat16)
        for dtype in (jnp.float8_e4m3fn, jnp.int8):
            name = f"write_kv_quantized_{num_tokens}_{jnp.dtype(dtype).name}"
            yield name, partial(_check, partial(_written, num_tokens), dtype)
        for num_summands in (1, NUM_SUMMANDS):
            write = partial(_rotated, num_tokens, num_summands)
            yield f"rope_write_{num_tokens}_{num_summands}", partial(_check, write, jnp.bfloat16, error=ROUNDING)


def _check(
    write: Callable[[_Pools, np.random.Generator, str], _Pools], dtype: Any, implementation: str, *, error: float = 0
) -> str | None:
    """Compare all blocks but the first, which kernels need not write: their bits, or their numbers within an error."""
    for seed in range(NUM_REPEATS):
        ours, right = (write(_pools(dtype), np.random.default_rng(seed), name) for name in (implementation, "xla"))
        for nth, (got, expected) in enumerate(zip(ours, right, strict=True)):
            num_wrong = int(_num_far(got, expected, error) if error else _num_different(got, expected))
            if num_wrong:
                name = ("pool", "queries" if error else "scales")[nth]
                return f"{num_wrong:,} of {got.size:,} elements of the {name} differ from XLA's"
    return None


@jax.jit
def _num_far(got: Array, expected: Array, error: float) -> Array:
    distance = jnp.abs(got[1:].astype(jnp.float32) - expected[1:].astype(jnp.float32))
    return jnp.sum(~(distance <= error))


@jax.jit
def _num_different(got: Array, expected: Array) -> Array:
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[got.dtype.itemsize]
    bits = (jax.lax.bitcast_convert_type(x[1:], unsigned) for x in (got, expected))
    return jnp.sum(jnp.not_equal(*bits))


def _pools(dtype: Any) -> _Pools:
    """A pool of numbers, with scales if it is quantised."""
    shape = block_pool_shape(NUM_BLOCKS, NUM_LAYERS, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM)
    numbers = jax.random.normal(jax.random.key(0), shape, jnp.float32)
    if jnp.dtype(dtype).itemsize > 1:
        return (numbers.astype(dtype),)
    pool = (numbers * 30).astype(dtype)
    return pool, jnp.full(kv_scales_shape(NUM_BLOCKS, NUM_LAYERS, NUM_KV_HEADS), 2.0**-6, jnp.float32)


def _copied(num_copied: int, pools: _Pools, rng: np.random.Generator, implementation: str) -> _Pools:
    """A third of the list is padding."""
    ids = rng.permutation(np.arange(1, NUM_BLOCKS))[: 2 * num_copied].reshape(2, -1)
    src, dst = (jnp.asarray(np.concatenate([part, np.zeros(num_copied // 2, int)]), jnp.int32) for part in ids)
    return (_copy(pools[0], src, dst, implementation=implementation),)


def _slots(num_tokens: int, rng: np.random.Generator) -> Array:
    """Slots of decodes, and as many of prompts."""
    blocks = rng.permutation(np.arange(1, NUM_BLOCKS))
    num_decodes = num_tokens // 2
    decodes = blocks[:num_decodes] * BLOCK_SIZE + rng.integers(0, BLOCK_SIZE, num_decodes)
    prompts = (blocks[num_decodes:, None] * BLOCK_SIZE + np.arange(BLOCK_SIZE)).reshape(-1)
    return jnp.asarray(np.concatenate([decodes, prompts])[:num_tokens], jnp.int32)


def _written(num_tokens: int, pools: _Pools, rng: np.random.Generator, implementation: str) -> _Pools:
    """Tokens of a quantised pool, some of which are larger than what their blocks hold; or those of another pool."""
    slots = _slots(num_tokens, rng)
    sizes = rng.choice([0.01, 1.0, 100.0], (num_tokens, NUM_KV_HEADS, 1))
    shape = (num_tokens, NUM_KV_HEADS, HEAD_DIM)
    k, v = (jnp.asarray(rng.standard_normal(shape) * sizes, jnp.bfloat16) for _ in range(2))
    if len(pools) == 1:
        return (_write(pools[0], k, v, slots, implementation=implementation),)
    return _write_quantized(*pools, k, v, slots, implementation=implementation)


def _rotated(
    num_tokens: int, num_summands: int, pools: _Pools, rng: np.random.Generator, implementation: str
) -> _Pools:
    """The pool, and the queries behind a first one that is not compared."""
    shape = (num_summands, num_tokens, (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM)
    projected = jnp.asarray(rng.standard_normal(shape), jnp.bfloat16 if num_summands == 1 else jnp.float32)
    angles = rng.uniform(0, 6, (num_tokens, HEAD_DIM // 2))
    cos_sin = jnp.asarray(np.cos(angles), jnp.float32), jnp.asarray(np.sin(angles), jnp.float32)
    q_scale, k_scale = (jnp.asarray(rng.uniform(0.5, 1.5, HEAD_DIM), jnp.bfloat16) for _ in range(2))
    run = _rope_write if implementation == "hopper" else _rope_write_plainly
    q, pool = run(pools[0], projected, cos_sin, _slots(num_tokens, rng), HeadNorms(q_scale, k_scale, NormSpec(1e-6)))
    return pool, jnp.pad(q, ((1, 0), (0, 0), (0, 0)))


@partial(jax.jit, donate_argnums=0)
def _rope_write(
    pool: Array, projected: Array, angles: tuple[Array, Array], slots: Array, norms: HeadNorms
) -> tuple[Array, Array]:
    return rope_write(pool, LAYER, projected, angles, slots, norms)


@partial(jax.jit, donate_argnums=0)
def _rope_write_plainly(
    pool: Array, projected: Array, angles: tuple[Array, Array], slots: Array, norms: HeadNorms
) -> tuple[Array, Array]:
    """The kernel's work in the way of models on other backends."""
    heads = jnp.sum(projected.astype(jnp.float32), axis=0).astype(pool.dtype)
    q, k, v = jnp.split(heads.reshape(len(slots), -1, HEAD_DIM), [NUM_HEADS, NUM_HEADS + NUM_KV_HEADS], axis=1)
    q, k = (rotate(rms_norm(x, scale, norms.spec), *angles) for x, scale in ((q, norms.q_scale), (k, norms.k_scale)))
    return q, write_kv(pool, LAYER, k, v, slots)


_copy = jax.jit(copy_blocks, static_argnames="implementation", donate_argnums=0)


@partial(jax.jit, static_argnames="implementation", donate_argnums=0)
def _write(pool: Array, k: Array, v: Array, slots: Array, *, implementation: str) -> Array:
    return write_kv(pool, LAYER, k, v, slots, implementation=implementation)


@partial(jax.jit, static_argnames="implementation", donate_argnums=(0, 1))
def _write_quantized(pool: Array, scales: Array, k: Array, v: Array, slots: Array, *, implementation: str) -> _Pools:
    return write_kv_quantized(pool, scales, LAYER, k, v, slots, implementation=implementation)
