"""The ragged paged attention kernel: a stream of chunks of K and V, and a softmax of each tile over its chunks.

Every core takes each ``num_cores``-th tile. The chunks of all tiles of a core form one line, across tiles. While the
core attends a chunk, the copies of the next chunks are in flight. The copies of pieces of block tables come before
them. So a core waits for the first chunk of a launch only. It reads only blocks that some query of a tile sees.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Float, Int

from pallas_kernels.block_pool.layout import BlockPool
from pallas_kernels.chips.memory import Ref
from pallas_kernels.chips.tpu import LANES, in_hbm
from pallas_kernels.paged_attention.tpu.launch import TABLE_PIECE, Launch
from pallas_kernels.paged_attention.tpu.stream import (
    OUTPUT_SLOTS,
    WRITE_SLOTS,
    Buffers,
    Cursor,
    Operands,
    ScaleBuffers,
    Stream,
    Tile,
    WriteBuffers,
)

LOG2E = math.log2(math.e)

LEAST = -1e30
"""The running maximum before any score: finite, since minus infinity less itself is NaN, where no slot is visible."""


class State(NamedTuple):
    """The running softmax of a tile; logits are in powers of two."""

    top: Ref  # [num_kv_heads, tile_rows, LANES] f32, all lanes alike
    total: Ref  # likewise
    weighted: Ref  # [num_kv_heads, tile_rows, head_dim] f32


class PerHead(NamedTuple):
    """Numbers of each query head, laid out as the rows of a row tile, all lanes alike."""

    slopes: Ref | None  # [num_kv_heads, rows, LANES] f32, times log2(e)
    sinks: Ref | None  # likewise


class Inputs(NamedTuple):
    """The operands of the kernel, as XLA makes them."""

    layer_and_count: Int[Array, " 2"]  # the layer, and how many tiles there are
    tiles: Int[Array, " tiles_times_fields"]
    tables: Int[Array, "num_seqs pieces 1 entries"]
    q: Float[Array, "row_tiles num_kv_heads rows head_dim"]
    pool: BlockPool
    scales: Float[Array, "num_blocks 1 scale_lanes"] | None
    slopes: Float[Array, "num_kv_heads rows lanes"] | None
    sinks: Float[Array, "num_kv_heads rows lanes"] | None
    new: Float[Array, "tokens 2 num_kv_heads 1 head_dim"] | None


class Chunk(NamedTuple):
    """The chunk that the core attends."""

    cursor: Cursor
    tile: Tile
    slot: Array  # of the buffers
    start: Array  # position of its first token
    scales: Ref | None  # [scale_lanes, chunk_tokens] f32


@dataclass(frozen=True)
class Attention:
    """One core's attention of all its tiles."""

    launch: Launch
    stream: Stream
    state: State
    per_head: PerHead

    def run(self) -> None:
        """Attend every tile."""
        stream, buffers = self.stream, self.launch.sizes.buffers

        def advance(carry: tuple[Array, Cursor, Cursor, Cursor]) -> tuple[Array, Cursor, Cursor, Cursor]:
            count, now, blocks_ahead, table_ahead = carry
            has_tables = count > -buffers
            stream.start_table(table_ahead, count + buffers)
            pl.when(has_tables)(lambda: stream.start_chunk(blocks_ahead, count + buffers - 1))

            @pl.when(count >= 0)
            def _attend() -> None:
                stream.wait_chunk(now, count)
                stream.write_new(now, count)
                self._attend_chunk(now, count)

            return (
                count + 1,
                stream.after(now, count >= 0),
                stream.after(blocks_ahead, has_tables),
                stream.after(table_ahead, True),
            )

        stream.begin()
        first = stream.first()
        # Iterations below 0 only start copies.
        lax.while_loop(lambda carry: stream.is_live(carry[1]), advance, (jnp.int32(-buffers), first, first, first))
        stream.drain()

    def _attend_chunk(self, now: Cursor, count: Array) -> None:
        launch, tile = self.launch, self.stream.tile(now)
        slot = lax.rem(count, jnp.int32(launch.sizes.buffers))
        self.stream.clear_unseen_values(now, slot, tile)
        scales = self.stream.spread_scales(now, slot) if launch.is_quantized else None
        chunk = Chunk(now, tile, slot, now.chunk * launch.chunk_tokens, scales)

        def attend(row_tiles: int) -> None:
            pl.when(now.chunk == tile.first_chunk)(lambda: self._begin(row_tiles))
            self._for_heads(row_tiles, lambda head: self._attend_head(chunk, row_tiles, head))
            pl.when(now.chunk == tile.last_chunk)(lambda: self._end(now, row_tiles))

        # A single row tile, as of a decode, must not cost as much as a whole tile of rows.
        most = launch.sizes.tile_row_tiles
        pl.when(tile.row_tiles == 1)(lambda: attend(1))
        if most > 1:
            pl.when(tile.row_tiles > 1)(lambda: attend(most))

    def _for_heads(self, row_tiles: int, body: Callable[[Array], None]) -> None:
        unroll = self.launch.head_unroll(row_tiles)

        def step(index: Array, _: None) -> None:
            for nth in range(unroll):
                body(index * unroll + nth)

        lax.fori_loop(0, self.launch.num_kv_heads // unroll, step, None)

    def _begin(self, row_tiles: int) -> None:
        state, num_rows = self.state, row_tiles * self.launch.rows.count

        def begin(head: Array) -> None:
            rows, shape = (head, pl.ds(0, num_rows)), (num_rows, LANES)
            if self.per_head.sinks is None:
                state.top[rows] = jnp.full(shape, LEAST, jnp.float32)
                state.total[rows] = jnp.zeros(shape, jnp.float32)
            else:  # a sink is one more score, of a slot without a value
                state.top[rows] = _of_rows(self.per_head.sinks, head, row_tiles)
                state.total[rows] = jnp.ones(shape, jnp.float32)
            state.weighted[rows] = jnp.zeros((num_rows, self.launch.head_dim), jnp.float32)

        self._for_heads(row_tiles, begin)

    def _attend_head(self, chunk: Chunk, row_tiles: int, head: Array) -> None:
        """One KV head's part of a chunk for all query rows of a tile."""
        launch, stream, state = self.launch, self.stream, self.state
        precision = lax.Precision.HIGHEST if launch.q_dtype == jnp.float32 else None
        dot = partial(lax.dot_general, precision=precision, preferred_element_type=jnp.float32)
        q = stream.queries(chunk.cursor, head, row_tiles)  # [rows, head_dim]
        keys = stream.keys(chunk.slot, head)  # [chunk_tokens, head_dim]
        scores, visible = self._score(dot(q, keys, (((1,), (1,)), ((), ()))), chunk, row_tiles, head)

        rows = (head, pl.ds(0, row_tiles * launch.rows.count))
        old_top = state.top[rows]
        top = jnp.maximum(old_top, scores.max(axis=1, keepdims=True))
        shrink = jnp.exp2(old_top - top)
        weights = jnp.exp2(scores - top[:, :1])  # [rows, chunk_tokens] f32
        state.top[rows] = top
        state.total[rows] = state.total[rows] * shrink + weights.sum(axis=1, keepdims=True)
        if chunk.scales is not None:
            v_scales = chunk.scales[pl.ds(launch.num_kv_heads + head, 1), :]
            weights = jnp.where(visible, weights * v_scales, 0)
        values = stream.values(chunk.slot, head, chunk.tile.seen_from - chunk.start, chunk.tile.seen_to - chunk.start)
        weighted = dot(weights.astype(values.dtype), values, (((1,), (0,)), ((), ())))
        state.weighted[rows] = state.weighted[rows] * shrink[:, :1] + weighted

    def _score(self, products: Array, chunk: Chunk, row_tiles: int, head: Array) -> tuple[Array, Array]:
        """Logits in powers of two, minus infinity for invisible keys, and the mask of visible keys."""
        launch, scoring = self.launch, self.launch.scoring
        kv_pos = chunk.start + lax.broadcasted_iota(jnp.int32, products.shape, 1)
        row = lax.broadcasted_iota(jnp.int32, products.shape, 0)
        q_pos = chunk.tile.q_pos + lax.div(row, jnp.int32(launch.rows.token_rows))
        distance = kv_pos - q_pos  # 0 at the query itself
        visible = distance <= 0
        if scoring.sliding_window is not None:
            visible &= distance > -scoring.sliding_window

        scores = products if chunk.scales is None else products * chunk.scales[pl.ds(head, 1), :]
        if scoring.soft_cap is None:
            scores = scores * (scoring.sm_scale * LOG2E)
        else:
            scores = jnp.tanh(scores * (scoring.sm_scale / scoring.soft_cap)) * (scoring.soft_cap * LOG2E)
        if self.per_head.slopes is not None:
            slopes = _of_rows(self.per_head.slopes, head, row_tiles)
            scores = scores + slopes[:, :1] * distance.astype(jnp.float32)
        return jnp.where(visible, scores, -jnp.inf), visible

    def _end(self, now: Cursor, row_tiles: int) -> None:
        self.stream.wait_for_output_slot(now)

        def end(head: Array) -> None:
            rows = (head, pl.ds(0, row_tiles * self.launch.rows.count))
            outputs = self.state.weighted[rows] / self.state.total[rows][:, :1]
            self.stream.store_outputs(now, head, row_tiles, outputs)

        self._for_heads(row_tiles, end)
        self.stream.start_output(now)


def _of_rows(per_head: Ref, head: Array, row_tiles: int) -> Array:
    """Numbers of one KV head's query heads for every row of a tile. [rows, LANES]"""
    of_row_tile = per_head[head]
    return of_row_tile if row_tiles == 1 else jnp.concatenate([of_row_tile] * row_tiles, axis=0)


def rows_of_heads(x: Float[Array, " num_heads"], launch: Launch) -> Float[Array, "num_kv_heads rows lanes"]:
    """A logit or slope of each query head, in powers of two, for all rows of a row tile."""
    rows = launch.rows
    x = (x.astype(jnp.float32) * LOG2E).reshape(launch.num_kv_heads, 1, -1)
    x = jnp.pad(x, ((0, 0), (0, 0), (0, rows.token_rows - x.shape[2])))
    x = jnp.broadcast_to(x, (launch.num_kv_heads, rows.tokens, rows.token_rows))
    return jnp.broadcast_to(x.reshape(launch.num_kv_heads, rows.count, 1), (launch.num_kv_heads, rows.count, LANES))


def attend_packed(
    launch: Launch, inputs: Inputs, interpret: pltpu.InterpretParams | None
) -> tuple[Array, BlockPool | None]:
    """Launch the kernel.

    Returns:
        The outputs, packed like the queries, and the pool with the new K and V, if there are new ones.
    """
    inputs = inputs._replace(pool=in_hbm(inputs.pool, interpret))
    fields = [name for name, x in inputs._asdict().items() if x is not None]

    def body(*refs: Ref) -> None:
        given = dict(zip(fields, refs, strict=False))
        *results, buffers, state = refs[len(fields) :]
        slopes, sinks = given.pop("slopes", None), given.pop("sinks", None)
        out = results[0]
        if launch.is_fused:
            given["pool"] = results[1]
        operands = Operands(**given, out=out)
        Attention(launch, Stream(launch, operands, buffers), state, PerHead(slopes, sinks)).run()

    def memory(name: str) -> pl.BlockSpec:
        return pl.BlockSpec(memory_space=pltpu.VMEM if name in PerHead._fields else pl.ANY)

    num_scalars = 2
    results = [inputs.q, *([inputs.pool] if launch.is_fused else [])]
    out, *pool = pl.pallas_call(
        body,
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in results],
        input_output_aliases={fields.index("pool"): 1} if launch.is_fused else {},
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=num_scalars,
            grid=(launch.num_cores,),
            in_specs=[memory(name) for name in fields[num_scalars:]],
            out_specs=[pl.BlockSpec(memory_space=pl.ANY)] * len(results),
            scratch_shapes=[_buffers(launch), _state(launch)],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=launch.vmem_limit),
        interpret=interpret or False,
        name="paged_attention",
    )(*(x for x in inputs if x is not None))
    return out, pool[0] if pool else None


def _buffers(launch: Launch) -> Buffers:
    sizes, dma = launch.sizes, pltpu.SemaphoreType.DMA
    tile = (sizes.tile_row_tiles, launch.num_kv_heads, launch.rows.count, launch.head_dim)
    chunk = (sizes.chunk_blocks, 2, launch.num_kv_heads, launch.block_size, launch.head_dim)
    return Buffers(
        table=pltpu.SMEM((sizes.buffers + 1, 1, TABLE_PIECE), jnp.int32),
        kv=pltpu.VMEM((sizes.buffers, *chunk), launch.pool_dtype),
        q=pltpu.VMEM((sizes.buffers, *tile), launch.q_dtype),
        out=pltpu.VMEM((OUTPUT_SLOTS, *tile), launch.q_dtype),
        table_landed=dma((sizes.buffers + 1,)),
        kv_landed=dma((sizes.buffers,)),
        q_landed=dma((sizes.buffers,)),
        out_left=dma((OUTPUT_SLOTS,)),
        scales=_scale_buffers(launch) if launch.is_quantized else None,
        writes=_write_buffers(launch) if launch.is_fused else None,
    )


def _scale_buffers(launch: Launch) -> ScaleBuffers:
    sizes = launch.sizes
    return ScaleBuffers(
        landed=pltpu.VMEM((sizes.buffers, sizes.chunk_blocks, 1, launch.scale_lanes), jnp.float32),
        rows=pltpu.VMEM((sizes.chunk_blocks, launch.scale_lanes), jnp.float32),
        spread=pltpu.VMEM((launch.scale_lanes, launch.chunk_tokens), jnp.float32),
    )


def _write_buffers(launch: Launch) -> WriteBuffers:
    buffers, dma = launch.sizes.buffers, pltpu.SemaphoreType.DMA
    token = (2, launch.num_kv_heads, 1, launch.head_dim)
    rows = (2, launch.num_kv_heads, launch.written_rows, launch.head_dim)
    return WriteBuffers(
        new=pltpu.VMEM((buffers, *token), launch.pool_dtype),
        rows=pltpu.VMEM((WRITE_SLOTS, *rows), launch.pool_dtype),
        count=pltpu.SMEM((1,), jnp.int32),
        landed=dma((buffers,)),
        left=dma((WRITE_SLOTS,)),
    )


def _state(launch: Launch) -> State:
    column = pltpu.VMEM((launch.num_kv_heads, launch.tile_rows, LANES), jnp.float32)
    return State(column, column, pltpu.VMEM((launch.num_kv_heads, launch.tile_rows, launch.head_dim), jnp.float32))
