"""Mixture of experts: the router, and the feed-forward layers of the experts that it chooses for each token."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int32

from jpaged.models.checkpoint.config import MAX_INT, is_count, require
from jpaged.models.layers.common import ACTIVATIONS, Dtype, with_axes
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
    among = chosen if is_normalized else logits
    weights = jnp.exp(chosen - jax.nn.logsumexp(among, axis=-1, keepdims=True))
    return Routes(experts.astype(jnp.int32), weights)


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


class Experts(nnx.Module):
    """Feed-forward layers of many experts, of which each token passes some.

    No expert has a capacity, and no token is dropped. A token's output does not depend on other tokens.

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

    def __call__(self, x: Float[Array, "tokens hidden_size"], routes: Routes) -> Float[Array, "tokens hidden_size"]:
        """Compute the weighted sum of the outputs of each token's experts."""
        weights = Weights(**{name: getattr(self, name)[...] for name in self.names})
        is_few = 2 * routes.experts.size <= len(weights.down)
        return (chosen_experts if is_few else all_experts)(x, routes, weights, self.gated)


def chosen_experts(
    x: Float[Array, "tokens hidden_size"], routes: Routes, weights: Weights, gated: Gated
) -> Float[Array, "tokens hidden_size"]:
    """Compute the experts of a few tokens, and read the weights of these experts only.

    Each pair of a token and an expert reads the expert's weights once. The products are sums of elementwise products,
    because XLA reads a gathered operand in place there: it copies the gathered weights for a matrix product.
    """
    tokens, top_k = routes.experts.shape
    experts = routes.experts.reshape(-1)
    pairs = jnp.repeat(x, top_k, axis=0).astype(jnp.float32)
    gate_up = jnp.sum(weights.gate_up[experts].astype(jnp.float32) * pairs[:, None, None], axis=-1).astype(x.dtype)
    if weights.gate_up_bias is not None:
        gate_up += weights.gate_up_bias[experts]
    inner = gated(gate_up[:, 0], gate_up[:, 1]).astype(jnp.float32)
    out = jnp.sum(weights.down[experts].astype(jnp.float32) * inner[:, :, None], axis=1)
    if weights.down_bias is not None:
        out += weights.down_bias[experts].astype(jnp.float32)
    out = out.reshape(tokens, top_k, -1) * routes.weights[:, :, None]
    return out.sum(axis=1).astype(x.dtype)


def all_experts(
    x: Float[Array, "tokens hidden_size"], routes: Routes, weights: Weights, gated: Gated
) -> Float[Array, "tokens hidden_size"]:
    """Compute all experts for all tokens, as one wide feed-forward layer: two matrix products.

    A step of many rows reads every expert anyway. Up to some hundred tokens, the reads take longer than the arithmetic.
    """
    is_chosen, factors = _dense(routes, len(weights.down))
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


def _dense(
    routes: Routes, num_experts: int
) -> tuple[Bool[Array, "tokens num_experts"], Float[Array, "tokens num_experts"]]:
    """Return for every expert and token whether the token chose the expert, and the factor."""
    is_pair = jax.nn.one_hot(routes.experts, num_experts, dtype=bool)
    return is_pair.any(axis=1), jnp.sum(jnp.where(is_pair, routes.weights[:, :, None], 0), axis=1)


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
            zeros = with_axes(nnx.initializers.zeros, None)
            self.bias = nnx.Param(zeros(rngs.params(), (num_experts,), dtype))

    def __call__(self, x: Float[Array, "tokens hidden_size"]) -> Float[Array, "tokens num_experts"]:
        logits = jnp.dot(x, self.kernel[...], preferred_element_type=jnp.float32)
        return logits + self.bias[...].astype(jnp.float32)[None] if self.has_bias else logits
