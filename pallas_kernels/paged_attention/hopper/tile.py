"""What the Hopper kernels share: how scores become weights, and matrix products that the interpreter runs too.

A tile has 64 query rows, as one warpgroup multiplies them. Arrays of it live in registers in the layout of ``wgmma``'s
accumulator; arrays with one entry for each row, in that layout reduced over its columns.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.chips.memory import Ref
from pallas_kernels.paged_attention.call import Scoring

LOG2E = math.log2(math.e)

TILE_ROWS = 64
"""Query rows of a tile: the M of a ``wgmma``."""

LEAST = -1e30
"""Where the largest score starts: finite, so that one less minus infinity, of a slot not seen, is not NaN."""

MATRIX = plgpu.Layout.WGMMA
COLUMN = plgpu.Layout.WGMMA.reduce(1)


class Softmax(NamedTuple):
    """A softmax under way: each row's largest score, in powers of two, and its sum of weights."""

    top: Array
    total: Array


def empty_softmax() -> Softmax:
    """The softmax of no scores."""
    return Softmax(full_column(LEAST), full_column(0))


def full_column(value: float) -> Array:
    """One value for each row of a tile."""
    return plgpu.layout_cast(jnp.full((TILE_ROWS,), value, jnp.float32), COLUMN)


def spread(column: Array, num_columns: int) -> Array:
    """A value for each row, repeated along the row."""
    return lax.broadcast_in_dim(column, (column.shape[0], num_columns), [0])


def position_in_tile(num_columns: int, axis: int) -> Array:
    """Each element's row or column in the tile."""
    return plgpu.broadcasted_iota(jnp.int32, (TILE_ROWS, num_columns), axis, layout=MATRIX)


def powers_of_two(scores: Array, scoring: Scoring) -> tuple[Array, float]:
    """Products of queries and keys as (x, factor): their weights are ``exp2(x * factor - top)``.

    The factor is left over for the multiply-add that the exponent needs anyway.
    """
    if scoring.soft_cap is None:
        return scores, scoring.sm_scale * LOG2E
    # tanh(x) = 1 - 2 / (exp(2x) + 1) to float32's precision: the hardware's own has 11 bits, coarse for a large cap.
    doubled = jnp.exp2(scores * (2 * LOG2E * scoring.sm_scale / scoring.soft_cap))
    return 1 - 2 / (doubled + 1), scoring.soft_cap * LOG2E


def fold_scores(scores: Array, factor: float, softmax: Softmax) -> tuple[Array, Softmax, Array]:
    """Take a tile of scores (minus infinity where masked) into a softmax.

    Returns:
        The tile's weights, the softmax with them, and the factor by which what was summed before must shrink.
    """
    num_columns = scores.shape[1]
    top = jnp.maximum(softmax.top, scores.max(axis=1) * factor)
    shrink = jnp.exp2(softmax.top - top)
    weights = jnp.exp2(scores * factor - spread(top, num_columns))
    return weights, Softmax(top, softmax.total * shrink + weights.sum(axis=1)), shrink


def add_sinks(softmax: Softmax, sinks: Array) -> tuple[Softmax, Array]:
    """A softmax with one more logit (in powers of two) for each row, without a value; and by what sums must shrink."""
    top = jnp.maximum(softmax.top, sinks)
    shrink = jnp.exp2(softmax.top - top)
    return Softmax(top, softmax.total * shrink + jnp.exp2(sinks - top)), shrink


def swizzle_of(head_dim: int, itemsize: int) -> tuple[int, int]:
    """The widest swizzle that rows of ``head_dim`` divide into, in bytes and in elements.

    Raises:
        NotImplementedError: no swizzle divides the rows.
    """
    row_bytes = head_dim * itemsize
    for swizzle in (128, 64, 32):
        if row_bytes % swizzle == 0:
            return swizzle, swizzle // itemsize
    raise NotImplementedError(f"head_dim={head_dim}: rows of {row_bytes} bytes are not a multiple of 32")


def smem_tile(shape: tuple[int, ...], dtype: jnp.dtype) -> Any:
    """Shared memory for matrices [..., rows, columns] that tensor cores multiply."""
    return tiled_smem(shape, dtype, swizzle_of(shape[-1], dtype.itemsize)[0])


def tiled_smem(shape: tuple[int, ...], dtype: jnp.dtype, swizzle: int) -> Any:
    """Shared memory for matrices [..., rows, columns] in tiles of eight rows of so many swizzled bytes."""
    tiling = plgpu.TilingTransform((8, swizzle // dtype.itemsize))  # pyright: ignore[reportAbstractUsage]
    return plgpu.SMEM(shape, dtype, transforms=(tiling, swizzling(swizzle)))


def swizzling(swizzle: int) -> Any:
    """The transform of shared memory whose rows of so many bytes are swizzled."""
    return plgpu.SwizzleTransform(swizzle)  # pyright: ignore[reportAbstractUsage]


@dataclass(frozen=True)
class StandIn:
    """Shared memory that the interpreter uses for an accumulator: its own kind cannot be written to."""

    ref: Ref


type Accumulator = Ref | StandIn


def with_accumulator[T](body: Callable[[Accumulator], T], shape: tuple[int, int], stand_in: StandIn | None) -> T:
    """``body(accumulator)``, of zeros; it is in registers unless something stands in for those."""
    if stand_in is None:
        return pl.run_scoped(body, plgpu.WGMMAAccumulatorRef(shape, jnp.float32))
    write_accumulator(stand_in, jnp.zeros(shape, jnp.float32))
    return body(stand_in)


def accumulate(accumulator: Accumulator, a: Array | Ref, b: Ref, *, transpose_b: bool = False) -> None:
    """Start ``accumulator += a @ b`` on the tensor cores, with ``a`` in registers or shared memory.

    The interpreter does it at once, and in plain arithmetic: it knows no products of registers.
    """
    if not isinstance(accumulator, StandIn):
        plgpu.wgmma(accumulator, a, b.transpose((1, 0)) if transpose_b else b)
        return
    left = a if isinstance(a, jax.Array) else a[...].reshape(TILE_ROWS, -1)
    accumulator.ref[...] += interpreted_product(left, b[...].T if transpose_b else b[...])


def interpreted_product(a: Array, b: Array) -> Array:
    """What the tensor cores would make of two matrices, just read from shared memory, in plain arithmetic."""
    plgpu.commit_smem()  # tensor cores read as copies write; these reads did not, and a copy may come next
    return jnp.dot(a, b, preferred_element_type=jnp.float32)


def read_accumulator(accumulator: Accumulator, *, in_flight: int) -> Array:
    """The sums, once all but the last ``in_flight`` products started are done.

    To the compiler the registers hold their sums from the product's start: a barrier keeps their uses after the wait.
    """
    if not isinstance(accumulator, StandIn):
        return lax.optimization_barrier(plgpu.wgmma_accumulator_load(accumulator, wait_n=in_flight))
    return accumulator.ref[...]


def write_accumulator(accumulator: Accumulator, sums: Array) -> None:
    """Replace the sums, of which no product is under way."""
    ref = accumulator.ref if isinstance(accumulator, StandIn) else accumulator
    ref[...] = sums
