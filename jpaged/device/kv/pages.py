"""Pages: blocks that hold the inputs of each layer in place of K and V, for twice the tokens.

In a page, the inputs of the first ``block_size`` tokens lie in the place of K, and those of the others in the place of
V. The features of an input are laid out as those of the heads of K, so there are as many. K and V computed from a page
fill two blocks (KVPR, arXiv 2411.17089: activations are half of K and V where every query head has a K and a V).

A quantised pool quantises inputs as it does K and V. Those in the place of K share a scale for the features of each
head, and so do those in the place of V. K and V computed from them are quantised too, in blocks of the window.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jpaged.device.backends import Rows
from jpaged.device.kv.pool import KVCache
from pallas_kernels.block_pool.layout import as_sides, shape_of
from pallas_kernels.block_pool.quantization import quantize_as_written
from pallas_kernels.block_pool.xla import write_quantized, write_tokens

PAGES_AT_ONCE = 512, 64
"""Pages whose K and V one product computes: many, as long as there are so many, and then few, with little padding."""


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
        num_tokens: tokens of each page; 0 for padding.
        num_pages: pages that are no padding.
        tables: the computed blocks of each row, by their cells.
    """

    pages: Int[Array, " pages"]
    positions: Int[Array, " pages"]
    num_tokens: Int[Array, " pages"]
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
    of_rows = _those_of_rows(most.num_resident, rows, num_on_host, page_size)
    of_pool = _whole_pool(most.num_resident, rows, page_size, window_size)
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
        pages=jnp.where(is_streamed, -1 - rank, resident.blocks[index]),  # as ``host_cell``
        positions=jnp.where(is_streamed, streamed_positions, resident.positions[index]),
        num_tokens=jnp.where(is_streamed, page_size, resident.num_tokens[index]),  # blocks on the host are full
        num_pages=num_streamed + num_resident,
        tables=jnp.where(is_used[:, :, None], computed, 0).reshape(len(tables), -1),
    )


class _Resident(NamedTuple):
    """Pages on the device.

    Args:
        blocks: their blocks; block 0 for padding.
        positions: position of each page's first token.
        num_tokens: tokens of each page; 0 for padding.
        ranks: rank among them of each cell of the block tables.
    """

    blocks: Int[Array, " resident"]
    positions: Int[Array, " resident"]
    num_tokens: Int[Array, " resident"]
    ranks: Int[Array, "rows max_blocks"]


def _those_of_rows(
    size: int,
    rows: Rows,
    num_on_host: Int[Array, " rows"],
    page_size: int,
) -> _Resident:
    """The pages of the rows, one row after the other."""
    tables = rows.block_tables
    num_resident = -(-rows.kv_lens // page_size) - num_on_host
    ends = jnp.cumsum(num_resident, dtype=jnp.int32)
    first_resident = ends - num_resident
    rank = jnp.arange(size, dtype=jnp.int32)
    row = jnp.minimum(jnp.searchsorted(ends, rank, side="right"), len(ends) - 1)
    index = jnp.clip(num_on_host[row] + rank - first_resident[row], 0, tables.shape[1] - 1)
    is_page = rank < ends[-1]
    positions = jnp.where(is_page, index * page_size, 0)
    return _Resident(
        jnp.where(is_page, tables[row, index], 0),
        positions,
        jnp.where(is_page, jnp.clip(rows.kv_lens[row] - positions, 0, page_size), 0),
        first_resident[:, None] + _logical(tables) - num_on_host[:, None],
    )


def _whole_pool(size: int, rows: Rows, page_size: int, window_size: int) -> _Resident:
    """Block 0 and all blocks behind the window, in order. Rows that share a block have it at one position."""
    tables = rows.block_tables
    ranks = jnp.where(tables > 0, tables - window_size, 0)
    starts = _logical(tables) * page_size
    num_tokens = jnp.clip(rows.kv_lens[:, None] - starts, 0, page_size)

    def most_of_rows(numbers: Int[Array, "rows max_blocks"]) -> Int[Array, " resident"]:
        return jnp.zeros(size, jnp.int32).at[ranks].max(jnp.where(tables > 0, numbers, 0))

    rank = jnp.arange(size, dtype=jnp.int32)
    blocks = jnp.where(rank > 0, rank + window_size, 0)
    return _Resident(blocks, most_of_rows(starts), most_of_rows(num_tokens), ranks)


def _logical(tables: Int[Array, "rows max_blocks"]) -> Int[Array, "1 max_blocks"]:
    """The logical block of each cell of the block tables."""
    return jnp.arange(tables.shape[1], dtype=jnp.int32)[None, :]


# Inputs: the cache as one layer -----------------------------------------------------------------------------------


def write_inputs(layers: KVCache, slots: Int[Array, " tokens"], inputs: Float[Array, "tokens hidden_size"]) -> KVCache:
    """Store the inputs of each token at its slot: ``page * 2 * block_size + offset``."""
    shape, sides = shape_of(layers.pool), jax.tree.map(lambda array: as_sides(array)[:, None], layers)
    by_head = inputs.reshape(len(inputs), shape.num_kv_heads, shape.head_dim)
    if sides.kv_scales is None:
        written = KVCache(write_tokens(sides.pool, 0, by_head, slots))
    else:
        written = KVCache(*write_quantized(sides.pool, sides.kv_scales, 0, by_head, slots))
    # A reshape after the barrier would be fused into the next write, which then writes to a copy.
    return lax.optimization_barrier(jax.tree.map(lambda array, like: array.reshape(like.shape), written, layers))


def read_inputs(
    layers: KVCache, pages: Int[Array, " pages"], dtype: jax.typing.DTypeLike
) -> Float[Array, "inputs hidden_size"]:
    """The inputs of all tokens of some pages. A quantised pool's values are exact in bfloat16 and float32."""
    shape, stored = shape_of(layers.pool), layers.pool[pages]
    if layers.kv_scales is not None:
        stored = stored.astype(jnp.float32) * layers.kv_scales[pages][..., None, None]
    sides = stored.astype(dtype).reshape(-1, shape.num_kv_heads, shape.block_size, shape.head_dim)
    inputs = sides.swapaxes(1, 2).reshape(-1, shape.num_kv_heads * shape.head_dim)
    # Otherwise XLA lets the product that follows read the pool itself, and tunes it on an array of the pool's size.
    return lax.optimization_barrier(inputs)


def write_computed(
    layers: KVCache,
    first_block: Int[Array, ""],
    k: Float[Array, "tokens num_kv_heads head_dim"],
    v: Float[Array, "tokens num_kv_heads head_dim"],
    num_tokens: Int[Array, " pages"],
) -> KVCache:
    """Store K and V of pages in neighbouring blocks of a quantised pool, as ordinary writes quantise them.

    A block's scale covers all of its tokens. So zeros take the places of those that a page does not have.

    Args:
        layers: the cache as one layer.
        first_block: the first block.
        k, v: K and V of all places of all pages.
        num_tokens: tokens of each page.
    """
    assert layers.kv_scales is not None
    is_token = jnp.arange(2 * layers.block_size, dtype=jnp.int32)[None, :] < num_tokens[:, None]
    for side, values in enumerate((k, v)):
        values = jnp.where(is_token.reshape(-1, 1, 1), values, 0)
        blocks = values.reshape(-1, layers.block_size, *values.shape[1:])
        parts = KVCache(*quantize_as_written(blocks, layers.pool.dtype))
        layers = jax.tree.map(
            lambda array, part, side=side: lax.dynamic_update_slice(
                array, part[:, None, None], (first_block, 0, side, *[0] * (part.ndim - 1))
            ),
            layers,
            parts,
        )
        layers = lax.optimization_barrier(layers)  # as in write_inputs
    return layers
