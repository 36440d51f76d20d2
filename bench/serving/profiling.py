"""Breakdowns of steps that the real engine runs: timed first, then profiled."""

import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory

import jax

from bench.serving.breakdown import Kernel, StepBreakdown, break_down, read_kernels, scopes_of
from bench.serving.clock import BREAKDOWN, PREPARATION, TIMED, Clock, TimeIsUp
from bench.serving.runs import sampling
from bench.serving.stopwatch import Stopwatch, replaced
from jpaged import LLM
from jpaged.request import CompletionDelta

QUIET_S = 0.1
"""Longer than any step: the device has finished everything in flight."""

NUM_SETTLING_STEPS = 3


@dataclasses.dataclass(frozen=True, slots=True)
class DecodeTimes:
    """Steps in which every request gains a token.

    Args:
        step_us: time of a step without a profiler, by the host's clock.
        host_us: times of the parts of a step on the host.
        num_programs_compiled: programs compiled meanwhile.
        breakdown: the parts of a step; None if none was profiled.
    """

    step_us: float
    host_us: dict[str, float]
    num_programs_compiled: int
    breakdown: StepBreakdown | None


def time_decode(
    llm: LLM, prompts: list[list[int]], num_timed: int, num_traced: int, directory: Path | None, clock: Clock
) -> DecodeTimes:
    """Time steps in which every prompt gains a token, and then profile some.

    Args:
        llm: an idle LLM.
        prompts: no more than rows, all of one length.
        num_timed, num_traced: steps without and with the profiler; 0 with it profiles none.
        directory: directory of the trace; None keeps no trace.
        clock: takes the time of each part. No timed step begins after its deadline; the few that are profiled may.

    Raises:
        ValueError: the pool does not hold all of them at once, or they end before so many steps.
        TimeIsUp: the deadline is over.
    """
    engine, watch = llm.engine, Stopwatch()
    ids = _add(llm, prompts, max_tokens=llm.max_model_len - len(prompts[0]))
    try:
        with clock.part(PREPARATION):
            _settle(llm, len(prompts), clock.deadline)
        num_programs, start = len(engine.runner.programs), time.perf_counter()
        with clock.part(TIMED), watch.watch_steps(engine):
            num_timed = _decode(llm, len(prompts), num_timed, clock.deadline)
        step_us = 1e6 * (time.perf_counter() - start) / num_timed
        host_us, breakdown = watch.us_per_step(num_timed), None
        num_compiled = len(engine.runner.programs) - num_programs
        if num_traced:
            with clock.part(BREAKDOWN):
                kernels, num_traced = _profile_decode(llm, len(prompts), num_traced, directory)
                breakdown = break_down(kernels, num_traced, step_us=step_us, host_us=host_us)
    finally:
        for request_id in ids:
            engine.forget(request_id)
        engine.step()  # takes the step in flight
    return DecodeTimes(step_us, host_us, num_compiled, breakdown)


def _profile_decode(llm: LLM, num_rows: int, num_steps: int, directory: Path | None) -> tuple[list[Kernel], int]:
    """The kernels of some steps in which all requests decode, and the number of steps."""
    # The profiler sees one iteration alone of a loop inside a graph.
    with _kept(directory) as path, replaced(llm.engine.scheduler, "max_burst", 1):
        _decode(llm, num_rows, NUM_SETTLING_STEPS)  # the steps of a burst in flight
        with trace(path):
            num_steps = _decode(llm, num_rows, num_steps)
        return read_kernels(path, scopes_of(_program_text(llm, num_rows))), num_steps


def profile_prefill(llm: LLM, timed: list[list[int]], traced: list[list[int]], directory: Path | None) -> StepBreakdown:
    """Break down steps full of prompts, one token each.

    Args:
        llm: an idle LLM.
        timed, traced: prompts without and with the profiler; none of them cached.
        directory: directory of the trace; None keeps no trace.
    """
    watch, watch_traced = Stopwatch(), Stopwatch()
    start = time.perf_counter()
    _run_all(llm, timed, watch)
    step_us = 1e6 * (time.perf_counter() - start) / watch.num_steps
    with _kept(directory) as path:
        with trace(path):
            _run_all(llm, traced, watch_traced)
        kernels = read_kernels(path)
    return break_down(kernels, watch_traced.num_steps, step_us=step_us, host_us=watch.us_per_step(watch.num_steps))


def _program_text(llm: LLM, num_rows: int) -> str:
    runner = llm.engine.runner
    bucket = min(bucket for bucket in runner.buckets if bucket.is_decode and bucket.num_rows >= num_rows)
    return runner.programs.get(("forward", bucket)).as_text() or ""


def _settle(llm: LLM, num_rows: int, deadline: float) -> None:
    """Step until all requests decode together, and a few steps more."""
    while len(_step(llm, deadline)) < num_rows:
        if not llm.engine.has_unfinished:
            raise ValueError(f"{num_rows} prompts never decoded together: the pool is too small for them")
    _decode(llm, num_rows, NUM_SETTLING_STEPS, deadline)


def _decode(llm: LLM, num_rows: int, at_least: int, deadline: float = float("inf")) -> int:
    """Step until every row has gained this many tokens. Returns the number gained."""
    num_tokens = 0
    while num_tokens < at_least * num_rows:
        if not llm.engine.has_unfinished:
            raise ValueError(
                f"the requests ended before {at_least} steps: max_model_len={llm.max_model_len} is too small"
            )
        num_tokens += sum(len(delta.token_ids) for delta in _step(llm, deadline))
    return num_tokens // num_rows


def _step(llm: LLM, deadline: float) -> list[CompletionDelta]:
    if time.perf_counter() > deadline:
        raise TimeIsUp
    return llm.engine.step().deltas


def _run_all(llm: LLM, prompts: list[list[int]], watch: Stopwatch) -> None:
    with watch.watch_steps(llm.engine):
        _add(llm, prompts, max_tokens=1)
        while llm.engine.has_unfinished:
            llm.engine.step()


def _add(llm: LLM, prompts: list[list[int]], max_tokens: int) -> list[str]:
    """Queue prompts at the engine. Returns their request ids."""
    ids = [f"profiled {i}" for i in range(len(prompts))]
    for request_id, prompt in zip(ids, prompts, strict=True):
        params = sampling(max_tokens=max_tokens)
        llm.engine.add(llm.engine.make_request(request_id, {"prompt_token_ids": prompt}, params))
    return ids


def _kept(directory: Path | None) -> "nullcontext[Path] | _Temporary":
    return _Temporary() if directory is None else nullcontext(directory)


class _Temporary(TemporaryDirectory):
    def __enter__(self) -> Path:
        return Path(super().__enter__())


@contextmanager
def trace(directory: Path) -> Iterator[None]:
    """Profile everything enqueued inside, and nothing else."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # a step makes many thousand calls
    options.enable_hlo_proto = False  # the kernels of ours would be written with every program that runs
    time.sleep(QUIET_S)
    with jax.profiler.trace(str(directory), profiler_options=options):
        yield
        time.sleep(QUIET_S)
