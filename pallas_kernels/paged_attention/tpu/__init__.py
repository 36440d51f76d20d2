"""Paged attention on TPUs by one ragged Pallas kernel: the cases it takes, and its launch."""

from dataclasses import replace
from typing import Any

import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels import dispatch
from pallas_kernels.block_pool.layout import is_quantized, shape_of
from pallas_kernels.block_pool.tpu import write_kv_quantized_tpu, write_kv_tpu
from pallas_kernels.chips import here
from pallas_kernels.chips.tpu import LANES, Chip, chip_of
from pallas_kernels.paged_attention.call import Attended, Call
from pallas_kernels.paged_attention.tpu.batch import attend_batch, layout_of_pool, slots_of_rows
from pallas_kernels.paged_attention.tpu.lanes import LaneLayout, lane_layout, to_lanes
from pallas_kernels.paged_attention.tpu.launch import Sizes

__all__ = ["LaneLayout", "attend_tpu", "lane_layout", "to_lanes", "why_not_tpu", "write_and_attend_tpu"]

DEFAULT_GENERATION = "v5e"
"""The chip whose sizes the interpreter takes if none is named."""


def why_not_tpu(
    q_shape: tuple[int, ...],
    q_dtype: jnp.dtype,
    pool_shape: tuple[int, ...],
    pool_dtype: jnp.dtype,
    num_kv_heads: int | None = None,
) -> str | None:
    """The reason why the kernel cannot take a case, whatever the chip; None if it can.

    Args:
        num_kv_heads: KV heads of the model; if None, as many as ``lane_layout`` puts into the pool's rows.
    """
    _, num_heads, head_dim = q_shape
    _, _, _, block_size, pool_dim = shape_of(pool_shape)
    if q_dtype not in (jnp.bfloat16, jnp.float32):
        return f"queries in {jnp.dtype(q_dtype).name}: TPUs compute in bfloat16 and float32"
    if pool_dtype == jnp.float16:  # other stored types are widened where a chip cannot multiply them
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
    call: Call,
    *,
    num_kv_heads: int | None = None,
    sizes: Sizes | None = None,
    chip: Chip | None = None,
    interpret: pltpu.InterpretParams | None = None,
) -> Float[Array, "tokens num_heads head_dim"]:
    """Attention of every query over its sequence's blocks.

    A pool may have wider rows than the queries: the rows that ``lane_layout`` gives narrow heads. Over several devices
    the kernel needs ``jax.shard_map(..., check_vma=False)``, with KV heads sharded.

    Args:
        num_kv_heads: the model's KV heads, where the pool's rows are wider than the queries; if None, as many as fit.
        sizes: sizes of tiles, chunks and rings; sizes that fit the chip if None.
        chip: the chip to choose sizes for; if None, the chip at hand, or a v5e in the interpreter.
        interpret: settings of Pallas's interpreter for TPUs; None runs on a TPU.

    Raises:
        NotImplementedError: a case, or a device, that the kernel does not take.
    """
    layout = layout_of_pool(call.head_dim, call.kv.pool, num_kv_heads)
    launch = _launch(call, num_kv_heads, sizes, chip, interpret)
    if not call.has_work:
        return jnp.zeros_like(call.q)
    out, _ = attend_batch(_with_traced_layer(call), None, layout=layout, **launch)
    return out


def _with_traced_layer(call: Call) -> Call:
    return replace(call, kv=call.kv._replace(layer=jnp.asarray(call.kv.layer, jnp.int32)), into=None)


def _launch(
    call: Call,
    num_kv_heads: int | None,
    sizes: Sizes | None,
    chip: Chip | None,
    interpret: pltpu.InterpretParams | None,
) -> dict[str, Any]:
    """The options of ``attend_batch`` for a call that the kernels take; the interpreter needs no TPU."""
    reason = why_not_tpu(*call.case, num_kv_heads) or (None if interpret or chip else here.why_no_tpu())
    dispatch.refuse(reason, "implementation='xla' takes it")
    chip = chip or (chip_of(DEFAULT_GENERATION) if interpret else here.current_tpu())
    return {"sizes": sizes, "chip": chip, "interpret": interpret}


def write_and_attend_tpu(
    call: Call,
    k: Float[Array, "tokens num_kv_heads head_dim"],
    v: Float[Array, "tokens num_kv_heads head_dim"],
    *,
    is_decode: bool = False,
    sizes: Sizes | None = None,
    chip: Chip | None = None,
    interpret: pltpu.InterpretParams | None = None,
) -> Attended:
    """``write_kv`` of this step's tokens and ``attend_tpu`` in one.

    The tokens' slots follow from their positions and the block tables. The kernel puts K and V of a decode into the
    block that the decode reads. A separate kernel first writes rows of several tokens, and all rows of a quantised
    pool.

    Args:
        call: the call; donate its pool, and the pool's scales, to the enclosing jit.
        k, v: K and V of this step's tokens, in any float type and the model's layout.
        is_decode: whether no row has more than one query, which spares the launch of that other kernel.
        sizes, chip, interpret: as for ``attend_tpu``.

    Raises:
        NotImplementedError: a case, or a device, that the kernels do not take.
    """
    pool, _, kv_scales = call.kv
    num_kv_heads = k.shape[1]
    if kv_scales is None and is_quantized(pool.dtype):
        raise NotImplementedError(f"a pool of {pool.dtype} without scales: give those that write_kv_quantized keeps")
    layout = layout_of_pool(call.head_dim, pool, num_kv_heads)
    launch = _launch(call, num_kv_heads, sizes, chip, interpret)
    if not call.has_work:
        return Attended(jnp.zeros_like(call.q), pool, kv_scales)
    k, v = (to_lanes(x, layout) for x in (k, v))
    call = _with_traced_layer(call)
    if kv_scales is not None:
        slots = slots_of_rows(call, least_tokens=1)
        pool, kv_scales = write_kv_quantized_tpu(pool, kv_scales, call.kv.layer, k, v, slots, interpret=interpret)
        call = replace(call, kv=call.kv._replace(pool=pool, kv_scales=kv_scales))
        out, _ = attend_batch(call, None, layout=layout, **launch)
        return Attended(out, pool, kv_scales)
    k, v = (x.astype(pool.dtype) for x in (k, v))
    if not is_decode:
        slots = slots_of_rows(call, least_tokens=2)
        pool = write_kv_tpu(pool, call.kv.layer, k, v, slots, interpret=interpret)
        call = replace(call, kv=call.kv._replace(pool=pool))
    new = jnp.stack([k, v], axis=1)[:, :, :, None]
    out, written = attend_batch(call, new, layout=layout, **launch)
    assert written is not None
    return Attended(out, written, None)
