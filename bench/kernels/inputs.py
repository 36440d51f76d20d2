"""Arrays for a batch: a pool with poison in unreadable slots, and values that stay in range through many layers."""

from collections.abc import Iterable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float, Int

from bench.kernels.shapes import UNSEEN, AttentionShape, value_deviations
from pallas_kernels import block_pool_shape, paged_attention

STEPS = {"float8_e4m3fn": 64.0, "int8": 32.0}
"""Deviation of the stored values of a quantised pool, which are normal."""


class Inputs(NamedTuple):
    """Arguments of ``paged_attention`` beside the queries."""

    pool: Array
    block_tables: Int[Array, "num_seqs max_blocks"]
    kv_lens: Int[Array, " num_seqs"]
    cu_q_lens: Int[Array, " num_seqs_plus_1"]
    kv_scales: Float[Array, "num_blocks num_layers 2 num_kv_heads"] | None


def make_queries(shape: AttentionShape, seed: int = 0) -> Float[Array, "tokens num_heads head_dim"]:
    """Queries from a normal distribution."""
    key = jax.random.key(seed, impl="rbg")
    return jax.random.normal(key, (shape.num_tokens, shape.num_heads, shape.head_dim), jnp.dtype(shape.dtype))


class HostArrays(NamedTuple):
    """Numbers of a batch that the host computes: ``Inputs`` without the pool, and the deviation of each slot's V.

    Slots that no query may read have NaN as their deviation.
    """

    block_tables: Int[np.ndarray, "num_seqs max_blocks"]
    kv_lens: Int[np.ndarray, " num_seqs"]
    cu_q_lens: Int[np.ndarray, " num_seqs_plus_1"]
    kv_scales: Float[np.ndarray, "num_blocks num_layers 2 num_kv_heads"] | None
    deviations: Float[np.ndarray, "num_blocks block_size"]


def make_inputs(
    shape: AttentionShape, num_layers: int, *, filled: Iterable[int] | None = None, grows: bool = False, seed: int = 0
) -> Inputs:
    """A pool and its tables.

    Args:
        shape: the batch.
        num_layers: layers of the pool.
        filled: the layers with values; all if None. The other layers hold poison, as do slots that no query may read.
            Poison is NaN, or the largest number in an int8 pool, whose scales are NaN for unreadable blocks.
        grows: whether V has the deviations of ``value_deviations``. Otherwise V is normal, as K always is.
        seed: seed of all values.
    """
    layers = tuple(range(num_layers) if filled is None else filled)
    host = make_host_arrays(shape, num_layers, layers, grows=grows, seed=seed)
    pool = make_pool(shape, num_layers, layers, jnp.asarray(host.deviations), seed)
    return with_pool(pool, host)


def make_host_arrays(
    shape: AttentionShape, num_layers: int, layers: tuple[int, ...], *, grows: bool = False, seed: int = 0
) -> HostArrays:
    """The host's part of ``make_inputs``, with values in the given layers."""
    tables = shape.block_tables(seed)
    positions = shape.positions(tables)
    deviations = value_deviations(positions) if grows else np.where(positions == UNSEEN, np.nan, 1).astype(np.float32)
    scales = None
    if shape.is_quantized:
        scales = _make_scales(deviations, num_layers, list(layers), shape, seed)
        deviations = np.where(positions == UNSEEN, np.nan, 1).astype(np.float32)
    return HostArrays(tables, np.array(shape.kv_lens, np.int32), shape.cu_q_lens, scales, deviations)


def make_pool(
    shape: AttentionShape,
    num_layers: int,
    layers: tuple[int, ...],
    deviations: Float[Array, "num_blocks block_size"],
    seed: int = 0,
) -> Array:
    """The device's part of ``make_inputs``: a pool with values in the given layers."""
    pool_shape = block_pool_shape(shape.num_blocks, num_layers, shape.num_kv_heads, shape.block_size, shape.head_dim)
    dtype, key = jnp.dtype(shape.kv_dtype), jax.random.key(seed + 1, impl="rbg")
    pool = jnp.full(pool_shape, poison(dtype), dtype)
    for layer in layers:
        pool = _fill_layer(pool, jnp.int32(layer), deviations, jax.random.fold_in(key, layer))
    return pool


def with_pool(pool: Array, host: HostArrays) -> Inputs:
    """The arguments of ``paged_attention`` on the device."""
    tables, kv_lens, cu_q_lens = (jnp.asarray(each) for each in host[:3])
    return Inputs(pool, tables, kv_lens, cu_q_lens, None if host.kv_scales is None else jnp.asarray(host.kv_scales))


def poison(dtype: jnp.dtype) -> float:
    """A value that spoils every result that reads it."""
    return 127 if dtype == jnp.int8 else float("nan")


def _make_scales(
    deviations: np.ndarray, num_layers: int, layers: list[int], shape: AttentionShape, seed: int
) -> np.ndarray:
    """Scales for K of deviation 1 and V of about the block's. Heads differ by up to a quarter, so a mix-up shows."""
    is_seen = ~np.isnan(deviations)
    counts = is_seen.sum(axis=1)
    of_block = np.where(counts > 0, np.nansum(deviations, axis=1) / np.maximum(counts, 1), np.nan)
    scales = np.full((len(deviations), num_layers, 2, shape.num_kv_heads), np.nan, np.float32)
    of_kv = np.stack([np.where(counts > 0, 1, np.nan), of_block], axis=1)  # [num_blocks, 2]
    scales[:, layers] = of_kv[:, None, :, None] / STEPS[shape.kv_dtype]
    return scales * np.random.default_rng(seed).uniform(0.75, 1.25, scales.shape).astype(np.float32)


@partial(jax.jit, donate_argnums=0)
def _fill_layer(
    pool: Array, layer: Int[Array, ""], deviations: Float[Array, "num_blocks block_size"], key: Any
) -> Array:
    num_blocks, _, _, num_kv_heads, block_size, head_dim = pool.shape
    values = jax.random.normal(key, (num_blocks, 2, num_kv_heads, block_size, head_dim), jnp.float32)
    of_slot = deviations[:, None, None, :, None]
    values = values * jnp.concatenate([jnp.where(jnp.isnan(of_slot), of_slot, 1), of_slot], axis=1)
    name = pool.dtype.name
    if name in STEPS:
        values = values * STEPS[name]
    if pool.dtype == jnp.int8:
        values = jnp.where(jnp.isnan(values), 127, jnp.clip(jnp.round(values), -127, 127))
    return lax.dynamic_update_index_in_dim(pool, values.astype(pool.dtype), layer, axis=1)


def attend(q: Array, inputs: Inputs, layer: int, shape: AttentionShape, implementation: str) -> Array:
    """Attend one layer of ``shape`` by one implementation, with the shape's options."""
    slopes, sinks = head_options(shape)
    options: dict[str, Any] = {"sliding_window": shape.sliding_window, "soft_cap": shape.soft_cap}
    options["alibi_slopes"] = None if slopes is None else jnp.asarray(slopes)
    options["sinks"] = None if sinks is None else jnp.asarray(sinks)
    if inputs.kv_scales is not None:
        options["kv_scales"] = inputs.kv_scales
    if shape.reads_shared_once:
        options["shared_lens"] = jnp.where(inputs.kv_lens > 0, shape.shared_blocks * shape.block_size, 0)
    return paged_attention(
        q,
        inputs.pool,
        layer,
        inputs.block_tables,
        inputs.kv_lens,
        inputs.cu_q_lens,
        implementation=implementation,
        **options,
    )


def head_options(shape: AttentionShape) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Slopes and sinks of the heads, [num_heads] float32 each, or None."""
    heads = np.arange(shape.num_heads, dtype=np.float32)
    slopes = np.exp2(-8 * (heads + 1) / shape.num_heads) if shape.has_alibi else None
    return slopes, (heads % 7 - 2 if shape.has_sinks else None)
