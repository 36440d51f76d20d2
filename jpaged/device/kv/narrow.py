"""8-bit copies of blocks of a wider pool, as they lie on the host and cross the link.

A narrow block is the bytes of an int8 pool's block, with the scales among them (``pool.pack_blocks``).
"""

import math

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, UInt, UInt8

from jpaged.device.backends import Backend
from jpaged.device.kv.pool import SCALE_BYTES, Blocks, KVCache, bits_of, pack_blocks, unpack_blocks
from pallas_kernels.block_pool.quantization import dequantize_blocks, quantize_blocks

NarrowBlocks = UInt8[Array, "n num_layers 2 num_kv_heads bytes"]


def narrow_bits(bits: UInt[Array, "n num_layers 2 num_kv_heads block_size head_dim"], dtype: jnp.dtype) -> NarrowBlocks:
    """Round blocks that a pool of this float type gathered (``KVCache.gather``)."""
    return pack_blocks(*quantize_blocks(lax.bitcast_convert_type(bits, dtype)))


def widen_bits(
    narrow: NarrowBlocks, like: Float[Array, "num_blocks num_layers 2 num_kv_heads block_size head_dim"]
) -> UInt[Array, "n num_layers 2 num_kv_heads block_size head_dim"]:
    """Undo ``narrow_bits``, up to its rounding: blocks that this pool scatters (``KVCache.scatter``)."""
    return lax.bitcast_convert_type(widen(narrow, like), bits_of(like.dtype))


def widen(
    narrow: NarrowBlocks, like: Float[Array, "num_blocks num_layers 2 num_kv_heads block_size head_dim"]
) -> Float[Array, "n num_layers 2 num_kv_heads block_size head_dim"]:
    """The values of narrow blocks, in the type and shape of this pool's."""
    stored, scales = unpack_blocks(narrow, jnp.int8, like.shape[1:])
    return dequantize_blocks(stored, scales, like.dtype)


def narrow_in(
    cells: Float[Array, "cells 1 2 num_kv_heads block_size head_dim"], num_blocks: int, num_layers: int
) -> NarrowBlocks:
    """Narrow blocks of some layers that lie side by side in the memory of some cells, from the first byte on."""
    *heads, block_size, head_dim = cells.shape[2:]
    shape = (num_blocks, num_layers, *heads, block_size * head_dim + SCALE_BYTES)
    return lax.bitcast_convert_type(cells, jnp.uint8).reshape(-1)[: math.prod(shape)].reshape(shape)


def gather_for_host(backend: Backend, is_narrowed: bool, cache: KVCache, blocks: Int[Array, " n"]) -> Blocks:
    """Blocks as they lie on the host.

    Args:
        backend: gathers.
        is_narrowed: whether narrow blocks lie there.
        cache: the pool.
        blocks: the blocks.
    """
    gathered = backend.gather(cache, blocks)
    return narrow_bits(gathered, cache.pool.dtype) if is_narrowed else gathered


def scatter_from_host(
    backend: Backend, is_narrowed: bool, cache: KVCache, blocks: Int[Array, " n"], data: Blocks
) -> tuple[KVCache, Int[Array, ""]]:
    """The cache with blocks that come from the host, and a number that is ready when they are written.

    Args:
        backend, is_narrowed, cache, blocks: as for ``gather_for_host``.
        data: the content of the blocks.
    """
    data = widen_bits(data, cache.pool) if is_narrowed else data
    return backend.scatter(cache, blocks, data), blocks.sum()
