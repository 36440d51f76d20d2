"""The decode kernel's producer: copies a worker's queries, and the blocks of its tiles, into shared memory."""

from functools import reduce
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.paged_attention.hopper.decode_memory import (
    PRODUCER_REGISTERS,
    DecodeShape,
    Inputs,
    Scratch,
    drain,
    my_segments,
    segment_at,
)
from pallas_kernels.paged_attention.hopper.schedule import Segment
from pallas_kernels.paged_attention.hopper.tile import COLUMN, Ref

SMALLEST_SCALE = 2.0**-126
"""Scales of a pool not written yet are 0, and 0 / 0 is NaN."""


def produce(inputs: Inputs, scratch: Scratch, shape: DecodeShape) -> None:
    """Copy the worker's queries and tiles into shared memory."""
    if shape.is_quantized:
        plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
    kv, slots, layer = scratch.stored, shape.sizes.slots, inputs.layer[0]
    first, last = my_segments(inputs)

    def segment(index: Array, tiles_done: Array) -> Array:
        at = segment_at(inputs, index)
        _copy_queries(inputs, scratch, at, index - first, shape)

        def copy_tile(index: Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
            tiles_done, blocks, scales, next_blocks = carry
            # What is loaded here is looked at a turn later: a warp waits for what it uses, not for what it carries.
            next_scales = _load_scales_of(inputs, next_blocks, at, layer, shape)
            blocks_after = _load_blocks(inputs, at, index + 2, shape)
            for which in range(2):
                turn = 2 * tiles_done + which
                slot = lax.rem(turn, jnp.int32(slots))

                @pl.when(turn >= slots)
                def _wait(slot: Array = slot) -> None:
                    plgpu.barrier_wait(kv.free.at[slot])

                for nth, block in enumerate(blocks):
                    head = _head(block, which, at, layer, shape)
                    piece = head * (shape.block_size // shape.piece) + _piece_of_block(at, index, nth, shape)
                    destination = kv.tiles.at[slot, pl.ds(nth * shape.piece, shape.piece), pl.ds(0, shape.head_dim)]
                    plgpu.copy_gmem_to_smem(inputs.pieces.at[piece], destination, kv.full.at[slot])
                if scales is not None:
                    _store_scales(scales[which], kv.scales.at[slot], shape)
                    plgpu.barrier_arrive(kv.full.at[slot])
            return tiles_done + 1, next_blocks, next_scales, blocks_after

        blocks, next_blocks = (_load_blocks(inputs, at, jnp.int32(tile), shape) for tile in range(2))
        scales = _load_scales_of(inputs, blocks, at, layer, shape)
        return lax.fori_loop(0, at.num_tiles, copy_tile, (tiles_done, blocks, scales, next_blocks))[0]

    num_turns = 2 * lax.fori_loop(first, last, segment, jnp.int32(0))
    # A thread block may not end before all that was signalled to it.
    drain(kv.free, jnp.maximum(num_turns - slots, 0), num_turns, slots)
    drain(scratch.q_free, jnp.maximum(last - first - 2, 0), last - first, 2)


def _copy_queries(inputs: Inputs, scratch: Scratch, at: Segment, nth: Array, shape: DecodeShape) -> None:
    slot = lax.rem(nth, jnp.int32(2))
    pl.when(nth >= 2)(lambda: plgpu.barrier_wait(scratch.q_free.at[slot]))
    # What is left of the columns is never written, and what comes of it never stored.
    filled = scratch.q if shape.is_interpreted else scratch.q[0]
    heads = pl.ds(at.kv_head * shape.group, shape.group)
    for slab in range(shape.num_slabs):
        plgpu.copy_gmem_to_smem(
            inputs.q.at[at.token, heads, pl.ds(slab * shape.slab, shape.slab)],
            filled.at[slot, slab, pl.ds(0, shape.group)],
            scratch.q_full.at[slot],
        )


def _token(at: Segment, tile: Array, nth: int, shape: DecodeShape) -> Array:
    """Where a piece begins in its sequence. Past the context's end, its last piece stands in."""
    return jnp.minimum(at.start + tile * shape.tile + nth * shape.piece, at.kv_end - 1)


def _load_blocks(inputs: Inputs, at: Segment, tile: Array, shape: DecodeShape) -> tuple[Array, ...]:
    """The physical block of each piece of a tile."""
    tokens = (_token(at, tile, nth, shape) for nth in range(shape.pieces_per_tile))
    return tuple(inputs.block_tables[at.row, lax.div(token, jnp.int32(shape.block_size))] for token in tokens)


def _piece_of_block(at: Segment, tile: Array, nth: int, shape: DecodeShape) -> Array:
    return lax.div(lax.rem(_token(at, tile, nth, shape), jnp.int32(shape.block_size)), jnp.int32(shape.piece))


def _head(block: Array, which: int, at: Segment, layer: Array, shape: DecodeShape) -> Array:
    """Where the K (0) or V (1) of the segment's head is among all heads of all blocks."""
    return ((block * shape.num_layers + layer) * 2 + which) * shape.num_kv_heads + at.kv_head


def _load_scales_of(
    inputs: Inputs, blocks: tuple[Array, ...], at: Segment, layer: Array, shape: DecodeShape
) -> tuple[tuple[Array, ...], ...] | None:
    """The scales of a quantised tile's pieces, of K and of V."""
    if inputs.kv_scales is None:
        return None
    return tuple(
        tuple(inputs.kv_scales[_head(block, which, at, layer, shape)] for block in blocks) for which in range(2)
    )


def _store_scales(scales: tuple[Array, ...], destination: Ref, shape: DecodeShape) -> None:
    """Leave each token's scale, relative to the tile's largest, and that one: [2, tile]."""
    largest = reduce(jnp.maximum, scales, jnp.float32(SMALLEST_SCALE))

    def spread(scale: Array) -> Array:
        return plgpu.layout_cast(jnp.full((shape.tile,), scale, jnp.float32), COLUMN)

    token = plgpu.broadcasted_iota(jnp.int32, (shape.tile,), 0, layout=COLUMN)
    column = spread(jnp.float32(1))
    for nth, scale in enumerate(scales):
        column = jnp.where(token >= nth * shape.piece, spread(scale / largest), column)
    destination.at[0][...] = column
    destination.at[1][...] = spread(largest)
