"""The decode kernel's consumer: attends a worker's tiles."""

import math
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.chips.memory import Ref
from pallas_kernels.paged_attention.hopper.decode_memory import (
    DecodeShape,
    Inputs,
    Scratch,
    multiplied,
    my_segments,
    segment_at,
)
from pallas_kernels.paged_attention.hopper.decode_quantized import (
    Scales,
    in_order,
    load_scales,
    widened_keys,
    widened_values,
)
from pallas_kernels.paged_attention.hopper.schedule import Segment
from pallas_kernels.paged_attention.hopper.tile import (
    LEAST,
    MATRIX,
    interpreted_product,
    powers_of_two,
    spread,
    swizzle_of,
)

ROW = plgpu.Layout.WGMMA.reduce(0)
"""One entry for each head."""

TRANSPOSED = plgpu.Layout.WGMMA_TRANSPOSED


def consume(inputs: Inputs, scratch: Scratch, out: Ref, part_outputs: Ref, part_sums: Ref, shape: DecodeShape) -> None:
    """Attend the worker's tiles."""
    if shape.is_quantized and shape.sizes.workers_per_sm > 1:
        # No warpgroup gives registers away, and no thread gets more than it starts with: this only limits ptxas. With
        # no limit ptxas takes more than the share, and a multiprocessor would have registers for one worker.
        plgpu.set_max_registers(shape.registers, action="increase")
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
            # Repeated, since stores write whole cache lines.
            part_sums.at[at.part][...] = each_row(top + jnp.log2(total), output[:64])

        return tiles_done + at.num_tiles

    lax.fori_loop(first, last, segment, jnp.int32(0))


def _attend_tiles(
    inputs: Inputs, scratch: Scratch, q_slot: Array, at: Segment, tiles_done: Array, shape: DecodeShape
) -> tuple[Array, Array, Array]:
    """A segment's output [rows, columns] before division, and its softmax's largest score and sum, for each column."""
    tile, columns = shape.tile, shape.columns
    tiles, slots = multiplied(scratch, shape), jnp.int32(shape.sizes.slots)
    queries = (scratch.q if shape.is_interpreted else scratch.q[1]).at[q_slot]
    slopes = None if inputs.slopes is None else load_row(inputs.slopes.at[at.kv_head])
    q_scales = None if inputs.q_scales is None else load_row(inputs.q_scales.at[at.token, at.kv_head])

    def attend_tile(index: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        output, top, total = carry
        use = 2 * (tiles_done + index)
        k_slot, v_slot = lax.rem(use, slots), lax.rem(use + 1, slots)
        start = at.start + index * tile

        plgpu.barrier_wait(scratch.full.at[k_slot])
        products = _multiply_keys(tiles.at[k_slot], queries, shape)
        scales = None
        if q_scales is not None:
            scales = load_scales(scratch.scales.at[k_slot], shape)
            products = products * spread(scales.k, columns) * each_row(q_scales, products)
        plgpu.barrier_arrive(scratch.free.at[k_slot])

        scores = _scores(products, start, at, slopes, scales, shape)
        new_top = jnp.maximum(top, scores.max(axis=0))
        shrink = jnp.exp2(top - new_top)
        weights = jnp.exp2(scores - each_row(new_top, scores))
        plgpu.barrier_wait(scratch.full.at[v_slot])
        if shape.pool_dtype != jnp.int8:
            pl.when(_is_partial(at, start, shape))(lambda: _clear_unseen(tiles.at[v_slot], start, at))
        scratch.weights.T[...] = plgpu.layout_cast(weights.astype(shape.compute_dtype), TRANSPOSED)
        weighted = _multiply_values(tiles.at[v_slot], scratch.weights, shape)
        plgpu.barrier_arrive(scratch.free.at[v_slot])
        unscaled = weights if scales is None else weights * spread(scales.v_inverse, columns)
        return (
            output * each_row(shrink, output) + weighted,
            new_top,
            # The sum over the tile's tokens comes last, since the warps must synchronise for it.
            total * each_row(shrink, total) + unscaled,
        )

    output, top, total = lax.fori_loop(0, at.num_tiles, attend_tile, _start(inputs, at, shape))
    return output, top, total.sum(axis=0)


def _start(inputs: Inputs, at: Segment, shape: DecodeShape) -> tuple[Array, Array, Array]:
    """Output, largest score and the sum's share of each token of a tile, before the first tile of a segment."""
    tile, columns = shape.tile, shape.columns
    if inputs.begun is None:
        return (
            plgpu.layout_cast(jnp.zeros((shape.rows, columns), jnp.float32), MATRIX),
            plgpu.layout_cast(jnp.full((columns,), LEAST, jnp.float32), ROW),
            plgpu.layout_cast(jnp.zeros((tile, columns), jnp.float32), MATRIX),
        )
    begun = inputs.begun
    # Of an item's segments, only the first starts no later than the first position that the query sees.
    is_begun = (at.kv_begin > 0) & (at.start <= at.kv_begin)
    entry = jnp.where(is_begun, at.token, jnp.int32(begun.sums.shape[0] - 1))
    return (
        plgpu.load(begun.outputs.at[entry, at.kv_head], layout=MATRIX, optimized=False),
        load_row(begun.sums.at[entry, at.kv_head]),
        # A normalised output has a sum of 1. Where the softmax is empty, the first score makes this sum 0.
        plgpu.layout_cast(jnp.full((tile, columns), 1 / tile, jnp.float32), MATRIX),
    )


def _is_partial(at: Segment, start: Array, shape: DecodeShape) -> Array:
    """Whether a tile holds slots that its query does not see."""
    return (start < at.kv_begin) | (start + shape.tile > at.kv_end)


def _multiply_keys(keys: Ref, queries: Ref, shape: DecodeShape) -> Array:
    """Products [tile, columns] of a tile's keys and a group's queries."""
    return _product(_key_terms(keys, queries, shape), (shape.tile, shape.columns), shape)


def _key_terms(keys: Ref, queries: Ref, shape: DecodeShape) -> Iterator[tuple[Array | Ref, Ref]]:
    """Slabs of keys, each with the slab of queries that multiplies it.

    The generator makes one slab at a time: it widens a slab while the products of earlier slabs are in flight.
    """
    if not shape.is_quantized:
        for slab in range(shape.num_slabs):
            yield keys.at[:, pl.ds(slab * shape.slab, shape.slab)], queries.at[slab].T
        return
    half = shape.num_slabs // 2
    for slab in range(half):
        for nth, part in enumerate(widened_keys(keys, slab, shape)):
            yield part, queries.at[slab + nth * half].T


def _multiply_values(values: Ref, weights: Ref, shape: DecodeShape) -> Array:
    """A tile's weighted sum of values, over a quantised pool with the rows of ``widened_values``.

    The stores of the weights to shared memory may be in flight.
    """
    a = widened_values(values, shape) if shape.is_quantized else values.T
    plgpu.commit_smem()
    return _product(iter([(a, weights.T)]), (shape.rows, shape.columns), shape)


def _product(terms: Iterator[tuple[Array | Ref, Ref]], dims: tuple[int, int], shape: DecodeShape) -> Array:
    """The sum of the products of a and b; each product starts before the next term is made.

    For ``a`` in registers, the interpreter does plain arithmetic.
    """
    if shape.is_quantized and shape.is_interpreted:
        products = jnp.zeros(dims, jnp.float32)
        for a, b in terms:
            products = products + interpreted_product(a, b[...])
        return products

    def multiply(accumulator: Ref) -> Array:
        for a, b in terms:
            plgpu.wgmma(accumulator, a, b)
        return accumulator[...]

    return pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef(dims, jnp.float32))


def _scores(
    products: Array, start: Array, at: Segment, slopes: Array | None, scales: Scales | None, shape: DecodeShape
) -> Array:
    """Scores in powers of two, minus infinity for invisible positions.

    Scores over a quantised pool include log2 of V's scales, so that their weights include V's scales.
    """
    values, factor = powers_of_two(products, shape.scoring)
    scores = values * factor
    if scales is not None:
        scores = scores + spread(scales.v_log, shape.columns)
    position = plgpu.broadcasted_iota(jnp.int32, scores.shape, 0, layout=MATRIX) + start
    if slopes is not None:
        distance = (position - (at.kv_end - 1)).astype(jnp.float32)
        scores = scores + distance * each_row(slopes, scores)
    is_seen = (position >= at.kv_begin) & (position < at.kv_end)
    return jnp.where(is_seen, scores, -jnp.inf)


def _clear_unseen(values: Ref, start: Array, at: Segment) -> None:
    """Zero invisible slots, which can hold anything: 0 * NaN is NaN."""
    width = math.gcd(values.shape[1], 64)
    for first_row in range(0, values.shape[0], 64):
        position = plgpu.broadcasted_iota(jnp.int32, (64, width), 0, layout=MATRIX) + (start + first_row)
        is_seen = (position >= at.kv_begin) & (position < at.kv_end)
        for first_column in range(0, values.shape[1], width):
            square = values.at[pl.ds(first_row, 64), pl.ds(first_column, width)]
            loaded = plgpu.load(square, layout=MATRIX)
            square[...] = jnp.where(is_seen, loaded, jnp.zeros_like(loaded))
    plgpu.commit_smem()  # other threads may read what this thread clears


def each_row(row: Array, like: Array) -> Array:
    """A value for each column, repeated down the columns."""
    return lax.broadcast_in_dim(row, like.shape, [1])


def load_row(ref: Ref) -> Array:
    return plgpu.load(ref, layout=ROW, optimized=False)


def store_output(output: Array, out_smem: Any, destination: Ref, shape: DecodeShape) -> None:
    """Write [rows, columns] to [group, head_dim] in device memory."""
    tiled = out_smem if shape.is_interpreted else out_smem[0]
    if shape.is_quantized:
        tiled.T[...] = in_order(output.astype(shape.dtype), shape)
    else:
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
