"""What the warpgroups of the decode kernel share: its shape, inputs, shared memory and barriers."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.block_pool import is_quantized
from pallas_kernels.paged_attention.hopper.schedule import Segment
from pallas_kernels.paged_attention.hopper.tile import Ref, Scoring, swizzle_of, swizzling, tiled_smem

SEGMENT = Segment()

WIDE_SLOTS = 4
"""Tiles of K and V of a quantised pool that wait in float16."""

WIDENED_BYTES = 64
"""Of a row, what a widener makes wide at once: a thread's registers hold no more beside it."""

REGISTERS, PRODUCER_REGISTERS = 80, 72
"""Of a thread, where a widener makes the warpgroups three: two workers share a multiprocessor's 65,536."""


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
class DecodeShape:
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
        return up(self.group, 8)

    @property
    def rows(self) -> int:
        """``head_dim``, filled up likewise."""
        return up(self.head_dim, 64)

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


class Ring(NamedTuple):
    """Tiles of K and of V in turn, and barriers: ``full`` when one has landed, ``free`` when it has been read."""

    tiles: Any  # [slots, tile, rows]
    scales: Any  # [slots, 2, tile]: each token's, relative to the largest of the tile; and that one. None: unscaled
    full: Any
    free: Any


class Scratch(NamedTuple):
    """Shared memory and barriers."""

    stored: Ring  # as the pool has them
    wide: Ring | None  # the same in float16, of a quantised pool
    q: Any  # [2, num_slabs, columns, slab]
    q_full: Any
    q_free: Any
    weights: Any  # [columns, tile]
    out: Any  # [columns, rows]

    @property
    def operands(self) -> Ring:
        """What the tensor cores multiply."""
        return self.wide or self.stored


class Inputs(NamedTuple):
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
    return 152 * 128 // (up(head_dim, 64) + 128) // 8 * 8


def decode_smem_bytes(sizes: DecodeSizes, group: int, head_dim: int, pool_dtype: jnp.dtype) -> int:
    """Shared memory that a worker takes."""
    columns, rows = up(group, 8), up(head_dim, 64)
    wide = WIDE_SLOTS * sizes.tile_tokens * (rows * 2 + 8) if is_quantized(pool_dtype) else 0
    ring = sizes.slots * sizes.tile_tokens * rows * pool_dtype.itemsize
    scales = 2 * sizes.slots * sizes.tile_tokens * 4 if is_quantized(pool_dtype) else 0
    # Queries (two), weights and output in 2 bytes each; 6 KiB for alignment, barriers and the warps' sums.
    return ring + wide + scales + 2 * columns * (2 * head_dim + sizes.tile_tokens + rows) + 6 * 1024


def up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def scratch_types(shape: DecodeShape) -> Scratch:
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
    return Scratch(
        stored=_ring(shape, slots, jnp.dtype(jnp.uint8) if shape.pool_dtype == jnp.int8 else shape.pool_dtype),
        wide=_ring(shape, WIDE_SLOTS, dtype) if shape.is_quantized else None,
        q=q_smem,
        q_full=plgpu.Barrier(num_arrivals=shape.num_slabs, num_barriers=2),
        q_free=plgpu.Barrier(num_barriers=2),
        weights=_operand((shape.columns, shape.tile), shape.head_dim, dtype),
        out=out_smem_of(shape),
    )


def _ring(shape: DecodeShape, slots: int, dtype: jnp.dtype) -> Ring:
    is_copied = dtype.itemsize == shape.pool_dtype.itemsize
    # A copy for each piece, and the producer's word that the scales are there; or the widener's word.
    arrivals = shape.pieces_per_tile + shape.is_quantized if is_copied else 1
    return Ring(
        _operand((slots, shape.tile, shape.rows), shape.head_dim, dtype),
        plgpu.SMEM((slots, 2, shape.tile), jnp.float32) if shape.is_quantized else None,
        plgpu.Barrier(num_arrivals=arrivals, num_barriers=slots),
        plgpu.Barrier(num_barriers=slots),
    )


def _operand(dims: tuple[int, ...], head_dim: int, dtype: jnp.dtype) -> Any:
    """Shared memory that tensor cores read. Both operands of a product need one swizzle; head_dim bounds it."""
    swizzle, _ = swizzle_of(head_dim, dtype.itemsize)
    return tiled_smem(dims, dtype, swizzle if dtype.itemsize > 1 else min(swizzle, WIDENED_BYTES))


def out_smem_of(shape: DecodeShape) -> Any:
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


def my_segments(inputs: Inputs) -> tuple[Array, Array]:
    worker = lax.axis_index("worker")
    return inputs.first_segment[worker], inputs.last_segment[worker]


def segment_at(inputs: Inputs, segment: Array) -> Segment:
    return Segment(*(inputs.segments[segment, column] for column in SEGMENT))


def drain(barriers: Ref, start: Array, stop: Array, slots: int) -> None:
    @pl.loop(start, stop)
    def _wait(turn: Array) -> None:
        plgpu.barrier_wait(barriers.at[lax.rem(turn, jnp.int32(slots))])
