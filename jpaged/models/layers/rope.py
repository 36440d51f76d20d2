"""Rotary position embeddings: the default form, every scaling transformers writes for Llama, and parts of heads."""

import math
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from jpaged.models.checkpoint.config import MAX_INT, is_count, require
from jpaged.models.layers.rope_parameters import check_parameter


@dataclass(frozen=True, slots=True)
class Linear:
    """Positions divided by ``factor``."""

    factor: float

    def inv_freq(self, rope: "Rope") -> np.ndarray:
        return rope.plain_inv_freq() / np.float32(self.factor)


@dataclass(frozen=True, slots=True)
class Dynamic:
    """NTK-aware: the base grows beyond ``Rope.max_position_embeddings``, so that KV depends on the prompt's length."""

    factor: float


_BETA_FAST, _BETA_SLOW = 32, 1
"""Rotations over the original context: YaRN keeps frequencies above the first, interpolates below the second."""


@dataclass(frozen=True, slots=True)
class Yarn:
    """YaRN (https://arxiv.org/abs/2309.00071): interpolates low frequencies, keeps high ones, ramps in between."""

    factor: float
    original_max_position_embeddings: int
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def magnitude(self) -> float:
        """The factor on cosines and sines."""

        def mscale(weight: float) -> float:
            return 1.0 if self.factor <= 1 else 0.1 * weight * math.log(self.factor) + 1.0

        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return mscale(self.mscale) / mscale(self.mscale_all_dim)
        return mscale(1.0)

    def inv_freq(self, rope: "Rope") -> np.ndarray:
        def dim_of(rotations: float) -> float:
            """The dimension with this many rotations over the original context."""
            ratio = self.original_max_position_embeddings / (rotations * 2 * math.pi)
            return rope.rotary_dim * math.log(ratio) / (2 * math.log(rope.theta))

        low, high = dim_of(self.beta_fast or _BETA_FAST), dim_of(self.beta_slow or _BETA_SLOW)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, rope.rotary_dim - 1)
        if low == high:
            high += 0.001  # a ramp of no width would divide by zero
        half = np.arange(rope.rotary_dim // 2, dtype=np.float32)
        interpolated = np.clip((half - low) / (high - low), 0, 1).astype(np.float32)
        plain = rope.plain_inv_freq()
        return plain / np.float32(self.factor) * interpolated + plain * (1 - interpolated)


@dataclass(frozen=True, slots=True)
class LongRope:
    """LongRoPE: one set of divisors per dimension up to the original context, and another set beyond."""

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_max_position_embeddings: int
    factor: float | None = None
    attention_factor: float | None = None

    def magnitude(self, max_position_embeddings: int) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        original = self.original_max_position_embeddings
        factor = max_position_embeddings / original if self.factor is None else self.factor
        return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))


@dataclass(frozen=True, slots=True)
class Llama3:
    """Llama 3.1: divides frequencies of long wavelengths by ``factor``, keeps short ones, blends in between."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def inv_freq(self, rope: "Rope") -> np.ndarray:
        plain = rope.plain_inv_freq()
        turns = self.original_max_position_embeddings * plain / np.float32(2 * math.pi)
        kept = np.clip((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor), 0, 1)
        kept = kept.astype(np.float32)
        return (1 - kept) * plain / np.float32(self.factor) + kept * plain


Scaling = Linear | Dynamic | Yarn | LongRope | Llama3
_SCALINGS: dict[str, type[Scaling]] = {
    "linear": Linear,
    "dynamic": Dynamic,
    "yarn": Yarn,
    "longrope": LongRope,
    "llama3": Llama3,
}


_PARAMETERS = "rope_parameters", "rope_scaling"
"""The current and the older name of the rotary parameters in config.json."""

Angles = tuple[Float[Array, "tokens half"], Float[Array, "tokens half"]]
"""Cosine and sine of each token's angles, float32."""


def with_current_names(raw: dict[str, Any]) -> dict[str, Any]:
    """Return config.json with the current names of rope types: the first Phi-3 checkpoints call longrope "su".

    transformers 5.24 knows both names, but it demands the original context of the type before it renames that type.
    """
    renamed = dict(raw)
    for name in _PARAMETERS:
        if isinstance(parameters := raw.get(name), dict):
            renamed[name] = {
                key: "longrope" if key in ("rope_type", "type") and value == "su" else value
                for key, value in parameters.items()
            }
    return renamed


def check_spelled_parameters(raw: dict[str, Any]) -> None:
    """Check rotary parameters as config.json spells them, before any computation uses them.

    Args:
        raw: config.json; the parameters are in ``rope_parameters``, in the older ``rope_scaling``, or at the top level.

    Raises:
        ValueError: a parameter has another type or is out of range; the message names it.
    """
    nested = [raw[name] for name in _PARAMETERS if isinstance(raw.get(name), dict)]
    for parameters in (raw, *nested):
        if "rope_theta" in parameters:
            check_parameter("rope_theta", parameters["rope_theta"], is_optional=False)
    for parameters in nested:
        rope_type = parameters.get("rope_type", parameters.get("type"))
        kind = _SCALINGS.get(rope_type) if isinstance(rope_type, str) else None
        for field in () if kind is None else fields(kind):
            if field.name in parameters:
                # YaRN's factor may be null; the other scalings check for a missing factor when they are built.
                is_optional = field.default is None or field.name == "factor"
                check_parameter(field.name, parameters[field.name], is_optional=is_optional)


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary embedding of a head: dimension i is paired with dimension i + rotary_dim / 2, as Hugging Face does.

    Args:
        head_dim: features of a head.
        theta: base of the wavelengths.
        max_position_embeddings: value in config.json; the base of "dynamic" grows beyond this length.
        scaling: scaling of the frequencies; None is the default form.
        partial_rotary_factor: share of a head's features that is rotated; ``rotary_dim`` is their number, an even one.
    """

    head_dim: int
    theta: float
    max_position_embeddings: int
    scaling: Scaling | None = None
    partial_rotary_factor: float = 1.0

    def __post_init__(self) -> None:
        for name in ("head_dim", "max_position_embeddings"):
            require(is_count(getattr(self, name)), name, getattr(self, name), f"an integer from 1 to {MAX_INT}")
        check_parameter("partial_rotary_factor", self.partial_rotary_factor, is_optional=False)
        if self.rotary_dim % 2 or not self.rotary_dim:
            part = "" if self.partial_rotary_factor == 1 else f" times {self.partial_rotary_factor}"
            kind = "odd" if self.rotary_dim else "0"
            raise ValueError(f"head_dim={self.head_dim}{part} is {kind}: rotary embeddings pair dimensions")
        check_parameter("rope_theta", self.theta, is_optional=False)
        if self.scaling is not None:
            self._check_scaling(self.scaling)

    def _check_scaling(self, scaling: "Scaling") -> None:
        for field in fields(scaling):
            check_parameter(field.name, getattr(scaling, field.name), is_optional=field.default is None)
        match scaling:
            case Dynamic() if self.rotary_dim == 2:
                raise ValueError("rope_type 'dynamic' needs a head_dim above 2")
            case Yarn(beta_fast=fast, beta_slow=slow):
                fast, slow = fast or _BETA_FAST, slow or _BETA_SLOW
                require(fast >= slow, "beta_fast", fast, f"beta_slow={slow} or more")
            case LongRope():
                for name in ("short_factor", "long_factor"):
                    length, expected = len(getattr(scaling, name)), self.rotary_dim // 2
                    if length != expected:
                        dims = "head_dim" if self.partial_rotary_factor == 1 else "rotated dimensions"
                        raise ValueError(f"{name} has {length} entries: expected {dims} / 2 = {expected}")
            case Llama3(low_freq_factor=low, high_freq_factor=high):
                require(high > low, "high_freq_factor", high, f"a number above low_freq_factor={low}")
        require(is_count(self.max_model_len), "factor", scaling.factor, f"a context of at most {MAX_INT} tokens")

    @classmethod
    def from_hf(
        cls, parameters: dict[str, Any], head_dim: int, max_position_embeddings: int, *, is_partial: bool = False
    ) -> "Rope":
        """Build the embedding from transformers' standardised ``rope_parameters``.

        Args:
            parameters: ``rope_parameters``.
            head_dim: features of a head.
            max_position_embeddings: value in config.json.
            is_partial: whether the family may rotate a part of each head.

        Raises:
            ValueError: the rope type is unknown, or a parameter is out of range.
        """
        rope_type = parameters.get("rope_type", "default")
        if not isinstance(rope_type, str) or rope_type not in ("default", *_SCALINGS):
            raise ValueError(f"rope_type={rope_type!r} is not supported: known are default, {', '.join(_SCALINGS)}")
        part: Any = parameters.get("partial_rotary_factor")
        part = 1.0 if part is None else part
        if not is_partial and part != 1:
            raise ValueError(f"partial_rotary_factor={part} is not supported for this architecture: expected 1")
        scaling = None
        if rope_type != "default":
            kind = _SCALINGS[rope_type]
            given: dict[str, Any] = {}
            for name in (field.name for field in fields(kind)):
                value = parameters.get(name)
                if value is not None:
                    given[name] = tuple(value) if isinstance(value, list) else value
            if rope_type == "yarn" and "factor" not in given:
                given["factor"] = max_position_embeddings / given["original_max_position_embeddings"]
            required = [field.name for field in fields(kind) if field.default is MISSING]
            if missing := [name for name in required if name not in given]:
                raise ValueError(f"rope_type={rope_type!r} needs {', '.join(missing)}: add what is missing")
            scaling = kind(**given)
        theta: Any = parameters.get("rope_theta")
        return cls(head_dim, theta, max_position_embeddings, scaling, part)

    def to_hf(self) -> dict[str, Any]:
        """Return the ``rope_parameters`` that ``from_hf`` reads back."""
        part = {} if self.partial_rotary_factor == 1 else {"partial_rotary_factor": self.partial_rotary_factor}
        if self.scaling is None:
            return {"rope_type": "default", "rope_theta": self.theta, **part}
        rope_type = next(name for name, kind in _SCALINGS.items() if isinstance(self.scaling, kind))
        values = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self.scaling).items() if v is not None}
        return {"rope_type": rope_type, "rope_theta": self.theta, **part, **values}

    @property
    def rotary_dim(self) -> int:
        """The features of a head that are rotated, its first."""
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def is_static(self) -> bool:
        """Whether the embedding of a position does not depend on the prompt's length."""
        return not isinstance(self.scaling, Dynamic | LongRope)

    @property
    def max_model_len(self) -> int:
        """The longest context that the scaling is made for."""
        match self.scaling:
            case Linear(factor) | Dynamic(factor):
                return int(self.max_position_embeddings * factor)
            case Yarn(factor=factor, original_max_position_embeddings=original):
                return int(original * factor)
            case _:
                return self.max_position_embeddings

    def prefix_salt(self, prompt_len: int) -> bytes:
        """See ``ModelConfig.prefix_salt``."""
        match self.scaling:
            case Dynamic() if prompt_len > self.max_position_embeddings:
                return f"dynamic rope at {prompt_len}".encode()
            case LongRope(original_max_position_embeddings=original) if prompt_len > original:
                return b"long rope"
            case _:
                return b""

    def plain_inv_freq(self) -> np.ndarray:
        """Radians per token of each pair of dimensions without scaling, [rotary_dim / 2] float32."""
        exponents = np.arange(0, self.rotary_dim, 2, dtype=np.float32) / np.float32(self.rotary_dim)
        return np.float32(1) / np.float32(self.theta) ** exponents

    def cos_sin(self, positions: Int32[Array, "tokens"], prompt_lens: Int32[Array, "tokens"]) -> Angles:
        """Compute cosine and sine, float32, of each token's angles, times the scaling's magnitude.

        Args:
            positions: each token's position in its sequence, from 0.
            prompt_lens: length of the prompt of each token's sequence. "dynamic" and "longrope" embed a token for a
                length of max(prompt_len, position + 1). So does a prefill with decodes over a KV cache.
        """
        seq_lens = jnp.maximum(prompt_lens, positions + 1)
        magnitude = 1.0
        match self.scaling:
            case None:
                inv_freq = jnp.asarray(self.plain_inv_freq())[None]
            case Dynamic(factor):
                grown = jnp.maximum(seq_lens, self.max_position_embeddings).astype(jnp.float32)
                ratio = factor * grown / self.max_position_embeddings - (factor - 1)
                theta = float(self.theta) * ratio ** (self.rotary_dim / (self.rotary_dim - 2))
                exponents = np.arange(0, self.rotary_dim, 2, dtype=np.float32) / np.float32(self.rotary_dim)
                inv_freq = 1 / theta[:, None] ** jnp.asarray(exponents)[None]
            case LongRope() as scaling:
                magnitude = scaling.magnitude(self.max_position_embeddings)
                plain = self.plain_inv_freq()
                short = jnp.asarray(plain / np.asarray(scaling.short_factor, np.float32))
                long = jnp.asarray(plain / np.asarray(scaling.long_factor, np.float32))
                is_long = seq_lens > scaling.original_max_position_embeddings
                inv_freq = jnp.where(is_long[:, None], long[None], short[None])
            case scaling:
                magnitude = scaling.magnitude() if isinstance(scaling, Yarn) else 1.0
                inv_freq = jnp.asarray(scaling.inv_freq(self))[None]
        angles = positions.astype(jnp.float32)[:, None] * inv_freq
        return jnp.cos(angles) * magnitude, jnp.sin(angles) * magnitude


def rotate(
    x: Float[Array, "tokens heads head_dim"], cos: Float[Array, "tokens half"], sin: Float[Array, "tokens half"]
) -> Float[Array, "tokens heads head_dim"]:
    """Rotate pairs of each head's first 2 * half dimensions in float32; the result has the dtype of ``x``."""
    half = cos.shape[-1]
    first, second = x[..., :half].astype(jnp.float32), x[..., half : 2 * half].astype(jnp.float32)
    cos, sin = cos[:, None], sin[:, None]
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
    return rotated if 2 * half == x.shape[-1] else jnp.concatenate([rotated, x[..., 2 * half :]], axis=-1)
