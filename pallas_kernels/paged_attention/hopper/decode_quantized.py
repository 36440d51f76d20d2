"""Widening of 8-bit tiles to float16 in the decode kernel's consumer: in registers, before the tensor cores.

A warp loads matrices of 8 x 8 elements of 16 bits, which here are pairs of bytes. Each thread gets two pairs of each
matrix, in place of two float16 numbers of a product's A operand. It makes numbers of two operands of them.

K [tokens, head_dim]: a thread has four dims of a token. Dims 0 and 1 of each four make one operand, dims 2 and 3 the
other. The queries have their dims in the same order. V^T [head_dim, tokens]: a thread has two dims of each of two
tokens. The even dims make rows 0-7 of each 16 rows of the operand, the odd dims rows 8-15. Outputs have that order.

V's scales go into the weights: exp2(score + log2(scale) - top), which is at most 1 since ``top`` includes the scales.
The weights are float16, whose full precision ends at 2^-14. So the token with the largest score keeps full precision
from 2^-14 of the row's largest scale. A token of less weight needs a larger scale. Tokens below that limit err by up to
2^-25 of the largest scale for each stored unit. The error is small beside the output, unless all other tokens are
nearly zero in some dim.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu.fragmented_array import Tiling
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector
from jaxtyping import Float

from pallas_kernels.chips.hopper_ptx import EVEN_FIRST, IN_PLACE, widening_ptx
from pallas_kernels.chips.memory import Ref
from pallas_kernels.paged_attention.hopper.decode_memory import DecodeShape
from pallas_kernels.paged_attention.hopper.tile import COLUMN, MATRIX

PAIRS = plgpu.Layout.TILED(Tiling(((32, 8), (8, 8), (2,))), warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1)
"""Layout of V^T in pairs of dims: as ``wgmma``'s accumulator, with 8 rows for each warp."""

IN_ORDER = plgpu.Layout.TILED(
    Tiling(((64, 8), (16, 8), (2, 2), (2, 1))), warp_dims=(-8,), lane_dims=(-6, -5), vector_dim=-2
)
"""Layout of an output with its dims in order: a thread has two adjacent dims of each of two heads."""

ROWS_APART = 8
"""Distance between two rows that a thread holds."""

LEAST_V_SCALE = 2.0**-100
"""The least scale of V. Smaller scales count as this one, so that sums of weight / scale stay in float32's range.

A block of zeros has the smallest scale there is, yet its tokens take their share of the softmax. The share vanishes
only where the row's largest scale is above 2^26. Values other than zeros with scales below this one, all less than
2^-91, come out too large.
"""


class Scales(NamedTuple):
    """Scales of each token of a tile."""

    k: Array
    v_log: Array  # log2 of V's scales
    v_inverse: Array


def with_stored_order(q: Float[Array, "tokens num_heads head_dim"]) -> Float[Array, "tokens num_heads head_dim"]:
    """Queries with their dims in the order of ``widened_keys``."""
    return jnp.concatenate(_halves(q), axis=2)


def _halves(x: Array) -> tuple[Array, Array]:
    """Columns 0 and 1 of each four, and columns 2 and 3."""
    fours = x.reshape(*x.shape[:-1], -1, 2, 2)
    halves = (fours[..., 0, :], fours[..., 1, :])
    first, second = (half.reshape(*x.shape[:-1], -1) for half in halves)
    return first, second


def widened_keys(keys: Ref, slab: int, shape: DecodeShape) -> tuple[Array, Array]:
    """Keys in float16 for two slabs of queries: ``slab`` of the first half of slabs, and of the second half."""
    if shape.is_interpreted:
        stored = keys[:, pl.ds(2 * slab * shape.slab, 2 * shape.slab)]
        return _halves(stored.astype(jnp.float16))

    def widen(_: mgpu.LaunchContext, pairs: mgpu.FragmentedArray) -> list[mgpu.FragmentedArray]:
        halves = _widen(pairs.registers, IN_PLACE, shape)
        return [mgpu.FragmentedArray(_registers=half, _layout=pairs.layout, _is_signed=None) for half in halves]

    half = plgpu.ShapeDtypeStruct((shape.tile, shape.slab), jnp.dtype(jnp.float16), MATRIX)
    pairs = plgpu.load(keys.at[:, pl.ds(slab * shape.slab, shape.slab)], layout=MATRIX)
    return plgpu.inline_mgpu(arg_types=(MATRIX,), return_type=(half, half))(widen)(pairs)


def widened_values(values: Ref, shape: DecodeShape) -> Array:
    """V^T [rows, tile] in float16, of values stored in pairs."""
    if shape.is_interpreted:
        return values[...].astype(jnp.float16).T
    dims = (shape.rows, shape.tile)

    def widen(_: mgpu.LaunchContext, pairs: mgpu.FragmentedArray) -> mgpu.FragmentedArray:
        layout = MATRIX.to_mgpu()
        rows = np.stack(_widen(pairs.registers, EVEN_FIRST, shape), axis=2)  # [64 dims, 8 tokens, 8 dims, ..]
        return mgpu.FragmentedArray(
            _registers=rows.reshape(layout.registers_shape(dims)), _layout=layout, _is_signed=None
        )

    widened = plgpu.ShapeDtypeStruct(dims, jnp.dtype(jnp.float16), MATRIX)
    pairs = plgpu.load(values.T, layout=PAIRS)
    return plgpu.inline_mgpu(arg_types=(PAIRS,), return_type=widened)(widen)(pairs)


def _widen(registers: np.ndarray, order: int, shape: DecodeShape) -> tuple[np.ndarray, np.ndarray]:
    """Registers of four bytes, each widened to two registers of float16, with the bytes in the order given."""
    ptx = widening_ptx(shape.pool_dtype, order)
    i32, pair = ir.IntegerType.get_signless(32), ir.VectorType.get((2,), ir.F16Type.get())
    halves = np.empty(registers.shape, object), np.empty(registers.shape, object)
    for index, register in np.ndenumerate(registers):
        numbers = mgpu.utils.inline_ptx(ptx, mgpu.utils.bitcast(register, i32), result_types=(i32, i32))
        for half, number in zip(halves, numbers, strict=True):
            half[index] = mgpu.utils.bitcast(number, pair)
    return halves


def load_scales(scales: Ref, shape: DecodeShape) -> Scales:
    """The scales of a tile, from one pair for every ``scaled_alike`` tokens."""
    if shape.is_interpreted:
        k, v = jnp.repeat(scales[...], shape.scaled_alike, axis=0).T
    else:
        column = plgpu.ShapeDtypeStruct((shape.tile,), jnp.dtype(jnp.float32), COLUMN)
        load = plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=(column, column))
        k, v = load(lambda _, scales: _load_columns(scales, shape))(scales)
    v = jnp.maximum(v, jnp.float32(LEAST_V_SCALE))
    return Scales(k, jnp.log2(v), 1 / v)


def _load_columns(scales: ir.Value, shape: DecodeShape) -> list[mgpu.FragmentedArray]:
    """The columns of pairs [tile / scaled_alike, 2], each number repeated; a thread loads once for equal rows."""
    i32, number = ir.IntegerType.get_signless(32), ir.VectorType.get((1,), ir.F32Type.get())
    pair_type = ir.VectorType.get((2,), ir.F32Type.get())
    per_group = shape.scaled_alike // ROWS_APART
    first_row = _first_row()
    pairs = []
    for row in range(0, shape.tile, 64):
        for nth in range(2 // per_group):
            at = arith.addi(first_row, mgpu.utils.c(row + nth * ROWS_APART, i32))
            at = arith.divui(at, mgpu.utils.c(shape.scaled_alike, i32))
            address = mgpu.utils.getelementptr(mgpu.utils.memref_ptr(scales), [at], pair_type)
            pairs += [llvm.load(pair_type, address)] * per_group
    layout = COLUMN.to_mgpu()
    columns = []
    for which in range(2):
        registers = np.empty(len(pairs), object)
        registers[:] = [vector.extract_strided_slice(number, pair, [which], [1], [1]) for pair in pairs]
        registers = registers.reshape(layout.registers_shape((shape.tile,)))
        columns.append(mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None))
    return columns


def _first_row() -> ir.Value:
    """The first row of ``MATRIX`` that this thread holds. Four lanes share each of the first 8 of a warp's 16 rows."""
    i32 = ir.IntegerType.get_signless(32)
    thread = mgpu.utils.thread_idx()
    warp = arith.remui(arith.divui(thread, mgpu.utils.c(32, i32)), mgpu.utils.c(4, i32))
    quad = arith.remui(arith.divui(thread, mgpu.utils.c(4, i32)), mgpu.utils.c(8, i32))
    return arith.addi(arith.muli(warp, mgpu.utils.c(16, i32)), quad)


def in_order(output: Array, shape: DecodeShape) -> Array:
    """An output [rows, columns] of ``widened_values`` with its dims in order."""
    if shape.is_interpreted:
        return output
    dims = output.shape

    def reorder(_: mgpu.LaunchContext, output: mgpu.FragmentedArray) -> mgpu.FragmentedArray:
        layout = IN_ORDER.to_mgpu()
        even, odd = np.split(output.registers, 2, axis=4)  # [64 dims, 8 heads, .., 8 dims, ..]
        pairs = np.empty((*even.shape, 2), object)
        for index in np.ndindex(even.shape):
            for head in range(2):
                pairs[*index, head] = vector.shuffle(even[index], odd[index], [head, head + 2])
        return mgpu.FragmentedArray(
            _registers=pairs.reshape(layout.registers_shape(dims)), _layout=layout, _is_signed=None
        )

    ordered = plgpu.ShapeDtypeStruct(dims, output.dtype, IN_ORDER)
    return plgpu.inline_mgpu(arg_types=(MATRIX,), return_type=ordered)(reorder)(output)
