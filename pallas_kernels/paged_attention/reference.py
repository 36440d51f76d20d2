"""Paged attention as one would explain it: a loop over sequences, then heads, in float32. The oracle of all others."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float

from pallas_kernels.block_pool.layout import shape_of
from pallas_kernels.block_pool.xla import read_kv, read_kv_scales
from pallas_kernels.paged_attention.call import Call, KvLayer


def attend_reference(call: Call) -> Float[Array, "tokens num_heads head_dim"]:
    """Attention of every query over its sequence's blocks, on the host, outside jit, in no hurry.

    Raises:
        NotImplementedError: an argument is being traced.
    """
    if any(isinstance(x, Tracer) for x in jax.tree.leaves(call)):
        raise NotImplementedError(
            "the reference loops over lengths that it must know: call it outside jit, or use 'xla'"
        )
    tables, kv_ends, q_starts = (np.asarray(x) for x in call.batch)
    queries = np.asarray(call.q).astype(np.float32)
    slopes, sinks = (None if x is None else np.asarray(x).astype(np.float32) for x in call.heads)
    scoring = call.scoring
    out = np.zeros(queries.shape, np.float32)

    for row, kv_len in enumerate(kv_ends):
        tokens = slice(q_starts[row], q_starts[row + 1])
        q_len = tokens.stop - tokens.start
        if q_len == 0:
            continue
        q_pos = np.arange(kv_len - q_len, kv_len)[:, None]  # [q_len, 1]
        kv_pos = np.arange(kv_len)[None, :]  # [1, kv_len]
        visible = kv_pos <= q_pos
        if scoring.sliding_window is not None:
            visible &= kv_pos > q_pos - scoring.sliding_window
        keys, values = _context(call.kv, tables[row], kv_len)
        seen = visible.any(axis=0)[:, None]  # slots behind the window may hold anything, even NaN
        keys, values = np.where(seen, keys, 0), np.where(seen, values, 0)

        for head in range(call.num_heads):
            kv_head = head // (call.num_heads // len(keys))
            scores = queries[tokens, head] @ keys[kv_head].T * scoring.sm_scale
            if scoring.soft_cap is not None:
                scores = scoring.soft_cap * np.tanh(scores / scoring.soft_cap)
            if slopes is not None:
                scores = scores + slopes[head] * (kv_pos - q_pos)
            scores = np.where(visible, scores, -np.inf)
            top = scores.max(axis=1, keepdims=True)
            if sinks is not None:
                top = np.maximum(top, sinks[head])
            weights = np.exp(scores - top)
            total = weights.sum(axis=1, keepdims=True)
            if sinks is not None:
                total = total + np.exp(sinks[head] - top)
            out[tokens, head] = weights @ values[kv_head] / total

    return jnp.asarray(out).astype(call.q.dtype)


def _context(kv: KvLayer, table: np.ndarray, kv_len: int) -> tuple[np.ndarray, np.ndarray]:
    """The first ``kv_len`` keys and values of a sequence, each [num_kv_heads, kv_len, head_dim] float32."""
    blocks = jnp.asarray(table[None])
    keys, values = (np.asarray(x[0, :, :kv_len], np.float32) for x in read_kv(kv.pool, kv.layer, blocks))
    if kv.kv_scales is None:
        return keys, values
    scales = read_kv_scales(kv.kv_scales, kv.layer, blocks, shape_of(kv.pool).block_size)
    k_scales, v_scales = (np.asarray(x[0, :, :kv_len, None]) for x in scales)
    return keys * k_scales, values * v_scales
