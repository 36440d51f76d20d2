"""Widening of 8-bit tiles to bfloat16 in the prefill kernel: a warpgroup between the producer and the consumers.

The tensor cores read K and V from shared memory. So the widener copies each tile from shared memory to shared memory,
times its scales. The consumers then read bfloat16 tiles, as over a pool of bfloat16.

A thread widens 16 numbers of one row at a time, a chunk. Tiles are swizzled: the row flips some bits of the offset of
each 16 bytes. A warp takes a square of 32 chunks. The order of its threads makes them access all banks of shared memory
alike, both in the 8-bit tile and in the other.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from pallas_kernels.chips.hopper import WARPS
from pallas_kernels.chips.hopper_ptx import IN_PLACE, widening_ptx
from pallas_kernels.chips.memory import Ref
from pallas_kernels.paged_attention.hopper.prefill_memory import (
    Ring,
    Scratch,
    copied_ring,
    for_each_item,
    multiplied_ring,
    of_slot,
)
from pallas_kernels.paged_attention.hopper.prefill_plan import Case, Item, span_of
from pallas_kernels.paged_attention.hopper.tile import swizzle_of, tiled_transforms

CHUNK = 16
"""Numbers that a thread widens at a time: 16 bytes, which become two times 16 bytes."""

SCALE_PTX = """{
    .reg .b16 low, high; .reg .f32 first, second;
    mov.b32 {low, high}, $1; cvt.f32.f16 first, low; cvt.f32.f16 second, high;
    mul.f32 first, first, $2; mul.f32 second, second, $2;
    cvt.rn.bf16x2.f32 $0, second, first;
}"""
"""PTX that multiplies two float16 numbers of a register by a float32 number, and rounds the products to bfloat16."""


def widen_tiles(case: Case, scratch: Scratch) -> None:
    """Widen all tiles of this thread block's items, K and V in turn."""
    rings = [(copied_ring(scratch, which), multiplied_ring(scratch, which)) for which in range(2)]
    for stored, _ in rings:
        for stage in range(case.stored_stages):
            plgpu.barrier_arrive(of_slot(stored.free, stage))

    def widen_item(item: Item, count: Array) -> Array:
        def widen_step(_: Array, count: Array) -> Array:
            stage, slot = lax.rem(count, case.stored_stages), lax.rem(count, case.sizes.stages)
            for stored, wide in rings:
                plgpu.barrier_wait(of_slot(stored.full, stage))
                plgpu.barrier_wait(wide.free.at[slot])
                _widen_tile(case, stored, stage, wide.tiles.at[slot])
                plgpu.commit_smem()  # before copies write what was read, and tensor cores read what was written
                plgpu.barrier_arrive(of_slot(stored.free, stage))
                plgpu.barrier_arrive(wide.full.at[slot])
            return count + 1

        return lax.fori_loop(0, span_of(case, item).num_tiles, widen_step, count)

    for_each_item(scratch, widen_item, jnp.int32(0))
    for _, wide in rings:
        for slot in range(case.sizes.stages):  # barriers must outlive the last signal to them
            plgpu.barrier_wait(wide.free.at[slot])


def _widen_tile(case: Case, stored: Ring, stage: Array, target: Ref) -> None:
    assert stored.scales is not None
    tile, scales = stored.tiles.at[stage], stored.scales.at[stage]
    if case.is_interpreted:
        of_tokens = jnp.repeat(scales[...], case.piece)
        target[...] = (tile[...].astype(jnp.float32) * of_tokens[:, None]).astype(case.dtype)
        return
    types = [
        plgpu.RefType(tiled_transforms(dtype, swizzle_of(case.head_dim, dtype.itemsize)[0]))
        for dtype in (case.pool_dtype, case.dtype)
    ]
    widen = plgpu.inline_mgpu(arg_types=(types[0], plgpu.RefType(), types[1]))
    widen(lambda _, *refs: _widen_chunks(case, *refs))(tile, scales, target)


class Square(NamedTuple):
    """The chunks that a warp widens together: [rows, chunks of a row], 32 chunks."""

    rows: int
    chunks: int

    @property
    def columns(self) -> int:
        return self.chunks * CHUNK


def square_of(head_dim: int) -> Square:
    """The square as wide as the swizzle of a bfloat16 tile."""
    return Square(8, 4) if head_dim % 64 == 0 else Square(16, 2)


def _widen_chunks(case: Case, stored: ir.Value, scales: ir.Value, target: ir.Value) -> None:
    """Widen this thread's chunks of a tile."""
    square = square_of(case.head_dim)
    row, chunk = _place_in_square(square)
    warp = _remainder(_quotient(mgpu.utils.thread_idx(), 32), WARPS)
    first_row = arith.addi(arith.muli(warp, _i32(square.rows)), row)
    for column in range(0, case.head_dim, square.columns):
        sources = _offset(case.head_dim, 1, first_row, column, arith.muli(chunk, _i32(CHUNK)))
        targets = _offset(case.head_dim, 2, first_row, column, arith.muli(chunk, _i32(2 * CHUNK)))
        steps = range(0, case.kv_tile, WARPS * square.rows)
        # All loads of the column come first: a store could be to memory that is loaded later, for all a compiler knows.
        words = [_load(stored, _four(), arith.addi(sources, _i32(rows * case.head_dim))) for rows in steps]
        of_pieces = [_quotient(arith.addi(first_row, _i32(rows)), case.piece) for rows in steps]
        factors = [_load(scales, ir.F32Type.get(), arith.muli(piece, _i32(4))) for piece in of_pieces]
        for rows, stored_words, factor in zip(steps, words, factors, strict=True):
            numbers = [half for word in _unpack(stored_words) for half in _widen(word, factor, case.pool_dtype)]
            at = arith.addi(targets, _i32(2 * rows * case.head_dim))
            _store(target, _pack(numbers[:4]), at)
            _store(target, _pack(numbers[4:]), arith.xori(at, _i32(CHUNK)))


def _place_in_square(square: Square) -> tuple[ir.Value, ir.Value]:
    """The row and the chunk of this thread.

    Shared memory serves eight threads at a time. Where a row has four chunks, the eight threads take two rows which
    differ in their lowest and in their highest bit. Swizzles by these bits keep the chunks of the two rows apart. The
    highest bit does so in the 8-bit tile, and the lowest bit in the other tile.
    """
    lane = _remainder(mgpu.utils.thread_idx(), 32)
    chunk = _remainder(lane, square.chunks)
    if square.chunks == 2:
        return _quotient(lane, 2), chunk
    is_second = _remainder(_quotient(lane, 4), 2)
    return arith.xori(_quotient(lane, 8), arith.muli(is_second, _i32(0b101))), chunk


def _offset(head_dim: int, itemsize: int, row: ir.Value, column: int, within: ir.Value) -> ir.Value:
    """The offset in a swizzled tile [.., head_dim] of the byte ``within`` bytes after a column of a row."""
    swizzle, columns = swizzle_of(head_dim, itemsize)
    matrix = arith.muli(_quotient(row, 8), _i32(8 * head_dim * itemsize))
    matrix = arith.addi(matrix, _i32(column // columns * 8 * swizzle))
    offset = arith.addi(arith.muli(_remainder(row, 8), _i32(swizzle)), within)
    offset = arith.addi(offset, _i32(column % columns * itemsize))
    flipped = arith.andi(_quotient(offset, 8), _i32(swizzle - 16))
    return arith.addi(matrix, arith.xori(offset, flipped))


def _widen(word: ir.Value, scale: ir.Value, pool_dtype: jnp.dtype) -> list[ir.Value]:
    """Two registers of bfloat16 of a register of stored numbers."""
    i32 = ir.IntegerType.get_signless(32)
    halves = mgpu.utils.inline_ptx(widening_ptx(pool_dtype, IN_PLACE), word, result_types=(i32, i32))
    return [mgpu.utils.inline_ptx(SCALE_PTX, half, scale, result_types=i32) for half in halves]


def _i32(value: int) -> ir.Value:
    return mgpu.utils.c(value, ir.IntegerType.get_signless(32))


def _quotient(x: ir.Value, divisor: int) -> ir.Value:
    return arith.divui(x, _i32(divisor))


def _remainder(x: ir.Value, divisor: int) -> ir.Value:
    return arith.remui(x, _i32(divisor))


def _four() -> ir.Type:
    return ir.VectorType.get((4,), ir.IntegerType.get_signless(32))


def _pointer(ref: ir.Value, offset: ir.Value) -> ir.Value:
    return mgpu.utils.getelementptr(mgpu.utils.memref_ptr(ref), [offset], ir.IntegerType.get_signless(8))


def _load(ref: ir.Value, kind: ir.Type, offset: ir.Value) -> ir.Value:
    return llvm.load(kind, _pointer(ref, offset))


def _store(ref: ir.Value, value: ir.Value, offset: ir.Value) -> None:
    llvm.store(value, _pointer(ref, offset))


def _unpack(words: ir.Value) -> list[ir.Value]:
    return [vector.extract(words, [], [nth]) for nth in range(4)]


def _pack(words: list[ir.Value]) -> ir.Value:
    return vector.from_elements(_four(), words)
