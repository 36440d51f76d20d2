"""The static sizes of steps, and what a forward pass reads besides weights and cache."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import jax
from jaxtyping import Array, Int

from jpaged.contract.plan import StepPlan

TILED_FROM, ROW_TILE = 256, 64
"""Rows of a decode from which padding costs more than reading the weights, and rows that a product computes at once."""


@dataclass(frozen=True, slots=True, order=True)
class Bucket:
    """The static shapes of one compiled step.

    Args:
        num_tokens: tokens in the ragged batch, padding included.
        num_rows: sequences in the batch at most, and rows of logits read.
    """

    num_tokens: int
    num_rows: int

    @property
    def is_decode(self) -> bool:
        """One token a row: kernels need no tiles of queries."""
        return self.num_tokens == self.num_rows


def powers_of_two(low: int, high: int) -> list[int]:
    """low, 2 low, 4 low, ... below ``high``, then ``high`` itself."""
    sizes = []
    while low < high:
        sizes.append(low)
        low *= 2
    return [*sizes, high]


def all_buckets(
    max_num_seqs: int, max_num_batched_tokens: int, least_rows: int = 1, halfway_from: int | None = None
) -> list[Bucket]:
    """Every bucket a plan can need: as many tokens as rows for decodes, more when prompts are among them.

    A mixed step has fewer rows than tokens: half as many rows do, and otherwise the next bucket. Where there are sizes
    halfway, many rows have a size for every ``ROW_TILE``: a product computes that many rows at once anyway.

    Args:
        max_num_seqs: rows at most.
        max_num_batched_tokens: tokens at most.
        least_rows: rows of the smallest decode, if there can be so many; mixed steps begin with eight tokens for each
            of these rows, or with 32 tokens.
        halfway_from: tokens from which there is another size about halfway between two that are far enough apart.
    """

    def sizes(low: int, high: int) -> list[int]:
        powers = powers_of_two(low, high)
        if halfway_from is None:
            return powers
        far_apart = [(a, b) for a, b in pairwise(powers) if a >= halfway_from and 2 * (b - a) > a]
        return [*powers, *(-(-(a + b) // 32) * 16 for a, b in far_apart)]  # multiples of 16, as matrix units like them

    rows = sizes(least_rows, max_num_seqs)
    if halfway_from is not None:
        rows += range(TILED_FROM + ROW_TILE, max_num_seqs, ROW_TILE)
    decode = [Bucket(num_rows, num_rows) for num_rows in rows]
    mixed = [
        Bucket(tokens, min(tokens // 2, max_num_seqs))
        for tokens in sizes(max(32, 8 * least_rows), max_num_batched_tokens)
        if tokens < max_num_batched_tokens
    ]
    # Prompts need a bucket with more tokens than rows: kernels take a bucket of as many for a decode.
    return sorted({*decode, *mixed, Bucket(max(max_num_batched_tokens, max_num_seqs + 1), max_num_seqs)})


def in_order_of_need(buckets: Sequence[Bucket]) -> list[Bucket]:
    """Sort sizes of steps by what steps lose without them: without its own size, a step takes the next larger one.

    The largest size of each kind comes first, since it can do the work of all others, then the smallest decode. Each
    next size saves most: the logarithm of the padding, summed over all sizes that are to be compiled.
    """
    chosen: list[Bucket] = []
    kinds = [[b for b in buckets if b.is_decode == is_decode] for is_decode in (False, True)]
    chosen += [max(kind) for kind in kinds if kind]
    chosen += [min(kinds[1])] if len(kinds[1]) > 1 else []

    def saved(bucket: Bucket) -> float:
        kind = kinds[bucket.is_decode]
        larger = min(b.num_tokens for b in chosen if b in kind and b > bucket)
        smaller = max((b.num_tokens for b in chosen if b in kind and b < bucket), default=0)
        num_served = sum(smaller < b.num_tokens <= bucket.num_tokens for b in kind)
        return num_served * math.log(larger / bucket.num_tokens)

    while left := [bucket for bucket in buckets if bucket not in chosen]:
        chosen.append(max(left, key=saved))
    return chosen


def bucket_for(plan: StepPlan, buckets: Sequence[Bucket]) -> Bucket:
    """The smallest bucket of the plan's kind that holds it, or of the other kind if none does.

    Args:
        plan: has chunks.
        buckets: smallest first.
    """
    num_tokens, num_chunks = len(plan.chunks.token_ids), len(plan.chunks.rows)
    num_rows, is_decode = max(num_chunks, plan.num_logit_rows), num_tokens == num_chunks
    fitting = [b for b in buckets if b.num_tokens >= num_tokens and b.num_rows >= num_rows]
    for bucket in fitting:
        if bucket.is_decode == is_decode:
            return bucket
    return fitting[0]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StepInputs:
    """The ragged batch of one forward pass. Padding tokens write to block 0; padding rows are empty.

    Args:
        token_ids: token to feed at each place.
        positions: position of each token in its sequence.
        prompt_lens: length of the prompt of each token's sequence.
        slots: slot of the pool for each token's K and V; with several layer groups, one for each group.
        block_tables: as ``paged_attention`` takes them; with several layer groups, one for each group.
        kv_lens: as ``paged_attention`` takes them.
        cu_q_lens: as ``paged_attention`` takes them.
        stream_starts: first streamed block of each row, as in ``Streamed``.
        sample_tokens: index of the token whose logits are read by each draw, then by each live beam; 0 for padding.
        num_draws: tokens that each row of a burst has still to draw, this step's counted. 0 outside of bursts.
        shared_lens: as ``paged_attention`` takes them.
    """

    token_ids: Int[Array, " tokens"]
    positions: Int[Array, " tokens"]
    prompt_lens: Int[Array, " tokens"]
    slots: Int[Array, "*groups tokens"]
    block_tables: Int[Array, "*groups rows max_blocks"]
    kv_lens: Int[Array, " rows"]
    cu_q_lens: Int[Array, " rows_plus_1"]
    stream_starts: Int[Array, " rows"]
    sample_tokens: Int[Array, " rows"]
    num_draws: Int[Array, " rows"]
    shared_lens: Int[Array, " rows"]
