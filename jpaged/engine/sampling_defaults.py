"""Sampling parameters that a checkpoint recommends, for requests without any."""

from pathlib import Path
from typing import Any

from jpaged.models.checkpoint.config import read_json
from jpaged.request import SamplingParams

_NAMES = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}
"""The parameters that vLLM takes too, with their names here."""


def read_sampling_defaults(path: Path) -> dict[str, Any]:
    """The parameters that the generation_config.json of a checkpoint names; none without such a file.

    Args:
        path: the directory of the checkpoint.

    Raises:
        ValueError: the file is damaged, or a value is not valid.
    """
    file = path / "generation_config.json"
    values = read_json(file) if file.is_file() else {}
    defaults = {own: values[name] for name, own in _NAMES.items() if values.get(name) is not None}
    try:
        SamplingParams(**defaults)
    except ValueError as error:
        raise ValueError(f"{file}: {error}; generation_config='none' leaves its defaults out") from error
    return defaults
