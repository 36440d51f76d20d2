"""The copies between HBM and a core: this module alone starts them and waits for them."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.chips.memory import Ref
from pallas_kernels.paged_attention.tpu.launch import TABLE_PIECE, Launch
from pallas_kernels.paged_attention.tpu.schedule import NO_TOKEN

OUTPUT_SLOTS = 2

WRITE_SLOTS = 2

TILE_FIELDS = 5

type Copy = Any
"""A copy between memories, to be started and waited for."""


class Cursor(NamedTuple):
    """A place in a core's line of chunks."""

    nth: Array  # tile of the core
    chunk: Array  # chunk of the sequence, whose first block is chunk * chunk_blocks


class Tile(NamedTuple):
    """One tile, and the part of its sequence that its queries see."""

    row: Array
    row_tile: Array
    row_tiles: Array
    q_pos: Array
    seen_from: Array  # positions seen_from to seen_to - 1
    seen_to: Array
    first_chunk: Array
    last_chunk: Array
    new_token: Array


class Operands(NamedTuple):
    """The operands of the kernel, in HBM except for the first two."""

    layer_and_count: Ref  # [2] i32 in SMEM: the layer, and the number of tiles
    tiles: Ref  # [TILE_FIELDS * tiles] i32 in SMEM: row, row_tile, q_pos, num_q and new_token of each
    tables: Ref  # [num_seqs, pieces, 1, TABLE_PIECE] i32
    q: Ref  # [row_tiles, num_kv_heads, rows, head_dim]
    pool: Ref
    out: Ref  # like q
    scales: Ref | None = None  # [num_blocks, 1, scale_lanes] f32, one layer's
    new: Ref | None = None  # [tokens, 2, num_kv_heads, 1, head_dim]: K and V that are not in the pool yet


class ScaleBuffers(NamedTuple):
    """Buffers of a quantised pool's scales."""

    landed: Ref  # [buffers, chunk_blocks, 1, scale_lanes] f32
    rows: Ref  # [chunk_blocks, scale_lanes] f32: scales of the chunk attended
    spread: Ref  # [scale_lanes, chunk_tokens] f32


class WriteBuffers(NamedTuple):
    """Buffers of the K and V that decodes write."""

    new: Ref  # [buffers, 2, num_kv_heads, 1, head_dim]
    rows: Ref  # [WRITE_SLOTS, 2, num_kv_heads, written_rows, head_dim]: rows of a block, the new one among them
    count: Ref  # [1] i32 in SMEM: writes started
    landed: Ref
    left: Ref


class Buffers(NamedTuple):
    """Scratch memory, and the semaphores of its copies."""

    table: Ref  # [buffers + 1, 1, TABLE_PIECE] i32 in SMEM
    kv: Ref  # [buffers, chunk_blocks, 2, num_kv_heads, block_size, head_dim]
    q: Ref  # [buffers, tile_row_tiles, num_kv_heads, rows, head_dim]
    out: Ref  # [OUTPUT_SLOTS, tile_row_tiles, num_kv_heads, rows, head_dim]
    table_landed: Ref
    kv_landed: Ref  # for a chunk and its scales
    q_landed: Ref
    out_left: Ref
    scales: ScaleBuffers | None
    writes: WriteBuffers | None


def _rem(x: Array, n: int) -> Array:
    return lax.rem(x, jnp.int32(n))


class Stream:
    """The copies of one core, in the order of its line of chunks."""

    def __init__(self, launch: Launch, operands: Operands, buffers: Buffers) -> None:
        self._launch, self._operands, self._buffers = launch, operands, buffers
        self._core = pl.program_id(0)
        self._layer, self._num_tiles = operands.layer_and_count[0], operands.layer_and_count[1]

    def first(self) -> Cursor:
        return self._begin_of(jnp.int32(0))

    def _begin_of(self, nth: Array) -> Cursor:
        return Cursor(nth, self._tile(nth).first_chunk)

    def after(self, cursor: Cursor, moves: Array | bool) -> Cursor:
        """The next chunk in line, if the cursor moves; past the last chunk its fields mean nothing."""
        is_last = cursor.chunk >= self.tile(cursor).last_chunk
        of_next = self._begin_of(cursor.nth + 1)
        moved = Cursor(jnp.where(is_last, of_next.nth, cursor.nth), jnp.where(is_last, of_next.chunk, cursor.chunk + 1))
        return Cursor(*(jnp.where(moves, new, old) for new, old in zip(moved, cursor, strict=True)))

    def is_live(self, cursor: Cursor) -> Array:
        return self._index(cursor.nth) < self._num_tiles

    def _index(self, nth: Array) -> Array:
        return nth * self._launch.num_cores + self._core

    def tile(self, cursor: Cursor) -> Tile:
        return self._tile(cursor.nth)

    def _tile(self, nth: Array) -> Tile:
        launch, fields = self._launch, self._operands.tiles
        at = TILE_FIELDS * jnp.minimum(self._index(nth), fields.shape[0] // TILE_FIELDS - 1)
        row, row_tile, q_pos, num_q, new_token = (fields[at + field] for field in range(TILE_FIELDS))
        window = launch.scoring.sliding_window
        seen_from = jnp.int32(0) if window is None else jnp.maximum(q_pos - (window - 1), 0)
        chunk_tokens = jnp.int32(launch.chunk_tokens)
        return Tile(
            row=row,
            row_tile=row_tile,
            row_tiles=lax.div(num_q + (launch.rows.tokens - 1), jnp.int32(launch.rows.tokens)),
            q_pos=q_pos,
            seen_from=seen_from,
            seen_to=q_pos + num_q,
            first_chunk=lax.div(seen_from, chunk_tokens),
            last_chunk=lax.div(q_pos + num_q - 1, chunk_tokens),
            new_token=new_token,
        )

    def _blocks(self, cursor: Cursor) -> tuple[Array, Array]:
        """The range of the chunk's blocks that the kernel reads: from the first, up to the second."""
        launch, tile = self._launch, self.tile(cursor)
        block_size, first = jnp.int32(launch.block_size), cursor.chunk * launch.sizes.chunk_blocks
        begin = jnp.maximum(lax.div(tile.seen_from, block_size) - first, 0)
        end = jnp.minimum(lax.div(tile.seen_to - 1, block_size) + 1 - first, launch.sizes.chunk_blocks)
        return begin, end

    def _table_slot(self, count: Array) -> Array:
        # One slot more than chunks: a chunk's entries stay until the chunk has been attended.
        return _rem(count, self._launch.sizes.buffers + 1)

    def _table_copy(self, cursor: Cursor, count: Array) -> Copy:
        slot = self._table_slot(count)
        piece = lax.div(cursor.chunk, jnp.int32(TABLE_PIECE // self._launch.sizes.chunk_blocks))
        return pltpu.make_async_copy(
            self._operands.tables.at[self.tile(cursor).row, piece],
            self._buffers.table.at[slot],
            self._buffers.table_landed.at[slot],
        )

    def start_table(self, cursor: Cursor, count: Array) -> None:
        """Start to fetch the piece of a block table with a chunk's entries; ``count`` is the chunk's place in line."""
        pl.when(self.is_live(cursor))(lambda: self._table_copy(cursor, count).start())

    def _entry(self, cursor: Cursor, count: Array, index: Array | int) -> Array:
        """The physical block of one of the chunk's blocks."""
        first = _rem(cursor.chunk * self._launch.sizes.chunk_blocks, TABLE_PIECE)
        return self._buffers.table[self._table_slot(count), 0, first + index]

    def _start_block(self, slot: Array, block: Array, index: Array | int) -> None:
        """Start to copy a physical block to its place in a chunk's slot."""
        operands, buffers, landed = self._operands, self._buffers, self._buffers.kv_landed.at[slot]
        pltpu.make_async_copy(operands.pool.at[block, self._layer], buffers.kv.at[slot, index], landed).start()
        if operands.scales is not None:
            assert buffers.scales is not None
            pltpu.make_async_copy(operands.scales.at[block], buffers.scales.landed.at[slot, index], landed).start()

    def _start_blocks(self, cursor: Cursor, count: Array) -> None:
        chunk_blocks = self._launch.sizes.chunk_blocks
        slot = _rem(count, self._launch.sizes.buffers)
        begin, end = self._blocks(cursor)
        is_whole = end - begin == chunk_blocks

        def start(index: Array | int, _: None) -> None:
            self._start_block(slot, self._entry(cursor, count, index), index)

        @pl.when(is_whole)
        def _unrolled() -> None:
            for index in range(chunk_blocks):
                start(index, None)

        pl.when(~is_whole)(lambda: lax.fori_loop(begin, end, start, None))

    def _wait_for_blocks(self, cursor: Cursor, slot: Array) -> None:
        """Wait for all bytes of the chunk's blocks."""
        begin, end = self._blocks(cursor)
        buffers, landed = self._buffers, self._buffers.kv_landed.at[slot]
        for buffer in (buffers.kv, *([] if buffers.scales is None else [buffers.scales.landed])):
            blocks = buffer.at[slot, pl.ds(begin, end - begin)]
            pltpu.make_async_copy(blocks, blocks, landed).wait()

    def _query_copy(self, cursor: Cursor) -> Copy:
        tile, slot = self.tile(cursor), _rem(cursor.nth, self._launch.sizes.buffers)
        return pltpu.make_async_copy(
            self._operands.q.at[pl.ds(tile.row_tile, tile.row_tiles)],
            self._buffers.q.at[slot, pl.ds(0, tile.row_tiles)],
            self._buffers.q_landed.at[slot],
        )

    def _is_first(self, cursor: Cursor) -> Array:
        return cursor.chunk == self.tile(cursor).first_chunk

    def start_chunk(self, cursor: Cursor, count: Array) -> None:
        """Start to fetch a chunk, and with the first chunk of a tile the tile's queries."""

        @pl.when(self.is_live(cursor))
        def _start() -> None:
            pl.when(self._is_first(cursor))(lambda: self._query_copy(cursor).start())
            self._table_copy(cursor, count).wait()
            self._start_blocks(cursor, count)
            if self._launch.is_fused:
                slot = _rem(count, self._launch.sizes.buffers)
                pl.when(self._has_new_token(cursor))(lambda: self._new_copy(cursor, slot).start())

    def _has_new_token(self, cursor: Cursor) -> Array:
        tile = self.tile(cursor)
        return (tile.new_token != NO_TOKEN) & (cursor.chunk == tile.last_chunk)

    @property
    def _writes(self) -> WriteBuffers:
        assert self._buffers.writes is not None
        return self._buffers.writes

    def _new_copy(self, cursor: Cursor, slot: Array) -> Copy:
        assert self._operands.new is not None
        token = self._operands.new.at[self.tile(cursor).new_token]
        return pltpu.make_async_copy(token, self._writes.new.at[slot], self._writes.landed.at[slot])

    def _write_copy(self, slot: Array, block: Array, rows: Any) -> Copy:
        target = self._operands.pool.at[block, self._layer, slice(None), slice(None), rows]
        return pltpu.make_async_copy(self._writes.rows.at[slot], target, self._writes.left.at[slot])

    def write_new(self, cursor: Cursor, count: Array) -> None:
        """Put K and V of a decode's token into the token's chunk, which has landed, and into the pool."""
        if self._launch.is_fused:
            pl.when(self._has_new_token(cursor))(lambda: self._write_new(cursor, count))

    def _write_new(self, cursor: Cursor, count: Array) -> None:
        launch, kv, writes = self._launch, self._buffers.kv, self._writes
        slot, num_rows = _rem(count, launch.sizes.buffers), launch.written_rows
        self._new_copy(cursor, slot).wait()
        position = self.tile(cursor).seen_to - 1 - cursor.chunk * launch.chunk_tokens
        index, offset = lax.div(position, jnp.int32(launch.block_size)), _rem(position, launch.block_size)
        first_row = pl.multiple_of(lax.div(offset, jnp.int32(num_rows)) * num_rows, num_rows)
        rows = pl.ds(first_row, num_rows)
        block = self._entry(cursor, count, index)

        num_written = writes.count[0]
        write_slot = _rem(num_written, WRITE_SLOTS)
        pl.when(num_written >= WRITE_SLOTS)(lambda: self._write_copy(write_slot, block, rows).wait())
        for which in range(2):
            old = kv[slot, index, which, :, rows]  # [num_kv_heads, written_rows, head_dim]
            is_new = first_row + lax.broadcasted_iota(jnp.int32, old.shape, 1) == offset
            merged = jnp.where(is_new, writes.new[slot, which], old)
            kv[slot, index, which, :, rows] = merged
            # A separate copy: invisible values of the chunk are cleared, and the next chunk needs its slot sooner.
            writes.rows[write_slot, which] = merged
        self._write_copy(write_slot, block, rows).start()
        writes.count[0] = num_written + 1

    def begin(self) -> None:
        """Reset the count of writes."""
        if self._launch.is_fused:
            self._writes.count[0] = jnp.int32(0)

    def _drain_writes(self) -> None:
        num_written, rows = self._writes.count[0], pl.ds(0, self._launch.written_rows)
        lax.fori_loop(
            jnp.maximum(num_written - WRITE_SLOTS, 0),
            num_written,
            lambda nth, _: self._write_copy(_rem(nth, WRITE_SLOTS), jnp.int32(0), rows).wait(),
            None,
        )

    def wait_chunk(self, cursor: Cursor, count: Array) -> None:
        """Wait for a chunk, and with the first chunk of a tile for the tile's queries."""
        pl.when(self._is_first(cursor))(lambda: self._query_copy(cursor).wait())
        self._wait_for_blocks(cursor, _rem(count, self._launch.sizes.buffers))

    def queries(self, cursor: Cursor, head: Array, row_tiles: int) -> Array:
        """One KV head's queries of a tile. [rows, head_dim]"""
        slot = _rem(cursor.nth, self._launch.sizes.buffers)
        q = self._buffers.q[slot, pl.ds(0, row_tiles), head]  # [row_tiles, rows, head_dim]
        return q.reshape(-1, self._launch.head_dim)

    def keys(self, slot: Array, head: Array) -> Array:
        """One KV head's keys of a chunk, as stored. [chunk_tokens, head_dim]"""
        keys = self._buffers.kv[slot, :, 0, head]  # [chunk_blocks, block_size, head_dim]
        return keys.astype(self._launch.q_dtype).reshape(-1, self._launch.head_dim)

    def values(self, slot: Array, head: Array, seen_from: Array, seen_to: Array) -> Array:
        """One KV head's values of a chunk, as stored; invisible values are finite. [chunk_tokens, head_dim]"""
        launch = self._launch
        values = self._buffers.kv[slot, :, 1, head]  # [chunk_blocks, block_size, head_dim]
        values = values.astype(launch.q_dtype).reshape(-1, launch.head_dim)
        if not launch.masks_values_on_use:
            return values
        position = lax.broadcasted_iota(jnp.int32, values.shape, 0)
        return jnp.where((position >= seen_from) & (position < seen_to), values, jnp.zeros_like(values))

    def clear_unseen_values(self, cursor: Cursor, slot: Array, tile: Tile) -> None:
        """Zero the chunk's values that no query of the tile sees: they may be NaN, and 0 * NaN is NaN."""
        launch = self._launch
        if not launch.clears_values:
            return
        begin, end = self._blocks(cursor)
        first = cursor.chunk * launch.chunk_tokens

        def clear(index: Array, _: None) -> None:
            values = self._buffers.kv[slot, index, 1]  # [num_kv_heads, block_size, head_dim]
            position = first + index * launch.block_size + lax.broadcasted_iota(jnp.int32, values.shape, 1)
            is_seen = (position >= tile.seen_from) & (position < tile.seen_to)
            self._buffers.kv[slot, index, 1] = jnp.where(is_seen, values, jnp.zeros_like(values))

        if launch.scoring.sliding_window is not None:
            is_cut = first + begin * launch.block_size < tile.seen_from
            lax.fori_loop(0, begin + is_cut.astype(jnp.int32), clear, None)
        is_cut = first + end * launch.block_size > tile.seen_to
        lax.fori_loop(end - is_cut.astype(jnp.int32), launch.sizes.chunk_blocks, clear, None)

    def spread_scales(self, cursor: Cursor, slot: Array) -> Ref:
        """The chunk's scales, a row of its tokens for each K head, then each V head; 0 where no block was read."""
        launch, buffers = self._launch, self._buffers.scales
        assert buffers is not None
        for index in range(launch.sizes.chunk_blocks):
            buffers.rows[pl.ds(index, 1)] = buffers.landed[slot, index]
        rows = buffers.rows[...]  # [chunk_blocks, scale_lanes]
        begin, end = self._blocks(cursor)
        block = lax.broadcasted_iota(jnp.int32, rows.shape, 0)
        rows = jnp.where((block >= begin) & (block < end), rows, 0)
        # A product with ones at each block's tokens. Its sums have one term each, so they are exact in float32.
        shape = (launch.sizes.chunk_blocks, launch.chunk_tokens)
        block_of_token = lax.div(lax.broadcasted_iota(jnp.int32, shape, 1), jnp.int32(launch.block_size))
        is_of_block = (lax.broadcasted_iota(jnp.int32, shape, 0) == block_of_token).astype(jnp.float32)
        buffers.spread[...] = lax.dot_general(
            rows,
            is_of_block,
            (((0,), (0,)), ((), ())),
            precision=lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
        )
        return buffers.spread

    def _output_copy(self, nth: Array) -> Copy:
        tile, slot = self._tile(nth), _rem(nth, OUTPUT_SLOTS)
        return pltpu.make_async_copy(
            self._buffers.out.at[slot, pl.ds(0, tile.row_tiles)],
            self._operands.out.at[pl.ds(tile.row_tile, tile.row_tiles)],
            self._buffers.out_left.at[slot],
        )

    def wait_for_output_slot(self, cursor: Cursor) -> None:
        """Wait until the output slot of a tile is free."""
        pl.when(cursor.nth >= OUTPUT_SLOTS)(lambda: self._output_copy(cursor.nth - OUTPUT_SLOTS).wait())

    def store_outputs(self, cursor: Cursor, head: Array, row_tiles: int, rows: Array) -> None:
        """Put one KV head's outputs of a tile into its slot."""
        shape = (row_tiles, self._launch.rows.count, self._launch.head_dim)
        slot = _rem(cursor.nth, OUTPUT_SLOTS)
        self._buffers.out[slot, pl.ds(0, row_tiles), head] = rows.astype(self._launch.q_dtype).reshape(shape)

    def start_output(self, cursor: Cursor) -> None:
        """Start to write a tile's outputs."""
        self._output_copy(cursor.nth).start()

    def drain(self) -> None:
        """Wait for the last outputs and writes."""
        if self._launch.is_fused:
            self._drain_writes()
        num_mine = lax.div(
            self._num_tiles - self._core + (self._launch.num_cores - 1), jnp.int32(self._launch.num_cores)
        )
        lax.fori_loop(
            jnp.maximum(num_mine - OUTPUT_SLOTS, 0), num_mine, lambda nth, _: self._output_copy(nth).wait(), None
        )
