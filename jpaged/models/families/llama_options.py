"""Options by which the architectures of the Llama family differ, and their spelling in config.json."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jpaged.models.checkpoint.config import require


@dataclass(frozen=True)
class Options:
    """The options of one architecture.

    Args:
        model_type: ``model_type`` in config.json.
        read: makes those fields of ``LlamaConfig`` that no other architecture spells alike, from a transformers config.
        write: makes the entries of config.json that ``read`` reads, from a ``LlamaConfig``.
    """

    model_type: str
    read: Callable[[Any], dict[str, Any]]
    write: Callable[[Any], dict[str, Any]]


def head_dim_of(hf: Any) -> int:
    """Return config.json's ``head_dim``, which may follow from other sizes."""
    head_dim = getattr(hf, "head_dim", None)
    return hf.hidden_size // hf.num_attention_heads if head_dim is None else head_dim


def layer_windows(hf: Any, sliding_window: int | None) -> tuple[int | None, ...]:
    """Return the window of each layer by config.json's ``layer_types``."""
    return tuple(_window_of(kind, sliding_window) for kind in hf.layer_types)


def _window_of(layer_type: str, sliding_window: int | None) -> int | None:
    """Return the window of a layer of this type, one of config.json's ``layer_types``."""
    kinds = ("full_attention", "sliding_attention")
    require(layer_type in kinds, "layer_types entry", layer_type, f"one of {', '.join(kinds)}")
    if layer_type == "full_attention":
        return None
    if sliding_window is None:
        raise ValueError(
            "layer_types asks for sliding_attention, but no sliding_window is given: "
            "set sliding_window and use_sliding_window, or make the layers full_attention"
        )
    return sliding_window


def _read_llama(hf: Any) -> dict[str, Any]:
    bias = bool(getattr(hf, "attention_bias", False))
    return {"qkv_bias": bias, "o_bias": bias, "mlp_bias": bool(hf.mlp_bias)}


def _write_llama(config: Any) -> dict[str, Any]:
    return {"attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias}


def _read_mistral(hf: Any) -> dict[str, Any]:
    return {"sliding_windows": (hf.sliding_window,) * hf.num_hidden_layers}


def _write_mistral(config: Any) -> dict[str, Any]:
    return {"sliding_window": config.sliding_window}


def _read_windows(hf: Any) -> dict[str, Any]:
    return {"sliding_windows": layer_windows(hf, hf.sliding_window if hf.use_sliding_window else None)}


def _write_windows(config: Any) -> dict[str, Any]:
    window = config.sliding_window
    return {"use_sliding_window": window is not None, "sliding_window": window, "layer_types": config.layer_types}


def _read_qwen2(hf: Any) -> dict[str, Any]:
    return {"qkv_bias": True, **_read_windows(hf)}


def _read_qwen3(hf: Any) -> dict[str, Any]:
    bias = bool(hf.attention_bias)
    return {"qkv_bias": bias, "o_bias": bias, "qk_norm": True, **_read_windows(hf)}


def _write_qwen3(config: Any) -> dict[str, Any]:
    return {"attention_bias": config.qkv_bias, **_write_windows(config)}


def _read_smollm3(hf: Any) -> dict[str, Any]:
    return {**_read_llama(hf), **_read_windows(hf), "rope_layers": _rope_layers(hf)}


def _write_smollm3(config: Any) -> dict[str, Any]:
    rotates = [int(rope is not None) for rope in config.layer_ropes]
    return {**_write_llama(config), **_write_windows(config), "no_rope_layers": rotates}


def _rope_layers(hf: Any) -> tuple[bool, ...]:
    """Return SmolLM3's ``no_rope_layers``, in which 1 stands for a layer that rotates; empty if all layers do."""
    rotates = tuple(bool(entry) for entry in hf.no_rope_layers[: hf.num_hidden_layers])
    return () if all(rotates) else rotates


OPTIONS = {
    "LlamaForCausalLM": Options("llama", _read_llama, _write_llama),
    "MistralForCausalLM": Options("mistral", _read_mistral, _write_mistral),
    "Qwen2ForCausalLM": Options("qwen2", _read_qwen2, _write_windows),
    "Qwen3ForCausalLM": Options("qwen3", _read_qwen3, _write_qwen3),
    "SmolLM3ForCausalLM": Options("smollm3", _read_smollm3, _write_smollm3),
}
"""Options of each architecture whose configuration is ``LlamaConfig``."""
