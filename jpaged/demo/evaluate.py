"""The demo model without a cache: bits per byte of texts, and sample completions."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Float32, Int32, PRNGKeyArray

from jpaged.models.families.llama import LlamaForCausalLM
from jpaged.models.spec import Attend, LayerSpec

Attention = Literal["xla", "cudnn"]
"""Implementations of ``jax.nn.dot_product_attention``."""


def _dropped(x: Float[Array, "*shape"], rate: float, key: PRNGKeyArray | None) -> Float[Array, "*shape"]:
    if rate == 0 or key is None:
        return x
    is_kept = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(is_kept, x / jnp.asarray(1 - rate, x.dtype), jnp.zeros((), x.dtype))


def dense_attend(
    num_windows: int, *, dropout: float = 0.0, key: PRNGKeyArray | None = None, attention: Attention = "xla"
) -> Attend:
    """Make causal attention within each of ``num_windows`` windows of equal length, one after another."""

    def attend(
        spec: LayerSpec,
        q: Float[Array, "tokens num_heads head_dim"],
        k: Float[Array, "tokens num_kv_heads head_dim"],
        v: Float[Array, "tokens num_kv_heads head_dim"],
        *,
        sinks: Float[Array, " num_heads"] | None = None,
        alibi_slopes: Float[Array, " num_heads"] | None = None,
    ) -> Float[Array, "tokens num_heads head_dim"]:
        del sinks, alibi_slopes
        plain = LayerSpec(
            layer=spec.layer, num_kv_heads=spec.num_kv_heads, head_dim=spec.head_dim, sm_scale=spec.sm_scale
        )
        assert spec == plain, "the demo model attends to its whole context, with nothing added"
        q, k, v = (x.reshape(num_windows, -1, *x.shape[1:]) for x in (q, k, v))
        with jax.numpy_dtype_promotion("standard"):  # JAX itself promotes bfloat16 to float32 here
            out = jax.nn.dot_product_attention(q, k, v, scale=spec.sm_scale, is_causal=True, implementation=attention)
        out = out.reshape(-1, *out.shape[2:])
        return _dropped(out, dropout, None if key is None else jax.random.fold_in(key, spec.layer))

    return attend


def _hidden(
    model: LlamaForCausalLM, token_ids: Int32[Array, "batch context"], attend: Attend
) -> Float[Array, "tokens hidden_size"]:
    batch_size, context_len = token_ids.shape
    positions = jnp.tile(jnp.arange(context_len, dtype=jnp.int32), batch_size)
    return model(token_ids.reshape(-1), positions, jnp.zeros_like(positions), attend)


def token_nats(
    model: LlamaForCausalLM,
    windows: Int32[Array, "batch window"],
    *,
    dropout: float = 0.0,
    key: PRNGKeyArray | None = None,
    attention: Attention = "xla",
) -> Float32[Array, "batch context"]:
    """Compute the negative log-likelihood of each window's tokens but the first, given the tokens before.

    Args:
        model: model, which computes in its own dtype.
        windows: token ids.
        dropout: rate at which elements of every attention's output and of the final hidden state are dropped.
        key: random key of the dropout; None drops nothing.
        attention: the implementation of dense attention.
    """
    attend = dense_attend(windows.shape[0], dropout=dropout, key=key, attention=attention)
    hidden = _hidden(model, windows[:, :-1], attend)
    hidden = _dropped(hidden, dropout, None if key is None else jax.random.fold_in(key, model.config.num_layers))
    targets = windows[:, 1:]
    nats = optax.softmax_cross_entropy_with_integer_labels(model.logits(hidden), targets.reshape(-1))
    return nats.reshape(targets.shape)


@partial(jax.jit, static_argnums=0)
def _sum_nats(
    graphdef: nnx.GraphDef, params: nnx.State, windows: Int32[Array, "batch window"], lens: Int32[Array, "batch"]
) -> Float32[Array, ""]:
    nats = token_nats(nnx.merge(graphdef, params), windows)
    is_counted = jnp.arange(nats.shape[1])[None] < lens[:, None]
    return jnp.where(is_counted, nats, 0.0).sum()


def bits_per_byte(
    model: LlamaForCausalLM, sequences: Sequence[Sequence[int]], num_bytes: int, *, batch_size: int = 16
) -> float:
    """Compute the bits of all tokens of the texts under the model, divided by the texts' bytes of UTF-8.

    A sequence is cut into windows of the model's context length, and a token is predicted from its own window alone.
    Sliding windows would see more context and give slightly fewer bits.

    Args:
        model: model, which computes in its own dtype.
        sequences: token ids of each text, after a token for its start, which is not predicted.
        num_bytes: bytes of all texts.
        batch_size: windows computed at once.
    """
    context_len = model.config.max_model_len
    cut = [ids[i : i + context_len + 1] for ids in sequences for i in range(0, len(ids) - 1, context_len)]
    num_batches = math.ceil(len(cut) / batch_size)
    windows = np.zeros((num_batches, batch_size, context_len + 1), np.int32)
    lens = np.zeros((num_batches, batch_size), np.int32)
    for i, ids in enumerate(cut):
        row = divmod(i, batch_size)
        windows[row][: len(ids)] = ids
        lens[row] = len(ids) - 1
    graphdef, params = nnx.split(model)
    nats = sum(float(_sum_nats(graphdef, params, *batch)) for batch in zip(windows, lens, strict=True))
    return nats / math.log(2) / num_bytes


@partial(jax.jit, static_argnums=0)
def _draw(
    graphdef: nnx.GraphDef,
    params: nnx.State,
    ids: Int32[Array, "1 context"],
    start: Int32[Array, ""],
    temperature: Float32[Array, ""],
    key: PRNGKeyArray,
) -> Int32[Array, "1 context"]:
    model = nnx.merge(graphdef, params)

    def extend(i: Int32[Array, ""], ids: Int32[Array, "1 context"]) -> Int32[Array, "1 context"]:
        last = jax.lax.dynamic_slice_in_dim(_hidden(model, ids, dense_attend(1)), i - 1, 1)
        token = jax.random.categorical(jax.random.fold_in(key, i), model.logits(last) / temperature)
        return ids.at[0, i].set(token[0].astype(jnp.int32))

    return jax.lax.fori_loop(start, ids.shape[1], extend, ids)


def complete(
    model: LlamaForCausalLM, prompt_ids: Sequence[int], num_tokens: int, *, temperature: float = 0.5, seed: int = 0
) -> list[int]:
    """Draw ``num_tokens`` tokens after the prompt. Each token recomputes the whole text: for samples only."""
    graphdef, params = nnx.split(model)
    start = len(prompt_ids)
    ids = np.zeros((1, start + num_tokens), np.int32)
    ids[0, :start] = prompt_ids
    drawn = _draw(graphdef, params, jnp.asarray(ids), jnp.int32(start), jnp.float32(temperature), jax.random.key(seed))
    return drawn[0, start:].tolist()
