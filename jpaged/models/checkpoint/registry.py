"""The registry of architectures, and the loader of a checkpoint's configuration and model."""

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from jpaged.models.checkpoint.config import (
    ModelConfig,
    common_fields,
    find_config,
    parse_hf_config,
    read_eos_token_ids,
    read_json,
)
from jpaged.models.checkpoint.weights import is_untied, load_state, stored_dtype
from jpaged.models.families import (
    gemma,
    gpt2,
    gpt_oss,
    granite,
    llama,
    mixtral,
    olmo2,
    opt,
    phi3,
    qwen_moe,
    starcoder2,
)
from jpaged.models.layers.common import Dtype
from jpaged.models.layers.fused import allocation_order
from jpaged.models.layers.kv_copies import KVCopies, kv_copies
from jpaged.models.layers.rope import check_spelled_parameters, with_current_names
from jpaged.models.layers.streamed import layers_path, placed
from jpaged.sharding import TENSOR_AXIS, check_divisible, is_on_host, moved, param_sharding

log = logging.getLogger(__name__)

_FAMILIES: tuple[tuple[dict[str, str], type[ModelConfig], Any], ...] = (
    (llama.MODEL_TYPES, llama.LlamaConfig, llama.LlamaForCausalLM),
    (gpt_oss.MODEL_TYPES, gpt_oss.GptOssConfig, gpt_oss.GptOssForCausalLM),
    (mixtral.MODEL_TYPES, mixtral.MixtralConfig, mixtral.MixtralForCausalLM),
    (opt.MODEL_TYPES, opt.OPTConfig, opt.OPTForCausalLM),
    (qwen_moe.MODEL_TYPES, qwen_moe.QwenMoeConfig, qwen_moe.QwenMoeForCausalLM),
    (granite.MODEL_TYPES, granite.GraniteConfig, granite.GraniteForCausalLM),
    (gemma.MODEL_TYPES, gemma.GemmaConfig, gemma.GemmaForCausalLM),
    (gpt2.MODEL_TYPES, gpt2.GPT2Config, gpt2.GPT2LMHeadModel),
    (olmo2.MODEL_TYPES, olmo2.Olmo2Config, olmo2.Olmo2ForCausalLM),
    (phi3.MODEL_TYPES, phi3.Phi3Config, phi3.Phi3ForCausalLM),
    (starcoder2.MODEL_TYPES, starcoder2.Starcoder2Config, starcoder2.Starcoder2ForCausalLM),
)

_TEXT_PARTS = {"Gemma3ForConditionalGeneration": "Gemma3ForCausalLM"}
"""Architectures of several modalities, with those of their text parts."""

SUPPORTED_ARCHITECTURES = tuple(name for model_types, _, _ in _FAMILIES for name in model_types)
"""Supported values of config.json's ``architectures``."""


def load_config(path: str | Path) -> ModelConfig:
    """Read the configuration of a Hugging Face checkpoint directory.

    If config.json names no dtype, the headers of the weight files are read too. Where config.json ties the embeddings
    but the files hold two that differ, the configuration has them untied, as in transformers 5.24.

    Args:
        path: directory with config.json and, optionally, generation_config.json.

    Raises:
        ValueError: there is no checkpoint, or an architecture or value is not supported; the message names the file.
    """
    config_path = find_config(path)
    raw = with_current_names(_text_part(config_path, read_json(config_path)))
    architectures = raw.get("architectures")
    known = ", ".join(SUPPORTED_ARCHITECTURES)
    if (
        not isinstance(architectures, list)
        or len(architectures) != 1
        or architectures[0] not in SUPPORTED_ARCHITECTURES
    ):
        raise ValueError(f"{config_path}: architectures={architectures!r} is not supported: expected one of {known}")
    model_types, config_class, _ = next(family for family in _FAMILIES if architectures[0] in family[0])
    eos_token_ids = read_eos_token_ids(config_path.with_name("generation_config.json"))
    dtype = _named_dtype(raw)
    if dtype is None:
        dtype = stored_dtype(config_path.parent)
    try:
        check_spelled_parameters(raw)
        hf = parse_hf_config(raw, model_types[architectures[0]])
        config = config_class.from_hf(hf, common_fields(raw, hf, dtype, eos_token_ids))
    except ValueError as error:
        raise ValueError(f"{config_path}: {error}") from error
    except (ArithmeticError, AttributeError, LookupError, TypeError) as error:
        raise ValueError(
            f"{config_path} cannot be used ({type(error).__name__}: {error}): correct it or download it again"
        ) from error
    if config.tie_word_embeddings and is_untied(config_path.parent):
        log.warning(
            "%s ties the embeddings, but the weight files hold two that differ: both are used. "
            "Set tie_word_embeddings to false to silence this",
            config_path,
        )
        config = replace(config, tie_word_embeddings=False)
    return config


def is_dtype_known(path: str | Path) -> bool:
    """Whether a checkpoint directory tells its dtype: in config.json, or in weight files that are there."""
    config_path = find_config(path)
    named = _named_dtype(_text_part(config_path, read_json(config_path)))
    return named is not None or any(config_path.parent.glob("*.safetensors*"))


def _named_dtype(raw: dict[str, Any]) -> Any:
    """Return the dtype that a config.json names, unchecked, or None."""
    return next((raw[name] for name in ("dtype", "torch_dtype") if raw.get(name) is not None), None)


def _text_part(path: Path, raw: dict[str, Any]) -> dict[str, Any]:
    """Return the config.json of the text part of a model of several modalities, and any other one as it is."""
    architectures = raw.get("architectures")
    names = architectures if isinstance(architectures, list) else []
    if len(names) != 1 or not isinstance(names[0], str) or names[0] not in _TEXT_PARTS:
        return raw
    if not isinstance(text := raw.get("text_config"), dict):
        raise ValueError(f"{path}: text_config={text!r:.100} is not valid: expected an object")
    shared = {name: value for name, value in raw.items() if name not in ("model_type", "text_config", "vision_config")}
    return {**shared, **text, "architectures": [_TEXT_PARTS[names[0]]]}


def abstract_model(
    config: ModelConfig, dtype: Dtype, mesh: Mesh, *, weight_placement: str = "device"
) -> tuple[nnx.GraphDef, nnx.State]:
    """Return the model's structure, and the shapes and shardings of its weights.

    A model with fewer KV heads than devices has copies of its heads (``layers/kv_copies.py``). The matrices of layers
    are in host memory if ``weight_placement`` says so (``layers/streamed.py``).

    Raises:
        ValueError: the mesh does not divide the model's heads or feed-forward width.
    """
    check_divisible(mesh, num_heads=config.num_heads, **config.widths(mesh.shape[TENSOR_AXIS]))
    config = replace(config, num_kv_heads=config.num_kv_heads * kv_copies(config, mesh).count)
    model = nnx.eval_shape(lambda: _model_class(config)(config, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0)))
    layers = layers_path(model, config.num_layers) if weight_placement == "host" else None
    graphdef, state = nnx.split(model)
    shapes = []
    for where, variable in nnx.to_flat_state(state):
        sharding = param_sharding(variable.shape, variable.logical_axes, mesh)
        sharding = placed(sharding, where, variable.ndim, layers)
        shapes.append(
            (where, variable.replace(jax.ShapeDtypeStruct(variable.shape, variable.dtype, sharding=sharding)))
        )
    return graphdef, nnx.from_flat_state(shapes)


def load_model(
    path: str | Path,
    config: ModelConfig,
    dtype: Dtype,
    mesh: Mesh,
    *,
    weight_placement: str = "device",
    use_tqdm: bool = True,
) -> Any:
    """Load a checkpoint's weights, each device its own shards. Nothing is executed or unpickled.

    Args:
        path: Hugging Face checkpoint directory with safetensors, in one file or several.
        config: result of ``load_config`` for the same directory.
        dtype: dtype of weights and activations; stored weights of another dtype are converted.
        mesh: mesh with an axis "tensor" (see ``jpaged/sharding.py``).
        weight_placement: memory of the layers' matrices, as the setting of ``EngineConfig``.
        use_tqdm: whether to show a progress bar.

    Raises:
        ValueError: a file is missing, damaged or disagrees with ``config``; the message names the file and the tensor.
    """
    graphdef, state = abstract_model(config, dtype, mesh, weight_placement=weight_placement)
    return nnx.merge(graphdef, load_state(Path(path), state, kv_copies(config, mesh), config.joined, use_tqdm=use_tqdm))


def random_model(config: ModelConfig, dtype: Dtype, mesh: Mesh, seed: int, *, weight_placement: str = "device") -> Any:
    """Make a model with random weights: normal with deviation 0.02, norms 1, biases 0.

    Each device draws its own shards. Each shape has its own program, since one program for the whole model takes a
    minute to compile.

    Args:
        config: the model's shape.
        dtype: dtype of weights and activations.
        mesh: mesh with an axis "tensor" (see ``jpaged/sharding.py``).
        seed: seed of the weights, which do not depend on the mesh.
        weight_placement: memory of the layers' matrices, as the setting of ``EngineConfig``.
    """
    graphdef, state = abstract_model(config, dtype, mesh, weight_placement=weight_placement)
    key = jax.random.key(seed, impl="rbg")  # compiles faster than the default
    copies, drawn = kv_copies(config, mesh), []
    for index, (where, variable) in enumerate(allocation_order(nnx.to_flat_state(state))):
        drawn.append((where, variable.replace(_draw(key, index, variable, copies))))
    return nnx.merge(graphdef, nnx.from_flat_state(drawn))


def _draw(key: jax.Array, index: int, variable: Any, copies: KVCopies) -> jax.Array:
    """Draw the ``index``-th parameter of a model, unless its initial value is a constant."""
    shape, dtype, sharding = variable.shape, variable.dtype, variable.get_value().sharding
    if (constant := variable.get_metadata().get("constant")) is not None:
        return jnp.full(shape, constant, dtype, device=sharding)
    axes = variable.logical_axes if copies.is_copied(variable.logical_axes) else ()
    shape = copies.shape_without(shape, axes)
    draw = _draw_normal(shape, dtype, moved(variable.get_value(), to_host=False).sharding, copies, axes)
    return moved(draw(key, jnp.uint32(index)), to_host=is_on_host(variable.get_value()))


@lru_cache
def _draw_normal(
    shape: tuple[int, ...],
    dtype: jnp.dtype,
    sharding: NamedSharding,
    copies: KVCopies,
    axes: tuple[str | None, ...],
) -> Callable[..., jax.Array]:
    def draw(key: jax.Array, index: jax.Array) -> jax.Array:
        drawn = 0.02 * jax.random.normal(jax.random.fold_in(key, index), shape, dtype)
        return copies.make(drawn, axes)

    return jax.jit(draw, out_shardings=sharding)


def _model_class(config: ModelConfig) -> Any:
    return next(model_class for model_types, _, model_class in _FAMILIES if config.architecture in model_types)
