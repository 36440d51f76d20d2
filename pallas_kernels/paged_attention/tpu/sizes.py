"""Sizes of tiles, chunks and rings: from tuned.json, or else suggested by a chip's memories and rates."""

from dataclasses import replace

from pallas_kernels.chips.tpu import LANES, Chip
from pallas_kernels.paged_attention.tpu.launch import TABLE_PIECE, Launch, Sizes, vmem_bytes
from pallas_kernels.paged_attention.tpu.tuning import LEAST_BUFFERS, tuned_sizes

COPY_S = 2e-6
"""Latency of a copy, about: the copies in flight must cover the bandwidth for this long."""

LEAST_CHUNK_TOKENS = LANES
"""One score for every lane."""

MOST_CHUNK_TOKENS = 512

MOST_TILE_ROWS = 512
"""Operations for each byte of K and V read, in 16 bits. No chip needs more than 560 to be busy while it reads."""

BUFFERS = 3
"""Chunks in VMEM: one attended, one landing, one to cover the start of copies and short chunks."""

VMEM_SHARE = 0.9
"""Share of VMEM for a launch; the compiler takes the rest."""


def vmem_limit(chip: Chip) -> int:
    """VMEM that a launch may take, in bytes."""
    return int(chip.vmem_bytes * VMEM_SHARE)


def sizes_for(chip: Chip, launch: Launch, *, longest_q: int) -> Sizes:
    """The tuned sizes of a launch's shape class, or else the largest useful sizes that fit the chip's VMEM.

    Args:
        launch: the launch; its own sizes do not count.
        longest_q: largest number of query tokens that a sequence may have.

    Raises:
        NotImplementedError: not even the smallest sizes fit.
        ValueError: the tuned sizes do not fit.
    """
    tuned = tuned_sizes(chip.generation, launch, longest_q=longest_q)
    if tuned is not None:
        return tuned
    token_bytes = launch.block_bytes // launch.block_size
    wanted = chip.hbm_bytes_per_s * COPY_S / (BUFFERS - 1) / token_bytes
    chunk_tokens = LEAST_CHUNK_TOKENS
    while chunk_tokens < min(wanted, MOST_CHUNK_TOKENS):
        chunk_tokens *= 2
    row_tiles = 1
    while row_tiles * launch.rows.tokens < longest_q and 2 * row_tiles * launch.rows.count <= MOST_TILE_ROWS:
        row_tiles *= 2
    buffers = BUFFERS
    while True:
        sizes = Sizes(row_tiles, _blocks(chunk_tokens, launch.block_size), buffers)
        needed = vmem_bytes(replace(launch, sizes=sizes))
        if needed <= vmem_limit(chip):
            return sizes
        if row_tiles * launch.rows.count > chunk_tokens and row_tiles > 1:
            row_tiles //= 2
        elif sizes.chunk_blocks > 1 and chunk_tokens > LEAST_CHUNK_TOKENS // 4:
            chunk_tokens //= 2
        elif row_tiles > 1:
            row_tiles //= 2
        elif buffers > LEAST_BUFFERS:
            buffers -= 1
        else:
            raise NotImplementedError(
                f"{launch.num_kv_heads} KV heads of {launch.head_dim} in blocks of {launch.block_size} take "
                f"{needed >> 20} MiB of VMEM: a TPU {chip.generation} has {vmem_limit(chip) >> 20}; shard the heads"
            )


def _blocks(chunk_tokens: int, block_size: int) -> int:
    """Blocks of a chunk: a power of two, so that chunks divide the pieces of block tables."""
    blocks = 1
    while 2 * blocks * block_size <= chunk_tokens and blocks < TABLE_PIECE:
        blocks *= 2
    return blocks
