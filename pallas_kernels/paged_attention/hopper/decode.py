"""Decode attention on Hopper at the speed of memory: rows of one query, over their blocks.

One thread block is one worker (see schedule.py) of two warpgroups. The producer copies the blocks of a tile into a ring
in shared memory, with one TMA for each block's K and V. The consumer multiplies them on the tensor cores. K, and then
V transposed, is the large operand; the heads of a group are the small operand:

    scores [tile_tokens, heads] = K [tile_tokens, head_dim] @ q^T [head_dim, heads]
    output [head_dim, heads]   += V^T [head_dim, tile_tokens] @ weights [tile_tokens, heads]

So a group of up to 8 heads costs as much as the tensor cores' smallest product. The arithmetic hides behind the copies.
64 tokens of K and V (32 KB) take 1.0 us of a multiprocessor's share of the bandwidth. In 8-bit pools they take half of
that time. The consumer widens 8-bit tiles to float16 as it reads them (see decode_quantized.py).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Float

from pallas_kernels.block_pool.layout import as_matrices, shape_of
from pallas_kernels.chips.memory import Ref
from pallas_kernels.paged_attention.call import Call
from pallas_kernels.paged_attention.hopper.decode_consumer import (
    ROW,
    consume,
    each_row,
    load_row,
    store_output,
)
from pallas_kernels.paged_attention.hopper.decode_memory import (
    Begun,
    DecodeShape,
    DecodeSizes,
    Inputs,
    Scratch,
    out_smem_of,
    scratch_types,
)
from pallas_kernels.paged_attention.hopper.decode_producer import produce
from pallas_kernels.paged_attention.hopper.decode_quantized import with_stored_order
from pallas_kernels.paged_attention.hopper.schedule import Merge, Queries, Schedule, schedule_decode
from pallas_kernels.paged_attention.hopper.tile import LEAST, LOG2E, MATRIX

MERGE = Merge()

PARTS_AT_ONCE = 4
"""Parts that a merge loads together, so that their latencies overlap."""


class HeadColumns(NamedTuple):
    """Numbers of each query head, a row for each KV head, in powers of two."""

    slopes: Float[Array, "num_kv_heads columns"] | None
    sinks: Float[Array, "num_kv_heads columns"] | None


def attend_decode(
    out: jax.Ref,
    queries: Queries,
    call: Call,
    *,
    sizes: DecodeSizes,
    num_sms: int,
    interpret: plgpu.InterpretGPUParams | None = None,
    begun: Begun | None = None,
) -> None:
    """Attend single queries and write their outputs, and nothing else, into ``out`` (like q).

    Args:
        queries: the queries to attend.
        call: the rest; its layer is on the device, so that one compiled kernel serves all layers.
        num_sms: multiprocessors to fill.
        interpret: settings of Pallas's interpreter for Mosaic GPU; None runs on a GPU.
        begun: softmaxes over the positions before ``queries.kv_begin``, for queries where that is above 0.
    """
    shape = decode_shape(call, sizes, num_workers=num_sms * sizes.workers_per_sm, is_interpreted=interpret is not None)
    schedule = schedule_decode(
        queries,
        num_kv_heads=shape.num_kv_heads,
        block_size=shape.block_size,
        tile_tokens=shape.tile,
        num_workers=shape.num_workers,
    )
    heads = HeadColumns(*(_by_kv_head(x, shape) for x in call.heads))
    parts = _attend(out, call, schedule, heads, begun, shape, interpret)
    _merge(out, *parts, schedule, heads.sinks, shape, interpret)


def decode_shape(call: Call, sizes: DecodeSizes, *, num_workers: int, is_interpreted: bool) -> DecodeShape:
    """The static properties of a launch."""
    pool, pool_shape = call.kv.pool, shape_of(call.kv.pool)
    return DecodeShape(
        num_layers=pool_shape.num_layers,
        num_kv_heads=pool_shape.num_kv_heads,
        group=call.num_heads // pool_shape.num_kv_heads,
        head_dim=call.head_dim,
        block_size=pool_shape.block_size,
        dtype=call.q.dtype,
        pool_dtype=pool.dtype,
        scoring=call.scoring,
        sizes=sizes,
        num_workers=num_workers,
        is_interpreted=is_interpreted,
    )


def _by_kv_head(
    x: Float[Array, " num_heads"] | None, shape: DecodeShape
) -> Float[Array, "num_kv_heads columns"] | None:
    if x is None:
        return None
    grouped = x.astype(jnp.float32).reshape(shape.num_kv_heads, shape.group) * LOG2E
    return jnp.pad(grouped, ((0, 0), (0, shape.columns - shape.group)))


def _fit_float16(
    q: Float[Array, "tokens num_heads head_dim"], shape: DecodeShape
) -> tuple[Float[Array, "tokens num_heads head_dim"], Float[Array, "tokens num_kv_heads columns"]]:
    """Queries in float16 whatever their range, and the powers of two that restore their range."""
    grouped = q.reshape(-1, shape.num_kv_heads, shape.group, shape.head_dim)
    padded = jnp.pad(grouped, ((0, 0), (0, 0), (0, shape.columns - shape.group), (0, 0)))
    # XLA computes nothing behind a reduction in its kernel. So this takes the exponents, as bits, before the largest.
    exponents = lax.bitcast_convert_type(padded.astype(jnp.float32), jnp.int32) & 0x7F800000
    # These powers of two and their reciprocals are normal numbers: compilers divide by multiplying by reciprocals.
    exponents = jnp.clip(exponents, *(127 + power << 23 for power in (-126, 126)))
    scales = lax.bitcast_convert_type(exponents.max(axis=3), jnp.float32)
    fitting = grouped.astype(jnp.float32) / scales[:, :, : shape.group, None]
    return fitting.astype(jnp.float16).reshape(q.shape), scales


def _attend(
    out: Ref,
    call: Call,
    schedule: Schedule,
    heads: HeadColumns,
    begun: Begun | None,
    shape: DecodeShape,
    interpret: plgpu.InterpretGPUParams | None,
) -> tuple[Float[Array, "parts rows columns"], Float[Array, "parts 64 columns"]]:
    """Write the outputs of whole items. Return the parts of other items: normalised outputs, and log2 of their sums."""
    num_parts = 2 * shape.num_workers
    q, (pool, layer, kv_scales), q_scales = call.q, call.kv, None
    if shape.is_quantized:
        q, q_scales = _fit_float16(q, shape)
        q = with_stored_order(q)
    inputs = Inputs(
        q,
        q_scales,
        as_matrices(pool, shape.piece),
        None if kv_scales is None else kv_scales.reshape(-1),
        jnp.asarray(layer).reshape(1),
        call.batch.block_tables,
        schedule.segments,
        schedule.first_segment,
        schedule.last_segment,
        heads.slopes,
        heads.sinks,
        begun,
    )
    operands, structure = jax.tree.flatten((inputs, out))

    def body(*refs):
        inputs, out_ref = jax.tree.unflatten(structure, refs[: len(operands)])
        part_outputs, part_sums, scratch = (
            refs[len(operands)],
            refs[len(operands) + 1],
            Scratch(*refs[len(operands) + 2 :]),
        )
        warpgroup = lax.axis_index("warpgroup")
        pl.when(warpgroup == 0)(lambda: produce(inputs, scratch, shape))
        pl.when(warpgroup == 1)(lambda: consume(inputs, scratch, out_ref, part_outputs, part_sums, shape))

    return plgpu.kernel(
        body,
        out_type=[
            jax.ShapeDtypeStruct((num_parts, shape.rows, shape.columns), jnp.float32),
            jax.ShapeDtypeStruct((num_parts, 64, shape.columns), jnp.float32),
        ],
        grid=(shape.num_workers,),
        grid_names=("worker",),
        num_threads=2,
        thread_name="warpgroup",
        kernel_name="paged_decode",
        scratch_types=scratch_types(shape),
        # Warps commit shared memory before other warps read it. A tile is written after all warps agreed on the maxima
        # of the tile before, so after they read that tile.
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        interpret=interpret,
    )(*operands)


def _merge(
    out: Ref,
    part_outputs: Float[Array, "parts rows columns"],
    part_sums: Float[Array, "parts 64 columns"],
    schedule: Schedule,
    sinks: Float[Array, "num_kv_heads columns"] | None,
    shape: DecodeShape,
    interpret: plgpu.InterpretGPUParams | None,
) -> None:
    """Write the outputs of items that several workers share: sums of the parts' outputs, weighted by their sums."""
    inputs = (part_outputs, part_sums, schedule.merges, sinks, out)
    operands, structure = jax.tree.flatten(inputs)

    def body(*refs):
        part_outputs, part_sums, merges, sinks, out = jax.tree.unflatten(structure, refs[: len(operands)])
        (out_smem,) = refs[len(operands) :]
        worker = lax.axis_index("worker")
        at = Merge(*(merges[worker, column] for column in MERGE))

        def load(part: Array) -> tuple[Array, Array]:
            return plgpu.load(part_outputs.at[part], layout=MATRIX, optimized=False), load_row(part_sums.at[part, 0])

        def add(index: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            output, top, total = carry
            parts = []
            for nth in range(PARTS_AT_ONCE):
                other = index * PARTS_AT_ONCE + nth
                part, part_sum = load(2 * (worker + jnp.minimum(other, at.num_others - 1)))
                parts.append((part, part_sum + jnp.where(other < at.num_others, jnp.float32(0), jnp.float32(LEAST))))
            new_top = top
            for _, part_sum in parts:
                new_top = jnp.maximum(new_top, part_sum)
            shrink = jnp.exp2(top - new_top)
            output, total = output * each_row(shrink, output), total * shrink
            for part, part_sum in parts:
                weight = jnp.exp2(part_sum - new_top)
                output, total = output + part * each_row(weight, part), total + weight
            return output, new_top, total

        @pl.when(at.num_others > 0)
        def _merge_item() -> None:
            output, top = load(at.first_part)
            total = plgpu.layout_cast(jnp.ones((shape.columns,), jnp.float32), ROW)
            groups = lax.div(at.num_others + PARTS_AT_ONCE - 1, jnp.int32(PARTS_AT_ONCE))
            output, top, total = lax.fori_loop(0, groups, add, (output, top, total))
            if sinks is not None:
                total = total + jnp.exp2(load_row(sinks.at[at.kv_head]) - top)
            heads = pl.ds(at.kv_head * shape.group, shape.group)
            store_output(output / each_row(total, output), out_smem, out.at[at.token, heads], shape)

    plgpu.kernel(
        body,
        out_type=(),
        grid=(shape.num_workers,),
        grid_names=("worker",),
        num_threads=1,
        thread_name="warpgroup",
        kernel_name="merge_decode_parts",
        scratch_types=[out_smem_of(shape)],
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )(*operands)
