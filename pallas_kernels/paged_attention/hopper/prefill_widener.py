"""Widening of 8-bit tiles to bfloat16 in the prefill kernel: a warpgroup between the producer and the consumers.

The tensor cores read K and V from shared memory. So the widener copies each tile from shared memory to shared memory,
times its scales. The consumers then read bfloat16 tiles, as over a pool of bfloat16. A tile waits in the widener's
registers for the consumers to free memory; meanwhile the producer copies the next tile.

A thread widens 16 numbers of one row at a time, a chunk. Tiles are swizzled: the row flips some bits of the offset of
each 16 bytes. A warp takes a square of 32 chunks. The order of its threads makes them access all banks of shared memory
alike, both in the 8-bit tile and in the other.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, scf, vector

from pallas_kernels.chips.hopper import WARPGROUP, WARPS
from pallas_kernels.chips.hopper_ptx import IN_PLACE, scaled_ptx, widening_ptx
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

LEAST_NORMAL = 1 << 23
"""Bits of the smallest normal number of float32."""

LARGEST_POWER = 127 + 100 << 23
"""Bits of 2^100 in float32."""

SCALE_PTX = """{
    .reg .b16 low, high; .reg .f32 first, second;
    mov.b32 {low, high}, $1; cvt.f32.f16 first, low; cvt.f32.f16 second, high;
    mul.f32 first, first, $2; mul.f32 second, second, $2;
    cvt.rn.bf16x2.f32 $0, second, first;
}"""
"""PTX that multiplies two float16 numbers of a register by a float32 number, and rounds the products to bfloat16."""


class Numbers(NamedTuple):
    """A tile in the warpgroup's registers, as the pool stores it; in the interpreter, as an array."""

    words: Any
    factors: Any  # the scales of its rows


def widen_tiles(case: Case, scratch: Scratch) -> None:
    """Widen all tiles of this thread block's items, in the order in which the consumers need them and free memory.

    Both need and free K a tile ahead of V: the values of a tile are multiplied after the keys of the next tile.
    """
    rings = [(copied_ring(scratch, which), multiplied_ring(scratch, which)) for which in range(2)]
    for stored, _ in rings:
        for stage in range(case.stored_stages):
            plgpu.barrier_arrive(of_slot(stored.free, stage))

    def widen_item(item: Item, count: Array) -> Array:
        num_tiles = span_of(case, item).num_tiles

        def widen_step(step: Array, _: None) -> None:
            pl.when(step < num_tiles)(lambda: _widen_tile(case, *rings[0], count + step))
            pl.when(step > 0)(lambda: _widen_tile(case, *rings[1], count + step - 1))

        lax.fori_loop(0, num_tiles + 1, widen_step, None)
        return count + num_tiles

    for_each_item(scratch, widen_item, jnp.int32(0))
    for _, wide in rings:
        for slot in range(case.sizes.stages):  # barriers must outlive the last signal to them
            plgpu.barrier_wait(wide.free.at[slot])


def _widen_tile(case: Case, stored: Ring, wide: Ring, nth: Array) -> None:
    """Widen the nth tile of a ring. Its memory is copied to again while the tile waits in registers."""
    stage, slot = lax.rem(nth, case.stored_stages), lax.rem(nth, case.sizes.stages)
    plgpu.barrier_wait(of_slot(stored.full, stage))
    numbers = _load_tile(case, stored, stage)
    plgpu.commit_smem()  # before copies write what was read
    plgpu.barrier_arrive(of_slot(stored.free, stage))
    plgpu.barrier_wait(wide.free.at[slot])
    _store_tile(case, numbers, wide.tiles.at[slot])
    plgpu.commit_smem()  # before tensor cores read what was written
    plgpu.barrier_arrive(wide.full.at[slot])


def _load_tile(case: Case, stored: Ring, stage: Array) -> Numbers:
    assert stored.scales is not None
    tile, scales = stored.tiles.at[stage], stored.scales.at[stage]
    if case.is_interpreted:
        return Numbers(tile[...], jnp.repeat(scales[...], case.piece))
    words, factors = _layouts(case)

    def load(_: mgpu.LaunchContext, tile: ir.Value, scales: ir.Value) -> Numbers:
        return Numbers(
            _as_array(words, _load_words(case, tile)),
            _as_array(factors, _load_factors(case, scales)),
        )

    arguments = (_tile_type(case, case.pool_dtype), plgpu.RefType())
    results = Numbers(_array_type(words), _array_type(factors))
    return plgpu.inline_mgpu(arg_types=arguments, return_type=results)(load)(tile, scales)


def _store_tile(case: Case, numbers: Numbers, target: Ref) -> None:
    if case.is_interpreted:
        target[...] = (numbers.words.astype(jnp.float32) * numbers.factors[:, None]).astype(case.dtype)
        return

    def store(_: mgpu.LaunchContext, words: mgpu.FragmentedArray, factors: mgpu.FragmentedArray, target: ir.Value):
        _store_chunks(case, list(words.registers), list(factors.registers), target)

    arguments = (*_layouts(case), _tile_type(case, case.dtype))
    plgpu.inline_mgpu(arg_types=arguments)(store)(*numbers, target)


def _tile_type(case: Case, dtype: jnp.dtype) -> plgpu.RefType:
    return plgpu.RefType(tiled_transforms(dtype, swizzle_of(case.head_dim, dtype.itemsize)[0]))


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


def _layouts(case: Case) -> tuple[Any, Any]:
    """Layouts that give each thread the words of its chunks, and the scales of the rows of its chunks."""
    num_words, num_factors = case.kv_tile * case.head_dim // 4, len(_steps(case)) * WARPGROUP
    return plgpu.Layout.WG_STRIDED((num_words,), vec_size=4), plgpu.Layout.WG_STRIDED((num_factors,), vec_size=1)


def _array_type(layout: Any) -> plgpu.ShapeDtypeStruct:
    return plgpu.ShapeDtypeStruct(layout.to_mgpu().shape, jnp.dtype(jnp.int32), layout)


def _as_array(layout: Any, registers: list[ir.Value]) -> Any:
    held = np.empty(len(registers), object)
    held[:] = registers
    return mgpu.FragmentedArray(_registers=held, _layout=layout.to_mgpu(), _is_signed=True)


def _steps(case: Case) -> range:
    """Distances between the rows of a thread's chunks."""
    return range(0, case.kv_tile, WARPS * square_of(case.head_dim).rows)


def _columns(case: Case) -> range:
    """The first column of each square of a row."""
    return range(0, case.head_dim, square_of(case.head_dim).columns)


def _load_words(case: Case, stored: ir.Value) -> list[ir.Value]:
    """This thread's chunks of a stored tile: column by column, the rows of each."""
    row, chunk = _place(case)
    words = []
    for column in _columns(case):
        start = _offset(case.head_dim, 1, row, column, arith.muli(chunk, _i32(CHUNK)))
        words += [_load(stored, _four(), arith.addi(start, _i32(rows * case.head_dim))) for rows in _steps(case)]
    return words


def _load_factors(case: Case, scales: ir.Value) -> list[ir.Value]:
    """The scales of this thread's rows, in bits of float32."""
    row, _ = _place(case)
    pieces = [_quotient(arith.addi(row, _i32(rows)), case.piece) for rows in _steps(case)]
    number = ir.VectorType.get((1,), _i32_type())
    return [_load(scales, number, arith.muli(piece, _i32(4))) for piece in pieces]


def _store_chunks(case: Case, words: list[ir.Value], factors: list[ir.Value], target: ir.Value) -> None:
    """Widen this thread's chunks into the other tile: faster if its scales are powers of two, as the pool's are."""
    scales = [vector.extract(factor, [], [0]) for factor in factors]
    _if_else(
        _are_powers(scales),
        lambda: _store_widened(case, words, partial(_widen_by_power, case.pool_dtype), _twice(scales), target),
        lambda: _store_widened(case, words, partial(_widen, case.pool_dtype), _as_floats(scales), target),
    )


def _store_widened(
    case: Case,
    words: list[ir.Value],
    widen: Callable[[ir.Value, ir.Value], list[ir.Value]],
    scales: list[ir.Value],
    target: ir.Value,
) -> None:
    row, chunk = _place(case)
    chunks = iter(words)
    for column in _columns(case):
        start = _offset(case.head_dim, 2, row, column, arith.muli(chunk, _i32(2 * CHUNK)))
        for rows, scale in zip(_steps(case), scales, strict=True):
            numbers = [half for word in _unpack(next(chunks)) for half in widen(word, scale)]
            at = arith.addi(start, _i32(2 * rows * case.head_dim))
            _store(target, _pack(numbers[:4]), at)
            _store(target, _pack(numbers[4:]), arith.xori(at, _i32(CHUNK)))


def _if_else(condition: ir.Value, then: Callable[[], None], otherwise: Callable[[], None]) -> None:
    choice = scf.IfOp(condition, has_else=True)
    for block, body in ((choice.then_block, then), (choice.else_block, otherwise)):
        assert block is not None
        with ir.InsertionPoint(block):
            body()
            scf.yield_([])


def _place(case: Case) -> tuple[ir.Value, ir.Value]:
    """The first row and the chunk of this thread."""
    square = square_of(case.head_dim)
    row, chunk = _place_in_square(square)
    warp = _remainder(_quotient(mgpu.utils.thread_idx(), 32), WARPS)
    return arith.addi(arith.muli(warp, _i32(square.rows)), row), chunk


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


def _widen(pool_dtype: jnp.dtype, word: ir.Value, scale: ir.Value) -> list[ir.Value]:
    """Two registers of bfloat16 of a register of stored numbers, times any scale."""
    i32 = _i32_type()
    halves = mgpu.utils.inline_ptx(widening_ptx(pool_dtype, IN_PLACE), word, result_types=(i32, i32))
    return [mgpu.utils.inline_ptx(SCALE_PTX, half, scale, result_types=i32) for half in halves]


def _widen_by_power(pool_dtype: jnp.dtype, word: ir.Value, power: ir.Value) -> list[ir.Value]:
    """The same registers, times a power of two that stands in the register twice."""
    i32 = _i32_type()
    return list(mgpu.utils.inline_ptx(scaled_ptx(pool_dtype), word, power, result_types=(i32, i32)))


def _are_powers(scales: list[ir.Value]) -> ir.Value:
    """Whether all scales, in bits of float32, are powers of two that ``scaled_ptx`` takes."""
    mantissas, distances = _i32(0), _i32(0)
    for scale in scales:
        mantissas = arith.ori(mantissas, arith.andi(scale, _i32(LEAST_NORMAL - 1)))
        distances = arith.maxui(distances, arith.subi(scale, _i32(LEAST_NORMAL)))  # huge for numbers below
    are_whole = arith.cmpi(arith.CmpIPredicate.eq, mantissas, _i32(0))
    are_near = arith.cmpi(arith.CmpIPredicate.ule, distances, _i32(LARGEST_POWER - LEAST_NORMAL))
    return arith.andi(are_whole, are_near)


def _twice(scales: list[ir.Value]) -> list[ir.Value]:
    """The upper halves, which are bfloat16 numbers, in both halves."""
    return [arith.muli(_quotient(scale, 1 << 16), _i32(0x10001)) for scale in scales]


def _as_floats(scales: list[ir.Value]) -> list[ir.Value]:
    return [mgpu.utils.bitcast(scale, ir.F32Type.get()) for scale in scales]


def _i32_type() -> ir.Type:
    return ir.IntegerType.get_signless(32)


def _i32(value: int) -> ir.Value:
    return mgpu.utils.c(value, _i32_type())


def _quotient(x: ir.Value, divisor: int) -> ir.Value:
    return arith.divui(x, _i32(divisor))


def _remainder(x: ir.Value, divisor: int) -> ir.Value:
    return arith.remui(x, _i32(divisor))


def _four() -> ir.Type:
    return ir.VectorType.get((4,), _i32_type())


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
