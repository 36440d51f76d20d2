"""The decode kernel's arithmetic: a consumer attends a worker's tiles, a widener makes quantised ones float16 first."""

from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.paged_attention.hopper.decode_memory import (
    REGISTERS,
    WIDE_SLOTS,
    WIDENED_BYTES,
    DecodeShape,
    Inputs,
    Scratch,
    drain,
    my_segments,
    segment_at,
)
from pallas_kernels.paged_attention.hopper.schedule import Segment
from pallas_kernels.paged_attention.hopper.tile import COLUMN, LEAST, MATRIX, Ref, powers_of_two, spread, swizzle_of

ROW = plgpu.Layout.WGMMA.reduce(0)
"""One entry for each head."""

TRANSPOSED = plgpu.Layout.WGMMA_TRANSPOSED


def consume(inputs: Inputs, scratch: Scratch, out: Ref, part_outputs: Ref, part_sums: Ref, shape: DecodeShape) -> None:
    """Attend the worker's tiles."""
    if shape.is_quantized:
        plgpu.set_max_registers(REGISTERS, action="increase")
    first, last = my_segments(inputs)

    def segment(index: Array, tiles_done: Array) -> Array:
        at = segment_at(inputs, index)
        slot = lax.rem(index - first, jnp.int32(2))
        plgpu.barrier_wait(scratch.q_full.at[slot])
        output, top, total = _attend_tiles(inputs, scratch, slot, at, tiles_done, shape)
        plgpu.barrier_arrive(scratch.q_free.at[slot])

        @pl.when(at.part < 0)
        def _whole() -> None:
            heads = pl.ds(at.kv_head * shape.group, shape.group)
            sums = total
            if inputs.sinks is not None:
                sums = sums + jnp.exp2(load_row(inputs.sinks.at[at.kv_head]) - top)
            store_output(output / each_row(sums, output), scratch.out, out.at[at.token, heads], shape)

        @pl.when(at.part >= 0)
        def _part() -> None:
            part_outputs.at[at.part][...] = output / each_row(total, output)
            # Repeated, since only whole cache lines are stored.
            part_sums.at[at.part][...] = each_row(top + jnp.log2(total), output[:64])

        return tiles_done + at.num_tiles

    lax.fori_loop(first, last, segment, jnp.int32(0))


def _attend_tiles(
    inputs: Inputs, scratch: Scratch, q_slot: Array, at: Segment, tiles_done: Array, shape: DecodeShape
) -> tuple[Array, Array, Array]:
    """A segment's output [rows, columns] before division, and its softmax's largest score and sum, for each column."""
    tile, columns = shape.tile, shape.columns
    kv, slots = scratch.operands, jnp.int32(WIDE_SLOTS if shape.is_quantized else shape.sizes.slots)
    queries = (scratch.q if shape.is_interpreted else scratch.q[1]).at[q_slot]
    slopes = None if inputs.slopes is None else load_row(inputs.slopes.at[at.kv_head])
    q_scales = None if inputs.q_scales is None else load_row(inputs.q_scales.at[at.token, at.kv_head])

    def attend_tile(index: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        output, top, total = carry
        turn = 2 * (tiles_done + index)
        k_slot, v_slot = lax.rem(turn, slots), lax.rem(turn + 1, slots)
        start = at.start + index * tile

        plgpu.barrier_wait(kv.full.at[k_slot])
        products = _multiply_keys(kv.tiles.at[k_slot], queries, shape)
        if q_scales is not None:
            column, largest = _load_scales(kv.scales.at[k_slot])
            products = products * spread(column, columns) * each_row(q_scales, products) * largest
        plgpu.barrier_arrive(kv.free.at[k_slot])

        scores = _scores(products, start, at, slopes, shape)
        new_top = jnp.maximum(top, scores.max(axis=0))
        shrink = jnp.exp2(top - new_top)
        weights = jnp.exp2(scores - each_row(new_top, scores))
        plgpu.barrier_wait(kv.full.at[v_slot])
        scaled = weights
        if shape.is_quantized:
            # Relative to the tile's largest scale they stay in float16's range.
            column, largest = _load_scales(kv.scales.at[v_slot])
            scaled = weights * spread(column, columns)
        else:
            pl.when(_is_partial(at, start, shape))(lambda: _clear_unseen(kv.tiles.at[v_slot], start, at))
        scratch.weights.T[...] = plgpu.layout_cast(scaled.astype(shape.compute_dtype), TRANSPOSED)
        plgpu.commit_smem()

        weighted = _product(kv.tiles.at[v_slot].T, scratch.weights.T, (shape.rows, columns))
        if shape.is_quantized:
            weighted = weighted * largest
        plgpu.barrier_arrive(kv.free.at[v_slot])
        return (
            output * each_row(shrink, output) + weighted,
            new_top,
            # Summed over the tile's tokens only in the end: that takes the warps' agreement.
            total * each_row(shrink, total) + weights,
        )

    start = (
        plgpu.layout_cast(jnp.zeros((shape.rows, columns), jnp.float32), MATRIX),
        plgpu.layout_cast(jnp.full((columns,), LEAST, jnp.float32), ROW),
        plgpu.layout_cast(jnp.zeros((tile, columns), jnp.float32), MATRIX),
    )
    output, top, total = lax.fori_loop(0, at.num_tiles, attend_tile, start)
    return output, top, total.sum(axis=0)


def _load_scales(scales: Ref) -> tuple[Array, Array]:
    """Each token's relative scale, and the largest."""
    return _load_column(scales.at[0]), scales[1, 0]


def widen_tiles(inputs: Inputs, scratch: Scratch, shape: DecodeShape) -> None:
    """Make the tiles of a quantised pool what the tensor cores multiply."""
    plgpu.set_max_registers(REGISTERS, action="increase")
    stored, wide = scratch.stored, scratch.operands
    first, last = my_segments(inputs)
    width = min(swizzle_of(shape.head_dim, 1)[0], WIDENED_BYTES)

    def segment(index: Array, tiles_done: Array) -> Array:
        at = segment_at(inputs, index)

        def widen_tile(index: Array, tiles_done: Array) -> Array:
            start = at.start + index * shape.tile
            for which in range(2):
                turn = 2 * tiles_done + which
                source, target = lax.rem(turn, jnp.int32(shape.sizes.slots)), lax.rem(turn, jnp.int32(WIDE_SLOTS))
                plgpu.barrier_wait(stored.full.at[source])

                @pl.when(turn >= WIDE_SLOTS)
                def _wait(target: Array = target) -> None:
                    plgpu.barrier_wait(wide.free.at[target])

                for column in range(0, shape.rows, width):
                    columns = pl.ds(column, width)
                    wide.tiles.at[target, :, columns][...] = _widen(stored.tiles[source, :, columns])
                for row in range(2):
                    wide.scales.at[target, row][...] = _load_column(stored.scales.at[source, row])
                if which == 1:

                    @pl.when(_is_partial(at, start, shape))
                    def _clear(target: Array = target) -> None:
                        plgpu.commit_smem()  # other threads may hold what this one clears
                        _clear_unseen(wide.tiles.at[target], start, at)

                plgpu.commit_smem()  # before the tensor cores read what was written, and copies write what was read
                plgpu.barrier_arrive(stored.free.at[source])
                plgpu.barrier_arrive(wide.full.at[target])
            return tiles_done + 1

        return lax.fori_loop(0, at.num_tiles, widen_tile, tiles_done)

    num_turns = 2 * lax.fori_loop(first, last, segment, jnp.int32(0))
    drain(wide.free, jnp.maximum(num_turns - WIDE_SLOTS, 0), num_turns, WIDE_SLOTS)


def _is_partial(at: Segment, start: Array, shape: DecodeShape) -> Array:
    """Whether a tile holds slots that its query does not see."""
    return (start < at.kv_begin) | (start + shape.tile > at.kv_end)


def _widen(quantized: Array) -> Array:
    """Stored 8-bit numbers in float16, exactly, before their scale."""
    if quantized.dtype == jnp.float8_e4m3fn:
        return quantized.astype(jnp.float16)
    # 0x6400 is 1024 in float16, and its last bit 1. Flipping the sign bit makes x of -128..127 x + 128.
    shifted = quantized.astype(jnp.uint16) ^ jnp.uint16(0x6480)
    return lax.bitcast_convert_type(shifted, jnp.float16) - jnp.float16(1024 + 128)


def _multiply_keys(keys: Ref, queries: Ref, shape: DecodeShape) -> Array:
    def multiply(accumulator: Ref) -> Array:
        for slab in range(shape.num_slabs):
            plgpu.wgmma(accumulator, keys.at[:, pl.ds(slab * shape.slab, shape.slab)], queries.at[slab].T)
        return accumulator[...]

    return pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef((shape.tile, shape.columns), jnp.float32))


def _product(a: Ref, b: Ref, dims: tuple[int, int]) -> Array:
    def multiply(accumulator: Ref) -> Array:
        plgpu.wgmma(accumulator, a, b)
        return accumulator[...]

    return pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef(dims, jnp.float32))


def _scores(products: Array, start: Array, at: Segment, slopes: Array | None, shape: DecodeShape) -> Array:
    """Scores in powers of two, minus infinity where the query must not look."""
    values, factor = powers_of_two(products, shape.scoring)
    scores = values * factor
    position = plgpu.broadcasted_iota(jnp.int32, scores.shape, 0, layout=MATRIX) + start
    if slopes is not None:
        distance = (position - (at.kv_end - 1)).astype(jnp.float32)
        scores = scores + distance * each_row(slopes, scores)
    is_seen = (position >= at.kv_begin) & (position < at.kv_end)
    return jnp.where(is_seen, scores, -jnp.inf)


def _clear_unseen(values: Ref, start: Array, at: Segment) -> None:
    """Slots that nobody may see can hold anything, and 0 * NaN is NaN."""
    for first_row in range(0, values.shape[0], 64):
        position = plgpu.broadcasted_iota(jnp.int32, (64, 64), 0, layout=MATRIX) + (start + first_row)
        is_seen = (position >= at.kv_begin) & (position < at.kv_end)
        for first_column in range(0, values.shape[1], 64):
            square = values.at[pl.ds(first_row, 64), pl.ds(first_column, 64)]
            loaded = plgpu.load(square, layout=MATRIX)
            square[...] = jnp.where(is_seen, loaded, jnp.zeros_like(loaded))


def each_row(row: Array, like: Array) -> Array:
    """A value for each column, repeated down the columns."""
    return lax.broadcast_in_dim(row, like.shape, [1])


def _load_column(ref: Ref) -> Array:
    return plgpu.load(ref, layout=COLUMN, optimized=False)


def load_row(ref: Ref) -> Array:
    return plgpu.load(ref, layout=ROW, optimized=False)


def store_output(output: Array, out_smem: Any, destination: Ref, shape: DecodeShape) -> None:
    """Write [rows, columns] to [group, head_dim] in device memory."""
    tiled = out_smem if shape.is_interpreted else out_smem[0]
    tiled.T[...] = plgpu.layout_cast(output.astype(shape.dtype), TRANSPOSED)
    plgpu.commit_smem()
    slab = swizzle_of(shape.head_dim, shape.dtype.itemsize)[1]
    for first_head in range(0, shape.group, 8):
        heads = pl.ds(first_head, min(8, shape.group - first_head))
        for nth in range(shape.head_dim // slab):
            columns = pl.ds(nth * slab, slab)
            if shape.is_interpreted:
                source = out_smem.at[heads, columns]
            else:
                source = out_smem[1].at[first_head // 8, nth, pl.ds(0, heads.size)]
            plgpu.copy_smem_to_gmem(source, destination.at[heads, columns])
    plgpu.wait_smem_to_gmem(0)
