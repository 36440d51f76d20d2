"""Kernels of an operation: which one is asked for, which one is best here, and why another one cannot run."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.chips import here

INTERPRETERS: dict[str, Callable[[], Any]] = {
    "hopper": plgpu.InterpretGPUParams,
    "pallas_tpu": pltpu.InterpretParams,
}
"""Name of a chip's kernels -> the settings with which Pallas interprets these kernels on any device, slowly."""

TITLES = {"hopper": "Hopper", "pallas_tpu": "TPU"}


@dataclass(frozen=True, slots=True)
class Kernel:
    """One implementation of an operation.

    Args:
        name: "xla", or the name of a chip's kernels ("hopper", "pallas_tpu").
        run: the operation; it raises NotImplementedError for a case, or a device, that the kernel does not take.
        why_not: the part of a case that the kernel does not take, on any device; None if it takes the case.
    """

    name: str
    run: Callable[..., Any]
    why_not: Callable[..., str | None] = lambda *case: None


@dataclass(frozen=True, slots=True)
class Choice:
    """An implementation's name, and the reason for the choice."""

    name: str
    reason: str


def why_cannot_run(name: str) -> str | None:
    """The reason why an implementation cannot run on this process's default device; None if it can."""
    own = {"hopper": here.why_no_hopper, "pallas_tpu": here.why_no_tpu}
    return own[name]() if name in own else None


def best_implementation(case: str | None = None, num_devices: int | None = None) -> Choice:
    """The implementation of attention that fits this process's default device.

    Args:
        case: why the device's own kernels cannot take the case at hand; None if they can.
        num_devices: number of devices that the arrays are spread over. None stands for all devices of all processes,
            since a traced array does not tell, or for one under ``jax.shard_map``.
    """
    name = here.own_kernels()
    reason = why_cannot_run(name)
    if reason is not None:
        return Choice("xla", f"{reason}; the portable one runs everywhere")
    if num_devices is None:
        num_devices = here.num_devices()
    if num_devices > 1:
        return Choice(
            "xla", f"over {num_devices} devices: the compiler splits no kernel of ours, but jax.shard_map does"
        )
    if case is not None:
        return Choice("xla", f"the {TITLES[name]} kernels do not take {case}")
    return Choice(name, "our kernels for this device")


def check_named(kernels: Mapping[str, Kernel], name: str | None, *, interpret: bool = False) -> None:
    """Check what a caller asks of an operation's kernels by name; None asks for the default.

    Raises:
        ValueError: an unknown name, or ``interpret`` for one whose kernels Pallas cannot interpret.
    """
    if name not in (None, *kernels):
        raise ValueError(f"implementation={name!r} is unknown: expected None or one of {sorted(kernels)}")
    if interpret and name not in INTERPRETERS:
        raise ValueError(
            f"interpret=True with implementation={name!r}: expected one of {sorted(kernels.keys() & INTERPRETERS)}, "
            "whose kernels Pallas can interpret"
        )


def run(kernel: Kernel, *args: Any, interpret: bool = False, **options: Any) -> Any:
    """Run a kernel, in Pallas's interpreter if that is asked for."""
    interpreter = {"interpret": INTERPRETERS[kernel.name]()} if interpret else {}
    return kernel.run(*args, **options, **interpreter)


def refuse(reason: str | None, instead: str) -> None:
    """Refuse a case for a reason, if there is one.

    Raises:
        NotImplementedError: there is a reason.
    """
    if reason is not None:
        raise NotImplementedError(f"{reason}; {instead}")
