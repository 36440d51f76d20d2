"""The Llama family: architectures that differ from Llama in biases, norms of heads, windows and unrotated layers.

Other families reuse its parts: a family's decoder layer names the attention and the feed-forward layer that it has.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int32

from jpaged.models.checkpoint.config import MAX_INT, ModelConfig, is_count, is_positive, require
from jpaged.models.families.llama_options import OPTIONS, head_dim_of
from jpaged.models.layers.common import (
    ACTIVATIONS,
    Dtype,
    RMSNorm,
    check_activation,
    embed,
    linear,
    split_heads,
    to_vocab,
    with_axes,
)
from jpaged.models.layers.fused import GATE_UP, QKV
from jpaged.models.layers.rope import Angles, Rope, rotate
from jpaged.models.spec import Attend, LayerSpec, Projected, Source, attend_from
from pallas_kernels.rope_write import HeadNorms

MODEL_TYPES = {name: options.model_type for name, options in OPTIONS.items()}


@dataclass(frozen=True, kw_only=True)
class LlamaConfig(ModelConfig):
    """A model of the Llama family. The configurations of families that reuse its layers derive from it.

    Args:
        rms_norm_eps: addend to the mean square in every norm.
        rope: rotary embedding, with the same ``head_dim``.
        rope_layers: whether each layer rotates its queries and keys; empty if all layers do (SmolLM3).
        hidden_act: name in ``ACTIVATIONS``.
        qkv_bias, o_bias, mlp_bias: whether those projections have a bias.
        qk_norm: whether queries and keys are normalised per head before the rotation (Qwen3).
        sliding_windows: window of each layer in tokens, None for full attention; made empty if no layer has one.
    """

    model_types: ClassVar[dict[str, str]] = MODEL_TYPES
    """Architectures of the family, with their ``model_type``."""
    epsilon_name: ClassVar[str] = "rms_norm_eps"
    activation_name: ClassVar[str] = "hidden_act"
    """Names of ``rms_norm_eps`` and ``hidden_act`` in config.json."""

    rms_norm_eps: float
    rope: Rope
    rope_layers: tuple[bool, ...] = ()
    hidden_act: str = "silu"
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_windows: tuple[int | None, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.architecture not in self.model_types:
            known = ", ".join(self.model_types)
            raise ValueError(f"architecture={self.architecture!r} is not of the Llama family: {known}")
        check_activation(self.hidden_act)
        require(is_positive(self.rms_norm_eps), self.epsilon_name, self.rms_norm_eps, "a small number above 0")
        if self.rope.head_dim != self.head_dim:
            raise ValueError(f"rope.head_dim={self.rope.head_dim} differs from head_dim={self.head_dim}")
        if self.sliding_windows and len(self.sliding_windows) != self.num_layers:
            raise ValueError(f"{len(self.sliding_windows)} layer types are given for {self.num_layers} layers")
        for window in self.sliding_windows:
            is_window = window is None or is_count(window)
            require(is_window, "sliding_window", window, f"null (full attention) or an integer from 1 to {MAX_INT}")
        if self.sliding_window is None:
            object.__setattr__(self, "sliding_windows", ())
        if self.rope_layers and len(self.rope_layers) != self.num_layers:
            raise ValueError(
                f"rope_layers has {len(self.rope_layers)} entries: expected one for each of {self.num_layers}"
            )

    @property
    def max_model_len(self) -> int:
        return self.rope.max_model_len

    @property
    def layer_ropes(self) -> tuple[Rope | None, ...]:
        """The rotary embedding of each layer; None for a layer without one."""
        if not self.rope_layers:
            return (self.rope,) * self.num_layers
        return tuple(self.rope if rotates else None for rotates in self.rope_layers)

    @property
    def shows_sources(self) -> bool:
        return all(rope is None or rope.is_static for rope in self.layer_ropes)

    @property
    def layer_specs(self) -> tuple[LayerSpec, ...]:
        specs = super().layer_specs
        if not self.sliding_windows:
            return specs
        # A window that no context exceeds, as in Phi-3, is full attention.
        windows = (
            None if window is None or window >= self.max_model_len else window for window in self.sliding_windows
        )
        return tuple(replace(spec, sliding_window=window) for spec, window in zip(specs, windows, strict=True))

    def prefix_salt(self, prompt_len: int) -> bytes:
        ropes = dict.fromkeys(rope for rope in self.layer_ropes if rope is not None)
        return b"".join(rope.prefix_salt(prompt_len) for rope in ropes)

    @property
    def sliding_window(self) -> int | None:
        """The window of the layers that have one; None if no layer has a window."""
        return next(filter(None, self.sliding_windows), None)

    @classmethod
    def from_hf(cls, hf: Any, common: dict[str, Any]) -> "LlamaConfig":
        return cls(**cls.shared_from_hf(hf, common), **OPTIONS[common["architecture"]].read(hf))

    def to_hf(self) -> dict[str, Any]:
        return {**self.shared_hf(), **OPTIONS[self.architecture].write(self)}

    @classmethod
    def shared_from_hf(cls, hf: Any, common: dict[str, Any], rope: Rope | None = None) -> dict[str, Any]:
        """Return the fields that every architecture has.

        Args:
            hf, common: those of ``from_hf``.
            rope: the rotary embedding, if ``rope_parameters`` of config.json are not Llama's.
        """
        head_dim = head_dim_of(hf)
        return {
            **common,
            "intermediate_size": hf.intermediate_size,
            "num_kv_heads": hf.num_key_value_heads,
            "head_dim": head_dim,
            "rms_norm_eps": getattr(hf, cls.epsilon_name),
            "rope": rope or Rope.from_hf(hf.rope_parameters, head_dim, hf.max_position_embeddings),
            "hidden_act": getattr(hf, cls.activation_name),
        }

    def shared_hf(self) -> dict[str, Any]:
        """Return the part of ``to_hf`` that every architecture has."""
        return {
            **self.common_hf(self.model_types[self.architecture]),
            "intermediate_size": self.intermediate_size,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            self.epsilon_name: self.rms_norm_eps,
            "rope_parameters": self.rope.to_hf(),
            self.activation_name: self.hidden_act,
        }

    @property
    def layer_types(self) -> list[str]:
        """The entries of config.json's ``layer_types``."""
        windows = self.sliding_windows or (None,) * self.num_layers
        return ["full_attention" if window is None else "sliding_attention" for window in windows]


class LlamaAttention(nnx.Module):
    fusible = QKV
    head_norm_class: ClassVar[Any] = RMSNorm

    def __init__(self, config: LlamaConfig, layer: int, *, dtype: Dtype, rngs: nnx.Rngs) -> None:
        hidden, head_dim = config.hidden_size, config.head_dim
        q_size, kv_size = config.num_heads * head_dim, config.num_kv_heads * head_dim
        bias = config.qkv_bias
        self.q_proj = linear(hidden, q_size, None, "heads", bias=bias, dtype=dtype, rngs=rngs)
        self.k_proj = linear(hidden, kv_size, None, "kv_heads", bias=bias, dtype=dtype, rngs=rngs)
        self.v_proj = linear(hidden, kv_size, None, "kv_heads", bias=bias, dtype=dtype, rngs=rngs)
        self.o_proj = linear(q_size, hidden, "heads", None, bias=config.o_bias, dtype=dtype, rngs=rngs)
        if config.qk_norm:
            self.q_norm = self.head_norm_class(head_dim, config.rms_norm_eps, dtype=dtype, rngs=rngs)
            self.k_norm = self.head_norm_class(head_dim, config.rms_norm_eps, dtype=dtype, rngs=rngs)
        self.config = config
        self.spec = config.layer_specs[layer]
        if self.spec.sinks:
            init = with_axes(nnx.initializers.normal(0.02), "heads")
            self.sinks = nnx.Param(init(rngs.params(), (config.num_heads,), dtype))
        self.rope = config.layer_ropes[layer]

    def __call__(
        self,
        x: Float[Array, "tokens hidden_size"],
        angles: Angles | None,
        attend: Attend,
    ) -> Float[Array, "tokens hidden_size"]:
        joined = QKV.joined(self, x)
        q, k, v = QKV.split(self, x, joined)
        q, k = self._rotated(q, "q_norm", angles), self._rotated(k, "k_norm", angles)
        v = split_heads(v, self.config.head_dim)
        sinks = self.sinks[...].astype(jnp.float32) if self.spec.sinks else None
        source = self._source(x)._replace(projected=self._projected(x, joined, angles))
        out = attend_from(source, attend, self.spec, q, k, v, sinks)
        return self.o_proj(out.reshape(x.shape[0], -1))

    def _rotated(
        self, projected: Float[Array, "tokens features"], norm: str, angles: Angles | None
    ) -> Float[Array, "tokens heads head_dim"]:
        """Split queries or keys into heads, norm them by the module called ``norm`` if there is one, and rotate."""
        heads = self._normed_heads(projected, getattr(self, norm, None))
        return heads if angles is None else rotate(heads, *angles)

    def _normed_heads(
        self, projected: Float[Array, "tokens features"], norm: Any
    ) -> Float[Array, "tokens heads head_dim"]:
        heads = split_heads(projected, self.config.head_dim)
        return heads if norm is None else norm(heads)

    def _projected(
        self,
        x: Float[Array, "tokens hidden_size"],
        joined: Float[Array, "tokens features"] | None,
        angles: Angles | None,
    ) -> Projected | None:
        if joined is None or angles is None:
            return None
        return Projected(joined, partial(QKV.summands, self, x), *angles, self._head_norms())

    def _head_norms(self) -> HeadNorms | None:
        if not self.config.qk_norm:
            return None
        return HeadNorms(self.q_norm.scale[...], self.k_norm.scale[...], self.q_norm.spec)

    def _source(self, x: Float[Array, "tokens hidden_size"]) -> Source:
        project = QKV.select(self, ("k_proj", "v_proj"))

        def project_kv(
            inputs: Float[Array, "others hidden_size"], positions: Int32[Array, " others"]
        ) -> tuple[Array, Array]:
            k, v = project(inputs)
            angles = None if self.rope is None else self.rope.cos_sin(positions, jnp.zeros_like(positions))
            return self._rotated(k, "k_norm", angles), split_heads(v, self.config.head_dim)

        return Source(x, project_kv)


class LlamaMLP(nnx.Module):
    fusible = GATE_UP

    def __init__(self, config: LlamaConfig, *, dtype: Dtype, rngs: nnx.Rngs) -> None:
        hidden, ffn, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = linear(hidden, ffn, None, "ffn", bias=bias, dtype=dtype, rngs=rngs)
        self.up_proj = linear(hidden, ffn, None, "ffn", bias=bias, dtype=dtype, rngs=rngs)
        self.down_proj = linear(ffn, hidden, "ffn", None, bias=bias, dtype=dtype, rngs=rngs)
        self.act = config.hidden_act

    def __call__(self, x: Float[Array, "tokens hidden_size"]) -> Float[Array, "tokens hidden_size"]:
        gate, up = GATE_UP.project(self, x)
        return self.down_proj(ACTIVATIONS[self.act](gate) * up)


class LlamaDecoderLayer(nnx.Module):
    """A layer that norms the inputs of its parts. Other families have other parts."""

    attention_class: ClassVar[Any] = LlamaAttention
    norm_class: ClassVar[Any] = RMSNorm

    def __init__(self, config: Any, layer: int, *, dtype: Dtype, rngs: nnx.Rngs) -> None:
        hidden, epsilon = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = self.norm_class(hidden, epsilon, dtype=dtype, rngs=rngs)
        self.self_attn = self.attention_class(config, layer, dtype=dtype, rngs=rngs)
        self.post_attention_layernorm = self.norm_class(hidden, epsilon, dtype=dtype, rngs=rngs)
        self.feed_forward_name, module = self.make_feed_forward(config, layer, dtype=dtype, rngs=rngs)
        setattr(self, self.feed_forward_name, module)

    def make_feed_forward(self, config: Any, layer: int, *, dtype: Dtype, rngs: nnx.Rngs) -> tuple[str, nnx.Module]:
        """Return the feed-forward part of a layer, after the name that checkpoints give it."""
        del layer
        return "mlp", LlamaMLP(config, dtype=dtype, rngs=rngs)

    def feed_forward(self, x: Float[Array, "tokens hidden_size"]) -> Float[Array, "tokens hidden_size"]:
        return getattr(self, self.feed_forward_name)(x)

    def __call__(
        self,
        x: Float[Array, "tokens hidden_size"],
        branch: Float[Array, "tokens hidden_size"] | None,
        angles: Angles | None,
        attend: Attend,
    ) -> tuple[Float[Array, "tokens hidden_size"], Float[Array, "tokens hidden_size"]]:
        """Return the residual stream and its last addend, which the next norm adds as it reads the sum."""
        x, normed = self.input_layernorm.add(x, branch)
        x, normed = self.post_attention_layernorm.add(x, self.self_attn(normed, angles, attend))
        return x, self.feed_forward(normed)


class LlamaModel(nnx.Module):
    layer_class: ClassVar[Any] = LlamaDecoderLayer
    norm_class: ClassVar[Any] = RMSNorm

    def __init__(self, config: Any, *, dtype: Dtype, rngs: nnx.Rngs) -> None:
        self.embed_tokens = embed(config.vocab_size, config.hidden_size, "vocab", dtype=dtype, rngs=rngs)
        self.layers = nnx.List(
            [self.layer_class(config, layer, dtype=dtype, rngs=rngs) for layer in range(config.num_layers)]
        )
        self.norm = self.norm_class(config.hidden_size, config.rms_norm_eps, dtype=dtype, rngs=rngs)


class LlamaForCausalLM(nnx.Module):
    """A decoder of the Llama family. Parameters are named as in Hugging Face checkpoints.

    A family that reuses it sets ``model_class``, and overrides ``embed`` and ``logits`` where those differ.

    Args:
        config: the model's shape.
        dtype: dtype of parameters and activations; norms, rotations and logits are computed in float32.
        rngs: source of the initial weights: normal with deviation 0.02, norms 1, biases 0.
    """

    model_class: ClassVar[Any] = LlamaModel

    def __init__(self, config: Any, *, dtype: Dtype, rngs: nnx.Rngs) -> None:
        self.config = config
        self.model = self.model_class(config, dtype=dtype, rngs=rngs)
        if not config.tie_word_embeddings:
            self.lm_head = linear(
                config.hidden_size, config.vocab_size, None, "vocab", bias=False, dtype=dtype, rngs=rngs
            )

    def __call__(
        self,
        token_ids: Int32[Array, "tokens"],
        positions: Int32[Array, "tokens"],
        prompt_lens: Int32[Array, "tokens"],
        attend: Attend,
    ) -> Float[Array, "tokens hidden_size"]:
        """Compute the final hidden state of each token.

        Args:
            token_ids: tokens of any number of sequences, one sequence after another.
            positions: position of each token in its sequence.
            prompt_lens: length of the prompt of each token's sequence (see ``Rope.cos_sin``).
            attend: attention, called once per layer; it knows the sequence of each token.
        """
        x, branch = self.embed(token_ids), None
        ropes = self.config.layer_ropes
        angles = {rope: rope.cos_sin(positions, prompt_lens) for rope in dict.fromkeys(ropes) if rope is not None}
        for layer, rope in zip(self.model.layers, ropes, strict=True):
            x, branch = layer(x, branch, angles.get(rope), attend)
        _, normed = self.model.norm.add(x, branch)
        return normed

    def embed(self, token_ids: Int32[Array, "tokens"]) -> Float[Array, "tokens hidden_size"]:
        """Return the residual stream before the first layer."""
        return self.model.embed_tokens(token_ids)

    def logits(self, hidden: Float[Array, "rows hidden_size"]) -> Float[Array, "rows vocab"]:
        """Compute the logits of the next token, in float32."""
        lm_head = None if self.config.tie_word_embeddings else self.lm_head
        return to_vocab(hidden, self.model.embed_tokens, lm_head)
