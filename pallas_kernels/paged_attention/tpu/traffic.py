"""Traffic of a launch between HBM and its cores, counted from the kernel's own work list, and the least possible."""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from pallas_kernels.paged_attention.tpu.launch import TABLE_PIECE, Launch
from pallas_kernels.paged_attention.tpu.schedule import NO_TOKEN, make_row_tiles, make_tiles


class Traffic(NamedTuple):
    """Bytes of a launch's copies, by content, and the operations of its matrix products."""

    kv: int
    queries: int
    outputs: int
    tables: int
    scales: int
    new: int  # K and V of this step's tokens, read
    written: int  # rows of the pool rewritten for them
    flops: int

    @property
    def total_bytes(self) -> int:
        return sum(self) - self.flops


def count_traffic(launch: Launch, q_lens: Sequence[int], kv_lens: Sequence[int], num_tokens: int) -> Traffic:
    """The traffic of a batch.

    Args:
        q_lens, kv_lens: queries and tokens of each row, as the kernel's ``cu_q_lens`` and ``kv_lens`` state them.
        num_tokens: tokens of ``q``, padding included.
    """
    cu_q_lens = np.concatenate([[0], np.cumsum(q_lens)]).astype(np.int32)
    row_tiles = make_row_tiles(jnp.asarray(cu_q_lens), num_tokens, launch.rows)
    tile_row_tiles, block_size = launch.sizes.tile_row_tiles, launch.block_size
    tiles = make_tiles(row_tiles, jnp.asarray(kv_lens, jnp.int32), num_tokens, launch.rows, tile_row_tiles)
    live = slice(int(tiles.num_live))
    q_pos, num_q, new_token = (
        np.asarray(x)[live].astype(np.int64) for x in (tiles.q_pos, tiles.num_q, tiles.new_token)
    )

    window = launch.scoring.sliding_window
    seen_from = np.zeros_like(q_pos) if window is None else np.maximum(q_pos - window + 1, 0)
    last = q_pos + num_q - 1
    blocks = int((last // block_size - seen_from // block_size + 1).sum())
    chunks = last // launch.chunk_tokens - seen_from // launch.chunk_tokens + 1
    of_row_tiles = -(-num_q // launch.rows.tokens)
    decodes = int((new_token != NO_TOKEN).sum()) if launch.is_fused else 0
    token_bytes = launch.block_bytes // block_size
    rows = np.where(of_row_tiles == 1, 1, tile_row_tiles) * launch.rows.count
    return Traffic(
        kv=blocks * launch.block_bytes,
        queries=int(of_row_tiles.sum()) * launch.row_tile_bytes,
        outputs=int(of_row_tiles.sum()) * launch.row_tile_bytes,
        tables=int(chunks.sum()) * TABLE_PIECE * 4,
        scales=blocks * launch.scale_lanes * 4 if launch.is_quantized else 0,
        new=decodes * token_bytes,
        written=decodes * token_bytes * launch.written_rows,
        flops=4 * int((rows * chunks).sum()) * launch.chunk_tokens * launch.num_kv_heads * launch.head_dim,
    )


def least_bytes(launch: Launch, group: int, q_lens: Sequence[int], kv_lens: Sequence[int]) -> int:
    """Bytes that any kernel moves: each visible K and V once, queries, outputs, and the K and V written.

    Args:
        group: query heads of each KV head.
    """
    token_bytes = launch.block_bytes // launch.block_size
    window = launch.scoring.sliding_window
    seen = [min(kv_len, q_len - 1 + (window or kv_len)) for q_len, kv_len in zip(q_lens, kv_lens, strict=True) if q_len]
    query_bytes = sum(q_lens) * launch.num_kv_heads * group * launch.head_dim * launch.q_dtype.itemsize
    new_bytes = 2 * token_bytes * sum(q_len == 1 for q_len in q_lens) if launch.is_fused else 0
    return sum(seen) * token_bytes + 2 * query_bytes + new_bytes


def least_flops(launch: Launch, group: int, q_lens: Sequence[int], kv_lens: Sequence[int]) -> int:
    """Operations that any kernel's matrix products take: two products for each query and each key that a query sees.

    Args:
        group: query heads of each KV head.
    """
    window = launch.scoring.sliding_window
    pairs = 0
    for q_len, kv_len in zip(q_lens, kv_lens, strict=True):
        seen = np.arange(kv_len - q_len + 1, kv_len + 1, dtype=np.int64)
        pairs += int((seen if window is None else np.minimum(seen, window)).sum())
    return 4 * pairs * launch.num_kv_heads * group * launch.head_dim
