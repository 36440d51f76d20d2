"""Many programs traced and compiled side by side."""

import gc
import os
from collections.abc import Callable, Hashable, Iterator, Mapping
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from typing import Any, NamedTuple

import jax
from jax import export
from tqdm import tqdm

from jpaged.device.step.program_store import num_cores
from pallas_kernels.chips import here

SOURCES_A_PROCESS = 8
"""Least number of programs for each process that traces: it imports JAX first, which takes as long as some traces."""

EXPORTED = {"cpu": "cpu", "gpu": "cuda"}
"""Platforms that another process can trace for without their devices, by their names in ``jax.export``."""

KERNEL_CALLS = ("mosaic_gpu_v2",)
"""Custom calls whose format may change between versions of JAX. All processes here have one version."""


class Source(NamedTuple):
    """A function to compile.

    Args:
        function: called with arrays alone. A process that traces finds it by its name: a module's function, a method of
            a value that can be pickled, or a partial of these.
        arguments: shapes of its arguments.
        donated: the arguments that the program may overwrite.
    """

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    donated: tuple[int, ...] = ()


class Device(NamedTuple):
    """Properties of a device that kernels depend on while they are traced; see ``pallas_kernels.chips.here``."""

    platform: str
    device_kind: str
    core_count: int | None
    compute_capability: str | None


def compile_all[Key: Hashable](sources: Mapping[Key, Source]) -> dict[Key, Any]:
    """Compile programs, and wait for all of them. A failed program's value is its exception."""
    return dict(tqdm(compile_each(sources), desc="Compiling", total=len(sources)))


def compile_each[Key: Hashable](sources: Mapping[Key, Source], *, num_processes: int = 0) -> Iterator[tuple[Key, Any]]:
    """Compile programs in threads while others are traced, and give each in its turn once it is there.

    Args:
        sources: the programs, by key.
        num_processes: processes that trace (see ``num_tracers``). With 0 a thread traces, one program after the other.

    Yields:
        A key and its program, or the exception with which it failed.
    """
    with ExitStack() as stack:
        tracers: Executor = ThreadPoolExecutor(1)
        trace = _lower
        if num_processes:
            device = _described(here.default_device())
            tracers = ProcessPoolExecutor(num_processes, get_context("spawn"), _start_tracing, (device,))
            trace = partial(_export, platform=EXPORTED[device.platform])
        stack.callback(tracers.shutdown, cancel_futures=True)
        compilers = ThreadPoolExecutor(num_cores())
        stack.callback(compilers.shutdown, cancel_futures=True)
        programs = {key: compilers.submit(_compile, tracers.submit(trace, each), each) for key, each in sources.items()}
        for key in sources:
            yield key, programs.pop(key).result()


def num_tracers(num_sources: int) -> int:
    """Processes that trace so many programs for this process's device; 0 if they take no less time than a thread."""
    if here.default_device().platform not in EXPORTED:
        return 0
    num_processes = min(num_cores() // 2, num_sources // SOURCES_A_PROCESS)
    return num_processes if num_processes > 1 else 0


def _described(device: Any) -> Device:
    of_gpu = (getattr(device, name, None) for name in ("core_count", "compute_capability"))
    return Device(device.platform, device.device_kind, *of_gpu)


def _start_tracing(device: Device) -> None:
    """Let a new process trace for a device that it does not touch."""
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
    jax.config.update("jax_platforms", "cpu")
    here.default_device = lambda: device
    gc.disable()  # tracing makes many objects that live on, so that collections would free nothing


def _lower(source: Source) -> Any:
    """A program that is traced; or the exception."""
    try:
        return jax.jit(source.function, donate_argnums=source.donated).lower(*source.arguments)
    except Exception as error:
        return error


def _export(source: Source, platform: str) -> Any:
    """A program that is traced, in the form in which processes hand programs over; or an exception."""
    unchecked = [export.DisabledSafetyCheck.custom_call(name) for name in KERNEL_CALLS]
    try:
        function = jax.jit(source.function)
        exported = export.export(function, platforms=[platform], disabled_checks=unchecked)(*source.arguments)
    except NotImplementedError as error:
        return NotImplementedError(str(error))
    except Exception as error:  # not every exception can be handed over
        return RuntimeError(one_line(error))
    return replace(exported, _get_vjp=None)


def _compile(traced: Future[Any], source: Source) -> Any:
    lowered = traced.result()
    if isinstance(lowered, export.Exported):
        lowered = _lower(source._replace(function=lowered.call))
    if isinstance(lowered, Exception):
        return lowered
    try:
        return lowered.compile()
    except Exception as error:
        return error


def one_line(error: BaseException) -> str:
    """An exception's type and the beginning of its message."""
    first = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first}"[:300]
