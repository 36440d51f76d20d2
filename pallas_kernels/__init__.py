"""Paged attention and the block pool it reads: plain JAX functions, usable in any model."""

from pallas_kernels.block_pool import (
    KV_HEAD_AXIS,
    BlockPool,
    KvScales,
    block_pool_shape,
    copy_blocks,
    gather_blocks,
    is_quantized,
    kv_scales_shape,
    scatter_blocks,
    write_kv,
    write_kv_quantized,
)
from pallas_kernels.paged_attention import best_implementation, paged_attention, write_and_attend

__all__ = [
    "KV_HEAD_AXIS",
    "BlockPool",
    "KvScales",
    "best_implementation",
    "block_pool_shape",
    "copy_blocks",
    "gather_blocks",
    "is_quantized",
    "kv_scales_shape",
    "paged_attention",
    "scatter_blocks",
    "write_and_attend",
    "write_kv",
    "write_kv_quantized",
]
