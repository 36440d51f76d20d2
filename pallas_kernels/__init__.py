"""Paged attention and the block pool it reads: plain JAX functions, usable in any model."""

from pallas_kernels.block_pool import (
    KV_HEAD_AXIS,
    BlockPool,
    block_pool_shape,
    copy_blocks,
    gather_blocks,
    scatter_blocks,
    write_kv,
)
from pallas_kernels.paged_attention import best_implementation, paged_attention

__all__ = [
    "KV_HEAD_AXIS",
    "BlockPool",
    "best_implementation",
    "block_pool_shape",
    "copy_blocks",
    "gather_blocks",
    "paged_attention",
    "scatter_blocks",
    "write_kv",
]
