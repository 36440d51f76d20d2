"""Blocks in pinned memory of the host: their copies from and to the pool on TPUs, by DMA.

A TPU addresses host memory in units of 4 KiB. The compiler takes a traced index into an array there only where a tile
of the array has as many bytes (JAX issue 40200). So a slot holds bytes: 32 rows of 128 bytes are a tile.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Int, Int32

from pallas_kernels import dispatch
from pallas_kernels.block_pool.layout import BlockIds, BlockPool, is_quantized, shape_of
from pallas_kernels.block_pool.tpu.moves import COPIES_IN_FLIGHT, Move, run_moves
from pallas_kernels.chips import here
from pallas_kernels.chips.memory import Ref
from pallas_kernels.chips.tpu import LANES, in_hbm

HOST_ROWS = 32
"""Rows of bytes that a tile of a slot has."""

MOST_SLOTS = 96 * 1024
"""Slots that one launch takes: SMEM, of 1 MiB on every generation, holds 4 bytes for each."""

Slots = Int[Array, "slots num_layers 2 num_kv_heads rows head_dim"]
"""Blocks in host memory, as bytes; in the interpreter, as the pool stores them."""

Named = Int32[Array, " most_plus_1"]
"""The number of slots named, then these slots, then padding."""

Semaphore = Any
"""A semaphore as the result of a kernel."""

Interpret = pltpu.InterpretParams | None


def why_no_slots(pool_shape: tuple[int, ...], dtype: jax.typing.DTypeLike) -> str | None:
    """The reason why blocks of such a pool cannot lie in slots; None if they can."""
    shape, dtype = shape_of(pool_shape), jnp.dtype(dtype)
    if is_quantized(dtype):
        return f"a pool of {dtype}: slots hold blocks without scales"
    if shape.head_dim != LANES:
        return f"head_dim {shape.head_dim}: slots hold rows of {LANES} numbers"
    if shape.block_size * dtype.itemsize % HOST_ROWS:
        return f"block_size {shape.block_size}: expected a multiple of {HOST_ROWS // dtype.itemsize} for {dtype}"
    return None


def slots_for(pool: BlockPool, num_slots: int, *, is_interpreted: bool = False) -> jax.ShapeDtypeStruct:
    """The shape and type of so many slots for blocks of a pool; put them in memory of the kind ``pinned_host``.

    Pallas's interpreter cannot view a pool as bytes. So there slots hold what the pool does, in any memory.
    """
    if is_interpreted:
        return jax.ShapeDtypeStruct((num_slots, *pool.shape[1:]), pool.dtype)
    _, num_layers, num_kv_heads, block_size, head_dim = shape_of(pool)
    shape = (num_slots, num_layers, 2, num_kv_heads, block_size * pool.dtype.itemsize, head_dim)
    return jax.ShapeDtypeStruct(shape, jnp.int8)


def store_blocks_tpu(
    slots: Slots, pool: BlockPool, blocks: BlockIds, into: BlockIds, *, interpret: Interpret = None
) -> Slots:
    """Copy whole blocks to slots, in place if the slots are donated.

    Args:
        slots: all slots; ``jax.jit`` needs ``out_shardings`` of their memory for the result.
        pool: the pool.
        blocks: the blocks to copy; negative for padding.
        into: the slot of each.
        interpret: settings of Pallas's interpreter for TPUs; None runs on a TPU.

    Raises:
        NotImplementedError: a device that is no TPU.
    """

    def body(blocks: Ref, into: Ref, pool: Ref, _: Ref, slots: Ref, semaphores: Ref) -> None:
        def move(index: Array) -> Move:
            block = blocks[index]
            source, target = pool.at[jnp.maximum(block, 0)], slots.at[into[index]]
            return Move(block >= 0, _as(slots, source), target)

        run_moves(blocks.shape[0], move, semaphores)

    specs = [pl.BlockSpec(memory_space=pl.ANY), _in_host_memory(interpret)]
    return _call_with(body, (blocks, into), (pool, slots), specs, "store_blocks", interpret)


def load_blocks_tpu(
    pool: BlockPool, slots: Slots, blocks: BlockIds, source: BlockIds, *, interpret: Interpret = None
) -> BlockPool:
    """Copy slots to whole blocks, in place if the pool is donated.

    Args:
        pool: the pool.
        slots: all slots.
        blocks: the blocks to overwrite; negative for padding.
        source: the slot of each.
        interpret: as for ``store_blocks_tpu``.

    Raises:
        NotImplementedError: as ``store_blocks_tpu``.
    """

    def body(blocks: Ref, source: Ref, slots: Ref, _: Ref, pool: Ref, semaphores: Ref) -> None:
        def move(index: Array) -> Move:
            block = blocks[index]
            return Move(block >= 0, slots.at[source[index]], _as(slots, pool.at[jnp.maximum(block, 0)]))

        run_moves(blocks.shape[0], move, semaphores)

    specs = [_in_host_memory(interpret), pl.BlockSpec(memory_space=pl.ANY)]
    return _call_with(body, (blocks, source), (slots, pool), specs, "load_blocks", interpret)


def _call_with(
    body: Callable[..., None],
    ids: tuple[BlockIds, BlockIds],
    arrays: tuple[Array, Array],
    specs: list[pl.BlockSpec],
    name: str,
    interpret: Interpret,
) -> Array:
    """Launch moves between two arrays, of which the second is written in place and returned."""
    dispatch.refuse(None if interpret else here.why_no_tpu(), "it copies by DMA alone")
    return pl.pallas_call(
        body,
        out_shape=jax.ShapeDtypeStruct(arrays[1].shape, arrays[1].dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(ids),
            grid=(),
            in_specs=specs,
            out_specs=specs[1],
            scratch_shapes=[pltpu.SemaphoreType.DMA((COPIES_IN_FLIGHT,))],
        ),
        input_output_aliases={len(ids) + 1: 0},
        interpret=interpret or False,
        name=name,
    )(*ids, *arrays)


# Blocks of one layer, while other kernels run -----------------------------------------------------------------------


def start_layer_tpu(
    layers: BlockPool,
    slots: Slots,
    named: Named,
    layer: int,
    first_block: int,
    *,
    interpret: Interpret = None,
) -> tuple[BlockPool, Semaphore]:
    """Start to copy one layer of slots to neighbouring blocks of a pool of one layer (``as_layers``).

    The copies run while the kernels after this one do, until ``wait_layer_tpu``. No kernel may read or write the blocks
    in between. In the interpreter, the copies are over at once: semaphores do not outlive a kernel there.

    Args:
        layers: the pool, which is written in place if it is donated.
        slots: all slots.
        named: the slots to copy.
        layer: the layer.
        first_block: the first block to overwrite.
        interpret: as for ``store_blocks_tpu``.

    Returns:
        The pool, and a semaphore that counts the bytes that have arrived.

    Raises:
        NotImplementedError: as ``store_blocks_tpu``.
    """
    dispatch.refuse(None if interpret else here.why_no_tpu(), "it copies by DMA alone")

    def body(named: Ref, slots: Ref, _: Ref, layers: Ref, semaphore: Ref) -> None:
        def copy(index: Array) -> Any:
            target = _as(slots, layers.at[first_block + index, 0])
            return pltpu.make_async_copy(slots.at[named[1 + index], layer], target, semaphore)

        lax.fori_loop(0, named[0], lambda index, _: copy(index).start(), None)
        if interpret:
            lax.fori_loop(0, named[0], lambda index, _: copy(index).wait(), None)

    pool = jax.ShapeDtypeStruct(layers.shape, layers.dtype)
    in_place, semaphore = pl.BlockSpec(memory_space=pl.ANY), pltpu.SemaphoreType.DMA(())
    results = [(pool, in_place), (semaphore, pl.BlockSpec(memory_space=pltpu.SEMAPHORE))]
    out_shapes, out_specs = zip(*(results[:1] if interpret else results), strict=True)
    layers, *landed = pl.pallas_call(
        body,
        out_shape=out_shapes,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(),
            in_specs=[_in_host_memory(interpret), in_place],
            out_specs=out_specs,
            scratch_shapes=[semaphore] if interpret else [],
        ),
        input_output_aliases={2: 0},
        compiler_params=pltpu.CompilerParams(has_side_effects=True),
        interpret=interpret or False,
        name="start_layer",
    )(named, slots, in_hbm(layers, interpret))
    return layers, landed[0] if landed else jnp.zeros((), jnp.int32)


def wait_layer_tpu(
    layers: BlockPool, named: Named, semaphore: Semaphore, after: Array, *, interpret: Interpret = None
) -> BlockPool:
    """Wait until a layer of slots has arrived.

    Args:
        layers: the pool, as the kernels since the start have left it.
        named: the slots, as given to ``start_layer_tpu``.
        semaphore: the result of ``start_layer_tpu``.
        after: an array that is computed before the wait begins.
        interpret: as for ``store_blocks_tpu``.

    Returns:
        The pool with the blocks.
    """
    if interpret:
        return layers

    def body(count: Ref, semaphore: Ref, after: Ref, layers: Ref, _: Ref) -> None:
        del after
        one = layers.at[0, 0]  # any copy of as many bytes
        lax.fori_loop(0, count[0], lambda index, _: pltpu.make_async_copy(one, one, semaphore).wait(), None)

    in_place = pl.BlockSpec(memory_space=pl.ANY)
    return pl.pallas_call(
        body,
        out_shape=jax.ShapeDtypeStruct(layers.shape, layers.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(),
            in_specs=[pl.BlockSpec(memory_space=pltpu.SEMAPHORE), in_place, in_place],
            out_specs=in_place,
        ),
        input_output_aliases={3: 0},
        compiler_params=pltpu.CompilerParams(has_side_effects=True),
        name="wait_layer",
    )(named[:1], semaphore, after, in_hbm(layers, interpret))


def _in_host_memory(interpret: Interpret) -> pl.BlockSpec:
    """The memory of slots. The interpreter writes no host memory in place."""
    return pl.BlockSpec(memory_space=pl.ANY if interpret else pl.HOST)


def _as(slots: Ref, ref: Ref) -> Ref:
    """A part of the pool in the type of the slots."""
    return ref if slots.dtype == ref.dtype else ref.bitcast(slots.dtype)
