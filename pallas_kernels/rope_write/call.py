"""The arguments of the operation: the norms of heads, and the checks of shapes."""

from dataclasses import dataclass, field

import jax
from jax import Array
from jaxtyping import Float, Float32

from pallas_kernels.block_pool.layout import BlockPool, shape_of
from pallas_kernels.norm import NormSpec

Angles = tuple[Float32[Array, "tokens half"], Float32[Array, "tokens half"]]
"""Cosine and sine of each token's angles."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class HeadNorms:
    """Root-mean-square norms of each query and key before its rotation, in float32.

    Args:
        q_scale, k_scale: factors of the features of a head, the same for all heads.
        spec: properties of both norms.
    """

    q_scale: Float[Array, " head_dim"]
    k_scale: Float[Array, " head_dim"]
    spec: NormSpec = field(metadata={"static": True})


def num_heads_of(pool: BlockPool, num_features: int) -> int:
    """Query heads, where the features are those of all query heads and of the pool's heads of K and of V.

    Raises:
        ValueError: the features are no whole number of heads, or there are no query heads among them.
    """
    shape = shape_of(pool)
    num_heads, rest = divmod(num_features, shape.head_dim)
    num_heads -= 2 * shape.num_kv_heads
    if rest or num_heads < 1:
        raise ValueError(
            f"{num_features} projected features: expected those of query heads, {shape.num_kv_heads} heads of K and as "
            f"many of V, of {shape.head_dim} features each"
        )
    return num_heads
