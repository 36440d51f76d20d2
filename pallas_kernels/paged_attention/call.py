"""The arguments of attention as every implementation takes them, checked and with defaults filled in."""

from dataclasses import dataclass, field
from typing import NamedTuple

import jax
from jaxtyping import Array, Float, Int

from pallas_kernels.block_pool.layout import BlockPool, KvScales, LayerIndex, is_quantized


class KvLayer(NamedTuple):
    """One layer of a pool. ``kv_scales`` are the scales of a quantised pool, None for any other."""

    pool: BlockPool
    layer: LayerIndex
    kv_scales: KvScales | None = None


class Batch(NamedTuple):
    """The rows of a batch; each field as for ``paged_attention``."""

    block_tables: Int[Array, "num_seqs max_blocks"]
    kv_lens: Int[Array, " num_seqs"]
    cu_q_lens: Int[Array, " num_seqs_plus_1"]


@dataclass(frozen=True, slots=True)
class Scoring:
    """The scores of queries and keys; each field, static, as for ``paged_attention``."""

    sm_scale: float
    sliding_window: int | None = None
    soft_cap: float | None = None


class Heads(NamedTuple):
    """Numbers of each query head; each field as for ``paged_attention``."""

    alibi_slopes: Float[Array, " num_heads"] | None = None
    sinks: Float[Array, " num_heads"] | None = None


NO_HEADS = Heads()
"""Neither slopes nor sinks."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One call of attention.

    Args:
        q: queries of all rows.
        kv: the layer that the queries attend.
        batch: the rows.
        scoring: the scores of queries and keys.
        heads: numbers of each query head.
        into: memory that may take the outputs, with zeros for padding; None if there is none.
        shared_lens: as for ``paged_attention``; None if every row is to be read by itself.
    """

    q: Float[Array, "tokens num_heads head_dim"]
    kv: KvLayer
    batch: Batch
    scoring: Scoring = field(metadata={"static": True})
    heads: Heads = NO_HEADS
    into: Float[Array, "tokens num_heads head_dim"] | None = None
    shared_lens: Int[Array, " num_seqs"] | None = None

    @property
    def num_tokens(self) -> int:
        return self.q.shape[0]

    @property
    def num_heads(self) -> int:
        return self.q.shape[1]

    @property
    def head_dim(self) -> int:
        return self.q.shape[2]

    @property
    def num_seqs(self) -> int:
        return self.batch.block_tables.shape[0]

    @property
    def has_work(self) -> bool:
        """Whether there are queries and blocks at all."""
        return 0 not in self.q.shape and 0 not in self.batch.block_tables.shape

    @property
    def may_have_prompts(self) -> bool:
        """Whether some row may have several queries; a decode step most likely has no more tokens than rows."""
        return self.num_tokens > self.num_seqs

    @property
    def reads_shared_once(self) -> bool:
        """Whether the batch has shared tokens, and implementations may read them once for all rows."""
        is_wanted = self.shared_lens is not None and not self.may_have_prompts
        has_slopes = self.heads.alibi_slopes is not None
        return is_wanted and can_read_once(self.scoring.sliding_window, has_slopes, self.kv.pool.dtype)

    @property
    def case(self) -> tuple[tuple[int, ...], jax.numpy.dtype, tuple[int, ...], jax.numpy.dtype]:
        """Shape and type of the queries and of the pool, which decide whether kernels take the call."""
        return self.q.shape, self.q.dtype, self.kv.pool.shape, self.kv.pool.dtype


def can_read_once(sliding_window: int | None, has_slopes: bool, pool_dtype: jax.numpy.dtype) -> bool:
    """Whether tokens that rows share can be read once.

    Windows hide such tokens from some rows, and ALiBi's slopes depend on the distance to each row's query. Over 8-bit
    pools, the decode kernel of Hopper GPUs keeps outputs in an order of its own.
    """
    return sliding_window is None and not has_slopes and not is_quantized(pool_dtype)


class Attended(NamedTuple):
    """The outputs of ``write_and_attend``, and the pool and its scales with the step's K and V."""

    out: Float[Array, "tokens num_heads head_dim"]
    pool: BlockPool
    kv_scales: KvScales | None
