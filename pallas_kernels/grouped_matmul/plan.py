"""Tiles of a grouped product: rows of one group, at most as many as a tile has."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int32


class Tiles(NamedTuple):
    """Tiles that hold each row of each group once, in the order of the groups.

    Args:
        columns: group, first row and number of rows of each tile; first tile and number of tiles of its group.
        num_tiles: tiles in use; later columns are 0.
    """

    columns: Int32[Array, "5 most_tiles"]
    num_tiles: Int32[Array, "1"]


def most_tiles(num_rows: int, num_groups: int, tile_rows: int) -> int:
    """The largest number of tiles: each group that has rows fills all of its tiles but one."""
    return num_rows // tile_rows + min(num_groups, num_rows)


def plan_tiles(group_sizes: Int32[Array, " num_groups"], num_rows: int, tile_rows: int) -> Tiles:
    """Divide groups of rows, which lie one after another, into tiles.

    Args:
        group_sizes: rows of each group; their sum is at most ``num_rows``.
        num_rows: rows of the array.
        tile_rows: rows of a tile.
    """
    [num_groups] = group_sizes.shape
    tiles_of = (group_sizes + tile_rows - 1) // tile_rows
    ends = jnp.cumsum(tiles_of, dtype=jnp.int32)
    tile = jnp.arange(most_tiles(num_rows, num_groups, tile_rows), dtype=jnp.int32)
    group = jnp.minimum(jnp.sum(ends[None] <= tile[:, None], axis=1, dtype=jnp.int32), num_groups - 1)
    first_tile = ends[group] - tiles_of[group]
    row = (tile - first_tile) * tile_rows
    size = jnp.where(tile < ends[-1], jnp.clip(group_sizes[group] - row, 0, tile_rows), 0)
    first = jnp.cumsum(group_sizes, dtype=jnp.int32)[group] - group_sizes[group] + row
    columns = jnp.stack([group, first, size, first_tile, tiles_of[group]])
    return Tiles(jnp.where((size > 0)[None], columns, 0), ends[-1:])
