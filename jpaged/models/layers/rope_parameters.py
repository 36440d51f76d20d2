"""Checks of the parameters of rotary embeddings."""

from collections.abc import Callable
from typing import Any

from jpaged.models.checkpoint.config import MAX_INT, is_count, is_positive, require


def _is_weight(value: Any) -> bool:
    return is_positive(value) or (not isinstance(value, bool) and value == 0)


def _are_positive(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(map(is_positive, value))


_Check = tuple[Callable[[Any], bool], str]
_POSITIVE: _Check = (is_positive, "a number above 0")
_DIVISORS: _Check = (_are_positive, "a list of numbers above 0")
_CHECKS: dict[str, _Check] = {
    "rope_theta": (lambda value: is_positive(value) and value > 1, "a number above 1"),
    "partial_rotary_factor": (lambda value: is_positive(value) and value <= 1, "a number above 0, at most 1"),
    "factor": (lambda value: is_positive(value) and value >= 1, "a number, 1 or more"),
    "original_max_position_embeddings": (lambda value: is_count(value) and value >= 2, f"from 2 to {MAX_INT} tokens"),
    "attention_factor": _POSITIVE,
    "beta_fast": _POSITIVE,
    "beta_slow": _POSITIVE,
    "mscale": (_is_weight, "a number, 0 or more"),
    "mscale_all_dim": (_is_weight, "a number, 0 or more"),
    "truncate": (lambda value: isinstance(value, bool), "true or false"),
    "short_factor": _DIVISORS,
    "long_factor": _DIVISORS,
    "low_freq_factor": _POSITIVE,
    "high_freq_factor": _POSITIVE,
}
"""Name of a parameter, in config.json and in the scalings -> its check and the expected value in words."""


def check_parameter(name: str, value: Any, *, is_optional: bool) -> None:
    """Raise ValueError for an invalid value of the named parameter; None is valid if the parameter is optional."""
    is_valid, expected = _CHECKS[name]
    require((is_optional and value is None) or is_valid(value), name, value, expected)
