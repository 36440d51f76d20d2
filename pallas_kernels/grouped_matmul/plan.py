"""Tiles of a grouped product: rows of one group, at most as many as a tile has."""

import jax.numpy as jnp
from jaxtyping import Array, Int32


def most_tiles(num_rows: int, num_groups: int, tile_rows: int) -> int:
    """The largest number of tiles: each group that has rows fills all of its tiles but one."""
    return num_rows // tile_rows + min(num_groups, num_rows)


def plan_tiles(
    group_sizes: Int32[Array, " num_groups"],
    matrices: Int32[Array, " num_groups"] | None,
    num_rows: int,
    tile_rows: int,
) -> Int32[Array, "6 most_tiles"]:
    """Divide groups of rows, which lie one after another, into tiles that hold each row once, in the order of groups.

    Args:
        group_sizes: rows of each group; their sum is at most ``num_rows``.
        matrices: matrix of each group; None for the group's number.
        num_rows: rows of the array.
        tile_rows: rows of a tile.

    Returns:
        A column for each tile: its matrix, first row and number of rows; first tile and number of tiles of its group;
        the number of tiles in use, which is the same in every column. Columns of other tiles are 0 but for that.
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
    matrix = group if matrices is None else matrices[group]
    columns = jnp.where((size > 0)[None], jnp.stack([matrix, first, size, first_tile, tiles_of[group]]), 0)
    return jnp.concatenate([columns, jnp.broadcast_to(ends[-1:], (1, len(tile)))])
