"""Mixtral: Mistral with a mixture of experts in place of each feed-forward layer."""

from dataclasses import dataclass
from typing import Any, ClassVar

from flax import nnx
from jaxtyping import Array, Float

from jpaged.models.families.llama import (
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaModel,
)
from jpaged.models.families.mixture import MixtureConfig
from jpaged.models.layers.common import Dtype
from jpaged.models.layers.moe import ActivatedGate, Experts, Router, expert_widths, route
from jpaged.models.layers.spelling import PerExpert, Spelling, Whole

MODEL_TYPES = {"MixtralForCausalLM": "mixtral"}

_SPELLINGS: dict[str, tuple[Spelling, ...]] = {
    "gate_up": (PerExpert(("w1", "w3")), Whole("gate_up_proj", (0, 1, 2, 3), joined=1)),
    "down": (PerExpert(("w2",), is_transposed=True), Whole("down_proj", (0, 2, 1))),
}


@dataclass(frozen=True, kw_only=True)
class MixtralConfig(MixtureConfig):
    """A Mixtral model. ``intermediate_size`` is the width of an expert."""

    model_types: ClassVar[dict[str, str]] = MODEL_TYPES
    renamed: ClassVar[tuple[tuple[str, str], ...]] = (*MixtureConfig.renamed, (".mlp.", ".block_sparse_moe."))

    def widths(self, num_devices: int) -> dict[str, int]:
        return expert_widths(num_devices, self.num_experts, intermediate_size=self.intermediate_size)

    @classmethod
    def from_hf(cls, hf: Any, common: dict[str, Any]) -> "MixtralConfig":
        return cls(
            **cls.shared_from_hf(hf, common),
            sliding_windows=(hf.sliding_window,) * hf.num_hidden_layers,
            num_experts=hf.num_local_experts,
            top_k=hf.num_experts_per_tok,
        )

    def to_hf(self) -> dict[str, Any]:
        return {
            **self.shared_hf(),
            "sliding_window": self.sliding_window,
            "num_local_experts": self.num_experts,
            "num_experts_per_tok": self.top_k,
        }


class MixtralBlock(nnx.Module):
    def __init__(self, config: MixtralConfig, *, dtype: Dtype, rngs: nnx.Rngs) -> None:
        hidden, ffn = config.hidden_size, config.intermediate_size
        self.gate = Router(hidden, config.num_experts, dtype=dtype, rngs=rngs)
        self.experts = Experts(
            (config.num_experts, hidden, ffn),
            gated=ActivatedGate(config.hidden_act),
            spellings=_SPELLINGS,
            dtype=dtype,
            rngs=rngs,
        )
        self.top_k = config.top_k

    def __call__(self, x: Float[Array, "tokens hidden_size"]) -> Float[Array, "tokens hidden_size"]:
        return self.experts(x, route(self.gate(x), self.top_k, is_normalized=True))


class MixtralDecoderLayer(LlamaDecoderLayer):
    def make_feed_forward(
        self, config: MixtralConfig, layer: int, *, dtype: Dtype, rngs: nnx.Rngs
    ) -> tuple[str, nnx.Module]:
        del layer
        return "block_sparse_moe", MixtralBlock(config, dtype=dtype, rngs=rngs)


class MixtralModel(LlamaModel):
    layer_class = MixtralDecoderLayer


class MixtralForCausalLM(LlamaForCausalLM):
    """A Mixtral model; see ``LlamaForCausalLM``."""

    model_class = MixtralModel
