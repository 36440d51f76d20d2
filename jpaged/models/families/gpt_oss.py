"""gpt-oss: experts with biases and a clamped gate in each layer, attention sinks, alternating windows."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from flax import nnx
from jaxtyping import Array, Float

from jpaged.models.checkpoint.config import is_positive, require
from jpaged.models.families.llama import (
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaModel,
)
from jpaged.models.families.llama_options import layer_windows
from jpaged.models.families.mixture import MixtureConfig
from jpaged.models.layers.common import Dtype, WideRMSNorm
from jpaged.models.layers.moe import ClampedSwiglu, Experts, Router, expert_widths, route
from jpaged.models.layers.mxfp4 import Mxfp4
from jpaged.models.layers.spelling import Spelling, Whole
from jpaged.models.spec import LayerSpec

MODEL_TYPES = {"GptOssForCausalLM": "gpt_oss"}

_SPELLINGS: dict[str, tuple[Spelling, ...]] = {
    # The features of gate and up alternate.
    "gate_up": (Whole("gate_up_proj", (0, 3, 2, 1), joined=2), Mxfp4("gate_up_proj", (0, 2, 1, 3), num_parts=2)),
    "down": (Whole("down_proj", (0, 1, 2)), Mxfp4("down_proj", (0, 2, 1))),
    "gate_up_bias": (Whole("gate_up_proj_bias", (0, 2, 1), joined=1),),
    "down_bias": (Whole("down_proj_bias", (0, 1)),),
}


@dataclass(frozen=True, kw_only=True)
class GptOssConfig(MixtureConfig):
    """A gpt-oss model. ``intermediate_size`` is the width of an expert.

    Args:
        swiglu_alpha, swiglu_limit: see ``ClampedSwiglu``.
    """

    model_types: ClassVar[dict[str, str]] = MODEL_TYPES
    quantizations: ClassVar[tuple[str, ...]] = ("mxfp4",)

    swiglu_alpha: float = 1.702
    swiglu_limit: float = 7.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("swiglu_alpha", "swiglu_limit"):
            require(is_positive(getattr(self, name)), name, getattr(self, name), "a number above 0")

    @property
    def layer_specs(self) -> tuple[LayerSpec, ...]:
        return tuple(replace(spec, sinks=True) for spec in super().layer_specs)

    def widths(self, num_devices: int) -> dict[str, int]:
        return expert_widths(num_devices, self.num_experts, intermediate_size=self.intermediate_size)

    @classmethod
    def from_hf(cls, hf: Any, common: dict[str, Any]) -> "GptOssConfig":
        return cls(
            **cls.shared_from_hf(hf, common),
            qkv_bias=bool(hf.attention_bias),
            o_bias=bool(hf.attention_bias),
            sliding_windows=layer_windows(hf, hf.sliding_window),
            num_experts=hf.num_local_experts,
            top_k=hf.num_experts_per_tok,
            swiglu_alpha=getattr(hf, "swiglu_alpha", cls.swiglu_alpha),
            swiglu_limit=getattr(hf, "swiglu_limit", cls.swiglu_limit),
        )

    def to_hf(self) -> dict[str, Any]:
        return {
            **self.shared_hf(),
            "attention_bias": self.qkv_bias,
            "layer_types": self.layer_types,
            "sliding_window": self.sliding_window,
            "num_local_experts": self.num_experts,
            "num_experts_per_tok": self.top_k,
            "swiglu_alpha": self.swiglu_alpha,
            "swiglu_limit": self.swiglu_limit,
        }


class GptOssBlock(nnx.Module):
    def __init__(self, config: GptOssConfig, *, dtype: Dtype, rngs: nnx.Rngs) -> None:
        hidden, ffn = config.hidden_size, config.intermediate_size
        self.router = Router(hidden, config.num_experts, bias=True, dtype=dtype, rngs=rngs)
        self.experts = Experts(
            (config.num_experts, hidden, ffn),
            gated=ClampedSwiglu(config.swiglu_alpha, config.swiglu_limit),
            spellings=_SPELLINGS,
            bias=True,
            dtype=dtype,
            rngs=rngs,
        )
        self.top_k = config.top_k

    def __call__(self, x: Float[Array, "tokens hidden_size"]) -> Float[Array, "tokens hidden_size"]:
        return self.experts(x, route(self.router(x), self.top_k, is_normalized=True))


class GptOssDecoderLayer(LlamaDecoderLayer):
    norm_class = WideRMSNorm

    def make_feed_forward(
        self, config: GptOssConfig, layer: int, *, dtype: Dtype, rngs: nnx.Rngs
    ) -> tuple[str, nnx.Module]:
        del layer
        return "mlp", GptOssBlock(config, dtype=dtype, rngs=rngs)


class GptOssModel(LlamaModel):
    layer_class = GptOssDecoderLayer
    norm_class = WideRMSNorm


class GptOssForCausalLM(LlamaForCausalLM):
    """A gpt-oss model; see ``LlamaForCausalLM``. Experts stored in MXFP4 are decoded as they are loaded."""

    model_class = GptOssModel
