"""OLMo 2: Llama with norms after attention and feed-forward layer, and over the whole projections of Q and K."""

from dataclasses import dataclass
from typing import Any, ClassVar

from flax import nnx
from jaxtyping import Array, Float

from jpaged.models.families.llama import (
    LlamaAttention,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaMLP,
    LlamaModel,
)
from jpaged.models.layers.common import Branch, Dtype, WideRMSNorm, added, split_heads
from jpaged.models.layers.rope import Angles
from jpaged.models.spec import Attend

MODEL_TYPES = {"Olmo2ForCausalLM": "olmo2"}


@dataclass(frozen=True, kw_only=True)
class Olmo2Config(LlamaConfig):
    """An OLMo 2 model."""

    model_types: ClassVar[dict[str, str]] = MODEL_TYPES

    @classmethod
    def from_hf(cls, hf: Any, common: dict[str, Any]) -> "Olmo2Config":
        return cls(**cls.shared_from_hf(hf, common), qkv_bias=hf.attention_bias, o_bias=hf.attention_bias)

    def to_hf(self) -> dict[str, Any]:
        return {**self.shared_hf(), "attention_bias": self.qkv_bias}


class Olmo2Attention(LlamaAttention):
    def __init__(self, config: Olmo2Config, layer: int, *, dtype: Dtype, rngs: nnx.Rngs) -> None:
        super().__init__(config, layer, dtype=dtype, rngs=rngs)
        epsilon, q_size, kv_size = (
            config.rms_norm_eps,
            *(heads * config.head_dim for heads in (config.num_heads, config.num_kv_heads)),
        )
        self.q_norm = WideRMSNorm(q_size, epsilon, axis="heads", dtype=dtype, rngs=rngs)
        self.k_norm = WideRMSNorm(kv_size, epsilon, axis="kv_heads", dtype=dtype, rngs=rngs)

    def _normed_heads(
        self, projected: Float[Array, "tokens features"], norm: WideRMSNorm
    ) -> Float[Array, "tokens heads head_dim"]:
        return split_heads(norm(projected), self.config.head_dim)

    def _projected(
        self,
        x: Float[Array, "tokens hidden_size"],
        joined: Float[Array, "tokens features"] | None,
        angles: Angles | None,
    ) -> None:
        """The norms are over all heads, so that no head is normed by itself."""


class Olmo2DecoderLayer(nnx.Module):
    def __init__(self, config: Olmo2Config, layer: int, *, dtype: Dtype, rngs: nnx.Rngs) -> None:
        hidden, epsilon = config.hidden_size, config.rms_norm_eps
        self.self_attn = Olmo2Attention(config, layer, dtype=dtype, rngs=rngs)
        self.post_attention_layernorm = WideRMSNorm(hidden, epsilon, dtype=dtype, rngs=rngs)
        self.mlp = LlamaMLP(config, dtype=dtype, rngs=rngs)
        self.post_feedforward_layernorm = WideRMSNorm(hidden, epsilon, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "tokens hidden_size"],
        branch: Branch | None,
        angles: Angles | None,
        attend: Attend,
    ) -> tuple[Float[Array, "tokens hidden_size"], Branch]:
        """Return the residual stream and its last addend, as ``LlamaDecoderLayer`` does."""
        x = added(x, branch)
        x = added(x, self.post_attention_layernorm.before_add(self.self_attn(x, angles, attend)))
        return x, self.post_feedforward_layernorm.before_add(self.mlp(x))


class Olmo2Model(LlamaModel):
    layer_class = Olmo2DecoderLayer
    norm_class = WideRMSNorm


class Olmo2ForCausalLM(LlamaForCausalLM):
    """An OLMo 2 decoder; the arguments and methods are those of ``LlamaForCausalLM``."""

    model_class = Olmo2Model
