"""Copies of whole blocks within the pool on Hopper GPUs, as a Pallas Mosaic GPU kernel.

A block is contiguous. Warps divide all blocks into pieces, and move each piece through shared memory by TMA. A warp has
a ring of pieces: it starts to load a piece as soon as the store of an earlier one has read the same shared memory.
Warps share no data.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import dispatch
from pallas_kernels.block_pool.layout import BlockIds, BlockPool, blocks_shape, num_blocks_of
from pallas_kernels.chips import here
from pallas_kernels.chips.hopper import MOST_COPIED, NUM_SMS, SMEM_ALIGNMENT, WARPS
from pallas_kernels.chips.memory import Ref

DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16, jnp.float8_e4m3fn, jnp.int8)

PIECE_BYTES = 8 * 1024
"""Most bytes of a piece. A single block of 2 MiB then gives work to half of all warps."""

NOWHERE = -1
"""The destination of a copy that is not made."""

STAGES = 6
"""Pieces of a warp's ring. The rings of all warps take 192 KiB of a multiprocessor."""


@dataclass(frozen=True)
class CopyShape:
    """The static properties of a launch. A piece is [rows, width] numbers of a block."""

    num_blocks: int
    pieces_per_block: int
    rows: int
    width: int
    dtype: jnp.dtype
    num_copies: int
    num_sms: int

    @property
    def num_pieces(self) -> int:
        return self.num_copies * self.pieces_per_block

    @property
    def num_thread_blocks(self) -> int:
        return min(-(-self.num_pieces // WARPS), self.num_sms)


def copy_shape(
    pool: BlockPool, num_copies: int = 1, num_sms: int = NUM_SMS, piece_bytes: int = PIECE_BYTES
) -> CopyShape | None:
    """The launch that copies so many blocks; None if a block has no pieces that TMA can copy."""
    block, itemsize = math.prod(blocks_shape(pool, 1)), pool.dtype.itemsize
    sizes = range(MOST_COPIED, 0, -1)
    width = next((n for n in sizes if block % n == 0 and n * itemsize % 16 == 0), None)
    if width is None:
        return None
    row_bytes = width * itemsize
    rows = next(
        (
            n
            for n in sizes
            if block // width % n == 0 and n * row_bytes % SMEM_ALIGNMENT == 0 and n * row_bytes <= piece_bytes
        ),
        None,
    )
    if rows is None:
        return None
    return CopyShape(
        num_blocks=num_blocks_of(pool),
        pieces_per_block=block // (rows * width),
        rows=rows,
        width=width,
        dtype=jnp.dtype(pool.dtype),
        num_copies=num_copies,
        num_sms=num_sms,
    )


def why_not_copy(pool: BlockPool) -> str | None:
    """The reason why the kernel cannot copy blocks of a pool, whatever the device; None if it can."""
    if pool.dtype not in DTYPES:
        names = ", ".join(jnp.dtype(dtype).name for dtype in DTYPES)
        return f"a pool of {jnp.dtype(pool.dtype).name}: the kernel copies {names}"
    if copy_shape(pool) is None:
        return f"blocks of shape {blocks_shape(pool, 1)[1:]}: expected a multiple of {SMEM_ALIGNMENT} bytes"
    return None


def copy_blocks_hopper(
    pool: BlockPool,
    src: BlockIds,
    dst: BlockIds,
    *,
    num_sms: int = NUM_SMS,
    piece_bytes: int = PIECE_BYTES,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> BlockPool:
    """Copy whole blocks within the pool; arguments and result as for ``copy_blocks``.

    Sources and destinations are disjoint, except for block 0, which stays as it is.

    Args:
        num_sms: multiprocessors to fill.
        piece_bytes: most bytes of a piece.
        interpret: settings of Pallas's interpreter for Mosaic GPU; None runs on a GPU.

    Raises:
        NotImplementedError: a pool, or a device, that the kernel does not take.
    """
    reason = why_not_copy(pool) or (None if interpret else here.why_no_hopper())
    dispatch.refuse(reason, "implementation='xla' takes it")
    if src.size == 0:
        return pool
    shape = copy_shape(pool, src.size, num_sms, piece_bytes)
    assert shape is not None
    return _copy(pool, src, dst, shape=shape, interpret=interpret)


@partial(jax.jit, static_argnames=("shape", "interpret"))
def _copy(
    pool: BlockPool,
    src: BlockIds,
    dst: BlockIds,
    *,
    shape: CopyShape,
    interpret: plgpu.InterpretGPUParams | None,
) -> BlockPool:
    is_copied = (dst > 0) & (dst < shape.num_blocks)
    # One array, which this computes: a kernel's operand may not lie just anywhere in another array.
    ids = jnp.stack([jnp.clip(src, 0, shape.num_blocks - 1), jnp.where(is_copied, dst, NOWHERE)]).astype(jnp.int32)
    pieces = jax.new_ref(pool.reshape(-1, shape.rows, shape.width))

    def body(ids: Ref, pieces: Ref, staged: Ref, landed: Ref) -> None:
        plgpu.warp_map(lambda warp: _move(shape, warp, ids, pieces, staged, landed))

    plgpu.kernel(
        body,
        out_type=(),
        grid=(shape.num_thread_blocks,),
        grid_names=("block",),
        num_threads=1,
        thread_name="warpgroup",
        kernel_name="copy_blocks",
        scratch_types=[
            plgpu.SMEM((STAGES, WARPS, shape.rows, shape.width), shape.dtype),
            plgpu.Barrier(num_barriers=STAGES * WARPS),
        ],
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),  # warps share nothing
        interpret=interpret,
    )(ids, pieces)
    return pieces[...].reshape(pool.shape)


class _Piece(NamedTuple):
    """A piece's place in the pool before and after; it is not moved unless ``is_moved``."""

    is_moved: Array
    source: Array
    target: Array


def _move(shape: CopyShape, warp: Array, ids: Ref, pieces: Ref, staged: Ref, landed: Ref) -> None:
    """Move one warp's share of the pieces."""
    first, step = lax.axis_index("block") * WARPS + warp, shape.num_thread_blocks * WARPS
    count = lax.div(shape.num_pieces - first + (step - 1), jnp.int32(step))

    def piece_of(nth: Array | int) -> _Piece:
        number = jnp.minimum(first + nth * step, shape.num_pieces - 1)
        copy, piece = (f(number, jnp.int32(shape.pieces_per_block)) for f in (lax.div, lax.rem))
        source, target = (ids[which, copy] for which in range(2))
        places = (block * shape.pieces_per_block + piece for block in (source, target))
        return _Piece((nth < count) & (target != NOWHERE), *places)

    def slot_of(nth: Array | int) -> tuple[Ref, Ref]:
        slot = lax.rem(jnp.int32(nth), jnp.int32(STAGES))
        return staged.at[slot, warp], landed.at[slot * WARPS + warp]

    def load(nth: Array | int, piece: _Piece) -> None:
        @pl.when(piece.is_moved)
        def _load() -> None:
            plgpu.copy_gmem_to_smem(pieces.at[piece.source], *slot_of(nth))

    def store(nth: Array, piece: _Piece) -> None:
        @pl.when(piece.is_moved)
        def _store() -> None:
            stage, has_landed = slot_of(nth)
            plgpu.barrier_wait(has_landed)
            plgpu.copy_smem_to_gmem(stage, pieces.at[piece.target])

    for nth in range(STAGES - 1):
        load(nth, piece_of(nth))

    @pl.loop(0, count)
    def _step(nth: Array) -> None:
        ahead = nth + STAGES - 1
        mine, next_piece = piece_of(nth), piece_of(ahead)  # these loads overlap with the store before
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        load(ahead, next_piece)
        store(nth, mine)

    # Shared memory is freed when the warp ends.
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
