"""Projections of one input, joined: one large matrix product in place of two or three smaller ones."""

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

from jpaged.sharding import is_on_host, moved

Path = tuple[Any, ...]
"""The path of a parameter in a model's state."""

Projection = Callable[[Float[Array, "tokens in_features"]], list[Float[Array, "tokens _"]]]
"""Projects tokens by each of some parts."""


@dataclass(frozen=True)
class Columns:
    """The order of the output features of several projections within their joined projection.

    The shares of one device are neighbours, so that no feature moves between devices. Over two devices,
    q = [q0 q1], k = [k0 k1] and v = [v0 v1] become [q0 k0 v0 q1 k1 v1].

    Args:
        names: names of the projections.
        sizes: output features of each projection, over all devices.
        num_shares: devices that the features are split over.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    num_shares: int

    def join(self, arrays: Sequence[Shaped[Array, "*rest _"]]) -> Shaped[Array, "*rest features"]:
        """Join the arrays of the projections into one array over all features."""
        rest = arrays[0].shape[:-1]
        shares = [array.reshape(*rest, self.num_shares, -1) for array in arrays]
        return jnp.concatenate(shares, axis=-1).reshape(*rest, -1)

    def split(self, joined: Shaped[Array | np.ndarray, "*rest features"]) -> list[Any]:
        """Undo ``join``."""
        bounds = list(pairwise(accumulate((size // self.num_shares for size in self.sizes), initial=0)))
        if self.num_shares == 1:  # XLA then sees through a later join of neighbours
            return [joined[..., start:stop] for start, stop in bounds]
        rest = joined.shape[:-1]
        shares = joined.reshape(*rest, self.num_shares, -1)
        return [shares[..., start:stop].reshape(*rest, -1) for start, stop in bounds]

    def cut(self, names: Sequence[str]) -> "Columns":
        """The columns of some of the projections."""
        sizes = [size for name, size in zip(self.names, self.sizes, strict=True) if name in names]
        return Columns(tuple(names), tuple(sizes), self.num_shares)

    def select(self, joined: Shaped[Array, "*rest features"], names: Sequence[str]) -> Shaped[Array, "*rest _"]:
        """The columns of some of the projections, joined."""
        parts = dict(zip(self.names, self.split(joined), strict=True))
        return self.cut(names).join([parts[name] for name in names])


class FusedLinear(nnx.Module):
    """A projection that replaces several. Its parameters carry their ``columns`` as metadata.

    Args:
        kernel: the joined kernels.
        bias: the joined biases; None if the projections have none.
        columns: order of the features.
    """

    def __init__(self, kernel: nnx.Param, bias: nnx.Param | None, columns: Columns) -> None:
        self.kernel = kernel
        self.bias = nnx.data(bias)
        self.columns = columns

    def __call__(self, x: Float[Array, "tokens in_features"]) -> list[Float[Array, "tokens _"]]:
        """Project by all parts, in the order of the columns."""
        return self.columns.split(self.joined(x))

    def joined(self, x: Float[Array, "tokens in_features"]) -> Float[Array, "tokens features"]:
        """Project by all parts, and leave their features joined."""
        return _affine(x, self.kernel[...], None if self.bias is None else self.bias[...])

    def summands(
        self, x: Float[Array, "tokens in_features"], count: int
    ) -> Float[Array, "count tokens features"] | None:
        """The summands of ``joined`` in float32, each over as many input features.

        Args:
            x: the input.
            count: number of summands.

        Returns:
            The summands; None if the input features do not divide into them, or if a bias comes after the sum.
        """
        if self.bias is not None or x.shape[1] % count:
            return None
        kernel = self.kernel[...]
        return jax.lax.dot_general(
            x.reshape(len(x), count, -1),
            kernel.reshape(count, -1, kernel.shape[1]),
            (((2,), (1,)), ((1,), (0,))),
            preferred_element_type=jnp.float32,
        )

    def select(self, parts: Sequence[str]) -> Projection:
        """A projection by the named parts only. Their columns are copied by this call, and not by that projection."""
        columns = self.columns
        kernel = columns.select(self.kernel[...], parts)
        bias = None if self.bias is None else columns.select(self.bias[...], parts)
        return lambda x: columns.cut(parts).split(_affine(x, kernel, bias))


def _affine(
    x: Float[Array, "tokens in_features"], kernel: Float[Array, "in_features features"], bias: Array | None
) -> Float[Array, "tokens features"]:
    out = x @ kernel
    return out if bias is None else out + bias[None]


@dataclass(frozen=True)
class Fusible:
    """Projections of one input that a module holds either one by one, as in checkpoints, or joined.

    The class of such a module names its projections in an attribute ``fusible``.

    Args:
        name: name of the attribute that holds the joined projection.
        parts: names of the attributes that hold the separate projections.
    """

    name: str
    parts: tuple[str, ...]

    def project(self, module: nnx.Module, x: Float[Array, "tokens in_features"]) -> list[Float[Array, "tokens _"]]:
        """Project ``x`` by each part of ``module``."""
        return self.split(module, x, self.joined(module, x))

    def split(
        self,
        module: nnx.Module,
        x: Float[Array, "tokens in_features"],
        joined: Float[Array, "tokens features"] | None,
    ) -> list[Float[Array, "tokens _"]]:
        """Split what ``joined`` has made of ``x`` into parts, and project ``x`` by each part if that is None."""
        if joined is not None:
            return getattr(module, self.name).columns.split(joined)
        return [getattr(module, part)(x) for part in self.parts]

    def joined(
        self, module: nnx.Module, x: Float[Array, "tokens in_features"]
    ) -> Float[Array, "tokens features"] | None:
        """Project ``x`` by all parts of ``module`` at once, as ``Columns`` orders them; None if they are not joined."""
        return getattr(module, self.name).joined(x) if hasattr(module, self.name) else None

    def summands(
        self, module: nnx.Module, x: Float[Array, "tokens in_features"], count: int
    ) -> Float[Array, "count tokens features"] | None:
        """The summands of ``joined``, as ``FusedLinear.summands`` has them."""
        return getattr(module, self.name).summands(x, count)

    def select(self, module: nnx.Module, parts: Sequence[str]) -> Projection:
        """The projection by the named parts of ``module`` only."""
        if hasattr(module, self.name):
            return getattr(module, self.name).select(parts)
        return lambda x: [getattr(module, part)(x) for part in parts]

    def fuse(self, module: nnx.Module) -> None:
        """Join the parts of ``module``, unless they are joined already or differ in sharding."""
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
    """Join the projections of a model that share their input, in place: fewer, larger products, the same results.

    Modules are joined one after another, so that the weights of at most one module exist twice. Other references to the
    arrays stay valid: an ``nnx.clone(model)`` made before costs only the weights that are joined afterwards.
    The joined model lacks Hugging Face's parameter names; ``save_checkpoint`` restores them.
    """
    # A list of all modules would keep the weights of the replaced parts alive.
    modules = [module for _, module in nnx.iter_modules(model) if hasattr(type(module), "fusible")]
    for module in modules:
        fusible: Fusible = type(module).fusible  # pyright: ignore[reportAttributeAccessIssue]
        fusible.fuse(module)


def separate_params(model: nnx.Module) -> Iterator[tuple[Path, Shaped[np.ndarray, "..."], dict[str, Any]]]:
    """Yield the parameters of a model on the host, under the paths of the separate projections, with metadata."""
    for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        array, metadata = np.asarray(param[...]), param.get_metadata()
        if (columns := metadata.get("columns")) is None:
            yield path, array, metadata
        else:
            *parents, _, leaf = path
            for name, part in zip(columns.names, columns.split(array), strict=True):
                yield (*parents, name, leaf), part, metadata


def allocation_order(flat: Iterable[tuple[Path, Any]]) -> list[tuple[Path, Any]]:
    """Sort a flat state for allocation: parameters that will be joined are neighbours.

    Joined neighbours leave one hole, of the size that the next layer's joined parameters need. Otherwise each layer
    leaves several holes that fit nothing. In OPT-13B the pool, which is one piece, would lose 6 GB.
    """
    return sorted(flat, key=lambda item: (item[0][:-2], item[0][-2] not in _PARTS))


def _join_params(params: Sequence[Sequence[nnx.Param]], columns: Columns) -> list[nnx.Param]:
    """Join kernels, and biases. This call blocks, so that the caller can release the parts before it allocates more.

    Parts in host memory are joined on the device, and go back. Given shapes in place of arrays, it returns shapes.
    """
    arrays = [[moved(param.get_value(), to_host=False) for param in group] for group in params]
    program = _join_program(columns, tuple(group[0].sharding for group in arrays))
    if isinstance(arrays[0][0], jax.ShapeDtypeStruct):
        joined = jax.eval_shape(program, arrays)
    else:
        joined = jax.block_until_ready(program(arrays))
    return [
        nnx.Param(
            moved(array, to_host=is_on_host(group[0].get_value())),
            columns=columns,
            **_kept_metadata(group[0]),
        )
        for group, array in zip(params, joined, strict=True)
    ]


def _kept_metadata(param: nnx.Param) -> dict[str, Any]:
    """Return the metadata by which parameters are split over devices and written to checkpoints."""
    return {name: value for name, value in param.get_metadata().items() if name in ("logical_axes", "spellings")}


@lru_cache
def _join_program(columns: Columns, shardings: tuple[Sharding, ...]) -> Callable[..., list[jax.Array]]:
    def join(groups: list[list[jax.Array]]) -> list[jax.Array]:
        return [columns.join(group) for group in groups]

    return jax.jit(join, out_shardings=list(shardings))
