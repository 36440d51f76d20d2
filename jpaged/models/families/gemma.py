"""Gemma 2 and Gemma 3 (text): norms on both sides of each block, windows on most layers, soft caps, two ropes."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int32

from jpaged.models.checkpoint.config import is_positive, require
from jpaged.models.families.llama import (
    LlamaAttention,
    LlamaConfig,
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaModel,
)
from jpaged.models.families.llama_options import head_dim_of, layer_windows
from jpaged.models.layers.common import Branch, Dtype, ShiftedRMSNorm, soft_capped
from jpaged.models.layers.rope import Angles, Rope
from jpaged.models.spec import Attend, LayerSpec

MODEL_TYPES = {"Gemma2ForCausalLM": "gemma2", "Gemma3ForCausalLM": "gemma3_text"}


@dataclass(frozen=True, kw_only=True)
class GemmaConfig(LlamaConfig):
    """A Gemma 2 model, or the text part of a Gemma 3 model.

    Args:
        query_pre_attn_scalar: scores are divided by its square root.
        attn_soft_cap: soft cap of the scores, None for none (Gemma 2).
        final_soft_cap: soft cap of the logits, None for none.
        local_rope: rotary embedding of the layers with a window; None for ``rope`` (Gemma 3).
    """

    model_types: ClassVar[dict[str, str]] = MODEL_TYPES
    activation_name: ClassVar[str] = "hidden_activation"

    query_pre_attn_scalar: float
    attn_soft_cap: float | None = None
    final_soft_cap: float | None = None
    local_rope: Rope | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        caps = {"attn_logit_softcapping": self.attn_soft_cap, "final_logit_softcapping": self.final_soft_cap}
        for name, cap in caps.items():
            require(cap is None or is_positive(cap), name, cap, "null or a number above 0")
        scalar = self.query_pre_attn_scalar
        require(is_positive(scalar), "query_pre_attn_scalar", scalar, "a number above 0")

    @property
    def max_model_len(self) -> int:
        return self.max_position_embeddings  # it counts the scaling of Gemma 3's rope already

    @property
    def layer_ropes(self) -> tuple[Rope | None, ...]:
        windows = self.sliding_windows or (None,) * self.num_layers
        return tuple(self.rope if window is None else self.local_rope or self.rope for window in windows)

    @property
    def layer_specs(self) -> tuple[LayerSpec, ...]:
        scale, cap = self.query_pre_attn_scalar**-0.5, self.attn_soft_cap
        return tuple(replace(spec, sm_scale=scale, soft_cap=cap) for spec in super().layer_specs)

    @classmethod
    def from_hf(cls, hf: Any, common: dict[str, Any]) -> "GemmaConfig":
        is_causal = not hf.use_bidirectional_attention
        require(is_causal, "use_bidirectional_attention", hf.use_bidirectional_attention, "false: attention is causal")
        ropes: dict[str, Rope] = {}
        if is_third := common["architecture"] == "Gemma3ForCausalLM":
            cap = hf.attn_logit_softcapping
            require(cap is None, "attn_logit_softcapping", cap, "null: Gemma 3 has no soft cap of scores")
            for kind, parameters in hf.rope_parameters.items():
                ropes[kind] = Rope.from_hf(parameters, head_dim_of(hf), hf.max_position_embeddings)
        return cls(
            **cls.shared_from_hf(hf, common, ropes.get("full_attention")),
            qkv_bias=hf.attention_bias,
            o_bias=hf.attention_bias,
            qk_norm=is_third,
            sliding_windows=layer_windows(hf, hf.sliding_window),
            query_pre_attn_scalar=hf.query_pre_attn_scalar,
            attn_soft_cap=hf.attn_logit_softcapping,
            final_soft_cap=hf.final_logit_softcapping,
            local_rope=ropes.get("sliding_attention"),
        )

    def to_hf(self) -> dict[str, Any]:
        values = self.shared_hf()
        if self.local_rope is not None:
            ropes = {"full_attention": self.rope.to_hf(), "sliding_attention": self.local_rope.to_hf()}
            values["rope_parameters"] = ropes
        return {
            **values,
            "attention_bias": self.qkv_bias,
            "sliding_window": self.sliding_window,
            "layer_types": self.layer_types,
            "query_pre_attn_scalar": self.query_pre_attn_scalar,
            "attn_logit_softcapping": self.attn_soft_cap,
            "final_logit_softcapping": self.final_soft_cap,
        }


class GemmaAttention(LlamaAttention):
    head_norm_class = ShiftedRMSNorm


class GemmaDecoderLayer(LlamaDecoderLayer):
    attention_class = GemmaAttention
    norm_class = ShiftedRMSNorm

    def __init__(self, config: GemmaConfig, layer: int, *, dtype: Dtype, rngs: nnx.Rngs) -> None:
        super().__init__(config, layer, dtype=dtype, rngs=rngs)
        hidden, epsilon = config.hidden_size, config.rms_norm_eps
        self.pre_feedforward_layernorm = ShiftedRMSNorm(hidden, epsilon, dtype=dtype, rngs=rngs)
        self.post_feedforward_layernorm = ShiftedRMSNorm(hidden, epsilon, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "tokens hidden_size"],
        branch: Branch | None,
        angles: Angles | None,
        attend: Attend,
    ) -> tuple[Float[Array, "tokens hidden_size"], Branch]:
        x, normed = self.input_layernorm.add(x, branch)
        attended = self.post_attention_layernorm.before_add(self.self_attn(normed, angles, attend))
        x, normed = self.pre_feedforward_layernorm.add(x, attended)
        return x, self.post_feedforward_layernorm.before_add(self.feed_forward(normed))


class GemmaModel(LlamaModel):
    layer_class = GemmaDecoderLayer
    norm_class = ShiftedRMSNorm


class GemmaForCausalLM(LlamaForCausalLM):
    """A decoder of Gemma 2 or 3; the arguments and methods are those of ``LlamaForCausalLM``."""

    model_class = GemmaModel

    def embed(self, token_ids: Int32[Array, "tokens"]) -> Float[Array, "tokens hidden_size"]:
        x = super().embed(token_ids)
        return x * jnp.asarray(self.config.hidden_size**0.5, x.dtype)  # rounded, as in training

    def logits(self, hidden: Float[Array, "rows hidden_size"]) -> Float[Array, "rows vocab"]:
        return soft_capped(super().logits(hidden), self.config.final_soft_cap)
