"""Layers and types that the model families share."""

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from pallas_kernels.norm import NormSpec, add_rms_norm, why_not_add_norm

Dtype = Any
"""Any value that ``jnp.dtype`` accepts."""

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_new": partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
}
"""Activation functions by their name in config.json."""


FUSED_NORM_FROM = 512
"""Tokens of a step from which one kernel that adds and norms is faster than the two kernels of XLA.

In Llama-3-8B on an H200 it takes 16 us instead of 25 for 2,048 tokens. For fewer tokens, one of XLA's two kernels also
sums the parts of a matrix product and would remain.
"""


class AddNorm(Protocol):
    """A kernel that adds a branch to the residual stream, and norms the sum; see ``add_rms_norm``."""

    def __call__(
        self,
        x: Float[Array, "tokens features"],
        branch: Float[Array, "tokens features"],
        scale: Float[Array, " features"],
        spec: NormSpec,
        *,
        branch_scale: Float[Array, " features"] | None = None,
        multiplier: float = 1.0,
    ) -> tuple[Float[Array, "tokens features"], Float[Array, "tokens features"]]: ...


class Branch(NamedTuple):
    """The output of a part of a layer, and how it becomes an addend of the residual stream.

    Args:
        out: the output.
        scale, spec: norm of the output, as of ``RMSNorm.before_add``; None for no norm.
        multiplier: factor on the output, before any norm.
    """

    out: Float[Array, "tokens features"]
    scale: Float[Array, " features"] | None = None
    spec: NormSpec | None = None
    multiplier: float = 1.0

    def addend(self) -> Float[Array, "tokens features"]:
        """The addend, by XLA."""
        out = scaled(self.out, self.multiplier)
        return out if self.scale is None or self.spec is None else rms_norm(out, self.scale, self.spec)


def check_activation(name: str) -> None:
    """Raise ValueError for an activation that ``ACTIVATIONS`` lacks."""
    if name not in ACTIVATIONS:
        raise ValueError(f"activation {name!r} is not supported: known are {', '.join(ACTIVATIONS)}")


def with_axes(init: Callable[..., Array], *axes: str | None) -> Callable[..., Any]:
    """Make an initialiser whose parameter carries logical axis names (see ``jpaged/sharding.py``)."""
    return nnx.with_metadata(init, logical_axes=axes)


def constant(value: int, *axes: str | None) -> Callable[..., Any]:
    """Make an initialiser of one value, which its parameter also carries as ``constant``, beside its logical axes."""
    return nnx.with_metadata(nnx.initializers.constant(value), logical_axes=axes, constant=value)


_normal = nnx.initializers.normal(0.02)


def linear(
    in_features: int,
    out_features: int,
    in_axis: str | None,
    out_axis: str | None,
    *,
    bias: bool,
    dtype: Dtype,
    rngs: nnx.Rngs,
    **metadata: Any,
) -> nnx.Linear:
    """Make a projection with parameters and arithmetic in ``dtype``, named axes, and more metadata of its kernel."""
    return nnx.Linear(
        in_features,
        out_features,
        use_bias=bias,
        dtype=dtype,
        param_dtype=dtype,
        kernel_init=nnx.with_metadata(_normal, logical_axes=(in_axis, out_axis), **metadata),
        bias_init=constant(0, out_axis),
        rngs=rngs,
    )


def embed(num_embeddings: int, features: int, axis: str | None, *, dtype: Dtype, rngs: nnx.Rngs) -> nnx.Embed:
    """Make an embedding whose rows carry the axis name ``axis``."""
    init = with_axes(_normal, axis, None)
    return nnx.Embed(num_embeddings, features, dtype=dtype, param_dtype=dtype, embedding_init=init, rngs=rngs)


class Norm(nnx.Module):
    """A norm over the last axis, which also takes the residual stream before a layer's output is added."""

    def __call__(self, x: Float[Array, "*batch features"]) -> Float[Array, "*batch features"]:
        raise NotImplementedError

    def add(
        self, x: Float[Array, "tokens features"], branch: Float[Array, "tokens features"] | Branch | None
    ) -> tuple[Float[Array, "tokens features"], Float[Array, "tokens features"]]:
        """Add a layer's output, if there is one, to the residual stream; return the sum and its norm."""
        x = added(x, branch)
        return x, self(x)


class RMSNorm(Norm):
    """Root-mean-square norm over the last axis, in float32 and cast *before* the scale, as Hugging Face does.

    ``add_norm`` is a kernel that ``add`` runs instead (see ``fuse_norms``), without a gradient; None for none.

    Args:
        features: size of the last axis.
        epsilon: addend to the mean square.
        axis: logical axis of the scale.
        dtype: dtype of the parameter.
        rngs: unused by the constant initial scale of 1.
    """

    is_wide: ClassVar[bool] = False
    offset: ClassVar[int] = 0

    def __init__(self, features: int, epsilon: float, *, axis: str | None = None, dtype: Dtype, rngs: nnx.Rngs) -> None:
        self.scale = nnx.Param(constant(1 - self.offset, axis)(rngs.params(), (features,), dtype))
        self.epsilon = epsilon
        self.add_norm: AddNorm | None = None

    @property
    def spec(self) -> NormSpec:
        return NormSpec(self.epsilon, self.is_wide, self.offset)

    def __call__(self, x: Float[Array, "*batch features"]) -> Float[Array, "*batch features"]:
        return rms_norm(x, self.scale[...], self.spec)

    def before_add(self, out: Float[Array, "tokens features"]) -> Branch:
        """Let this norm take the output of a part of a layer before the residual stream adds it."""
        return Branch(out, self.scale[...], self.spec)

    def add(
        self, x: Float[Array, "tokens features"], branch: Float[Array, "tokens features"] | Branch | None
    ) -> tuple[Float[Array, "tokens features"], Float[Array, "tokens features"]]:
        if branch is None or self.add_norm is None or len(x) < FUSED_NORM_FROM:
            return super().add(x, branch)
        branch = branch if isinstance(branch, Branch) else Branch(branch)
        if branch.spec not in (None, self.spec):
            branch = Branch(branch.addend())
        options = {"branch_scale": branch.scale, "multiplier": branch.multiplier}
        return self.add_norm(x, branch.out, self.scale[...], self.spec, **options)


class WideRMSNorm(RMSNorm):
    """Root-mean-square norm over the last axis, in float32 and cast *after* the scale, as OLMo 2 does."""

    is_wide = True


class ShiftedRMSNorm(WideRMSNorm):
    """``WideRMSNorm`` whose parameter is the scale less 1, as Gemma has it."""

    offset = 1


class LayerNorm(Norm):
    """Layer norm over the last axis as PyTorch computes it: in float32, with a two-pass variance.

    The layer norm of flax does not run in half precision under strict dtype promotion.
    """

    def __init__(
        self, features: int, epsilon: float = 1e-5, *, affine: bool = True, dtype: Dtype, rngs: nnx.Rngs
    ) -> None:
        self.affine, self.epsilon = affine, epsilon
        if affine:
            ones, zeros = constant(1, None), constant(0, None)
            self.scale = nnx.Param(ones(rngs.params(), (features,), dtype))
            self.bias = nnx.Param(zeros(rngs.params(), (features,), dtype))

    def __call__(self, x: Float[Array, "*batch features"]) -> Float[Array, "*batch features"]:
        wide = x.astype(jnp.float32)
        centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
        normed = centred * jax.lax.rsqrt(variance + self.epsilon)
        if self.affine:
            scale, bias = (_like_last_axis(p[...], x).astype(jnp.float32) for p in (self.scale, self.bias))
            normed = normed * scale + bias
        return normed.astype(x.dtype)


def fuse_norms(model: nnx.Module, add_norm: AddNorm | None = None) -> None:
    """Let a kernel add to the residual stream and norm, in the norms of a model that Hopper's kernel takes.

    Args:
        model: changed.
        add_norm: runs the kernel; None for the kernel itself, on one device.
    """
    add_norm = add_norm or add_rms_norm
    for _, module in nnx.iter_modules(model):
        if isinstance(module, RMSNorm):
            is_taken = why_not_add_norm(module.scale.shape[0], jnp.dtype(module.scale.dtype)) is None
            module.add_norm = add_norm if is_taken else None


def rms_norm(
    x: Float[Array, "*batch features"], scale: Float[Array, " features"], spec: NormSpec
) -> Float[Array, "*batch features"]:
    """Norm the last axis as ``spec`` says, by XLA."""
    wide = x.astype(jnp.float32)
    variance = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
    wide = wide * jax.lax.rsqrt(variance + spec.epsilon)
    scale = _like_last_axis(scale, x)
    if not spec.is_wide:
        return wide.astype(x.dtype) * scale
    scale = scale.astype(jnp.float32)
    return (wide * (spec.offset + scale if spec.offset else scale)).astype(x.dtype)


def added(
    x: Float[Array, "tokens features"], branch: Float[Array, "tokens features"] | Branch | None
) -> Float[Array, "tokens features"]:
    """Add a layer's output, if there is one, to the residual stream."""
    if branch is None:
        return x
    return x + (branch.addend() if isinstance(branch, Branch) else branch)


def _like_last_axis(value: Array, x: Array) -> Array:
    """Give a parameter of the last axis the rank of ``x``: ranks are never promoted silently."""
    return value.reshape((1,) * (x.ndim - 1) + value.shape)


def scaled(x: Float[Array, "*shape"], factor: float) -> Float[Array, "*shape"]:
    """Multiply in float32, as PyTorch multiplies by a number: JAX would round the number to the dtype of ``x``."""
    return x if factor == 1 else (x.astype(jnp.float32) * factor).astype(x.dtype)


def soft_capped(logits: Float[Array, "*shape"], cap: float | None) -> Float[Array, "*shape"]:
    """Return ``cap * tanh(logits / cap)``; without a cap, the logits."""
    return logits if cap is None else cap * jnp.tanh(logits / cap)


def to_vocab(
    hidden: Float[Array, "rows features"], embed_tokens: nnx.Embed, lm_head: nnx.Linear | None
) -> Float[Array, "rows vocab"]:
    """Compute logits in float32, by the output projection or, without one, by the tied embedding."""
    weight, axis = (embed_tokens.embedding[...], 1) if lm_head is None else (lm_head.kernel[...], 0)
    return jax.lax.dot_general(hidden, weight, (((1,), (axis,)), ((), ())), preferred_element_type=jnp.float32)


def split_heads(x: Float[Array, "tokens features"], head_dim: int) -> Float[Array, "tokens heads head_dim"]:
    """View the last axis as heads."""
    return x.reshape(x.shape[0], -1, head_dim)
