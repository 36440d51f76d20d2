"""The Hopper kernels of the block pool: writes of K and V, and copies of whole blocks."""

from pallas_kernels.block_pool.hopper.copy import copy_blocks_hopper, why_not_copy
from pallas_kernels.block_pool.hopper.write import why_not_write, write_kv_hopper
from pallas_kernels.block_pool.hopper.write_quantized import why_not_write_quantized, write_kv_quantized_hopper

__all__ = [
    "copy_blocks_hopper",
    "why_not_copy",
    "why_not_write",
    "why_not_write_quantized",
    "write_kv_hopper",
    "write_kv_quantized_hopper",
]
