"""Moves of whole blocks on TPUs, from HBM to HBM by DMA."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import dispatch
from pallas_kernels.block_pool.layout import BlockIds, BlockPool, Blocks, blocks_shape, num_blocks_of
from pallas_kernels.chips import here
from pallas_kernels.chips.memory import Ref

COPIES_IN_FLIGHT = 16
"""Moves of blocks in flight: enough to hide the time that each takes to start."""


def copy_blocks_tpu(
    pool: BlockPool, src: BlockIds, dst: BlockIds, *, interpret: pltpu.InterpretParams | None = None
) -> BlockPool:
    """Copy whole blocks within the pool; arguments and result as for ``copy_blocks``.

    Sources and destinations are disjoint, except for block 0, which stays as it is.

    Args:
        interpret: settings of Pallas's interpreter for TPUs; None runs on a TPU.

    Raises:
        NotImplementedError: a device that is no TPU.
    """
    num_blocks = num_blocks_of(pool)

    def copy(index: Array, src: Ref, dst: Ref, pool: Ref) -> Move:
        source, target = pool.at[_clip(src[index], num_blocks)], pool.at[_clip(dst[index], num_blocks)]
        return Move(_is_written(dst[index], num_blocks), source, target)

    return _into_pool(pool, (src, dst), (), copy, "copy_blocks", interpret)


def gather_blocks_tpu(pool: BlockPool, blocks: BlockIds, *, interpret: pltpu.InterpretParams | None = None) -> Blocks:
    """Whole blocks in the order asked for; arguments as for ``gather_blocks``, errors as for ``copy_blocks_tpu``."""
    num_blocks = num_blocks_of(pool)

    def body(blocks: Ref, pool: Ref, out: Ref, semaphores: Ref) -> None:
        def move(index: Array) -> Move:
            return Move(True, pool.at[_clip(blocks[index], num_blocks)], out.at[index])

        run_moves(blocks.shape[0], move, semaphores)

    return _call(body, (blocks,), (pool,), blocks_shape(pool, len(blocks)), {}, "gather_blocks", interpret)


def scatter_blocks_tpu(
    pool: BlockPool, blocks: BlockIds, data: Blocks, *, interpret: pltpu.InterpretParams | None = None
) -> BlockPool:
    """Overwrite whole blocks; arguments and result as for ``scatter_blocks``. Block 0 stays as it is.

    Raises:
        NotImplementedError: as ``copy_blocks_tpu``.
    """
    num_blocks = num_blocks_of(pool)

    def copy(index: Array, blocks: Ref, data: Ref, pool: Ref) -> Move:
        target = pool.at[_clip(blocks[index], num_blocks)]
        return Move(_is_written(blocks[index], num_blocks), data.at[index], target)

    return _into_pool(pool, (blocks,), (data.astype(pool.dtype),), copy, "scatter_blocks", interpret)


class Move(NamedTuple):
    """The move of a block; the kernel skips it unless ``is_made``."""

    is_made: Array | bool
    source: Ref
    target: Ref


def _is_written(block: Array, num_blocks: int) -> Array:
    """Whether the kernels write a block: block 0 stays as it is."""
    return (block > 0) & (block < num_blocks)


def _clip(block: Array, num_blocks: int) -> Array:
    return jnp.clip(block, 0, num_blocks - 1)


def _into_pool(
    pool: BlockPool,
    ids: tuple[BlockIds, ...],
    data: tuple[Blocks, ...],
    copy: Callable[..., Move],
    name: str,
    interpret: pltpu.InterpretParams | None,
) -> BlockPool:
    def body(*refs: Ref) -> None:
        *given, _, out, semaphores = refs
        run_moves(ids[0].size, lambda index: copy(index, *given, out), semaphores)

    aliases = {len(ids) + len(data): 0}
    return _call(body, ids, (*data, pool), pool.shape, aliases, name, interpret)


def run_moves(count: int, move_of: Callable[[Array], Move], semaphores: Ref) -> None:
    """Make all moves, up to ``COPIES_IN_FLIGHT`` at a time."""

    def copy(index: Array) -> tuple[Array | bool, Any]:
        move = move_of(index)
        return move.is_made, pltpu.make_async_copy(
            move.source, move.target, semaphores.at[lax.rem(index, jnp.int32(COPIES_IN_FLIGHT))]
        )

    def start(index: Array) -> None:
        is_made, made = copy(index)
        pl.when(is_made)(lambda: made.start())

    def wait(index: Array) -> None:
        is_made, made = copy(index)
        pl.when(is_made)(lambda: made.wait())

    def step(index: Array, _: None) -> None:
        pl.when(index >= COPIES_IN_FLIGHT)(lambda: wait(index - COPIES_IN_FLIGHT))
        start(index)

    lax.fori_loop(0, count, step, None)
    lax.fori_loop(max(count - COPIES_IN_FLIGHT, 0), count, lambda index, _: wait(index), None)


def _call(
    body: Callable[..., None],
    ids: tuple[BlockIds, ...],
    arrays: tuple[Array, ...],
    shape: tuple[int, ...],
    aliases: dict[int, int],
    name: str,
    interpret: pltpu.InterpretParams | None,
) -> Array:
    dispatch.refuse(None if interpret else here.why_no_tpu(), "implementation='xla' takes it")
    if ids[0].size == 0:
        return arrays[-1] if aliases else jnp.zeros(shape, arrays[-1].dtype)
    return pl.pallas_call(
        body,
        out_shape=jax.ShapeDtypeStruct(shape, arrays[-1].dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(ids),
            grid=(),
            in_specs=[pl.BlockSpec(memory_space=pl.ANY)] * len(arrays),
            out_specs=pl.BlockSpec(memory_space=pl.ANY),
            scratch_shapes=[pltpu.SemaphoreType.DMA((COPIES_IN_FLIGHT,))],
        ),
        input_output_aliases=aliases,
        interpret=interpret or False,
        name=name,
    )(*(x.astype(jnp.int32) for x in ids), *arrays)
