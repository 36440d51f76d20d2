"""References to memory inside kernels, and the rounding that memories ask for, on every chip."""

from typing import Any

type Ref = Any
"""A reference inside a kernel, to memory or barriers: JAX's functions do not take JAX's own types of references."""


def round_up(x: int, multiple: int) -> int:
    """The smallest multiple that is no less than x."""
    return -(-x // multiple) * multiple
