"""Pages: blocks that hold the inputs of each layer in place of K and V, for twice the tokens.

In a page, the inputs of the first ``block_size`` tokens lie in the place of K, and those of the others in the place of
V. The features of an input are laid out as those of the heads of K, so there are as many. K and V computed from a page
fill two blocks (KVPR, arXiv 2411.17089: activations are half of K and V where every query head has a K and a V).
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jpaged.contract.rows import host_cell
from jpaged.device.backends import Rows
from jpaged.device.kv.pool import KVCache
from pallas_kernels.block_pool.layout import as_sides, shape_of

PAGES_AT_ONCE = 128
"""Pages whose K and V one product computes: enough to be bound by computation, and little padding."""


@dataclass(frozen=True, slots=True)
class PageCapacity:
    """Most pages of one step.

    Args:
        num_streamed: pages on the host.
        num_resident: pages on the device, block 0 included.
    """

    num_streamed: int
    num_resident: int

    @property
    def num_computed(self) -> int:
        """Blocks that K and V of all pages fill."""
        return 2 * (self.num_streamed + self.num_resident)


class Pages(NamedTuple):
    """The pages of a step: those on the host, then those on the device, each part in the order of the rows.

    Args:
        pages: ``host_cell`` of their ranks for the pages on the host, then blocks; block 0 for padding.
        positions: position of each page's first token in its sequence.
        num_pages: pages that are no padding.
        tables: the computed blocks of each row, by their cells.
    """

    pages: Int[Array, " pages"]
    positions: Int[Array, " pages"]
    num_pages: Int[Array, ""]
    tables: Int[Array, "rows max_blocks"]


def locate_pages(
    most: PageCapacity, rows: Rows, starts: Int[Array, " rows"], page_size: int, window_size: int, first_computed: int
) -> Pages:
    """Find the pages of a step.

    Args:
        most: the sizes of the results.
        rows: the rows; their block tables have a cell for each page, ``host_cell`` for those on the host.
        starts: first streamed page of each row.
        page_size: tokens of a page.
        window_size: blocks of the window.
        first_computed: the cell of the first computed block.
    """
    tables = rows.block_tables
    num_on_host = jnp.sum(tables < 0, axis=1, dtype=jnp.int32)
    num_streamed, num_resident = jnp.sum(num_on_host), jnp.sum(-(-rows.kv_lens // page_size) - num_on_host)
    # Rows that share pages may count more of them than the pool has.
    of_rows = _those_of_rows(most.num_resident, tables, num_on_host, rows.kv_lens, page_size)
    of_pool = _whole_pool(most.num_resident, tables, page_size, window_size)
    is_whole_pool = num_resident > most.num_resident
    resident = jax.tree.map(lambda pool, own: jnp.where(is_whole_pool, pool, own), of_pool, of_rows)
    num_resident = jnp.minimum(num_resident, most.num_resident)
    ranks = jnp.where(tables < 0, starts[:, None] - 1 - tables, num_streamed + resident.ranks)
    computed = first_computed + 2 * ranks[:, :, None] + jnp.arange(2, dtype=jnp.int32)[None, None, :]
    is_used = _logical(tables) * page_size < rows.kv_lens[:, None]

    rank = jnp.arange(most.num_streamed + most.num_resident, dtype=jnp.int32)
    is_streamed = rank < num_streamed
    index = jnp.clip(rank - num_streamed, 0, most.num_resident - 1)
    # Rows without pages on the host have any start: they own no rank.
    streamed = rank[: most.num_streamed]
    owns = (starts[:, None] <= streamed[None, :]) & (streamed[None, :] < (starts + num_on_host)[:, None])
    streamed_positions = jnp.sum(jnp.where(owns, streamed[None, :] - starts[:, None], 0), axis=0) * page_size
    streamed_positions = jnp.pad(streamed_positions, (0, most.num_resident))
    return Pages(
        pages=jnp.where(is_streamed, host_cell(rank), resident.blocks[index]),
        positions=jnp.where(is_streamed, streamed_positions, resident.positions[index]),
        num_pages=num_streamed + num_resident,
        tables=jnp.where(is_used[:, :, None], computed, 0).reshape(len(tables), -1),
    )


class _Resident(NamedTuple):
    """Pages on the device.

    Args:
        blocks: their blocks; block 0 for padding.
        positions: position of each page's first token.
        ranks: rank among them of each cell of the block tables.
    """

    blocks: Int[Array, " resident"]
    positions: Int[Array, " resident"]
    ranks: Int[Array, "rows max_blocks"]


def _those_of_rows(
    size: int,
    tables: Int[Array, "rows max_blocks"],
    num_on_host: Int[Array, " rows"],
    kv_lens: Int[Array, " rows"],
    page_size: int,
) -> _Resident:
    """The pages of the rows, one row after the other."""
    num_resident = -(-kv_lens // page_size) - num_on_host
    ends = jnp.cumsum(num_resident, dtype=jnp.int32)
    first_resident = ends - num_resident
    rank = jnp.arange(size, dtype=jnp.int32)
    row = jnp.minimum(jnp.searchsorted(ends, rank, side="right"), len(ends) - 1)
    index = jnp.clip(num_on_host[row] + rank - first_resident[row], 0, tables.shape[1] - 1)
    is_page = rank < ends[-1]
    return _Resident(
        jnp.where(is_page, tables[row, index], 0),
        jnp.where(is_page, index * page_size, 0),
        first_resident[:, None] + _logical(tables) - num_on_host[:, None],
    )


def _whole_pool(size: int, tables: Int[Array, "rows max_blocks"], page_size: int, window_size: int) -> _Resident:
    """Block 0 and all blocks behind the window, in order. Rows that share a block have it at one position."""
    ranks = jnp.where(tables > 0, tables - window_size, 0)
    positions = jnp.zeros(size, jnp.int32).at[ranks].max(jnp.where(tables > 0, _logical(tables) * page_size, 0))
    rank = jnp.arange(size, dtype=jnp.int32)
    return _Resident(jnp.where(rank > 0, rank + window_size, 0), positions, ranks)


def _logical(tables: Int[Array, "rows max_blocks"]) -> Int[Array, "1 max_blocks"]:
    """The logical block of each cell of the block tables."""
    return jnp.arange(tables.shape[1], dtype=jnp.int32)[None, :]


# Inputs: the cache as one layer -----------------------------------------------------------------------------------


def write_inputs(layers: KVCache, slots: Int[Array, " tokens"], inputs: Float[Array, "tokens hidden_size"]) -> KVCache:
    """Store the inputs of each token at its slot: ``page * 2 * block_size + offset``."""
    shape = shape_of(layers.pool)
    sides, offsets = slots // shape.block_size, slots % shape.block_size
    by_head = inputs.astype(layers.pool.dtype).reshape(len(inputs), shape.num_kv_heads, shape.head_dim)
    written = as_sides(layers.pool).at[sides, :, offsets].set(by_head, mode="drop")
    # XLA would fuse the write of a single token into each of its readers, and copy the pool for each.
    return KVCache(jax.lax.optimization_barrier(written).reshape(layers.pool.shape))


def read_inputs(layers: KVCache, pages: Int[Array, " pages"]) -> Float[Array, "inputs hidden_size"]:
    """The inputs of all tokens of some pages."""
    shape = shape_of(layers.pool)
    sides = layers.pool[pages].reshape(-1, shape.num_kv_heads, shape.block_size, shape.head_dim)
    inputs = sides.swapaxes(1, 2).reshape(-1, shape.num_kv_heads * shape.head_dim)
    # Otherwise XLA lets the product that follows read the pool itself, and tunes it on an array of the pool's size.
    return jax.lax.optimization_barrier(inputs)
