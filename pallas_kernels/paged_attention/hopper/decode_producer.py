"""The decode kernel's producer: copies a worker's queries, and the blocks of its tiles, into shared memory."""

from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.block_pool.layout import matrix_of
from pallas_kernels.chips.hopper import WARPS
from pallas_kernels.chips.memory import Ref
from pallas_kernels.paged_attention.hopper.decode_memory import (
    DecodeShape,
    Inputs,
    Scratch,
    copied,
    drain,
    my_segments,
    segment_at,
)
from pallas_kernels.paged_attention.hopper.schedule import Segment

QUERY_WARP = WARPS - 1


def produce(inputs: Inputs, scratch: Scratch, shape: DecodeShape) -> None:
    """Copy the worker's queries and tiles into shared memory, each warp every fourth piece of a tile."""
    plgpu.warp_map(lambda warp: _copy_share(inputs, scratch, warp, shape))


def _copy_share(inputs: Inputs, scratch: Scratch, warp: Array, shape: DecodeShape) -> None:
    slots, layer = shape.sizes.slots, inputs.layer[0]
    first, last = my_segments(inputs)
    tiles = copied(scratch, shape)
    pieces = [warp + nth for nth in range(0, shape.pieces_per_tile, WARPS)]

    def segment(index: Array, tiles_done: Array) -> Array:
        at = segment_at(inputs, index)
        pl.when(warp == QUERY_WARP)(lambda: _copy_queries(inputs, scratch, at, index - first, shape))

        def copy_tile(index: Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
            tiles_done, blocks, scales, next_blocks = carry
            # Loads are for the next iteration: a warp waits for a load only when it uses the value.
            next_scales = _load_scales_of(inputs, next_blocks, at, layer, shape)
            blocks_after = _load_blocks(inputs, at, index + 2, pieces, shape)
            for which in range(2):
                use = 2 * tiles_done + which
                slot = lax.rem(use, jnp.int32(slots))

                @pl.when(use >= slots)
                def _wait(slot: Array = slot) -> None:
                    plgpu.barrier_wait(scratch.free.at[slot])

                for nth, piece in enumerate(pieces):
                    if scales is not None and which == 0:
                        _store_scales(scales[nth], scratch.scales.at[slot], piece, shape)
                    head = _head(blocks[nth], which, at, layer, shape)
                    source = head * (shape.block_size // shape.piece) + _piece_of_block(at, index, piece, shape)
                    tokens = pl.ds(piece * shape.piece, shape.piece)
                    destination = tiles.at[slot, tokens, pl.ds(0, shape.head_dim)]
                    plgpu.copy_gmem_to_smem(inputs.pieces.at[source], destination, scratch.full.at[slot])
            return tiles_done + 1, next_blocks, next_scales, blocks_after

        blocks, next_blocks = (_load_blocks(inputs, at, jnp.int32(tile), pieces, shape) for tile in range(2))
        scales = _load_scales_of(inputs, blocks, at, layer, shape)
        num_tiles = jnp.where(warp < shape.pieces_per_tile, at.num_tiles, 0)
        return lax.fori_loop(0, num_tiles, copy_tile, (tiles_done, blocks, scales, next_blocks))[0]

    num_uses = 2 * lax.fori_loop(first, last, segment, jnp.int32(0))
    # A thread block may not end before all signals to it have arrived.
    drain(scratch.free, jnp.maximum(num_uses - slots, 0), num_uses, slots)

    @pl.when(warp == QUERY_WARP)
    def _drain_queries() -> None:
        drain(scratch.q_free, jnp.maximum(last - first - 2, 0), last - first, 2)


def _copy_queries(inputs: Inputs, scratch: Scratch, at: Segment, nth: Array, shape: DecodeShape) -> None:
    slot = lax.rem(nth, jnp.int32(2))
    pl.when(nth >= 2)(lambda: plgpu.barrier_wait(scratch.q_free.at[slot]))
    # The other columns are never written, and their outputs never stored.
    filled = scratch.q if shape.is_interpreted else scratch.q[0]
    heads = pl.ds(at.kv_head * shape.group, shape.group)
    for slab in range(shape.num_slabs):
        plgpu.copy_gmem_to_smem(
            inputs.q.at[at.token, heads, pl.ds(slab * shape.slab, shape.slab)],
            filled.at[slot, slab, pl.ds(0, shape.group)],
            scratch.q_full.at[slot],
        )


def _token(at: Segment, tile: Array, piece: Array, shape: DecodeShape) -> Array:
    """The first position of a piece. Past the context's end, the last piece of the context stands in."""
    return jnp.minimum(at.start + tile * shape.tile + piece * shape.piece, at.kv_end - 1)


def _load_blocks(
    inputs: Inputs, at: Segment, tile: Array, pieces: list[Array], shape: DecodeShape
) -> tuple[Array, ...]:
    """The physical blocks of pieces of a tile."""
    tokens = (_token(at, tile, piece, shape) for piece in pieces)
    return tuple(inputs.block_tables[at.row, lax.div(token, jnp.int32(shape.block_size))] for token in tokens)


def _piece_of_block(at: Segment, tile: Array, piece: Array, shape: DecodeShape) -> Array:
    return lax.div(lax.rem(_token(at, tile, piece, shape), jnp.int32(shape.block_size)), jnp.int32(shape.piece))


def _head(block: Array, which: int, at: Segment, layer: Array, shape: DecodeShape) -> Array:
    """The index of the K (0) or V (1) of the segment's head among all heads of all blocks."""
    return matrix_of(block, layer, which, at.kv_head, num_layers=shape.num_layers, num_kv_heads=shape.num_kv_heads)


def _load_scales_of(
    inputs: Inputs, blocks: tuple[Array, ...], at: Segment, layer: Array, shape: DecodeShape
) -> tuple[tuple[Array, ...], ...] | None:
    """The scales of K and of V of quantised pieces."""
    if inputs.kv_scales is None:
        return None
    return tuple(
        tuple(inputs.kv_scales[_head(block, which, at, layer, shape)] for which in range(2)) for block in blocks
    )


def _store_scales(scales: tuple[Array, ...], destination: Ref, piece: Array, shape: DecodeShape) -> None:
    """Store a piece's scales for the consumer, which the copy that follows signals."""
    per_piece = shape.piece // shape.scaled_alike
    for nth in range(per_piece):
        for which, scale in enumerate(scales):
            destination[piece * per_piece + nth, which] = scale
