"""GPT-2: learned positions, layer norms before each block, and projections that checkpoints store untransposed."""

from dataclasses import dataclass, replace
from typing import Any

from flax import nnx
from jaxtyping import Array, Float, Int32

from jpaged.models.checkpoint.config import ModelConfig, is_positive, require
from jpaged.models.checkpoint.joined import Joined
from jpaged.models.layers.common import (
    ACTIVATIONS,
    Dtype,
    LayerNorm,
    check_activation,
    embed,
    linear,
    to_vocab,
)
from jpaged.models.layers.fused import QKV
from jpaged.models.layers.spelling import Whole
from jpaged.models.layers.unrotated import UnrotatedAttention
from jpaged.models.spec import Attend, LayerSpec

MODEL_TYPES = {"GPT2LMHeadModel": "gpt2"}


@dataclass(frozen=True, kw_only=True)
class GPT2Config(ModelConfig):
    """A GPT-2 model. Its learned positions make ``max_position_embeddings`` a hard limit.

    Args:
        layer_norm_epsilon: addend to the variance in every norm.
        activation_function: name in ``ACTIVATIONS``.
        scale_attn_weights: whether scores are divided by the square root of ``head_dim``.
        scale_attn_by_inverse_layer_idx: whether scores are also divided by the number of the layer, from 1.
    """

    layer_norm_epsilon: float = 1e-5
    activation_function: str = "gelu_new"
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_activation(self.activation_function)
        epsilon = self.layer_norm_epsilon
        require(is_positive(epsilon), "layer_norm_epsilon", epsilon, "a small number above 0")
        if self.head_dim * self.num_heads != self.hidden_size:
            raise ValueError(f"n_embd={self.hidden_size} is not n_head={self.num_heads} times a head_dim")

    @property
    def joined(self) -> tuple[Joined, ...]:
        return (Joined("c_attn", QKV.parts, (self.hidden_size,) * 3, axis=1),)

    @property
    def shows_sources(self) -> bool:
        return True

    @property
    def layer_specs(self) -> tuple[LayerSpec, ...]:
        scale = self.head_dim**-0.5 if self.scale_attn_weights else 1.0
        numbered = enumerate(super().layer_specs, start=1)
        by_layer = self.scale_attn_by_inverse_layer_idx
        return tuple(replace(spec, sm_scale=scale / number if by_layer else scale) for number, spec in numbered)

    @classmethod
    def from_hf(cls, hf: Any, common: dict[str, Any]) -> "GPT2Config":
        is_decoder = not hf.add_cross_attention
        require(is_decoder, "add_cross_attention", hf.add_cross_attention, "false: there is no encoder to attend to")
        return cls(
            **common,
            intermediate_size=4 * hf.n_embd if hf.n_inner is None else hf.n_inner,
            num_kv_heads=hf.n_head,
            head_dim=hf.n_embd // hf.n_head,
            layer_norm_epsilon=hf.layer_norm_epsilon,
            activation_function=hf.activation_function,
            scale_attn_weights=hf.scale_attn_weights,
            scale_attn_by_inverse_layer_idx=hf.scale_attn_by_inverse_layer_idx,
        )

    def to_hf(self) -> dict[str, Any]:
        return {
            **self.common_hf("gpt2"),
            "n_inner": self.intermediate_size,
            "layer_norm_epsilon": self.layer_norm_epsilon,
            "activation_function": self.activation_function,
            "scale_attn_weights": self.scale_attn_weights,
            "scale_attn_by_inverse_layer_idx": self.scale_attn_by_inverse_layer_idx,
        }


def conv1d(
    in_features: int, out_features: int, in_axis: str | None, out_axis: str | None, *, dtype: Dtype, rngs: nnx.Rngs
) -> nnx.Linear:
    """Make a projection with a bias whose weight checkpoints store as [in, out]."""
    spellings = (Whole("weight", (0, 1)),)
    return linear(in_features, out_features, in_axis, out_axis, bias=True, dtype=dtype, rngs=rngs, spellings=spellings)


class GPT2Attention(UnrotatedAttention):
    def __init__(self, config: GPT2Config, layer: int, *, dtype: Dtype, rngs: nnx.Rngs) -> None:
        super().__init__(config.layer_specs[layer])
        hidden = config.hidden_size
        self.q_proj = conv1d(hidden, hidden, None, "heads", dtype=dtype, rngs=rngs)
        self.k_proj = conv1d(hidden, hidden, None, "kv_heads", dtype=dtype, rngs=rngs)
        self.v_proj = conv1d(hidden, hidden, None, "kv_heads", dtype=dtype, rngs=rngs)
        self.c_proj = conv1d(hidden, hidden, "heads", None, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "tokens hidden_size"], attend: Attend) -> Float[Array, "tokens hidden_size"]:
        return self.c_proj(self.attended(x, attend))


class GPT2MLP(nnx.Module):
    def __init__(self, config: GPT2Config, *, dtype: Dtype, rngs: nnx.Rngs) -> None:
        hidden, ffn = config.hidden_size, config.intermediate_size
        self.c_fc = conv1d(hidden, ffn, None, "ffn", dtype=dtype, rngs=rngs)
        self.c_proj = conv1d(ffn, hidden, "ffn", None, dtype=dtype, rngs=rngs)
        self.act = config.activation_function

    def __call__(self, x: Float[Array, "tokens hidden_size"]) -> Float[Array, "tokens hidden_size"]:
        return self.c_proj(ACTIVATIONS[self.act](self.c_fc(x)))


class GPT2Block(nnx.Module):
    def __init__(self, config: GPT2Config, layer: int, *, dtype: Dtype, rngs: nnx.Rngs) -> None:
        hidden, epsilon = config.hidden_size, config.layer_norm_epsilon
        self.ln_1 = LayerNorm(hidden, epsilon, dtype=dtype, rngs=rngs)
        self.attn = GPT2Attention(config, layer, dtype=dtype, rngs=rngs)
        self.ln_2 = LayerNorm(hidden, epsilon, dtype=dtype, rngs=rngs)
        self.mlp = GPT2MLP(config, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "tokens hidden_size"], attend: Attend) -> Float[Array, "tokens hidden_size"]:
        x = x + self.attn(self.ln_1(x), attend)
        return x + self.mlp(self.ln_2(x))


class GPT2Model(nnx.Module):
    def __init__(self, config: GPT2Config, *, dtype: Dtype, rngs: nnx.Rngs) -> None:
        hidden = config.hidden_size
        self.wte = embed(config.vocab_size, hidden, "vocab", dtype=dtype, rngs=rngs)
        self.wpe = embed(config.max_position_embeddings, hidden, None, dtype=dtype, rngs=rngs)
        self.h = nnx.List([GPT2Block(config, layer, dtype=dtype, rngs=rngs) for layer in range(config.num_layers)])
        self.ln_f = LayerNorm(hidden, config.layer_norm_epsilon, dtype=dtype, rngs=rngs)


class GPT2LMHeadModel(nnx.Module):
    """A GPT-2 decoder. Parameters are named as in Hugging Face checkpoints, but for the parts of ``c_attn``.

    Args:
        config: the model's shape.
        dtype: dtype of parameters and activations; layer norms and logits are computed in float32.
        rngs: source of the initial weights: normal with deviation 0.02, norms 1, biases 0.
    """

    def __init__(self, config: GPT2Config, *, dtype: Dtype, rngs: nnx.Rngs) -> None:
        self.config = config
        self.transformer = GPT2Model(config, dtype=dtype, rngs=rngs)
        if not config.tie_word_embeddings:
            hidden, vocab = config.hidden_size, config.vocab_size
            self.lm_head = linear(hidden, vocab, None, "vocab", bias=False, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        token_ids: Int32[Array, "tokens"],
        positions: Int32[Array, "tokens"],
        prompt_lens: Int32[Array, "tokens"],
        attend: Attend,
    ) -> Float[Array, "tokens hidden_size"]:
        """Compute the final hidden state of each token; the arguments are those of ``LlamaForCausalLM``."""
        del prompt_lens
        x = self.transformer.wte(token_ids) + self.transformer.wpe(positions)
        for block in self.transformer.h:
            x = block(x, attend)
        return self.transformer.ln_f(x)

    def logits(self, hidden: Float[Array, "rows hidden_size"]) -> Float[Array, "rows vocab"]:
        """Compute the logits of the next token, in float32."""
        lm_head = None if self.config.tie_word_embeddings else self.lm_head
        return to_vocab(hidden, self.transformer.wte, lm_head)
