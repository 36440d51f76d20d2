"""The operations of the block pool in plain XLA: gathers and scatters on any device.

XLA for CPUs has no gather or scatter of float8, and widens the whole pool for each. On all devices int8 stays int8.
"""

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Float32, Int, Real

from pallas_kernels.block_pool.layout import (
    BlockIds,
    BlockPool,
    Blocks,
    KvScales,
    LayerIndex,
    Scales,
    block_size_of,
    num_blocks_of,
    shape_of,
)
from pallas_kernels.block_pool.quantization import Stored, StoredScales, quantize, to_stored

TOKENS_RESCALED_AT_ONCE = 4096
"""Tokens of the blocks that one pass rescales: the 256 blocks of a large decode batch, if a block holds 16."""


def write_kv_xla(
    pool: BlockPool,
    layer: LayerIndex,
    k: Float[Array, "tokens num_kv_heads head_dim"],
    v: Float[Array, "tokens num_kv_heads head_dim"],
    slots: Int[Array, " tokens"],
) -> BlockPool:
    """Store one layer's K and V of this step's tokens; arguments and result as for ``write_kv``."""
    return write_tokens(pool, layer, jnp.stack([k, v], axis=1), slots)


def write_tokens(
    pool: Stored, layer: LayerIndex, values: Real[Array, "tokens *heads head_dim"], slots: Int[Array, " tokens"]
) -> Stored:
    """Store tokens as they are in a pool of any type, or in its sides; see ``write_kv_xla``."""
    values, slots = beside_another(pool, values, slots)
    blocks, offsets = jnp.divmod(slots, block_size_of(pool))
    values = values.astype(pool.dtype)
    return pool.at[blocks, layer, ..., offsets, :].set(values, mode="drop", wrap_negative_indices=False)


def beside_another(
    pool: Stored, values: Real[Array, "tokens *heads head_dim"], slots: Int[Array, " tokens"]
) -> tuple[Real[Array, "two_or_more *heads head_dim"], Int[Array, " two_or_more"]]:
    """The tokens to write, a single one beside another that is dropped.

    XLA would fuse the write of a single token into each of its readers, and copy the pool for each.
    """
    if len(values) != 1:
        return values, slots
    return jnp.repeat(values, 2, axis=0), jnp.append(slots, num_blocks_of(pool) * block_size_of(pool))


def write_kv_quantized_xla(
    pool: BlockPool,
    kv_scales: KvScales,
    layer: LayerIndex,
    k: Float[Array, "tokens num_kv_heads head_dim"],
    v: Float[Array, "tokens num_kv_heads head_dim"],
    slots: Int[Array, " tokens"],
) -> tuple[BlockPool, KvScales]:
    """Store K and V in a quantised pool; arguments and result as for ``write_kv_quantized``."""
    return write_quantized(pool, kv_scales, layer, jnp.stack([k, v], axis=1), slots)


def write_quantized(
    pool: Stored,
    scales: StoredScales,
    layer: LayerIndex,
    values: Float[Array, "tokens *heads head_dim"],
    slots: Int[Array, " tokens"],
) -> tuple[Stored, StoredScales]:
    """Round and store tokens in a quantised pool, or in its sides; arguments as for ``quantize``."""
    values, slots = beside_another(pool, values, slots)
    stored, scales, old, new = quantize(pool, scales, layer, values, slots)
    blocks = slots // block_size_of(pool)
    is_first = jnp.diff(blocks, prepend=-1) != 0
    has_grown = is_first & ((old > 0) & (new > old)).any(axis=tuple(range(1, old.ndim)))
    pool = _rescale(pool, layer, blocks, has_grown, old / new)
    return write_tokens(pool, layer, stored, slots), scales


def _rescale(
    pool: Stored,
    layer: LayerIndex,
    blocks: Int[Array, " tokens"],
    is_rescaled: Bool[Array, " tokens"],
    ratios: Float32[Array, "tokens *heads"],
) -> Stored:
    """Multiply the stored numbers of one layer of the marked blocks, each marked once.

    Each token of a decode step has a block of its own. The tokens of a long prompt, however, share few blocks that
    already hold tokens. So the marked blocks are gathered to the front and rescaled in passes. Each pass takes blocks
    that hold as many tokens as the call writes, so most calls need no pass, or one. A single pass over all blocks runs
    without a loop, whose condition a GPU's host would have to wait for.
    """
    num_tokens, num_blocks, block_size = blocks.size, num_blocks_of(pool), block_size_of(pool)

    def rescale(pool: Stored, blocks: BlockIds, ratios: Float32[Array, "blocks *heads"]) -> Stored:
        stored = pool.at[blocks, layer].get(mode="clip", wrap_negative_indices=False)
        stored = to_stored(stored.astype(jnp.float32) * ratios[..., None, None], pool.dtype)
        stored = lax.optimization_barrier(stored)  # a write fused with its own read would copy the pool
        return pool.at[blocks, layer].set(stored, mode="drop", wrap_negative_indices=False)

    per_pass = -(-max(num_tokens, TOKENS_RESCALED_AT_ONCE) // block_size)
    if num_tokens <= per_pass:
        return rescale(pool, jnp.where(is_rescaled, blocks, num_blocks), ratios)

    most_passes = -(-num_tokens // per_pass)
    (marked,) = jnp.nonzero(is_rescaled, size=most_passes * per_pass, fill_value=num_tokens)

    def rescale_some(index: Int[Array, ""], pool: Stored) -> Stored:
        tokens = lax.dynamic_slice_in_dim(marked, index * per_pass, per_pass)
        return rescale(
            pool, blocks.at[tokens].get(mode="fill", fill_value=num_blocks), ratios.at[tokens].get(mode="clip")
        )

    return lax.fori_loop(0, -(-is_rescaled.sum() // per_pass), rescale_some, pool)


def read_kv(
    pool: BlockPool, layer: LayerIndex, blocks: Int[Array, "rows blocks"]
) -> tuple[
    Real[Array, "rows num_kv_heads context head_dim"],
    Real[Array, "rows num_kv_heads context head_dim"],
]:
    """One layer's K and V of some blocks, each row's blocks end to end: ``context = blocks * block_size`` tokens.

    Numbers of a quantised pool come as stored; multiply them by ``read_kv_scales`` to get their values. The gather puts
    heads before tokens, as batched matrix products want them, so no transpose follows.
    """
    rows, num_blocks = blocks.shape
    _, _, num_kv_heads, block_size, head_dim = shape_of(pool)
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
    kv_scales: KvScales, layer: LayerIndex, blocks: Int[Array, "rows blocks"], block_size: int
) -> tuple[Float32[Array, "rows num_kv_heads context"], Float32[Array, "rows num_kv_heads context"]]:
    """The scales of each token of ``read_kv``, for K and for V."""
    scales = kv_scales.at[blocks, layer].get(mode="clip", wrap_negative_indices=False)
    k_scales, v_scales = jnp.unstack(jnp.repeat(scales, block_size, axis=1), axis=2)
    return k_scales.transpose(0, 2, 1), v_scales.transpose(0, 2, 1)


def copy_blocks_xla(pool: BlockPool | KvScales, src: BlockIds, dst: BlockIds) -> BlockPool | KvScales:
    """Copy whole blocks within the pool; arguments and result as for ``copy_blocks``."""
    return scatter_blocks_xla(pool, dst, gather_blocks_xla(pool, src))


def gather_blocks_xla(pool: BlockPool | KvScales, blocks: BlockIds) -> Blocks | Scales:
    """Whole blocks in the order asked for; arguments and result as for ``gather_blocks``."""
    return pool.at[blocks].get(mode="clip", wrap_negative_indices=False)


def scatter_blocks_xla(pool: BlockPool | KvScales, blocks: BlockIds, data: Blocks | Scales) -> BlockPool | KvScales:
    """Overwrite whole blocks; arguments and result as for ``scatter_blocks``."""
    # Block 0 alone may occur twice, and holds nothing. A GPU's writes that might collide are atomic, and slow.
    data = data.astype(pool.dtype)
    return pool.at[blocks].set(data, mode="drop", wrap_negative_indices=False, unique_indices=True)
