"""Rows with several queries on Hopper: FlashAttention-3 (arXiv:2407.08608) over the blocks of a pool.

One thread block on each multiprocessor takes items of work (see prefill_plan.py) until none are left. Two warpgroups,
the consumers, take half of an item's tokens each: 64 rows of (token, head). Both read the same tiles of K and V. A
third warpgroup is the producer. Its warps choose the next item, and copy its queries, keys and values to shared memory.
Over a quantised pool, a fourth warpgroup widens the tiles that the producer copies (see prefill_widener.py).
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxtyping import Float, Int

from pallas_kernels.block_pool.layout import as_matrices, is_quantized, matrix_of, shape_of
from pallas_kernels.chips.memory import Ref
from pallas_kernels.paged_attention.call import NO_HEADS, Call
from pallas_kernels.paged_attention.hopper.prefill_consumer import Consumer
from pallas_kernels.paged_attention.hopper.prefill_memory import (
    ITEM_SLOTS,
    PRODUCER,
    SUM_COLUMNS,
    WIDENER,
    Inputs,
    Parts,
    Scratch,
    copied,
    copied_ring,
    for_each_item,
    num_warpgroups,
    of_slot,
    scratch_of,
)
from pallas_kernels.paged_attention.hopper.prefill_plan import (
    CONSUMERS,
    DEFAULT_SIZES,
    WIDEST_QUANTIZED,
    Case,
    Item,
    Plan,
    PrefillSizes,
    Run,
    first_seen,
    locate,
    plan_prefill,
    plan_whole,
    span_of,
)
from pallas_kernels.paged_attention.hopper.prefill_widener import widen_tiles
from pallas_kernels.paged_attention.hopper.tile import LOG2E, TILE_ROWS

REGISTERS_OF_CONSUMER = {False: 240, True: 208}
"""Is the pool quantised? -> registers of a consumer's thread. The widener takes some of the registers."""

REGISTERS_OF_PRODUCER, REGISTERS_OF_WIDENER = 24, 72


def attend_prefill(
    out: jax.Ref,
    call: Call,
    *,
    sizes: PrefillSizes = DEFAULT_SIZES,
    num_sms: int,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> None:
    """Attend every row that has more than one query, and write its outputs, and nothing else, into ``out`` (like q).

    Args:
        call: the call; its layer is on the device, so that one compiled kernel serves all layers.
        num_sms: multiprocessors to fill.
        interpret: settings of Pallas's interpreter for Mosaic GPU; None runs on a GPU.

    Raises:
        ValueError, NotImplementedError: as for ``Case``.
    """
    case = prefill_case(call, sizes, is_interpreted=interpret is not None)
    plan = plan_prefill(case, call.num_tokens, call.batch.kv_lens, call.batch.cu_q_lens)
    if len(plan.runs) == 0:
        return
    _launch(case, call, call.batch.block_tables, plan, out, num_sms, interpret)


def attend_whole(
    call: Call,
    block_tables: Int[Array, "parts max_blocks"],
    part_lens: Int[Array, " parts"],
    *,
    sizes: PrefillSizes = DEFAULT_SIZES,
    num_sms: int,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> tuple[Case, Parts]:
    """Attend all queries over the parts of one context, which each query sees whole, without sinks.

    Args:
        call: queries and layer; the layer is on the device.
        block_tables: the blocks of each part.
        part_lens: tokens of each part. Parts without tokens come last, and have undefined results.
        num_sms: multiprocessors to fill.
        interpret: settings of Pallas's interpreter for Mosaic GPU; None runs on a GPU.

    Returns:
        The launch, and the softmaxes of each query.
    """
    case = replace(prefill_case(call, sizes, is_interpreted=interpret is not None), is_causal=False)
    plan = plan_whole(case, call.num_tokens, part_lens)
    call = replace(call, heads=NO_HEADS)
    return case, Parts(*_launch(case, call, block_tables, plan, None, num_sms, interpret))


def _launch(
    case: Case,
    call: Call,
    block_tables: Int[Array, "num_seqs max_blocks"],
    plan: Plan,
    out: jax.Ref | None,
    num_sms: int,
    interpret: plgpu.InterpretGPUParams | None,
) -> Sequence[Array]:
    """Attend the items of a plan. Write their outputs into ``out``, or return ``Parts`` if there is no ``out``."""
    inputs = Inputs(
        call.q,
        as_matrices(call.kv.pool, case.block_size),
        None if call.kv.kv_scales is None else call.kv.kv_scales.reshape(-1),
        jnp.asarray(call.kv.layer).reshape(1),
        block_tables,
        plan,
        jax.new_ref(jnp.zeros((1,), jnp.int32)),
        *(None if x is None else _by_unit(case, x) for x in call.heads),
    )
    operands, structure = jax.tree.flatten((inputs, out))
    num_operands, num_parts = len(operands), len(block_tables)
    tiles = num_parts, CONSUMERS * len(plan.runs) // num_parts, case.num_units, TILE_ROWS
    results = [jax.ShapeDtypeStruct((*tiles, width), jnp.float32) for width in (case.head_dim, SUM_COLUMNS)]
    results = tuple(results) if out is None else ()

    def body(*refs: Ref) -> None:
        inputs, out_ref = jax.tree.unflatten(structure, refs[:num_operands])
        scratch = Scratch(*refs[num_operands + len(results) :])
        target = Parts(*refs[num_operands : num_operands + 2]) if out_ref is None else out_ref
        _run_warpgroup(case, inputs, target, scratch)

    return plgpu.kernel(
        body,
        out_type=results,
        scratch_types=scratch_of(case),
        grid=(num_sms,),
        grid_names=("block",),
        num_threads=num_warpgroups(case),
        thread_name="warpgroup",
        kernel_name="paged_prefill",
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            unsafe_no_auto_barriers=True,
            reduction_scratch_bytes=0,  # rows lie within a warp
            lowering_semantics=plgpu.LoweringSemantics.Lane,  # in which warps may have loops of unknown length
        ),
        interpret=interpret,
    )(*operands)


def prefill_case(call: Call, sizes: PrefillSizes = DEFAULT_SIZES, *, is_interpreted: bool = False) -> Case:
    """The static properties of a launch; raises as for ``Case``."""
    shape = shape_of(call.kv.pool)
    return Case(
        scoring=call.scoring,
        sizes=sizes,
        dtype=jnp.dtype(call.q.dtype),
        pool_dtype=jnp.dtype(call.kv.pool.dtype),
        num_heads=call.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=call.head_dim,
        num_layers=shape.num_layers,
        block_size=shape.block_size,
        is_interpreted=is_interpreted,
    )


def takes_pool(call: Call) -> bool:
    """Whether ``attend_prefill`` takes the pool: 8-bit tiles of large heads exceed shared memory beside wider tiles."""
    is_wide = call.head_dim > WIDEST_QUANTIZED
    return not (is_wide and is_quantized(call.kv.pool.dtype))


def _by_unit(case: Case, heads: Float[Array, " num_heads"]) -> Float[Array, "units tile_rows"]:
    """Numbers of query heads in powers of two, for each row of a unit's tiles."""
    units = heads.astype(jnp.float32).reshape(-1, case.tile_heads) * LOG2E
    return jnp.tile(units, (1, case.tile_tokens))


def _run_warpgroup(case: Case, inputs: Inputs, out: Ref | Parts, scratch: Scratch) -> None:
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup < CONSUMERS)
    def _() -> None:
        plgpu.set_max_registers(REGISTERS_OF_CONSUMER[case.is_quantized], action="increase")
        Consumer(case, inputs, out, scratch, warpgroup).run()

    @pl.when(warpgroup == PRODUCER)
    def _() -> None:
        plgpu.set_max_registers(REGISTERS_OF_PRODUCER, action="decrease")

        @plgpu.warp_map
        def _(warp: Array) -> None:
            for i, role in enumerate((_deal, _copy_queries, _copy_keys, _copy_values)):
                pl.when(warp == i)(partial(role, case, inputs, scratch))

    if case.is_quantized:

        @pl.when(warpgroup == WIDENER)
        def _() -> None:
            plgpu.set_max_registers(REGISTERS_OF_WIDENER, action="decrease")
            widen_tiles(case, scratch)


def _deal(case: Case, inputs: Inputs, scratch: Scratch) -> None:
    """Take the next item, for all warps to read, until none are left."""
    num_runs, section = inputs.plan.dealing[0], inputs.plan.dealing[1]

    def deal(carry: tuple[Array, Array]) -> tuple[Array, Array]:
        count, _ = carry
        slot = lax.rem(count, ITEM_SLOTS)
        pl.when(count >= ITEM_SLOTS)(lambda: plgpu.barrier_wait(scratch.item_free.at[slot]))
        if case.is_interpreted:
            index = lax.axis_index("block") + count * lax.axis_size("block")
        else:
            index = _fetch_and_increment(inputs.num_dealt)
        is_item = index < num_runs * case.num_units
        place, unit = locate(jnp.where(is_item, index, 0), jnp.maximum(num_runs, 1), section)
        run = Run(*(inputs.plan.runs[place, column] for column in range(len(Run._fields))))
        run = run._replace(num_tokens=jnp.where(is_item, run.num_tokens, 0))
        for column, number in enumerate((unit, *run)):
            scratch.items[slot, column] = number
        plgpu.barrier_arrive(scratch.item_full.at[slot])
        return count + 1, is_item

    num_dealt, _ = lax.while_loop(lambda carry: carry[1], deal, (jnp.int32(0), jnp.bool_(True)))
    for back in range(ITEM_SLOTS, 0, -1):
        last = num_dealt - back
        pl.when(last >= 0)(lambda last=last: plgpu.barrier_wait(scratch.item_free.at[lax.rem(last, ITEM_SLOTS)]))


def _fetch_and_increment(counter: Ref) -> Array:
    """The next number of a counter, atomically, for all lanes of a warp. Pallas's atomics return no result."""
    ptx = """{
        .reg .pred is_first; .reg .b32 lane;
        mov.u32 lane, %laneid; setp.eq.u32 is_first, lane, 0; mov.u32 $0, 0;
        @is_first atom.add.u32 $0, [$1], 1;
        shfl.sync.idx.b32 $0, $0, 0, 31, 0xffffffff;
    }"""

    def fetch(_: mgpu.LaunchContext, counter: ir.Value) -> mgpu.FragmentedArray:
        pointer, i32 = mgpu.utils.memref_ptr(counter), ir.IntegerType.get_signless(32)
        number = mgpu.utils.inline_ptx(ptx, pointer, result_types=i32, has_side_effects=True, convergent=True)
        return mgpu.FragmentedArray.splat(number, (), is_signed=True)

    number = plgpu.ShapeDtypeStruct((), jnp.dtype(jnp.int32), plgpu.Layout.WG_SPLAT)
    return plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=number)(fetch)(counter)


def _copy_queries(case: Case, inputs: Inputs, scratch: Scratch) -> None:
    def copy(item: Item, carry: None) -> None:
        heads = pl.ds(item.unit * case.tile_heads, case.tile_heads)
        for consumer in range(CONSUMERS):
            plgpu.barrier_wait(scratch.q_free.at[consumer])
            tokens = pl.ds(item.run.first_token + consumer * case.tile_tokens, case.tile_tokens)
            for slab in range(case.num_slabs):
                plgpu.copy_gmem_to_smem(
                    inputs.q.at[tokens, heads, pl.ds(slab * case.slab, case.slab)],
                    copied(case, scratch.q).at[consumer, slab],
                    scratch.q_full.at[consumer],
                )

    for_each_item(scratch, copy, None)
    for consumer in range(CONSUMERS):
        plgpu.barrier_wait(scratch.q_free.at[consumer])


def _copy_keys(case: Case, inputs: Inputs, scratch: Scratch) -> None:
    _copy_tiles(case, inputs, scratch, 0)


def _copy_values(case: Case, inputs: Inputs, scratch: Scratch) -> None:
    _copy_tiles(case, inputs, scratch, 1)


def _copy_tiles(case: Case, inputs: Inputs, scratch: Scratch, which: int) -> None:
    ring = copied_ring(scratch, which)
    stages = ring.tiles.shape[0]

    def copy_item(item: Item, count: Array) -> Array:
        span = span_of(case, item)

        def copy_tile(step: Array, count: Array) -> Array:
            pieces = _pieces(case, inputs, which, item, span.tile(step))  # its loads overlap with the wait
            slot = lax.rem(count, stages)
            plgpu.barrier_wait(of_slot(ring.free, slot))
            for i, piece in enumerate(pieces):
                if ring.scales is not None:
                    ring.scales[slot, i] = piece.scale  # for the widener, which the copy below signals
                tokens = pl.ds(i * case.piece, case.piece)
                plgpu.copy_gmem_to_smem(piece.source, ring.tiles.at[slot, tokens], of_slot(ring.full, slot))
            return count + 1

        return lax.fori_loop(0, span.num_tiles, copy_tile, count)

    for_each_item(scratch, copy_item, jnp.int32(0))
    for slot in range(stages):  # barriers must outlive the last signal to them
        plgpu.barrier_wait(of_slot(ring.free, slot))


class _Piece(NamedTuple):
    """A piece of a tile in the pool, and its scale in a quantised pool."""

    source: Ref
    scale: Array | None


def _pieces(case: Case, inputs: Inputs, which: int, item: Item, tile: Array) -> list[_Piece]:
    """A tile's pieces. A visible piece stands in for each piece that the row does not see."""
    kv_head = lax.div(item.unit * case.tile_heads, case.group)
    first_block = lax.div(first_seen(case, item.run.row_pos), case.block_size)
    last_block = lax.div(item.run.kv_len - 1, case.block_size)
    pieces = []
    for i in range(case.kv_tile // case.piece):
        pos = tile * case.kv_tile + i * case.piece
        block = jnp.clip(lax.div(pos, case.block_size), first_block, last_block)
        physical = inputs.block_tables[item.run.row, block]
        matrix = matrix_of(
            physical, inputs.layer[0], which, kv_head, num_layers=case.num_layers, num_kv_heads=case.num_kv_heads
        )
        source = inputs.pool.at[matrix]
        if case.piece < case.block_size:
            source = source.at[pl.ds(lax.rem(pos, case.block_size), case.piece)]
        pieces.append(_Piece(source, None if inputs.kv_scales is None else inputs.kv_scales[matrix]))
    return pieces
