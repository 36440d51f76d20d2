"""The physical layout of the block pool: other rooms ask it for sizes, and only this room's writers index the axes.

A block holds K and V of ``block_size`` tokens of all layers in one contiguous piece. So one transfer copies, swaps or
sends a block.

A pool of float8_e4m3fn or int8 is quantised: a value is the stored number times a scale. Each block has a scale for
the K and for the V of each layer and head, in a second array.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float32, Int, Real

BlockPool = Real[Array, "num_blocks num_layers 2 num_kv_heads block_size head_dim"]
"""Blocks of a float type or quantised, with K at index 0 of the third axis and V at index 1."""

KvScales = Float32[Array, "num_blocks num_layers 2 num_kv_heads"]
"""Scales of a quantised pool. A block's scales have no meaning until a token at offset 0 has started the block."""

Blocks = Real[Array, "blocks num_layers 2 num_kv_heads block_size head_dim"]
Scales = Float32[Array, "blocks num_layers 2 num_kv_heads"]
BlockIds = Int[Array, " blocks"]
LayerIndex = int | Int[Array, ""]

KV_HEAD_AXIS = 3
"""The axis of a pool, and of its scales, that tensor parallelism shards."""

LARGEST_STORED = {jnp.dtype(jnp.float8_e4m3fn): 448, jnp.dtype(jnp.int8): 127}
"""Type of a quantised pool -> the largest magnitude that it stores."""


class PoolShape(NamedTuple):
    """The sizes of a pool, by name."""

    num_blocks: int
    num_layers: int
    num_kv_heads: int
    block_size: int
    head_dim: int


def block_pool_shape(
    num_blocks: int, num_layers: int, num_kv_heads: int, block_size: int, head_dim: int
) -> tuple[int, int, int, int, int, int]:
    """The shape of a pool; make the pool with ``jnp.zeros`` of this shape, or a sharded equivalent."""
    return (num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim)


def kv_scales_shape(num_blocks: int, num_layers: int, num_kv_heads: int) -> tuple[int, int, int, int]:
    """The shape of the scales of a quantised pool; make them with ``jnp.zeros``, in float32."""
    return (num_blocks, num_layers, 2, num_kv_heads)


def shape_of(pool: BlockPool | tuple[int, ...]) -> PoolShape:
    """The sizes of a pool, or of its shape, by name.

    Raises:
        ValueError: a shape that ``block_pool_shape`` does not make.
    """
    shape = pool if isinstance(pool, tuple) else pool.shape
    if len(shape) != 6 or shape[2] != 2:
        raise ValueError(
            f"pool has shape {shape}: expected 6 axes, [num_blocks, num_layers, 2, num_kv_heads, block_size, "
            "head_dim], with 2 (K and V) as the third axis; make it with block_pool_shape"
        )
    num_blocks, num_layers, _, num_kv_heads, block_size, head_dim = shape
    return PoolShape(num_blocks, num_layers, num_kv_heads, block_size, head_dim)


def is_scales(pool: BlockPool | KvScales) -> bool:
    """Whether an array is the scales of a pool rather than a pool."""
    return pool.ndim == 4


def num_blocks_of(pool: Real[Array, "num_blocks num_layers *rest"]) -> int:
    """Blocks of a pool, of its sides, or of the scales of either."""
    return pool.shape[0]


def block_size_of(pool: Real[Array, "num_blocks num_layers *heads block_size head_dim"]) -> int:
    """Tokens of a block of a pool, or of its sides."""
    return pool.shape[-2]


def blocks_shape(pool: BlockPool | KvScales, num_blocks: int) -> tuple[int, ...]:
    """The shape of so many whole blocks of a pool, or of their scales."""
    return (num_blocks, *pool.shape[1:])


def as_matrices(pool: BlockPool, num_rows: int) -> Real[Array, "matrices rows head_dim"]:
    """The pool as matrices of one head's K or V; ``num_rows`` divides ``block_size``."""
    return pool.reshape(-1, num_rows, shape_of(pool).head_dim)


def matrix_of(
    block: Array, layer: Array, which: Array | int, kv_head: Array, *, num_layers: int, num_kv_heads: int
) -> Array:
    """The index of a block's K (``which`` 0) or V (1) of one layer and head among the matrices of whole blocks."""
    return ((block * num_layers + layer) * 2 + which) * num_kv_heads + kv_head


def as_sides(pool: BlockPool | KvScales) -> Real[Array, "sides num_kv_heads *block_size_and_head_dim"]:
    """A pool, or its scales, as one array for each block, layer, and K or V."""
    return pool.reshape(-1, *pool.shape[KV_HEAD_AXIS:])


def as_layers(pool: BlockPool | KvScales) -> BlockPool | KvScales:
    """A pool, or its scales, of one layer: layer l of block b is block ``b * num_layers + l``."""
    return pool.reshape(-1, 1, *pool.shape[2:])


def as_blocks(layers: BlockPool | KvScales, num_layers: int) -> BlockPool | KvScales:
    """Undo ``as_layers``."""
    return layers.reshape(-1, num_layers, *layers.shape[2:])


def is_quantized(dtype: DTypeLike) -> bool:
    """Whether a pool of this type needs scales."""
    return jnp.dtype(dtype) in LARGEST_STORED


def check_static_layer(pool: BlockPool, layer: LayerIndex) -> None:
    """Check that a layer is a static number of one of the pool's layers.

    Raises:
        ValueError: a traced layer, or one that the pool does not have.
    """
    num_layers = shape_of(pool).num_layers
    if isinstance(layer, Array) or layer not in range(num_layers):
        raise ValueError(
            f"layer={layer}: expected 0 to {num_layers - 1}, a static number of one of the pool's {num_layers} layers"
        )


def check_kv_scales(pool: BlockPool, kv_scales: KvScales | None) -> None:
    """Check that a quantised pool, and no other pool, comes with scales of its shape, in float32.

    Raises:
        ValueError: scales that are missing, superfluous, or of another shape or type.
    """
    if not is_quantized(pool.dtype):
        if kv_scales is not None:
            raise ValueError(
                f"kv_scales came with a pool of {pool.dtype}: expected none, since only pools of float8_e4m3fn and "
                "int8 are quantised; leave them out, and write with write_kv"
            )
        return
    if kv_scales is None:
        raise ValueError(
            f"a pool of {pool.dtype} came without kv_scales: write it with write_kv_quantized, and hand the scales "
            "that it keeps to paged_attention"
        )
    shape = shape_of(pool)
    expected = kv_scales_shape(shape.num_blocks, shape.num_layers, shape.num_kv_heads)
    if kv_scales.shape != expected or kv_scales.dtype != jnp.float32:
        raise ValueError(
            f"kv_scales is {kv_scales.dtype} of shape {kv_scales.shape}: expected float32 of shape {expected}; "
            "make it with kv_scales_shape"
        )
