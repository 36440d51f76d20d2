"""Portable paged attention in plain XLA: ragged prefill and decode in one call, in bounded memory.

The batch becomes a list of equal work items: one tile of queries against one chunk of one sequence's context. Each
iteration of a loop on the device takes a fixed number of items. It merges their partial softmaxes into the running
softmaxes of the tiles (as in FlashAttention, arXiv:2205.14135). So the work follows the sequences' lengths, however
unequal they are, and padding costs nothing.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from pallas_kernels.block_pool.layout import BlockPool, is_quantized, shape_of
from pallas_kernels.block_pool.xla import read_kv, read_kv_scales
from pallas_kernels.paged_attention.call import Call, KvLayer, Scoring

LEAST = -1e30
"""The running maximum before any score: finite, since minus infinity less itself is NaN, where no slot is visible."""

PREFILL_TILE = 64
CHUNK_TOKENS = 128

SMALL_STEP_TOKENS, SMALL_TILE = 64, 8
"""Steps of prompts that are so small have one pass, of short tiles: it compiles in two thirds of the time of two."""


class Rows(NamedTuple):
    """The rows that one pass attends; ``q_lens`` is 0 for all other rows.

    Queries see no position before ``first_seen``, and none from ``seen_end`` on; None limits nothing.
    """

    block_tables: Int[Array, "num_seqs max_blocks"]
    kv_lens: Int[Array, " num_seqs"]
    cu_q_lens: Int[Array, " num_seqs_plus_1"]
    q_lens: Int[Array, " num_seqs"]
    first_seen: Int[Array, " num_seqs"] | None = None
    seen_end: Int[Array, " num_seqs"] | None = None


class GroupedHeads(NamedTuple):
    """Numbers of each query head, by the KV head that the query head reads."""

    slopes: Float[Array, "num_kv_heads group"] | None
    sinks: Float[Array, "num_kv_heads group"] | None


class Tiles(NamedTuple):
    """The queries of a pass, packed without gaps and cut into tiles of equal length.

    ``row_and_position`` says whose query it is (num_seqs past the last one) and where it sits in its sequence.
    ``token`` is its index in the batch.
    """

    q: Float[Array, "tiles num_kv_heads tile_len group head_dim"]
    token: Int[Array, "tiles tile_len"]
    row_and_position: Int[Array, "tiles tile_len 2"]
    packed_start: Int[Array, " num_seqs_plus_1"]  # row i's queries are packed_start[i]:packed_start[i + 1]


class Segments(NamedTuple):
    """A segment is the queries of one row in one tile. Segment i has the work items first_item[i]:first_item[i + 1].

    All fields are in one array, because every iteration of the loop gathers them.
    """

    fields: Int[Array, "segments 5"]  # row, tile, first position seen, position after the last one seen, first item
    first_item: Int[Array, " segments_plus_1"]


class Items(NamedTuple):
    """The work of one iteration: tile ``tile[i]`` against one chunk of the context of row ``row[i]``."""

    is_live: Bool[Array, " items"]
    row: Int[Array, " items"]
    tile: Int[Array, " items"]
    context_start: Int[Array, " items"]
    context_end: Int[Array, " items"]
    blocks: Int[Array, "items chunk_blocks"]  # logical


class Softmax(NamedTuple):
    """A running softmax: the largest score, and the sums of exp(score - top) and of exp(score - top) * value."""

    top: Float[Array, "tiles num_kv_heads tile_len group"]
    total: Float[Array, "tiles num_kv_heads tile_len group"]
    weighted: Float[Array, "tiles num_kv_heads tile_len group head_dim"]


@jax.jit
def attend_xla(call: Call) -> Float[Array, "tokens num_heads head_dim"]:
    """Attention of every query over its sequence's blocks, on any device."""
    if not call.has_work:
        return jnp.zeros_like(call.q)
    num_tokens, num_kv_heads = call.num_tokens, shape_of(call.kv.pool).num_kv_heads

    def split_heads(x: Array | None) -> Array | None:
        return None if x is None else x.astype(jnp.float32).reshape(num_kv_heads, -1)

    grouped_q = call.q.reshape(num_tokens, num_kv_heads, call.num_heads // num_kv_heads, call.head_dim)
    heads = GroupedHeads(*(split_heads(x) for x in call.heads))
    q_lens = jnp.diff(call.batch.cu_q_lens)

    def attend(is_attended: Bool[Array, " num_seqs"], max_queries: int, tile_len: int) -> Array:
        rows = Rows(*call.batch, jnp.where(is_attended, q_lens, 0))
        tiles = _pack(grouped_q, rows, max_queries, tile_len)
        out = _divided(_attend_tiles(tiles, rows, call.kv, call.scoring, heads))
        return _unpack(out, tiles, rows, num_tokens).reshape(call.q.shape).astype(call.q.dtype)

    if call.reads_shared_once:
        assert call.shared_lens is not None
        shared = _attend_shared(grouped_q, call, call.shared_lens)
        rows = Rows(*call.batch, q_lens, first_seen=jnp.where(q_lens > 0, call.shared_lens, 0))
        tiles = _pack(grouped_q, rows, num_tokens, 1)
        out = _divided(_attend_tiles(tiles, rows, call.kv, call.scoring, heads, _of_tiles(shared, tiles, rows)))
        return _unpack(out, tiles, rows, num_tokens).reshape(call.q.shape).astype(call.q.dtype)

    if not call.may_have_prompts:
        # Tiles of one query serve a prefill among decodes too, only less quickly.
        return attend(q_lens > 0, num_tokens, 1)
    if num_tokens <= SMALL_STEP_TOKENS:
        return attend(q_lens > 0, num_tokens, min(SMALL_TILE, num_tokens))
    # Two passes, because a long tile costs the same for a single query as for as many as the tile holds.
    return attend(q_lens == 1, call.num_seqs, 1) + attend(q_lens > 1, num_tokens, min(PREFILL_TILE, num_tokens))


def _attend_shared(
    q: Float[Array, "tokens num_kv_heads group head_dim"], call: Call, shared_lens: Int[Array, " num_seqs"]
) -> Softmax:
    """The softmaxes of all queries over the shared tokens, [tokens, num_kv_heads, 1, group]."""
    num_tokens, shared_len = len(q), shared_lens.max()
    rows = Rows(
        call.batch.block_tables[shared_lens.argmax()][None],
        (shared_len + num_tokens)[None],
        jnp.array([0, num_tokens], jnp.int32),
        jnp.where(shared_len > 0, num_tokens, 0)[None],
        seen_end=shared_len[None],
    )
    tiles = _pack(q, rows, num_tokens, min(PREFILL_TILE, num_tokens))
    done = _attend_tiles(tiles, rows, call.kv, call.scoring, GroupedHeads(None, None))

    def by_token(x: Float[Array, "tiles num_kv_heads tile_len group *head_dim"]) -> Array:
        return jnp.moveaxis(x, 1, 2).reshape(-1, x.shape[1], 1, *x.shape[3:])[:num_tokens]

    return jax.tree.map(by_token, done)


def _of_tiles(shared: Softmax, tiles: Tiles, rows: Rows) -> Softmax:
    """The softmaxes over the shared tokens of tiles of one query; those of rows without such tokens are empty."""
    assert rows.first_seen is not None
    row, _ = jnp.unstack(tiles.row_and_position[:, 0], axis=-1)
    has_shared = rows.first_seen.at[row].get(mode="fill", fill_value=0) > 0

    def of_tiles(x: Array, empty: float) -> Array:
        return jnp.where(has_shared.reshape(-1, *[1] * (x.ndim - 1)), x[tiles.token[:, 0]], empty)

    return Softmax(of_tiles(shared.top, LEAST), of_tiles(shared.total, 0), of_tiles(shared.weighted, 0))


def _divided(done: Softmax) -> Float[Array, "tiles num_kv_heads tile_len group head_dim"]:
    return done.weighted / jnp.where(done.total == 0, 1, done.total)[..., None]


def _starts(lens: Int[Array, " n"]) -> Int[Array, " n_plus_1"]:
    return jnp.pad(jnp.cumsum(lens, dtype=jnp.int32), (1, 0))


def _owner(starts: Int[Array, " n_plus_1"], index: Int[Array, " m"]) -> Int[Array, " m"]:
    """The i with starts[i] <= index < starts[i + 1], or n past the end."""
    return jnp.searchsorted(starts, index, side="right", method="compare_all").astype(jnp.int32) - 1


def _pack(q: Float[Array, "tokens num_kv_heads group head_dim"], rows: Rows, max_queries: int, tile_len: int) -> Tiles:
    num_seqs, num_tiles = rows.q_lens.size, -(-max_queries // tile_len)
    packed_start = _starts(rows.q_lens)
    packed = jnp.arange(num_tiles * tile_len, dtype=jnp.int32)
    row = _owner(packed_start, packed)
    owner = jnp.minimum(row, num_seqs - 1)
    offset = packed - packed_start[owner]
    token = jnp.where(row < num_seqs, rows.cu_q_lens[owner] + offset, 0)
    position = rows.kv_lens[owner] - rows.q_lens[owner] + offset
    tiled = q.at[token].get(mode="clip").reshape(num_tiles, tile_len, *q.shape[1:])
    return Tiles(
        tiled.transpose(0, 2, 1, 3, 4),
        token.reshape(num_tiles, tile_len),
        jnp.stack([row, position], axis=-1).reshape(num_tiles, tile_len, 2),
        packed_start,
    )


def _unpack(
    out: Float[Array, "tiles num_kv_heads tile_len group head_dim"], tiles: Tiles, rows: Rows, num_tokens: int
) -> Float[Array, "tokens num_kv_heads group head_dim"]:
    """Outputs in the order of the batch's tokens, zero for tokens that the pass did not attend."""
    num_seqs = rows.q_lens.size
    token = jnp.arange(num_tokens, dtype=jnp.int32)
    row = _owner(rows.cu_q_lens, token)
    owner = jnp.minimum(row, num_seqs - 1)
    is_attended = (row < num_seqs) & (rows.q_lens[owner] > 0)
    packed = tiles.packed_start[owner] + token - rows.cu_q_lens[owner]
    tile, offset = jnp.divmod(packed, out.shape[2])
    by_token = out.at[tile, :, offset].get(mode="clip")
    return jnp.where(is_attended[:, None, None, None], by_token, 0)


def _segments(tiles: Tiles, rows: Rows, window: int | None, block_size: int, chunk_len: int) -> Segments:
    num_tiles, tile_len, _ = tiles.row_and_position.shape
    num_seqs, begin, end = rows.q_lens.size, tiles.packed_start[:-1], tiles.packed_start[1:]
    first_tile = begin // tile_len
    first_segment = _starts(jnp.where(rows.q_lens > 0, (end - 1) // tile_len - first_tile + 1, 0))
    # Every tile begins a segment; so does every row but the first, unless (always, in tiles of one) it begins a tile.
    segment = jnp.arange(num_tiles + (num_seqs - 1 if tile_len > 1 else 0), dtype=jnp.int32)
    row = _owner(first_segment, segment)
    owner = jnp.minimum(row, num_seqs - 1)
    tile = jnp.minimum(first_tile[owner] + segment - first_segment[owner], num_tiles - 1)

    position_of_packed = rows.kv_lens[owner] - end[owner]
    context_end = position_of_packed + jnp.minimum(end[owner], (tile + 1) * tile_len)
    if rows.seen_end is not None:
        context_end = jnp.minimum(context_end, rows.seen_end[owner])
    context_start = jnp.zeros_like(context_end) if rows.first_seen is None else rows.first_seen[owner]
    if window is not None:
        first_query = position_of_packed + jnp.maximum(begin[owner], tile * tile_len)
        context_start = jnp.maximum(first_query - window + 1, context_start)
    chunks = -(-(context_end - context_start // block_size * block_size) // chunk_len)
    first_item = _starts(jnp.where(row < num_seqs, chunks, 0))
    return Segments(jnp.stack([owner, tile, context_start, context_end, first_item[:-1]], axis=-1), first_item)


def _take_items(segments: Segments, first: Int[Array, ""], num_items: int, block_size: int, chunk_blocks: int) -> Items:
    item = first + jnp.arange(num_items, dtype=jnp.int32)
    segment = jnp.minimum(_owner(segments.first_item, item), len(segments.fields) - 1)
    row, tile, context_start, context_end, first_item = jnp.unstack(segments.fields[segment], axis=1)
    first_block = context_start // block_size + (item - first_item) * chunk_blocks
    blocks = first_block[:, None] + jnp.arange(chunk_blocks, dtype=jnp.int32)[None, :]
    return Items(item < segments.first_item[-1], row, tile, context_start, context_end, blocks)


def _attend_tiles(
    tiles: Tiles,
    rows: Rows,
    kv: KvLayer,
    scoring: Scoring,
    heads: GroupedHeads,
    earlier: Softmax | None = None,
) -> Softmax:
    """The softmaxes of the tiles, which go on from earlier ones if there are any."""
    block_size = shape_of(kv.pool).block_size
    chunk_blocks, items_per_iteration = _sizes(tiles, kv.pool, rows.block_tables.shape[1])
    segments = _segments(tiles, rows, scoring.sliding_window, block_size, chunk_blocks * block_size)

    def attend_some(index: Int[Array, ""], running: Softmax) -> Softmax:
        items = _take_items(segments, index * items_per_iteration, items_per_iteration, block_size, chunk_blocks)
        return _merge(running, _attend_items(items, tiles, rows, kv, scoring, heads), items)

    shape = tiles.q.shape[:-1]
    # A sink is one more score, of a slot without a value.
    sinks = heads.sinks
    top = jnp.full(shape, LEAST, jnp.float32) if sinks is None else jnp.broadcast_to(sinks[None, :, None, :], shape)
    total = jnp.full(shape, 0 if sinks is None else 1, jnp.float32)
    start = Softmax(top, total, jnp.zeros(tiles.q.shape, jnp.float32))
    if earlier is not None:
        start = _joined(start, earlier)
    iterations = -(-segments.first_item[-1] // items_per_iteration)
    return lax.fori_loop(0, iterations, attend_some, start)


def _joined(one: Softmax, other: Softmax) -> Softmax:
    top = jnp.maximum(one.top, other.top)
    keeps = [jnp.exp(part.top - top) for part in (one, other)]
    total = one.total * keeps[0] + other.total * keeps[1]
    return Softmax(top, total, one.weighted * keeps[0][..., None] + other.weighted * keeps[1][..., None])


def _attend_items(
    items: Items, tiles: Tiles, rows: Rows, kv: KvLayer, scoring: Scoring, heads: GroupedHeads
) -> Softmax:
    """Each item's own softmax over its own chunk, [items, ...] in place of [tiles, ...]."""
    block_size, max_blocks = shape_of(kv.pool).block_size, rows.block_tables.shape[1]
    is_read = items.is_live[:, None] & (items.blocks * block_size < items.context_end[:, None])
    table_entry = rows.block_tables[items.row[:, None], jnp.minimum(items.blocks, max_blocks - 1)]
    k, v, k_scales = _read(kv, jnp.where(is_read, table_entry, 0), tiles.q.dtype)

    kv_pos = items.blocks[:, :1] * block_size + jnp.arange(k.shape[2], dtype=jnp.int32)[None, :]
    in_context = (kv_pos >= items.context_start[:, None]) & (kv_pos < items.context_end[:, None])
    in_context &= items.is_live[:, None]
    # Invisible slots can hold anything, and 0 * NaN is NaN: weights of zero are not enough.
    v = jnp.where(in_context[:, None, :, None], v, 0)

    q = tiles.q[items.tile]
    q_row, q_pos = jnp.unstack(tiles.row_and_position[items.tile], axis=-1)
    distance = kv_pos[:, None, :] - q_pos[:, :, None]  # [items, tile_len, context], 0 at the query itself
    is_own = q_row == items.row[:, None]  # a tile may hold queries of other rows too
    visible = in_context[:, None, :] & is_own[:, :, None] & (distance <= 0)
    if scoring.sliding_window is not None:
        visible &= distance > -scoring.sliding_window

    precision = lax.Precision.HIGHEST if v.dtype == jnp.float32 else None
    dot = partial(jnp.einsum, precision=precision, preferred_element_type=jnp.float32)
    scores = dot("nhtgd,nhcd->nhtgc", q, k) * scoring.sm_scale
    if k_scales is not None:
        scores = scores * k_scales[:, :, None, None, :]
    if scoring.soft_cap is not None:
        scores = scoring.soft_cap * jnp.tanh(scores / scoring.soft_cap)
    if heads.slopes is not None:
        bias = heads.slopes[None, :, None, :, None] * distance.astype(jnp.float32)[:, None, :, None, :]
        scores = scores + bias
    scores = jnp.where(visible[:, None, :, None, :], scores, -jnp.inf)
    top = scores.max(axis=-1, initial=LEAST)
    weights = jnp.exp(scores - top[..., None])
    total = weights.sum(axis=-1)
    weighted = dot("nhtgc,nhcd->nhtgd", weights.astype(v.dtype), v)
    # A query of another row weighs all values of this row by zero, and these may have overflowed.
    return Softmax(top, total, jnp.where(total[..., None] > 0, weighted, 0))


def _read(
    kv: KvLayer, blocks: Int[Array, "items chunk_blocks"], dtype: jnp.dtype
) -> tuple[
    Float[Array, "items num_kv_heads context head_dim"],
    Float[Array, "items num_kv_heads context head_dim"],
    Float[Array, "items num_kv_heads context"] | None,
]:
    """K and V in the queries' type, and the scales, if any, that remain to be multiplied into the scores.

    K as stored is exact in every float type, so its scales multiply the scores, which are float32. V is multiplied
    here, since a float16 weight times a small scale could vanish.
    """
    k, v = read_kv(kv.pool, kv.layer, blocks)
    if kv.kv_scales is None:
        return k, v, None
    k_scales, v_scales = read_kv_scales(kv.kv_scales, kv.layer, blocks, shape_of(kv.pool).block_size)
    return k.astype(dtype), (v.astype(jnp.float32) * v_scales[..., None]).astype(dtype), k_scales


def _merge(running: Softmax, partials: Softmax, items: Items) -> Softmax:
    """The running softmax of each tile, with the softmaxes of its items merged in.

    Items are in the order of their tiles and skip no tile. So the tiles of one iteration lie in a window of as many
    tiles as items.
    """
    num_tiles, num_items = running.top.shape[0], items.tile.size
    window = min(num_tiles, num_items)
    start = jnp.minimum(items.tile[0], num_tiles - window)
    old = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, start, window), running)

    place = jnp.clip(items.tile - start, 0, window - 1)
    is_part = (jnp.arange(window, dtype=jnp.int32)[:, None] == place[None, :]) & items.is_live[None, :]

    def fold(reduce, x: Array, empty: float) -> Array:
        return reduce(jnp.where(is_part[:, :, None, None, None], x[None], empty), axis=1)

    top = jnp.maximum(old.top, fold(jnp.max, partials.top, LEAST))
    shrink = jnp.exp(partials.top - top[place])
    weighted = partials.weighted * shrink[..., None]
    # The product below would spread one row's overflow to its neighbours. The total, which stays apart, carries it.
    is_finite = jnp.isfinite(weighted).all(axis=-1)
    total = fold(jnp.sum, jnp.where(is_finite, partials.total * shrink, jnp.nan), 0)
    weighted = jnp.where(is_finite[..., None], weighted, 0)
    summed = jnp.einsum("wn,nhtgd->whtgd", is_part.astype(jnp.float32), weighted, precision=lax.Precision.HIGHEST)

    keep = jnp.exp(old.top - top)
    new = Softmax(top, old.total * keep + total, old.weighted * keep[..., None] + summed)
    return jax.tree.map(lambda x, part: lax.dynamic_update_slice_in_dim(x, part, start, 0), running, new)


def _sizes(tiles: Tiles, pool: BlockPool, max_blocks: int) -> tuple[int, int]:
    """Blocks of a chunk, and items of an iteration.

    K, V and scores of an iteration take 1/1024 of the pool, within limits. The least is 2 MiB, the caches of a CPU. The
    most is 64 MiB, as a GPU reads while it starts an iteration. An iteration covers at most four chunks for each tile.
    Otherwise a small batch with short contexts would compute mostly padding.
    """
    num_tiles, num_kv_heads, tile_len, group, head_dim = tiles.q.shape
    block_size = shape_of(pool).block_size
    chunk_blocks = min(max(CHUNK_TOKENS // block_size, 1), max_blocks)
    widened_bytes = tiles.q.dtype.itemsize if is_quantized(pool.dtype) else 0
    kv_bytes = 2 * head_dim * (pool.dtype.itemsize + widened_bytes)
    score_bytes = 2 * 4 * tile_len * group  # scores and weights, float32
    item_bytes = chunk_blocks * block_size * num_kv_heads * (kv_bytes + score_bytes)
    iteration_bytes = min(max(pool.size * pool.dtype.itemsize // 1024, 2**21), 2**26)
    return chunk_blocks, min(max(iteration_bytes // item_bytes, 1), 4 * num_tiles)
