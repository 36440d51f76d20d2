"""Ragged batches over a pool of NaN, and dense attention in float64, against which all implementations are tested."""

import math
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import block_pool_shape, kv_scales_shape, paged_attention
from pallas_kernels.paged_attention import call as calls
from pallas_kernels.paged_attention.call import Call, Heads, KvLayer, Scoring

LAYER, NUM_LAYERS = 1, 2
TOLERANCE = {jnp.float32: 1e-5, jnp.bfloat16: 2e-2, jnp.float16: 3e-3}


@dataclass(frozen=True)
class Shape:
    """The padded sizes of a batch, and the sizes of a model; each shape takes one compilation."""

    num_tokens: int
    num_seqs: int
    max_blocks: int
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 16
    block_size: int = 8
    dtype: type = jnp.float32
    quantized: type | None = None

    @property
    def num_blocks(self) -> int:
        return self.num_seqs * self.max_blocks + 2


@dataclass(frozen=True)
class Options:
    sm_scale: float | None = None
    sliding_window: int | None = None
    soft_cap: float | None = None
    alibi_slopes: np.ndarray | None = None
    sinks: np.ndarray | None = None

    def as_arguments(self) -> dict:
        arrays = {name: getattr(self, name) for name in ("alibi_slopes", "sinks")}
        scalars = {name: getattr(self, name) for name in ("sm_scale", "sliding_window", "soft_cap")}
        return scalars | {name: None if x is None else jnp.asarray(x, jnp.float32) for name, x in arrays.items()}

    def scoring(self, head_dim: int) -> Scoring:
        """The static options, with the scale that ``paged_attention`` fills in."""
        scale = head_dim**-0.5 if self.sm_scale is None else self.sm_scale
        return Scoring(scale, self.sliding_window, self.soft_cap)

    def heads(self) -> Heads:
        arguments = self.as_arguments()
        return Heads(arguments["alibi_slopes"], arguments["sinks"])


NO_OPTIONS = Options()


@dataclass(frozen=True)
class Batch:
    """Ragged rows: their queries, and the dense K and V of each, [kv_len, num_kv_heads, head_dim].

    A quantised pool has scales, and K and V are what it holds exactly. ``shared_lens`` is as for ``paged_attention``.
    """

    shape: Shape
    q_lens: list[int]
    q: np.ndarray
    keys: list[np.ndarray]
    values: list[np.ndarray]
    tables: np.ndarray
    scales: np.ndarray
    shared_lens: np.ndarray | None = None

    @property
    def q_starts(self) -> np.ndarray:
        return np.concatenate([[0], np.cumsum(self.q_lens)]).astype(np.int32)

    @property
    def kv_lens(self) -> np.ndarray:
        return np.array([len(keys) for keys in self.keys], np.int32)

    def pool(self, window: int | None = None) -> tuple[np.ndarray, np.ndarray | None]:
        """K and V of the slots that some query sees, and their scales if quantised; NaN in all others."""
        shape = self.shape
        full = np.full(
            block_pool_shape(shape.num_blocks, NUM_LAYERS, shape.num_kv_heads, shape.block_size, shape.head_dim), np.nan
        )
        scales = np.full(self.scales.shape, np.nan, np.float32)
        for row, (keys, values) in enumerate(zip(self.keys, self.values, strict=True)):
            if self.q_lens[row] == 0:
                continue
            first = 0 if window is None else max(0, len(keys) - self.q_lens[row] - window + 1)
            position = np.arange(first, len(keys))
            block, offset = self.tables[row][position // shape.block_size], position % shape.block_size
            full[block, LAYER, 0, :, offset] = keys[position]
            full[block, LAYER, 1, :, offset] = values[position]
            scales[block, LAYER] = self.scales[block, LAYER]
        if shape.quantized is None:
            return full.astype(shape.dtype), None
        stored = full / scales[..., None, None]
        if shape.quantized == jnp.int8:
            stored = np.nan_to_num(np.round(stored), nan=-128)  # int8 has no NaN: the lowest number stands for it
        return stored.astype(shape.quantized), scales

    def rows(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Block tables, kv_lens and cu_q_lens."""
        return jnp.asarray(self.tables), jnp.asarray(self.kv_lens), jnp.asarray(self.q_starts)

    def call(self, options: Options = NO_OPTIONS, pool: np.ndarray | None = None) -> Call:
        """The call of an implementation, over another pool if one is given."""
        own, scales = self.pool(options.sliding_window)
        kv = KvLayer(jnp.asarray(own if pool is None else pool), LAYER, None if scales is None else jnp.asarray(scales))
        return Call(
            q=jnp.asarray(self.q),
            kv=kv,
            batch=calls.Batch(*self.rows()),
            scoring=options.scoring(self.shape.head_dim),
            heads=options.heads(),
            shared_lens=None if self.shared_lens is None else jnp.asarray(self.shared_lens),
        )

    def attend(self, implementation: str, options: Options = NO_OPTIONS) -> np.ndarray:
        run = paged_attention if implementation == "reference" else jitted_attention
        pool, scales = self.pool(options.sliding_window)
        out = run(
            jnp.asarray(self.q),
            jnp.asarray(pool),
            LAYER,
            *self.rows(),
            kv_scales=None if scales is None else jnp.asarray(scales),
            shared_lens=None if self.shared_lens is None else jnp.asarray(self.shared_lens),
            implementation=implementation,
            **options.as_arguments(),
        )
        assert out.dtype == self.shape.dtype
        return np.asarray(out).astype(np.float64)


jitted_attention = jax.jit(
    paged_attention, static_argnames=("layer", "sm_scale", "sliding_window", "soft_cap", "implementation")
)


def make_batch(shape: Shape, q_lens: list[int], kv_lens: list[int], seed: int = 0) -> Batch:
    """Random numbers, and blocks in random order. Rows are padded to the shape; unused table entries are nonsense."""
    rng = np.random.default_rng(seed)
    padding = [0] * (shape.num_seqs - len(q_lens))
    q_lens, kv_lens = q_lens + padding, kv_lens + padding

    def normal(*axes: int) -> np.ndarray:
        return rng.standard_normal(axes, np.float32).astype(shape.dtype)

    blocks = list(rng.permutation(np.arange(1, shape.num_seqs * shape.max_blocks + 1)))
    tables = np.full((shape.num_seqs, shape.max_blocks), 2**30, np.int32)
    for row, kv_len in enumerate(kv_lens):
        for logical in range(math.ceil(kv_len / shape.block_size)):
            tables[row, logical] = blocks.pop()
    scales = rng.uniform(0.01, 0.05, kv_scales_shape(shape.num_blocks, NUM_LAYERS, shape.num_kv_heads))
    scales = scales.astype(np.float32)

    def context(row: int, which: int) -> np.ndarray:
        kv_len = kv_lens[row]
        numbers = normal(kv_len, shape.num_kv_heads, shape.head_dim)
        if shape.quantized is None:
            return numbers
        stored = np.round(numbers.astype(np.float32) * 30).astype(shape.quantized).astype(np.float32)
        blocks = tables[row][np.arange(kv_len) // shape.block_size]
        return stored * scales[blocks, LAYER, which, :, None]

    q = normal(shape.num_tokens, shape.num_heads, shape.head_dim)
    keys, values = ([context(row, which) for row in range(shape.num_seqs)] for which in range(2))
    return Batch(shape, q_lens, q, keys, values, tables, scales)


def share_front(batch: Batch, rows: list[int], num_blocks: int, *, is_read_once: bool = False) -> Batch:
    """The batch with the first blocks of ``rows[0]`` at the front of all these rows, as shared tokens.

    Args:
        is_read_once: whether the tables of the other rows name a wrong block there, which nothing may read.
    """
    num_tokens, shared_lens = num_blocks * batch.shape.block_size, np.zeros_like(batch.kv_lens)
    shared_lens[rows] = num_tokens
    wrong = batch.shape.num_blocks - 1
    for row in rows[1:]:
        batch.tables[row, :num_blocks] = wrong if is_read_once else batch.tables[rows[0], :num_blocks]
        batch.keys[row][:num_tokens] = batch.keys[rows[0]][:num_tokens]
        batch.values[row][:num_tokens] = batch.values[rows[0]][:num_tokens]
    return replace(batch, shared_lens=shared_lens)


def round_scales(batch: Batch) -> None:
    """Round the scales of a quantised batch down to powers of two, which ``write_kv_quantized`` makes."""
    factors = np.exp2(np.floor(np.log2(batch.scales))) / batch.scales
    batch.scales[:] *= factors
    for which, rows in enumerate((batch.keys, batch.values)):
        for numbers, table in zip(rows, batch.tables, strict=True):
            blocks = table[np.arange(len(numbers)) // batch.shape.block_size]
            numbers[:] *= factors[blocks, LAYER, which, :, None]


def dense_attention(batch: Batch, options: Options = NO_OPTIONS) -> np.ndarray:
    """Dense attention by the textbook, all heads at once, in float64."""
    shape = batch.shape
    group = shape.num_heads // shape.num_kv_heads
    scale = shape.head_dim**-0.5 if options.sm_scale is None else options.sm_scale
    out = np.zeros(batch.q.shape)
    for row, (start, end) in enumerate(zip(batch.q_starts[:-1], batch.q_starts[1:], strict=True)):
        if start == end:
            continue
        kv_len = len(batch.keys[row])
        q = batch.q[start:end].astype(np.float64)
        k, v = (np.repeat(x[row].astype(np.float64), group, axis=1) for x in (batch.keys, batch.values))
        scores = np.einsum("qhd,khd->hqk", q, k) * scale
        if options.soft_cap is not None:
            scores = np.tanh(scores / options.soft_cap) * options.soft_cap
        behind = np.arange(kv_len - len(q), kv_len)[:, None] - np.arange(kv_len)
        if options.alibi_slopes is not None:
            scores -= options.alibi_slopes[:, None, None] * behind
        scores[:, behind < 0] = -np.inf
        if options.sliding_window is not None:
            scores[:, behind >= options.sliding_window] = -np.inf
        if options.sinks is not None:
            sink = np.broadcast_to(options.sinks[:, None, None], (*scores.shape[:2], 1))
            scores = np.concatenate([scores, sink], axis=-1)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        out[start:end] = np.einsum("hqk,khd->qhd", weights[..., :kv_len], v)
    return out


def abstract_call(
    shape: Shape, *, num_layers: int = 32, num_blocks: int = 4096, scoring: Scoring, has_heads: bool = True
) -> Call:
    """A call of shapes and types alone, as real models make it, to be traced."""
    shaped, ints = jax.ShapeDtypeStruct, jnp.int32
    pool_shape = block_pool_shape(num_blocks, num_layers, shape.num_kv_heads, shape.block_size, shape.head_dim)
    scales = shaped(kv_scales_shape(num_blocks, num_layers, shape.num_kv_heads), jnp.float32)
    per_head = shaped((shape.num_heads,), jnp.float32) if has_heads else None
    return Call(
        q=shaped((shape.num_tokens, shape.num_heads, shape.head_dim), shape.dtype),
        kv=KvLayer(shaped(pool_shape, shape.quantized or shape.dtype), LAYER, scales if shape.quantized else None),
        batch=calls.Batch(
            shaped((shape.num_seqs, shape.max_blocks), ints),
            shaped((shape.num_seqs,), ints),
            shaped((shape.num_seqs + 1,), ints),
        ),
        scoring=scoring,
        heads=Heads(per_head, per_head),
    )
