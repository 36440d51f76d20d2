"""The configuration of a model, and the reader of a checkpoint's config.json."""

import json
import logging
import reprlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from jpaged import config as engine_config
from jpaged.models.checkpoint.joined import Joined
from jpaged.models.spec import LayerSpec

DTYPES = tuple(name for name in engine_config.DTYPES if name != "auto")
"""Dtypes of checkpoints and of running models."""

MAX_INT = engine_config.MAX_SLOTS
"""Sizes, positions and token ids are int32 on the device."""

_FLOAT32 = np.finfo(np.float32)


def require(ok: bool, name: str, value: object, expected: str) -> None:
    """Raise ValueError if not ``ok``: ``name=value is not valid: expected ...``."""
    if not ok:
        raise ValueError(f"{name}={reprlib.repr(value)} is not valid: expected {expected}")


def is_count(value: object) -> bool:
    """Whether ``value`` is an integer from 1 to ``MAX_INT``."""
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_INT


def is_positive(value: object) -> bool:
    """Whether ``value`` is a number above 0 that float32 holds and divides by: not NaN, 1e39 or 1e-39."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return float(_FLOAT32.tiny) <= value <= float(_FLOAT32.max)


def check_token_ids(token_ids: tuple[Any, ...]) -> None:
    """Raise ValueError for an entry of ``eos_token_id`` that is no token id."""
    for token_id in token_ids:
        is_id = isinstance(token_id, int) and not isinstance(token_id, bool) and 0 <= token_id <= MAX_INT
        require(is_id, "eos_token_id", token_id, f"a token id from 0 to {MAX_INT}, or a list of them")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a model. Hashable: it is static under jit.

    For a model of one's own this class is enough, or a subclass whose ``layer_specs`` say how its layers attend. The
    configuration of a family that is read from checkpoints also defines ``from_hf`` and ``to_hf``.

    Args:
        vocab_size: token ids that the model knows, 0 to ``vocab_size - 1``.
        hidden_size: features of a token between layers.
        num_layers: layers that attend.
        num_heads: query heads of a layer.
        num_kv_heads: heads of K and of V of a layer; a divisor of ``num_heads``.
        head_dim: features of a head.
        max_position_embeddings: value in config.json; ``max_model_len`` is the usable context.
        architecture: name of the model; in checkpoints, config.json's ``architectures``.
        intermediate_size: width of the feed-forward layer; a model that is not read from a checkpoint needs none.
        dtype: dtype of the saved checkpoint, one of ``DTYPES``.
        eos_token_ids: tokens that end a completion; may be empty.
        tie_word_embeddings: whether the output projection is the input embedding.
    """

    quantizations: ClassVar[tuple[str, ...]] = ()
    """Values of config.json's ``quant_method`` whose weights are decoded as they are loaded."""
    renamed: ClassVar[tuple[tuple[str, str], ...]] = (("language_model.", ""),)
    """Parts of tensors' names in some checkpoints, such as text parts, and what parameters have in their place."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    architecture: str = "CausalLM"
    intermediate_size: int = 1
    dtype: str = "float32"
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self) -> None:
        sizes = (
            "vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim",
            "max_position_embeddings",
        )  # fmt: skip
        for name in sizes:
            value = getattr(self, name)
            require(is_count(value), name, value, f"an integer from 1 to {MAX_INT}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_attention_heads={self.num_heads} is not a multiple of num_key_value_heads={self.num_kv_heads}"
            )
        check_token_ids(self.eos_token_ids)
        require(self.dtype in DTYPES, "dtype", self.dtype, f"one of {', '.join(DTYPES)}")

    @property
    def max_model_len(self) -> int:
        """The longest supported context, in tokens."""
        return self.max_position_embeddings

    @property
    def joined(self) -> tuple[Joined, ...]:
        """The projections that checkpoints store joined."""
        return ()

    @property
    def experts(self) -> tuple[int, int] | None:
        """Experts of a layer, and those of them that a token passes; None without a mixture of experts."""
        return None

    @property
    def shows_sources(self) -> bool:
        """Whether every layer shows the source of its K and V (``attend_from``), which are functions of it alone."""
        return False

    @property
    def layer_specs(self) -> tuple[LayerSpec, ...]:
        """The attention of each layer, in order."""
        return tuple(
            LayerSpec(layer=layer, num_kv_heads=self.num_kv_heads, head_dim=self.head_dim, sm_scale=self.head_dim**-0.5)
            for layer in range(self.num_layers)
        )

    def widths(self, num_devices: int) -> dict[str, int]:
        """Return the widths of feed-forward layers that so many devices split, by name."""
        del num_devices
        return {"intermediate_size": self.intermediate_size}

    def prefix_salt(self, prompt_len: int) -> bytes:
        """Return a salt that separates prompts whose equal tokens differ in KV.

        Equal prefixes of two prompts have equal KV if and only if the salts of both prompts are equal.

        Args:
            prompt_len: length of the whole prompt, in tokens.
        """
        del prompt_len
        return b""

    @classmethod
    def from_hf(cls, hf: Any, common: dict[str, Any]) -> "ModelConfig":
        """Build the configuration from a transformers config and the fields that every family shares."""
        raise NotImplementedError(f"{cls.__name__} is not read from checkpoints: construct it")

    def to_hf(self) -> dict[str, Any]:
        """Return the content of a config.json that transformers and ``load_config`` read."""
        raise NotImplementedError(f"{type(self).__name__} is no family of checkpoints: save the module with orbax")

    def common_hf(self, model_type: str) -> dict[str, Any]:
        """Return the part of ``to_hf`` that all families share."""
        eos = self.eos_token_ids
        return {
            "architectures": [self.architecture],
            "model_type": model_type,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "max_position_embeddings": self.max_position_embeddings,
            "dtype": self.dtype,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": (eos[0] if len(eos) == 1 else list(eos)) if eos else None,
            "tie_word_embeddings": self.tie_word_embeddings,
        }


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ValueError: the file cannot be read, is not JSON, or does not hold an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read as JSON ({error}): download the checkpoint again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a JSON {type(value).__name__}: expected an object")
    return value


def find_config(path: str | Path) -> Path:
    """Find the config.json of a checkpoint directory.

    Raises:
        ValueError: the directory does not exist or has no config.json.
    """
    path = Path(path)
    if not path.is_dir():
        kind = "is a file" if path.exists() else "does not exist"
        raise ValueError(
            f"{path} {kind}: expected a Hugging Face checkpoint directory (config.json, *.safetensors), or for LLM and "
            "--model a repository of the hub, ORG/NAME"
        )
    if not (path / "config.json").is_file():
        raise ValueError(
            f"{path} is not a checkpoint directory: it has no config.json. "
            "Give the directory that holds config.json and the *.safetensors files"
        )
    return path / "config.json"


def import_transformers() -> Any:
    """Import transformers on first use (it takes a second), without its advice to install PyTorch."""
    logger = logging.getLogger("transformers")

    def is_heard(record: logging.LogRecord) -> bool:
        return "PyTorch" not in record.getMessage()

    logger.addFilter(is_heard)
    try:
        import transformers
    finally:
        logger.removeFilter(is_heard)
    return transformers


def parse_hf_config(raw: dict[str, Any], model_type: str, quantizations: tuple[str, ...] = ()) -> Any:
    """Parse the content of a config.json through transformers, which knows old and new spellings.

    Args:
        raw: content of config.json.
        model_type: the ``model_type`` that its architecture has.
        quantizations: those of the architecture's ``ModelConfig``.

    Raises:
        ValueError: the weights are quantised, or transformers refuses the content.
    """
    quantization = raw.get("quantization_config")
    if quantization is not None and _method(quantization) not in quantizations:
        raise ValueError(f"quantised weights ({quantization}) are not supported: use the original ones")
    if raw.get("model_type", model_type) != model_type:
        raise ValueError(
            f"model_type={raw['model_type']!r} disagrees with architectures={raw['architectures']}, "
            f"whose model_type is {model_type!r}: correct one of them"
        )
    if (num_heads := raw.get("num_attention_heads")) is not None:  # transformers divides by it
        require(is_count(num_heads), "num_attention_heads", num_heads, f"an integer from 1 to {MAX_INT}")
    if (layer_types := raw.get("layer_types")) is not None:
        require(isinstance(layer_types, list), "layer_types", layer_types, "null or a list, one entry a layer")
    from huggingface_hub.errors import StrictDataclassError

    try:
        return import_transformers().AutoConfig.for_model(
            model_type, **{k: v for k, v in raw.items() if k != "model_type"}
        )
    except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError) as error:
        raise ValueError(f"refused by transformers, correct it or download it again: {error}") from error


def _method(quantization: Any) -> Any:
    return quantization.get("quant_method") if isinstance(quantization, dict) else None


def read_eos_token_ids(path: Path) -> tuple[int, ...] | None:
    """Read the end-of-sequence ids of a generation_config.json; None without such a file or without ids in it.

    Raises:
        ValueError: the file is damaged, or an entry is no token id; the message names the file.
    """
    value = read_json(path).get("eos_token_id") if path.is_file() else None
    if value is None:
        return None
    token_ids = _as_tuple(value)
    try:
        check_token_ids(token_ids)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return token_ids


def common_fields(raw: dict[str, Any], hf: Any, dtype: Any, eos_token_ids: tuple[int, ...] | None) -> dict[str, Any]:
    """Return the ``ModelConfig`` fields that all families spell alike.

    Args:
        raw: content of config.json.
        hf: config.json, parsed by transformers.
        dtype: dtype of the stored weights.
        eos_token_ids: ids in generation_config.json, which take precedence over config.json.
    """
    return {
        "architecture": raw["architectures"][0],
        "vocab_size": hf.vocab_size,
        "hidden_size": hf.hidden_size,
        "num_layers": hf.num_hidden_layers,
        "num_heads": hf.num_attention_heads,
        "max_position_embeddings": hf.max_position_embeddings,
        "dtype": dtype.removeprefix("torch.") if isinstance(dtype, str) else dtype,
        "eos_token_ids": _as_tuple(hf.eos_token_id) if eos_token_ids is None else eos_token_ids,
        "bos_token_id": hf.bos_token_id,
        "tie_word_embeddings": hf.tie_word_embeddings,
    }


def _as_tuple(value: Any) -> tuple[Any, ...]:
    """Return a tuple for each way that JSON spells zero or more values: null, a value, a list."""
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (value,)
