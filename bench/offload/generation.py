"""Generation by a batch of equal requests: the time of its prompts, of its decode steps, and the bytes that moved."""

import gc
import itertools
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from bench import UsageError
from bench.offload.busy import Busy, trace_steps
from bench.offload.predictions import predict_steps
from bench.offload.shapes import BLOCK_SIZE, Shapes, settings_of
from bench.report import Table, shown
from bench.serving.runs import as_prompts
from bench.serving.startup import only_sizes
from jpaged import LLM, EngineConfig, SamplingParams
from jpaged.contract.plan import BlockCopy, StepPlan
from jpaged.device.kv.layout import kv_dtype
from jpaged.device.runner import ModelRunner
from jpaged.engine.loop import Engine
from jpaged.host.sequence import SequenceGroup

NUM_FIRST = 3  # tokens of the last request after which all decode, and no prompt is in flight
SHORT_LEN = 256  # tokens of the prompts of a first run
MOST_COPIED = 1024  # blocks of the plan whose copies are timed
NUM_PINNED_BYTES = 2**28
MOST_SEQS = 10_000  # seeds of one batch


@dataclass(frozen=True, slots=True)
class Work:
    """A batch of equal requests, all queued at once.

    Args:
        num_seqs: requests.
        prompt_len: tokens of each prompt, random and different.
        num_tokens: tokens that each draws.
    """

    num_seqs: int
    prompt_len: int
    num_tokens: int

    def __str__(self) -> str:
        return f"{self.num_seqs} x {self.prompt_len:,} + {self.num_tokens}"

    @property
    def num_blocks(self) -> int:
        """Blocks of all requests together."""
        return self.num_seqs * -(-(self.prompt_len + self.num_tokens) // BLOCK_SIZE)


@dataclass(frozen=True, slots=True)
class Generation:
    """The times of one batch.

    Args:
        total_s: from the first plan to the last token.
        prompt_s: until every request has its first token.
        step_ms: median time of a step in which every request decodes.
        mean_step_ms: mean time of these steps.
        num_steps: number of these steps.
        kv_bytes: bytes of K and V in the full blocks that such a step attends to.
        bytes_from_host: bytes that such a step brought from the host.
        bytes_to_host: bytes that all steps moved to the host.
        num_preemptions: preemptions of all steps.
        num_programs_compiled: programs compiled meanwhile; any number but 0 spoils the sums, and not the median.
    """

    total_s: float
    prompt_s: float
    step_ms: float
    mean_step_ms: float
    num_steps: int
    kv_bytes: float
    bytes_from_host: float
    bytes_to_host: int
    num_preemptions: int
    num_programs_compiled: int


@dataclass(frozen=True, slots=True)
class Rates:
    """Rates of copies from the host, measured in the same process.

    Args:
        pool_bytes_per_s: one plan that moves blocks from the host pool, side by side, and computes nothing.
        pinned_bytes_per_s: one ``device_put`` of 256 MiB of pinned memory; None without memory of the device's own.
        num_pool_bytes: bytes that the plan moves.
    """

    pool_bytes_per_s: float
    pinned_bytes_per_s: float | None
    num_pool_bytes: int

    @property
    def best_bytes_per_s(self) -> float:
        """The faster of both, with which a stream is compared."""
        return max(self.pool_bytes_per_s, self.pinned_bytes_per_s or 0.0)


def measure_rates(runner: ModelRunner) -> Rates:
    """Measure copies before the first request: they overwrite blocks of the device pool."""
    num_blocks = min(MOST_COPIED, runner.num_host_blocks, runner.num_blocks - 1)
    plan = StepPlan(from_host=tuple(BlockCopy(block, block + 1) for block in range(num_blocks)))
    pinned_bytes_per_s = None
    if runner.programs.target.has_own_memory:
        [device] = runner.mesh.devices.flat
        pinned = jax.device_put(
            np.zeros(NUM_PINNED_BYTES, np.uint8), SingleDeviceSharding(device, memory_kind="pinned_host")
        )
        jax.block_until_ready(pinned)
        seconds = _best_s(lambda: jax.device_put(pinned, SingleDeviceSharding(device)))
        pinned_bytes_per_s = NUM_PINNED_BYTES / seconds

    def move() -> Any:
        runner.execute(plan)
        return runner.cache.pool

    num_bytes = num_blocks * runner.host_bytes_per_block
    return Rates(num_bytes / _best_s(move), pinned_bytes_per_s, num_bytes)


def _best_s(run: Callable[[], Any]) -> float:
    times = []
    for _ in range(6):
        started = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - started)
    return min(times)


def generate(llm: LLM, shapes: Shapes, work: Work, seed: int) -> tuple[Generation, list[list[int]]]:
    """Run a batch to its end, greedily.

    Args:
        llm: an LLM without other requests.
        shapes: its model.
        work: the batch.
        seed: seed of the prompts.

    Returns:
        The times of the batch, and the tokens of each request.

    Raises:
        RuntimeError: no step in which all requests decode: the first ends before the last begins.
    """
    engine = llm.engine
    prompts = [shapes.prompt(work.prompt_len, seed + index) for index in range(work.num_seqs)]
    num_programs, before, start = len(engine.runner.programs), llm.stats(), time.perf_counter()
    groups = _add(engine, prompts, work.num_tokens)
    try:
        _run_while(engine, lambda: any(group.sequences[0].num_outputs == 0 for group in groups))
        prompt_s = time.perf_counter() - start
        num_before, num_steps, steps, bytes_from_host = _decode_all(llm, groups)
        _run_while(engine, lambda: engine.has_unfinished)
    finally:
        for group in groups:
            engine.abort(group.request.request_id)
    if not steps:
        raise RuntimeError(f"{work}: no step in which all requests decode; let them draw more tokens")
    after = llm.stats()
    num_full = (work.prompt_len + num_before + num_steps / 2) // BLOCK_SIZE
    generation = Generation(
        total_s=time.perf_counter() - start,
        prompt_s=prompt_s,
        step_ms=1e3 * median(step_s for _, step_s in steps),
        mean_step_ms=1e3 * sum(num_new * step_s for num_new, step_s in steps) / num_steps,
        num_steps=num_steps,
        kv_bytes=work.num_seqs * num_full * shapes.kv_block_bytes(engine.runner.config.kv_cache_dtype),
        bytes_from_host=bytes_from_host / num_steps,
        bytes_to_host=after.bytes_to_host - before.bytes_to_host,
        num_preemptions=after.num_preemptions - before.num_preemptions,
        num_programs_compiled=len(engine.runner.programs) - num_programs,
    )
    return generation, [group.sequences[0].output_token_ids for group in groups]


def _decode_all(llm: LLM, groups: list[SequenceGroup]) -> tuple[int, int, list[tuple[int, float]], int]:
    """Run the steps in which all requests decode.

    Returns:
        Tokens of the last request before, and in these steps; tokens and seconds a token of each engine step; the bytes
        that these steps brought from the host.
    """
    engine, last = llm.engine, groups[-1].sequences[0]
    _run_while(engine, lambda: last.num_outputs < NUM_FIRST and engine.has_unfinished)
    steps, before, num_before = [], llm.stats(), last.num_outputs
    while len(engine.scheduler.line.running) == len(groups):
        num_drawn, started = last.num_outputs, time.perf_counter()
        engine.step()
        if (num_new := last.num_outputs - num_drawn) > 0:
            steps.append((num_new, (time.perf_counter() - started) / num_new))
    return num_before, last.num_outputs - num_before, steps, llm.stats().bytes_from_host - before.bytes_from_host


def measure_busy(llm: LLM, shapes: Shapes, work: Work, seed: int) -> Busy:
    """Profile a few steps in which all requests of a batch decode, and end it.

    Args: as for ``generate``.

    Raises:
        RuntimeError: a request ends before.
    """
    engine = llm.engine
    groups = _add(engine, [shapes.prompt(work.prompt_len, seed + index) for index in range(work.num_seqs)], None)
    try:
        _run_while(engine, lambda: groups[-1].sequences[0].num_outputs < NUM_FIRST and engine.has_unfinished)
        busy = trace_steps(llm)
        if len(engine.scheduler.line.running) < work.num_seqs:
            raise RuntimeError(f"{work}: not all requests decode in the steps that are profiled")
        return busy
    finally:
        for group in groups:
            engine.abort(group.request.request_id)
        engine.step()  # takes the step in flight


def _add(engine: Engine, prompts: list[list[int]], max_tokens: int | None) -> list[SequenceGroup]:
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    requests = engine.make_requests(as_prompts(prompts), params, 0)
    for request in requests:
        engine.add(request, is_streamed=False)
    return [engine.scheduler.roster.requests[request.request_id] for request in requests]


def _run_while(engine: Engine, condition: Callable[[], bool]) -> None:
    while condition():
        engine.step()


# Variants ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to serve the works of a scenario.

    Args:
        name: its name in tables.
        changes: settings that differ from the scenario's.
        tune: changes an engine before its first request.
    """

    name: str
    changes: dict[str, Any]
    tune: Callable[[Engine], None] = lambda engine: None


def run_variants(
    shapes: Shapes,
    config: EngineConfig,
    variants: Sequence[Variant],
    works: Sequence[Work],
    repeats: int,
    *,
    keep: Callable[[list[dict[str, Any]]], None],
    is_profiled: bool = False,
) -> None:
    """Run all works by every variant, each in an engine of its own, and print a row for each.

    A variant or a work that fails is recorded with the reason.

    Args:
        shapes: the model.
        config: the settings that variants change.
        variants: ways to serve.
        works: batches.
        repeats: runs of each batch; the one with the fastest step counts, of those that compile nothing.
        keep: gets the results so far after each batch: settings, rates and runs of every variant.
        is_profiled: whether to profile a few steps of each batch too.
    """
    titles = "prompts s", "ms a step", "KV GB/s", "link GB/s", "of copies", "tokens/s", "tokens"
    table = Table("", *titles, first=36, width=9)
    print(table.header(), flush=True)
    results, expected = [], {}
    for variant in variants:
        result: dict[str, Any] = {"variant": variant.name}
        results.append(result)
        try:
            # No name here holds an engine, whose memory the next one takes.
            for found in _Runs.start(shapes, config, variant, works, repeats, is_profiled, table, expected).run(works):
                result |= found
                keep(results)
        except Exception as error:  # the others may still be measured
            result |= _refused(variant.name, error)
            keep(results)
        gc.collect()  # the device holds one model at a time


@dataclass(frozen=True, slots=True)
class _Runs:
    """The runs of one variant. ``expected`` has the tokens that earlier variants drew, by work."""

    llm: LLM
    shapes: Shapes
    name: str
    repeats: int
    is_profiled: bool
    table: Table
    expected: dict[Work, list[list[int]]]

    @classmethod
    def start(
        cls, shapes: Shapes, config: EngineConfig, variant: Variant, works: Sequence[Work], *others: Any
    ) -> "_Runs":
        """Start the engine of a variant for some works; the others are the last fields."""
        with only_sizes([work.num_seqs for work in works]):
            llm = shapes.start(replace(config, **variant.changes), warm_up=True)
        runner = llm.engine.runner
        if runner.programs.stream is not None:  # with "auto", the first prompts that stream would wait for these
            runner.programs.store.make_all([("stream", size) for size in runner.buckets], None, use_tqdm=False)
        variant.tune(llm.engine)
        return cls(llm, shapes, variant.name, *others)

    def run(self, works: Sequence[Work]) -> Iterator[dict[str, Any]]:
        """Run all works. Yields settings, rates and the runs so far, for the result file."""
        runner, runs = self.llm.engine.runner, []
        rates = measure_rates(runner) if runner.num_host_blocks else None
        for index, work in enumerate(works):
            try:
                runs.append(self._run(work, rates, MOST_SEQS * (self.repeats + 2) * index))
            except Exception as error:  # the others may still be measured
                runs.append({"work": asdict(work)} | _refused(f"{self.name}: {work}", error))
            yield settings_of(self.llm) | {"rates": None if rates is None else asdict(rates), "runs": runs}

    def _run(self, work: Work, rates: Rates | None, seed: int) -> dict[str, Any]:
        seeds = itertools.count(seed, MOST_SEQS)  # no prompt is found in the prefix cache
        # A first run makes CUDA graphs, and compiles what the sizes do not tell. It needs no long prompts.
        generate(self.llm, self.shapes, replace(work, prompt_len=min(work.prompt_len, SHORT_LEN)), next(seeds))
        done = [generate(self.llm, self.shapes, work, next(seeds)) for _ in range(self.repeats)]
        busy = asdict(measure_busy(self.llm, self.shapes, work, next(seeds))) if self.is_profiled else None
        token_ids = done[0][1]
        are_equal = self.expected.setdefault(work, token_ids) == token_ids
        generations = [generation for generation, _ in done]
        best = min(generations, key=lambda each: (each.num_programs_compiled > 0, each.step_ms))
        figures = {
            "kv_bytes_per_s": 1e3 * best.kv_bytes / best.step_ms,
            "link_bytes_per_s": 1e3 * best.bytes_from_host / best.step_ms,
            "share_of_copies": None,
            "tokens_per_s": work.num_seqs * work.num_tokens / best.total_s,
        }
        if rates is not None:
            figures["share_of_copies"] = figures["link_bytes_per_s"] / rates.best_bytes_per_s
        kv, link, share, tokens_per_s = figures.values()
        cells = best.prompt_s, best.step_ms, kv / 1e9, link / 1e9, share, tokens_per_s
        print(self.table.row(f"{self.name}: {work}", *cells, "equal" if are_equal else "DIFFER"), flush=True)
        predicted = self._predict(work) if best.bytes_from_host else None
        if predicted is not None:
            print(f"  predicted: {', '.join(f'{name} {shown(value)}' for name, value in predicted.items())}")
        if busy is not None:
            print(f"  computing {busy['computing']:.1%} of the time, copying {busy['copying']:.1%}", flush=True)
        return {
            "work": asdict(work),
            "best": asdict(best) | figures,
            "step_ms": [generation.step_ms for generation in generations],
            "predicted": predicted,
            "busy": busy,
            "are_tokens_equal": are_equal,
        }

    def _predict(self, work: Work) -> dict[str, Any] | None:
        """The planner's predictions; None without the rates of projections."""
        profile, runner = self.llm.engine.scheduler.profile, self.llm.engine.runner
        if profile is None or not profile.projection_flops_per_s:
            return None
        num_blocks = [(work.prompt_len + work.num_tokens // 2) // BLOCK_SIZE] * work.num_seqs
        kv_cache_dtype = runner.config.kv_cache_dtype
        itemsize = kv_dtype(kv_cache_dtype, runner.dtype).itemsize  # activations are stored as K and V are
        kv_block_bytes = self.shapes.kv_block_bytes(kv_cache_dtype)
        return predict_steps(profile, self.shapes, kv_block_bytes, itemsize, num_blocks)


def _refused(name: str, error: Exception) -> dict[str, Any]:
    if not isinstance(error, (UsageError, ValueError)):
        traceback.print_exception(error)
    reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    print(f"{name}: refused: {reason}", flush=True)
    return {"refused": reason}
