"""Inputs, shared memory and barriers of the prefill kernel, and the items that its warpgroups read."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.chips.memory import Ref
from pallas_kernels.paged_attention.hopper.prefill_plan import CONSUMERS, Case, Item, Plan, Run
from pallas_kernels.paged_attention.hopper.tile import TILE_ROWS, smem_tile, swizzle_of, swizzling, tiled_smem

ITEM_SLOTS = 2
"""Items known at one time: the producer chooses the next item while the consumers attend this one."""

SUM_COLUMNS = 8
"""Repeated columns of ``Parts.sums``, since a warpgroup stores whole matrices."""

PRODUCER, WIDENER = CONSUMERS, CONSUMERS + 1
"""Warpgroups after the consumers. Only a launch over a quantised pool has the last."""


def num_warpgroups(case: Case) -> int:
    """Warpgroups of a thread block."""
    return CONSUMERS + 1 + case.is_quantized


class Inputs(NamedTuple):
    """The operands of the kernel, in device memory."""

    q: Ref
    pool: Ref  # [blocks * layers * 2 * num_kv_heads, block_size, head_dim]
    kv_scales: Ref | None  # [blocks * layers * 2 * num_kv_heads], of a quantised pool
    layer: Ref  # [1]
    block_tables: Ref
    plan: Plan
    num_dealt: Ref  # [1]: items taken so far
    slopes: Ref | None  # [units, tile_rows]
    sinks: Ref | None


class Parts(NamedTuple):
    """Outputs of a launch without a causal mask, for each part of the context, in tiles as computed."""

    outputs: Any  # [parts, tiles of tokens, units, TILE_ROWS, head_dim], normalised, float32
    sums: Any  # [parts, tiles of tokens, units, TILE_ROWS, SUM_COLUMNS]: log2 of the sums of weights, repeated


class Ring(NamedTuple):
    """Tiles of K, or of V, as copies write them, and the barriers of each."""

    tiles: Ref  # [stages, kv_tile, head_dim]
    full: Ref
    free: Ref
    scales: Ref | None = None  # [stages, pieces of a tile], of a quantised pool


class Scratch(NamedTuple):
    """Shared memory and barriers: ``full`` memory can be read, ``free`` memory can be written."""

    q: Ref  # in slabs, one matrix for each consumer
    out: Ref
    k: Ref  # [stages, kv_tile, head_dim]
    v: Ref
    stored: tuple[Ring, Ring] | None  # K and V of a quantised pool, which the widener reads
    scales: Ref | None  # [2, stages, pieces of a tile], of both; each array takes at least 1 KiB
    score_sums: Ref | None  # stand-ins for accumulators in the interpreter
    out_sums: Ref | None
    items: Ref
    item_full: Ref
    item_free: Ref
    q_full: Ref
    q_free: Ref
    k_full: Ref
    k_free: Ref
    v_full: Ref
    v_free: Ref
    turn: Ref  # one for each consumer, which then has the tensor cores
    cleared: Ref  # both consumers have cleared their part of a tile of values


def scratch_of(case: Case) -> Scratch:
    stages, pieces = case.sizes.stages, case.kv_tile // case.piece
    writers = 1 if case.is_quantized else pieces  # the widener signals a whole tile
    score_sums = out_sums = None
    if case.is_interpreted:
        score_sums = plgpu.SMEM((CONSUMERS, TILE_ROWS, case.kv_tile), jnp.float32)
        out_sums = plgpu.SMEM((CONSUMERS, TILE_ROWS, case.head_dim), jnp.float32)
    return Scratch(
        q=_slabs(case, case.num_slabs),
        out=_slabs(case, case.out_slabs),
        k=smem_tile((stages, case.kv_tile, case.head_dim), case.dtype),
        v=smem_tile((stages, case.kv_tile, case.head_dim), case.dtype),
        stored=(_stored_ring(case), _stored_ring(case)) if case.is_quantized else None,
        scales=plgpu.SMEM((2, case.stored_stages, pieces), jnp.float32) if case.is_quantized else None,
        score_sums=score_sums,
        out_sums=out_sums,
        items=plgpu.SMEM((ITEM_SLOTS, 1 + len(Run._fields)), jnp.int32),
        item_full=plgpu.Barrier(num_barriers=ITEM_SLOTS),
        item_free=plgpu.Barrier(num_arrivals=3 + CONSUMERS + case.is_quantized, num_barriers=ITEM_SLOTS),
        q_full=plgpu.Barrier(num_arrivals=case.num_slabs, num_barriers=CONSUMERS),
        q_free=plgpu.Barrier(num_barriers=CONSUMERS),
        k_full=plgpu.Barrier(num_arrivals=writers, num_barriers=stages),
        k_free=plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=stages),
        v_full=plgpu.Barrier(num_arrivals=writers, num_barriers=stages),
        v_free=plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=stages),
        turn=plgpu.Barrier(num_barriers=CONSUMERS),
        cleared=plgpu.Barrier(num_arrivals=CONSUMERS),
    )


def _stored_ring(case: Case) -> Ring:
    stages, pieces = case.stored_stages, case.kv_tile // case.piece
    swizzle, _ = swizzle_of(case.head_dim, case.pool_dtype.itemsize)
    return Ring(
        tiles=tiled_smem((stages, case.kv_tile, case.head_dim), case.pool_dtype, swizzle),
        full=plgpu.Barrier(num_arrivals=pieces, num_barriers=stages),
        free=plgpu.Barrier(num_barriers=stages),
    )


def of_slot(barriers: Ref, slot: Array | int) -> Ref:
    """The barrier of a slot; a ring of one slot has no array of barriers."""
    return barriers.at[slot] if barriers.shape else barriers


def copied_ring(scratch: Scratch, which: int) -> Ring:
    """The ring of K (0) or of V (1) that copies fill."""
    if scratch.stored is None or scratch.scales is None:
        return multiplied_ring(scratch, which)
    return scratch.stored[which]._replace(scales=scratch.scales.at[which])


def multiplied_ring(scratch: Scratch, which: int) -> Ring:
    """The ring of K (0) or of V (1) that the tensor cores read."""
    return (Ring(scratch.k, scratch.k_full, scratch.k_free), Ring(scratch.v, scratch.v_full, scratch.v_free))[which]


def _slabs(case: Case, num_slabs: int) -> Any:
    """A matrix of tile rows for each consumer, in two views: copies address tokens and heads, products address rows."""
    swizzle, columns = swizzle_of(case.head_dim, case.dtype.itemsize)
    copied = (CONSUMERS, num_slabs, case.tile_tokens, case.tile_heads, columns)
    if case.is_interpreted:  # the interpreter keeps views apart, and swizzles nothing
        return plgpu.SMEM(copied, case.dtype)
    return plgpu.RefUnion(
        plgpu.SMEM(copied, case.dtype, transforms=(swizzling(swizzle),)),
        smem_tile((CONSUMERS, num_slabs, TILE_ROWS, columns), case.dtype),
    )


def copied(case: Case, slabs: Ref) -> Ref:
    """[consumer, slab, token, head, column]."""
    return slabs if case.is_interpreted else slabs[0]


def multiplied(case: Case, slabs: Ref) -> Ref:
    """[consumer, slab, row, column]."""
    return slabs if case.is_interpreted else slabs[1]


def for_each_item[T](scratch: Scratch, body: Callable[[Item, T], T], carry: T) -> T:
    """Compute ``carry = body(item, carry)`` for all items that this thread block takes."""

    def read(nth: Array) -> Item:
        slot = lax.rem(nth, ITEM_SLOTS)
        plgpu.barrier_wait(scratch.item_full.at[slot])
        unit, *run = (scratch.items[slot, column] for column in range(1 + len(Run._fields)))
        plgpu.barrier_arrive(scratch.item_free.at[slot])
        return Item(unit, Run(*run))

    def step(state: tuple[Array, Item, T]) -> tuple[Array, Item, T]:
        nth, item, carry = state
        carry = body(item, carry)
        return nth + 1, read(nth + 1), carry

    start = (jnp.int32(0), read(jnp.int32(0)), carry)
    return lax.while_loop(lambda state: state[1].run.num_tokens > 0, step, start)[2]
