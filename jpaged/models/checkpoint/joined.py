"""Projections that a checkpoint stores as one tensor: seen as separate tensors, and joined again to be written."""

from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import numpy as np


class _Part(NamedTuple):
    """A range of a tensor along one axis, which is read like a tensor of its own."""

    whole: Any
    axis: int
    bounds: range

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        wanted = self.bounds[index[self.axis]]
        inner = slice(wanted.start, wanted.stop)
        return self.whole[(*index[: self.axis], inner, *index[self.axis + 1 :])]


@dataclass(frozen=True)
class Joined:
    """One projection of a checkpoint that a model holds as several, and joins in an order of its own.

    Args:
        name: name of the projection in the checkpoint.
        parts: names of the model's projections.
        sizes: output features of each part.
        axis: axis of the output features in the stored weight, 0 as in PyTorch's Linear; in biases it is 0.
    """

    name: str
    parts: tuple[str, ...]
    sizes: tuple[int, ...]
    axis: int = 0

    def split(self, stored: MutableMapping[str, Any]) -> None:
        """Put parts in the place of joined tensors.

        Args:
            stored: by name, named tuples with ``file``, ``slices`` and ``shape``; changed.

        Raises:
            ValueError: a joined tensor is of another size than its parts.
        """
        for name, module, leaf in self._named(stored, (self.name,)):
            whole, axis = stored[name], self._axis(leaf)
            if whole.shape[axis : axis + 1] != (sum(self.sizes),):
                raise ValueError(
                    f"{whole.file}: {name} has shape {list(whole.shape)}, but config.json makes axis {axis} "
                    f"{sum(self.sizes)}, of {', '.join(self.parts)}: one of the two belongs to another model"
                )
            del stored[name]
            bounds = pairwise(accumulate(self.sizes, initial=0))
            for part, (start, stop) in zip(self.parts, bounds, strict=True):
                shape = (*whole.shape[:axis], stop - start, *whole.shape[axis + 1 :])
                slices = _Part(whole.slices, axis, range(start, stop))
                stored[f"{module}{part}.{leaf}"] = whole._replace(slices=slices, shape=shape)

    def join(self, tensors: MutableMapping[str, np.ndarray]) -> None:
        """Put joined tensors in the place of their parts."""
        for _, module, leaf in self._named(tensors, self.parts[:1]):
            arrays = [tensors.pop(f"{module}{part}.{leaf}") for part in self.parts]
            tensors[f"{module}{self.name}.{leaf}"] = np.concatenate(arrays, axis=self._axis(leaf))

    def _axis(self, leaf: str) -> int:
        return 0 if leaf == "bias" else self.axis

    @staticmethod
    def _named(tensors: Mapping[str, Any], wanted: tuple[str, ...]) -> Iterator[tuple[str, str, str]]:
        """Yield the name of each tensor of the wanted projections, the prefix of its module, and its last part."""
        for name in list(tensors):
            *module, last, leaf = ["", "", *name.split(".")]
            if last in wanted:
                yield name, "".join(f"{part}." for part in module if part), leaf
