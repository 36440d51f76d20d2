"""Shape, inputs, shared memory and barriers of the decode kernel, common to its warpgroups."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.block_pool.layout import is_quantized
from pallas_kernels.chips.hopper import REGISTERS_OF_SM, WARPGROUP
from pallas_kernels.chips.memory import Ref, round_up
from pallas_kernels.paged_attention.call import Scoring
from pallas_kernels.paged_attention.hopper.schedule import Segment
from pallas_kernels.paged_attention.hopper.tile import swizzle_of, swizzling, tiled_smem

SEGMENT = Segment()

THREADS = 2 * WARPGROUP
"""Threads of a worker: two warpgroups."""

MOST_COLUMNS = {
    # (is quantised, workers of a multiprocessor): for 64, 128, 192 and 256 rows
    (False, 1): (80, 56, 40, 32),
    (False, 2): (24, 16, 16, 8),
    (True, 1): (64, 48, 32, 24),
    (True, 2): (24, 16, 8, 0),
}
"""See ``columns_that_fit``."""


@dataclass(frozen=True)
class DecodeSizes:
    """Sizes that the tuner chooses.

    Args:
        tile_tokens: tokens that one product covers: 64 or 128.
        slots: tiles of K or of V that the ring holds: at least 2, since those of V may arrive while K waits.
        workers_per_sm: thread blocks that share a multiprocessor.
    """

    tile_tokens: int = 64
    slots: int = 6
    workers_per_sm: int = 2


@dataclass(frozen=True)
class DecodeShape:
    """The static properties of a launch."""

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

    def __post_init__(self) -> None:
        assert self.tile % self.piece == 0, f"tiles of {self.tile} tokens and pieces of {self.piece}"
        assert self.sizes.slots > 1, "a single slot: the consumer would wait for V forever, with K in the slot"

    @property
    def is_quantized(self) -> bool:
        return is_quantized(self.pool_dtype)

    @property
    def is_in_pairs(self) -> bool:
        """Whether the consumer reads tiles as pairs of bytes, to make operands of the tensor cores from them."""
        return self.is_quantized and not self.is_interpreted

    @property
    def compute_dtype(self) -> jnp.dtype:
        """Type that the tensor cores multiply. Quantised numbers are exact in float16, and cheap to widen."""
        return jnp.dtype(jnp.float16) if self.is_quantized else self.dtype

    @property
    def columns(self) -> int:
        """Query heads, rounded up to a size that the tensor cores multiply."""
        return round_up(self.group, 8)

    @property
    def rows(self) -> int:
        """``head_dim``, rounded up to a size that the tensor cores multiply."""
        return round_up(self.head_dim, 64)

    @property
    def tile(self) -> int:
        return self.sizes.tile_tokens

    @property
    def piece(self) -> int:
        """Tokens that one TMA copies: a block, or the part of a large block that a tile covers.

        In a tile with rows wider than ``head_dim``, only eight rows at a time are contiguous.
        """
        return 8 if self.head_dim < self.rows else min(self.block_size, self.tile)

    @property
    def swizzle(self) -> int:
        """Swizzle of tiles and queries, in bytes."""
        return swizzle_of(self.head_dim, self.pool_dtype.itemsize)[0]

    @property
    def slab(self) -> int:
        """Columns of a slab: as wide as the swizzle. The queries lie in slabs of [columns, slab]."""
        return self.swizzle // self.dtype.itemsize

    @property
    def num_slabs(self) -> int:
        return self.head_dim // self.slab

    @property
    def pieces_per_tile(self) -> int:
        return self.tile // self.piece

    @property
    def registers(self) -> int:
        """Registers of a thread, in eights, where all workers of a multiprocessor share its registers equally."""
        return REGISTERS_OF_SM // (THREADS * self.sizes.workers_per_sm) // 8 * 8

    @property
    def scaled_alike(self) -> int:
        """Tokens for which the ring holds scales once: the tokens of a piece that a warp multiplies together."""
        return min(self.piece, 16)


class Scratch(NamedTuple):
    """Shared memory and barriers. The ring alternates tiles of K and V: ``full`` when landed, ``free`` when read.

    The slot of K's tile has the scales of both. With an even number of slots, every other slot's scales are unused.
    """

    tiles: Any  # [slots, tile, rows]
    scales: Any  # [slots, tile / scaled_alike, 2], of K and of V; None: unscaled
    full: Any
    free: Any
    q: Any  # [2, num_slabs, columns, slab]
    q_full: Any
    q_free: Any
    weights: Any  # [columns, tile]
    out: Any  # [columns, rows]


class Begun(NamedTuple):
    """Softmaxes that go on over the blocks of the kernel. The entry after those of all tokens is empty."""

    outputs: Any  # [tokens + 1, num_kv_heads, rows, columns], normalised
    sums: Any  # [tokens + 1, num_kv_heads, columns]: log2 of the sums of weights


class Inputs(NamedTuple):
    """The operands of the kernel, in device memory."""

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
    begun: Begun | None  # None: every softmax starts empty


def columns_that_fit(head_dim: int, pool_dtype: jnp.dtype, workers_per_sm: int) -> int:
    """Query heads of a KV head with which the consumer stays in its share of the registers.

    The numbers are from ptxas of CUDA 13.0, for tiles of 64 tokens with window, cap, slopes and sinks. So many heads
    spill no registers, or up to 24 bytes over an 8-bit pool. Eight more heads would spill 24 to 350 bytes in every
    tile. Over a 16-bit pool that two workers share, they would leave registers for one worker. More than two workers
    count as two.
    """
    return MOST_COLUMNS[is_quantized(pool_dtype), min(workers_per_sm, 2)][round_up(head_dim, 64) // 64 - 1]


def decode_smem_bytes(sizes: DecodeSizes, group: int, head_dim: int, pool_dtype: jnp.dtype) -> int:
    """Shared memory of a worker."""
    columns, rows = round_up(group, 8), round_up(head_dim, 64)
    # The scales of eight tokens each take eight bytes.
    slot = sizes.tile_tokens * (rows * pool_dtype.itemsize + is_quantized(pool_dtype))
    # Queries (two), weights and output in 2 bytes each; 6 KiB for alignment, barriers and the warps' sums.
    return sizes.slots * slot + 2 * columns * (2 * head_dim + sizes.tile_tokens + rows) + 6 * 1024


def scratch_types(shape: DecodeShape) -> Scratch:
    slots, queries = shape.sizes.slots, (2, shape.num_slabs, shape.columns, shape.slab)
    scales = (slots, shape.tile // shape.scaled_alike, 2)
    if shape.is_interpreted:
        q_smem = plgpu.SMEM(queries, shape.compute_dtype)
    else:
        # A copy may fill a part of a product's operand: two views of the same bytes, both swizzled.
        q_smem = plgpu.RefUnion(
            plgpu.SMEM(queries, shape.compute_dtype, transforms=(swizzling(shape.swizzle),)),
            tiled_smem(queries, shape.compute_dtype, shape.swizzle),
        )
    return Scratch(
        tiles=_tiles(shape),
        scales=plgpu.SMEM(scales, jnp.float32) if shape.is_quantized else None,
        full=plgpu.Barrier(num_arrivals=shape.pieces_per_tile, num_barriers=slots),
        free=plgpu.Barrier(num_barriers=slots),
        q=q_smem,
        q_full=plgpu.Barrier(num_arrivals=shape.num_slabs, num_barriers=2),
        q_free=plgpu.Barrier(num_barriers=2),
        weights=_weights(shape),
        out=out_smem_of(shape),
    )


def _tiles(shape: DecodeShape) -> Any:
    dims = (shape.sizes.slots, shape.tile, shape.rows)
    stored = tiled_smem(dims, shape.pool_dtype, shape.swizzle)
    if not shape.is_in_pairs:
        return stored
    # Loads of matrices into registers take elements of 16 bits: here, pairs of bytes.
    return plgpu.RefUnion(stored, tiled_smem((*dims[:2], shape.rows // 2), jnp.dtype(jnp.uint16), shape.swizzle))


def _weights(shape: DecodeShape) -> Any:
    # Two operands of a product in shared memory need the same swizzle.
    swizzle = 128 if shape.is_quantized else shape.swizzle
    return tiled_smem((shape.columns, shape.tile), shape.compute_dtype, swizzle)


def out_smem_of(shape: DecodeShape) -> Any:
    """Memory of outputs [columns, rows]: a view for stores, and a view in matrices of [8, slab] for copies."""
    if shape.is_interpreted:
        return plgpu.SMEM((shape.columns, shape.rows), shape.dtype)
    swizzle, slab = swizzle_of(shape.head_dim, shape.dtype.itemsize)
    return plgpu.RefUnion(
        tiled_smem((shape.columns, shape.rows), shape.dtype, swizzle),
        plgpu.SMEM(
            (shape.columns // 8, shape.rows // slab, 8, slab),
            shape.dtype,
            transforms=(swizzling(swizzle),),
        ),
    )


def copied(scratch: Scratch, shape: DecodeShape) -> Ref:
    """The ring's tiles as copies write them."""
    return scratch.tiles[0] if shape.is_in_pairs else scratch.tiles


def multiplied(scratch: Scratch, shape: DecodeShape) -> Ref:
    """The ring's tiles as the consumer reads them; over a quantised pool in pairs, [slots, tile, rows / 2]."""
    return scratch.tiles[1] if shape.is_in_pairs else scratch.tiles


def my_segments(inputs: Inputs) -> tuple[Array, Array]:
    worker = lax.axis_index("worker")
    return inputs.first_segment[worker], inputs.last_segment[worker]


def segment_at(inputs: Inputs, segment: Array) -> Segment:
    return Segment(*(inputs.segments[segment, column] for column in SEGMENT))


def drain(barriers: Ref, start: Array, stop: Array, slots: int) -> None:
    @pl.loop(start, stop)
    def _wait(use: Array) -> None:
        plgpu.barrier_wait(barriers.at[lax.rem(use, jnp.int32(slots))])
