"""The mesh, and the logical axes that are split over it."""

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, Sharding
from jax.sharding import PartitionSpec as P

from pallas_kernels import KV_HEAD_AXIS

TENSOR_AXIS = "tensor"

HOST_MEMORY = "pinned_host"
"""JAX's name of the host memory from which devices copy while their programs run."""

SHARDED_AXES = frozenset({"heads", "kv_heads", "ffn", "vocab", "experts"})
"""Logical axes that are split over the tensor axis; all other axes are replicated."""


def make_mesh(tensor_parallel_size: int = 1) -> Mesh:
    """Make a mesh of the first ``tensor_parallel_size`` devices, with the one axis "tensor".

    Raises:
        ValueError: the number is not positive, exceeds the devices, or leaves a process without a device.
    """
    devices = jax.devices()
    if not 1 <= tensor_parallel_size <= len(devices):
        raise ValueError(
            f"tensor_parallel_size={tensor_parallel_size} is not valid: expected at least 1, and at most the number of "
            f"devices, {len(devices)}"
        )
    if len({device.process_index for device in devices[:tensor_parallel_size]}) < jax.process_count():
        raise ValueError(
            f"tensor_parallel_size={tensor_parallel_size} leaves some of the {jax.process_count()} processes without a "
            f"device: give {len(devices)}, all there are"
        )
    return jax.make_mesh(
        (tensor_parallel_size,), (TENSOR_AXIS,), axis_types=(AxisType.Auto,), devices=devices[:tensor_parallel_size]
    )


def check_axes(sharding: Sharding | None) -> None:
    """Check that the compiler may split what lies along the axes of a sharding.

    Raises:
        ValueError: a mesh with axes that are not Auto.
    """
    mesh = getattr(sharding, "mesh", None)
    if mesh is not None and any(kind != AxisType.Auto for kind in mesh.axis_types):
        kinds = ", ".join(f"{name}={kind.name}" for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True))
        raise ValueError(
            f"the mesh has axes of types {kinds}: expected Auto for each; make it with make_mesh, or with "
            f"jax.make_mesh(..., axis_types=(AxisType.Auto,) * {len(mesh.axis_names)})"
        )


def check_divisible(mesh: Mesh, **sizes: int) -> None:
    """Check that every device gets whole heads and equal shares.

    Args:
        sizes: name -> size of an axis that is split over the tensor axis, such as ``num_kv_heads=8``.

    Raises:
        ValueError: the number of devices does not divide a size.
    """
    parts = mesh.shape[TENSOR_AXIS]
    for name, size in sizes.items():
        if size % parts:
            raise ValueError(
                f"{name}={size} cannot be split over tensor_parallel_size={parts} devices: "
                f"choose a tensor_parallel_size that divides {size}"
            )


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of arrays that every device holds whole: block tables, step inputs, tokens."""
    return NamedSharding(mesh, P())


def pool_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of the block pool, split by KV head."""
    return NamedSharding(mesh, pool_spec())


def pool_spec() -> P:
    """Return the partition spec of ``pool_sharding``."""
    return P(*[None] * KV_HEAD_AXIS, TENSOR_AXIS)


def is_on_host(array: jax.Array | jax.ShapeDtypeStruct) -> bool:
    """Whether an array, or one of this shape, lies in ``HOST_MEMORY``."""
    return array.sharding is not None and array.sharding.memory_kind == HOST_MEMORY


def moved[T: (jax.Array, jax.ShapeDtypeStruct)](array: T, *, to_host: bool) -> T:
    """Move an array between the devices' own memory and ``HOST_MEMORY``; given a shape, return that of the result.

    The call blocks, so that copies cannot pile up.
    """
    if is_on_host(array) == to_host:
        return array
    assert array.sharding is not None
    kind = HOST_MEMORY if to_host else None  # None is the device's default: its name differs between platforms
    sharding = array.sharding.with_memory_kind(kind)  # pyright: ignore[reportArgumentType]
    if isinstance(array, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)
    return jax.block_until_ready(jax.device_put(array, sharding))


def param_sharding(shape: tuple[int, ...], logical_axes: tuple[str | None, ...], mesh: Mesh) -> NamedSharding:
    """Return the sharding of a parameter whose axes carry these names.

    A vocabulary that the mesh does not divide is replicated. Sizes like 50,257 are common, and no other array depends
    on the split of the vocabulary. The mesh splits experts by number, or by width if it does not divide the number.
    """
    parts = mesh.shape[TENSOR_AXIS]
    named = tuple(zip(shape, logical_axes, strict=True))
    has_experts = any(axis == "experts" and size % parts == 0 for size, axis in named)

    def is_split(size: int, axis: str | None) -> bool:
        if axis in ("vocab", "experts"):
            return size % parts == 0
        return axis in SHARDED_AXES and not (axis == "ffn" and has_experts)

    return NamedSharding(mesh, P(*(TENSOR_AXIS if is_split(*pair) else None for pair in named)))
