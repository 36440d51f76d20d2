"""The attention of a layer: one description that models, memory and kernels share, and the door between them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from jaxtyping import Array, Float, Float32, Int

from pallas_kernels.rope_write import HeadNorms


@dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """Attention of one layer, without its arrays. Hashable: it is static under jit, and known before any weight is.

    Whether a layer has sinks or ALiBi is part of the spec. Their numbers, one for each query head, are arguments of
    ``Attend``. Sinks are weights, and both are split over devices as the heads are.

    Args:
        layer: index of the layer in its model; where layers form groups, the device counts those of one group.
        num_kv_heads: heads of K and of V.
        head_dim: features of a head.
        sm_scale: factor on the scores.
        sliding_window: a token sees so many positions, its own the last of them; None for all up to its own.
        soft_cap: scores become ``soft_cap * tanh(score / soft_cap)``; None for none.
        sinks: whether each head has a logit that takes its share of the softmax and gives no value.
        alibi: whether ``slope * (kv_position - q_position)`` is added to each head's scores.
        group: layers of one group share a block table. The device forms the groups (``jpaged.models.groups``).

    Raises:
        ValueError: a number that no layer can have.
    """

    layer: int
    num_kv_heads: int
    head_dim: int
    sm_scale: float
    sliding_window: int | None = None
    soft_cap: float | None = None
    sinks: bool = False
    alibi: bool = False
    group: int = 0

    def __post_init__(self) -> None:
        for name, least in (("layer", 0), ("num_kv_heads", 1), ("head_dim", 1), ("group", 0)):
            _check(getattr(self, name) >= least, name, getattr(self, name), f"an integer from {least}")
        _check(self.sm_scale > 0, "sm_scale", self.sm_scale, "a number above 0")
        window, cap = self.sliding_window, self.soft_cap
        _check(window is None or window >= 1, "sliding_window", window, "None or an integer from 1")
        _check(cap is None or cap > 0, "soft_cap", cap, "None or a number above 0")


def _check(ok: bool, name: str, value: object, expected: str) -> None:
    if not ok:
        raise ValueError(f"{name}={value} is not valid for a layer: expected {expected}")


class Projected(NamedTuple):
    """Queries, K and V before their norms and rotation, for a memory that norms and rotates as it writes.

    Args:
        joined: on each device its query heads, then its heads of K, then those of V.
        summands: so many arrays in float32, whose sum ``joined`` is before it is rounded; None if it is no such sum.
        cos, sin: cosine and sine of each token's angles, as ``rotate`` takes them.
        norms: norms of queries and K before the rotation; None for none.
    """

    joined: Float[Array, "tokens features"]
    summands: Callable[[int], Float[Array, "count tokens features"] | None]
    cos: Float32[Array, "tokens half"]
    sin: Float32[Array, "tokens half"]
    norms: HeadNorms | None


class Source(NamedTuple):
    """The origin of a layer's queries, K and V, for a memory that makes or keeps them in its own way.

    Args:
        inputs: inputs of the projections of K and V for this step's tokens.
        project: K and V of any inputs, at the given positions of their sequences.
        projected: the projections themselves, if they are joined and nothing but norms and a rotation follows.
    """

    inputs: Float[Array, "tokens hidden_size"]
    project: Callable[
        [Float[Array, "others hidden_size"], Int[Array, " others"]],
        tuple[Float[Array, "others num_kv_heads head_dim"], Float[Array, "others num_kv_heads head_dim"]],
    ]
    projected: Projected | None = None


class Attend(Protocol):
    """Attention of one layer, supplied by the caller of a model. It is the only door to the KV cache.

    The engine's writes ``k`` and ``v`` to the block pool, then attends over it. Training and tests attend densely over
    the tokens given. Attention is causal.

    Args:
        spec: the layer, one of the model's ``layer_specs``.
        q, k, v: this step's tokens.
        sinks: one logit for each query head, if the spec has sinks.
        alibi_slopes: one slope for each query head, if the spec has ALiBi.
    """

    def __call__(
        self,
        spec: LayerSpec,
        q: Float[Array, "tokens num_heads head_dim"],
        k: Float[Array, "tokens num_kv_heads head_dim"],
        v: Float[Array, "tokens num_kv_heads head_dim"],
        *,
        sinks: Float[Array, " num_heads"] | None = None,
        alibi_slopes: Float[Array, " num_heads"] | None = None,
    ) -> Float[Array, "tokens num_heads head_dim"]: ...


def attend_from(
    source: Source,
    attend: Attend,
    spec: LayerSpec,
    q: Float[Array, "tokens num_heads head_dim"],
    k: Float[Array, "tokens num_kv_heads head_dim"],
    v: Float[Array, "tokens num_kv_heads head_dim"],
    sinks: Float[Array, " num_heads"] | None = None,
) -> Float[Array, "tokens num_heads head_dim"]:
    """Attend as ``attend`` does, and show it the source of K and V first if it has a method ``take_source``."""
    if (take_source := getattr(attend, "take_source", None)) is not None:
        take_source(source)
    return attend(spec, q, k, v) if sinks is None else attend(spec, q, k, v, sinks=sinks)


def check_head_arrays(
    spec: LayerSpec, sinks: Float[Array, " num_heads"] | None, alibi_slopes: Float[Array, " num_heads"] | None
) -> None:
    """Check that a layer attends with the arrays that its spec announces.

    Raises:
        ValueError: an array is missing, or the spec does not announce it.
    """
    for name, announced, array in (("sinks", spec.sinks, sinks), ("alibi", spec.alibi, alibi_slopes)):
        if announced != (array is not None):
            given = "without" if array is None else "with"
            raise ValueError(
                f"layer {spec.layer} attends {given} an array for {name}, and its spec has {name}={announced}: "
                "expected both or neither; correct the spec or the call"
            )
