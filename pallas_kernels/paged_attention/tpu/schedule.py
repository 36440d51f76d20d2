"""The work list of the kernel for a batch, in plain integer arithmetic on the device.

The query heads of a KV head stand one below the other. A *row tile* is as many query tokens of one sequence as then
fill the sublanes of a register. A *tile* is up to ``tile_row_tiles`` row tiles of one sequence. Both depend on lengths
only, so the compiler keeps one copy for all layers of a step.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from pallas_kernels.chips.memory import round_up
from pallas_kernels.chips.tpu import SUBLANES, sublanes_of


@dataclass(frozen=True, slots=True)
class Rows:
    """The layout of one KV head's queries in a row tile; static.

    Head g of token t stands in row ``t * token_rows + g``, with g up to ``group - 1``; other rows are padding.
    """

    tokens: int
    token_rows: int

    @property
    def count(self) -> int:
        """Rows of a row tile."""
        return self.tokens * self.token_rows


def rows_for(num_tokens: int, num_seqs: int, group: int, dtype: jnp.dtype) -> Rows:
    """Row tiles of one token each for no more tokens than sequences (a decode step), else full row tiles."""
    if num_tokens <= num_seqs:  # few heads take half a register of 16-bit rows, since every row costs copies
        return Rows(1, round_up(group, SUBLANES if group <= SUBLANES else sublanes_of(dtype)))
    sublanes = sublanes_of(dtype)
    if group > sublanes:
        return Rows(1, round_up(group, sublanes))
    token_rows = 1 << (group - 1).bit_length()
    return Rows(sublanes // token_rows, token_rows)


class RowTiles(NamedTuple):
    """The row tiles of all sequences: sequence i has row tiles ``start[i]`` to ``start[i + 1] - 1``.

    ``count`` is static: the largest possible number of row tiles.
    """

    start: Int[Array, " num_seqs_plus_1"]
    cu_q_lens: Int[Array, " num_seqs_plus_1"]
    count: int


NO_TOKEN = -1


class Tiles(NamedTuple):
    """The tiles. The first ``num_live`` tiles have queries."""

    row: Int[Array, " tiles"]
    row_tile: Int[Array, " tiles"]  # the first of the tile's row tiles
    q_pos: Int[Array, " tiles"]  # the first query's position in its sequence
    num_q: Int[Array, " tiles"]  # tokens
    new_token: Int[Array, " tiles"]  # the token of a sequence with one query; NO_TOKEN for other sequences
    num_live: Int[Array, ""]


def make_row_tiles(cu_q_lens: Int[Array, " num_seqs_plus_1"], num_tokens: int, rows: Rows) -> RowTiles:
    """The row tiles of a batch."""
    if rows.tokens == 1:
        return RowTiles(cu_q_lens, cu_q_lens, num_tokens)
    q_lens = jnp.diff(cu_q_lens)
    most = num_tokens // rows.tokens + min(q_lens.size, num_tokens)
    return RowTiles(starts(-(-q_lens // rows.tokens)), cu_q_lens, most)


def most_tiles(num_tokens: int, num_seqs: int, tile_tokens: int) -> int:
    """The largest number of tiles that a batch can have."""
    return min(num_tokens, num_tokens // tile_tokens + num_seqs)


def make_tiles(
    row_tiles: RowTiles, kv_lens: Int[Array, " num_seqs"], num_tokens: int, rows: Rows, tile_row_tiles: int
) -> Tiles:
    """The tiles of a batch, sequence after sequence."""
    q_lens = jnp.diff(row_tiles.cu_q_lens)
    tile_tokens = tile_row_tiles * rows.tokens
    first_tile = starts(-(-q_lens // tile_tokens))
    tile = jnp.arange(most_tiles(num_tokens, q_lens.size, tile_tokens), dtype=jnp.int32)
    row = jnp.minimum(owner(first_tile, tile), q_lens.size - 1)
    nth = tile - first_tile[row]
    return Tiles(
        row=row,
        row_tile=row_tiles.start[row] + nth * tile_row_tiles,
        q_pos=kv_lens[row] - q_lens[row] + nth * tile_tokens,
        num_q=jnp.clip(q_lens[row] - nth * tile_tokens, 0, tile_tokens),
        new_token=jnp.where(q_lens[row] == 1, row_tiles.cu_q_lens[row], NO_TOKEN),
        num_live=first_tile[-1],
    )


def pack_queries(
    q: Float[Array, "tokens num_kv_heads group head_dim"], row_tiles: RowTiles, rows: Rows
) -> Float[Array, "row_tiles num_kv_heads rows head_dim"]:
    """Queries as the kernel reads them; padding rows may hold anything, since their outputs are dropped."""
    _, num_kv_heads, group, head_dim = q.shape
    if rows.tokens == 1:
        return jnp.pad(q, ((0, 0), (0, 0), (0, rows.token_rows - group), (0, 0)))
    index = jnp.arange(row_tiles.count, dtype=jnp.int32)
    row = jnp.minimum(owner(row_tiles.start, index), row_tiles.start.size - 2)
    first = row_tiles.cu_q_lens[row] + (index - row_tiles.start[row]) * rows.tokens
    token = first[:, None] + jnp.arange(rows.tokens, dtype=jnp.int32)[None, :]
    packed = q.at[token].get(mode="clip")  # [row_tiles, tokens, num_kv_heads, group, head_dim]
    packed = jnp.pad(packed, ((0, 0), (0, 0), (0, 0), (0, rows.token_rows - group), (0, 0)))
    return packed.transpose(0, 2, 1, 3, 4).reshape(row_tiles.count, num_kv_heads, rows.count, head_dim)


def unpack_outputs(
    out: Float[Array, "row_tiles num_kv_heads rows head_dim"],
    row_tiles: RowTiles,
    rows: Rows,
    num_tokens: int,
    group: int,
) -> Float[Array, "tokens num_kv_heads group head_dim"]:
    """The kernel's outputs in the order of the batch's tokens; zeros for padding, where the kernel wrote nothing."""
    token = jnp.arange(num_tokens, dtype=jnp.int32)
    is_live = token < row_tiles.cu_q_lens[-1]
    if rows.tokens == 1:
        by_token = out
    else:
        row = jnp.minimum(owner(row_tiles.cu_q_lens, token), row_tiles.start.size - 2)
        nth_tile, nth = jnp.divmod(token - row_tiles.cu_q_lens[row], rows.tokens)
        split = out.reshape(out.shape[0], out.shape[1], rows.tokens, rows.token_rows, out.shape[3])
        by_token = split.at[row_tiles.start[row] + nth_tile, :, nth].get(mode="clip")
    return jnp.where(is_live[:, None, None, None], by_token[:, :, :group], 0)


def starts(lens: Int[Array, " n"]) -> Int[Array, " n_plus_1"]:
    """The start of each of some lengths laid end to end, and the end of the last."""
    return jnp.pad(jnp.cumsum(lens, dtype=jnp.int32), (1, 0))


def owner(start: Int[Array, " n_plus_1"], index: Int[Array, " m"]) -> Int[Array, " m"]:
    """The i with ``start[i] <= index < start[i + 1]``, or n past the end."""
    is_past: Bool[Array, "m n_plus_1"] = start[None, :] <= index[:, None]
    return is_past.sum(axis=1, dtype=jnp.int32) - 1
