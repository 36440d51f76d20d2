"""The operations of the block pool on TPUs, as Pallas kernels that work by DMA."""

from pallas_kernels.block_pool.tpu.moves import copy_blocks_tpu, gather_blocks_tpu, scatter_blocks_tpu
from pallas_kernels.block_pool.tpu.write import write_kv_quantized_tpu, write_kv_tpu

__all__ = ["copy_blocks_tpu", "gather_blocks_tpu", "scatter_blocks_tpu", "write_kv_quantized_tpu", "write_kv_tpu"]
