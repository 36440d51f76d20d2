"""Grouped products on Hopper GPUs, as a Pallas Mosaic GPU kernel.

One thread block on each multiprocessor takes tiles of the result in turn. A producer warp copies tiles of rows and of
weights to shared memory, and runs ahead into the next tile of the result. Consumer warpgroups multiply 64 rows each.
The blocks that work at one time share the weights of a group, so that device memory is read once for all of its rows.
The weights of a group without rows are not read.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Float, Int32

from pallas_kernels import dispatch
from pallas_kernels.chips import here
from pallas_kernels.chips.hopper import SMEM_BYTES
from pallas_kernels.chips.memory import Ref
from pallas_kernels.grouped_matmul.plan import most_tiles, plan_tiles
from pallas_kernels.paged_attention.hopper.tile import (
    TILE_ROWS,
    Accumulator,
    StandIn,
    accumulate,
    read_accumulator,
    smem_tile,
    swizzling,
    with_accumulator,
)

DTYPES = (jnp.bfloat16, jnp.float16)

SLAB = 64
"""Columns of a swizzled row in shared memory: 128 bytes. It is also the step along the features."""

COLUMNS = (256, 192, 128, 64)
"""Columns of a tile of the result, best first: wide tiles copy the rows of ``x`` less often. Few tiles of rows take
narrow ones, so that every multiprocessor reads weights."""

SLABS_OUT = 2
"""Slabs of the result that a consumer holds in shared memory at one time, at most."""

MOST_STAGES = 8

TWO_CONSUMERS_FROM = 64
"""Rows of a mean group from which two warpgroups share each tile of weights: then most groups fill more than one."""


class Scratch(NamedTuple):
    """Shared memory and barriers: ``full`` memory can be read, ``free`` memory can be written."""

    x: Ref  # [stages, rows, SLAB] in two views: copies of rows from any row on, and products
    w: Ref  # [stages, columns, SLAB], or [stages, SLAB, columns]
    out: Ref  # [consumers, slabs_out, TILE_ROWS, SLAB]
    sums: Ref | None  # stands in for accumulators in the interpreter
    full: Ref
    free: Ref


@dataclass(frozen=True)
class Case:
    """Static properties of a launch.

    Args:
        num_features, num_columns: sizes of the matrices.
        columns: columns of a tile of the result.
        is_transposed: whether the matrices are [columns, features].
        dtype: dtype of the operands and the result.
        consumers: warpgroups that multiply.
        is_interpreted: whether Pallas interprets the kernel.
    """

    num_features: int
    num_columns: int
    columns: int
    is_transposed: bool
    dtype: jnp.dtype
    consumers: int
    is_interpreted: bool

    @property
    def tile_rows(self) -> int:
        return self.consumers * TILE_ROWS

    @property
    def grid_columns(self) -> int:
        return self.num_columns // self.columns

    @property
    def num_steps(self) -> int:
        return self.num_features // SLAB

    @property
    def slabs_out(self) -> int:
        slabs = self.columns // SLAB
        return SLABS_OUT if slabs % SLABS_OUT == 0 else 1

    @property
    def stages(self) -> int:
        stage, out = (self.tile_rows + self.columns) * SLAB, self.tile_rows * self.slabs_out * SLAB
        return min(MOST_STAGES, (SMEM_BYTES // self.dtype.itemsize - out - 1024) // stage)


def columns_of_tile(num_columns: int, num_tiles: int, num_sms: int) -> int:
    """The widest columns of which all tiles of rows together give every multiprocessor a tile; else the narrowest."""
    fitting = [columns for columns in COLUMNS if num_columns % columns == 0]
    filling = (columns for columns in fitting if num_tiles * (num_columns // columns) >= num_sms)
    return next(filling, fitting[-1])


def why_not_grouped(matrix: tuple[int, ...], dtype: jnp.dtype) -> str | None:
    """The reason why the kernel cannot take matrices of this shape, whatever the device; None if it can."""
    if dtype not in DTYPES:
        return f"{jnp.dtype(dtype).name}: the kernel takes bfloat16 and float16"
    if any(size % SLAB for size in matrix):
        return f"matrices of {list(matrix)}: expected multiples of {SLAB}"
    return None


def grouped_matmul_hopper(
    x: Float[Array, "rows features"],
    weights: Float[Array, "num_matrices ..."],
    group_sizes: Int32[Array, " num_groups"],
    *,
    is_transposed: bool,
    matrices: Int32[Array, " num_groups"] | None = None,
    consumers: int | None = None,
    num_sms: int | None = None,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> Float[Array, "rows out_features"]:
    """Multiply groups of rows; arguments and result as for ``grouped_matmul``, which checks shapes.

    Args:
        consumers: warpgroups that multiply, 1 or 2; None chooses by the number of rows.
        num_sms: multiprocessors to fill; those of the device if None.
        interpret: settings of Pallas's interpreter for Mosaic GPU; None runs on a GPU.

    Raises:
        NotImplementedError: a case, or a device, that the kernel does not take.
    """
    reason = why_not_grouped(weights.shape[1:], x.dtype) or (None if interpret else here.why_no_hopper())
    dispatch.refuse(reason, "implementation='xla' takes it")
    num_rows, num_sms = len(x), num_sms or here.num_sms()
    num_groups = len(group_sizes)
    case = _case_of(x, weights, num_groups, is_transposed=is_transposed, consumers=consumers, num_sms=num_sms)
    case = replace(case, is_interpreted=interpret is not None)
    padded = jnp.pad(x, ((0, max(case.tile_rows - num_rows, 0)), (0, 0)))  # a tile copies all of its rows
    tiles = plan_tiles(group_sizes, matrices, len(padded), case.tile_rows)
    return _grouped(padded, weights, tiles, case=case, num_sms=num_sms, interpret=interpret)[:num_rows]


def _case_of(
    x: Array, weights: Array, num_groups: int, *, is_transposed: bool, consumers: int | None, num_sms: int
) -> Case:
    features, num_columns = reversed(weights.shape[1:]) if is_transposed else weights.shape[1:]
    consumers = consumers or (2 if len(x) // num_groups >= TWO_CONSUMERS_FROM else 1)
    num_tiles = most_tiles(len(x), num_groups, consumers * TILE_ROWS)
    return Case(
        num_features=features,
        num_columns=num_columns,
        columns=columns_of_tile(num_columns, num_tiles, num_sms),
        is_transposed=is_transposed,
        dtype=jnp.dtype(x.dtype),
        consumers=consumers,
        is_interpreted=False,
    )


@partial(jax.jit, static_argnames=("case", "num_sms", "interpret"))
def _grouped(
    x: Array,
    weights: Array,
    tiles: Array,
    *,
    case: Case,
    num_sms: int,
    interpret: plgpu.InterpretGPUParams | None,
) -> Array:
    def body(*refs: Ref, **scratch: Ref) -> None:
        tiles, x, weights, out = refs
        block = lax.axis_index("block")
        num_items = tiles[5, 0] * case.grid_columns
        own_items = lax.div(jnp.maximum(num_items - block + num_sms - 1, 0), num_sms)
        worker = _Worker(case, tiles, x, weights, out, Scratch(**scratch), block, own_items, num_sms)
        warpgroup, is_crowded = lax.axis_index("warpgroup"), case.consumers > 1

        @pl.when(warpgroup < case.consumers)
        def _() -> None:
            if is_crowded:  # three warpgroups share the registers of a multiprocessor
                plgpu.set_max_registers(240, action="increase")
            worker.consume(warpgroup)

        @pl.when(warpgroup == case.consumers)
        def _() -> None:
            if is_crowded:
                plgpu.set_max_registers(24, action="decrease")

            @plgpu.warp_map
            def _(warp: Array) -> None:
                pl.when(warp == 0)(worker.produce)

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((len(x), case.num_columns), x.dtype),
        scratch_types=_scratch_of(case)._asdict(),
        grid=(num_sms,),
        grid_names=("block",),
        num_threads=case.consumers + 1,
        thread_name="warpgroup",
        kernel_name="grouped_matmul",
        compiler_params=plgpu.CompilerParams(
            unsafe_no_auto_barriers=True,
            reduction_scratch_bytes=0,
            lowering_semantics=plgpu.LoweringSemantics.Lane,  # in which warps may have loops of unknown length
        ),
        interpret=interpret,
    )(tiles, x, weights)


def _scratch_of(case: Case) -> Scratch:
    w = (case.columns, SLAB) if case.is_transposed else (SLAB, case.columns)
    out = (case.consumers, case.slabs_out, TILE_ROWS, SLAB)
    return Scratch(
        x=_two_views((case.stages, case.tile_rows, SLAB), case),
        w=smem_tile((case.stages, *w), case.dtype),
        out=_two_views(out, case),
        sums=plgpu.SMEM((case.consumers, TILE_ROWS, case.columns), jnp.float32) if case.is_interpreted else None,
        full=plgpu.Barrier(num_arrivals=2, num_barriers=case.stages),
        free=plgpu.Barrier(num_arrivals=case.consumers, num_barriers=case.stages),
    )


def _two_views(shape: tuple[int, ...], case: Case) -> Any:
    """Shared memory that copies address by rows, and products in tiles of eight rows.

    A copy between device memory and tiles of rows would have to begin at a multiple of eight rows.
    """
    if case.is_interpreted:  # the interpreter keeps views apart, and swizzles nothing
        return plgpu.SMEM(shape, case.dtype)
    rows = plgpu.SMEM(shape, case.dtype, transforms=(swizzling(2 * SLAB),))
    return plgpu.RefUnion(rows, smem_tile(shape, case.dtype))


def _views(memory: Ref, case: Case) -> tuple[Ref, Ref]:
    """The view of copies and that of products."""
    return (memory, memory) if case.is_interpreted else (memory[0], memory[1])


@dataclass(frozen=True)
class _Worker:
    """One thread block: its items, each a tile of rows and a tile of columns, and its memory."""

    case: Case
    tiles: Ref
    x: Ref
    weights: Ref
    out: Ref
    scratch: Scratch
    block: Array
    own_items: Array
    num_blocks: int

    def _item(self, nth: Array) -> tuple[Array, Array]:
        """The tile and the first column of an item. Items of a group are neighbours, and first those of one column."""
        index = self.block + nth * self.num_blocks
        some_tile = lax.div(index, self.case.grid_columns)  # of the same group
        first_tile, num_tiles = self.tiles[3, some_tile], self.tiles[4, some_tile]
        within = index - first_tile * self.case.grid_columns
        return first_tile + lax.rem(within, num_tiles), lax.div(within, num_tiles) * self.case.columns

    def produce(self) -> None:
        """Copy the operands of all items to shared memory."""
        case, scratch = self.case, self.scratch
        copied, _ = _views(scratch.x, case)

        def copy_item(nth: Array, count: Array) -> Array:
            tile, column = self._item(nth)
            rows, columns = pl.ds(self.tiles[1, tile], case.tile_rows), pl.ds(column, case.columns)
            matrix = self.weights.at[self.tiles[0, tile]]

            def copy_step(step: Array, count: Array) -> Array:
                slot, features = lax.rem(count, case.stages), pl.ds(step * SLAB, SLAB)
                plgpu.barrier_wait(scratch.free.at[slot])
                plgpu.copy_gmem_to_smem(self.x.at[rows, features], copied.at[slot], scratch.full.at[slot])
                part = matrix.at[columns, features] if case.is_transposed else matrix.at[features, columns]
                plgpu.copy_gmem_to_smem(part, scratch.w.at[slot], scratch.full.at[slot])
                return count + 1

            return lax.fori_loop(0, case.num_steps, copy_step, count)

        lax.fori_loop(0, self.own_items, copy_item, jnp.int32(0))
        for slot in range(case.stages):  # barriers must outlive the last signal to them
            plgpu.barrier_wait(scratch.free.at[slot])

    def consume(self, consumer: Array) -> None:
        """Multiply the rows of one consumer in all items."""
        case, scratch = self.case, self.scratch
        for slot in range(case.stages):
            plgpu.barrier_arrive(scratch.free.at[slot])

        def multiply_item(nth: Array, count: Array) -> Array:
            stand_in = None if scratch.sums is None else StandIn(scratch.sums.at[consumer])

            def multiply(sums: Accumulator) -> Array:
                self._multiply(sums, consumer, count)

                def step(_: Array, count: Array) -> Array:
                    self._multiply(sums, consumer, count)
                    if not case.is_interpreted:
                        plgpu.wgmma_wait(1)
                    plgpu.barrier_arrive(scratch.free.at[lax.rem(count - 1, case.stages)])
                    return count + 1

                end = lax.fori_loop(1, case.num_steps, step, count + 1)
                total = read_accumulator(sums, in_flight=0)
                plgpu.barrier_arrive(scratch.free.at[lax.rem(end - 1, case.stages)])
                self._write(nth, consumer, total.astype(case.dtype))
                return end

            return with_accumulator(multiply, (TILE_ROWS, case.columns), stand_in)

        lax.fori_loop(0, self.own_items, multiply_item, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)

    def _multiply(self, sums: Accumulator, consumer: Array, count: Array) -> None:
        slot = lax.rem(count, self.case.stages)
        plgpu.barrier_wait(self.scratch.full.at[slot])
        _, multiplied = _views(self.scratch.x, self.case)
        x = multiplied.at[slot, pl.ds(consumer * TILE_ROWS, TILE_ROWS)]
        accumulate(sums, x, self.scratch.w.at[slot], transpose_b=self.case.is_transposed)

    def _write(self, nth: Array, consumer: Array, total: Array) -> None:
        """Write the rows of a tile that are its group's."""
        case = self.case
        copied, written = _views(self.scratch.out, case)
        tile, column = self._item(nth)
        first = self.tiles[1, tile] + consumer * TILE_ROWS
        num_rows = jnp.clip(self.tiles[2, tile] - consumer * TILE_ROWS, 0, TILE_ROWS)

        def copy(size: int, first_column: Array) -> None:
            start = num_rows & ~(2 * size - 1)
            for slab in range(case.slabs_out):
                target = self.out.at[pl.ds(first + start, size), pl.ds(first_column + slab * SLAB, SLAB)]
                plgpu.copy_smem_to_gmem(copied.at[consumer, slab, pl.ds(start, size)], target)

        for part in range(0, case.columns, case.slabs_out * SLAB):
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            for slab in range(case.slabs_out):
                start = part + slab * SLAB
                written.at[consumer, slab][...] = total[:, start : start + SLAB]
            plgpu.commit_smem()
            size = TILE_ROWS
            while size:  # a copy for each bit of num_rows
                pl.when((num_rows & size) != 0)(partial(copy, size, column + part))
                size //= 2
