"""The platform and devices of this process: no other module of this package asks JAX for them."""

from typing import Any

import jax
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.chips.hopper import COMPUTE_CAPABILITY, NUM_SMS
from pallas_kernels.chips.tpu import Chip, chip_of


def default_device() -> Any:
    """The device of arrays that no caller has placed."""
    default = jax.config.jax_default_device  # a device, a platform's name, or None
    if isinstance(default, str):
        return jax.devices(default)[0]
    return default or jax.devices()[0]


def own_kernels() -> str:
    """The implementation made for this device, or for the device compiled for, whether or not it can run there."""
    is_tpu = why_no_tpu() is None or default_device().platform == "tpu"
    return "pallas_tpu" if is_tpu else "hopper"


def why_no_hopper() -> str | None:
    """The reason why this process's default device cannot run the Hopper kernels; None if it can."""
    device = default_device()
    if device.platform != "gpu":
        return f"the Hopper kernels need an NVIDIA GPU, not {device.platform}"
    capability = str(getattr(device, "compute_capability", "unknown"))
    if capability != COMPUTE_CAPABILITY:
        return f"the Hopper kernels need compute capability {COMPUTE_CAPABILITY}, not {capability}"
    return None


def why_no_tpu() -> str | None:
    """The reason why the TPU kernels cannot run where the program being traced will run; None if they can."""
    try:
        current_tpu()
    except NotImplementedError as error:
        return str(error)
    return None


def current_tpu() -> Chip:
    """The TPU that the program being traced is for: that of the abstract mesh in use, else the default device.

    Raises:
        NotImplementedError: no TPU, or a generation that the kernels were never compiled for.
    """
    try:
        info = pltpu.get_tpu_info()
    except ValueError as error:
        raise NotImplementedError("the TPU kernels need a TPU, or the abstract mesh of one") from error
    return chip_of(str(info.chip_version), info.num_cores)


def num_sms() -> int:
    """Multiprocessors of the default device, or of an H200 if the default device is no GPU."""
    device = default_device()
    return device.core_count if device.platform == "gpu" else NUM_SMS


def device_kind() -> str:
    """The default device's kind, as tuned.json names it."""
    return default_device().device_kind


def num_devices() -> int:
    """Devices that a traced array may be spread over: one under ``jax.shard_map``, else all of all processes."""
    return 1 if jax.sharding.get_abstract_mesh().manual_axes else jax.device_count()
