"""The decode kernel's division of work, on random ragged batches, against a plain model of items and their tiles."""

from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import jax
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pallas_kernels.paged_attention.hopper.schedule import (
    WHOLE,
    Merge,
    Schedule,
    Segment,
    queries_of_rows,
    queries_of_tokens,
    schedule_decode,
)

NUM_SEQS, NUM_TOKENS = 6, 10


@dataclass(frozen=True)
class Division:
    """Everything static about a schedule: one compilation each."""

    num_kv_heads: int
    block_size: int
    tile_tokens: int
    num_workers: int
    sliding_window: int | None = None


DIVISIONS = [
    Division(num_kv_heads=1, block_size=16, tile_tokens=64, num_workers=1),
    Division(num_kv_heads=2, block_size=8, tile_tokens=16, num_workers=3),
    Division(num_kv_heads=4, block_size=16, tile_tokens=16, num_workers=11),
    Division(num_kv_heads=2, block_size=128, tile_tokens=64, num_workers=7),
    Division(num_kv_heads=3, block_size=16, tile_tokens=64, num_workers=5, sliding_window=1),
    Division(num_kv_heads=2, block_size=8, tile_tokens=16, num_workers=8, sliding_window=61),
    Division(num_kv_heads=2, block_size=16, tile_tokens=64, num_workers=264),
]

type Row = tuple[int, int]
"""Number of queries of a row, and of tokens before them."""

type ItemId = tuple[int, int]
"""Token and KV head."""


@dataclass(frozen=True)
class Item:
    row: int
    kv_begin: int
    kv_end: int
    tile_starts: tuple[int, ...]


def items_of(rows: list[Row], division: Division, *, of_tokens: bool) -> dict[ItemId, Item]:
    items, token = {}, 0
    for row, (q_len, cached) in enumerate(rows):
        for nth in range(q_len):
            end = cached + nth + 1
            begin = max(0, end - (division.sliding_window or end))
            granule = min(division.block_size, division.tile_tokens)
            starts = range(begin - begin % granule, end, division.tile_tokens)
            if of_tokens or q_len == 1:
                for head in range(division.num_kv_heads):
                    items[token, head] = Item(row, begin, end, tuple(starts))
            token += 1
    return items


@partial(jax.jit, static_argnames=("division", "of_tokens"))
def scheduled(kv_lens, cu_q_lens, *, division: Division, of_tokens: bool) -> Schedule:
    if of_tokens:
        queries = queries_of_tokens(NUM_TOKENS, kv_lens, cu_q_lens, division.sliding_window)
    else:
        queries = queries_of_rows(kv_lens, cu_q_lens, division.sliding_window)
    return schedule_decode(
        queries,
        num_kv_heads=division.num_kv_heads,
        block_size=division.block_size,
        tile_tokens=division.tile_tokens,
        num_workers=division.num_workers,
    )


def schedule_of(rows: list[Row], division: Division, *, of_tokens: bool) -> Schedule:
    padded = rows + [(0, 0)] * (NUM_SEQS - len(rows))
    kv_lens = np.array([q_len + cached for q_len, cached in padded], np.int32)
    cu_q_lens = np.array([0, *accumulate(q_len for q_len, _ in padded)], np.int32)
    return jax.device_get(scheduled(kv_lens, cu_q_lens, division=division, of_tokens=of_tokens))


def segments_of(schedule: Schedule, worker: int) -> list[Segment]:
    first, last = schedule.first_segment[worker], schedule.last_segment[worker]
    return [Segment(*map(int, numbers)) for numbers in schedule.segments[first:last]]


@st.composite
def ragged_rows(draw) -> list[Row]:
    rows, left = [], NUM_TOKENS
    for _ in range(draw(st.integers(0, NUM_SEQS))):
        q_len = min(draw(st.sampled_from([1, 1, 1, 0, 2, 4])), left)
        left -= q_len
        rows.append((q_len, draw(st.one_of(st.sampled_from([0, 15, 16, 63, 64]), st.integers(0, 400)))))
    return rows


@pytest.mark.parametrize("of_tokens", [False, True], ids=["of_rows", "of_tokens"])
@given(rows=ragged_rows(), division=st.sampled_from(DIVISIONS))
@example(rows=[], division=DIVISIONS[1])
@example(rows=[(1, 0)], division=DIVISIONS[-1])
@example(rows=[(1, 0), (0, 0), (0, 90), (1, 399), (2, 30), (1, 15)], division=DIVISIONS[2])
@settings(max_examples=150, deadline=None)
def test_every_tile_has_one_worker_and_every_shared_item_its_parts_merged(of_tokens, rows, division):
    schedule = schedule_of(rows, division, of_tokens=of_tokens)
    items = items_of(rows, division, of_tokens=of_tokens)

    covered, parts, loads = defaultdict(list), defaultdict(list), []
    for worker in range(division.num_workers):
        segments = segments_of(schedule, worker)
        loads.append(sum(segment.num_tiles for segment in segments))
        for segment in segments:
            assert segment.num_tiles > 0
            key = segment.token, segment.kv_head
            item = items[key]
            assert (segment.row, segment.kv_begin, segment.kv_end) == (item.row, item.kv_begin, item.kv_end)
            covered[key] += [segment.start + nth * division.tile_tokens for nth in range(segment.num_tiles)]
            if segment.num_tiles == len(item.tile_starts):
                assert segment.part == WHOLE
            else:
                assert segment.part in (2 * worker, 2 * worker + 1)
                parts[key].append(segment.part)
    assert max(loads) - min(loads) <= 1
    assert {key: sorted(starts) for key, starts in covered.items()} == {
        key: list(item.tile_starts) for key, item in items.items()
    }
    written = [part for of_item in parts.values() for part in of_item]
    assert len(set(written)) == len(written)

    merged = defaultdict(list)
    for worker, numbers in enumerate(schedule.merges):
        merge = Merge(*map(int, numbers))
        if merge.num_others > 0:
            others = [2 * (worker + nth) for nth in range(merge.num_others)]
            merged[merge.token, merge.kv_head] += [merge.first_part, *others]
    assert merged == parts
