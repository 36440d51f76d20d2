"""Paged attention as one would explain it: a loop over sequences, then heads, in float32. The oracle of all others."""

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jaxtyping import Float, Int

from pallas_kernels.block_pool.layout import BlockPool, KvScales, shape_of
from pallas_kernels.block_pool.xla import read_kv, read_kv_scales


def attend_reference(
    q: Float[Array, "tokens num_heads head_dim"],
    pool: BlockPool,
    layer: int,
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
) -> Float[Array, "tokens num_heads head_dim"]:
    """Attention of every query over its sequence's blocks; arguments and result as for ``paged_attention``.

    It runs on the host, outside jit, for any size that a test has patience for.

    Raises:
        NotImplementedError: an argument is being traced.
    """
    del into  # numpy allocates
    if any(isinstance(x, Tracer) for x in (q, pool, block_tables, kv_lens, cu_q_lens, alibi_slopes, sinks, kv_scales)):
        raise NotImplementedError(
            "the reference loops over lengths that it must know: call it outside jit, or use 'xla'"
        )
    tables, kv_ends, q_starts = (np.asarray(x) for x in (block_tables, kv_lens, cu_q_lens))
    queries = np.asarray(q).astype(np.float32)
    slopes = None if alibi_slopes is None else np.asarray(alibi_slopes).astype(np.float32)
    sink_logits = None if sinks is None else np.asarray(sinks).astype(np.float32)
    out = np.zeros(queries.shape, np.float32)

    for row, kv_len in enumerate(kv_ends):
        tokens = slice(q_starts[row], q_starts[row + 1])
        q_len = tokens.stop - tokens.start
        if q_len == 0:
            continue
        q_pos = np.arange(kv_len - q_len, kv_len)[:, None]  # [q_len, 1]
        kv_pos = np.arange(kv_len)[None, :]  # [1, kv_len]
        visible = kv_pos <= q_pos
        if sliding_window is not None:
            visible &= kv_pos > q_pos - sliding_window
        keys, values = _context(pool, kv_scales, layer, tables[row], kv_len)
        seen = visible.any(axis=0)[:, None]  # what lies behind the window may be anything, NaN too
        keys, values = np.where(seen, keys, 0), np.where(seen, values, 0)

        for head in range(queries.shape[1]):
            kv_head = head // (queries.shape[1] // keys.shape[0])
            scores = queries[tokens, head] @ keys[kv_head].T * sm_scale
            if soft_cap is not None:
                scores = soft_cap * np.tanh(scores / soft_cap)
            if slopes is not None:
                scores = scores + slopes[head] * (kv_pos - q_pos)
            scores = np.where(visible, scores, -np.inf)
            top = scores.max(axis=1, keepdims=True)
            if sink_logits is not None:
                top = np.maximum(top, sink_logits[head])
            weights = np.exp(scores - top)
            total = weights.sum(axis=1, keepdims=True)
            if sink_logits is not None:
                total = total + np.exp(sink_logits[head] - top)
            out[tokens, head] = weights @ values[kv_head] / total

    return jnp.asarray(out).astype(q.dtype)


def _context(
    pool: BlockPool, kv_scales: KvScales | None, layer: int, table: np.ndarray, kv_len: int
) -> tuple[np.ndarray, np.ndarray]:
    """The first ``kv_len`` keys and values of a sequence, each [num_kv_heads, kv_len, head_dim] float32."""
    blocks = jnp.asarray(table[None])
    keys, values = (np.asarray(x[0, :, :kv_len], np.float32) for x in read_kv(pool, layer, blocks))
    if kv_scales is None:
        return keys, values
    scales = read_kv_scales(kv_scales, layer, blocks, shape_of(pool).block_size)
    k_scales, v_scales = (np.asarray(x[0, :, :kv_len, None]) for x in scales)
    return keys * k_scales, values * v_scales
