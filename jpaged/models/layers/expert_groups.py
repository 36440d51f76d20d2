"""Groups of tokens that pass the same expert: the rows of grouped products."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32

MOST_COMPARED = 2048
"""Pairs that are sorted in one kernel, which compares each with each. The time grows with the square of their number;
counting in parts takes several kernels."""

PART = 256
"""Pairs of a part, within which each is compared with each."""


class Groups(NamedTuple):
    """Pairs of a token and an expert, grouped by expert.

    The rows of a grouped product are the pairs by their places: the first group's, the second group's, and so on.

    Args:
        sizes: pairs of each group.
        places: place of each pair among all groups; pairs of no group come last.
        token_at, expert_at: the pair at each place.
        experts: expert of each group; None if each expert has a group.
    """

    sizes: Int32[Array, " num_groups"]
    places: Int32[Array, " pairs"]
    token_at: Int32[Array, " pairs"]
    expert_at: Int32[Array, " pairs"]
    experts: Int32[Array, " num_groups"] | None = None


def groups_of_one_token(experts: Int32[Array, " top_k"]) -> Groups:
    """Each pair is a group: the experts of a token are distinct, and have no order to keep."""
    index = jnp.arange(len(experts), dtype=jnp.int32)
    return Groups(jnp.ones_like(experts), index, jnp.zeros_like(experts), experts, experts)


def groups_by_expert(experts: Int32[Array, "tokens top_k"], num_experts: int) -> Groups:
    """Sort pairs by expert; pairs of one expert keep their order.

    Args:
        experts: experts of each token; ``num_experts`` stands for one that another device has.
        num_experts: experts, of which each has a group.
    """
    tokens, top_k = experts.shape
    experts = experts.reshape(-1)
    few = len(experts) <= MOST_COMPARED
    places, sizes = (_compared_places if few else _counted_places)(experts, num_experts)
    return Groups(
        sizes=sizes,
        places=places,
        token_at=_inverse(places, jnp.repeat(jnp.arange(tokens, dtype=jnp.int32), top_k)),
        expert_at=jnp.minimum(_inverse(places, experts), num_experts - 1),
    )


def _compared_places(
    experts: Int32[Array, " pairs"], num_experts: int
) -> tuple[Int32[Array, " pairs"], Int32[Array, " num_experts"]]:
    """Count the pairs before each pair, and the pairs of each expert."""
    index = jnp.arange(len(experts), dtype=jnp.int32)
    is_same = experts[None] == experts[:, None]
    is_before = (experts[None] < experts[:, None]) | (is_same & (index[None] < index[:, None]))
    is_of = experts[None] == jnp.arange(num_experts, dtype=jnp.int32)[:, None]
    return jnp.sum(is_before, axis=1, dtype=jnp.int32), jnp.sum(is_of, axis=1, dtype=jnp.int32)


def _counted_places(
    experts: Int32[Array, " pairs"], num_experts: int
) -> tuple[Int32[Array, " pairs"], Int32[Array, " num_experts"]]:
    """``_compared_places`` of many pairs, by a counting sort.

    A pair's place is after all pairs of lower experts, those of its expert in earlier parts, and those in its own part.
    """
    num_parts = -(-len(experts) // PART)
    padding = (0, num_parts * PART - len(experts))
    parts = jnp.pad(experts, padding, constant_values=num_experts).reshape(num_parts, -1)
    index, experts_of = (jnp.arange(n, dtype=jnp.int32) for n in (PART, num_experts + 1))
    is_earlier = (parts[:, None] == parts[:, :, None]) & (index[None] < index[:, None])[None]
    is_of = parts[:, None] == experts_of[None, :, None]
    earlier = jnp.sum(is_earlier, axis=2, dtype=jnp.int32)  # [parts, pairs of a part]
    counts = jnp.sum(is_of, axis=2, dtype=jnp.int32)  # [parts, experts]
    ends = jnp.cumsum(counts.T.reshape(-1), dtype=jnp.int32).reshape(-1, num_parts).T
    first = jnp.take_along_axis(ends - counts, parts, axis=1, mode="promise_in_bounds")
    places = (first + earlier).reshape(-1)[: len(experts)]
    places = jax.lax.optimization_barrier(places)  # or each element of a gathered row would compute them
    return places, jnp.sum(counts, axis=0, dtype=jnp.int32)[:num_experts]


def _inverse(permutation: Int32[Array, " pairs"], values: Int32[Array, " pairs"]) -> Int32[Array, " pairs"]:
    """The value at each place, where ``permutation`` has the place of each value."""
    target = jnp.zeros_like(values).at[permutation]
    return target.set(values, mode="promise_in_bounds", unique_indices=True, wrap_negative_indices=False)
