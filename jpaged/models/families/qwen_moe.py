"""Qwen2-MoE and Qwen3-MoE: Qwen2 and Qwen3 with mixtures of experts in some or all layers."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jpaged.models.checkpoint.config import MAX_INT, is_count, require
from jpaged.models.families.llama import (
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaMLP,
    LlamaModel,
)
from jpaged.models.families.llama_options import layer_windows
from jpaged.models.families.mixture import MixtureConfig
from jpaged.models.layers.common import Dtype, linear
from jpaged.models.layers.moe import ActivatedGate, Experts, Router, expert_widths, route
from jpaged.models.layers.spelling import PerExpert, Spelling, Whole

MODEL_TYPES = {"Qwen2MoeForCausalLM": "qwen2_moe", "Qwen3MoeForCausalLM": "qwen3_moe"}

_SPELLINGS: dict[str, tuple[Spelling, ...]] = {
    "gate_up": (PerExpert(("gate_proj", "up_proj")), Whole("gate_up_proj", (0, 1, 2, 3), joined=1)),
    "down": (PerExpert(("down_proj",), is_transposed=True), Whole("down_proj", (0, 2, 1))),
}


@dataclass(frozen=True, kw_only=True)
class QwenMoeConfig(MixtureConfig):
    """A Qwen2-MoE or Qwen3-MoE model. ``intermediate_size`` is the width of layers without experts.

    Args:
        expert_size: width of an expert.
        shared_expert_size: width of the expert that every token passes; None if there is none (Qwen3-MoE).
        is_normalized: whether the weights of a token's experts sum to 1.
        dense_layers: layers without experts.
    """

    model_types: ClassVar[dict[str, str]] = MODEL_TYPES

    expert_size: int
    shared_expert_size: int | None = None
    is_normalized: bool = False
    dense_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("expert_size", "shared_expert_size"):
            value = getattr(self, name)
            is_size = is_count(value) or (value is None and name == "shared_expert_size")
            require(is_size, name, value, f"an integer from 1 to {MAX_INT}")

    def widths(self, num_devices: int) -> dict[str, int]:
        widths = super().widths(num_devices) if self.dense_layers else {}
        if self.shared_expert_size is not None:
            widths["shared_expert_size"] = self.shared_expert_size
        return widths | expert_widths(num_devices, self.num_experts, expert_size=self.expert_size)

    @classmethod
    def from_hf(cls, hf: Any, common: dict[str, Any]) -> "QwenMoeConfig":
        is_second = MODEL_TYPES[common["architecture"]] == "qwen2_moe"
        layers, window = range(hf.num_hidden_layers), hf.sliding_window or None
        step = hf.decoder_sparse_step
        require(is_count(step), "decoder_sparse_step", step, f"an integer from 1 to {MAX_INT}")
        return cls(
            **cls.shared_from_hf(hf, common),
            qkv_bias=bool(hf.qkv_bias if is_second else hf.attention_bias),
            o_bias=not is_second and bool(hf.attention_bias),
            qk_norm=not is_second,
            sliding_windows=layer_windows(hf, window) if is_second else (window,) * len(layers),
            num_experts=hf.num_experts,
            top_k=hf.num_experts_per_tok,
            expert_size=hf.moe_intermediate_size,
            shared_expert_size=hf.shared_expert_intermediate_size if is_second else None,
            is_normalized=bool(hf.norm_topk_prob),
            dense_layers=tuple(i for i in layers if i in hf.mlp_only_layers or (i + 1) % step),
        )

    def to_hf(self) -> dict[str, Any]:
        window = self.sliding_window
        values = {
            **self.shared_hf(),
            "use_sliding_window": window is not None,
            "sliding_window": window,
            "num_experts": self.num_experts,
            "num_experts_per_tok": self.top_k,
            "moe_intermediate_size": self.expert_size,
            "norm_topk_prob": self.is_normalized,
            "mlp_only_layers": list(self.dense_layers),
        }
        if self.qk_norm:
            return values | {"attention_bias": self.qkv_bias}
        shared = {"shared_expert_intermediate_size": self.shared_expert_size}
        return values | shared | {"qkv_bias": self.qkv_bias, "layer_types": self.layer_types}


class QwenMoeBlock(nnx.Module):
    def __init__(self, config: QwenMoeConfig, *, dtype: Dtype, rngs: nnx.Rngs) -> None:
        hidden = config.hidden_size
        self.gate = Router(hidden, config.num_experts, dtype=dtype, rngs=rngs)
        self.experts = Experts(
            (config.num_experts, hidden, config.expert_size),
            gated=ActivatedGate(config.hidden_act),
            spellings=_SPELLINGS,
            dtype=dtype,
            rngs=rngs,
        )
        if config.shared_expert_size is not None:
            shared = replace(config, intermediate_size=config.shared_expert_size)
            self.shared_expert = LlamaMLP(shared, dtype=dtype, rngs=rngs)
            self.shared_expert_gate = linear(hidden, 1, None, None, bias=False, dtype=dtype, rngs=rngs)
        self.config = config

    def __call__(self, x: Float[Array, "tokens hidden_size"]) -> Float[Array, "tokens hidden_size"]:
        routes = route(self.gate(x), self.config.top_k, is_normalized=self.config.is_normalized)
        out = self.experts(x, routes)
        if self.config.shared_expert_size is None:
            return out
        return out + jax.nn.sigmoid(self._shared_logit(x)) * self.shared_expert(x)

    def _shared_logit(self, x: Float[Array, "tokens hidden_size"]) -> Float[Array, "tokens 1"]:
        """The projection to one logit, as a sum: XLA would compute a matrix product of two vectors in one thread."""
        kernel = self.shared_expert_gate.kernel[...].astype(jnp.float32)
        return jnp.sum(x.astype(jnp.float32) * kernel.T, axis=-1, keepdims=True).astype(x.dtype)


class QwenMoeDecoderLayer(LlamaDecoderLayer):
    def make_feed_forward(
        self, config: QwenMoeConfig, layer: int, *, dtype: Dtype, rngs: nnx.Rngs
    ) -> tuple[str, nnx.Module]:
        make = LlamaMLP if layer in config.dense_layers else QwenMoeBlock
        return "mlp", make(config, dtype=dtype, rngs=rngs)


class QwenMoeModel(LlamaModel):
    layer_class = QwenMoeDecoderLayer


class QwenMoeForCausalLM(LlamaForCausalLM):
    """A Qwen2-MoE or Qwen3-MoE model; see ``LlamaForCausalLM``."""

    model_class = QwenMoeModel
