"""StarCoder2: Llama with biased layer norms and a feed-forward layer without a gate."""

from dataclasses import dataclass
from typing import Any, ClassVar

from flax import nnx
from jaxtyping import Array, Float

from jpaged.models.families.llama import LlamaConfig, LlamaDecoderLayer, LlamaForCausalLM, LlamaModel
from jpaged.models.layers.common import ACTIVATIONS, Dtype, LayerNorm, linear

MODEL_TYPES = {"Starcoder2ForCausalLM": "starcoder2"}


@dataclass(frozen=True, kw_only=True)
class Starcoder2Config(LlamaConfig):
    """A StarCoder2 model. ``rms_norm_eps`` is the addend to the variance in its layer norms."""

    model_types: ClassVar[dict[str, str]] = MODEL_TYPES
    epsilon_name: ClassVar[str] = "norm_epsilon"

    @classmethod
    def from_hf(cls, hf: Any, common: dict[str, Any]) -> "Starcoder2Config":
        bias = hf.use_bias
        return cls(
            **cls.shared_from_hf(hf, common),
            qkv_bias=bias,
            o_bias=bias,
            mlp_bias=bias,
            sliding_windows=(hf.sliding_window,) * hf.num_hidden_layers,
        )

    def to_hf(self) -> dict[str, Any]:
        return {**self.shared_hf(), "use_bias": self.qkv_bias, "sliding_window": self.sliding_window}


class Starcoder2MLP(nnx.Module):
    def __init__(self, config: Starcoder2Config, *, dtype: Dtype, rngs: nnx.Rngs) -> None:
        hidden, ffn, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.c_fc = linear(hidden, ffn, None, "ffn", bias=bias, dtype=dtype, rngs=rngs)
        self.c_proj = linear(ffn, hidden, "ffn", None, bias=bias, dtype=dtype, rngs=rngs)
        self.act = config.hidden_act

    def __call__(self, x: Float[Array, "tokens hidden_size"]) -> Float[Array, "tokens hidden_size"]:
        return self.c_proj(ACTIVATIONS[self.act](self.c_fc(x)))


class Starcoder2DecoderLayer(LlamaDecoderLayer):
    norm_class = LayerNorm

    def make_feed_forward(
        self, config: Starcoder2Config, layer: int, *, dtype: Dtype, rngs: nnx.Rngs
    ) -> tuple[str, nnx.Module]:
        del layer
        return "mlp", Starcoder2MLP(config, dtype=dtype, rngs=rngs)


class Starcoder2Model(LlamaModel):
    layer_class = Starcoder2DecoderLayer
    norm_class = LayerNorm


class Starcoder2ForCausalLM(LlamaForCausalLM):
    """A StarCoder2 decoder; the arguments and methods are those of ``LlamaForCausalLM``."""

    model_class = Starcoder2Model
