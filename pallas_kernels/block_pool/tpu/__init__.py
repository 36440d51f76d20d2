"""The operations of the block pool on TPUs, as Pallas kernels that work by DMA."""

from pallas_kernels.block_pool.tpu.host import (
    MOST_SLOTS,
    Slots,
    load_blocks_tpu,
    slots_for,
    start_layer_tpu,
    store_blocks_tpu,
    wait_layer_tpu,
    why_no_slots,
)
from pallas_kernels.block_pool.tpu.moves import copy_blocks_tpu, gather_blocks_tpu, scatter_blocks_tpu
from pallas_kernels.block_pool.tpu.write import write_kv_quantized_tpu, write_kv_tpu

__all__ = [
    "MOST_SLOTS",
    "Slots",
    "copy_blocks_tpu",
    "gather_blocks_tpu",
    "load_blocks_tpu",
    "scatter_blocks_tpu",
    "slots_for",
    "start_layer_tpu",
    "store_blocks_tpu",
    "wait_layer_tpu",
    "why_no_slots",
    "write_kv_quantized_tpu",
    "write_kv_tpu",
]
