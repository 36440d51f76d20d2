"""OPT: learned positions, layer norms before or after each block, optionally narrower embeddings."""

from dataclasses import dataclass
from typing import Any

from flax import nnx
from jaxtyping import Array, Float, Int32

from jpaged.models.checkpoint.config import MAX_INT, ModelConfig, is_count, require
from jpaged.models.layers.common import (
    ACTIVATIONS,
    Dtype,
    LayerNorm,
    check_activation,
    embed,
    linear,
    to_vocab,
)
from jpaged.models.layers.unrotated import UnrotatedAttention
from jpaged.models.spec import Attend

MODEL_TYPES = {"OPTForCausalLM": "opt"}

POSITION_OFFSET = 2
"""Rows at the start of the position table that belong to no position."""


@dataclass(frozen=True, kw_only=True)
class OPTConfig(ModelConfig):
    """An OPT model. Its learned positions make ``max_position_embeddings`` a hard limit.

    Args:
        word_embed_proj_dim: width of the token embedding; projected to and from ``hidden_size`` if it differs.
        norm_first: layer norms before each block (and one after the last), or after each block (OPT-350M).
        final_norm: whether the norm after the last layer exists, where ``norm_first``.
        bias: whether projections have biases.
        norm_affine: whether layer norms have a scale and a bias.
        activation: name in ``ACTIVATIONS``.
    """

    word_embed_proj_dim: int
    norm_first: bool = True
    final_norm: bool = True
    bias: bool = True
    norm_affine: bool = True
    activation: str = "relu"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_activation(self.activation)
        if self.head_dim * self.num_heads != self.hidden_size:
            raise ValueError(f"hidden_size={self.hidden_size} is not num_heads={self.num_heads} times a head_dim")
        width = self.word_embed_proj_dim
        require(is_count(width), "word_embed_proj_dim", width, f"an integer from 1 to {MAX_INT}")

    @property
    def shows_sources(self) -> bool:
        return True

    @property
    def is_projected(self) -> bool:
        """Whether the embeddings and the layers differ in width."""
        return self.word_embed_proj_dim != self.hidden_size

    @classmethod
    def from_hf(cls, hf: Any, common: dict[str, Any]) -> "OPTConfig":
        return cls(
            **common,
            intermediate_size=hf.ffn_dim,
            num_kv_heads=hf.num_attention_heads,
            head_dim=hf.hidden_size // hf.num_attention_heads,
            word_embed_proj_dim=hf.word_embed_proj_dim,
            norm_first=hf.do_layer_norm_before,
            final_norm=not hf._remove_final_layer_norm,
            bias=hf.enable_bias,
            norm_affine=hf.layer_norm_elementwise_affine,
            activation=hf.activation_function,
        )

    def to_hf(self) -> dict[str, Any]:
        return {
            **self.common_hf("opt"),
            "ffn_dim": self.intermediate_size,
            "word_embed_proj_dim": self.word_embed_proj_dim,
            "do_layer_norm_before": self.norm_first,
            "_remove_final_layer_norm": not self.final_norm,
            "enable_bias": self.bias,
            "layer_norm_elementwise_affine": self.norm_affine,
            "activation_function": self.activation,
        }


class OPTAttention(UnrotatedAttention):
    def __init__(self, config: OPTConfig, layer: int, *, dtype: Dtype, rngs: nnx.Rngs) -> None:
        super().__init__(config.layer_specs[layer])
        hidden, bias = config.hidden_size, config.bias
        self.q_proj = linear(hidden, hidden, None, "heads", bias=bias, dtype=dtype, rngs=rngs)
        self.k_proj = linear(hidden, hidden, None, "kv_heads", bias=bias, dtype=dtype, rngs=rngs)
        self.v_proj = linear(hidden, hidden, None, "kv_heads", bias=bias, dtype=dtype, rngs=rngs)
        self.out_proj = linear(hidden, hidden, "heads", None, bias=bias, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "tokens hidden_size"], attend: Attend) -> Float[Array, "tokens hidden_size"]:
        return self.out_proj(self.attended(x, attend))


class OPTDecoderLayer(nnx.Module):
    def __init__(self, config: OPTConfig, layer: int, *, dtype: Dtype, rngs: nnx.Rngs) -> None:
        hidden, ffn, bias, affine = config.hidden_size, config.intermediate_size, config.bias, config.norm_affine
        self.self_attn = OPTAttention(config, layer, dtype=dtype, rngs=rngs)
        self.self_attn_layer_norm = LayerNorm(hidden, affine=affine, dtype=dtype, rngs=rngs)
        self.fc1 = linear(hidden, ffn, None, "ffn", bias=bias, dtype=dtype, rngs=rngs)
        self.fc2 = linear(ffn, hidden, "ffn", None, bias=bias, dtype=dtype, rngs=rngs)
        self.final_layer_norm = LayerNorm(hidden, affine=affine, dtype=dtype, rngs=rngs)
        self.norm_first = config.norm_first
        self.activation = config.activation

    def __call__(self, x: Float[Array, "tokens hidden_size"], attend: Attend) -> Float[Array, "tokens hidden_size"]:
        if self.norm_first:
            x = x + self.self_attn(self.self_attn_layer_norm(x), attend)
            return x + self._feed_forward(self.final_layer_norm(x))
        x = self.self_attn_layer_norm(x + self.self_attn(x, attend))
        return self.final_layer_norm(x + self._feed_forward(x))

    def _feed_forward(self, x: Float[Array, "tokens hidden_size"]) -> Float[Array, "tokens hidden_size"]:
        return self.fc2(ACTIVATIONS[self.activation](self.fc1(x)))


class OPTDecoder(nnx.Module):
    def __init__(self, config: OPTConfig, *, dtype: Dtype, rngs: nnx.Rngs) -> None:
        hidden, width = config.hidden_size, config.word_embed_proj_dim
        self.embed_tokens = embed(config.vocab_size, width, "vocab", dtype=dtype, rngs=rngs)
        rows = config.max_position_embeddings + POSITION_OFFSET
        self.embed_positions = embed(rows, hidden, None, dtype=dtype, rngs=rngs)
        if config.is_projected:
            self.project_in = linear(width, hidden, None, None, bias=False, dtype=dtype, rngs=rngs)
            self.project_out = linear(hidden, width, None, None, bias=False, dtype=dtype, rngs=rngs)
        self.layers = nnx.List(
            [OPTDecoderLayer(config, layer, dtype=dtype, rngs=rngs) for layer in range(config.num_layers)]
        )
        if config.norm_first and config.final_norm:
            self.final_layer_norm = LayerNorm(hidden, affine=config.norm_affine, dtype=dtype, rngs=rngs)


class OPTModel(nnx.Module):
    def __init__(self, config: OPTConfig, *, dtype: Dtype, rngs: nnx.Rngs) -> None:
        self.decoder = OPTDecoder(config, dtype=dtype, rngs=rngs)


class OPTForCausalLM(nnx.Module):
    """An OPT decoder. Parameters are named as in Hugging Face checkpoints.

    Args:
        config: the model's shape.
        dtype: dtype of parameters and activations; layer norms and logits are computed in float32.
        rngs: source of the initial weights: normal with deviation 0.02, norms 1, biases 0.
    """

    def __init__(self, config: OPTConfig, *, dtype: Dtype, rngs: nnx.Rngs) -> None:
        self.config = config
        self.model = OPTModel(config, dtype=dtype, rngs=rngs)
        if not config.tie_word_embeddings:
            width, vocab = config.word_embed_proj_dim, config.vocab_size
            self.lm_head = linear(width, vocab, None, "vocab", bias=False, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        token_ids: Int32[Array, "tokens"],
        positions: Int32[Array, "tokens"],
        prompt_lens: Int32[Array, "tokens"],
        attend: Attend,
    ) -> Float[Array, "tokens hidden_size"]:
        """Compute the final hidden state of each token; the arguments are those of ``LlamaForCausalLM``."""
        del prompt_lens
        config, decoder = self.config, self.model.decoder
        x = decoder.embed_tokens(token_ids)
        if config.is_projected:
            x = decoder.project_in(x)
        x = x + decoder.embed_positions(positions + POSITION_OFFSET)
        for layer in decoder.layers:
            x = layer(x, attend)
        return decoder.final_layer_norm(x) if config.norm_first and config.final_norm else x

    def logits(self, hidden: Float[Array, "rows hidden_size"]) -> Float[Array, "rows vocab"]:
        """Compute the logits of the next token, in float32."""
        decoder = self.model.decoder
        if self.config.is_projected:
            hidden = decoder.project_out(hidden)
        return to_vocab(hidden, decoder.embed_tokens, None if self.config.tie_word_embeddings else self.lm_head)
