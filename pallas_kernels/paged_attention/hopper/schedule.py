"""The division of the decode kernel's work, in plain integer arithmetic on the device.

The division depends on lengths only, so the compiler keeps one copy for all layers of a step.

An *item* is the context of one row and KV head; a tile is ``tile_tokens`` tokens of an item. All tiles form one line,
item after item, and every worker takes an equal stretch of the line (Stream-K, arXiv:2301.03598). So all workers are
busy for one long sequence as for many short ones. A worker's stretch falls into *segments*, one for each item that it
touches. Where several workers share an item, a *merge* of their parts follows.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Int


class Queries(NamedTuple):
    """Single queries for the decode kernel, each with the part of its row's context that it sees."""

    token: Int[Array, " queries"]  # index into q
    row: Int[Array, " queries"]
    kv_begin: Int[Array, " queries"]  # first of the visible positions kv_begin to kv_end - 1
    kv_end: Int[Array, " queries"]  # 0: no query here


def queries_of_rows(
    kv_lens: Int[Array, " num_seqs"], cu_q_lens: Int[Array, " num_seqs_plus_1"], sliding_window: int | None
) -> Queries:
    """The queries of all rows with a single query; the prefill kernel attends the other rows."""
    row = jnp.arange(kv_lens.size, dtype=jnp.int32)
    kv_end = jnp.where(jnp.diff(cu_q_lens) == 1, kv_lens, 0)
    return Queries(cu_q_lens[:-1], row, _window_begin(kv_end, sliding_window), kv_end)


def queries_of_tokens(
    num_tokens: int,
    kv_lens: Int[Array, " num_seqs"],
    cu_q_lens: Int[Array, " num_seqs_plus_1"],
    sliding_window: int | None,
) -> Queries:
    """Every token's query."""
    token = jnp.arange(num_tokens, dtype=jnp.int32)
    row = jnp.minimum(_num_at_most(cu_q_lens[1:], token), kv_lens.size - 1)
    kv_end = jnp.where(token < cu_q_lens[-1], kv_lens[row] - (cu_q_lens[row + 1] - 1 - token), 0)
    return Queries(token, row, _window_begin(kv_end, sliding_window), kv_end)


def _window_begin(kv_end: Int[Array, " queries"], sliding_window: int | None) -> Int[Array, " queries"]:
    return jnp.zeros_like(kv_end) if sliding_window is None else jnp.maximum(kv_end - sliding_window, 0)


class Segment(NamedTuple):
    """A row of ``Schedule.segments``; the defaults are the columns' numbers."""

    token: Any = 0  # index into q
    row: Any = 1
    kv_head: Any = 2
    start: Any = 3  # position of the first tile's first token
    num_tiles: Any = 4
    kv_begin: Any = 5  # first of the query's visible positions kv_begin to kv_end - 1
    kv_end: Any = 6
    part: Any = 7  # index of the partial result; WHOLE if the segment is the whole item


class Merge(NamedTuple):
    """A row of ``Schedule.merges``; the defaults are the columns' numbers."""

    token: Any = 0
    kv_head: Any = 1
    first_part: Any = 2
    num_others: Any = 3  # parts after the first, of workers that begin inside the item; 0: nothing to merge


WHOLE = -1


class Schedule(NamedTuple):
    """Worker w takes ``segments[first_segment[w]:last_segment[w]]``; its parts are 2w (at its start) and 2w + 1.

    ``merges[w]`` is the item that the start of worker w cuts, unless an earlier worker's start also cuts the item.
    """

    segments: Int[Array, "segments 8"]
    first_segment: Int[Array, " workers"]
    last_segment: Int[Array, " workers"]
    merges: Int[Array, "workers 4"]


def schedule_decode(
    queries: Queries, *, num_kv_heads: int, block_size: int, tile_tokens: int, num_workers: int
) -> Schedule:
    """Divide the context of all queries among the workers. Tiles begin where copies can, and some query sees each."""
    last_query = queries.token.size - 1
    copied = min(block_size, tile_tokens)
    start = queries.kv_begin // copied * copied
    tiles = jnp.where(queries.kv_end > 0, -(-(queries.kv_end - start) // tile_tokens), 0)  # of each of its items
    query_end = jnp.cumsum(tiles * num_kv_heads, dtype=jnp.int32)
    query_start = query_end - tiles * num_kv_heads
    total = query_end[-1]
    worker_end = _even_ends(total, num_workers)
    worker_start = jnp.concatenate([jnp.zeros_like(worker_end[:1]), worker_end[:-1]])

    heads = jnp.arange(num_kv_heads, dtype=jnp.int32)
    item_start = query_start[:, None] + heads[None, :] * tiles[:, None]
    item_start = jnp.where(tiles[:, None] > 0, item_start, total)
    cuts = jnp.sort(jnp.concatenate([item_start.reshape(-1), worker_start]))
    length = jnp.diff(cuts, append=total)

    query = jnp.minimum(_num_at_most(query_end, cuts), last_query)
    kv_head, first_tile = jnp.divmod(cuts - query_start[query], jnp.maximum(tiles[query], 1))
    worker = jnp.minimum(_num_at_most(worker_end, cuts), num_workers - 1)
    fields = Segment(
        token=queries.token[query],
        row=queries.row[query],
        kv_head=kv_head,
        start=start[query] + first_tile * tile_tokens,
        num_tiles=length,
        kv_begin=queries.kv_begin[query],
        kv_end=queries.kv_end[query],
        part=jnp.where(length == tiles[query], WHOLE, 2 * worker + (cuts > worker_start[worker]).astype(jnp.int32)),
    )
    first_segment = _num_at_most(cuts, worker_start) - 1  # of equal cuts, only the last has a length
    return Schedule(
        jnp.stack(fields, axis=-1),
        first_segment,
        jnp.where(worker_end > worker_start, _num_below(cuts, worker_end), first_segment),
        _merges(queries.token, query_start, tiles, worker_start, num_kv_heads),
    )


def _merges(
    token: Int[Array, " queries"],
    query_start: Int[Array, " queries"],
    tiles: Int[Array, " queries"],
    worker_start: Int[Array, " workers"],
    num_kv_heads: int,
) -> Int[Array, "workers 4"]:
    worker = jnp.arange(worker_start.size, dtype=jnp.int32)
    query_end = query_start + tiles * num_kv_heads
    query = jnp.minimum(_num_at_most(query_end, worker_start), token.size - 1)
    per_item = jnp.maximum(tiles[query], 1)
    kv_head = (worker_start - query_start[query]) // per_item
    item_start = query_start[query] + kv_head * per_item
    earlier_start = jnp.concatenate([worker_start[:1], worker_start[:-1]])
    is_cut = (worker_start > item_start) & (worker_start < query_end[-1]) & (earlier_start <= item_start)
    num_others = _num_below(worker_start, jnp.minimum(item_start + per_item, query_end[-1])) - worker
    return jnp.stack(
        Merge(
            token=token[query],
            kv_head=kv_head,
            first_part=2 * (worker - 1) + (item_start > earlier_start).astype(jnp.int32),
            num_others=jnp.where(is_cut, num_others, 0),
        ),
        axis=-1,
    )


def _even_ends(total: Int[Array, ""], num_workers: int) -> Int[Array, " workers"]:
    """The end of each worker's stretch; stretches differ by one tile at most."""
    each, rest = total // num_workers, total % num_workers
    worker = jnp.arange(1, num_workers + 1, dtype=jnp.int32)
    return worker * each + jnp.minimum(worker, rest)


def _count(holds: Bool[Array, "n m"]) -> Int[Array, " m"]:
    return holds.sum(axis=0, dtype=jnp.int32)


def _num_at_most(ascending: Int[Array, " n"], x: Int[Array, " m"]) -> Int[Array, " m"]:
    """The number of elements of ``ascending`` at most x. (Bisection launches a kernel for each halving.)"""
    return _count(ascending[:, None] <= x[None, :])


def _num_below(ascending: Int[Array, " n"], x: Int[Array, " m"]) -> Int[Array, " m"]:
    return _count(ascending[:, None] < x[None, :])
