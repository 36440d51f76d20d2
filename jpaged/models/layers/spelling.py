"""Spellings of parameters that a checkpoint stores in other pieces than one tensor of the parameter's own shape."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any, Protocol

import jax
import numpy as np
from jaxtyping import Shaped

Index = tuple[slice, ...]
"""A part of an array, one slice an axis."""

Piece = Callable[[str], Any]
"""The tensor of a name, which reads the part that it is indexed by."""


class Spelling(Protocol):
    """One way in which checkpoints store a parameter. The reader assembles the pieces in an array on the host.

    A parameter names its spellings in the metadata ``spellings``. The reader takes the first one that a checkpoint
    holds, and the writer takes the first of all. Names of tensors start with that of the parameter's module.
    """

    @property
    def axes(self) -> tuple[int, ...]:
        """The parameter is the assembled array transposed by these axes, of which at most two change places."""
        ...

    @property
    def decode(self) -> Callable[[jax.Array, Any], jax.Array] | None:
        """Makes numbers of a dtype from the assembled array; None if it holds numbers."""
        ...

    def shapes(self, module: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the tensors, by name, for a parameter of this shape."""
        ...

    def assembled_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the assembled array."""
        ...

    def read(self, module: str, shape: tuple[int, ...], piece: Piece, index: Index) -> np.ndarray:
        """Read a part of the assembled array."""
        ...

    def write(self, module: str, param: Shaped[np.ndarray, "..."]) -> dict[str, np.ndarray]:
        """Return the tensors of a parameter."""
        ...


@dataclass(frozen=True)
class PerExpert:
    """One matrix for each expert and part, [out, in]: ``experts.3.w1.weight``.

    The parameter is [experts, parts, out, in], or without the axis of parts if there is one part.

    Args:
        parts: names of the matrices of an expert.
        is_transposed: whether the parameter is [in, out] in its last two axes.
    """

    parts: tuple[str, ...]
    is_transposed: bool = False
    decode = None

    @property
    def axes(self) -> tuple[int, ...]:
        num_leading = 1 if len(self.parts) == 1 else 2
        last = (num_leading, num_leading + 1)
        return (*range(num_leading), *(reversed(last) if self.is_transposed else last))

    def assembled_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(shape[axis] for axis in self.axes)

    def shapes(self, module: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        matrix = self.assembled_shape(shape)[-2:]
        return {self._name(module, e, part): matrix for e, part in product(range(shape[0]), self.parts)}

    def read(self, module: str, shape: tuple[int, ...], piece: Piece, index: Index) -> np.ndarray:
        parts = self.parts if len(self.parts) == 1 else self.parts[index[1]]
        experts = range(shape[0])[index[0]]
        names = [self._name(module, e, part) for e, part in product(experts, parts)]
        stacked = np.stack([piece(name)[index[-2:]] for name in names])
        return stacked.reshape(*(len(x) for x in (experts, parts)[: len(shape) - 2]), *stacked.shape[1:])

    def write(self, module: str, param: Shaped[np.ndarray, "..."]) -> dict[str, np.ndarray]:
        flat = param.transpose(self.axes).reshape(-1, *self.assembled_shape(param.shape)[-2:])
        return dict(zip(self.shapes(module, param.shape), flat, strict=True))

    def _name(self, module: str, expert: int, part: str) -> str:
        return f"{module}.{expert}.{part}.weight"


@dataclass(frozen=True)
class Whole:
    """One tensor, whose axes are the parameter's, in another order or with two of them joined.

    Args:
        name: name of the tensor in its module.
        axes: as for ``Spelling``.
        joined: first of two neighbouring axes of the assembled array that are one axis of the tensor; None for none.
    """

    name: str
    axes: tuple[int, ...]
    joined: int | None = None
    decode = None

    def assembled_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(shape[axis] for axis in self.axes)

    def shapes(self, module: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        return {f"{module}.{self.name}": self._join(self.assembled_shape(shape))}

    def read(self, module: str, shape: tuple[int, ...], piece: Piece, index: Index) -> np.ndarray:
        tensor, sizes, at = piece(f"{module}.{self.name}"), self.assembled_shape(shape), self.joined
        if at is None:
            return tensor[index]
        wanted = [range(size)[part] for size, part in zip(sizes, index, strict=True)]
        if len(wanted[at + 1]) == sizes[at + 1]:  # the part is contiguous
            rows = slice(wanted[at].start * sizes[at + 1], wanted[at].stop * sizes[at + 1])
            return tensor[(*index[:at], rows, *index[at + 2 :])].reshape([len(x) for x in wanted])
        parts = []
        for outer in wanted[at]:
            start = outer * sizes[at + 1]
            rows = slice(start + wanted[at + 1].start, start + wanted[at + 1].stop)
            parts.append(tensor[(*index[:at], rows, *index[at + 2 :])])
        return np.stack(parts, axis=at)

    def write(self, module: str, param: Shaped[np.ndarray, "..."]) -> dict[str, np.ndarray]:
        assembled = param.transpose(self.axes)
        return {f"{module}.{self.name}": assembled.reshape(self._join(assembled.shape))}

    def _join(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        if (at := self.joined) is None:
            return shape
        return (*shape[:at], math.prod(shape[at : at + 2]), *shape[at + 2 :])


def spelling_in(
    spellings: tuple[Spelling, ...], module: str, shape: tuple[int, ...], stored: Mapping[str, Any]
) -> Spelling:
    """Return the first spelling of a parameter that a checkpoint holds a part of, or else the first of all."""
    return next((s for s in spellings if not stored.keys().isdisjoint(s.shapes(module, shape))), spellings[0])
