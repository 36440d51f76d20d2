"""The physical layout of the block pool, and every write into it. Nothing else knows the order of its axes.

A block holds ``block_size`` tokens of K and V of all layers in one contiguous piece, so that copying, swapping or
sending a block is one transfer. All functions are pure; in a jitted function that donates the pool they work in place
and allocate nothing of its size. Indices below zero or past the end are clipped when read and ignored when written.
"""

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int

BlockPool = Float[Array, "num_blocks num_layers 2 num_kv_heads block_size head_dim"]
"""K at index 0 of the third axis, V at index 1."""

Blocks = Float[Array, "n num_layers 2 num_kv_heads block_size head_dim"]
BlockIds = Int[Array, " n"]

KV_HEAD_AXIS = 3
"""The axis of a pool that tensor parallelism shards."""


def block_pool_shape(
    num_blocks: int, num_layers: int, num_kv_heads: int, block_size: int, head_dim: int
) -> tuple[int, int, int, int, int, int]:
    """The shape of a pool; the only way to make one is ``jnp.zeros`` (or a sharded equivalent) of this shape."""
    return (num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim)


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
) -> BlockPool:
    """Store one layer's K and V of this step's tokens.

    Args:
        pool: the pool; donate it to the enclosing jit.
        layer: which layer, a static number.
        k, v: in any float type; stored in the pool's.
        slots: ``physical_block * block_size + offset`` of each token. Distinct, except that any number of padding
            tokens may share slots of block 0, which nobody reads.

    Returns:
        The pool, with the slots written.
    """
    blocks, offsets = jnp.divmod(slots, block_size_of(pool))
    kv = jnp.stack([k, v], axis=1).astype(pool.dtype)
    return pool.at[blocks, layer, :, :, offsets].set(kv, mode="drop", wrap_negative_indices=False)


def read_kv(
    pool: BlockPool, layer: int | Int[Array, ""], blocks: Int[Array, "rows blocks"]
) -> tuple[
    Float[Array, "rows num_kv_heads context head_dim"],
    Float[Array, "rows num_kv_heads context head_dim"],
]:
    """One layer's K and V of some blocks, each row's blocks end to end: ``context = blocks * block_size`` tokens.

    The gather lays heads out before tokens, as batched matrix products want them, so nothing is transposed after it.
    """
    rows, num_blocks = blocks.shape
    _, _, _, num_kv_heads, block_size, head_dim = pool.shape
    dimension_numbers = lax.GatherDimensionNumbers(
        offset_dims=(1, 3, 4), collapsed_slice_dims=(0, 1, 2), start_index_map=(0, 1, 2)
    )

    def read(which: int) -> Float[Array, "rows num_kv_heads context head_dim"]:
        start = jnp.stack([blocks, jnp.full_like(blocks, layer), jnp.full_like(blocks, which)], axis=-1)
        slice_sizes = (1, 1, 1, num_kv_heads, block_size, head_dim)
        gathered = lax.gather(pool, start, dimension_numbers, slice_sizes, mode="clip")
        return gathered.reshape(rows, num_kv_heads, num_blocks * block_size, head_dim)

    return read(0), read(1)


def copy_blocks(pool: BlockPool, src: BlockIds, dst: BlockIds) -> BlockPool:
    """Copy whole blocks, all layers at once: every source is read before any destination is written.

    Args:
        pool: the pool; donate it to the enclosing jit.
        src, dst: block ``dst[i]`` becomes a copy of block ``src[i]``. Destinations are distinct; pad with 0 -> 0.
    """
    return scatter_blocks(pool, dst, gather_blocks(pool, src))


def gather_blocks(pool: BlockPool, blocks: BlockIds) -> Blocks:
    """Whole blocks, in the order asked for."""
    return pool.at[blocks].get(mode="clip", wrap_negative_indices=False)


def scatter_blocks(pool: BlockPool, blocks: BlockIds, data: Blocks) -> BlockPool:
    """Overwrite whole blocks, which are distinct (padding: block 0, any number of times).

    Args:
        pool: the pool; donate it to the enclosing jit.
        blocks: where each of ``data`` goes.
        data: as ``gather_blocks`` returns it.
    """
    return pool.at[blocks].set(data.astype(pool.dtype), mode="drop", wrap_negative_indices=False)
