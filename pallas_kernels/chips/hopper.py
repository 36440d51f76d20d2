"""Hopper GPUs (H100, H200): their multiprocessors, registers and shared memory."""

COMPUTE_CAPABILITY = "9.0"

NUM_SMS = 132
"""Multiprocessors of an H100 or H200, assumed where no GPU can be asked."""

WARPGROUP = 128
"""Threads of a warpgroup."""

WARPS = 4
"""Warps of a warpgroup."""

REGISTERS_OF_SM = 65536

SMEM_BYTES = 227 * 1024
"""Shared memory of a multiprocessor that thread blocks may use."""

SMEM_ALIGNMENT = 128
"""Alignment in bytes that TMA asks of shared memory."""

MOST_COPIED = 256
"""Elements of each axis that one TMA copies, at most."""
