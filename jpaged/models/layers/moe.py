"""Mixture of experts: the router, and the feed-forward layers of the experts that it chooses for each token."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int32, Shaped

from jpaged.models.checkpoint.config import MAX_INT, is_count, require
from jpaged.models.layers.common import ACTIVATIONS, Dtype, constant, with_axes
from jpaged.models.layers.expert_groups import groups_by_expert, groups_of_one_token
from jpaged.models.layers.spelling import Spelling

Gated = Callable[[Float[Array, "*batch ffn"], Float[Array, "*batch ffn"]], Float[Array, "*batch ffn"]]
"""Makes the input of the down projection from the results of the gate and up projections."""


class Routes(NamedTuple):
    """The experts of each token.

    Args:
        experts: the chosen experts of each token, best first.
        weights: the factor on the output of each, in float32.
    """

    experts: Int32[Array, "tokens top_k"]
    weights: Float[Array, "tokens top_k"]


def check_experts(num_experts: int, top_k: int) -> None:
    """Raise ValueError for numbers of experts, of a layer and of a token, that no model can have."""
    require(is_count(num_experts), "num_experts", num_experts, f"an integer from 1 to {MAX_INT}")
    expected = f"an integer from 1 to num_experts={num_experts}"
    require(is_count(top_k) and top_k <= num_experts, "num_experts_per_tok", top_k, expected)


def expert_widths(num_devices: int, num_experts: int, **width: int) -> dict[str, int]:
    """Return the named width of an expert if devices split experts by width; see ``param_sharding``."""
    return width if num_experts % num_devices else {}


def route(logits: Float[Array, "tokens num_experts"], top_k: int, *, is_normalized: bool) -> Routes:
    """Choose the experts of each token by the largest logits.

    Args:
        logits: in float32.
        top_k: experts of a token.
        is_normalized: whether the weights of a token sum to 1: the softmax is over the chosen experts. Otherwise it is
            over all experts.
    """
    chosen, experts = jax.lax.top_k(logits, top_k)
    largest = chosen[:, :1]
    weights = jnp.exp(chosen - largest)
    among = weights if is_normalized else jnp.exp(logits - largest)
    return Routes(experts.astype(jnp.int32), weights / jnp.sum(among, axis=-1, keepdims=True))


@dataclass(frozen=True)
class ActivatedGate:
    """Applies an activation to the gate, and multiplies it with the up projection.

    Args:
        name: name in ``ACTIVATIONS``.
    """

    name: str

    def __call__(self, gate: Float[Array, "*batch ffn"], up: Float[Array, "*batch ffn"]) -> Float[Array, "*batch ffn"]:
        return ACTIVATIONS[self.name](gate) * up


@dataclass(frozen=True)
class ClampedSwiglu:
    """The gate of gpt-oss: ``(up + 1) * gate * sigmoid(alpha * gate)`` of clamped inputs.

    Args:
        alpha: factor on the gate within the sigmoid.
        limit: bound of ``gate`` from above, and of ``up`` from both sides.
    """

    alpha: float
    limit: float

    def __call__(self, gate: Float[Array, "*batch ffn"], up: Float[Array, "*batch ffn"]) -> Float[Array, "*batch ffn"]:
        gate, up = jnp.minimum(gate, self.limit), jnp.clip(up, -self.limit, self.limit)
        return (up + 1) * gate * jax.nn.sigmoid(self.alpha * gate)


class Weights(NamedTuple):
    """Arrays of all experts; ``gate_up`` has the gate first. Biases are None if there are none."""

    gate_up: Float[Array, "num_experts 2 ffn hidden_size"]
    down: Float[Array, "num_experts ffn hidden_size"]
    gate_up_bias: Float[Array, "num_experts 2 ffn"] | None = None
    down_bias: Float[Array, "num_experts hidden_size"] | None = None


class GroupedProduct(Protocol):
    """Multiplies groups of rows by the matrix of each group, as ``pallas_kernels.grouped_matmul`` does."""

    def __call__(
        self,
        x: Float[Array, "rows features"],
        weights: Float[Array, "num_matrices ..."],
        group_sizes: Int32[Array, " num_groups"],
        *,
        matrices: Int32[Array, " num_groups"] | None = None,
        is_transposed: bool = False,
    ) -> Float[Array, "rows out_features"]: ...


RunExperts = Callable[[Float[Array, "tokens hidden_size"], Routes, Weights, Gated], Float[Array, "tokens hidden_size"]]
"""Computes the experts of a layer, as ``compute_experts`` does: over several devices, each computes its own."""


class Experts(nnx.Module):
    """Feed-forward layers of many experts, of which each token passes some.

    No expert has a capacity, and no token is dropped. A token's output does not depend on other tokens. ``run`` is the
    function that computes the experts (see ``run_experts_by``); None for ``compute_experts``.

    Args:
        shape: experts of the layer, features of a token, width of an expert.
        gated: see ``Gated``.
        bias: whether the projections have biases.
        spellings: name of a parameter -> ways in which checkpoints store it.
        dtype: dtype of the parameters and of the arithmetic, which accumulates in float32.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        *,
        gated: Gated,
        spellings: dict[str, tuple[Spelling, ...]],
        bias: bool = False,
        dtype: Dtype,
        rngs: nnx.Rngs,
    ) -> None:
        num_experts, hidden_size, ffn = shape
        normal, zeros = nnx.initializers.normal(0.02), nnx.initializers.zeros
        shapes = {
            "gate_up": (normal, (num_experts, 2, ffn, hidden_size), ("experts", None, "ffn", None)),
            "down": (normal, (num_experts, ffn, hidden_size), ("experts", "ffn", None)),
        }
        if bias:
            shapes["gate_up_bias"] = zeros, (num_experts, 2, ffn), ("experts", None, "ffn")
            shapes["down_bias"] = zeros, (num_experts, hidden_size), ("experts", None)
        for name, (init, sizes, axes) in shapes.items():
            value = with_axes(init, *axes)(rngs.params(), sizes, dtype)
            setattr(self, name, nnx.Param(value, spellings=spellings[name]))
        self.names = tuple(shapes)
        self.gated = gated
        self.run: RunExperts | None = None

    def __call__(self, x: Float[Array, "tokens hidden_size"], routes: Routes) -> Float[Array, "tokens hidden_size"]:
        """Compute the weighted sum of the outputs of each token's experts."""
        weights = Weights(**{name: getattr(self, name)[...] for name in self.names})
        return (self.run or compute_experts)(x, routes, weights, self.gated)


def run_experts_by(model: nnx.Module, run: RunExperts) -> None:
    """Let a function compute the experts of a model, in place."""
    for _, module in nnx.iter_modules(model):
        if isinstance(module, Experts):
            module.run = run


def compute_experts(
    x: Float[Array, "tokens hidden_size"],
    routes: Routes,
    weights: Weights,
    gated: Gated,
    product: GroupedProduct | None = None,
    *,
    has_all: bool = False,
) -> Float[Array, "tokens hidden_size"]:
    """Compute the weighted sum of the outputs of each token's experts, in the way that suits the device.

    Args:
        x: the tokens.
        routes: their experts. One that ``weights`` does not have adds nothing: another device has it.
        weights: weights of the experts.
        gated: see ``Gated``.
        product: multiplies groups of rows; None if nothing does it well here.
        has_all: whether ``weights`` has all experts.
    """
    if product is not None:
        return grouped_experts(x, routes, weights, gated, product, has_all=has_all)
    if 2 * routes.experts.size <= len(weights.down):
        return chosen_experts(x, routes, weights, gated)
    return all_experts(x, routes, weights, gated)


def chosen_experts(
    x: Float[Array, "tokens hidden_size"], routes: Routes, weights: Weights, gated: Gated
) -> Float[Array, "tokens hidden_size"]:
    """Compute the experts of a few tokens, and read the weights of these experts only.

    Each pair of a token and an expert reads the expert's weights once. The products are sums of elementwise products,
    because XLA reads a gathered operand in place there: it copies the gathered weights for a matrix product.
    """
    tokens, top_k = routes.experts.shape
    is_here = _is_here(routes, weights)
    experts = jnp.where(is_here, routes.experts, 0).reshape(-1)
    pairs = jnp.repeat(x, top_k, axis=0).astype(jnp.float32)
    gate_up = jnp.sum(weights.gate_up[experts].astype(jnp.float32) * pairs[:, None, None], axis=-1).astype(x.dtype)
    if weights.gate_up_bias is not None:
        gate_up += weights.gate_up_bias[experts]
    inner = gated(gate_up[:, 0], gate_up[:, 1]).astype(jnp.float32)
    out = jnp.sum(weights.down[experts].astype(jnp.float32) * inner[:, :, None], axis=1)
    if weights.down_bias is not None:
        out += weights.down_bias[experts].astype(jnp.float32)
    return _weighted(out.reshape(tokens, top_k, -1), routes, is_here).astype(x.dtype)


def all_experts(
    x: Float[Array, "tokens hidden_size"], routes: Routes, weights: Weights, gated: Gated
) -> Float[Array, "tokens hidden_size"]:
    """Compute all experts for all tokens, as one wide feed-forward layer: two matrix products.

    A step of many rows reads every expert anyway. Up to some hundred tokens, the reads take longer than the arithmetic.
    """
    is_pair = jax.nn.one_hot(routes.experts, len(weights.down), dtype=bool)  # [tokens, top_k, experts]
    is_chosen, factors = is_pair.any(axis=1), jnp.sum(jnp.where(is_pair, routes.weights[:, :, None], 0), axis=1)
    gate_up = jnp.einsum("th,epfh->tepf", x, weights.gate_up)
    if weights.gate_up_bias is not None:
        gate_up += weights.gate_up_bias[None]
    inner = gated(gate_up[:, :, 0], gate_up[:, :, 1])
    # An expert that was not chosen may overflow: its output must not reach the sum as 0 * infinity.
    inner = jnp.where(is_chosen[:, :, None], inner * factors.astype(x.dtype)[:, :, None], 0)
    out = jnp.einsum("tef,efh->th", inner, weights.down, preferred_element_type=jnp.float32)
    if weights.down_bias is not None:
        out += jnp.einsum("te,eh->th", factors, weights.down_bias.astype(jnp.float32))
    return out.astype(x.dtype)


def grouped_experts(
    x: Float[Array, "tokens hidden_size"],
    routes: Routes,
    weights: Weights,
    gated: Gated,
    product: GroupedProduct,
    *,
    has_all: bool = False,
) -> Float[Array, "tokens hidden_size"]:
    """Compute each expert for its own tokens: pairs of a token and an expert are grouped by expert.

    The shapes are static, with a row for each pair. Results return to their tokens by the place of each pair, and are
    summed in a fixed order.
    """
    (tokens, top_k), num_experts = routes.experts.shape, len(weights.down)
    is_here = None if has_all else _is_here(routes, weights)
    experts = routes.experts if is_here is None else jnp.where(is_here, routes.experts, num_experts)
    groups = groups_of_one_token(experts[0]) if tokens == 1 and has_all else groups_by_expert(experts, num_experts)

    product = partial(product, group_sizes=groups.sizes, matrices=groups.experts)
    gate_up = product(_rows(x, groups.token_at), _joined(weights.gate_up), is_transposed=True)
    if weights.gate_up_bias is not None:
        gate_up += _joined(weights.gate_up_bias)[groups.expert_at]
    out = product(gated(*jnp.split(gate_up, 2, axis=1)), weights.down)
    if weights.down_bias is not None:
        out += weights.down_bias[groups.expert_at]
    by_pair = _rows(out, groups.places).astype(jnp.float32).reshape(tokens, top_k, -1)
    return _weighted(by_pair, routes, is_here).astype(x.dtype)


def _joined(gate_up: Float[Array, "num_experts 2 ffn *rest"]) -> Float[Array, "num_experts joined *rest"]:
    return gate_up.reshape(len(gate_up), -1, *gate_up.shape[3:])


def _rows(array: Shaped[Array, "rows *rest"], index: Int32[Array, " pairs"]) -> Shaped[Array, "pairs *rest"]:
    """Gather rows by an index that is known to be valid: XLA would check it in kernels of their own."""
    return array.at[index].get(mode="promise_in_bounds", wrap_negative_indices=False)


def _is_here(routes: Routes, weights: Weights) -> Bool[Array, "tokens top_k"]:
    """Whether each chosen expert is one of ``weights``."""
    return (routes.experts >= 0) & (routes.experts < len(weights.down))


def _weighted(
    out: Float[Array, "tokens top_k hidden_size"], routes: Routes, is_here: Bool[Array, "tokens top_k"] | None
) -> Float[Array, "tokens hidden_size"]:
    """Sum the outputs of each token's experts, apart from those that are not here; None if all are."""
    weighted = out * routes.weights[:, :, None]
    return jnp.sum(weighted if is_here is None else jnp.where(is_here[:, :, None], weighted, 0), axis=1)


class Router(nnx.Module):
    """Projects each token to a logit for each expert, in float32: in bfloat16 logits would tie.

    Args:
        hidden_size, num_experts: shape of the projection.
        bias: whether it has a bias.
    """

    def __init__(self, hidden_size: int, num_experts: int, *, bias: bool = False, dtype: Dtype, rngs: nnx.Rngs) -> None:
        init = with_axes(nnx.initializers.normal(0.02), None, None)
        self.kernel = nnx.Param(init(rngs.params(), (hidden_size, num_experts), dtype))
        self.has_bias = bias
        if bias:
            self.bias = nnx.Param(constant(0, None)(rngs.params(), (num_experts,), dtype))

    def __call__(self, x: Float[Array, "tokens hidden_size"]) -> Float[Array, "tokens num_experts"]:
        logits = jnp.dot(x, self.kernel[...], preferred_element_type=jnp.float32)
        return logits + self.bias[...].astype(jnp.float32)[None] if self.has_bias else logits
