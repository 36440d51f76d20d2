"""Executes step plans: weights, KV cache and the compiled programs that join them."""

import dataclasses
import logging
import time
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from jpaged.config import EngineConfig
from jpaged.contract.plan import Chunks, StepPlan
from jpaged.contract.profile import MachineProfile, Observations
from jpaged.contract.result import StepResult, TokenScores
from jpaged.device.kv.dma import DmaSlots
from jpaged.device.kv.host_memory import memory_for
from jpaged.device.kv.host_pool import HostPool, agreed_pool, num_host_blocks_for
from jpaged.device.kv.layout import is_narrowed, why_no_activations, why_not_narrowed
from jpaged.device.kv.limits import with_limits
from jpaged.device.kv.narrow_slots import for_narrow_blocks
from jpaged.device.kv.sizing import PoolSizer, check_streamed_context, check_way_to_stream
from jpaged.device.profiler import make_profile
from jpaged.device.sampling.adjustments import Adjustments
from jpaged.device.sampling.beams import split_candidates
from jpaged.device.sampling.draw import SampledTokens
from jpaged.device.sampling.scores import NO_SCORES, Scores, first_rows, join_scores
from jpaged.device.step.in_flight import Results, StepInFlight, StepTimes
from jpaged.device.step.inputs import Bucket
from jpaged.device.step.pack import SCORE_ROWS, PackedSamples, PackedScores, PackedStep, Packer
from jpaged.device.step.programs import Programs, dtype_of, new_adjustments, split_model
from jpaged.device.target import BACKENDS, choose_backend, placement_note, why_no_streaming
from jpaged.device.weights import device_bytes, prepare_weights
from jpaged.models import ModelConfig
from jpaged.sharding import check_axes, replicated
from pallas_kernels.paged_attention import INTERPRETERS, why_cannot_run

log = logging.getLogger(__name__)


class Agreeing(Protocol):
    """Processes that agree on what they have."""

    def least(self, number: int) -> int: ...
    def gather(self, message: Any) -> list[Any]: ...


def check_settings(model_config: ModelConfig, config: EngineConfig) -> int:
    """Check what the settings ask of a model, before anything is loaded.

    Returns:
        The context wanted, in tokens: ``max_model_len``, or all that the model supports.

    Raises:
        ValueError: a context beyond the model's, or an attention implementation that is not there or cannot serve.
    """
    servable = sorted(BACKENDS)
    if config.attention_implementation not in (None, *servable):
        raise ValueError(
            f"attention_implementation={config.attention_implementation!r} cannot be had: "
            f"expected None or one of {servable}"
        )
    name = config.attention_implementation
    if config.interpret and name not in INTERPRETERS:
        raise ValueError(
            f"interpret=True with {'no attention_implementation' if name is None else f'{name!r}'}: only "
            f"{sorted(INTERPRETERS)} can be interpreted; name one as attention_implementation, or drop interpret=True"
        )
    if config.interpret and jax.process_count() > 1:
        raise ValueError(f"interpret=True: the interpreter runs in one process, and there are {jax.process_count()}")
    if is_narrowed(config) and (reason := why_not_narrowed(config)) is not None:
        raise ValueError(f"offload_dtype={config.offload_dtype!r} cannot be had: {reason}; use offload_dtype='auto'")
    if config.kv_placement != "device" and (reason := why_no_streaming(config)) is not None:
        raise ValueError(f"kv_placement={config.kv_placement!r} cannot be had: {reason}; use kv_placement='device'")
    if config.offload_cache == "activations" and (reason := why_no_activations(model_config, config)) is not None:
        raise ValueError(f"offload_cache='activations' cannot be had: {reason}; use 'kv' or 'auto'")
    reason = None if name is None or config.interpret else why_cannot_run(name)
    if reason is not None:
        raise ValueError(
            f"attention_implementation={name!r} cannot run here: {reason}; leave it out, or add interpret=True, "
            "which is slow"
        )
    limit, wanted = model_config.max_model_len, config.max_model_len
    if wanted is not None and wanted > limit:
        raise ValueError(f"max_model_len={wanted} is more than the model's own limit of {limit} tokens: lower it")
    return wanted or limit


class ModelRunner:
    """The device half: ``enqueue`` starts what a StepPlan says, ``fetch`` waits for the StepResult.

    Programs are compiled ahead of time per bucket, by ``warm_up`` or when first needed. They are called with the cache
    and the ``StepState`` donated, so that a step writes in place.

    Args:
        model: a flax.nnx model (``jpaged.models``), its weights on the devices of ``mesh``; changed by
            ``prepare_weights``.
        model_config: its configuration.
        config: the engine's settings.
        mesh: the devices.
        channel: to the other processes that have some of them; they have to agree on sizes.
        warm_up: whether to call ``warm_up``, which costs least then; None is for a few sizes of steps alone.
        use_tqdm: show how far it is.

    Raises:
        ValueError: the pool does not fit, or ``max_model_len`` exceeds what the model or the pool allows.
    """

    def __init__(
        self,
        model: nnx.Module,
        model_config: ModelConfig,
        config: EngineConfig,
        mesh: jax.sharding.Mesh,
        *,
        channel: Agreeing | None = None,
        warm_up: bool | None = False,
        use_tqdm: bool = True,
    ):
        self.model_config = model_config
        self.mesh = mesh
        check_axes(replicated(mesh))
        max_model_len = check_settings(model_config, dataclasses.replace(config, tensor_parallel_size=mesh.size))
        backend = choose_backend(model_config, config, dtype_of(model), mesh)
        prepare_weights(model, model_config, config, mesh, backend)
        least: Callable[[int], int] = channel.least if channel is not None else lambda number: number
        config = self.config = with_limits(model_config, config, dtype_of(model), mesh, backend, least=least)
        self.programs = Programs(model, model_config, config, mesh, backend, max_model_len=max_model_len)
        self.max_inter_token_ms = config.max_inter_token_ms or self.programs.target.max_inter_token_ms
        self.groups = self.programs.groups
        """The layer groups, each with block tables of its own."""
        if (note := placement_note(config, self.programs.target)) is not None:
            log.warning(note)
        _, self._weights, _ = split_model(model)
        self.weight_bytes = sum(x.nbytes for x in self._weights)
        sizer = PoolSizer(self.programs, config, mesh, weight_bytes=device_bytes(self._weights), least=least)
        guessed_bytes = sizer.guess()
        num_host_blocks = num_host_blocks_for(
            config,
            self.programs.target,
            self.host_bytes_per_block,
            useful_blocks=config.most_rows * self.programs.most_blocks,
        )
        self.num_host_blocks = least(num_host_blocks)
        if config.kv_placement != "device":
            target = self.programs.target
            check_way_to_stream(model_config, config, self.dtype, target, backend, self.num_host_blocks)
            sizes, programs = (self.num_blocks, self.num_host_blocks), self.programs
            check_streamed_context(model_config, config, *sizes, programs.share_on_host, programs.layers_at_once)
            self.programs.open_window(self.num_host_blocks)
        self.host_pool = _make_host_pool(self.programs, self.num_host_blocks)
        self.profile: MachineProfile | None = None
        self._times = StepTimes(self.buckets[-1].num_tokens)
        if warm_up is not False:
            self.warm_up(few=warm_up is None, use_tqdm=use_tqdm)
        if guessed_bytes is not None and sizer.correct(guessed_bytes) and warm_up is not False:
            self.warm_up(few=warm_up is None, use_tqdm=use_tqdm)
        self.host_pool = _awaited(self.host_pool, self.programs, channel)  # it was made while the programs were
        self.num_host_blocks = 0 if self.host_pool is None else self.num_host_blocks
        self.cache = self.programs.new_cache()
        self._state = self.programs.new_state()
        self._adjustments: Adjustments | None = None  # made when a row first needs any
        sizes = len(self._state.latest), self.max_blocks, model_config.vocab_size
        self._packer = Packer(
            self.buckets, *sizes, streams_always=self.programs.streams_always, num_groups=len(self.groups)
        )

    # Sizes --------------------------------------------------------------------------------------------------------

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype of weights and activations."""
        return self.programs.dtype

    @property
    def num_blocks(self) -> int:
        """Blocks in the pool, block 0 included."""
        return self.programs.num_blocks

    @property
    def bytes_per_block(self) -> int:
        """Bytes of one block over all devices."""
        return self.programs.bytes_per_block

    @property
    def host_bytes_per_block(self) -> int:
        """Bytes of one block in this host's memory: of the parts of this process's devices."""
        return self.programs.host_bytes_per_block * len(self.mesh.local_devices) // self.mesh.size

    @property
    def num_window_blocks(self) -> int:
        """Blocks of the pool, from block 1 on, through which blocks on the host are streamed."""
        return self.programs.stream.window.num_blocks if self.programs.stream else 0

    @property
    def max_streamed_blocks(self) -> int:
        """Blocks on the host that the rows of one step may attend to."""
        return self.programs.max_streamed_blocks

    @property
    def max_model_len(self) -> int:
        """Tokens of prompt and output that one sequence may reach."""
        return self.programs.max_model_len

    @property
    def max_blocks(self) -> int:
        """Width of a block table."""
        return self.programs.max_blocks

    @property
    def max_burst(self) -> int:
        """Steps that a plan may have."""
        return self.programs.max_burst

    @property
    def buckets(self) -> list[Bucket]:
        """Sizes of steps, smallest first."""
        return self.programs.buckets

    def warm_up(self, *, few: bool = False, use_tqdm: bool = True) -> None:
        """Compile the programs that plain requests need, of all sizes of steps or of a few (``Programs.warm_up``)."""
        self.programs.warm_up(with_host_pool=self.num_host_blocks > 0, few=few, use_tqdm=use_tqdm)

    # A step -------------------------------------------------------------------------------------------------------

    def execute(self, plan: StepPlan) -> StepResult:
        """Run one step and wait for its results."""
        return self.fetch(self.enqueue(plan))

    def enqueue(self, plan: StepPlan) -> StepInFlight:
        """Start one step: moves to the host, copies, the forward pass, sampling, moves from the host.

        The call waits for no step. It waits for copies between the pools when too many are in flight. It compiles
        programs that are needed for the first time. Steps run in the order of these calls.
        """
        timing = self._times.start(len(self.programs), is_settled=self.programs.background.is_over)
        results = self.start(self._packer.pack(plan, self.programs.usable_buckets()))
        for array in jax.tree.leaves((results.drawn, results.sampled, results.candidates)):
            array.copy_to_host_async()
        return StepInFlight(plan, results, timing)

    def start(self, step: PackedStep) -> Results:
        """Start a packed step."""
        if step.to_host or step.from_host:
            assert self.host_pool is not None
            self.cache = self.host_pool.start(self.cache, step.to_host, step.from_host)
        for src, dst in step.copies:
            self.cache = self.programs.get(("copy", len(src)))(self.cache, src, dst)
        results = self._compute(step) if step.bucket is not None else Results()
        if step.from_host and self.host_pool is not None:
            self.cache = self.host_pool.finish(self.cache)
        return results

    def fetch(self, step: StepInFlight) -> StepResult:
        """Wait for the results of a step. Its moves between the pools may still be in flight."""
        plan, num_draws = step.plan, len(step.plan.draws.rows)
        drawn, sampled, candidates, prompt_scores = jax.device_get(step.results)
        if self.host_pool is not None:
            self.host_pool.poll()
            self._times.learn(plan, step.timing, len(self.programs))
        if drawn is not None:
            token_ids, logprobs = drawn[:, : plan.num_steps, :num_draws]
            scores = [TokenScores.plain(of_step) for of_step in logprobs.view(np.float32)]
            draws = list(zip(token_ids, scores, strict=True))
        else:
            draws = [(tokens.token_ids[:num_draws], first_rows(tokens.scores, num_draws)) for tokens in sampled]
        scored = zip(prompt_scores, plan.prompt_scores, strict=True)
        token_ids, scores = draws[0] if draws else (np.zeros(0, np.int32), NO_SCORES)
        return StepResult(
            token_ids=token_ids,
            scores=scores,
            prompt_scores=tuple([_cut_scores(parts, len(piece.target_ids)) for parts, piece in scored]),
            beams=split_candidates(candidates, plan.beams) if candidates else (),
            later=tuple(draws[1:]),
        )

    def _compute(self, step: PackedStep) -> Results:
        """Enqueue the forward passes, and the programs that read their logits."""
        assert step.bucket is not None
        assert step.inputs is not None
        for changes in step.changes:
            self._state = self.programs.get(("enter",))(self._state, changes)
        for changes in step.adjustments:
            self._adjustments = self.programs.get(("adjust",))(
                self._adjustments or new_adjustments(self.programs), changes
            )
        self._state = self.programs.get(("load", step.bucket))(self._state, step.inputs)
        if step.streamed is not None:
            assert self.host_pool is not None
            assert self.programs.stream is not None
            self.host_pool.stream(self.programs.stream, step.streamed)
        drawn, sampled, candidates = None, (), None
        if step.samples is not None:
            hidden, sampled = self._run_and_sample(step, step.samples)
        else:
            hidden = self._run(step)
        if step.draws:
            drawn = self.programs.get(("read",))(self._state.drawn)
        if (beams := step.beams) is not None:
            key = ("beam", step.bucket.num_rows, beams.num_candidates, beams.num_biases)
            candidates = self.programs.get(key)(self._weights, self._state.sample_hidden, beams.inputs)
        scores = tuple([self._score(piece, hidden) for piece in step.scores])
        return Results(drawn, sampled, candidates, scores)

    def _run_and_sample(
        self, step: PackedStep, samples: PackedSamples
    ) -> tuple[Float[Array, "tokens hidden_size"], tuple[SampledTokens, ...]]:
        """Enqueue the forward passes of a plan, each followed by draws. Returns the last pass's hidden states too."""
        draw = self.programs.get(("sample", samples.inputs.shape[1], samples.num_top, samples.is_adjusted))
        adjustments = self._adjustments if samples.is_adjusted else None
        hidden, sampled = self._state.hidden, []
        for number in range(step.num_steps):
            hidden, state = self._run(step), self._state
            args = state.latest, state.columns, state.sample_hidden, samples.inputs, np.int32(number)
            tokens, latest, adjustments = draw(self._weights, *args, adjustments)
            self._state = dataclasses.replace(state, latest=latest)
            self._adjustments = adjustments or self._adjustments
            sampled.append(tokens)
        return hidden, tuple(sampled)

    def _score(self, piece: PackedScores, hidden: Float[Array, "tokens hidden_size"]) -> list[Scores]:
        """Scores of a piece of a prompt, ``SCORE_ROWS`` at a time, the last ones padded."""
        program = self.programs.get(("score", hidden.shape[0], piece.num_top))
        parts = zip(piece.rows, piece.targets, strict=True)
        return [program(self._weights, hidden, rows, targets) for rows, targets in parts]

    def _run(self, step: PackedStep) -> Float[Array, "tokens hidden_size"]:
        """Enqueue the program of a step over the loaded inputs. Returns hidden states, valid until the next pass."""
        has_shared = step.has_shared and self.programs.background.has(("shared", step.bucket))
        key, streamed = ("shared" if has_shared else "forward", step.bucket), ()
        if step.streamed is not None:
            assert self.programs.stream is not None
            key, streamed = ("stream", step.bucket), self.programs.stream.take_inputs()
        self.cache, self._state, *hidden = self.programs.get(key)(self._weights, self.cache, self._state, *streamed)
        return hidden[0] if hidden else self._state.hidden

    def forget_pool(self) -> None:
        """Start again with empty pools and an empty table: a failed step lost their content."""
        if self.host_pool is not None:
            self.host_pool.forget()
        if self.programs.stream is not None:
            self.programs.stream.forget()
        self._renew()

    def _renew(self) -> None:
        """Replace the pool and the table, whose arrays a failed program may have taken with it."""
        if not self.cache.pool.is_deleted():
            self.cache.pool.delete()
        self.cache = self.programs.new_cache()
        self._state = self.programs.new_state()
        self._adjustments = None

    def take_observations(self) -> Observations:
        """The times observed since the last call."""
        assert self.host_pool is not None
        return Observations(self.host_pool.take_transfers(), self._times.take_prefills())

    def measure_profile(self) -> None:
        """Make ``profile`` before the first step: one that an earlier run kept, or else by measuring."""
        if any(array.is_deleted() for array in jax.tree.leaves((self.cache, self._state))):
            self._renew()  # an earlier call was interrupted
        self.profile = make_profile(self)

    def time_prefill(self, num_chunks: int, length: int) -> float:
        """Seconds of a step that writes chunks of this length to block 0.

        The third run counts: the first one loads the program, the second one makes its graphs.
        """
        rows, lens = np.full(num_chunks, self._packer.padding_row, np.int32), np.full(num_chunks, length, np.int32)
        token_ids = np.zeros(num_chunks * length, np.int32)
        plan = StepPlan(chunks=Chunks(rows, rows.astype(np.int64), np.zeros_like(lens), lens, token_ids))
        packed = self._packer.pack(plan, self.programs.usable_buckets())
        seconds = 0.0
        for _ in range(3):
            started = time.perf_counter()
            self._compute(packed)
            jax.block_until_ready(self.cache.pool)
            seconds = time.perf_counter() - started
        return seconds


def _make_host_pool(programs: Programs, num_host_blocks: int) -> HostPool | None:
    if not num_host_blocks:
        return None
    memory = memory_for(programs.target, is_streamed=programs.stream is not None)
    if programs.streams_by_dma:
        memory = DmaSlots
    elif is_narrowed(programs.config):
        memory = for_narrow_blocks(memory)
    # A step that waits for a large pool does not hang.
    return HostPool(programs.host_slots(num_host_blocks), memory, programs.get, lambda: programs.compiling.run())


def _awaited(pool: HostPool | None, programs: Programs, channel: Agreeing | None) -> HostPool | None:
    """The host pool, there where a step may need it at once or other processes depend on it; None if it cannot be."""
    if channel is not None:
        return agreed_pool(pool, channel.gather)
    if pool is not None and programs.stream is not None:
        pool.wait()
    return pool


def _cut_scores(parts: list[Scores], num_rows: int) -> TokenScores:
    """The scores of a piece, fetched, without padding."""
    starts = range(0, num_rows, SCORE_ROWS)
    return join_scores(
        [first_rows(part, min(SCORE_ROWS, num_rows - start)) for part, start in zip(parts, starts, strict=True)]
    )
