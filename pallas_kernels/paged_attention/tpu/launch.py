"""The static properties of a launch of the kernel, and the VMEM that the launch takes."""

from dataclasses import dataclass

import jax.numpy as jnp

from pallas_kernels.block_pool.layout import is_quantized
from pallas_kernels.chips.memory import round_up
from pallas_kernels.chips.tpu import LANES, SUBLANES, sublanes_of
from pallas_kernels.paged_attention.call import Scoring
from pallas_kernels.paged_attention.tpu.schedule import Rows

TABLE_PIECE = LANES
"""Entries of a block table that one copy brings into SMEM."""


SMALL_TILE = 16 * 1024
"""Scores that take a quarter of the 64 vector registers. One such product alone leaves units idle between its steps."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes chosen for a chip."""

    tile_row_tiles: int  # row tiles of a tile, at most
    chunk_blocks: int  # blocks of a chunk: a power of two
    buffers: int  # chunks in VMEM


@dataclass(frozen=True, slots=True)
class Launch:
    """The static properties of a launch."""

    num_kv_heads: int
    block_size: int
    head_dim: int
    q_dtype: jnp.dtype
    pool_dtype: jnp.dtype
    rows: Rows
    sizes: Sizes
    scoring: Scoring
    num_cores: int
    vmem_limit: int
    has_slopes: bool
    has_sinks: bool
    is_fused: bool  # decodes write their token's K and V

    @property
    def chunk_tokens(self) -> int:
        return self.sizes.chunk_blocks * self.block_size

    @property
    def tile_rows(self) -> int:
        """Rows of a tile, of each KV head."""
        return self.sizes.tile_row_tiles * self.rows.count

    @property
    def is_quantized(self) -> bool:
        return is_quantized(self.pool_dtype)

    @property
    def clears_values(self) -> bool:
        """Whether values of unread slots, which can be NaN, must be cleared in VMEM. Only float types have a select."""
        return not self.is_quantized

    @property
    def masks_values_on_use(self) -> bool:
        """Whether values of unread slots must be masked on use instead: float8 can be NaN, and has no select."""
        return self.pool_dtype == jnp.float8_e4m3fn

    @property
    def scale_lanes(self) -> int:
        """Lanes of a block's scales: those of its K heads, then of its V heads."""
        return round_up(2 * self.num_kv_heads, LANES)

    @property
    def block_bytes(self) -> int:
        """One layer's K and V of a block."""
        return 2 * self.num_kv_heads * self.block_size * self.head_dim * self.pool_dtype.itemsize

    @property
    def row_tile_bytes(self) -> int:
        """All heads' queries, or outputs, of a row tile."""
        return self.num_kv_heads * self.rows.count * self.head_dim * self.q_dtype.itemsize

    @property
    def written_rows(self) -> int:
        """Rows of each head that the write of one token rewrites: a register's rows, or the whole block's."""
        rows = sublanes_of(self.pool_dtype)
        return self.block_size if self.block_size % rows else rows

    def head_unroll(self, row_tiles: int) -> int:
        """KV heads whose arithmetic the compiler may interleave: a few if their tiles of scores are small."""
        most = 4 if row_tiles * self.rows.count * self.chunk_tokens <= SMALL_TILE else 1
        return next(n for n in (4, 2, 1) if n <= most and self.num_kv_heads % n == 0)


def vmem_bytes(launch: Launch) -> int:
    """VMEM that a launch takes: its buffers, padded as the hardware pads them, and the tiles of scores in flight."""
    lanes = round_up(launch.head_dim, LANES)
    kv_rows = round_up(launch.block_size, SUBLANES)
    sizes, heads = launch.sizes, launch.num_kv_heads
    chunk = sizes.chunk_blocks * 2 * heads * kv_rows * lanes * launch.pool_dtype.itemsize
    queries = heads * launch.tile_rows * lanes * launch.q_dtype.itemsize
    state = heads * launch.tile_rows * (lanes + 2 * LANES) * 4
    per_head = (launch.has_slopes + launch.has_sinks) * heads * launch.rows.count * LANES * 4 * 2
    scales = 0
    if launch.is_quantized:
        scales = (sizes.buffers + 1) * sizes.chunk_blocks * SUBLANES * launch.scale_lanes * 4
        scales += launch.scale_lanes * launch.chunk_tokens * 4
    rows = max(launch.tile_rows, sublanes_of(launch.q_dtype))
    temporaries = 4 * rows * launch.chunk_tokens * 4 + 4 * launch.chunk_tokens * lanes * 4 + 2 * rows * lanes * 4
    written = 0
    if launch.is_fused:
        written = 2 * heads * lanes * (2 * launch.written_rows + sizes.buffers * SUBLANES) * 4
    return (sizes.buffers * (chunk + queries)) + 2 * queries + state + per_head + scales + written + temporaries
