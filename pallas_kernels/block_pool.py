"""The physical layout of the block pool, and every write into it. Nothing else knows the order of its axes.

A block holds ``block_size`` tokens of K and V of all layers in one contiguous piece, so that copying, swapping or
sending a block is one transfer. All functions are pure; in a jitted function that donates the pool they work in place
and allocate nothing of its size. Indices below zero or past the end are clipped when read and ignored when written.

A pool of float8_e4m3fn or int8 is quantised: a block's K and V of each head and layer share a scale, which an array
beside the pool holds, and a value is what is stored times its scale. (XLA for CPUs has no gather or scatter of float8
and widens the whole pool for each; int8 stays as it is everywhere.)
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Float32, Int, Real

BlockPool = Real[Array, "num_blocks num_layers 2 num_kv_heads block_size head_dim"]
"""K at index 0 of the third axis, V at index 1. Of a float type, or quantised."""

KvScales = Float32[Array, "num_blocks num_layers 2 num_kv_heads"]
"""The scales of a quantised pool. Those of a block that no token at offset 0 has started mean nothing."""

Blocks = Real[Array, "n num_layers 2 num_kv_heads block_size head_dim"]
Scales = Float32[Array, "n num_layers 2 num_kv_heads"]
BlockIds = Int[Array, " n"]

KV_HEAD_AXIS = 3
"""The axis of a pool, and of its scales, that tensor parallelism shards."""

LARGEST_STORED = {jnp.dtype(jnp.float8_e4m3fn): 448, jnp.dtype(jnp.int8): 127}
"""The types of quantised pools, and the largest magnitude that each stores."""

SMALLEST_SCALE = 2.0**-126
"""The scale of nothing but zeros: it and its reciprocal are normal numbers in float32."""

WRITE_IMPLEMENTATIONS = ("xla", "hopper")
"""What ``write_kv`` can be told to use: a scatter, or the kernel of block_pool_hopper.py."""

TOKENS_RESCALED_AT_ONCE = 4096
"""Blocks of this many tokens are rescaled in one go: the 256 of a large decode batch, if a block holds 16."""


def block_pool_shape(
    num_blocks: int, num_layers: int, num_kv_heads: int, block_size: int, head_dim: int
) -> tuple[int, int, int, int, int, int]:
    """The shape of a pool; the only way to make one is ``jnp.zeros`` (or a sharded equivalent) of this shape."""
    return (num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim)


def kv_scales_shape(num_blocks: int, num_layers: int, num_kv_heads: int) -> tuple[int, int, int, int]:
    """The shape of the scales of a quantised pool; make them with ``jnp.zeros``, in float32."""
    return (num_blocks, num_layers, 2, num_kv_heads)


def is_quantized(dtype: DTypeLike) -> bool:
    """Whether a pool of this type needs scales beside it."""
    return jnp.dtype(dtype) in LARGEST_STORED


def check_kv_scales(pool: BlockPool, kv_scales: KvScales | None) -> None:
    """Raise ValueError unless a quantised pool, and no other, comes with scales of the right shape and type."""
    if not is_quantized(pool.dtype):
        if kv_scales is not None:
            raise ValueError(
                f"kv_scales came with a pool of {pool.dtype}: expected none, since only pools of float8_e4m3fn and "
                "int8 are quantised; leave them out, and write with write_kv"
            )
    elif kv_scales is None:
        raise ValueError(
            f"a pool of {pool.dtype} came without kv_scales: write it with write_kv_quantized, and hand the scales "
            "that it keeps to paged_attention"
        )
    elif kv_scales.shape != pool.shape[:4] or kv_scales.dtype != jnp.float32:
        raise ValueError(
            f"kv_scales is {kv_scales.dtype} of shape {kv_scales.shape}: expected float32 of shape {pool.shape[:4]}; "
            "make it with kv_scales_shape"
        )


def block_size_of(pool: BlockPool) -> int:
    """Tokens a block holds."""
    return pool.shape[4]


def num_kv_heads_of(pool: BlockPool) -> int:
    """Heads of K and of V in a layer."""
    return pool.shape[KV_HEAD_AXIS]


def write_kv(
    pool: BlockPool,
    layer: int,
    k: Float[Array, "tokens num_kv_heads head_dim"],
    v: Float[Array, "tokens num_kv_heads head_dim"],
    slots: Int[Array, " tokens"],
    *,
    implementation: str | None = None,
) -> BlockPool:
    """Store one layer's K and V of this step's tokens.

    Args:
        pool: the pool, of a float type; donate it to the enclosing jit.
        layer: which layer, a static number.
        k, v: in any float type; stored in the pool's.
        slots: ``physical_block * block_size + offset`` of each token. Distinct, except that any number of padding
            tokens may share slots of block 0, which nobody reads.
        implementation: one of ``WRITE_IMPLEMENTATIONS``; None is "xla". "hopper" leaves block 0 as it is, and over
            several devices wants ``jax.shard_map``.

    Returns:
        The pool, with the slots written.

    Raises:
        ValueError: the pool is quantised, shapes that do not fit together, or an unknown implementation; "hopper": a
            layer that the pool has not.
        NotImplementedError: the implementation named cannot write this pool, or not on this device.
    """
    if implementation not in (None, *WRITE_IMPLEMENTATIONS):
        raise ValueError(
            f"implementation={implementation!r} is unknown: expected None or one of {list(WRITE_IMPLEMENTATIONS)}"
        )
    check_kv_scales(pool, None)
    _check_written(pool, k, v, slots)
    if implementation == "hopper":
        # Not above: it takes what it knows of devices from paged_attention, which needs this module to be there.
        from pallas_kernels.block_pool_hopper import write_kv_hopper

        return write_kv_hopper(pool, layer, k, v, slots)
    blocks, offsets = jnp.divmod(slots, block_size_of(pool))
    kv = jnp.stack([k, v], axis=1).astype(pool.dtype)
    return pool.at[blocks, layer, :, :, offsets].set(kv, mode="drop", wrap_negative_indices=False)


def _check_written(pool: BlockPool, k: Array, v: Array, slots: Array) -> None:
    expected = (slots.size, num_kv_heads_of(pool), pool.shape[5])
    for name, array in (("k", k), ("v", v)):
        if array.shape != expected:
            raise ValueError(
                f"{name} has shape {array.shape}: expected {expected}, [tokens, num_kv_heads, head_dim] of as many "
                "tokens as slots and of the pool's heads"
            )


def write_kv_quantized(
    pool: BlockPool,
    kv_scales: KvScales,
    layer: int,
    k: Float[Array, "tokens num_kv_heads head_dim"],
    v: Float[Array, "tokens num_kv_heads head_dim"],
    slots: Int[Array, " tokens"],
) -> tuple[BlockPool, KvScales]:
    """Store one layer's K and V of this step's tokens in a quantised pool.

    A token at offset 0 starts its block anew: what the block held counts no more. Otherwise, tokens too large for
    their block's scale make it grow, and what the block holds is brought to the new scale. Scales are powers of two,
    so they grow seldom, and growing costs e4m3 nothing but what falls below its smallest number. The error of int8
    stays within one step of the block's last scale however often it grows: half a step for the last rounding, a
    quarter for the one before, and so on. A value that is not finite makes its block's scale NaN until it starts anew.

    Args:
        pool: the pool, of float8_e4m3fn or int8; donate it to the enclosing jit.
        kv_scales: its scales; donate them too.
        layer: which layer, a static number.
        k, v: in any float type.
        slots: as for ``write_kv``. The tokens of a block follow one another, as those of a sequence do.

    Returns:
        The pool and its scales, with the slots written.

    Raises:
        ValueError: the pool is not quantised, or the scales are not its own.
    """
    check_kv_scales(pool, kv_scales)
    stored, kv_scales, old, new = quantize(pool, kv_scales, layer, k, v, slots)
    blocks, offsets = jnp.divmod(slots, block_size_of(pool))
    is_first = jnp.diff(blocks, prepend=-1) != 0
    has_grown = is_first & ((old > 0) & (new > old)).any(axis=(1, 2))
    pool = _rescale(pool, layer, blocks, has_grown, old / new)
    return pool.at[blocks, layer, :, :, offsets].set(stored, mode="drop", wrap_negative_indices=False), kv_scales


class Quantized(NamedTuple):
    """A step's tokens as a quantised pool stores them, and what that asks of the pool.

    Args:
        stored: of the pool's type, to be written at the tokens' slots.
        kv_scales: of all blocks, from now on.
        old, new: scales of each token's block before and now: what the block holds is to be multiplied by ``old / new``
            where ``old`` is above 0, as it is not of a block that a token at offset 0 starts anew.
    """

    stored: Real[Array, "tokens 2 num_kv_heads head_dim"]
    kv_scales: KvScales
    old: Float32[Array, "tokens 2 num_kv_heads"]
    new: Float32[Array, "tokens 2 num_kv_heads"]


def quantize(
    pool: BlockPool,
    kv_scales: KvScales,
    layer: int | Int[Array, ""],
    k: Float[Array, "tokens num_kv_heads head_dim"],
    v: Float[Array, "tokens num_kv_heads head_dim"],
    slots: Int[Array, " tokens"],
) -> Quantized:
    """The half of ``write_kv_quantized`` that leaves the pool as it is; arguments as for that."""
    blocks, offsets = jnp.divmod(slots, block_size_of(pool))
    kv = jnp.stack([k, v], axis=1).astype(jnp.float32)
    started = jnp.where(offsets == 0, blocks, pool.shape[0])
    kv_scales = kv_scales.at[started, layer].set(0, mode="drop", wrap_negative_indices=False)
    old = kv_scales.at[blocks, layer].get(mode="clip", wrap_negative_indices=False)
    least = _least_scales(kv, pool.dtype)
    kv_scales = kv_scales.at[blocks, layer].max(least, mode="drop", wrap_negative_indices=False)
    new = kv_scales.at[blocks, layer].get(mode="clip", wrap_negative_indices=False)
    return Quantized(_to_stored(kv / new[..., None], pool.dtype), kv_scales, old, new)


def _least_scales(
    kv: Float32[Array, "tokens 2 num_kv_heads head_dim"], dtype: jnp.dtype
) -> Float32[Array, "tokens 2 num_kv_heads"]:
    """The smallest power of two with which each head's numbers fit the type; NaN where one is not finite."""
    least = jnp.maximum(jnp.abs(kv).max(axis=-1) / LARGEST_STORED[dtype], SMALLEST_SCALE)
    mantissa = 2**23 - 1
    bits = lax.bitcast_convert_type(least, jnp.int32)  # the sum carries into the exponent unless the mantissa is 0
    power = lax.bitcast_convert_type((bits + mantissa) & ~mantissa, jnp.float32)
    return jnp.where(jnp.isfinite(least), power, jnp.nan)


def _to_stored(x: Float32[Array, "..."], dtype: jnp.dtype) -> Real[Array, "..."]:
    """The nearest number that the type stores. Nothing needs saturating: a scale is never below what its block asks."""
    return (jnp.round(x) if jnp.issubdtype(dtype, jnp.integer) else x).astype(dtype)


def _rescale(
    pool: BlockPool,
    layer: int,
    blocks: Int[Array, " tokens"],
    is_rescaled: Bool[Array, " tokens"],
    ratios: Float32[Array, "tokens 2 num_kv_heads"],
) -> BlockPool:
    """Multiply what one layer of the marked blocks, each marked once, has stored.

    Any number of the tokens may have a block of their own, as in a decode step, but a long prompt's have few between
    them that hold anything yet. So the marked ones are gathered to the front and taken in turns, of blocks that hold
    as many tokens as the call writes: mostly in no turn at all, or in one. Where one turn takes all blocks there may
    be, it runs without a loop, whose condition a GPU's host would have to wait for.
    """
    num_tokens, num_blocks = blocks.size, pool.shape[0]

    def rescale(pool: BlockPool, blocks: BlockIds, ratios: Float32[Array, "n 2 num_kv_heads"]) -> BlockPool:
        stored = pool.at[blocks, layer].get(mode="clip", wrap_negative_indices=False)
        stored = _to_stored(stored.astype(jnp.float32) * ratios[..., None, None], pool.dtype)
        return pool.at[blocks, layer].set(stored, mode="drop", wrap_negative_indices=False)

    per_turn = -(-max(num_tokens, TOKENS_RESCALED_AT_ONCE) // block_size_of(pool))
    if num_tokens <= per_turn:
        return rescale(pool, jnp.where(is_rescaled, blocks, num_blocks), ratios)

    most_turns = -(-num_tokens // per_turn)
    (marked,) = jnp.nonzero(is_rescaled, size=most_turns * per_turn, fill_value=num_tokens)

    def turn(index: Int[Array, ""], pool: BlockPool) -> BlockPool:
        tokens = lax.dynamic_slice_in_dim(marked, index * per_turn, per_turn)
        return rescale(
            pool, blocks.at[tokens].get(mode="fill", fill_value=num_blocks), ratios.at[tokens].get(mode="clip")
        )

    return lax.fori_loop(0, -(-is_rescaled.sum() // per_turn), turn, pool)


def read_kv(
    pool: BlockPool, layer: int | Int[Array, ""], blocks: Int[Array, "rows blocks"]
) -> tuple[
    Real[Array, "rows num_kv_heads context head_dim"],
    Real[Array, "rows num_kv_heads context head_dim"],
]:
    """One layer's K and V of some blocks, each row's blocks end to end: ``context = blocks * block_size`` tokens.

    A quantised pool's are as stored: times ``read_kv_scales`` they are the values.

    The gather lays heads out before tokens, as batched matrix products want them, so nothing is transposed after it.
    """
    rows, num_blocks = blocks.shape
    _, _, _, num_kv_heads, block_size, head_dim = pool.shape
    dimension_numbers = lax.GatherDimensionNumbers(
        offset_dims=(1, 3, 4), collapsed_slice_dims=(0, 1, 2), start_index_map=(0, 1, 2)
    )

    def read(which: int) -> Real[Array, "rows num_kv_heads context head_dim"]:
        start = jnp.stack([blocks, jnp.full_like(blocks, layer), jnp.full_like(blocks, which)], axis=-1)
        slice_sizes = (1, 1, 1, num_kv_heads, block_size, head_dim)
        gathered = lax.gather(pool, start, dimension_numbers, slice_sizes, mode="clip")
        return gathered.reshape(rows, num_kv_heads, num_blocks * block_size, head_dim)

    return read(0), read(1)


def read_kv_scales(
    kv_scales: KvScales, layer: int | Int[Array, ""], blocks: Int[Array, "rows blocks"], block_size: int
) -> tuple[Float32[Array, "rows num_kv_heads context"], Float32[Array, "rows num_kv_heads context"]]:
    """The scales of each token of ``read_kv``, for K and for V."""
    scales = kv_scales.at[blocks, layer].get(mode="clip", wrap_negative_indices=False)
    k_scales, v_scales = jnp.unstack(jnp.repeat(scales, block_size, axis=1), axis=2)
    return k_scales.transpose(0, 2, 1), v_scales.transpose(0, 2, 1)


def copy_blocks(pool: BlockPool | KvScales, src: BlockIds, dst: BlockIds) -> BlockPool | KvScales:
    """Copy whole blocks, all layers at once: every source is read before any destination is written.

    Args:
        pool: the pool, or its scales, which go the same way; donate it to the enclosing jit.
        src, dst: block ``dst[i]`` becomes a copy of block ``src[i]``. Destinations are distinct; pad with 0 -> 0.
    """
    return scatter_blocks(pool, dst, gather_blocks(pool, src))


def gather_blocks(pool: BlockPool | KvScales, blocks: BlockIds) -> Blocks | Scales:
    """Whole blocks, or their scales, in the order asked for."""
    return pool.at[blocks].get(mode="clip", wrap_negative_indices=False)


def scatter_blocks(pool: BlockPool | KvScales, blocks: BlockIds, data: Blocks | Scales) -> BlockPool | KvScales:
    """Overwrite whole blocks, which are distinct (padding: block 0, any number of times).

    Args:
        pool: the pool, or its scales; donate it to the enclosing jit.
        blocks: where each of ``data`` goes.
        data: as ``gather_blocks`` returns it.
    """
    return pool.at[blocks].set(data.astype(pool.dtype), mode="drop", wrap_negative_indices=False)
