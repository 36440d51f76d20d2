"""Timed runs of ``LLM.generate``: their results, the engine's counters, and their deadline."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from bench.serving.clock import Clock, TimeIsUp
from bench.serving.figures import Figures, Floor
from bench.serving.sizes import Sizes
from bench.serving.stopwatch import Stopwatch, replaced
from bench.workloads import LOWEST_TOKEN_ID
from jpaged import LLM, EngineConfig, SamplingParams
from jpaged.device.runner import ModelRunner
from jpaged.engine.loop import Engine, Prompt
from jpaged.request import RequestOutput

PEER_VOCAB_SIZE = 30_000
COUNTERS = (
    "num_steps", "num_preemptions", "num_swaps_out", "num_swaps_in", "bytes_to_host", "bytes_from_host",
    "transfer_stalled_s",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Run:
    """One timed ``LLM.generate``: its results, and the changes of the engine's counters.

    Args:
        elapsed_s: time of the whole run, with all requests queued at once.
        is_complete: False if the run was stopped. Tokens until then count; requests count when they finish.
        num_requests, num_prompt_tokens, num_output_tokens: the work done.
        num_cached_prompt_tokens: prompt tokens found in the prefix cache.
        num_programs_compiled: programs compiled while the clock ran; any number but 0 spoils the figure.
        num_steps, ..., transfer_stalled_s: changes of the counters of ``EngineStats``.
        num_block_reads: sum over the steps of the distinct blocks held by running sequences.
        saved_by_sharing_percent: the statistic of ``EngineStats``, over the steps of this run.
        host_us_per_step: microseconds on the host, by part of a step.
    """

    elapsed_s: float
    is_complete: bool
    num_requests: int
    num_prompt_tokens: int
    num_output_tokens: int
    num_cached_prompt_tokens: int
    num_programs_compiled: int
    num_steps: int
    num_preemptions: int
    num_swaps_out: int
    num_swaps_in: int
    bytes_to_host: int
    bytes_from_host: int
    transfer_stalled_s: float
    num_block_reads: int
    saved_by_sharing_percent: float
    host_us_per_step: dict[str, float]

    @property
    def tokens_per_s(self) -> float:
        return self.num_output_tokens / self.elapsed_s

    @property
    def num_computed_tokens(self) -> int:
        return self.num_prompt_tokens - self.num_cached_prompt_tokens + self.num_output_tokens

    def note(self) -> str:
        """Warnings about the figure, if any."""
        count = self.num_programs_compiled
        note = f"; {count} programs were compiled while the clock ran" if count else ""
        return note if self.is_complete else f"{note}; STOPPED after {self.elapsed_s:.0f} s: the time limit"


@dataclass(slots=True)
class Bench:
    """The runner that all workloads share, whose programs are compiled once, and the figures that they fill.

    Args:
        runner, config: arguments of ``Engine``.
        sizes: sizes of the workloads.
        figures, floor: the figures, and their limits.
        limit_s: seconds of a workload, from ``start_clock`` on, without preparation.
        end: when the last workload stops, by ``time.perf_counter``.

    Attributes:
        clock: the current workload's.
    """

    runner: ModelRunner
    config: EngineConfig
    sizes: Sizes
    figures: Figures
    floor: Floor
    limit_s: float
    end: float = float("inf")
    clock: Clock = field(init=False, default_factory=Clock)

    def start_clock(self) -> None:
        """Begin a workload.

        Raises:
            TimeIsUp: the whole run has used its time.
        """
        self.clock = Clock(self.limit_s, self.end)

    def llm(self, **changes: Any) -> LLM:
        """An LLM over the runner, with empty pools. Earlier ones must no longer be used."""
        return LLM.from_engine(Engine(self.runner, replace(self.config, **changes)))

    @property
    def vocab_size(self) -> int:
        """Number of token ids in prompts: the peers', if the model has as many."""
        return min(PEER_VOCAB_SIZE, self.runner.model_config.vocab_size)

    def run(self, llm: LLM, prompts: list[list[int]], params: Any) -> Run:
        """``LLM.generate``, until it ends or the workload's time is up."""
        engine, watch, progress = llm.engine, Stopwatch(), _Progress()
        before, blocks_before, programs_before = llm.stats(), engine.scheduler.stats(), len(self.runner.programs)
        start = time.perf_counter()
        with _stopping(engine, self.clock, progress), watch.watch_steps(engine):
            try:
                llm.generate(as_prompts(prompts), params)
            except TimeIsUp:
                progress.is_complete = False  # LLM.generate has aborted the rest
        elapsed_s = time.perf_counter() - start
        if not progress.is_complete:
            engine.step()  # takes the step in flight
        after, blocks_after = llm.stats(), engine.scheduler.stats()
        logical = blocks_after.num_logical_blocks - blocks_before.num_logical_blocks
        physical = blocks_after.num_physical_blocks - blocks_before.num_physical_blocks
        return Run(
            elapsed_s=elapsed_s,
            is_complete=progress.is_complete,
            num_requests=len(progress.finished),
            num_prompt_tokens=sum(len(result.prompt_token_ids) for result in progress.finished),
            num_output_tokens=progress.num_tokens,
            num_cached_prompt_tokens=sum(result.num_cached_tokens for result in progress.finished),
            num_programs_compiled=len(self.runner.programs) - programs_before,
            num_block_reads=physical,
            saved_by_sharing_percent=100 * (1 - physical / max(logical, 1)),
            host_us_per_step=watch.us_per_step(watch.num_steps),
            **{name: getattr(after, name) - getattr(before, name) for name in COUNTERS},
        )

    def run_to_the_end(self, llm: LLM, prompts: list[list[int]], params: Any) -> Run:
        """Run as ``run`` does, for figures that need the complete run.

        Raises:
            TimeIsUp: the run was stopped.
        """
        run = self.run(llm, prompts, params)
        if not run.is_complete:
            raise TimeIsUp
        return run

    def load_programs(self) -> None:
        """Run every program of plain steps: the first runs of a program also load it and record its CUDA graphs."""
        llm, random = self.llm(), np.random.default_rng(0)
        longest = self.runner.max_model_len - 3
        for bucket in self.runner.buckets:
            count, length = bucket.num_rows, 2
            if not bucket.is_decode:
                length = min(bucket.num_tokens, longest)
                count = bucket.num_tokens // length
            for _ in range(1 if bucket.is_decode else 2):
                prompts = random.integers(LOWEST_TOKEN_ID, self.vocab_size, (count, length)).tolist()
                llm.generate(as_prompts(prompts), sampling(max_tokens=3), use_tqdm=False)


def as_prompts(token_ids: list[list[int]]) -> list[Prompt]:
    """Prompts for ``LLM.generate``."""
    return [{"prompt_token_ids": each} for each in token_ids]


def sampling(**options: Any) -> SamplingParams:
    """Plain sampling that never ends early."""
    return SamplingParams(temperature=1.0, ignore_eos=True, **options)


@dataclass(slots=True)
class _Progress:
    finished: list[RequestOutput] = field(default_factory=list)
    num_unfinished_tokens: int = 0
    is_complete: bool = True

    @property
    def num_tokens(self) -> int:
        finished = sum(len(output.token_ids) for result in self.finished for output in result.outputs)
        return finished + self.num_unfinished_tokens


@contextmanager
def _stopping(engine: Engine, clock: Clock, progress: _Progress) -> Iterator[None]:
    """Keep the results of the engine's steps. From the deadline on a step raises TimeIsUp instead."""
    step = engine.step

    def counted() -> Any:
        if time.perf_counter() > clock.deadline:
            groups = engine.outputs.groups
            progress.num_unfinished_tokens = sum(seq.num_outputs for group in groups for seq in group.sequences)
            raise TimeIsUp
        output = step()
        progress.finished += output.finished
        return output

    with replaced(engine, "step", counted):
        yield
