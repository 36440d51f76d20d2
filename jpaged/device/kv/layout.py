"""The shape of the block pool of a model's layers, and the bytes of a block."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp

from jpaged.config import EngineConfig
from jpaged.device.backends import Backend
from jpaged.device.kv.pool import KVCache
from jpaged.models.checkpoint.config import ModelConfig
from jpaged.models.groups import Grouping, grouped, ungrouped
from jpaged.models.spec import LayerSpec
from pallas_kernels import block_pool_shape, is_quantized, kv_scales_shape
from pallas_kernels.paged_attention import can_read_once

KV_DTYPES = {"fp8": jnp.dtype(jnp.float8_e4m3fn), "int8": jnp.dtype(jnp.int8)}
"""Types of quantised pools, by the setting ``kv_cache_dtype``."""

ROW_BYTES = 1 << 16
"""Rows of a strided copy that have so many bytes move at the link's speed: at 53.7 GB/s on an H200.

Rows of 32 KiB moved at 48.6 GB/s there.
"""

MOST_AT_ONCE = Fraction(1, 8)
"""Part of the layers that is streamed at once at most, rounded up. A window has space for two such parts."""


@dataclass(frozen=True)
class PoolLayout:
    """Everything about a pool but the number of its blocks.

    Args:
        num_kv_heads, head_dim: KV heads over all devices, and their features, as a backend lays them out.
        dtype: type of K and V in the pool.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: jnp.dtype

    @property
    def block_bytes(self) -> int:
        """Bytes of one block with its scales, over all devices."""
        shape = block_pool_shape(1, self.num_layers, self.num_kv_heads, self.block_size, self.head_dim)
        scales_bytes = 0
        if is_quantized(self.dtype):
            scales_bytes = 4 * math.prod(kv_scales_shape(1, self.num_layers, self.num_kv_heads))
        return math.prod(shape) * self.dtype.itemsize + scales_bytes

    def layer_bytes(self, dtype: jnp.dtype) -> int:
        """Bytes of one layer of a block, in a type that need not be the pool's, without scales, over all devices."""
        shape = block_pool_shape(1, 1, self.num_kv_heads, self.block_size, self.head_dim)
        return math.prod(shape) * dtype.itemsize

    def allocate(self, num_blocks: int, sharding: jax.sharding.Sharding | None = None) -> KVCache:
        """A cache of so many blocks."""
        return KVCache.allocate(
            num_blocks=num_blocks,
            num_layers=self.num_layers,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            block_size=self.block_size,
            dtype=self.dtype,
            sharding=sharding,
        )


def kv_dtype(setting: str, dtype: Any) -> jnp.dtype:
    """Type of K and V in the pool.

    Args:
        setting: ``EngineConfig.kv_cache_dtype``.
        dtype: type of the activations.
    """
    return KV_DTYPES.get(setting, jnp.dtype(dtype))


def heads_of_pool(specs: Sequence[LayerSpec], num_devices: int) -> tuple[int, int]:
    """KV heads that the pool of some layers has, at least one for each device, and their features.

    Raises:
        ValueError: no layers, layers that are not numbered in order, or layers that one pool cannot hold.
    """
    if not specs:
        raise ValueError("the model declares no layers: expected layer_specs with a LayerSpec for each layer")
    if [spec.layer for spec in specs] != list(range(len(specs))):
        raise ValueError(
            f"layer_specs are numbered {[spec.layer for spec in specs]}: expected 0 to {len(specs) - 1}, in order"
        )
    shapes = {(spec.group, spec.num_kv_heads, spec.head_dim) for spec in specs}
    if len(shapes) > 1:
        raise ValueError(
            f"layers have (group, num_kv_heads, head_dim) of {sorted(shapes)}: expected one for all layers, since they "
            "share a block pool"
        )
    return max(specs[0].num_kv_heads, num_devices), specs[0].head_dim


def grouping_of(model: ModelConfig, config: EngineConfig) -> Grouping:
    """The layer groups of a model.

    Where sequences keep blocks on the host while they run, all layers share one block table, and windows free no block:
    a step streams whole blocks of all layers, in the order of the layers.
    """
    specs = tuple(model.layer_specs)
    if config.kv_placement != "device":
        return ungrouped(specs)
    return grouped(specs, config.max_model_len or model.max_model_len)


def why_no_activations(model: ModelConfig, config: EngineConfig) -> str | None:
    """The reason why blocks cannot hold activations in place of K and V; None if they can."""
    if not model.shows_sources:
        return f"{model.architecture} does not show the source of its K and V (jpaged.models.spec.attend_from)"
    widths = {spec.num_kv_heads * spec.head_dim for spec in model.layer_specs}
    if widths != {model.hidden_size}:
        return (
            f"its hidden_size is {model.hidden_size} and its K have {sorted(widths)} features: expected equal numbers, "
            "as activations are otherwise no smaller than K and V, or leave gaps"
        )
    expected = {
        "kv_placement='host'": config.kv_placement == "host",
        "offload_dtype='auto'": config.offload_dtype == "auto",
        "an even block_size": config.block_size % 2 == 0,
        "max_burst=1": config.max_burst in (None, 1),
    }
    missing = [name for name, is_met in expected.items() if not is_met]
    return f"it needs {', '.join(missing)}" if missing else None


def keeps_activations(model: ModelConfig, config: EngineConfig) -> bool:
    """Whether blocks hold the inputs of each layer, from which every step computes K and V (``kv/pages.py``).

    "auto" decides so in unquantised pools alone. There K and V change by no more than the rounding of a product. Inputs
    halve the bytes of an 8-bit pool too, but their own rounding adds to that of K and V. So a caller asks for these.
    """
    if config.offload_cache == "kv" or (config.offload_cache == "auto" and config.kv_cache_dtype != "auto"):
        return False
    return why_no_activations(model, config) is None


def pool_block_size(model: ModelConfig, config: EngineConfig) -> int:
    """Tokens whose K and V a block of the pool holds, or half of those whose activations it holds."""
    return config.block_size // 2 if keeps_activations(model, config) else config.block_size


def pool_layout(model: ModelConfig, config: EngineConfig, dtype: Any, backend: Backend) -> PoolLayout:
    """The layout of a model's pool.

    Args:
        model: shape of the model.
        config: the engine's settings.
        dtype: type of the activations.
        backend: lays out the heads.
    """
    num_kv_heads, head_dim = backend.pool_heads(*heads_of_pool(model.layer_specs, backend.num_devices))
    stored = kv_dtype(config.kv_cache_dtype, dtype)
    num_layers = grouping_of(model, config).groups.layers_per_block
    return PoolLayout(num_layers, num_kv_heads, head_dim, pool_block_size(model, config), stored)


def least_shared_tokens(layout: PoolLayout, model: ModelConfig, config: EngineConfig, backend: Backend) -> float:
    """Tokens that the decodes of a step must save for reading a prefix once that they share; infinite if it never pays.

    Several processes read it row by row: each would have the program that reads it once at a time of its own.

    Args:
        layout: the pool.
        model: its layers: some may read the prefix row by row all the same.
        config: the engine's settings.
        backend: knows the least bytes.
    """
    may_share = [can_read_once(spec.sliding_window, spec.alibi, layout.dtype) for spec in model.layer_specs]
    if config.kv_placement != "device" or jax.process_count() > 1 or not any(may_share):
        return math.inf
    token_bytes = 2 * layout.num_kv_heads * layout.head_dim * layout.dtype.itemsize
    return backend.least_shared_bytes * backend.num_devices / token_bytes


def host_layout(layout: PoolLayout, config: EngineConfig) -> PoolLayout:
    """The layout of blocks in the host pool: that of the device's pool, or of an 8-bit one.

    Args:
        layout: the layout of the device's pool.
        config: the engine's settings.
    """
    return replace(layout, dtype=KV_DTYPES[config.offload_dtype]) if is_narrowed(config) else layout


def share_on_host(layout: PoolLayout, config: EngineConfig) -> Fraction:
    """The bytes of a block in the host pool, as a part of those in the device's; arguments of ``host_layout``."""
    return Fraction(host_layout(layout, config).block_bytes, layout.block_bytes)


def layers_at_once(layout: PoolLayout, config: EngineConfig, backend: Backend) -> int:
    """Layers of a block that are best streamed at once: as many as make rows of ``ROW_BYTES``.

    A row of a strided copy holds such neighbouring layers of one block.

    With "auto" placement, layers arrive one by one. The window of two layers at once takes another device block for
    every 16 blocks of the host pool, if they have 32 layers. Steps would stream what these blocks could have kept.

    Args:
        layout, config: as for ``host_layout``.
        backend: its own copies of blocks, by DMA, join no layers.
    """
    if backend.streams_by_dma or config.kv_placement == "auto":
        return 1
    wanted = round(ROW_BYTES * layout.num_layers / host_layout(layout, config).block_bytes)
    return max(min(wanted, math.ceil(MOST_AT_ONCE * layout.num_layers)), 1)


def is_narrowed(config: EngineConfig) -> bool:
    """Whether blocks are rounded to 8 bits on their way to the host (``kv/narrow.py``)."""
    return config.offload_dtype != "auto"


def why_not_narrowed(config: EngineConfig) -> str | None:
    """The reason why blocks cannot be rounded on their way to the host; None if they can."""
    if config.kv_cache_dtype != "auto":
        return f"kv_cache_dtype={config.kv_cache_dtype!r} has 8 bits already, and its blocks move as they are"
    if config.offload_cache == "activations":
        return "offload_cache='activations' keeps the inputs of layers, and only K and V are rounded"
    return None
