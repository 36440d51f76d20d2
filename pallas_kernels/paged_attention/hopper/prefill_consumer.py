"""The arithmetic of the prefill kernel: one of the two consumers of a thread block.

The tensor cores multiply a tile's queries and keys, and the last tile's weights and values. Meanwhile other units
compute a softmax: that of the same consumer, or that of the other consumer, since the two alternate.
"""

from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.chips.memory import Ref
from pallas_kernels.paged_attention.hopper.prefill_memory import (
    SUM_COLUMNS,
    Inputs,
    Parts,
    Scratch,
    copied,
    for_each_item,
    multiplied,
)
from pallas_kernels.paged_attention.hopper.prefill_plan import (
    CONSUMERS,
    Case,
    Item,
    Span,
    first_seen,
    masked_steps,
    span_of,
)
from pallas_kernels.paged_attention.hopper.tile import (
    COLUMN,
    MATRIX,
    TILE_ROWS,
    Accumulator,
    Softmax,
    StandIn,
    accumulate,
    add_sinks,
    empty_softmax,
    fold_scores,
    position_in_tile,
    powers_of_two,
    read_accumulator,
    spread,
    with_accumulator,
    write_accumulator,
)


class _Running(NamedTuple):
    """A consumer's state between two tiles."""

    count: Array  # tiles taken so far, of all items
    softmax: Softmax
    weights: Array  # of the last tile, whose values are not summed yet


class Consumer:
    """Attends half of the tokens of this block's items."""

    def __init__(self, case: Case, inputs: Inputs, out: Ref | Parts, scratch: Scratch, index: Array) -> None:
        self._case = case
        self._inputs = inputs
        self._out = out
        self._scratch = scratch
        self._index = index

    def run(self) -> None:
        case, scratch = self._case, self._scratch
        for slot in range(case.sizes.stages):
            plgpu.barrier_arrive(scratch.k_free.at[slot])
            plgpu.barrier_arrive(scratch.v_free.at[slot])
        plgpu.barrier_arrive(scratch.q_free.at[self._index])
        pl.when(self._index == 1)(self._hand_over)

        def attend(item: Item, count: Array) -> Array:
            sums = self._stand_in(scratch.out_sums)
            return with_accumulator(partial(self._attend, item, count), (TILE_ROWS, case.head_dim), sums)

        for_each_item(scratch, attend, jnp.int32(0))
        pl.when(self._index == 0)(self._take_turn)
        plgpu.wait_smem_to_gmem(0)

    def _stand_in(self, ref: Ref | None) -> StandIn | None:
        return None if ref is None else StandIn(ref.at[self._index])

    def _attend(self, item: Item, count: Array, sums: Accumulator) -> Array:
        case, scratch = self._case, self._scratch
        span = span_of(case, item)
        first_pos = item.run.first_pos + (self._index * case.tile_tokens if case.is_causal else 0)
        num_ahead, first_behind = masked_steps(case, span, first_pos)
        slopes = _load_unit(self._inputs.slopes, item)

        plgpu.barrier_wait(scratch.q_full.at[self._index])
        running = self._take_first(item, span, first_pos, slopes, count)
        take = partial(self._take, span, first_pos, slopes, sums)
        running = lax.fori_loop(1, num_ahead, partial(take, is_masked=True), running)
        running = lax.fori_loop(num_ahead, first_behind, partial(take, is_masked=False), running)
        if case.scoring.sliding_window is not None:
            running = lax.fori_loop(first_behind, span.num_tiles, partial(take, is_masked=True), running)
        plgpu.barrier_arrive(scratch.q_free.at[self._index])

        slot = lax.rem(running.count - 1, case.sizes.stages)
        if case.scoring.sliding_window is not None:
            pl.when(span.num_tiles > 1)(lambda: self._clear_unseen(item, span.first, slot))
        accumulate(sums, running.weights, scratch.v.at[slot])
        total = read_accumulator(sums, in_flight=0)
        plgpu.barrier_arrive(scratch.v_free.at[slot])
        self._write(item, running.softmax, total)
        return running.count

    def _take_first(self, item: Item, span: Span, first_pos: Array, slopes: Array | None, count: Array) -> _Running:
        case, scratch = self._case, self._scratch
        slot = lax.rem(count, case.sizes.stages)
        plgpu.barrier_wait(scratch.k_full.at[slot])

        def score(score_sums: Accumulator) -> Array:
            self._multiply_keys(score_sums, slot)
            return read_accumulator(score_sums, in_flight=0)

        scores = with_accumulator(score, (TILE_ROWS, case.kv_tile), self._stand_in(scratch.score_sums))
        plgpu.barrier_arrive(scratch.k_free.at[slot])
        scores, factor = self._finish_scores(scores, span.tile(0), first_pos, slopes, is_masked=True)
        weights, softmax, _ = fold_scores(scores, factor, empty_softmax())
        plgpu.barrier_wait(scratch.v_full.at[slot])
        self._clear_unseen(item, span.tile(0), slot)
        return _Running(count + 1, softmax, weights.astype(case.dtype))

    def _take(
        self,
        span: Span,
        first_pos: Array,
        slopes: Array | None,
        sums: Accumulator,
        step: Array,
        running: _Running,
        *,
        is_masked: bool,
    ) -> _Running:
        """Score a tile while the tensor cores sum the values of the tile before."""
        case, scratch = self._case, self._scratch
        slot = lax.rem(running.count, case.sizes.stages)
        last_slot = lax.rem(running.count - 1, case.sizes.stages)
        plgpu.barrier_wait(scratch.k_full.at[slot])
        self._take_turn()

        def take(score_sums: Accumulator) -> _Running:
            self._multiply_keys(score_sums, slot)
            accumulate(sums, running.weights, scratch.v.at[last_slot])
            self._hand_over()
            scores = read_accumulator(score_sums, in_flight=1)
            plgpu.barrier_arrive(scratch.k_free.at[slot])
            scores, factor = self._finish_scores(scores, span.tile(step), first_pos, slopes, is_masked=is_masked)
            weights, softmax, shrink = fold_scores(scores, factor, running.softmax)
            # The arithmetic above hides the products, unless a compiler moves it past the wait for them. None does:
            # LLVM keeps the arithmetic before this barrier, and ptxas before the loop that waits for the values.
            weights, softmax, shrink = lax.optimization_barrier((weights, softmax, shrink))
            plgpu.barrier_wait(scratch.v_full.at[slot])
            total = read_accumulator(sums, in_flight=0)
            plgpu.barrier_arrive(scratch.v_free.at[last_slot])
            write_accumulator(sums, total * spread(shrink, case.head_dim))
            return _Running(running.count + 1, softmax, weights.astype(case.dtype))

        return with_accumulator(take, (TILE_ROWS, case.kv_tile), self._stand_in(scratch.score_sums))

    def _take_turn(self) -> None:
        """Wait until the other consumer has started its products, so that its softmax overlaps with these products."""
        if self._case.sizes.ping_pong:
            plgpu.barrier_wait(self._scratch.turn.at[self._index])

    def _hand_over(self) -> None:
        if self._case.sizes.ping_pong:
            plgpu.barrier_arrive(self._scratch.turn.at[CONSUMERS - 1 - self._index])

    def _multiply_keys(self, score_sums: Accumulator, slot: Array) -> None:
        case = self._case
        queries = multiplied(case, self._scratch.q).at[self._index]
        keys = self._scratch.k.at[slot]
        for slab in range(case.num_slabs):
            columns = keys.at[:, pl.ds(slab * case.slab, case.slab)]
            accumulate(score_sums, queries.at[slab], columns, transpose_b=True)

    def _finish_scores(
        self, scores: Array, tile: Array, first_pos: Array, slopes: Array | None, *, is_masked: bool
    ) -> tuple[Array, float]:
        """Scores in powers of two, up to a factor; minus infinity for invisible keys."""
        case = self._case
        scores, factor = powers_of_two(scores, case.scoring)
        if slopes is None and not is_masked:
            return scores, factor
        distance = position_in_tile(case.kv_tile, 1) + (tile * case.kv_tile - first_pos)
        if case.is_causal:
            distance = distance - lax.div(position_in_tile(case.kv_tile, 0), case.tile_heads)  # 0 at the query
        if slopes is not None:
            scores = scores * factor + spread(slopes, case.kv_tile) * distance.astype(jnp.float32)
            factor = 1.0
        if is_masked:
            visible = distance <= 0
            if case.scoring.sliding_window is not None:
                visible &= distance > -case.scoring.sliding_window
            scores = jnp.where(visible, scores, -jnp.inf)
        return scores, factor

    def _clear_unseen(self, item: Item, tile: Array, slot: Array) -> None:
        """Zero a tile's values beyond the row's context: weights of zero are not enough, since 0 * NaN is NaN."""
        case, scratch = self._case, self._scratch
        start = tile * case.kv_tile
        first, end = first_seen(case, item.run.row_pos), item.run.kv_len

        def clear(chunk: int) -> None:
            pos = position_in_tile(case.slab, 0) + (start + chunk * TILE_ROWS)
            for slab in range(case.num_slabs):
                columns = pl.ds(slab * case.slab, case.slab)
                values = scratch.v.at[slot, pl.ds(chunk * TILE_ROWS, TILE_ROWS), columns]
                loaded = plgpu.load(values, layout=MATRIX)
                values[...] = jnp.where((pos >= first) & (pos < end), loaded, jnp.zeros_like(loaded))

        @pl.when((start < first) | (start + case.kv_tile > end))
        def _() -> None:
            for chunk in range(case.kv_tile // TILE_ROWS):
                pl.when(self._index == chunk % CONSUMERS)(partial(clear, chunk))
            plgpu.commit_smem()
            plgpu.barrier_arrive(scratch.cleared)
            plgpu.barrier_wait(scratch.cleared)

    def _write(self, item: Item, softmax: Softmax, total: Array) -> None:
        """Write the outputs of the item's tokens."""
        case = self._case
        if isinstance(self._out, Parts):
            tile = lax.div(item.run.first_token, case.tile_tokens) + self._index
            outputs, sums = (ref.at[item.run.row, tile, item.unit] for ref in self._out)
            outputs[...] = total * spread(1 / softmax.total, case.head_dim)
            sums[...] = spread(softmax.top + jnp.log2(softmax.total), SUM_COLUMNS)
            return
        sinks = _load_unit(self._inputs.sinks, item)
        scale = 1.0
        if sinks is not None:
            softmax, scale = add_sinks(softmax, sinks)
        out = (total * spread(scale / softmax.total, case.head_dim)).astype(case.dtype)

        smem = multiplied(case, self._scratch.out)
        for first_slab in range(0, case.num_slabs, case.out_slabs):
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            for slab in range(case.out_slabs):
                start = (first_slab + slab) * case.slab
                target = smem.at[self._index, slab]
                target[...] = out[:, start : start + case.slab].reshape(target.shape)
            plgpu.commit_smem()
            self._copy_out(item, first_slab, self._out)

    def _copy_out(self, item: Item, first_slab: int, out: Ref) -> None:
        case = self._case
        first_token = self._index * case.tile_tokens
        num_tokens = jnp.clip(item.run.num_tokens - first_token, 0, case.tile_tokens)
        heads = pl.ds(item.unit * case.tile_heads, case.tile_heads)

        def copy(size: int) -> None:
            start = num_tokens & ~(2 * size - 1)
            tokens = pl.ds(item.run.first_token + first_token + start, size)
            for slab in range(case.out_slabs):
                columns = pl.ds((first_slab + slab) * case.slab, case.slab)
                source = copied(case, self._scratch.out).at[self._index, slab, pl.ds(start, size)]
                plgpu.copy_smem_to_gmem(source, out.at[tokens, heads, columns])

        size = case.tile_tokens
        while size:  # a copy for each bit of num_tokens
            pl.when((num_tokens & size) != 0)(partial(copy, size))
            size //= 2


def _load_unit(per_row: Ref | None, item: Item) -> Array | None:
    """A value for each row of a tile of the item."""
    if per_row is None:
        return None
    return plgpu.load(per_row.at[item.unit], layout=COLUMN, optimized=False)
