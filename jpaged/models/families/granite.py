"""Granite: Llama whose embeddings, scores, branches and logits are scaled by constants of config.json."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from flax import nnx
from jaxtyping import Array, Float, Int32

from jpaged.models.checkpoint.config import is_positive, require
from jpaged.models.families.llama import LlamaConfig, LlamaDecoderLayer, LlamaForCausalLM, LlamaModel
from jpaged.models.layers.common import Branch, Dtype, scaled
from jpaged.models.layers.rope import Angles
from jpaged.models.spec import Attend, LayerSpec

MODEL_TYPES = {"GraniteForCausalLM": "granite"}

_MULTIPLIERS = ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling")


@dataclass(frozen=True, kw_only=True)
class GraniteConfig(LlamaConfig):
    """A Granite model.

    Args:
        embedding_multiplier: factor on the embeddings of tokens.
        attention_multiplier: factor on the scores, in place of ``head_dim**-0.5``.
        residual_multiplier: factor on what attention and the feed-forward layer add to the residual stream.
        logits_scaling: divisor of the logits.
    """

    model_types: ClassVar[dict[str, str]] = MODEL_TYPES

    embedding_multiplier: float = 1.0
    attention_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_scaling: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in _MULTIPLIERS:
            require(is_positive(getattr(self, name)), name, getattr(self, name), "a number above 0")

    @property
    def layer_specs(self) -> tuple[LayerSpec, ...]:
        return tuple(replace(spec, sm_scale=self.attention_multiplier) for spec in super().layer_specs)

    @classmethod
    def from_hf(cls, hf: Any, common: dict[str, Any]) -> "GraniteConfig":
        return cls(
            **cls.shared_from_hf(hf, common),
            qkv_bias=hf.attention_bias,
            o_bias=hf.attention_bias,
            mlp_bias=hf.mlp_bias,
            **{name: getattr(hf, name) for name in _MULTIPLIERS},
        )

    def to_hf(self) -> dict[str, Any]:
        biases = {"attention_bias": self.qkv_bias, "mlp_bias": self.mlp_bias}
        return {**self.shared_hf(), **biases, **{name: getattr(self, name) for name in _MULTIPLIERS}}


class GraniteDecoderLayer(LlamaDecoderLayer):
    def __init__(self, config: GraniteConfig, layer: int, *, dtype: Dtype, rngs: nnx.Rngs) -> None:
        super().__init__(config, layer, dtype=dtype, rngs=rngs)
        self.multiplier = config.residual_multiplier

    def __call__(
        self,
        x: Float[Array, "tokens hidden_size"],
        branch: Branch | None,
        angles: Angles | None,
        attend: Attend,
    ) -> tuple[Float[Array, "tokens hidden_size"], Branch]:
        x, normed = self.input_layernorm.add(x, branch)
        attended = Branch(self.self_attn(normed, angles, attend), multiplier=self.multiplier)
        x, normed = self.post_attention_layernorm.add(x, attended)
        return x, Branch(self.feed_forward(normed), multiplier=self.multiplier)


class GraniteModel(LlamaModel):
    layer_class = GraniteDecoderLayer


class GraniteForCausalLM(LlamaForCausalLM):
    """A Granite decoder; the arguments and methods are those of ``LlamaForCausalLM``."""

    model_class = GraniteModel

    def embed(self, token_ids: Int32[Array, "tokens"]) -> Float[Array, "tokens hidden_size"]:
        return scaled(super().embed(token_ids), self.config.embedding_multiplier)

    def logits(self, hidden: Float[Array, "rows hidden_size"]) -> Float[Array, "rows vocab"]:
        return super().logits(hidden) / self.config.logits_scaling
