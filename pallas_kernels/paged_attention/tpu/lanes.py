"""Pools whose rows hold several heads narrower than a vector register's 128 lanes, so that no memory is padding.

XLA keeps an array with fewer than 128 columns in a layout of its own. It would copy the whole pool for a kernel. So a
pool for TPUs has rows of a multiple of 128. KV heads of 64 lie side by side in pairs, KV heads of 32 in fours, in
their order. K and V then only need a reshape. Other heads, such as 80 or 96, are padded with zeros.

The kernel sees one wide KV head for several KV heads of the model. A query has zeros in the lanes of other KV heads.
Only the lanes of its own KV head count in its output.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from pallas_kernels.chips.memory import round_up
from pallas_kernels.chips.tpu import LANES


class LaneLayout(NamedTuple):
    """A pool's KV heads and their head_dim, as the kernel sees them, and the model's KV heads in each."""

    num_kv_heads: int
    head_dim: int
    heads_per_row: int


def lane_layout(num_kv_heads: int, head_dim: int) -> LaneLayout:
    """The layout of a TPU's pool for a model's KV heads.

    Allocate the pool with ``block_pool_shape`` of the layout's ``num_kv_heads`` and ``head_dim``, and write K and V as
    ``to_lanes`` makes them.
    """
    per_row = LANES // head_dim if LANES % head_dim == 0 else 1
    if num_kv_heads % per_row:
        per_row = 1  # the last head would have no neighbour
    return LaneLayout(num_kv_heads // per_row, round_up(per_row * head_dim, LANES), per_row)


def to_lanes(
    x: Float[Array, "tokens num_kv_heads head_dim"], layout: LaneLayout
) -> Float[Array, "tokens pool_heads pool_head_dim"]:
    """K or V of a step's tokens as a pool of this layout takes them."""
    x = x.reshape(x.shape[0], layout.num_kv_heads, -1)
    return jnp.pad(x, ((0, 0), (0, 0), (0, layout.head_dim - x.shape[2])))


def spread_queries(
    q: Float[Array, "tokens num_heads head_dim"], layout: LaneLayout
) -> Float[Array, "tokens pool_heads pool_group pool_head_dim"]:
    """Queries with zeros in the lanes of other KV heads; ``pool_group`` query heads read one row of the pool."""
    num_tokens, _, head_dim = q.shape
    q = q.reshape(num_tokens, layout.num_kv_heads, layout.heads_per_row, -1, head_dim)
    if layout.heads_per_row > 1:
        own = jnp.eye(layout.heads_per_row, dtype=bool)[None, None, :, None, :, None]
        q = jnp.where(own, q[:, :, :, :, None, :], jnp.zeros((), q.dtype))
    q = q.reshape(num_tokens, layout.num_kv_heads, -1, layout.heads_per_row * head_dim)
    return jnp.pad(q, ((0, 0), (0, 0), (0, 0), (0, layout.head_dim - q.shape[3])))


def own_lanes(
    out: Float[Array, "tokens pool_heads pool_group pool_head_dim"], layout: LaneLayout, head_dim: int
) -> Float[Array, "tokens num_heads head_dim"]:
    """Each query head's lanes of its output."""
    num_tokens, per_row = out.shape[0], layout.heads_per_row
    out = out[..., : per_row * head_dim].reshape(num_tokens, layout.num_kv_heads, per_row, -1, per_row, head_dim)
    own = [out[:, :, nth, :, nth] for nth in range(per_row)]
    return jnp.stack(own, axis=2).reshape(num_tokens, -1, head_dim)
