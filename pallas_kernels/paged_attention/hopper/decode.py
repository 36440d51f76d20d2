"""Decode attention on Hopper at the speed of memory: rows of one query, over their blocks.

One thread block is one worker (see schedule.py) of two warpgroups. The producer copies the blocks of a tile into a ring
in shared memory, one TMA for each block of K and of V. The consumer multiplies them on the tensor cores with K, and
then V transposed, as the large operand, and the heads of a group as the small one:

    scores [tile_tokens, heads] = K [tile_tokens, head_dim] @ q^T [head_dim, heads]
    output [head_dim, heads]   += V^T [head_dim, tile_tokens] @ weights [tile_tokens, heads]

So a group of up to 8 heads costs what the tensor cores' smallest product costs, and the arithmetic hides behind the
copies: 64 tokens of K and V (32 KB) take 1.0 us of a multiprocessor's share of the bandwidth.
"""

from dataclasses import dataclass
from functools import reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Float, Int

from pallas_kernels.block_pool import BlockPool, KvScales, block_size_of, is_quantized, num_kv_heads_of
from pallas_kernels.paged_attention.hopper.schedule import Merge, Queries, Schedule, Segment, schedule_decode
from pallas_kernels.paged_attention.hopper.tile import (
    COLUMN,
    LEAST,
    LOG2E,
    MATRIX,
    Ref,
    Scoring,
    powers_of_two,
    swizzle_of,
    swizzling,
    tiled_smem,
)

ROW = plgpu.Layout.WGMMA.reduce(0)
"""One entry for each head."""

TRANSPOSED = plgpu.Layout.WGMMA_TRANSPOSED

SEGMENT, MERGE = Segment(), Merge()

WIDE_SLOTS = 4
"""Tiles of K and V of a quantised pool that wait in float16."""

SMALLEST_SCALE = 2.0**-126
"""Scales of a pool not written yet are 0, and 0 / 0 is NaN."""

WIDENED_BYTES = 64
"""Of a row, what a widener makes wide at once: a thread's registers hold no more beside it."""

WIDENER_REGISTERS = 80
"""Of a thread of each of the three warpgroups of a worker: two workers share a multiprocessor's 65,536."""

PARTS_AT_ONCE = 4
"""Parts that a merge loads together: their latencies overlap."""


@dataclass(frozen=True)
class DecodeSizes:
    """What the tuner chooses.

    Args:
        tile_tokens: tokens that one product covers, a multiple of 64.
        slots: tiles of K or of V that the ring holds.
        workers_per_sm: thread blocks that share a multiprocessor.
    """

    tile_tokens: int = 64
    slots: int = 6
    workers_per_sm: int = 2


@dataclass(frozen=True)
class _Shape:
    """Everything static about a launch."""

    num_layers: int
    num_kv_heads: int
    group: int
    head_dim: int
    block_size: int
    dtype: jnp.dtype
    pool_dtype: jnp.dtype
    scoring: Scoring
    sizes: DecodeSizes
    num_workers: int
    is_interpreted: bool

    @property
    def is_quantized(self) -> bool:
        return is_quantized(self.pool_dtype)

    @property
    def compute_dtype(self) -> jnp.dtype:
        """What the tensor cores multiply. Quantised numbers are exact in float16, and cheaply made such."""
        return jnp.dtype(jnp.float16) if self.is_quantized else self.dtype

    @property
    def columns(self) -> int:
        """Query heads, filled up to what the tensor cores multiply."""
        return _up(self.group, 8)

    @property
    def rows(self) -> int:
        """``head_dim``, filled up likewise."""
        return _up(self.head_dim, 64)

    @property
    def tile(self) -> int:
        return self.sizes.tile_tokens

    @property
    def piece(self) -> int:
        """Tokens that one TMA copies: a block, or the part of a large block that a tile covers.

        Rows narrower than the tile are contiguous in it eight by eight only.
        """
        return 8 if self.head_dim < self.rows else min(self.block_size, self.tile)

    @property
    def slab(self) -> int:
        """Columns of a slab: as wide as the swizzle. The queries lie in slabs of [columns, slab]."""
        return swizzle_of(self.head_dim, self.compute_dtype.itemsize)[1]

    @property
    def num_slabs(self) -> int:
        return self.head_dim // self.slab

    @property
    def pieces_per_tile(self) -> int:
        return self.tile // self.piece


class _Ring(NamedTuple):
    """Tiles of K and of V in turn, and barriers: ``full`` when one has landed, ``free`` when it has been read."""

    tiles: Any  # [slots, tile, rows]
    scales: Any  # [slots, 2, tile]: each token's, relative to the largest of the tile; and that one. None: unscaled
    full: Any
    free: Any


class _Scratch(NamedTuple):
    """Shared memory and barriers."""

    stored: _Ring  # as the pool has them
    wide: _Ring | None  # the same in float16, of a quantised pool
    q: Any  # [2, num_slabs, columns, slab]
    q_full: Any
    q_free: Any
    weights: Any  # [columns, tile]
    out: Any  # [columns, rows]

    @property
    def operands(self) -> _Ring:
        """What the tensor cores multiply."""
        return self.wide or self.stored


class _Inputs(NamedTuple):
    """What the kernel reads, in device memory."""

    q: Ref
    q_scales: Ref | None  # [tokens, num_kv_heads, columns], for a quantised pool
    pieces: Ref  # [.., piece, head_dim]: the pool
    kv_scales: Ref | None
    layer: Ref
    block_tables: Ref
    segments: Ref
    first_segment: Ref
    last_segment: Ref
    slopes: Ref | None  # [num_kv_heads, columns]
    sinks: Ref | None


def columns_that_fit(head_dim: int) -> int:
    """Query heads of a KV head for which the consumer's sums stay in registers."""
    return 152 * 128 // (_up(head_dim, 64) + 128) // 8 * 8


def decode_smem_bytes(sizes: DecodeSizes, group: int, head_dim: int, pool_dtype: jnp.dtype) -> int:
    """Shared memory that a worker takes."""
    columns, rows = _up(group, 8), _up(head_dim, 64)
    wide = WIDE_SLOTS * sizes.tile_tokens * (rows * 2 + 8) if is_quantized(pool_dtype) else 0
    ring = sizes.slots * sizes.tile_tokens * rows * pool_dtype.itemsize
    scales = 2 * sizes.slots * sizes.tile_tokens * 4 if is_quantized(pool_dtype) else 0
    # Queries (two), weights and output in 2 bytes each; 6 KiB for alignment, barriers and the warps' sums.
    return ring + wide + scales + 2 * columns * (2 * head_dim + sizes.tile_tokens + rows) + 6 * 1024


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def attend_decode(
    out: jax.Ref,
    queries: Queries,
    q: Float[Array, "tokens num_heads head_dim"],
    pool: BlockPool,
    layer: Int[Array, ""],
    block_tables: Int[Array, "num_seqs max_blocks"],
    *,
    scoring: Scoring,
    alibi_slopes: Float[Array, " num_heads"] | None,
    sinks: Float[Array, " num_heads"] | None,
    kv_scales: KvScales | None,
    sizes: DecodeSizes,
    num_sms: int,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> None:
    """Attend single queries and write their outputs, and nothing else, into ``out`` (like q).

    Args:
        queries: which.
        layer: on the device, so that one compiled kernel serves all layers.
        num_sms: multiprocessors to fill.
        interpret: run on a CPU instead.

    The other arguments are those of ``paged_attention``.
    """
    shape = _Shape(
        num_layers=pool.shape[1],
        num_kv_heads=num_kv_heads_of(pool),
        group=q.shape[1] // num_kv_heads_of(pool),
        head_dim=q.shape[2],
        block_size=block_size_of(pool),
        dtype=q.dtype,
        pool_dtype=pool.dtype,
        scoring=scoring,
        sizes=sizes,
        num_workers=num_sms * sizes.workers_per_sm,
        is_interpreted=interpret is not None,
    )
    schedule = schedule_decode(
        queries,
        num_kv_heads=shape.num_kv_heads,
        block_size=shape.block_size,
        tile_tokens=shape.tile,
        num_workers=shape.num_workers,
    )
    slopes, sinks = (_by_kv_head(x, shape) for x in (alibi_slopes, sinks))
    parts = _attend(out, q, pool, kv_scales, layer, block_tables, schedule, slopes, sinks, shape, interpret)
    _merge(out, *parts, schedule, sinks, shape, interpret)


def _by_kv_head(x: Float[Array, " num_heads"] | None, shape: _Shape) -> Float[Array, "num_kv_heads columns"] | None:
    """In powers of two, a row for each KV head."""
    if x is None:
        return None
    grouped = x.astype(jnp.float32).reshape(shape.num_kv_heads, shape.group) * LOG2E
    return jnp.pad(grouped, ((0, 0), (0, shape.columns - shape.group)))


def _fit_float16(
    q: Float[Array, "tokens num_heads head_dim"], shape: _Shape
) -> tuple[Float[Array, "tokens num_heads head_dim"], Float[Array, "tokens num_kv_heads columns"]]:
    """Queries in float16 whatever their range, and the powers of two that they are to be multiplied by."""
    largest = jnp.abs(q).max(axis=2).astype(jnp.float32)
    _, exponent = jnp.frexp(largest)
    scales = jnp.ldexp(jnp.float32(1), jnp.where(jnp.isfinite(largest), exponent, 0))
    grouped = scales.reshape(-1, shape.num_kv_heads, shape.group)
    padded = jnp.pad(grouped, ((0, 0), (0, 0), (0, shape.columns - shape.group)), constant_values=1)
    return (q.astype(jnp.float32) / scales[:, :, None]).astype(jnp.float16), padded


def _attend(
    out: Ref,
    q: Float[Array, "tokens num_heads head_dim"],
    pool: BlockPool,
    kv_scales: KvScales | None,
    layer: Int[Array, ""],
    block_tables: Int[Array, "num_seqs max_blocks"],
    schedule: Schedule,
    slopes: Float[Array, "num_kv_heads columns"] | None,
    sinks: Float[Array, "num_kv_heads columns"] | None,
    shape: _Shape,
    interpret: plgpu.InterpretGPUParams | None,
) -> tuple[Float[Array, "parts rows columns"], Float[Array, "parts 64 columns"]]:
    """Write the outputs of whole items; return the parts of the others: normalised outputs, and log2 of their sums."""
    num_parts = 2 * shape.num_workers
    q_scales = None
    if shape.is_quantized:
        q, q_scales = _fit_float16(q, shape)
    if shape.pool_dtype == jnp.int8:
        pool = lax.bitcast_convert_type(pool, jnp.uint8)
    inputs = _Inputs(
        q,
        q_scales,
        pool.reshape(-1, shape.piece, shape.head_dim),
        None if kv_scales is None else kv_scales.reshape(-1),
        layer.reshape(1),
        block_tables,
        schedule.segments,
        schedule.first_segment,
        schedule.last_segment,
        slopes,
        sinks,
    )
    operands, structure = jax.tree.flatten((inputs, out))

    def body(*refs):
        inputs, out_ref = jax.tree.unflatten(structure, refs[: len(operands)])
        part_outputs, part_sums, scratch = (
            refs[len(operands)],
            refs[len(operands) + 1],
            _Scratch(*refs[len(operands) + 2 :]),
        )
        warpgroup = lax.axis_index("warpgroup")
        pl.when(warpgroup == 0)(lambda: _produce(inputs, scratch, shape))
        pl.when(warpgroup == 1)(lambda: _consume(inputs, scratch, out_ref, part_outputs, part_sums, shape))
        if shape.is_quantized:
            pl.when(warpgroup == 2)(lambda: _widen_tiles(inputs, scratch, shape))

    return plgpu.kernel(
        body,
        out_type=[
            jax.ShapeDtypeStruct((num_parts, shape.rows, shape.columns), jnp.float32),
            jax.ShapeDtypeStruct((num_parts, 64, shape.columns), jnp.float32),
        ],
        grid=(shape.num_workers,),
        grid_names=("worker",),
        num_threads=3 if shape.is_quantized else 2,
        thread_name="warpgroup",
        kernel_name="paged_decode",
        scratch_types=_scratch_types(shape),
        # What warps write for each other is committed before it is read, and a tile is written after all warps agreed
        # on the maxima of the one before: after they read what was there.
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        interpret=interpret,
    )(*operands)


def _scratch_types(shape: _Shape) -> _Scratch:
    slots, queries = shape.sizes.slots, (2, shape.num_slabs, shape.columns, shape.slab)
    dtype = shape.compute_dtype
    if shape.is_interpreted:
        q_smem = plgpu.SMEM(queries, dtype)
    else:
        # A copy may fill part of what a product reads: two views of the same bytes, both swizzled.
        swizzle = swizzling(swizzle_of(shape.head_dim, dtype.itemsize)[0])
        q_smem = plgpu.RefUnion(
            plgpu.SMEM(queries, dtype, transforms=(swizzle,)), _operand(queries, shape.head_dim, dtype)
        )
    return _Scratch(
        stored=_ring(shape, slots, jnp.dtype(jnp.uint8) if shape.pool_dtype == jnp.int8 else shape.pool_dtype),
        wide=_ring(shape, WIDE_SLOTS, dtype) if shape.is_quantized else None,
        q=q_smem,
        q_full=plgpu.Barrier(num_arrivals=shape.num_slabs, num_barriers=2),
        q_free=plgpu.Barrier(num_barriers=2),
        weights=_operand((shape.columns, shape.tile), shape.head_dim, dtype),
        out=_out_smem(shape),
    )


def _ring(shape: _Shape, slots: int, dtype: jnp.dtype) -> _Ring:
    is_copied = dtype.itemsize == shape.pool_dtype.itemsize
    # A copy for each piece, and the producer's word that the scales are there; or the widener's word.
    arrivals = shape.pieces_per_tile + shape.is_quantized if is_copied else 1
    return _Ring(
        _operand((slots, shape.tile, shape.rows), shape.head_dim, dtype),
        plgpu.SMEM((slots, 2, shape.tile), jnp.float32) if shape.is_quantized else None,
        plgpu.Barrier(num_arrivals=arrivals, num_barriers=slots),
        plgpu.Barrier(num_barriers=slots),
    )


def _operand(dims: tuple[int, ...], head_dim: int, dtype: jnp.dtype) -> Any:
    """Shared memory that tensor cores read. Both operands of a product need one swizzle; head_dim bounds it."""
    swizzle, _ = swizzle_of(head_dim, dtype.itemsize)
    return tiled_smem(dims, dtype, swizzle if dtype.itemsize > 1 else min(swizzle, WIDENED_BYTES))


def _my_segments(inputs: _Inputs) -> tuple[Array, Array]:
    worker = lax.axis_index("worker")
    return inputs.first_segment[worker], inputs.last_segment[worker]


def _field(inputs: _Inputs, segment: Array) -> Segment:
    return Segment(*(inputs.segments[segment, column] for column in SEGMENT))


def _produce(inputs: _Inputs, scratch: _Scratch, shape: _Shape) -> None:
    """Copy the worker's queries and tiles into shared memory."""
    if shape.is_quantized:
        plgpu.set_max_registers(72, action="decrease")
    kv, slots, layer = scratch.stored, shape.sizes.slots, inputs.layer[0]
    first, last = _my_segments(inputs)

    def segment(index: Array, tiles_done: Array) -> Array:
        at = _field(inputs, index)
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
    _drain(kv.free, jnp.maximum(num_turns - slots, 0), num_turns, slots)
    _drain(scratch.q_free, jnp.maximum(last - first - 2, 0), last - first, 2)


def _drain(barriers: Ref, start: Array, stop: Array, slots: int) -> None:
    @pl.loop(start, stop)
    def _wait(turn: Array) -> None:
        plgpu.barrier_wait(barriers.at[lax.rem(turn, jnp.int32(slots))])


def _copy_queries(inputs: _Inputs, scratch: _Scratch, at: Segment, nth: Array, shape: _Shape) -> None:
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


def _token(at: Segment, tile: Array, nth: int, shape: _Shape) -> Array:
    """Where a piece begins in its sequence. Past the context's end, its last piece stands in."""
    return jnp.minimum(at.start + tile * shape.tile + nth * shape.piece, at.kv_end - 1)


def _load_blocks(inputs: _Inputs, at: Segment, tile: Array, shape: _Shape) -> tuple[Array, ...]:
    """The physical block of each piece of a tile."""
    tokens = (_token(at, tile, nth, shape) for nth in range(shape.pieces_per_tile))
    return tuple(inputs.block_tables[at.row, lax.div(token, jnp.int32(shape.block_size))] for token in tokens)


def _piece_of_block(at: Segment, tile: Array, nth: int, shape: _Shape) -> Array:
    return lax.div(lax.rem(_token(at, tile, nth, shape), jnp.int32(shape.block_size)), jnp.int32(shape.piece))


def _head(block: Array, which: int, at: Segment, layer: Array, shape: _Shape) -> Array:
    """Where the K (0) or V (1) of the segment's head is among all heads of all blocks."""
    return ((block * shape.num_layers + layer) * 2 + which) * shape.num_kv_heads + at.kv_head


def _load_scales_of(
    inputs: _Inputs, blocks: tuple[Array, ...], at: Segment, layer: Array, shape: _Shape
) -> tuple[tuple[Array, ...], ...] | None:
    """The scales of a quantised tile's pieces, of K and of V."""
    if inputs.kv_scales is None:
        return None
    return tuple(
        tuple(inputs.kv_scales[_head(block, which, at, layer, shape)] for block in blocks) for which in range(2)
    )


def _store_scales(scales: tuple[Array, ...], destination: Ref, shape: _Shape) -> None:
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


def _consume(inputs: _Inputs, scratch: _Scratch, out: Ref, part_outputs: Ref, part_sums: Ref, shape: _Shape) -> None:
    """Attend the worker's tiles."""
    if shape.is_quantized:
        plgpu.set_max_registers(WIDENER_REGISTERS, action="increase")
    first, last = _my_segments(inputs)

    def segment(index: Array, tiles_done: Array) -> Array:
        at = _field(inputs, index)
        slot = lax.rem(index - first, jnp.int32(2))
        plgpu.barrier_wait(scratch.q_full.at[slot])
        output, top, total = _attend_tiles(inputs, scratch, slot, at, tiles_done, shape)
        plgpu.barrier_arrive(scratch.q_free.at[slot])

        @pl.when(at.part < 0)
        def _whole() -> None:
            heads = pl.ds(at.kv_head * shape.group, shape.group)
            sums = total
            if inputs.sinks is not None:
                sums = sums + jnp.exp2(_load_row(inputs.sinks.at[at.kv_head]) - top)
            _store(output / _each_row(sums, output), scratch.out, out.at[at.token, heads], shape)

        @pl.when(at.part >= 0)
        def _part() -> None:
            part_outputs.at[at.part][...] = output / _each_row(total, output)
            # Repeated, since only whole cache lines are stored.
            part_sums.at[at.part][...] = _each_row(top + jnp.log2(total), output[:64])

        return tiles_done + at.num_tiles

    lax.fori_loop(first, last, segment, jnp.int32(0))


def _attend_tiles(
    inputs: _Inputs, scratch: _Scratch, q_slot: Array, at: Segment, tiles_done: Array, shape: _Shape
) -> tuple[Array, Array, Array]:
    """A segment's output [rows, columns] before division, and its softmax's largest score and sum, for each column."""
    tile, columns = shape.tile, shape.columns
    kv, slots = scratch.operands, jnp.int32(WIDE_SLOTS if shape.is_quantized else shape.sizes.slots)
    queries = (scratch.q if shape.is_interpreted else scratch.q[1]).at[q_slot]
    slopes = None if inputs.slopes is None else _load_row(inputs.slopes.at[at.kv_head])
    q_scales = None if inputs.q_scales is None else _load_row(inputs.q_scales.at[at.token, at.kv_head])

    def attend_tile(index: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        output, top, total = carry
        turn = 2 * (tiles_done + index)
        k_slot, v_slot = lax.rem(turn, slots), lax.rem(turn + 1, slots)
        start = at.start + index * tile

        plgpu.barrier_wait(kv.full.at[k_slot])
        products = _multiply_keys(kv.tiles.at[k_slot], queries, shape)
        if q_scales is not None:
            column, largest = _load_scales(kv.scales.at[k_slot])
            products = products * _each_column(column, products) * _each_row(q_scales, products) * largest
        plgpu.barrier_arrive(kv.free.at[k_slot])

        scores = _scores(products, start, at, slopes, shape)
        new_top = jnp.maximum(top, scores.max(axis=0))
        shrink = jnp.exp2(top - new_top)
        weights = jnp.exp2(scores - _each_row(new_top, scores))
        plgpu.barrier_wait(kv.full.at[v_slot])
        scaled = weights
        if shape.is_quantized:
            # Relative to the tile's largest scale they stay in float16's range.
            column, largest = _load_scales(kv.scales.at[v_slot])
            scaled = weights * _each_column(column, weights)
        else:
            pl.when(_is_partial(at, start, shape))(lambda: _clear_unseen(kv.tiles.at[v_slot], start, at))
        scratch.weights.T[...] = plgpu.layout_cast(scaled.astype(shape.compute_dtype), TRANSPOSED)
        plgpu.commit_smem()

        weighted = _product(kv.tiles.at[v_slot].T, scratch.weights.T, (shape.rows, columns))
        if shape.is_quantized:
            weighted = weighted * largest
        plgpu.barrier_arrive(kv.free.at[v_slot])
        return (
            output * _each_row(shrink, output) + weighted,
            new_top,
            # Summed over the tile's tokens only in the end: that takes the warps' agreement.
            total * _each_row(shrink, total) + weights,
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


def _widen_tiles(inputs: _Inputs, scratch: _Scratch, shape: _Shape) -> None:
    """Make the tiles of a quantised pool what the tensor cores multiply."""
    plgpu.set_max_registers(WIDENER_REGISTERS, action="increase")
    stored, wide = scratch.stored, scratch.operands
    first, last = _my_segments(inputs)
    width = min(swizzle_of(shape.head_dim, 1)[0], WIDENED_BYTES)

    def segment(index: Array, tiles_done: Array) -> Array:
        at = _field(inputs, index)

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
    _drain(wide.free, jnp.maximum(num_turns - WIDE_SLOTS, 0), num_turns, WIDE_SLOTS)


def _is_partial(at: Segment, start: Array, shape: _Shape) -> Array:
    """Whether a tile holds slots that its query does not see."""
    return (start < at.kv_begin) | (start + shape.tile > at.kv_end)


def _widen(quantized: Array) -> Array:
    """Stored 8-bit numbers in float16, exactly, before their scale."""
    if quantized.dtype == jnp.float8_e4m3fn:
        return quantized.astype(jnp.float16)
    # 0x6400 is 1024 in float16, and its last bit 1. Flipping the sign bit makes x of -128..127 x + 128.
    shifted = quantized.astype(jnp.uint16) ^ jnp.uint16(0x6480)
    return lax.bitcast_convert_type(shifted, jnp.float16) - jnp.float16(1024 + 128)


def _multiply_keys(keys: Ref, queries: Ref, shape: _Shape) -> Array:
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


def _scores(products: Array, start: Array, at: Segment, slopes: Array | None, shape: _Shape) -> Array:
    """Scores in powers of two, minus infinity where the query must not look."""
    values, factor = powers_of_two(products, shape.scoring)
    scores = values * factor
    position = plgpu.broadcasted_iota(jnp.int32, scores.shape, 0, layout=MATRIX) + start
    if slopes is not None:
        distance = (position - (at.kv_end - 1)).astype(jnp.float32)
        scores = scores + distance * _each_row(slopes, scores)
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


def _each_row(row: Array, like: Array) -> Array:
    """A value for each column, repeated down the columns."""
    return lax.broadcast_in_dim(row, like.shape, [1])


def _each_column(column: Array, like: Array) -> Array:
    """A value for each row, repeated along the rows."""
    return lax.broadcast_in_dim(column, like.shape, [0])


def _load_column(ref: Ref) -> Array:
    return plgpu.load(ref, layout=COLUMN, optimized=False)


def _load_row(ref: Ref) -> Array:
    return plgpu.load(ref, layout=ROW, optimized=False)


def _store(output: Array, out_smem: Any, destination: Ref, shape: _Shape) -> None:
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


def _out_smem(shape: _Shape) -> Any:
    """[columns, rows]: as it is written, and, in matrices of [8, slab], as it is copied."""
    if shape.is_interpreted:
        return plgpu.SMEM((shape.columns, shape.rows), shape.dtype)
    swizzle, slab = swizzle_of(shape.head_dim, shape.dtype.itemsize)
    return plgpu.RefUnion(
        _operand((shape.columns, shape.rows), shape.head_dim, shape.dtype),
        plgpu.SMEM(
            (shape.columns // 8, shape.rows // slab, 8, slab),
            shape.dtype,
            transforms=(swizzling(swizzle),),
        ),
    )


def _merge(
    out: Ref,
    part_outputs: Float[Array, "parts rows columns"],
    part_sums: Float[Array, "parts 64 columns"],
    schedule: Schedule,
    sinks: Float[Array, "num_kv_heads columns"] | None,
    shape: _Shape,
    interpret: plgpu.InterpretGPUParams | None,
) -> None:
    """Write the outputs of items that several workers share: their parts', weighted by the sums."""
    inputs = (part_outputs, part_sums, schedule.merges, sinks, out)
    operands, structure = jax.tree.flatten(inputs)

    def body(*refs):
        part_outputs, part_sums, merges, sinks, out = jax.tree.unflatten(structure, refs[: len(operands)])
        (out_smem,) = refs[len(operands) :]
        worker = lax.axis_index("worker")
        at = Merge(*(merges[worker, column] for column in MERGE))

        def load(part: Array) -> tuple[Array, Array]:
            return plgpu.load(part_outputs.at[part], layout=MATRIX, optimized=False), _load_row(part_sums.at[part, 0])

        def add(turn: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            output, top, total = carry
            parts = []
            for nth in range(PARTS_AT_ONCE):
                other = turn * PARTS_AT_ONCE + nth
                part, part_sum = load(2 * (worker + jnp.minimum(other, at.num_others - 1)))
                parts.append((part, part_sum + jnp.where(other < at.num_others, jnp.float32(0), jnp.float32(LEAST))))
            new_top = top
            for _, part_sum in parts:
                new_top = jnp.maximum(new_top, part_sum)
            shrink = jnp.exp2(top - new_top)
            output, total = output * _each_row(shrink, output), total * shrink
            for part, part_sum in parts:
                weight = jnp.exp2(part_sum - new_top)
                output, total = output + part * _each_row(weight, part), total + weight
            return output, new_top, total

        @pl.when(at.num_others > 0)
        def _merge_item() -> None:
            output, top = load(at.first_part)
            total = plgpu.layout_cast(jnp.ones((shape.columns,), jnp.float32), ROW)
            turns = lax.div(at.num_others + PARTS_AT_ONCE - 1, jnp.int32(PARTS_AT_ONCE))
            output, top, total = lax.fori_loop(0, turns, add, (output, top, total))
            if sinks is not None:
                total = total + jnp.exp2(_load_row(sinks.at[at.kv_head]) - top)
            heads = pl.ds(at.kv_head * shape.group, shape.group)
            _store(output / _each_row(total, output), out_smem, out.at[at.token, heads], shape)

    plgpu.kernel(
        body,
        out_type=(),
        grid=(shape.num_workers,),
        grid_names=("worker",),
        num_threads=1,
        thread_name="warpgroup",
        kernel_name="merge_decode_parts",
        scratch_types=[_out_smem(shape)],
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )(*operands)
