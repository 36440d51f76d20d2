"""Layers whose matrices lie in host memory: each call copies them to the device, beside the layer before it."""

from collections.abc import Iterator
from typing import Any

import jax
from flax import nnx
from jax.sharding import NamedSharding

from jpaged.models.layers.fused import QKV, Path
from jpaged.sharding import HOST_MEMORY, moved


class Stream(nnx.Module):
    """The state that the layers of a model share while a step is traced.

    Attributes:
        inputs: arrays, and those in tuples, that the latest layer was called with.
    """

    def __init__(self) -> None:
        self.inputs: tuple[jax.Array, ...] = nnx.data(())


class StreamedLayer(nnx.Module):
    """A layer whose matrices are copied from host memory in each call.

    The copies wait for the inputs of the layer before, so that two layers exist on the device at a time: one computes
    while the next arrives. Without this dependency the compiler starts all copies of a step at once.

    Args:
        layer: the layer. It is called with its own arguments, whatever they are.
        stream: shared by all layers of the model.
    """

    def __init__(self, layer: nnx.Module, stream: Stream) -> None:
        self.layer = layer
        self.stream = stream

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        variables = [variable for _, variable in sorted(_matrices(self.layer), key=_is_late)]
        arrays = [variable.get_value() for variable in variables]
        arrays, _ = jax.lax.optimization_barrier((arrays, self.stream.inputs))
        for variable, array in zip(variables, arrays, strict=True):
            variable.set_value(jax.device_put(array, jax.memory.Space.Device))
        given = [x for x in (*args, *kwargs.values()) if isinstance(x, (jax.Array, tuple))]
        self.stream.inputs = nnx.data(tuple(x for x in jax.tree.leaves(given) if isinstance(x, jax.Array)))
        return self.layer(*args, **kwargs)  # pyright: ignore[reportCallIssue]

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"the model reads {name!r} of a layer, and weight_placement='host' expects a model that only calls its "
            "layers; move that code into the layer's __call__, or use weight_placement='device'"
        )


def layers_path(model: nnx.Module, num_layers: int) -> Path:
    """Find the path of the list of layers in a model.

    Raises:
        ValueError: the model does not hold exactly one list of so many layers.
    """
    lists = [path for path, node in nnx.iter_graph(model) if isinstance(node, nnx.List) and len(node) == num_layers]
    outer = [path for path in lists if not any(path != other and path[: len(other)] == other for other in lists)]
    if len(outer) != 1 or not all(map(callable, _at(model, outer[0]))):
        names = ", ".join(".".join(map(str, path)) for path in outer) or "none"
        raise ValueError(
            f"weight_placement='host' with {type(model).__name__}: expected exactly one nnx.List of {num_layers} "
            f"modules, the layers that the model calls in order, and its lists of {num_layers} are: {names}; "
            "keep each layer in a module of its own, or use weight_placement='device'"
        )
    return outer[0]


def placed(sharding: NamedSharding, where: Path, ndim: int, layers: Path | None) -> NamedSharding:
    """Return the sharding of a parameter, in host memory if it is a matrix of a streamed layer.

    Args:
        sharding: its sharding over the devices.
        where: its path.
        ndim: its number of axes.
        layers: path of the streamed layers; None if no layer is streamed.
    """
    is_streamed = layers is not None and where[: len(layers)] == layers and ndim > 1
    return sharding.with_memory_kind(HOST_MEMORY) if is_streamed else sharding


def streamed_params(model: nnx.Module, num_layers: int) -> list[Any]:
    """List the parameters that ``stream_layers`` moves, as arrays or shapes.

    Raises:
        ValueError: as ``layers_path``.
    """
    layers = _at(model, layers_path(model, num_layers))
    return [variable.get_value() for layer in layers for _, variable in _matrices(layer)]


def stream_layers(model: nnx.Module, num_layers: int) -> None:
    """Move the matrices of a model's layers to host memory, in place, and stream them whenever a layer is called.

    Norms and biases stay on the device: they are small, and a copy of each would cost more than their memory.

    Args:
        model: its projections joined; changed. Weights may be shapes.
        num_layers: number of layers.

    Raises:
        ValueError: as ``layers_path``.
    """
    layers, stream = _at(model, layers_path(model, num_layers)), Stream()
    for index in range(num_layers):  # a list of all layers would keep their arrays on the device
        layers[index] = StreamedLayer(_on_host(layers[index]), stream)


def _on_host(layer: nnx.Module) -> Any:
    """Copy a layer, its matrices in host memory. The copy has variables of its own: others may hold the layer's."""
    graphdef, state = nnx.split(layer)
    params = []
    for path, variable in nnx.to_flat_state(state):
        value = variable.get_value()
        params.append((path, variable.replace(moved(value, to_host=value.ndim > 1))))
    return nnx.merge(graphdef, nnx.from_flat_state(params))


def _matrices(layer: nnx.Module) -> Iterator[tuple[Path, nnx.Variable]]:
    """Yield the parameters of a layer that have more than one axis, and their paths in it."""
    for path, node in nnx.iter_graph(layer):
        if isinstance(node, nnx.Variable) and node.get_value().ndim > 1:
            yield path, node


def _is_late(item: tuple[Path, nnx.Variable]) -> bool:
    """Whether a layer needs a parameter after the projections of Q, K and V, which are copied first."""
    path, _ = item
    return not {QKV.name, *QKV.parts} & set(path)


def _at(model: nnx.Module, path: Path) -> nnx.List:
    node: Any = model
    for name in path:
        node = node[name] if isinstance(name, int) else getattr(node, name)
    return node
