"""Projections of one input joined into one: one large matrix product in place of two or three smaller ones."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Sharding
from jaxtyping import Array, Float, Shaped

Path = tuple[Any, ...]
"""Of a parameter in a model's state."""


@dataclass(frozen=True)
class Columns:
    """Where the output features of several projections lie among those of the one that joins them.

    A device's shares of all of them are neighbours, so that it computes them and nothing moves: over two devices,
    q = [q0 q1], k = [k0 k1] and v = [v0 v1] become [q0 k0 v0 q1 k1 v1].

    Args:
        names: of the projections.
        sizes: output features of each, over all devices.
        num_shares: devices that these are split over.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    num_shares: int

    def join(self, arrays: Sequence[Shaped[Array, "*rest _"]]) -> Shaped[Array, "*rest features"]:
        """One array, over the features of all, of an array over each one's."""
        rest = arrays[0].shape[:-1]
        shares = [array.reshape(*rest, self.num_shares, -1) for array in arrays]
        return jnp.concatenate(shares, axis=-1).reshape(*rest, -1)

    def split(self, joined: Shaped[Array | np.ndarray, "*rest features"]) -> list[Any]:
        """The inverse of ``join``."""
        rest = joined.shape[:-1]
        shares = joined.reshape(*rest, self.num_shares, -1)
        bounds = pairwise(accumulate((size // self.num_shares for size in self.sizes), initial=0))
        return [shares[..., start:stop].reshape(*rest, -1) for start, stop in bounds]


class FusedLinear(nnx.Module):
    """A projection that stands for several. Its parameters know their ``columns``.

    Args:
        kernel: what the kernels of the projections are joined to.
        bias: likewise; None if they have none.
        columns: where each one's features lie.
    """

    def __init__(self, kernel: nnx.Param, bias: nnx.Param | None, columns: Columns) -> None:
        self.kernel = kernel
        self.bias = nnx.data(bias)
        self.columns = columns

    def __call__(self, x: Float[Array, "tokens in_features"]) -> list[Float[Array, "tokens _"]]:
        out = x @ self.kernel[...]
        if self.bias is not None:
            out = out + self.bias[...][None]
        return self.columns.split(out)


@dataclass(frozen=True)
class Fusible:
    """Projections of one input that a module may hold one by one, as in checkpoints, or joined.

    A module that holds some names them in a class attribute ``fusible``.

    Args:
        name: of the attribute that holds them joined.
        parts: of the attributes that hold them one by one.
    """

    name: str
    parts: tuple[str, ...]

    def project(self, module: nnx.Module, x: Float[Array, "tokens in_features"]) -> list[Float[Array, "tokens _"]]:
        """``x`` projected by each of the parts of ``module``."""
        if hasattr(module, self.name):
            return getattr(module, self.name)(x)
        return [getattr(module, part)(x) for part in self.parts]

    def fuse(self, module: nnx.Module) -> None:
        """Replaces the parts of ``module``, unless that is done or they are not spread over the same devices alike."""
        if hasattr(module, self.name):
            return
        linears: list[nnx.Linear] = [getattr(module, part) for part in self.parts]
        kernels = [linear.kernel for linear in linears]
        if len({kernel.get_value().sharding for kernel in kernels}) > 1:
            return
        (*_, share) = kernels[0].get_value().sharding.shard_shape(kernels[0].shape)
        columns = Columns(self.parts, tuple(kernel.shape[-1] for kernel in kernels), kernels[0].shape[-1] // share)
        biases = [linear.bias for linear in linears if linear.bias is not None]
        kernel, *bias = _join_params([kernels, biases] if biases else [kernels], columns)
        setattr(module, self.name, FusedLinear(kernel, bias[0] if bias else None, columns))
        for part in self.parts:
            delattr(module, part)


QKV = Fusible("qkv_proj", ("q_proj", "k_proj", "v_proj"))
GATE_UP = Fusible("gate_up_proj", ("gate_proj", "up_proj"))

_PARTS = frozenset(QKV.parts + GATE_UP.parts)


def fuse_projections(model: nnx.Module) -> None:
    """Joins the projections of a model that share their input, in place: fewer, larger products, the same results.

    Module by module, so that the weights of one at most exist twice. Arrays stay where they are on their devices, and
    whatever else refers to them is unaffected: ``nnx.clone(model)`` before costs nothing but what is joined after.
    The model then lacks the parameters of Hugging Face's names, but ``save_checkpoint`` writes those.
    """
    # No list of all modules: it would keep the weights of those that are replaced.
    modules = [module for _, module in nnx.iter_modules(model) if hasattr(type(module), "fusible")]
    for module in modules:
        fusible: Fusible = type(module).fusible  # pyright: ignore[reportAttributeAccessIssue]
        fusible.fuse(module)


def separate_params(model: nnx.Module) -> Iterator[tuple[Path, Shaped[np.ndarray, "..."]]]:
    """The parameters of a model on the host, each with the path that it has where none are joined."""
    for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        array, columns = np.asarray(param[...]), param.get_metadata().get("columns")
        if columns is None:
            yield path, array
        else:
            *parents, _, leaf = path
            for name, part in zip(columns.names, columns.split(array), strict=True):
                yield (*parents, name, leaf), part


def allocation_order(flat: Iterable[tuple[Path, Any]]) -> list[tuple[Path, Any]]:
    """A flat state in the order to allocate it: parameters that will be joined are neighbours.

    They then leave one hole, of the size that the joined ones of the next layer have. Otherwise each layer would leave
    several that fit nothing: 6 GB in OPT-13B, lost to the pool, which is one piece.
    """
    return sorted(flat, key=lambda item: (item[0][:-2], item[0][-2] not in _PARTS))


def _join_params(params: Sequence[Sequence[nnx.Param]], columns: Columns) -> list[nnx.Param]:
    """Joins kernels, and biases. Blocks, so that the caller may let go of them before it allocates more.

    Shapes in place of arrays give shapes.
    """
    arrays = [[param.get_value() for param in group] for group in params]
    program = _join_program(columns, tuple(group[0].sharding for group in arrays))
    if isinstance(arrays[0][0], jax.ShapeDtypeStruct):
        joined = jax.eval_shape(program, arrays)
    else:
        joined = jax.block_until_ready(program(arrays))
    return [
        nnx.Param(array, logical_axes=group[0].logical_axes, columns=columns)
        for group, array in zip(params, joined, strict=True)
    ]


@lru_cache
def _join_program(columns: Columns, shardings: tuple[Sharding, ...]) -> Callable[..., list[jax.Array]]:
    def join(groups: list[list[jax.Array]]) -> list[jax.Array]:
        return [columns.join(group) for group in groups]

    return jax.jit(join, out_shardings=list(shardings))
