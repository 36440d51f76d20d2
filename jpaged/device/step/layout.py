"""Fields that are packed into one array."""

from itertools import accumulate
from math import prod


class Layout:
    """Named fields that follow one another in one array.

    Args:
        shapes: shape of each field.

    Attributes:
        size: length of the array.
    """

    def __init__(self, **shapes: tuple[int, ...]) -> None:
        ends = list(accumulate(map(prod, shapes.values()), initial=0))
        self.size = ends[-1]
        self._fields = [(name, slice(*ends[i : i + 2]), shape) for i, (name, shape) in enumerate(shapes.items())]

    def split(self, packed) -> dict:
        """Views of ``packed`` (numpy or jax) by field name."""
        return {name: packed[where].reshape(shape) for name, where, shape in self._fields}
