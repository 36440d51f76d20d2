"""Properties of a root-mean-square norm."""

from typing import NamedTuple


class NormSpec(NamedTuple):
    """Static properties of a root-mean-square norm, which divides in float32.

    Args:
        epsilon: added to the mean square.
        is_wide: whether the scale multiplies in float32, and the product is rounded. Otherwise the norm is rounded
            before the scale multiplies, as Hugging Face does.
        offset: the scale less its parameter; 0 unless ``is_wide``.
    """

    epsilon: float
    is_wide: bool = False
    offset: int = 0
