"""The way of a batch into the kernel and back: launch, work list, and layouts that XLA makes."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Float, Int

from pallas_kernels.block_pool.layout import BlockPool, KvScales, LayerIndex, num_blocks_of, shape_of
from pallas_kernels.chips.memory import round_up
from pallas_kernels.chips.tpu import Chip
from pallas_kernels.paged_attention.call import Call
from pallas_kernels.paged_attention.tpu.kernel import Inputs, attend_packed, rows_of_heads
from pallas_kernels.paged_attention.tpu.lanes import LaneLayout, own_lanes, spread_queries
from pallas_kernels.paged_attention.tpu.launch import TABLE_PIECE, Launch, Sizes
from pallas_kernels.paged_attention.tpu.schedule import (
    make_row_tiles,
    make_tiles,
    most_tiles,
    owner,
    pack_queries,
    rows_for,
    unpack_outputs,
)
from pallas_kernels.paged_attention.tpu.sizes import sizes_for, vmem_limit
from pallas_kernels.paged_attention.tpu.stream import TILE_FIELDS

SMEM_SHARE = 0.9
"""Share of SMEM for the list of tiles; block tables and the compiler take the rest."""


def slots_of_rows(call: Call, *, least_tokens: int) -> Int[Array, " tokens"]:
    """The slots of tokens of rows with at least so many tokens; for all other tokens slot 0, as for padding."""
    block_tables, kv_lens, cu_q_lens = call.batch
    block_size = shape_of(call.kv.pool).block_size
    token = jnp.arange(call.num_tokens, dtype=jnp.int32)
    row = jnp.minimum(owner(cu_q_lens, token), kv_lens.size - 1)
    q_len = jnp.diff(cu_q_lens)[row]
    position = kv_lens[row] - q_len + token - cu_q_lens[row]
    block = block_tables.at[row, position // block_size].get(mode="clip")
    has_slot = (token < cu_q_lens[-1]) & (q_len >= least_tokens)
    return jnp.where(has_slot, block * block_size + position % block_size, 0)


def layout_of_pool(head_dim: int, pool: BlockPool, num_kv_heads: int | None) -> LaneLayout:
    """The layout of a model's KV heads in a pool's rows: side by side where that many fit."""
    _, _, pool_heads, _, pool_dim = shape_of(pool)
    per_row = pool_dim // head_dim if num_kv_heads is None else num_kv_heads // pool_heads
    if per_row == 0 or per_row * head_dim > pool_dim or (num_kv_heads or per_row * pool_heads) != per_row * pool_heads:
        raise ValueError(
            f"q has head_dim {head_dim} and the pool {pool_heads} rows of {pool_dim} for {num_kv_heads} KV heads: "
            "expected what lane_layout makes of these heads"
        )
    return LaneLayout(pool_heads, pool_dim, per_row)


@partial(jax.jit, static_argnames=("layout", "sizes", "chip", "interpret"))
def attend_batch(
    call: Call,
    new: Float[Array, "tokens 2 pool_heads 1 pool_head_dim"] | None,
    *,
    layout: LaneLayout,
    sizes: Sizes | None,
    chip: Chip,
    interpret: pltpu.InterpretParams | None,
) -> tuple[Float[Array, "tokens num_heads head_dim"], BlockPool | None]:
    """The outputs of a batch, and the pool with the K and V of its decodes, if ``new`` gives them."""
    num_tokens, group = call.num_tokens, call.num_heads // layout.num_kv_heads
    block_tables, kv_lens, cu_q_lens = call.batch
    pool, layer, kv_scales = call.kv
    alibi_slopes, sinks = call.heads
    launch = plan_launch(call, layout, sizes, chip, is_fused=new is not None)
    row_tiles = make_row_tiles(cu_q_lens, num_tokens, launch.rows)
    tiles = make_tiles(row_tiles, kv_lens, num_tokens, launch.rows, launch.sizes.tile_row_tiles)
    inputs = Inputs(
        layer_and_count=jnp.stack([jnp.asarray(layer), tiles.num_live]),
        tiles=jnp.stack(tiles[:TILE_FIELDS], axis=1).reshape(-1),
        tables=_in_pieces(block_tables),
        q=pack_queries(spread_queries(call.q, layout), row_tiles, launch.rows),
        pool=pool,
        scales=None if kv_scales is None else _of_layer(kv_scales, layer, launch.scale_lanes),
        slopes=None if alibi_slopes is None else rows_of_heads(alibi_slopes, launch),
        sinks=None if sinks is None else rows_of_heads(sinks, launch),
        new=new,
    )
    out, written = attend_packed(launch, inputs, interpret)
    return own_lanes(unpack_outputs(out, row_tiles, launch.rows, num_tokens, group), layout, call.head_dim), written


def plan_launch(call: Call, layout: LaneLayout, sizes: Sizes | None, chip: Chip, *, is_fused: bool) -> Launch:
    """The static properties of the launch for a call, of which shapes and types alone count.

    Raises:
        NotImplementedError: the chip's VMEM or SMEM does not hold what it needs.
    """
    num_tokens, num_seqs, group = call.num_tokens, call.num_seqs, call.num_heads // layout.num_kv_heads
    launch = Launch(
        num_kv_heads=layout.num_kv_heads,
        block_size=shape_of(call.kv.pool).block_size,
        head_dim=layout.head_dim,
        q_dtype=jnp.dtype(call.q.dtype),
        pool_dtype=jnp.dtype(call.kv.pool.dtype),
        rows=rows_for(num_tokens, num_seqs, group, call.q.dtype),
        sizes=sizes or Sizes(1, 1, 1),
        scoring=call.scoring,
        num_cores=chip.num_cores,
        vmem_limit=vmem_limit(chip),
        has_slopes=call.heads.alibi_slopes is not None,
        has_sinks=call.heads.sinks is not None,
        is_fused=is_fused,
    )
    if sizes is None:
        longest_q = num_tokens if call.may_have_prompts else 1
        launch = replace(launch, sizes=sizes_for(chip, launch, longest_q=longest_q))
    num_tiles = most_tiles(num_tokens, num_seqs, launch.sizes.tile_row_tiles * launch.rows.tokens)
    most = int(chip.smem_bytes * SMEM_SHARE) // (TILE_FIELDS * 4)
    if num_tiles > most:
        raise NotImplementedError(
            f"{num_tokens} tokens of {num_seqs} sequences make {num_tiles} tiles, and the SMEM of a TPU "
            f"{chip.generation} lists {most}: split the batch"
        )
    return launch


def _in_pieces(block_tables: Int[Array, "num_seqs max_blocks"]) -> Int[Array, "num_seqs pieces 1 entries"]:
    """Block tables in pieces, each contiguous in HBM, of any length."""
    num_seqs, max_blocks = block_tables.shape
    padded = round_up(max_blocks, TABLE_PIECE)
    return jnp.pad(block_tables, ((0, 0), (0, padded - max_blocks))).reshape(num_seqs, -1, 1, TABLE_PIECE)


def _of_layer(kv_scales: KvScales, layer: LayerIndex, lanes: int) -> Float[Array, "num_blocks 1 lanes"]:
    """One layer's scales, with a row for each block that one copy can fetch."""
    scales = jax.lax.dynamic_index_in_dim(kv_scales, layer, 1, keepdims=False).reshape(num_blocks_of(kv_scales), 1, -1)
    return jnp.pad(scales, ((0, 0), (0, 0), (0, lanes - scales.shape[2])))
