"""Rounding of values to the numbers that a quantised pool stores, and the scales that this takes."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike
from jaxtyping import Float, Float32, Int, Real

from pallas_kernels.block_pool.layout import (
    LARGEST_STORED,
    Blocks,
    LayerIndex,
    Scales,
    block_size_of,
    num_blocks_of,
)

Stored = Real[Array, "num_blocks num_layers *heads block_size head_dim"]
"""A quantised pool, with K and V and their heads as ``heads``; or its sides (``as_sides``), with heads alone."""

StoredScales = Float32[Array, "num_blocks num_layers *heads"]

SMALLEST_SCALE = 2.0**-126
"""The scale of zeros alone: this number and its reciprocal are normal numbers in float32."""


NOT_FINITE = -128
"""The int8 number of a value that is not finite: no finite value takes it."""


class Quantized(NamedTuple):
    """A step's tokens as a quantised pool stores them, and the rescaling of their blocks.

    Args:
        stored: numbers of the pool's type, to be written at the tokens' slots.
        scales: scales of all blocks after the write.
        old, new: scales of each token's block before and after. Where ``old`` is above 0, the write multiplies the
            block's numbers by ``old / new``. It is 0 where a token at offset 0 starts the block.
    """

    stored: Real[Array, "tokens *heads head_dim"]
    scales: StoredScales
    old: Float32[Array, "tokens *heads"]
    new: Float32[Array, "tokens *heads"]


def quantize(
    pool: Stored,
    scales: StoredScales,
    layer: LayerIndex,
    values: Float[Array, "tokens *heads head_dim"],
    slots: Int[Array, " tokens"],
) -> Quantized:
    """Round a step's tokens without writing to the pool.

    Args:
        pool: the pool, or its sides.
        scales: its scales.
        layer: as for ``write_kv_quantized``.
        values: a token's numbers for each axis of a block: K and V in turn, for a pool.
        slots: as for ``write_kv_quantized``.
    """
    blocks, offsets = jnp.divmod(slots, block_size_of(pool))
    values = values.astype(jnp.float32)
    # XLA writes the scales in place only if every reader of the array before comes first. So each write depends on
    # these readers: on the attention of the layer before, through K, then on the reads below. Otherwise XLA copies the
    # scales of all blocks, twice a layer.
    scales, values = lax.optimization_barrier((scales, values))
    started = jnp.where(offsets == 0, blocks, num_blocks_of(pool))
    scales = scales.at[started, layer].set(0, mode="drop", wrap_negative_indices=False)
    old = scales.at[blocks, layer].get(mode="clip", wrap_negative_indices=False)
    scales, old = lax.optimization_barrier((scales, old))
    least = _least_scales(jnp.abs(values).max(axis=-1), pool.dtype)
    scales = scales.at[blocks, layer].max(least, mode="drop", wrap_negative_indices=False)
    new = scales.at[blocks, layer].get(mode="clip", wrap_negative_indices=False)
    scales, new = lax.optimization_barrier((scales, new))
    return Quantized(to_stored(values / new[..., None], pool.dtype), scales, old, new)


def quantize_as_written(
    values: Float[Array, "blocks block_size num_kv_heads head_dim"], dtype: jnp.dtype
) -> tuple[Real[Array, "blocks num_kv_heads block_size head_dim"], Float32[Array, "blocks num_kv_heads"]]:
    """Round K, or V, of whole blocks, as ``quantize`` does if one write starts and fills them.

    Args:
        values: the tokens of each block, in any float type; zeros where there is none.
        dtype: type of the quantised pool.

    Returns:
        The numbers as a block stores them, and their scales.
    """
    values = values.swapaxes(1, 2).astype(jnp.float32)
    scales = _least_scales(jnp.abs(values).max(axis=(2, 3)), dtype)
    return to_stored(values / scales[:, :, None, None], dtype), scales


def _least_scales(largest: Float32[Array, "*heads"], dtype: jnp.dtype) -> Float32[Array, "*heads"]:
    """The smallest power of two with which numbers up to this magnitude fit the type; NaN if it is not finite."""
    least = jnp.maximum(largest / LARGEST_STORED[dtype], SMALLEST_SCALE)
    mantissa = 2**23 - 1
    bits = lax.bitcast_convert_type(least, jnp.int32)  # the sum carries into the exponent unless the mantissa is 0
    power = lax.bitcast_convert_type((bits + mantissa) & ~mantissa, jnp.float32)
    return jnp.where(jnp.isfinite(least), power, jnp.nan)


def to_stored(x: Float32[Array, "..."], dtype: jnp.dtype) -> Real[Array, "..."]:
    """The nearest number that the type stores. No number needs saturating: a block's scale covers its largest."""
    return (jnp.round(x) if jnp.issubdtype(dtype, jnp.integer) else x).astype(dtype)


def quantize_blocks(blocks: Blocks) -> tuple[Blocks, Scales]:
    """Round whole blocks of a float type to int8, with a scale for the K and for the V of each layer and head.

    A finite value changes by at most half of its scale, and so by 1/127 of the largest finite magnitude of its head in
    the block. Scales are powers of two. So a block that was rounded before comes back with the same values, however
    often it is rounded. A value that is not finite leaves the others as they are, and comes back as NaN: slots without
    a token may hold any bits.
    """
    dtype = jnp.dtype(jnp.int8)
    values = blocks.astype(jnp.float32)
    magnitudes = jnp.abs(values)
    is_finite = magnitudes < jnp.inf
    scales = _least_scales(jnp.where(is_finite, magnitudes, 0).max(axis=(-2, -1)), dtype)
    stored = to_stored(jnp.where(is_finite, values / scales[..., None, None], NOT_FINITE), dtype)
    return stored, scales


def dequantize_blocks(stored: Blocks, scales: Scales, dtype: DTypeLike) -> Blocks:
    """Undo ``quantize_blocks``, up to its rounding, in a float type."""
    largest = jnp.finfo(dtype).max.astype(jnp.float32)  # rounding up may exceed it
    values = jnp.clip(stored.astype(jnp.float32) * scales[..., None, None], -largest, largest)
    return jnp.where(stored == NOT_FINITE, jnp.nan, values).astype(dtype)
