"""Writes into the block pool and copies of blocks on the device: the bits that our kernels leave, against XLA's."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from pallas_kernels import block_pool_shape, copy_blocks, kv_scales_shape, write_kv, write_kv_quantized

NUM_BLOCKS, NUM_LAYERS, LAYER, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM = 1500, 4, 1, 8, 16, 128
NUM_TOKENS = (1, 37, 256, 2048)
NUM_COPIED = (1, 7, 64, 700)
NUM_REPEATS = 3
"""Runs of each kernel, each over other blocks: a race shows now and then."""

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


def _check(write: Callable[[_Pools, np.random.Generator, str], _Pools], dtype: Any, implementation: str) -> str | None:
    """Compare the bits of all blocks but the first, which kernels need not write."""
    for seed in range(NUM_REPEATS):
        ours, right = (write(_pools(dtype), np.random.default_rng(seed), name) for name in (implementation, "xla"))
        for name, got, expected in zip(("pool", "scales"), ours, right, strict=False):
            if num_wrong := int(_num_different(got, expected)):
                return f"{num_wrong:,} of {got.size:,} elements of the {name} differ from XLA's"
    return None


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


def _written(num_tokens: int, pools: _Pools, rng: np.random.Generator, implementation: str) -> _Pools:
    """Tokens of decodes, and as many of prompts; of a quantised pool, some are larger than what their blocks hold."""
    blocks = rng.permutation(np.arange(1, NUM_BLOCKS))
    num_decodes = num_tokens // 2
    decodes = blocks[:num_decodes] * BLOCK_SIZE + rng.integers(0, BLOCK_SIZE, num_decodes)
    prompts = (blocks[num_decodes:, None] * BLOCK_SIZE + np.arange(BLOCK_SIZE)).reshape(-1)
    slots = jnp.asarray(np.concatenate([decodes, prompts])[:num_tokens], jnp.int32)
    sizes = rng.choice([0.01, 1.0, 100.0], (num_tokens, NUM_KV_HEADS, 1))
    shape = (num_tokens, NUM_KV_HEADS, HEAD_DIM)
    k, v = (jnp.asarray(rng.standard_normal(shape) * sizes, jnp.bfloat16) for _ in range(2))
    if len(pools) == 1:
        return (_write(pools[0], k, v, slots, implementation=implementation),)
    return _write_quantized(*pools, k, v, slots, implementation=implementation)


_copy = jax.jit(copy_blocks, static_argnames="implementation", donate_argnums=0)


@partial(jax.jit, static_argnames="implementation", donate_argnums=0)
def _write(pool: Array, k: Array, v: Array, slots: Array, *, implementation: str) -> Array:
    return write_kv(pool, LAYER, k, v, slots, implementation=implementation)


@partial(jax.jit, static_argnames="implementation", donate_argnums=(0, 1))
def _write_quantized(pool: Array, scales: Array, k: Array, v: Array, slots: Array, *, implementation: str) -> _Pools:
    return write_kv_quantized(pool, scales, LAYER, k, v, slots, implementation=implementation)
