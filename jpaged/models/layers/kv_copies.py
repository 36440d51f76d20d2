"""KV heads where there are fewer than devices: each is held by several, as so many heads with the same weights."""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Shaped

from jpaged.models.checkpoint.config import ModelConfig
from jpaged.sharding import TENSOR_AXIS

AXIS = "kv_heads"
"""The logical axis of a parameter that has a part for each KV head."""


@dataclass(frozen=True)
class KVCopies:
    """How often each KV head of a model exists, its copies side by side.

    Query heads are split over the devices in their order, and those of one KV head are neighbours: so the device of a
    copy has queries of that head and of no other.

    Args:
        count: copies of each head; 1 where every device has heads of its own.
        head_dim: features of a head.
    """

    count: int
    head_dim: int

    def is_copied(self, axes: tuple[str | None, ...]) -> bool:
        """Whether a parameter of these axes is larger than in a checkpoint."""
        return self.count > 1 and AXIS in axes

    def shape_without(self, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> tuple[int, ...]:
        """The shape that a parameter has in a checkpoint."""
        if not self.is_copied(axes):
            return shape
        return tuple(size // self.count if axis == AXIS else size for size, axis in zip(shape, axes, strict=True))

    def make(self, array: Shaped[Array, "*shape"], axes: tuple[str | None, ...]) -> Shaped[Array, "*larger"]:
        """A parameter with all copies, of one without."""
        if not self.is_copied(axes):
            return array
        axis = axes.index(AXIS)
        heads = array.reshape(*array.shape[:axis], -1, self.head_dim, *array.shape[axis + 1 :])
        copied = jnp.repeat(heads, self.count, axis=axis)
        return copied.reshape(*array.shape[:axis], -1, *array.shape[axis + 1 :])

    def drop(self, array: Shaped[np.ndarray, "*rest features"]) -> Shaped[np.ndarray, "*rest fewer"]:
        """Undoes ``make`` over the last axis."""
        heads = array.reshape(*array.shape[:-1], -1, self.count, self.head_dim)
        return heads[..., 0, :].reshape(*array.shape[:-1], -1)


def kv_copies(config: ModelConfig, mesh: Mesh) -> KVCopies:
    """The copies that the devices of a mesh need.

    Raises:
        ValueError: neither does the number of devices divide that of the KV heads, nor the other way around.
    """
    num_devices, num_kv_heads = mesh.shape[TENSOR_AXIS], config.num_kv_heads
    if num_kv_heads % num_devices and num_devices % num_kv_heads:
        raise ValueError(
            f"num_kv_heads={num_kv_heads} cannot be split over tensor_parallel_size={num_devices} devices: "
            f"choose a divisor or a multiple of {num_kv_heads}"
        )
    return KVCopies(max(num_devices // num_kv_heads, 1), config.head_dim)
