"""Paged attention on TPUs by one ragged Pallas kernel: which batches it takes, and its launch."""

from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Float, Int

from pallas_kernels import dispatch
from pallas_kernels.block_pool.layout import BlockPool, KvScales, is_quantized, shape_of
from pallas_kernels.block_pool.tpu import write_kv_quantized_tpu, write_kv_tpu
from pallas_kernels.chips import here
from pallas_kernels.chips.tpu import LANES, Chip, chip_of
from pallas_kernels.paged_attention.tpu.batch import attend_batch, layout_of_pool, slots_of_rows
from pallas_kernels.paged_attention.tpu.lanes import LaneLayout, lane_layout, to_lanes
from pallas_kernels.paged_attention.tpu.launch import Scoring, Sizes

__all__ = [
    "LaneLayout",
    "attend_tpu",
    "lane_layout",
    "to_lanes",
    "why_not_tpu",
    "write_and_attend_tpu",
    "write_quantized_and_attend_tpu",
]

DEFAULT_GENERATION = "v5e"
"""The chip whose sizes the interpreter takes if none is named."""


def why_not_tpu(
    q_shape: tuple[int, ...],
    q_dtype: jnp.dtype,
    pool_shape: tuple[int, ...],
    pool_dtype: jnp.dtype,
    num_kv_heads: int | None = None,
) -> str | None:
    """Why the kernel cannot take a case, whatever the chip; None if it can.

    Args:
        num_kv_heads: the model's; if None, as many as ``lane_layout`` puts into the pool's rows.
    """
    _, num_heads, head_dim = q_shape
    _, _, _, block_size, pool_dim = shape_of(pool_shape)
    if q_dtype not in (jnp.bfloat16, jnp.float32):
        return f"queries in {jnp.dtype(q_dtype).name}: TPUs compute in bfloat16 and float32"
    if pool_dtype == jnp.float16:  # all others that block_pool stores are widened where a chip cannot multiply them
        return "a pool in float16: TPUs compute in bfloat16 and float32"
    if pool_dim % LANES:
        return (
            f"a pool with rows of {pool_dim}: XLA would copy it for every call, unless they are a multiple of {LANES}; "
            "lay heads out with lane_layout"
        )
    if pool_dim > 256:
        return f"head_dim={head_dim}: expected at most 256"
    if block_size % 8:
        return f"block_size={block_size}: expected a multiple of 8"
    if num_kv_heads is not None and num_heads % num_kv_heads:
        return f"{num_heads} query heads for {num_kv_heads} KV heads: expected a multiple"
    return None


def attend_tpu(
    q: Float[Array, "tokens num_heads head_dim"],
    pool: BlockPool,
    layer: int | Int[Array, ""],
    block_tables: Int[Array, "num_seqs max_blocks"],
    kv_lens: Int[Array, " num_seqs"],
    cu_q_lens: Int[Array, " num_seqs_plus_1"],
    *,
    sm_scale: float,
    sliding_window: int | None,
    soft_cap: float | None,
    alibi_slopes: Float[Array, " num_heads"] | None,
    sinks: Float[Array, " num_heads"] | None,
    kv_scales: KvScales | None,
    into: Float[Array, "tokens num_heads head_dim"] | None = None,
    num_kv_heads: int | None = None,
    sizes: Sizes | None = None,
    chip: Chip | None = None,
    interpret: pltpu.InterpretParams | None = None,
) -> Float[Array, "tokens num_heads head_dim"]:
    """Attention of every query over its sequence's blocks; arguments and result as for ``paged_attention``.

    A pool may have wider rows than the queries: those that ``lane_layout`` gives narrow heads.
    Over several devices it wants ``jax.shard_map(..., check_vma=False)``, KV heads sharded.

    Args:
        num_kv_heads: the model's KV heads, where the pool's rows are wider than the queries; if None, as many as fit.
        sizes: of tiles, chunks and rings; what fits the chip if None.
        chip: what to choose sizes for; if None, the one at hand, and a v5e in the interpreter.
        interpret: run in Pallas's interpreter for TPUs instead of on one, where rows may be of any width.

    Raises:
        NotImplementedError: a case, or a device, that the kernel does not take.
    """
    del into  # XLA chooses where results go
    if not interpret:
        reason = why_not_tpu(q.shape, q.dtype, pool.shape, pool.dtype, num_kv_heads)
        dispatch.refuse(reason, "implementation='xla' takes it")
    if 0 in q.shape or 0 in block_tables.shape:
        return jnp.zeros_like(q)
    if chip is None:
        chip = chip_of(DEFAULT_GENERATION) if interpret else here.current_tpu()
    out, _ = attend_batch(
        q,
        pool,
        jnp.asarray(layer, jnp.int32),
        block_tables,
        kv_lens,
        cu_q_lens,
        alibi_slopes,
        sinks,
        kv_scales,
        None,
        layout=layout_of_pool(q.shape[2], pool, num_kv_heads),
        scoring=Scoring(sm_scale, sliding_window, soft_cap),
        sizes=sizes,
        chip=chip,
        interpret=interpret,
    )
    return out


def write_and_attend_tpu(
    q: Float[Array, "tokens num_heads head_dim"],
    k: Float[Array, "tokens num_kv_heads head_dim"],
    v: Float[Array, "tokens num_kv_heads head_dim"],
    pool: BlockPool,
    layer: int | Int[Array, ""],
    block_tables: Int[Array, "num_seqs max_blocks"],
    kv_lens: Int[Array, " num_seqs"],
    cu_q_lens: Int[Array, " num_seqs_plus_1"],
    *,
    sm_scale: float,
    sliding_window: int | None,
    soft_cap: float | None,
    alibi_slopes: Float[Array, " num_heads"] | None,
    sinks: Float[Array, " num_heads"] | None,
    is_decode: bool = False,
    sizes: Sizes | None = None,
    chip: Chip | None = None,
    interpret: pltpu.InterpretParams | None = None,
) -> tuple[Float[Array, "tokens num_heads head_dim"], BlockPool]:
    """``write_kv`` of this step's tokens and ``attend_tpu`` in one: K and V of a decode join the block that it reads.

    The tokens' slots are where their positions lie in the block tables. The tokens of rows that have several are
    written by a kernel of their own beforehand.

    Args:
        k, v: of this step's tokens, in any float type and the model's layout.
        pool: of a float type; donate it to the enclosing jit.
        is_decode: no row has more than one query, which spares the launch of that other kernel.

    Returns:
        What ``attend_tpu`` returns, and the pool.

    Raises:
        NotImplementedError: a case, or a device, that the kernel does not take; among them, quantised pools.
    """
    if is_quantized(pool.dtype):
        raise NotImplementedError(
            f"a pool of {pool.dtype} is written by write_kv_quantized, then attended by attend_tpu"
        )
    if not interpret:
        reason = why_not_tpu(q.shape, q.dtype, pool.shape, pool.dtype, k.shape[1])
        if reason is not None:
            raise NotImplementedError(reason)
    if 0 in q.shape or 0 in block_tables.shape:
        return jnp.zeros_like(q), pool
    if chip is None:
        chip = chip_of(DEFAULT_GENERATION) if interpret else here.current_tpu()
    layout = layout_of_pool(q.shape[2], pool, k.shape[1])
    k, v = (to_lanes(x, layout).astype(pool.dtype) for x in (k, v))
    layer = jnp.asarray(layer, jnp.int32)
    if not is_decode:
        slots = slots_of_rows(q.shape[0], block_tables, kv_lens, cu_q_lens, shape_of(pool).block_size, least_tokens=2)
        pool = write_kv_tpu(pool, layer, k, v, slots, interpret=interpret)
    out, written = attend_batch(
        q,
        pool,
        layer,
        block_tables,
        kv_lens,
        cu_q_lens,
        alibi_slopes,
        sinks,
        None,
        jnp.stack([k, v], axis=1)[:, :, :, None],
        layout=layout,
        scoring=Scoring(sm_scale, sliding_window, soft_cap),
        sizes=sizes,
        chip=chip,
        interpret=interpret,
    )
    assert written is not None
    return out, written


def write_quantized_and_attend_tpu(
    q: Float[Array, "tokens num_heads head_dim"],
    k: Float[Array, "tokens num_kv_heads head_dim"],
    v: Float[Array, "tokens num_kv_heads head_dim"],
    pool: BlockPool,
    kv_scales: KvScales,
    layer: int | Int[Array, ""],
    block_tables: Int[Array, "num_seqs max_blocks"],
    kv_lens: Int[Array, " num_seqs"],
    cu_q_lens: Int[Array, " num_seqs_plus_1"],
    *,
    interpret: pltpu.InterpretParams | None = None,
    **options: Any,
) -> tuple[Float[Array, "tokens num_heads head_dim"], BlockPool, KvScales]:
    """``write_and_attend_tpu`` for a quantised pool, by one kernel that writes and one that attends."""
    layout = layout_of_pool(q.shape[2], pool, k.shape[1])
    slots = slots_of_rows(q.shape[0], block_tables, kv_lens, cu_q_lens, shape_of(pool).block_size, least_tokens=1)
    k, v = (to_lanes(x, layout) for x in (k, v))
    pool, kv_scales = write_kv_quantized_tpu(pool, kv_scales, layer, k, v, slots, interpret=interpret)
    out = attend_tpu(
        q,
        pool,
        layer,
        block_tables,
        kv_lens,
        cu_q_lens,
        kv_scales=kv_scales,
        num_kv_heads=layout.num_kv_heads * layout.heads_per_row,
        interpret=interpret,
        **options,
    )
    return out, pool, kv_scales
