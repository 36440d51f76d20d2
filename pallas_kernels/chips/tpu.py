"""TPUs: memories and rates of each generation, as JAX publishes them (``pltpu.TpuInfo``), and register shapes."""

from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

LANES = 128
"""Elements in a row of a vector register, on every generation."""

SUBLANES = 8
"""Rows of 32-bit elements in a vector register, on every generation."""

CORES_OF_DEVICE = {"v4": 2, "v5e": 1, "v5p": 2, "v6e": 1, "7x": 1}
"""Generation -> most TensorCores that one JAX device runs. The kernels are compiled for these generations only."""


@dataclass(frozen=True, slots=True)
class Chip:
    """One device as JAX counts them: a chip, or half of a TPU7x. Memories and rates are those of one TensorCore."""

    generation: str
    num_cores: int
    vmem_bytes: int
    smem_bytes: int
    hbm_bytes: int
    hbm_bytes_per_s: float
    bf16_flops_per_s: float


def chip_of(generation: str, num_cores: int | None = None) -> Chip:
    """The chip of a generation.

    Args:
        generation: a key of ``CORES_OF_DEVICE``.
        num_cores: TensorCores of a device; the most that one may have if None.

    Raises:
        NotImplementedError: a generation that the kernels were never compiled for.
    """
    if generation not in CORES_OF_DEVICE:
        raise NotImplementedError(f"TPU {generation}: the kernels are compiled for {', '.join(CORES_OF_DEVICE)} only")
    cores = num_cores or CORES_OF_DEVICE[generation]
    return _chip(pltpu.get_tpu_info_for_chip(pltpu.ChipVersion(generation), cores))


def _chip(info: pltpu.TpuInfo) -> Chip:
    return Chip(
        generation=str(info.chip_version),
        num_cores=info.num_cores,
        vmem_bytes=info.vmem_capacity_bytes,
        smem_bytes=info.smem_capacity_bytes,
        hbm_bytes=info.hbm_capacity_bytes,
        hbm_bytes_per_s=info.mem_bw_bytes_per_second,
        bf16_flops_per_s=info.bf16_ops_per_second,
    )


def in_hbm(array: Array, interpret: pltpu.InterpretParams | None) -> Array:
    """An array that kernels find in HBM: the compiler may otherwise move a small one, even while copies fill it."""
    return array if interpret else pltpu.with_memory_space_constraint(array, pltpu.HBM)


def sublanes_of(dtype: DTypeLike) -> int:
    """Rows of a whole vector register: 8 of 32 bits, 16 of 16, 32 of 8."""
    return SUBLANES * 4 // jnp.dtype(dtype).itemsize
