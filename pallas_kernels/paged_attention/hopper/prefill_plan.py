"""The division of the prefill kernel's work: static sizes, and runs of tokens worked out on the device.

A run is up to ``item_tokens`` consecutive tokens of one row. A unit is ``tile_heads`` query heads of one KV head. An
item of work is a run and a unit. Thread blocks take items one by one, the longest first.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int

from pallas_kernels.block_pool.layout import is_quantized
from pallas_kernels.chips.hopper import SMEM_BYTES
from pallas_kernels.paged_attention.call import Scoring
from pallas_kernels.paged_attention.hopper.tile import TILE_ROWS, swizzle_of

CONSUMERS = 2
"""Warpgroups that attend, each its own half of an item's tokens."""

TILE_BYTES = SMEM_BYTES - 2 * 1024
"""Shared memory for tiles; barriers and alignment take the rest."""

CACHED_KV_BYTES = 32 * 2**20
"""Most bytes of K and V of items in flight: they stay in a cache of 50 MB beside other data."""


WIDEST_QUANTIZED = 192
"""Largest ``head_dim`` over a quantised pool. ptxas compiles each product for an equal share of the registers: 128."""


@dataclass(frozen=True)
class PrefillSizes:
    """Sizes that the tuner chooses.

    Args:
        kv_tile: tokens of K or of V that one product covers, a multiple of 64; None chooses by ``head_dim``.
        stages: tiles of K, and as many of V, in shared memory.
        ping_pong: whether the consumers use the tensor cores alternately.
    """

    kv_tile: int | None = None
    stages: int = 2
    ping_pong: bool = True


DEFAULT_SIZES = PrefillSizes()


@dataclass(frozen=True)
class Case:
    """The static properties of a launch.

    Raises:
        ValueError: sizes that no pool fits.
        NotImplementedError: a case that ``attend_prefill`` does not take.
    """

    scoring: Scoring
    sizes: PrefillSizes
    dtype: jnp.dtype
    pool_dtype: jnp.dtype
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_layers: int
    block_size: int
    is_interpreted: bool
    is_causal: bool = True  # else each query sees all of the context, and outputs are parts

    def __post_init__(self) -> None:
        if self.kv_tile % TILE_ROWS:
            raise ValueError(f"kv_tile={self.kv_tile}: expected a multiple of {TILE_ROWS}")
        if self.block_size % 8 or max(self.block_size, self.kv_tile) % self.piece:
            raise NotImplementedError(
                f"blocks of {self.block_size} and tiles of {self.kv_tile} tokens: expected blocks of a multiple of 8, "
                "and one of the two to divide the other"
            )
        if self.is_quantized and self.head_dim > WIDEST_QUANTIZED:
            raise NotImplementedError(
                f"head_dim={self.head_dim} over a quantised pool: expected at most {WIDEST_QUANTIZED}, for which four "
                "warpgroups have registers"
            )
        if self.dtype.itemsize != 2:
            raise NotImplementedError(f"{self.dtype}: the prefill kernel takes bfloat16 and float16")
        if self.is_quantized and self.dtype != jnp.bfloat16:
            raise NotImplementedError(
                f"queries in {self.dtype} over a quantised pool: expected bfloat16, to which the kernel widens tiles"
            )
        # Copies begin at multiples of 128 bytes, and the last token of an odd number of tokens at an even token.
        if 2 * self.tile_heads * self.slab * self.dtype.itemsize % 128:
            raise NotImplementedError(f"head_dim={self.head_dim} with a group of {self.group}: expected an even group")
        if self.out_slabs < 1:
            raise NotImplementedError(
                f"head_dim={self.head_dim}, kv_tile={self.kv_tile}, stages={self.sizes.stages}: "
                "more than shared memory holds; choose smaller sizes"
            )

    @property
    def is_quantized(self) -> bool:
        return is_quantized(self.pool_dtype)

    @property
    def group(self) -> int:
        return self.num_heads // self.num_kv_heads

    @property
    def tile_heads(self) -> int:
        """Query heads of a tile: the largest power of two that divides the group, 8 at most."""
        return min(self.group & -self.group, 8)

    @property
    def tile_tokens(self) -> int:
        return TILE_ROWS // self.tile_heads

    @property
    def item_tokens(self) -> int:
        return CONSUMERS * self.tile_tokens

    @property
    def num_units(self) -> int:
        return self.num_heads // self.tile_heads

    @property
    def kv_tile(self) -> int:
        return self.sizes.kv_tile or (128 if self.head_dim <= 128 else 64)

    @property
    def piece(self) -> int:
        """Tokens of one copy of K or of V: a block, or the part of a block in a tile."""
        return min(self.block_size, self.kv_tile)

    @property
    def slab(self) -> int:
        """Columns of a slab: Q and outputs lie in slabs of one swizzle's width, [tile_tokens, tile_heads, slab]."""
        return swizzle_of(self.head_dim, self.dtype.itemsize)[1]

    @property
    def num_slabs(self) -> int:
        return self.head_dim // self.slab

    @property
    def stored_stages(self) -> int:
        """Tiles of K, and as many of V, that wait in shared memory as a quantised pool stores them."""
        if not self.is_quantized:
            return 0
        return 2 if self._bytes_beside(2) >= self.num_slabs * self._out_slab_bytes else 1

    @property
    def out_slabs(self) -> int:
        """Slabs of the output that fit in shared memory beside Q, K and V."""
        fitting = min(self._bytes_beside(self.stored_stages) // self._out_slab_bytes, self.num_slabs)
        return next((n for n in range(fitting, 0, -1) if self.num_slabs % n == 0), 0)

    @property
    def _out_slab_bytes(self) -> int:
        return CONSUMERS * TILE_ROWS * self.slab * self.dtype.itemsize

    def _bytes_beside(self, stored_stages: int) -> int:
        """Shared memory that Q, K and V leave, with so many stages of stored tiles."""
        rows = CONSUMERS * TILE_ROWS + 2 * self.sizes.stages * self.kv_tile
        stored_rows = 2 * stored_stages * self.kv_tile
        return TILE_BYTES - self.head_dim * (rows * self.dtype.itemsize + stored_rows * self.pool_dtype.itemsize)


class Run(NamedTuple):
    """The columns of ``Plan.runs``."""

    row: Array
    first_token: Array  # index into q
    num_tokens: Array
    first_pos: Array  # the first token's position in its sequence
    row_pos: Array  # the position of the row's first token
    kv_len: Array


class Plan(NamedTuple):
    """The items, in sections of as many units as have all their K and V in the second-level cache.

    Within a section, all units of the first run come before the units of the second run, and so on.
    """

    runs: Int[Array, "runs 6"]  # the longest context first
    dealing: Int[Array, " 2"]  # number of runs, and units of a section


def plan_prefill(
    case: Case, num_tokens: int, kv_lens: Int[Array, " num_seqs"], cu_q_lens: Int[Array, " num_seqs_plus_1"]
) -> Plan:
    """The runs of all rows with more than one query, except rows with fewer positions than queries."""
    num_seqs = len(kv_lens)
    q_lens = jnp.diff(cu_q_lens)
    q_lens = jnp.where(kv_lens >= q_lens, q_lens, 0)
    num_runs = jnp.where(q_lens > 1, (q_lens + case.item_tokens - 1) // case.item_tokens, 0)
    ends = jnp.cumsum(num_runs, dtype=jnp.int32)
    most_runs = num_tokens // case.item_tokens + min(num_seqs, num_tokens // 2)

    run = jnp.arange(most_runs, dtype=jnp.int32)
    row = jnp.searchsorted(ends, run, side="right", method="compare_all").astype(jnp.int32)
    is_run = row < num_seqs
    row = jnp.minimum(row, num_seqs - 1)
    start = (run - (ends - num_runs)[row]) * case.item_tokens
    tokens = jnp.minimum(q_lens[row] - start, case.item_tokens)
    row_pos = kv_lens[row] - q_lens[row]
    fields = Run(row, cu_q_lens[row] + start, tokens, row_pos + start, row_pos, kv_lens[row])
    context = row_pos + start + tokens
    if case.scoring.sliding_window is not None:
        context = jnp.minimum(context, case.scoring.sliding_window + tokens)
    longest_first = jnp.argsort(jnp.where(is_run, -context, 1))
    num_cached = jnp.where(q_lens > 1, kv_lens, 0).sum(dtype=jnp.float32)
    return Plan(jnp.stack(fields, axis=1)[longest_first], jnp.stack([ends[-1], _section(case, num_cached)]))


def plan_whole(case: Case, num_tokens: int, part_lens: Int[Array, " parts"]) -> Plan:
    """The runs of so many queries, each of which sees all of each part of a context. Empty parts come last.

    A part is a row of its own, and each query stands at its last position.
    """
    num_parts, start = len(part_lens), jnp.arange(0, num_tokens, case.item_tokens, dtype=jnp.int32)
    part = jnp.repeat(jnp.arange(num_parts, dtype=jnp.int32), start.size)
    tokens = jnp.minimum(num_tokens - start, case.item_tokens)
    last = part_lens[part] - 1
    fields = Run(part, jnp.tile(start, num_parts), jnp.tile(tokens, num_parts), last, last, last + 1)
    num_runs = (part_lens > 0).sum(dtype=jnp.int32) * start.size
    section = _section(case, part_lens.sum(dtype=jnp.float32))
    return Plan(jnp.stack(fields, axis=1), jnp.stack([num_runs, section]))


def _section(case: Case, num_cached: Float[Array, ""]) -> Int[Array, ""]:
    """The largest divisor of the units whose K and V stay in the cache, with so many tokens; 1 if there is none."""
    section = jnp.int32(1)
    for units in range(2, case.num_units + 1):
        if case.num_units % units == 0:
            num_kv_heads = max(units * case.tile_heads // case.group, 1)
            head_bytes = 2 * case.head_dim * case.pool_dtype.itemsize * num_cached
            section = jnp.where(num_kv_heads * head_bytes <= CACHED_KV_BYTES, units, section)
    return section


class Item(NamedTuple):
    """An item of work. A run without tokens ends the work."""

    unit: Array
    run: Run


def locate(index: Array, num_runs: Array, section: Array) -> tuple[Array, Array]:
    """The run and the unit of an item."""
    of_section = num_runs * section
    place = lax.rem(index, of_section)
    return lax.div(place, section), lax.div(index, of_section) * section + lax.rem(place, section)


def first_seen(case: Case, pos: Array) -> Array:
    """The first position that a query at ``pos`` sees."""
    window = case.scoring.sliding_window
    return jnp.zeros_like(pos) if window is None else jnp.maximum(pos - (window - 1), 0)


class Span(NamedTuple):
    """The tiles of K and V that an item sees; consumers take them from the last to the first."""

    first: Array
    end: Array

    @property
    def num_tiles(self) -> Array:
        return self.end - self.first

    def tile(self, step: Array | int) -> Array:
        return self.end - 1 - step


def span_of(case: Case, item: Item) -> Span:
    """The tiles with positions that some query of the item sees."""
    num_seen = item.run.first_pos + (item.run.num_tokens if case.is_causal else 1)
    end = lax.div(num_seen + (case.kv_tile - 1), case.kv_tile)
    return Span(lax.div(first_seen(case, item.run.first_pos), case.kv_tile), end)


def masked_steps(case: Case, span: Span, first_pos: Array) -> tuple[Array, Array]:
    """The number of steps with keys ahead of some query, 1 at least, and the first step with keys behind its window.

    Args:
        first_pos: the position of the first of a consumer's queries.
    """
    num_ahead = jnp.maximum(span.end - lax.div(first_pos + 1, case.kv_tile), 1)
    if case.scoring.sliding_window is None:
        return num_ahead, span.num_tiles
    behind = first_seen(case, first_pos + case.tile_tokens - 1)
    first_whole = jnp.maximum(lax.div(behind + case.kv_tile - 1, case.kv_tile), span.first)
    return num_ahead, jnp.maximum(span.end - first_whole, num_ahead)
