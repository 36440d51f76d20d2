"""Arithmetic that the Hopper kernels share: weights from scores, and matrix products that also run interpreted.

A tile has 64 query rows, the number that one warpgroup multiplies. A tile's matrices live in registers in the layout of
``wgmma``'s accumulator. Arrays with one entry for each row have that layout reduced over its columns.
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
"""The running maximum before any score: finite, since minus infinity less itself is NaN, where no slot is visible."""

MATRIX = plgpu.Layout.WGMMA
COLUMN = plgpu.Layout.WGMMA.reduce(1)


class Softmax(NamedTuple):
    """A running softmax: each row's largest score, in powers of two, and its sum of weights."""

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

    The factor stays apart for the multiply-add that the exponent needs anyway.
    """
    if scoring.soft_cap is None:
        return scores, scoring.sm_scale * LOG2E
    # tanh(x) = 1 - 2 / (exp(2x) + 1) in float32's precision. The hardware's tanh has 11 bits, coarse for a large cap.
    doubled = jnp.exp2(scores * (2 * LOG2E * scoring.sm_scale / scoring.soft_cap))
    return 1 - 2 / (doubled + 1), scoring.soft_cap * LOG2E


def fold_scores(scores: Array, factor: float, softmax: Softmax) -> tuple[Array, Softmax, Array]:
    """Take a tile of scores (minus infinity where masked) into a softmax.

    Returns:
        The tile's weights, the new softmax, and the factor by which earlier sums must shrink.
    """
    num_columns = scores.shape[1]
    top = jnp.maximum(softmax.top, scores.max(axis=1) * factor)
    shrink = jnp.exp2(softmax.top - top)
    weights = jnp.exp2(scores * factor - spread(top, num_columns))
    return weights, Softmax(top, softmax.total * shrink + weights.sum(axis=1)), shrink


def add_sinks(softmax: Softmax, sinks: Array) -> tuple[Softmax, Array]:
    """A softmax with one more logit (in powers of two, with no value) for each row, and the factor for earlier sums."""
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
    return plgpu.SMEM(shape, dtype, transforms=tiled_transforms(dtype, swizzle))


def tiled_transforms(dtype: jnp.dtype, swizzle: int) -> tuple[Any, Any]:
    """The transforms of ``tiled_smem``."""
    tiling = plgpu.TilingTransform((8, swizzle // dtype.itemsize))  # pyright: ignore[reportAbstractUsage]
    return tiling, swizzling(swizzle)


def swizzling(swizzle: int) -> Any:
    """The transform of shared memory whose rows of so many bytes are swizzled."""
    return plgpu.SwizzleTransform(swizzle)  # pyright: ignore[reportAbstractUsage]


@dataclass(frozen=True)
class StandIn:
    """Shared memory in place of an accumulator, which the interpreter cannot write to."""

    ref: Ref


type Accumulator = Ref | StandIn


def with_accumulator[T](body: Callable[[Accumulator], T], shape: tuple[int, int], stand_in: StandIn | None) -> T:
    """``body(accumulator)`` with an accumulator of zeros, in registers unless there is a stand-in."""
    if stand_in is None:
        return pl.run_scoped(body, plgpu.WGMMAAccumulatorRef(shape, jnp.float32))
    write_accumulator(stand_in, jnp.zeros(shape, jnp.float32))
    return body(stand_in)


def accumulate(accumulator: Accumulator, a: Array | Ref, b: Ref, *, transpose_b: bool = False) -> None:
    """Start ``accumulator += a @ b`` on the tensor cores, with ``a`` in registers or shared memory.

    The interpreter, which has no products of registers, computes it at once in plain arithmetic.
    """
    if not isinstance(accumulator, StandIn):
        plgpu.wgmma(accumulator, a, b.transpose((1, 0)) if transpose_b else b)
        return
    left = a if isinstance(a, jax.Array) else a[...].reshape(TILE_ROWS, -1)
    accumulator.ref[...] += interpreted_product(left, b[...].T if transpose_b else b[...])


def interpreted_product(a: Array, b: Array) -> Array:
    """The tensor cores' product of two matrices, just read from shared memory, in plain arithmetic."""
    plgpu.commit_smem()  # plain reads, unlike the tensor cores', are not ordered before the next copy
    return jnp.dot(a, b, preferred_element_type=jnp.float32)


def read_accumulator(accumulator: Accumulator, *, in_flight: int) -> Array:
    """The sums, once all products are done but the last ``in_flight``.

    For the compiler the registers hold their sums from the product's start. A barrier keeps uses after the wait.
    """
    if not isinstance(accumulator, StandIn):
        return lax.optimization_barrier(plgpu.wgmma_accumulator_load(accumulator, wait_n=in_flight))
    return accumulator.ref[...]


def write_accumulator(accumulator: Accumulator, sums: Array) -> None:
    """Replace the sums while no product is in flight."""
    ref = accumulator.ref if isinstance(accumulator, StandIn) else accumulator
    ref[...] = sums
