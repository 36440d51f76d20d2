"""Copies of KV heads, for models with fewer KV heads than devices: several devices hold the same head."""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Shaped

from jpaged.models.checkpoint.config import ModelConfig
from jpaged.sharding import TENSOR_AXIS

AXIS = "kv_heads"
"""The logical axis of parameters with a part for each KV head."""


@dataclass(frozen=True)
class KVCopies:
    """The number of copies of each KV head, which lie side by side.

    The devices split the query heads in order, and the query heads of one KV head are neighbours. So the device of a
    copy holds query heads of that KV head only.

    Args:
        count: copies of each head; 1 if every device has heads of its own.
        head_dim: features of a head.
    """

    count: int
    head_dim: int

    def is_copied(self, axes: tuple[str | None, ...]) -> bool:
        """Whether a parameter with these axes is larger than in a checkpoint."""
        return self.count > 1 and AXIS in axes

    def shape_without(self, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> tuple[int, ...]:
        """The parameter's shape in a checkpoint."""
        if not self.is_copied(axes):
            return shape
        return tuple(size // self.count if axis == AXIS else size for size, axis in zip(shape, axes, strict=True))

    def make(self, array: Shaped[Array, "*shape"], axes: tuple[str | None, ...]) -> Shaped[Array, "*larger"]:
        """Copy the heads of a checkpoint's parameter."""
        if not self.is_copied(axes):
            return array
        axis = axes.index(AXIS)
        heads = array.reshape(*array.shape[:axis], -1, self.head_dim, *array.shape[axis + 1 :])
        copied = jnp.repeat(heads, self.count, axis=axis)
        return copied.reshape(*array.shape[:axis], -1, *array.shape[axis + 1 :])

    def drop(self, array: Shaped[np.ndarray, "*rest features"]) -> Shaped[np.ndarray, "*rest fewer"]:
        """Undo ``make`` over the last axis."""
        heads = array.reshape(*array.shape[:-1], -1, self.count, self.head_dim)
        return heads[..., 0, :].reshape(*array.shape[:-1], -1)


def kv_copies(config: ModelConfig, mesh: Mesh) -> KVCopies:
    """Compute the copies that the devices of a mesh need.

    Raises:
        ValueError: neither the number of devices nor the number of KV heads divides the other.
    """
    num_devices, num_kv_heads = mesh.shape[TENSOR_AXIS], config.num_kv_heads
    if num_kv_heads % num_devices and num_devices % num_kv_heads:
        raise ValueError(
            f"num_kv_heads={num_kv_heads} cannot be split over tensor_parallel_size={num_devices} devices: "
            f"choose a divisor or a multiple of {num_kv_heads}"
        )
    return KVCopies(max(num_devices // num_kv_heads, 1), config.head_dim)
