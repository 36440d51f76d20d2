"""The contract of a model in memory, checked by one abstract pass, and the placement of its weights."""

from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float, Int32

from jpaged.models.checkpoint.config import ModelConfig
from jpaged.models.layers.streamed import layers_path, placed
from jpaged.models.spec import Attend, LayerSpec, check_head_arrays
from jpaged.sharding import check_axes, check_divisible, param_sharding, replicated

NUM_TOKENS = 3
"""Tokens of the abstract pass."""


class CausalLM(Protocol):
    """A ``flax.nnx.Module`` that the engine serves. Both methods are traced, and read weights alone."""

    def __call__(
        self,
        token_ids: Int32[Array, "tokens"],
        positions: Int32[Array, "tokens"],
        prompt_lens: Int32[Array, "tokens"],
        attend: Attend,
    ) -> Float[Array, "tokens hidden_size"]:
        """The final hidden state of each token, in the dtype of the weights.

        Args:
            token_ids: tokens of any number of sequences, one sequence after another.
            positions: position of each token in its sequence, from 0.
            prompt_lens: length of the prompt of each token's sequence.
            attend: causal attention over each token's own sequence. Every layer calls it once, with its entry of
                ``ModelConfig.layer_specs``. ``q`` is [tokens, num_heads, head_dim], ``k`` and ``v`` are
                [tokens, num_kv_heads, head_dim], all in the dtype of the weights.
        """
        ...

    def logits(self, hidden: Float[Array, "rows hidden_size"]) -> Float[Array, "rows vocab"]:
        """The logits of the token after each hidden state, in float32."""
        ...


def check_model(model: Any, config: ModelConfig, dtype: str, mesh: Mesh) -> None:
    """Check that a module keeps the contract of ``CausalLM``, without computing anything.

    Args:
        model: the module.
        config: its configuration.
        dtype: setting of the engine: "auto", or the dtype of the weights.
        mesh: the devices.

    Raises:
        ValueError: not a module that can be served, or one that disagrees with ``config``, ``dtype`` or ``mesh``.
    """
    check_axes(replicated(mesh))
    _check_kind(model, config)
    weights = [x for x in jax.tree.leaves(nnx.state(model)) if jnp.issubdtype(x.dtype, jnp.floating)]
    if not weights:
        raise ValueError(f"{_name(model)} has no weights: expected nnx.Param of a floating dtype")
    own = jnp.dtype(weights[0].dtype)
    if dtype not in ("auto", own.name):
        raise ValueError(f"dtype={dtype!r}, but the weights are {own.name}: cast them, or leave dtype at 'auto'")
    if type(model).__module__.startswith("jpaged.models."):
        return  # its own tests check the rest
    check_divisible(mesh, num_heads=config.num_heads, num_kv_heads=config.num_kv_heads)
    graphdef, state = nnx.split(model)
    specs: list[LayerSpec] = []

    def run(state: nnx.State, tokens: Int32[Array, "tokens"]) -> tuple[Array, Array]:
        merged = nnx.merge(graphdef, state)
        hidden = merged(tokens, tokens, tokens, _recording_attend(config, own, specs))
        _check_array("__call__", hidden, (NUM_TOKENS, config.hidden_size), own)
        return hidden, merged.logits(hidden)

    tokens = jax.ShapeDtypeStruct((NUM_TOKENS,), jnp.int32)
    try:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            _, logits = jax.eval_shape(run, state, tokens)
    except TypeError as error:
        raise ValueError(
            f"{_name(model)} cannot be called as model(token_ids, positions, prompt_lens, attend) and "
            f"model.logits(hidden): {error}"
        ) from error
    _check_array("logits", logits, (NUM_TOKENS, config.vocab_size), jnp.dtype("float32"))
    if specs != list(config.layer_specs):
        raise ValueError(
            f"{_name(model)} attends in layers {[spec.layer for spec in specs]}: expected each of the "
            f"{config.num_layers} layers of model_config.layer_specs once, in order, with its own spec"
        )


def place(model: nnx.Module, mesh: Mesh, *, num_streamed_layers: int = 0) -> nnx.Module:
    """A copy of a module whose weights lie on the devices of a mesh.

    Weights that lie there already stay. Others are split as their metadata ``logical_axes`` says, or replicated.

    Args:
        model: the module.
        mesh: the devices.
        num_streamed_layers: number of its layers if their matrices belong to host memory, or 0.
    """
    layers = layers_path(model, num_streamed_layers) if num_streamed_layers else None
    graphdef, state = nnx.split(model)
    params = []
    for where, variable in nnx.to_flat_state(state):
        value = variable.get_value()
        sharding = getattr(value, "sharding", None)
        if not isinstance(sharding, NamedSharding) or sharding.device_set != set(mesh.devices.flat):
            axes = variable.get_metadata().get("logical_axes")
            wanted = replicated(mesh) if axes is None else param_sharding(value.shape, axes, mesh)
            variable = variable.replace(jax.device_put(value, placed(wanted, where, value.ndim, layers)))
        params.append((where, variable))
    return nnx.merge(graphdef, nnx.from_flat_state(params))


def _check_kind(model: Any, config: Any) -> None:
    if any(base.__module__.startswith("flax.linen") for base in type(model).__mro__):
        raise ValueError(
            f"{_name(model)} is a flax.linen module, which holds no weights: write it as a flax.nnx.Module, or as a "
            "subclass of flax.nnx.bridge.ToNNX that has the method logits"
        )
    if not isinstance(model, nnx.Module):
        raise ValueError(f"{model!r:.100} is not valid: expected a flax.nnx.Module")
    if not isinstance(config, ModelConfig):
        raise ValueError(f"model_config={config!r:.100} is not valid: expected a jpaged.models.ModelConfig")
    for method in ("__call__", "logits"):
        if not callable(getattr(type(model), method, None)):
            raise ValueError(f"{_name(model)} has no method {method}: expected both of jpaged.models.CausalLM")


def _recording_attend(config: ModelConfig, dtype: jnp.dtype, specs: list[LayerSpec]) -> Attend:
    """An ``attend`` that checks its arguments and notes the layer; its output is ``q``."""

    def attend(
        spec: LayerSpec, q: Array, k: Array, v: Array, *, sinks: Array | None = None, alibi_slopes: Array | None = None
    ) -> Array:
        check_head_arrays(spec, sinks, alibi_slopes)
        specs.append(spec)
        _check_array(f"q of layer {spec.layer}", q, (NUM_TOKENS, config.num_heads, spec.head_dim), dtype)
        for name, array in (("k", k), ("v", v)):
            expected = NUM_TOKENS, spec.num_kv_heads, spec.head_dim
            _check_array(f"{name} of layer {spec.layer}", array, expected, dtype)
        return q

    return attend


def _check_array(name: str, array: Any, shape: tuple[int, ...], dtype: jnp.dtype) -> None:
    found = getattr(array, "shape", None), getattr(array, "dtype", None)
    if found != (shape, dtype):
        raise ValueError(
            f"{name} is of shape {found[0]} and dtype {found[1]}: expected {shape} and {dtype.name}, as model_config "
            "and the dtype of the weights say"
        )


def _name(model: Any) -> str:
    return type(model).__name__
