"""paged_attention: checks its arguments and picks the implementation."""

import logging
import math
from functools import cache

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from pallas_kernels import dispatch
from pallas_kernels.block_pool.layout import (
    BlockPool,
    KvScales,
    check_kv_scales,
    check_static_layer,
    is_quantized,
    shape_of,
)
from pallas_kernels.chips import here
from pallas_kernels.dispatch import INTERPRETERS, Choice, Kernel, best_implementation, why_cannot_run
from pallas_kernels.paged_attention.call import Attended, Batch, Call, Heads, KvLayer, Scoring, can_read_once
from pallas_kernels.paged_attention.hopper import attend_hopper
from pallas_kernels.paged_attention.hopper import why_not as why_not_hopper
from pallas_kernels.paged_attention.reference import attend_reference
from pallas_kernels.paged_attention.tpu import attend_tpu, lane_layout, why_not_tpu, write_and_attend_tpu
from pallas_kernels.paged_attention.xla import attend_xla

log = logging.getLogger(__name__)

__all__ = [
    "IMPLEMENTATIONS",
    "INTERPRETERS",
    "Attended",
    "Choice",
    "best_implementation",
    "can_read_once",
    "kernels_here",
    "paged_attention",
    "pool_rows",
    "why_cannot_run",
    "why_not_here",
    "write_and_attend",
]

IMPLEMENTATIONS = {
    kernel.name: kernel
    for kernel in (
        Kernel("reference", attend_reference),
        Kernel("xla", attend_xla),
        Kernel("hopper", attend_hopper, why_not_hopper),
        Kernel("pallas_tpu", attend_tpu, why_not_tpu),
    )
}
"""Every implementation by name; each takes a ``Call``."""

WRITES_AND_ATTENDS = Kernel("pallas_tpu", write_and_attend_tpu, why_not_tpu)

DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


def why_not_here(
    q_shape: tuple[int, ...], q_dtype: jnp.dtype, pool_shape: tuple[int, ...], pool_dtype: jnp.dtype
) -> str | None:
    """The reason why the kernels for this device cannot take a case; None if they can."""
    return IMPLEMENTATIONS[kernels_here()].why_not(q_shape, q_dtype, pool_shape, pool_dtype)


def pool_rows(num_kv_heads: int, head_dim: int, implementation: str, num_devices: int = 1) -> tuple[int, int]:
    """KV heads and head_dim of the pool that an implementation needs for a model, as ``block_pool_shape`` takes them.

    They are the model's own, except that on TPUs narrow heads of one device lie side by side (``lane_layout``).
    """
    if implementation == "pallas_tpu" and num_kv_heads % num_devices == 0:
        layout = lane_layout(num_kv_heads // num_devices, head_dim)
        return layout.num_kv_heads * num_devices, layout.head_dim
    return num_kv_heads, head_dim


def kernels_here() -> str:
    """The implementation made for this device, or for the device compiled for, whether or not it can run there."""
    return here.own_kernels()


@cache
def _log_fallback(reason: str) -> None:
    log.warning("paged attention runs in plain XLA, which is slower: %s", reason)


def paged_attention(
    q: Float[Array, "tokens num_heads head_dim"],
    pool: BlockPool,
    layer: int,
    block_tables: Int[Array, "num_seqs max_blocks"],
    kv_lens: Int[Array, " num_seqs"],
    cu_q_lens: Int[Array, " num_seqs_plus_1"],
    *,
    sm_scale: float | None = None,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    alibi_slopes: Float[Array, " num_heads"] | None = None,
    sinks: Float[Array, " num_heads"] | None = None,
    kv_scales: KvScales | None = None,
    into: Float[Array, "tokens num_heads head_dim"] | None = None,
    shared_lens: Int[Array, " num_seqs"] | None = None,
    implementation: str | None = None,
    interpret: bool = False,
) -> Float[Array, "tokens num_heads head_dim"]:
    """Causal attention of a ragged batch over K and V in blocks: any mix of prompts, pieces of prompts and decodes.

    Query head h reads KV head ``h // (num_heads // num_kv_heads)``. The K and V of the queries' own tokens are in the
    pool already (``write_kv`` first).

    Args:
        q: queries of all rows, one row after the other, in float32, bfloat16 or float16. Tokens past the last row are
            padding, and come back as zeros.
        pool: the block pool, read only, of the same type as ``q`` or quantised.
        layer: which layer of the pool, a static number.
        block_tables: physical block of each logical block of each row. Entries past a row's length are never used.
        kv_lens: tokens of each row's sequence in the pool, including the tokens of this call; 0 for padding rows.
        cu_q_lens: row i owns ``q[cu_q_lens[i]:cu_q_lens[i + 1]]``, whose last token sits at ``kv_lens[i] - 1``.
        sm_scale: factor on the scores; ``1 / sqrt(head_dim)`` if None.
        sliding_window: a token at position p sees positions ``p - sliding_window + 1`` to p; all up to p if None.
        soft_cap: scores become ``soft_cap * tanh(score / soft_cap)``.
        alibi_slopes: adds ``slope * (kv_position - q_position)`` to each head's scores, after the cap.
        sinks: one logit for each head, which takes its share of the softmax and gives no value.
        kv_scales: the scales of a quantised pool (``write_kv_quantized``), read only; None for any other pool.
        into: the result of an earlier call over the same rows, which no later operation reads. Its memory may take
            this call's result, and its padding is zeros already.
        shared_lens: tokens of each row in a prefix that decodes may read once for all rows (Hydragen,
            arXiv:2402.05099). The number is the same for all rows whose tables begin with the same blocks of so many
            tokens, and 0 for the others. A row has tokens after its prefix. Results differ by rounding alone. Prompts,
            windows, slopes, quantised pools and TPUs read each row by itself.
        implementation: a key of ``IMPLEMENTATIONS``; None takes ``best_implementation()``. Over several devices,
            "hopper" and "pallas_tpu" need ``jax.shard_map``.
        interpret: run the kernels of the implementation named in Pallas's interpreter, on any device.

    Returns:
        One output for each query, in q's type; sums are float32 throughout.

    Raises:
        ValueError: shapes, types or options that do not fit together, or an unknown implementation.
        NotImplementedError: the implementation named cannot do this case.
    """
    dispatch.check_named(IMPLEMENTATIONS, implementation, interpret=interpret)
    call = _checked_call(
        q,
        KvLayer(pool, layer, kv_scales),
        Batch(block_tables, kv_lens, cu_q_lens),
        Heads(alibi_slopes, sinks),
        sm_scale=sm_scale,
        sliding_window=sliding_window,
        soft_cap=soft_cap,
        into=into,
        shared_lens=shared_lens,
    )
    _check_heads_of_pool(call)
    return dispatch.run(IMPLEMENTATIONS[implementation or _best(call)], call, interpret=interpret)


def _best(call: Call) -> str:
    choice = best_implementation(why_not_here(*call.case))
    if choice.name == "xla" and why_cannot_run(kernels_here()) is None:
        _log_fallback(choice.reason)
    return choice.name


def write_and_attend(
    q: Float[Array, "tokens num_heads head_dim"],
    k: Float[Array, "tokens num_kv_heads head_dim"],
    v: Float[Array, "tokens num_kv_heads head_dim"],
    pool: BlockPool,
    layer: int,
    block_tables: Int[Array, "num_seqs max_blocks"],
    kv_lens: Int[Array, " num_seqs"],
    cu_q_lens: Int[Array, " num_seqs_plus_1"],
    *,
    sm_scale: float | None = None,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    alibi_slopes: Float[Array, " num_heads"] | None = None,
    sinks: Float[Array, " num_heads"] | None = None,
    kv_scales: KvScales | None = None,
    is_decode: bool = False,
    interpret: bool = False,
) -> Attended:
    """Write this step's K and V and attend over the pool, by the TPU kernels.

    A decode step takes one kernel for both. Each token's slot follows from its position and its row's block table.
    Block 0 stays as it is. Over several devices it needs ``jax.shard_map(..., check_vma=False)``, with KV heads
    sharded.

    Args:
        q, block_tables, kv_lens, cu_q_lens, sm_scale, sliding_window, soft_cap, alibi_slopes, sinks: as for
            ``paged_attention``.
        k, v: K and V of this step's tokens, in any float type and the model's own heads and head_dim.
        pool: the pool, with the KV heads and head_dim of ``pool_rows(..., "pallas_tpu")``; donate it.
        layer: which layer, a static number.
        kv_scales: the scales of a quantised pool; donate them too. None for any other pool.
        is_decode: whether no row has more than one query, which spares the launch of a second kernel.
        interpret: run the kernels in Pallas's interpreter, on any device.

    Returns:
        The outputs, as for ``paged_attention``, the pool, and its scales.

    Raises:
        ValueError: shapes, types or options that do not fit together.
        NotImplementedError: a case, or a device, that the kernels do not take.
    """
    call = _checked_call(
        q,
        KvLayer(pool, layer, kv_scales),
        Batch(block_tables, kv_lens, cu_q_lens),
        Heads(alibi_slopes, sinks),
        sm_scale=sm_scale,
        sliding_window=sliding_window,
        soft_cap=soft_cap,
    )
    if k.shape != v.shape or k.shape[0] != q.shape[0] or k.shape[2] != q.shape[2] or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"q has shape {q.shape}, k {k.shape} and v {v.shape}: expected the same tokens and head_dim, and heads of "
            "q that are a multiple of the KV heads"
        )
    return dispatch.run(WRITES_AND_ATTENDS, call, k, v, is_decode=is_decode, interpret=interpret)


def _checked_call(
    q: Array,
    kv: KvLayer,
    batch: Batch,
    heads: Heads,
    *,
    sm_scale: float | None,
    sliding_window: int | None,
    soft_cap: float | None,
    into: Array | None = None,
    shared_lens: Array | None = None,
) -> Call:
    """The call that these arguments make, all but the heads of its queries and its pool checked."""
    _check_rows(q, *batch)
    check_static_layer(kv.pool, kv.layer)
    _check_types(q, kv.pool, kv.kv_scales)
    if into is not None and (into.shape, into.dtype) != (q.shape, q.dtype):
        raise ValueError(f"into is {into.dtype}{list(into.shape)}: expected what q is, {q.dtype}{list(q.shape)}")
    if shared_lens is not None and (shared_lens.shape, shared_lens.dtype) != (batch.kv_lens.shape, jnp.int32):
        raise ValueError(
            f"shared_lens is {shared_lens.dtype}{list(shared_lens.shape)}: expected int32{list(batch.kv_lens.shape)}, "
            "a number of tokens for each row"
        )
    for name, array in heads._asdict().items():
        if array is not None and array.shape != (q.shape[1],):
            raise ValueError(f"{name} has shape {array.shape}: expected ({q.shape[1]},), one for each query head")
    scoring = _scoring(q, sm_scale, sliding_window, soft_cap)
    return Call(q=q, kv=kv, batch=batch, scoring=scoring, heads=heads, into=into, shared_lens=shared_lens)


def _check_heads_of_pool(call: Call) -> None:
    num_heads, head_dim = call.num_heads, call.head_dim
    shape = shape_of(call.kv.pool)
    num_kv_heads = shape.num_kv_heads
    if num_kv_heads == 0 or num_heads == 0 or num_heads % num_kv_heads:
        raise ValueError(
            f"q has {num_heads} heads and the pool {num_kv_heads} KV heads: expected a multiple of the KV heads"
        )
    if head_dim != shape.head_dim:
        raise ValueError(f"q has head_dim {head_dim} and the pool {shape.head_dim}: expected the same; pad the smaller")


def _check_rows(q: Array, block_tables: Array, kv_lens: Array, cu_q_lens: Array) -> None:
    for name, array, axes in (
        ("q", q, "[tokens, num_heads, head_dim]"),
        ("block_tables", block_tables, "[num_seqs, max_blocks]"),
        ("kv_lens", kv_lens, "[num_seqs]"),
        ("cu_q_lens", cu_q_lens, "[num_seqs + 1]"),
    ):
        rank = axes.count(",") + 1
        if array.ndim != rank:
            raise ValueError(f"{name} has shape {array.shape}: expected {rank} axes, {axes}")
    for name, array in (("block_tables", block_tables), ("kv_lens", kv_lens), ("cu_q_lens", cu_q_lens)):
        if array.dtype != jnp.int32:
            raise ValueError(f"{name} is {array.dtype}: expected int32; cast it")
    num_seqs = block_tables.shape[0]
    if kv_lens.shape[0] != num_seqs or cu_q_lens.shape[0] != num_seqs + 1:
        raise ValueError(
            f"block_tables has {num_seqs} rows, kv_lens {kv_lens.shape[0]} and cu_q_lens {cu_q_lens.shape[0]} entries: "
            f"expected {num_seqs} and {num_seqs + 1}, since cu_q_lens begins with 0"
        )


def _check_types(q: Array, pool: Array, kv_scales: Array | None) -> None:
    if q.dtype not in DTYPES or not (q.dtype == pool.dtype or is_quantized(pool.dtype)):
        raise ValueError(
            f"q is {q.dtype} and the pool {pool.dtype}: expected one type for both, float32, bfloat16 or float16, or "
            "one of these with a pool of float8_e4m3fn or int8; cast q"
        )
    check_kv_scales(pool, kv_scales)


def _scoring(q: Array, sm_scale: float | None, sliding_window: int | None, soft_cap: float | None) -> Scoring:
    if sm_scale is not None and not (math.isfinite(sm_scale) and sm_scale > 0):
        raise ValueError(f"sm_scale={sm_scale}: expected a finite number above 0, or None for 1 / sqrt(head_dim)")
    if sliding_window is not None and sliding_window < 1:
        raise ValueError(
            f"sliding_window={sliding_window}: expected 1 (a token sees itself only) or more; None turns it off"
        )
    if soft_cap is not None and not (math.isfinite(soft_cap) and soft_cap > 0):
        raise ValueError(f"soft_cap={soft_cap}: expected a finite number above 0; None turns it off")
    return Scoring(1 / math.sqrt(q.shape[2]) if sm_scale is None else float(sm_scale), sliding_window, soft_cap)
