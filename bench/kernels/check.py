"""Attention on the device, against float64: real sizes, and all cases that kernels may take."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from bench.kernels.case import Case, Programs, Verdict
from bench.kernels.compiling import Source
from bench.kernels.inputs import (
    HostArrays,
    Inputs,
    attend,
    head_options,
    make_host_arrays,
    make_pool,
    make_queries,
    with_pool,
)
from bench.kernels.shapes import NOWHERE, AttentionShape

LAYER, NUM_LAYERS = 1, 2

TOLERANCE = {"bfloat16": 1e-2, "float16": 2e-3, "float32": 1e-5}
"""Largest ||out - right|| / ||right|| of any query and head, by the queries' type. Outputs round to 8 bits of bfloat16,
an error of 1.1e-3 on average, as weights do before their product with V."""

NUM_ROWS, NUM_KV_HEADS, NUM_QUERIES = 10, 2, 6
"""Samples of each batch: the extremes, and others at random."""


def coverage() -> list[AttentionShape]:
    """Cases of every head size, block size, group, type and option, each with decodes, chunks and padding."""
    variants: list[dict[str, Any]] = [
        *({"head_dim": head_dim} for head_dim in (64, 80, 96, 128, 192, 256)),
        *({"block_size": block_size} for block_size in (8, 32, 64, 128)),
        *({"num_heads": heads, "num_kv_heads": kv} for heads, kv in ((8, 8), (16, 8), (64, 8), (32, 1))),
        {"num_heads": 71, "num_kv_heads": 1, "head_dim": 64},
        {"dtype": "float16", "kv_dtype": "float16"},
        *({"kv_dtype": kv_dtype, "block_size": size} for kv_dtype in ("float8_e4m3fn", "int8") for size in (16, 64)),
        *({"kv_dtype": "int8", "head_dim": head_dim} for head_dim in (96, 192, 256)),
        {"dtype": "float16", "kv_dtype": "int8"},
        {"sliding_window": 1},
        {"sliding_window": 200},
        {"soft_cap": 2.0},
        {"has_alibi": True},
        {"has_sinks": True},
        {"sliding_window": 130, "soft_cap": 20.0, "has_alibi": True, "has_sinks": True},
        {"sliding_window": 130, "has_sinks": True, "kv_dtype": "float8_e4m3fn", "head_dim": 64},
    ]
    return [_covering(_name("mixed", variant), MIXED_ROWS, 13, variant) for variant in variants] + [
        _covering(_name("decodes", variant), DECODE_ROWS, 0, variant)
        for variant in (
            {},
            {"sliding_window": 200},
            {"num_heads": 71, "num_kv_heads": 1, "head_dim": 64, "has_alibi": True},
        )
    ]


MIXED_ROWS = (
    (1, 1), (1, 16), (70, 70), (0, 0), (1, 17), (128, 1500), (1, 4095), (2, 2), (1, 129), (65, 128), (300, 333), (0, 0),
)  # fmt: skip
DECODE_ROWS = ((1, 1), (1, 15), (1, 16), (1, 8191), (0, 0), (1, 128), (1, 129), (1, 1000), (0, 0))
"""Rows of the batches that cover options: query length and context length."""


def _covering(
    name: str, rows: tuple[tuple[int, int], ...], padding_tokens: int, variant: dict[str, Any]
) -> AttentionShape:
    q_lens, kv_lens = zip(*rows, strict=True)
    return AttentionShape(name, q_lens, kv_lens, padding_tokens=padding_tokens, **variant)


def _name(rows: str, variant: dict[str, Any]) -> str:
    return "_".join([rows, *(key if value is True else f"{key}={value}" for key, value in variant.items())])


def case_of(shape: AttentionShape, implementations: Iterable[str]) -> Case:
    """The case of a batch, for some implementations."""
    host, samples = make_host_arrays(shape, NUM_LAYERS, (LAYER,)), _samples(shape)
    make = Source(partial(_make, shape), (_abstract(host.deviations),))
    q, pool = jax.eval_shape(make.function, *make.arguments)
    inputs = jax.eval_shape(lambda pool: with_pool(pool, host), pool)
    blocks, heads = _gathered(shape, samples, host)
    judged = q, q, pool, inputs.kv_scales, _abstract(blocks), _abstract(heads)
    return Case(
        {name: Source(partial(_attend, shape, name), (q, inputs)) for name in implementations},
        {"make": make, "judge": Source(partial(_judge, int(shape.cu_q_lens[-1])), judged)},
        partial(_examine, shape, host, samples),
    )


def _abstract(array: np.ndarray) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype)


def _make(shape: AttentionShape, deviations: Array) -> tuple[Array, Array]:
    """Queries, and a pool with poison in all slots that no query may read."""
    return make_queries(shape, seed=7), make_pool(shape, NUM_LAYERS, (LAYER,), deviations)


def _attend(shape: AttentionShape, implementation: str, q: Array, inputs: Inputs) -> Array:
    return attend(q, inputs, LAYER, shape, implementation)


class Judged(NamedTuple):
    """Properties of two runs' outputs, and the context of each sample.

    Args:
        is_repeated: whether the outputs have the same bits.
        is_finite: whether outputs of rows are finite.
        is_padded: whether outputs of padding are zero.
        kv: blocks of each sample's KV head, [samples, max_blocks, 2, block_size, head_dim].
        kv_scales: their scales, [samples, max_blocks, 2]; None without any.
    """

    is_repeated: Array
    is_finite: Array
    is_padded: Array
    kv: Array
    kv_scales: Array | None


def _judge(
    num_owned: int, out: Array, again: Array, pool: Array, kv_scales: Array | None, blocks: Array, heads: Array
) -> Judged:
    """Judge the outputs, of which so many are of rows."""

    def gather(x: Array) -> Array:
        return x[blocks, LAYER, :, heads[:, None]]

    return Judged(
        jnp.array_equal(_bits(out), _bits(again)),
        jnp.isfinite(out[:num_owned]).all(),
        (out[num_owned:] == 0).all(),
        gather(pool),
        None if kv_scales is None else gather(kv_scales),
    )


def _bits(x: Array) -> Array:
    return lax.bitcast_convert_type(x, {2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize])


def _examine(
    shape: AttentionShape,
    host: HostArrays,
    samples: list[tuple[int, int]],
    program: Callable[..., Array],
    tools: Programs,
) -> Verdict:
    """Run a program twice. Check bits, poison and padding everywhere, and samples against float64."""
    q, pool = tools["make"](host.deviations)
    inputs = with_pool(pool, host)
    out, again = program(q, inputs), program(q, inputs)
    if out.dtype != q.dtype or out.shape != q.shape:
        return Verdict(np.inf, f"outputs are {out.dtype} {out.shape} for queries {q.dtype} {q.shape}")
    judged: Judged = tools["judge"](out, again, pool, inputs.kv_scales, *_gathered(shape, samples, host))
    problems = []
    if not judged.is_repeated:
        problems.append("two runs differ")
    if not judged.is_finite:
        problems.append("a slot was read that must not be")
    if not judged.is_padded:
        problems.append("padding is not zero")
    host_q, host_out = np.asarray(q), np.asarray(out)
    kv, scales = np.asarray(judged.kv), None if judged.kv_scales is None else np.asarray(judged.kv_scales)
    errors = [0.0]
    for nth, (row, kv_head) in enumerate(samples):
        k, v = _context(shape, row, kv[nth], None if scales is None else scales[nth])
        errors.append(_error(shape, row, kv_head, host_q, host_out, k, v))
    error = float(np.max(errors))  # not a number, if any is none
    if not error <= TOLERANCE[shape.dtype]:
        problems.append(f"error above {TOLERANCE[shape.dtype]:g}")
    return Verdict(error, "; ".join(problems) or None)


def _gathered(shape: AttentionShape, samples: list[tuple[int, int]], host: HostArrays) -> tuple[np.ndarray, np.ndarray]:
    """Blocks and KV head of each sample: [samples, max_blocks], [samples] int32."""
    rows, heads = np.array(samples, np.int32).reshape(-1, 2).T
    tables = host.block_tables[rows]
    return np.where(tables == NOWHERE, 0, tables), heads


def _samples(shape: AttentionShape) -> list[tuple[int, int]]:
    """Rows and KV heads."""
    rng = np.random.default_rng(0)
    live = [row for row, q_len in enumerate(shape.q_lens) if q_len]
    if not live:
        return []
    extremes = [live[0], live[-1]]
    for lens in (shape.q_lens, shape.kv_lens):
        extremes += [max(live, key=lens.__getitem__), min(live, key=lens.__getitem__)]
    rows = {*extremes, *rng.permutation(live)[:NUM_ROWS].tolist()}
    heads = {0, shape.num_kv_heads - 1, *rng.permutation(shape.num_kv_heads)[:NUM_KV_HEADS].tolist()}
    return [(row, head) for row in sorted(rows) for head in sorted(heads)]


def _error(
    shape: AttentionShape, row: int, kv_head: int, q: np.ndarray, out: np.ndarray, k: np.ndarray, v: np.ndarray
) -> float:
    """The worst relative error of some queries of a row, over the query heads of one KV head.

    Args:
        shape: the case.
        row, kv_head: the sample.
        q, out: all queries and outputs.
        k, v: the context that the row's queries see, [seen, head_dim] each.
    """
    start, q_len, kv_len = int(shape.cu_q_lens[row]), shape.q_lens[row], shape.kv_lens[row]
    offsets = np.array(sorted({0, q_len - 1, *np.random.default_rng(row).integers(0, q_len, NUM_QUERIES).tolist()}))
    heads = slice(kv_head * shape.group, (kv_head + 1) * shape.group)
    sampled_q, sampled_out = (x[start + offsets, heads].astype(np.float64) for x in (q, out))
    right = _dense(shape, sampled_q, k, v, kv_len - q_len + offsets, kv_len, heads)
    return float((np.linalg.norm(sampled_out - right, axis=-1) / np.linalg.norm(right, axis=-1)).max())


def _context(
    shape: AttentionShape, row: int, kv: np.ndarray, scales: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """K and V times their scales at the positions that the row's queries see: [seen, head_dim] each."""
    num_blocks = shape.num_row_blocks[row]
    kv = kv[:num_blocks].astype(np.float64)
    if scales is not None:
        kv = kv * scales[:num_blocks, :, None, None]
    flat = kv.transpose(1, 0, 2, 3).reshape(2, -1, shape.head_dim)  # of [blocks, 2, block_size, head_dim]
    k, v = flat[:, _first_seen(shape, row) : shape.kv_lens[row]]
    return k, v


def _first_seen(shape: AttentionShape, row: int) -> int:
    if shape.sliding_window is None:
        return 0
    return max(shape.kv_lens[row] - shape.q_lens[row] - shape.sliding_window + 1, 0)


def _dense(
    shape: AttentionShape,
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    q_positions: np.ndarray,
    kv_len: int,
    heads: slice,
) -> np.ndarray:
    """Attention by the textbook, in float64: [queries, group, head_dim].

    Args:
        shape: the case, for its options.
        q: queries, [queries, group, head_dim].
        k, v: the context up to ``kv_len``, [seen, head_dim] each.
        q_positions: position of each query.
        kv_len: context length of the row.
        heads: the query heads.
    """
    scores = q @ k.T / np.sqrt(shape.head_dim)
    slopes, sinks = head_options(shape)
    if shape.soft_cap is not None:
        scores = shape.soft_cap * np.tanh(scores / shape.soft_cap)
    distance = (q_positions[:, None] - np.arange(kv_len - len(k), kv_len))[:, None]  # [queries, 1, seen]
    if slopes is not None:
        scores = scores - slopes[heads].astype(np.float64)[:, None] * distance
    is_visible = distance >= 0
    if shape.sliding_window is not None:
        is_visible &= distance < shape.sliding_window
    scores = np.where(is_visible, scores, -np.inf)
    if sinks is not None:
        sink = np.broadcast_to(sinks[heads].astype(np.float64)[:, None], (*scores.shape[:2], 1))
        scores = np.concatenate([scores, sink], axis=-1)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return weights[..., : len(k)] @ v
