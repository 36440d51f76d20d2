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

    def copy(index: Array, src: Ref, dst: Ref, pool: Ref) -> _Move:
        return _Move(dst[index], pool.at[_clip(src[index], num_blocks)], pool.at[_clip(dst[index], num_blocks)])

    return _into_pool(pool, (src, dst), (), copy, "copy_blocks", interpret)


def gather_blocks_tpu(pool: BlockPool, blocks: BlockIds, *, interpret: pltpu.InterpretParams | None = None) -> Blocks:
    """Whole blocks in the order asked for; arguments as for ``gather_blocks``, errors as for ``copy_blocks_tpu``."""
    num_blocks = num_blocks_of(pool)

    def body(blocks: Ref, pool: Ref, out: Ref, semaphores: Ref) -> None:
        def move(index: Array) -> _Move:
            return _Move(jnp.int32(1), pool.at[_clip(blocks[index], num_blocks)], out.at[index])

        _run_moves(blocks.shape[0], move, semaphores, num_blocks)

    return _call(body, (blocks,), (pool,), blocks_shape(pool, len(blocks)), {}, "gather_blocks", interpret)


def scatter_blocks_tpu(
    pool: BlockPool, blocks: BlockIds, data: Blocks, *, interpret: pltpu.InterpretParams | None = None
) -> BlockPool:
    """Overwrite whole blocks; arguments and result as for ``scatter_blocks``. Block 0 stays as it is.

    Raises:
        NotImplementedError: as ``copy_blocks_tpu``.
    """
    num_blocks = num_blocks_of(pool)

    def copy(index: Array, blocks: Ref, data: Ref, pool: Ref) -> _Move:
        return _Move(blocks[index], data.at[index], pool.at[_clip(blocks[index], num_blocks)])

    return _into_pool(pool, (blocks,), (data.astype(pool.dtype),), copy, "scatter_blocks", interpret)


class _Move(NamedTuple):
    """The move of a block; the kernel skips it unless the destination is one of the pool's blocks from 1."""

    destination: Array
    source: Ref
    target: Ref


def _clip(block: Array, num_blocks: int) -> Array:
    return jnp.clip(block, 0, num_blocks - 1)


def _into_pool(
    pool: BlockPool,
    ids: tuple[BlockIds, ...],
    data: tuple[Blocks, ...],
    copy: Callable[..., _Move],
    name: str,
    interpret: pltpu.InterpretParams | None,
) -> BlockPool:
    def body(*refs: Ref) -> None:
        *given, _, out, semaphores = refs
        _run_moves(ids[0].size, lambda index: copy(index, *given, out), semaphores, num_blocks_of(pool))

    aliases = {len(ids) + len(data): 0}
    return _call(body, ids, (*data, pool), pool.shape, aliases, name, interpret)


def _run_moves(count: int, move_of: Callable[[Array], _Move], semaphores: Ref, num_blocks: int) -> None:
    """Make all moves, up to ``COPIES_IN_FLIGHT`` at a time."""

    def copy(index: Array) -> tuple[Array, Any]:
        move = move_of(index)
        is_made = (move.destination > 0) & (move.destination < num_blocks)
        return is_made, pltpu.make_async_copy(
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
