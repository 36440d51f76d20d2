"""The engine's loop: adds and aborts requests, and keeps a step in flight."""

import dataclasses
import logging
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from jpaged.config import EngineConfig
from jpaged.contract.profile import MachineProfile, Observations
from jpaged.device.processes import LeadingRunner
from jpaged.device.profiler import keep_profile
from jpaged.device.runner import ModelRunner, StepInFlight
from jpaged.engine.changes import Changes
from jpaged.engine.detokenizer import Tokenizer
from jpaged.engine.outputs import Outputs, StepOutput
from jpaged.engine.prompts import Prompt, PromptReader, pair_up
from jpaged.engine.stats import EngineStats, read_stats
from jpaged.engine.token_texts import end_token_ids
from jpaged.host.blocks.manager import BlockManager
from jpaged.host.offload.placement import KV_ON_DEVICE, Placement, blocks_moved_together
from jpaged.host.offload.profile import learn
from jpaged.host.scheduler import Scheduler
from jpaged.interrupts import InterruptsWait
from jpaged.request import FinishReason, Request, SamplingParams

log = logging.getLogger(__name__)

LEAST_LEARNT = 64
"""Steps after which a profile is kept for later runs: after 64, 128, 256 and so on."""


class Engine:
    """Serves requests over one model and one KV cache: the scheduler decides, the runner executes.

    One thread at a time may use an engine; an ``Inbox`` sees to it.

    Args:
        runner: the device half, ready.
        config: the settings of the runner, or settings that ask for no more blocks, rows and tokens.
        tokenizer: text <-> token ids; None serves token ids only.
        sampling_defaults: sampling parameters of requests that give none, as far as they differ from
            ``SamplingParams()``.

    Raises:
        ValueError: a block size other than the runner's, more rows or tokens than its steps have, or swapping and
            streaming with a runner that cannot.
    """

    def __init__(
        self,
        runner: ModelRunner,
        config: EngineConfig,
        tokenizer: Tokenizer | None = None,
        sampling_defaults: Mapping[str, Any] | None = None,
    ):
        if config.block_size != runner.config.block_size:
            raise ValueError(
                f"block_size={config.block_size} is not the runner's {runner.config.block_size}: give that"
            )
        config = _with_limits_of(runner.config, config)
        for name in ("most_rows", "token_budget"):
            asked, most = getattr(config, name), getattr(runner.config, name)
            if asked > most:
                shown = {"most_rows": "max_num_seqs"}.get(name, name)
                raise ValueError(f"{shown}={asked} is more than the runner's {most}: lower it or build another runner")
        # Checks what an 8-bit pool demands.
        config = dataclasses.replace(config, kv_cache_dtype=runner.config.kv_cache_dtype)
        num_host_blocks = _num_host_blocks(runner, config)
        if num_host_blocks and config.preemption == "auto" and runner.profile is None:
            runner.measure_profile()
        self.runner = runner
        self.config = config
        self.tokenizer = tokenizer
        self.model_config = runner.model_config
        self.blocks = BlockManager(
            min(config.num_blocks or runner.num_blocks, runner.num_blocks),
            config.block_size,
            enable_prefix_caching=config.enable_prefix_caching,
            num_host_blocks=num_host_blocks,
            placement=_placement(runner, config),
            groups=runner.groups,
        )
        self.blocks.is_quantized = runner.config.kv_cache_dtype != "auto"
        self.scheduler = Scheduler(
            self.blocks,
            max_num_seqs=config.most_rows,
            max_num_batched_tokens=config.token_budget,
            max_model_len=runner.max_model_len,
            eos_token_ids=(
                *runner.model_config.eos_token_ids,
                *end_token_ids(tokenizer, runner.model_config.vocab_size),
            ),
            max_burst=min(config.max_burst or runner.max_burst, runner.max_burst),
            preemption=config.preemption,
            profile=runner.profile,
        )
        self.scheduler.shared_prefix.least_saved = runner.programs.least_shared_tokens
        self._changes = Changes(runner, self.scheduler)
        self.scheduler.max_step_s = _max_step_s(config.max_inter_token_ms or runner.max_inter_token_ms, runner.profile)
        self.sampling_defaults = dict(sampling_defaults or {})
        self.default_params = SamplingParams(**self.sampling_defaults)
        self.prompts = PromptReader(tokenizer, runner.model_config, self.default_params)
        self.outputs = Outputs(tokenizer, self.scheduler)
        self._num_requests = 0  # made by ``make_requests``
        self._random = np.random.default_rng(config.seed)
        self._in_flight: list[StepInFlight] = []  # oldest first
        self.failed_step: tuple[str, ...] = ()
        """The requests that ran in the last step, if it failed."""
        self._num_learnt = 0  # steps that the profile learnt from

    # Requests -----------------------------------------------------------------------------------------------------

    def make_request(
        self, request_id: str, prompt: Prompt, params: SamplingParams | None = None, priority: int = 0
    ) -> Request:
        """Check a prompt and its parameters against this engine. Changes nothing.

        Args:
            request_id: unique among unfinished requests.
            prompt: text or token ids.
            params: how to generate; None is ``default_params``.
            priority: lower is served first and preempted last.

        Raises:
            ValueError: a prompt that is empty, too long or out of the vocabulary; parameters that can never be met.
        """
        request = self.prompts.read(request_id, prompt, params, priority)
        return dataclasses.replace(request, terms=self.scheduler.check(request))

    def make_requests(self, prompts: Any, sampling_params: Any, priority: Any) -> list[Request]:
        """Make the requests of one call, numbered on; see ``LLM.generate`` for the arguments.

        Raises:
            ValueError: any prompt or parameter is invalid, with the number of the prompt.
        """
        asked = pair_up(prompts, sampling_params, priority)
        requests = []
        for i, (prompt, params, rank) in enumerate(asked):
            try:
                requests.append(self.make_request(str(self._num_requests + i), prompt, params, rank))
            except ValueError as error:
                where = f"prompt {i}: " if len(asked) > 1 else ""
                raise ValueError(f"{where}{error}") from None
        self._num_requests += len(requests)
        return requests

    def add(self, request: Request, *, is_streamed: bool = True) -> None:
        """Queue a request made by ``make_request``; draws its seed if it has none.

        Args:
            request: the request.
            is_streamed: whether its deltas are wanted; if not, steps only bring its result.
        """
        if request.seed is None:
            request = dataclasses.replace(request, seed=int(self._random.integers(2**32)))
        with InterruptsWait():
            if self._in_flight and not self.scheduler.has_unfinished:  # all requests were aborted
                self._drop_in_flight()
            self.outputs.open(self.scheduler.add(request), is_streamed=is_streamed)

    def abort(self, request_id: str, *, reason: FinishReason = FinishReason.ABORT, error: str | None = None) -> bool:
        """End a request now and free its blocks; its last deltas and its result wait for ``take``.

        Args:
            request_id: the request.
            reason: the reason that its completions get.
            error: the explanation that its result gets.

        Returns:
            False if the request is unknown or has finished.
        """
        if request_id not in self.outputs.answers:
            return False
        with InterruptsWait():
            group = self.scheduler.abort(request_id, reason)
            if group is None:
                return False
            group.error = error
            self.outputs.note([group])
            self.outputs.read()
        return True

    def forget(self, request_id: str) -> None:
        """End a request, if there is one, and keep nothing of it."""
        if request_id in self.outputs.answers:
            with InterruptsWait():
                self.scheduler.abort(request_id)
                self.outputs.drop(request_id)

    @property
    def num_output_tokens(self) -> int:
        """Tokens that requests gained since the start; a search counts one for each live beam and step."""
        return self.scheduler.outcome.num_output_tokens

    @property
    def has_unfinished(self) -> bool:
        """Whether a request has no result yet."""
        return bool(self.outputs.answers)

    # Pinned prefixes ----------------------------------------------------------------------------------------------

    def pin(self, request_id: str, prefix: Prompt) -> list[int]:
        """Queue a prefix to be computed and kept in the pool until ``unpin``; it is there once ``is_pinned``.

        Returns:
            The prefix's token ids.

        Raises:
            ValueError: prefix caching is off, the prefix is no valid prompt, or it leaves others too little room.
        """
        if not self.config.enable_prefix_caching:
            raise ValueError("enable_prefix_caching=False: a pinned prefix would never be found; turn it on")
        request = self.prompts.read(request_id, prefix, SamplingParams(max_tokens=1, seed=0), 0)
        with InterruptsWait():
            self.scheduler.pin(request)
        return request.prompt_token_ids

    def is_pinned(self, request_id: str) -> bool:
        """Whether a prefix that ``pin`` queued is in the pool."""
        return self.scheduler.is_pinned(request_id)

    def unpin(self, request_id: str) -> None:
        """Let a prefix go: its blocks stay in the prefix cache like any others.

        Raises:
            ValueError: it is not pinned, or not any more.
        """
        with InterruptsWait():
            self.scheduler.unpin(request_id)

    def reset_prefix_cache(self) -> bool:
        """Forget the KV of earlier prompts, in both pools.

        Returns:
            False, without effect, while a request is unfinished or a prefix is pinned.
        """
        if self.scheduler.has_unfinished or len(self.scheduler.pins):
            return False
        with InterruptsWait():
            self._drop_in_flight()
            self.scheduler.forget_pool()
            self.runner.forget_pool()
        return True

    # Steps --------------------------------------------------------------------------------------------------------

    def step(self) -> StepOutput:
        """Finish one step and take its output. The next step is then in flight, if it could be planned.

        A step that fails or is interrupted costs the running requests a recomputation, but no token.
        """
        self.failed_step = ()
        num_tokens = num_steps = 0
        with InterruptsWait() as interrupts:
            if self.outputs.unread:  # an error left them
                self.outputs.read()
            self._changes.note()
            if self.scheduler.has_unfinished:
                try:
                    if not self._in_flight:
                        plan = self.scheduler.schedule()
                        with interrupts.let_through():
                            self._in_flight.append(self.runner.enqueue(plan))
                    ahead = self.scheduler.schedule_ahead()
                    with interrupts.let_through():
                        if ahead is not None:
                            self._in_flight.append(self.runner.enqueue(ahead))
                        result = self.runner.fetch(self._in_flight[0])
                    step = self._in_flight.pop(0)
                    num_steps = step.plan.num_steps
                    num_tokens = step.plan.num_tokens * num_steps
                    touched = self.scheduler.update(step.plan, result)
                except BaseException:
                    self.failed_step = tuple([group.request.request_id for group in self.scheduler.line.running])
                    self._in_flight.clear()
                    self.outputs.note_all()
                    self.scheduler.forget_pool()
                    self.runner.forget_pool()
                    raise
                if self.runner.host_pool is not None:
                    self._learn(self.runner.take_observations())
                self.outputs.note(touched)
            if self.outputs.unread:
                self.outputs.read()
            if self._in_flight and not self.scheduler.has_unfinished:
                self._drop_in_flight()
        return dataclasses.replace(self.outputs.take(), num_tokens=num_tokens, num_steps=num_steps)

    def take(self) -> StepOutput:
        """The output that no step has returned yet: that of aborts."""
        return self.outputs.take()

    def stats(self) -> EngineStats:
        """The state of both pools, and counters since the start."""
        scheduler = self.scheduler
        return read_stats(
            scheduler.block_stats(),
            scheduler.stats(),
            self.num_output_tokens,
            self.runner.host_pool,
            scheduler.profile,
            self.runner.programs,
        )

    def close(self) -> None:
        """Compile nothing more in the background, and let the processes that follow go on."""
        self.runner.programs.background.stop()
        if isinstance(self.runner, LeadingRunner):
            self.runner.close()

    def _learn(self, observations: Observations) -> None:
        """Keep the scheduler's profile current, and keep it for later runs from time to time."""
        if self.scheduler.profile is None or not any(observations):
            return
        self.scheduler.profile = learn(self.scheduler.profile, observations)
        self._num_learnt += 1
        if self._num_learnt >= LEAST_LEARNT and self._num_learnt.bit_count() == 1:
            keep_profile(self.runner, self.scheduler.profile)

    def _drop_in_flight(self) -> None:
        """Drop the steps in flight, whose sequences have all ended."""
        for _ in self._in_flight:
            self.scheduler.drop()
        self._in_flight.clear()


def _max_step_s(inter_token_ms: float | None, profile: MachineProfile | None) -> float:
    """The most seconds of a step with decodes. A bound that no step can keep is logged."""
    if inter_token_ms is None:
        return math.inf
    if profile is not None and inter_token_ms < (least_ms := 1e3 * profile.prefill_fixed_s):
        log.warning(
            "max_inter_token_ms=%g is less than the %.3g ms that a step of one token takes here: prompts beside "
            "decodes are computed in the smallest chunks",
            inter_token_ms,
            least_ms,
        )
    return inter_token_ms / 1e3


def _with_limits_of(most: EngineConfig, config: EngineConfig) -> EngineConfig:
    """Fill in the limits of a step that a config leaves open, from those of a runner."""
    rows = config.max_num_seqs or most.max_num_seqs
    tokens = config.max_num_batched_tokens or most.max_num_batched_tokens
    if rows is not None and tokens is not None and rows > tokens:
        rows, tokens = (tokens, tokens) if config.max_num_seqs is None else (rows, rows)
    return dataclasses.replace(config, max_num_seqs=rows, max_num_batched_tokens=tokens)


def _placement(runner: ModelRunner, config: EngineConfig) -> Placement:
    """The placement of an engine with its own settings, over the window of its runner."""
    if config.kv_placement != "device" and runner.max_streamed_blocks == 0:
        raise ValueError(
            f"kv_placement={config.kv_placement!r}: the runner streams no blocks from the host; build it with this "
            "kv_placement and a host pool"
        )
    if config.kv_placement == "device":
        return KV_ON_DEVICE
    layer_bytes, max_blocks = runner.host_bytes_per_block // runner.model_config.num_layers, runner.programs.max_blocks
    return Placement(
        config.kv_placement,
        runner.num_window_blocks,
        runner.max_streamed_blocks,
        num_together=blocks_moved_together(layer_bytes, max_blocks),
        keeps_activations=runner.programs.keeps_activations,
    )


def _num_host_blocks(runner: ModelRunner, config: EngineConfig) -> int:
    """Blocks of the runner's host pool that an engine uses under its own settings."""
    num_blocks = runner.num_host_blocks
    if config.num_host_blocks is not None:
        num_blocks = min(config.num_host_blocks, num_blocks)
    if config.host_memory_bytes is not None:
        num_blocks = min(config.host_memory_bytes // runner.host_bytes_per_block, num_blocks)
    if config.preemption == "swap" and num_blocks == 0:
        raise ValueError("preemption='swap' needs a host pool, and the runner has none: build it with one")
    return num_blocks
