"""Breakdown of a step: its kernels by kind, from a profile, and the rest of its time."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from heapq import nlargest
from operator import itemgetter
from pathlib import Path
from typing import Any

from jpaged.device.step.steps import SAMPLING_SCOPE

GEMM = re.compile(r"nvjet|gemm|gemv|cublas|cutlass|xmma|splitk", re.IGNORECASE)
"""Products, cuBLAS's and Triton's: nvjet_sm90_..., gemm_fusion_dot_..., cublasLt::splitKreduce_kernel."""

ATTENTION = re.compile(r"paged_decode|merge_decode_parts|paged_prefill")
SAMPLING = re.compile(rf"_sample|_beam|/{SAMPLING_SCOPE}/")
"""Part of the names of the runner's sampling programs, or of the scope of operations in others. The one product among
them makes the logits and counts as a GEMM.
"""

PROGRAM = re.compile(r"^HloModule ([\w.-]+)")
"""The name of a compiled program, at the beginning of its text."""

OPERATION = re.compile(r'^ *(?:ROOT )?%?([\w.-]+) = .*metadata={[^}]*op_name="([^"]*)"', re.MULTILINE)
"""Name of an operation and its scope, in the text of a compiled program."""

NUM_LARGEST, NUM_SHOWN = 24, 6


@dataclass(frozen=True, slots=True)
class Kernel:
    """A launch on the device, as profiled.

    Args:
        program: HLO module of the launch, "" if the profile lacks it.
        scope: scope of its operation (see ``scopes_of``), "" if unknown.
    """

    name: str
    start_ns: float
    duration_ns: float
    program: str = ""
    scope: str = ""

    @property
    def group(self) -> str:
        """The column in which the launch counts."""
        if ATTENTION.search(self.name):
            return "attention"
        if GEMM.search(self.name):
            return "gemm"
        return "sampling" if self.is_sampling else "other"

    @property
    def is_sampling(self) -> bool:
        """Whether the launch is part of sampling."""
        return SAMPLING.search(f"{self.program}/{self.scope}") is not None


@dataclass(frozen=True, slots=True)
class KernelSum:
    """All launches of one name in one group: microseconds and launches a step."""

    name: str
    group: str
    us: float
    num_launches: float


@dataclass(frozen=True, slots=True)
class StepBreakdown:
    """The parts of the time of a step, in microseconds a step.

    Args:
        step_us: time of a step without a profiler, by the host's clock.
        gemm_us, attention_us, sampling_us, other_us: times of kernels by kind. Sampling is None where the profile does
            not tell programs apart; "other" includes its kernels then.
        gaps_us: ``step_us`` less the time in which any kernel ran. The profile's own gaps differ: under a profiler XLA
            launches its kernels one by one, outside CUDA graphs.
        traced_step_us: time from the first profiled kernel to the end of the last, with the profile's gaps.
        num_launches: number of kernels, copies and fills.
        num_steps: number of profiled steps.
        largest: the kernels that take the most time, by name.
        host_us: times of the parts of a step on the host, which run beside the device.
    """

    step_us: float
    gemm_us: float
    attention_us: float
    sampling_us: float | None
    other_us: float
    gaps_us: float
    traced_step_us: float
    num_launches: float
    num_steps: int
    largest: tuple[KernelSum, ...]
    host_us: dict[str, float]

    def __str__(self) -> str:
        parts = {"GEMMs": self.gemm_us, "attention": self.attention_us, "sampling": self.sampling_us}
        parts |= {"other kernels": self.other_us, "gaps": self.gaps_us}
        shown = ", ".join(f"{name} {'?' if us is None else f'{us:,.0f}'}" for name, us in parts.items())
        largest = (f"{k.name[:48]} ({k.group}, {k.num_launches:.0f} x) {k.us:,.0f}" for k in self.largest[:NUM_SHOWN])
        return (
            f"a step of {self.step_us:,.0f} us: {shown}; {self.num_launches:.0f} launches\n"
            f"  largest: {', '.join(largest)}"
        )


def break_down(kernels: list[Kernel], num_steps: int, *, step_us: float, host_us: dict[str, float]) -> StepBreakdown:
    """Break down the ``num_steps`` steps that launched ``kernels``.

    Raises:
        ValueError: there are no kernels.
    """
    if not kernels or not num_steps:
        raise ValueError(f"{len(kernels)} kernels in {num_steps} steps: nothing of the device was profiled")
    scale = 1e-3 / num_steps
    groups: defaultdict[str, float] = defaultdict(float)
    durations: defaultdict[tuple[str, str], float] = defaultdict(float)
    launches: Counter[tuple[str, str]] = Counter()
    for kernel in kernels:
        key = kernel.name, kernel.group
        groups[kernel.group] += kernel.duration_ns
        durations[key] += kernel.duration_ns
        launches[key] += 1
    is_sampling_known = any(kernel.is_sampling for kernel in kernels)
    first, last = min(k.start_ns for k in kernels), max(k.start_ns + k.duration_ns for k in kernels)
    return StepBreakdown(
        step_us=step_us,
        gemm_us=groups["gemm"] * scale,
        attention_us=groups["attention"] * scale,
        sampling_us=groups["sampling"] * scale if is_sampling_known else None,
        other_us=groups["other"] * scale,
        gaps_us=step_us - busy_ns(kernels) * scale,
        traced_step_us=(last - first) * scale,
        num_launches=len(kernels) / num_steps,
        num_steps=num_steps,
        largest=tuple(
            KernelSum(name, group, ns * scale, launches[name, group] / num_steps)
            for (name, group), ns in nlargest(NUM_LARGEST, durations.items(), key=itemgetter(1))
        ),
        host_us=host_us,
    )


def busy_ns(kernels: list[Kernel]) -> float:
    """Time in which any kernel ran. Kernels of several streams may overlap."""
    busy, until = 0.0, float("-inf")
    for kernel in sorted(kernels, key=lambda k: k.start_ns):
        end = kernel.start_ns + kernel.duration_ns
        busy += max(0.0, end - max(kernel.start_ns, until))
        until = max(until, end)
    return busy


def scopes_of(text: str) -> dict[tuple[str, str], str]:
    """The scope of each operation in a compiled program's text, by the program and the name that its kernel has."""
    program = PROGRAM.match(text)
    return {(program[1], _kernel_name(name)): scope for name, scope in OPERATION.findall(text)} if program else {}


def _kernel_name(operation: str) -> str:
    return re.sub(r"[.-]", "_", operation)


def read_kernels(directory: Path, scopes: Mapping[tuple[str, str], str] | None = None) -> list[Kernel]:
    """The kernels of the first GPU in the newest profile under a directory; on a CPU, XLA's operations.

    On a CPU the operations of a loop lie inside each other, and count twice.

    Args:
        directory: directory of the profiler.
        scopes: scopes of some programs' operations (``scopes_of``).

    Raises:
        FileNotFoundError: there is no profile.
    """
    from jax.profiler import ProfileData

    paths = sorted(directory.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    if not paths:
        raise FileNotFoundError(f"no profile (*.xplane.pb) under {directory}")
    return list(kernels_of(ProfileData.from_file(str(paths[-1])).planes, scopes or {}))


def kernels_of(planes: Iterable[Any], scopes: Mapping[tuple[str, str], str]) -> Iterator[Kernel]:
    """The kernels in the planes of a ``jax.profiler.ProfileData``."""
    by_name = {plane.name: plane for plane in planes}
    gpus = sorted(name for name in by_name if name.startswith("/device:GPU"))
    if gpus:
        # Lines of other names sum up the streams.
        lines = [line for line in by_name[gpus[0]].lines if line.name.startswith("Stream")]
    else:
        lines = by_name["/host:CPU"].lines
    for line in lines:
        for event in line.events:
            stats = dict(event.stats)
            if gpus or "hlo_op" in stats:
                program = str(stats.get("hlo_module", ""))
                scope = scopes.get((program, _kernel_name(event.name)), "")
                yield Kernel(event.name, event.start_ns, event.duration_ns, program, scope)
