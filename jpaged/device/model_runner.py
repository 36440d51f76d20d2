"""Executes step plans: weights, KV cache and the compiled programs that join them."""

import dataclasses
import gc
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int
from tqdm import tqdm

from jpaged.config import EngineConfig
from jpaged.device.beams import (
    BeamInputs,
    Candidates,
    beam_candidates,
    empty_beam_inputs,
    make_beam_inputs,
    num_candidates_of,
    pack_beam_inputs,
    split_candidates,
    unpack_beam_inputs,
)
from jpaged.device.kv_cache import (
    KVCache,
    PagedAttend,
    available_bytes,
    block_bytes,
    check_blocks_fit,
    choose_attention,
    num_blocks_that_fit,
)
from jpaged.device.sampler import (
    NO_SCORES,
    SampledTokens,
    SamplePacker,
    SampleSizes,
    Scores,
    first_rows,
    join_scores,
    num_top_of,
    sample,
    score,
    unpack_samples,
)
from jpaged.device.sharding import TENSOR_AXIS, pool_sharding, replicated
from jpaged.device.step_inputs import Bucket, StepPacker, all_buckets, bucket_for, pack_next, packed_size, unpack
from jpaged.device.transfer import (
    MAX_STAGED_BLOCKS,
    MOVE_SIZES,
    HostPool,
    block_sharding,
    has_host_pool,
    num_host_blocks_for,
)
from jpaged.host.step_plan import BlockCopy, Chunk, Costs, PromptScore, StepPlan, StepResult, TokenScores
from jpaged.models import ModelConfig, fuse_projections
from jpaged.request import MAX_LOGPROBS
from pallas_kernels.paged_attention import IMPLEMENTATIONS

GPU_COMPILER_OPTIONS = {
    "xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION,CONDITIONAL,WHILE",
    "xla_disable_hlo_passes": "rematerialization",
}
"""Loops run inside CUDA graphs: otherwise every turn of one waits for the host to read whether there is another.

Nothing is computed again to save memory: XLA counts the pool, which every layer writes in place, once for each layer,
and finds that memory is short.
"""

ACCELERATOR_BURST = 4
"""Steps of a burst where nobody says: planning a step takes about as long as a small one runs."""

SCORE_ROWS = 64
"""Prompt tokens scored per call, so that prompt_logprobs never holds [prompt, vocab] logits."""


class ForwardResult(NamedTuple):
    """What a forward pass brings.

    Args:
        cache: with the K/V of all tokens.
        hidden: of all tokens.
        sample_hidden: of those whose logits are read, filled up: how many those are is for who reads them.
        packed: the inputs of the next step of a burst; None where there are none.
    """

    cache: KVCache
    hidden: Float[Array, "tokens hidden_size"]
    sample_hidden: Float[Array, "max_num_seqs hidden_size"]
    packed: Int[Array, " size"] | None


class StepUnderWay(NamedTuple):
    """A plan that was enqueued, and what it will bring; None where the plan asks for nothing of the kind.

    Args:
        number: counts steps.
        started_s: when, by ``time.perf_counter``.
        num_programs: compiled by then.
        was_idle: whether nothing was under way then.
        sampled: by each step of a burst, or by the one step there is.
    """

    plan: StepPlan
    number: int
    started_s: float
    num_programs: int
    was_idle: bool
    sampled: tuple[SampledTokens, ...] = ()
    candidates: Candidates | None = None
    prompt_scores: tuple[list[Scores], ...] = ()


def num_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_settings(model_config: ModelConfig, config: EngineConfig) -> int:
    """Check what the settings ask of a model, before anything is loaded.

    Returns:
        The context wanted, in tokens: ``max_model_len``, or all that the model supports.

    Raises:
        ValueError: a context beyond the model's, or an attention implementation that is not there or cannot serve.
    """
    servable = sorted(set(IMPLEMENTATIONS) - {"reference"})  # the reference does not trace
    if config.attention_implementation not in (None, *servable):
        raise ValueError(
            f"attention_implementation={config.attention_implementation!r} cannot be had: "
            f"expected None or one of {servable}"
        )
    if config.attention_implementation == "hopper" and config.tensor_parallel_size > 1:
        raise ValueError(
            f"attention_implementation='hopper' runs on one device, not on tensor_parallel_size="
            f"{config.tensor_parallel_size}: leave it out, or ask for 'xla'"
        )
    limit, wanted = model_config.max_model_len, config.max_model_len
    if wanted is not None and wanted > limit:
        raise ValueError(f"max_model_len={wanted} is more than the model's own limit of {limit} tokens: lower it")
    return wanted or limit


class ModelRunner:
    """The device half: ``enqueue`` starts what a StepPlan says, ``fetch`` waits for the StepResult.

    Programs are compiled ahead of time per bucket, by ``warm_up`` or when first needed, and called with the cache
    donated, so that a step writes its K/V in place.

    Args:
        model: a flax.nnx model (``jpaged.models``), its weights on the devices of ``mesh``; changed: its projections
            are joined (``fuse_projections``).
        model_config: its configuration.
        config: the engine's settings.
        mesh: the devices.

    Raises:
        ValueError: the pool does not fit, or ``max_model_len`` exceeds what the model or the pool allows.
    """

    def __init__(self, model: nnx.Module, model_config: ModelConfig, config: EngineConfig, mesh: jax.sharding.Mesh):
        self.model_config = model_config
        self.config = config
        self.mesh = mesh
        fuse_projections(model)
        self._graphdef, state = nnx.split(model)
        # A flat list: flattening an nnx state in every call costs more than a small step.
        self._weights, self._weights_tree = jax.tree.flatten(state)
        self.dtype = jnp.dtype(next(x.dtype for x in self._weights if jnp.issubdtype(x.dtype, jnp.floating)))
        self.weight_bytes = sum(x.nbytes for x in self._weights)
        self.max_model_len = check_settings(model_config, config)
        self.attention = choose_attention(model_config, config, self.dtype, mesh.size)
        block = {
            "num_layers": model_config.num_layers,
            "num_kv_heads": model_config.num_kv_heads,
            "head_dim": model_config.head_dim,
            "block_size": config.block_size,
            "dtype": self.dtype,
        }
        self.bytes_per_block = block_bytes(**block)
        self._new_cache = partial(KVCache.allocate, **block)
        self.buckets = all_buckets(config.max_num_seqs, config.token_budget)
        self._compiled: dict[tuple, jax.stages.Compiled] = {}  # warm-up's threads each write keys of their own
        self.num_blocks = self._check_num_blocks()
        self._fit_model_len()
        self.num_host_blocks = num_host_blocks_for(
            config, self.bytes_per_block, is_on_cpu=self._is_on_cpu, useful_blocks=config.max_num_seqs * self.max_blocks
        )
        self.cache = self._allocate_cache()
        self.host_pool = (
            HostPool(self.num_host_blocks, self._abstract_block(), self._program) if self.num_host_blocks else None
        )
        self._latest = self._no_tokens()
        self._numbers = jax.device_put([np.int32(i) for i in range(self.max_burst)], replicated(mesh))
        self._step_packer = StepPacker(self.max_blocks, config.block_size)
        self._sample_packer = SamplePacker()
        self._num_enqueued = 0  # steps
        self._newest_waited_for = 0  # the number of a step: it has run

    # Sizes --------------------------------------------------------------------------------------------------------

    def _check_num_blocks(self) -> int:
        """The blocks asked for, or as many as fit."""
        devices, wanted = list(self.mesh.devices.flat), self.config.num_blocks
        if wanted is not None:
            check_blocks_fit(wanted, self.bytes_per_block, devices)
            return wanted
        num_blocks = num_blocks_that_fit(
            self.bytes_per_block,
            devices,
            self.config.memory_fraction,
            reserved_bytes=0 if self._is_on_cpu else self._workspace_bytes() * len(devices),
            least_blocks=self.max_blocks + 1,
            useful_blocks=self.config.max_num_seqs * self.max_blocks + 1,
        )
        if num_blocks < 2:
            remedy = "give num_blocks" if self._is_on_cpu else "raise memory_fraction, or lower max_num_batched_tokens"
            raise ValueError(
                f"no memory for a KV cache: one block takes {self.bytes_per_block:,} bytes, and memory_fraction="
                f"{self.config.memory_fraction} leaves less than two after {self.weight_bytes:,} bytes of weights and "
                f"a step's workspace: {remedy}"
            )
        return num_blocks

    def _fit_model_len(self) -> None:
        """A context that nobody asked for shrinks to the pool; one that does not fit the memory is refused."""
        held = (self.num_blocks - 1) * self.config.block_size
        if held >= self.max_model_len:
            return
        if self.config.max_model_len is None:
            self.max_model_len = held
        elif self.config.num_blocks is None:
            raise ValueError(
                f"max_model_len={self.max_model_len} does not fit: memory for {self.num_blocks} blocks of "
                f"{self.config.block_size} holds {held} tokens; lower max_model_len, raise memory_fraction or give "
                "num_blocks"
            )

    @property
    def _is_on_cpu(self) -> bool:
        return self.mesh.devices.flat[0].platform == "cpu"

    @property
    def max_burst(self) -> int:
        """Steps that a plan may have."""
        return self.config.max_burst or (1 if self._is_on_cpu else ACCELERATOR_BURST)

    @property
    def max_blocks(self) -> int:
        """Width of a block table."""
        return -(-self.max_model_len // self.config.block_size)

    def _workspace_bytes(self) -> int:
        """Temporaries and results of the largest step on one device, from the compiler, without running it.

        Compiled for about the pool that will be: what a kernel takes in one go may depend on it.
        """
        devices = list(self.mesh.devices.flat)
        pool_blocks = max(2, available_bytes(devices, self.config.memory_fraction) // self.bytes_per_block)
        largest = max(self._copy_sizes)
        keys: list[tuple] = [("forward", self.buckets[-1]), ("sample", SampleSizes(self.config.max_num_seqs), None)]
        keys.append(("copy", largest))
        staged_bytes = 0
        if has_host_pool(self.config, is_on_cpu=self._is_on_cpu):
            keys += ("gather", MOVE_SIZES[-1]), ("scatter", MOVE_SIZES[-1])
            staged_bytes = 2 * MAX_STAGED_BLOCKS * self.bytes_per_block // len(devices)
        with ThreadPoolExecutor() as threads:
            programs = list(threads.map(partial(self._compile, pool_blocks=pool_blocks), keys))
        total = staged_bytes
        for program in programs:
            analysis = program.memory_analysis()
            assert analysis is not None
            total += analysis.temp_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes
        return total

    def _allocate_cache(self) -> KVCache:
        return self._new_cache(num_blocks=self.num_blocks, sharding=pool_sharding(self.mesh))

    # Programs -----------------------------------------------------------------------------------------------------

    def warm_up(self, *, use_tqdm: bool = True) -> None:
        """Compile every bucket's step, its plain sampler and all that moves blocks, in parallel.

        Log-probabilities of alternatives, penalties, logit biases and beams compile when first asked for.
        """
        keys: list[tuple] = [("forward", bucket) for bucket in reversed(self.buckets)]
        keys += [("sample", SampleSizes(rows), None) for rows in {bucket.num_rows for bucket in self.buckets}]
        keys += [("copy", size) for size in self._copy_sizes]
        if self.host_pool is not None:
            keys += [(kind, size) for kind in ("gather", "scatter") for size in MOVE_SIZES]
        threads = ThreadPoolExecutor(max_workers=num_cores())
        try:
            jobs = [threads.submit(self._program, key) for key in keys]
            done = as_completed(jobs)
            for job in tqdm(done, total=len(jobs), desc="Compiling", unit="program", disable=not use_tqdm):
                job.result()
        finally:  # an interruption need not wait for programs that nobody started on
            threads.shutdown(cancel_futures=True)
        # Tracing leaves a million objects that stay. Python's garbage collector would visit them between two steps.
        gc.collect()
        gc.freeze()

    @property
    def num_programs(self) -> int:
        return len(self._compiled)

    def program(self, bucket: Bucket) -> jax.stages.Compiled:
        """The compiled forward step of one bucket, to inspect (its memory analysis, its HLO)."""
        return self._program(("forward", bucket))

    def _program(self, key: tuple) -> jax.stages.Compiled:
        """The program of ``key``: a kind and its static sizes. Compiled on first use."""
        if key not in self._compiled:
            self._compiled[key] = self._compile(key, self.num_blocks)
        return self._compiled[key]

    def _compile(self, key: tuple, pool_blocks: int) -> jax.stages.Compiled:
        precision = "highest" if self.dtype == jnp.float32 else None
        with jax.default_matmul_precision(precision), jax.set_mesh(self.mesh):
            is_gpu = self.mesh.devices.flat[0].platform == "gpu"
            return self._lower(key, pool_blocks).compile(compiler_options=GPU_COMPILER_OPTIONS if is_gpu else None)

    def _lower(self, key: tuple, pool_blocks: int) -> jax.stages.Lowered:
        kind, *sizes = key
        weights = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), self._weights)
        cache = self._abstract_cache(pool_blocks)
        match kind:
            case "forward":
                (bucket,) = sizes
                packed = self._abstract((packed_size(bucket, self.max_blocks),), jnp.int32)
                latest = self._abstract((self.config.max_num_seqs,), jnp.int32)
                return self._jit(self._forward, bucket, donate=1).lower(weights, cache, latest, packed)
            case "sample":
                sample_sizes, num_top = sizes
                hidden = self._abstract((self.config.max_num_seqs, self.model_config.hidden_size), self.dtype)
                packed = self._abstract((sample_sizes.packed_size,), jnp.int32)
                num_before = self._abstract((), jnp.int32)
                return self._jit(self._sample, sample_sizes, num_top).lower(weights, hidden, packed, num_before)
            case "score":
                num_tokens, num_top = sizes
                hidden = self._abstract((num_tokens, self.model_config.hidden_size), self.dtype)
                rows = self._abstract((SCORE_ROWS,), jnp.int32)
                return self._jit(self._score, num_top).lower(weights, hidden, rows, rows)
            case "beam":
                rows, num_candidates, num_biases = sizes
                hidden = self._abstract((self.config.max_num_seqs, self.model_config.hidden_size), self.dtype)
                empty = empty_beam_inputs(rows, num_candidates, num_biases)
                packed = self._abstract(pack_beam_inputs(empty).shape, jnp.int32)
                return self._jit(self._beam, num_candidates, empty).lower(weights, hidden, packed)
            case "copy":
                blocks = self._abstract((sizes[0],), jnp.int32)
                return jax.jit(KVCache.copy, donate_argnums=0).lower(cache, blocks, blocks)
            case "gather":
                blocks = self._abstract((sizes[0],), jnp.int32)
                return jax.jit(KVCache.gather, out_shardings=block_sharding(self.mesh)).lower(cache, blocks)
            case "scatter":
                blocks, data = self._abstract((sizes[0],), jnp.int32), [self._abstract_block()] * sizes[0]
                return jax.jit(KVCache.scatter, donate_argnums=0).lower(cache, blocks, data)
            case _:
                raise AssertionError(key)

    def _jit(self, method: Callable, *static: object, donate: int | None = None):
        return jax.jit(partial(method, *static), donate_argnums=() if donate is None else donate)

    def _abstract(self, shape: tuple[int, ...], dtype: jax.typing.DTypeLike) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=replicated(self.mesh))

    def _abstract_cache(self, num_blocks: int) -> KVCache:
        cache = jax.eval_shape(partial(self._new_cache, num_blocks=num_blocks))
        sharding = pool_sharding(self.mesh)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), cache)

    def _abstract_block(self) -> jax.ShapeDtypeStruct:
        pool = self._abstract_cache(1).pool
        return jax.ShapeDtypeStruct(pool.shape[1:], pool.dtype, sharding=block_sharding(self.mesh))

    # The traced functions -----------------------------------------------------------------------------------------

    def _merge(self, weights: list[Array]) -> Any:
        return nnx.merge(self._graphdef, jax.tree.unflatten(self._weights_tree, weights))

    def _forward(
        self,
        bucket: Bucket,
        weights: list[Array],
        cache: KVCache,
        latest: Int[Array, " max_num_seqs"],
        packed: Int[Array, " size"],
    ) -> ForwardResult:
        """``latest`` are the tokens drawn by the step before; see ``Chunk.token_ids``."""
        inputs = unpack(packed, bucket, self.max_blocks)
        token_ids = jnp.where(inputs.token_ids < 0, latest[~inputs.token_ids], inputs.token_ids)
        model = self._merge(weights)
        attend = PagedAttend(cache, inputs, self.attention.name)
        hidden = model(token_ids, inputs.positions, inputs.prompt_lens, attend)
        after = None
        if bucket.is_decode and self.max_burst > 1:
            after = pack_next(packed, bucket, self.max_blocks, self.config.block_size)
        sample_hidden = jnp.pad(hidden[inputs.sample_tokens], ((0, self.config.max_num_seqs - bucket.num_rows), (0, 0)))
        return ForwardResult(attend.cache, hidden, sample_hidden, after)

    def _sample(
        self,
        sizes: SampleSizes,
        num_top: int | None,
        weights: list[Array],
        hidden: Float[Array, "max_num_seqs hidden_size"],
        packed: Int[Array, " size"],
        num_before: Int[Array, ""],
    ) -> tuple[SampledTokens, Int[Array, " max_num_seqs"]]:
        """The drawn tokens, and the same filled up, for the next step. ``num_before``: a burst's steps before this."""
        model = self._merge(weights)
        inputs = unpack_samples(packed, sizes)
        inputs = dataclasses.replace(inputs, positions=inputs.positions + num_before)
        logits = model.logits(hidden[: sizes.num_rows])
        sampled = sample(self._whole_rows(logits), inputs, num_top=num_top)
        latest = jnp.pad(sampled.token_ids, (0, hidden.shape[0] - sizes.num_rows))
        return sampled, jax.lax.with_sharding_constraint(latest, replicated(self.mesh))

    def _whole_rows(self, logits: Float[Array, "rows vocab"]) -> Float[Array, "rows vocab"]:
        """Each row on one device, whose part of the vocabulary is then no concern of what reads it."""
        is_divisible = logits.shape[0] % self.mesh.size == 0
        rows = jax.sharding.PartitionSpec(TENSOR_AXIS if is_divisible else None, None)
        return jax.lax.with_sharding_constraint(logits, jax.sharding.NamedSharding(self.mesh, rows))

    def _no_tokens(self) -> Int[Array, " max_num_seqs"]:
        return jnp.zeros(self.config.max_num_seqs, jnp.int32, device=replicated(self.mesh))

    def _beam(
        self,
        num_candidates: int,
        like: BeamInputs,
        weights: list[Array],
        hidden: Float[Array, "max_num_seqs hidden_size"],
        packed: Int[Array, " size"],
    ) -> Candidates:
        model = self._merge(weights)
        inputs = unpack_beam_inputs(packed, like)
        logits = model.logits(hidden[: len(inputs.group_rows)])
        return beam_candidates(logits, inputs, num_candidates=num_candidates)

    def _score(
        self,
        num_top: int,
        weights: list[Array],
        hidden: Float[Array, "tokens hidden_size"],
        rows: Int[Array, " score_rows"],
        targets: Int[Array, " score_rows"],
    ) -> Scores:
        model = self._merge(weights)
        return score(self._whole_rows(model.logits(hidden[rows])), targets, num_top=num_top)

    # A step -------------------------------------------------------------------------------------------------------

    def execute(self, plan: StepPlan) -> StepResult:
        """Run one step and wait for its results: ``fetch`` what was just enqueued."""
        return self.fetch(self.enqueue(plan))

    def enqueue(self, plan: StepPlan) -> StepUnderWay:
        """Start one step: what goes to the host, copies, the forward pass, sampling, what comes from the host.

        Waits for no step, but for copies between the pools when too many are under way, and for programs that are
        needed for the first time. Steps run in the order in which they were enqueued.
        """
        started_s, num_programs = time.perf_counter(), self.num_programs
        was_idle = self._newest_waited_for == self._num_enqueued
        self._num_enqueued += 1
        if self.cache.pool.is_deleted():
            self.cache = self._allocate_cache()
        if plan.to_host or plan.from_host:
            assert self.host_pool is not None
            self.cache = self.host_pool.start(self.cache, plan.to_host, plan.from_host)
        if plan.copies:
            self._copy(plan.copies)
        step = StepUnderWay(plan, self._num_enqueued, started_s, num_programs, was_idle)
        if plan.chunks:
            step = self._compute(step)
        if plan.from_host and self.host_pool is not None:
            self.cache = self.host_pool.finish(self.cache)
        for array in jax.tree.leaves((step.sampled, step.candidates)):
            array.copy_to_host_async()
        return step

    def fetch(self, step: StepUnderWay) -> StepResult:
        """Wait for the results of a step. What it moves between the pools may still be under way."""
        plan = step.plan
        sampled, candidates, prompt_scores = jax.device_get((step.sampled, step.candidates, step.prompt_scores))
        if plan.num_logit_rows > 0:
            self._newest_waited_for = step.number
        if self.host_pool is not None:
            self.host_pool.poll()
            num_prompt_tokens = sum(len(chunk.token_ids) for chunk in plan.chunks if len(chunk.token_ids) > 1)
            is_large = 4 * num_prompt_tokens >= max(self.buckets[-1].num_tokens, 2 * plan.num_tokens)
            is_alone = step.was_idle and self._newest_waited_for == step.number
            if is_large and is_alone and self.num_programs == step.num_programs and not prompt_scores:
                self.host_pool.learn_prefill(plan.num_tokens, time.perf_counter() - step.started_s)
        num_samples = len(plan.samples)
        draws = [(drawn.token_ids[:num_samples], first_rows(drawn.scores, num_samples)) for drawn in sampled]
        token_ids, scores = draws[0] if draws else (np.zeros(0, np.int32), NO_SCORES)
        return StepResult(
            token_ids=token_ids,
            scores=scores,
            prompt_scores=tuple(
                _cut_scores(parts, len(piece.target_ids))
                for parts, piece in zip(prompt_scores, plan.prompt_scores, strict=True)
            ),
            beams=split_candidates(candidates, plan.beams) if candidates else (),
            later=tuple(draws[1:]),
        )

    def _compute(self, step: StepUnderWay) -> StepUnderWay:
        """Enqueue the forward pass and all that is made of its logits."""
        plan, sampled, candidates = step.plan, [], None
        bucket = bucket_for(plan, self.buckets)
        packed = self._step_packer.pack(plan, bucket)
        run = self._program(("forward", bucket))
        # As few rows of logits as compiled for: a chunk of a prompt brings one, or none.
        rows = min(bucket.num_rows for bucket in self.buckets if bucket.num_rows >= len(plan.samples))
        packed_samples, sizes = self._sample_packer.pack(plan.samples, rows)
        draw = self._program(("sample", sizes, num_top_of(plan.samples))) if plan.samples else None
        forward = None
        for num_before in self._numbers[: plan.num_steps]:
            forward = run(self._weights, self.cache, self._latest, packed)
            self.cache, packed = forward.cache, forward.packed
            if draw is not None:
                tokens, self._latest = draw(self._weights, forward.sample_hidden, packed_samples, num_before)
                sampled.append(tokens)
        assert forward is not None
        if plan.beams:
            num_candidates = num_candidates_of(plan.beams)
            inputs = make_beam_inputs(plan.beams, first_row=len(plan.samples), num_rows=bucket.num_rows)
            key = ("beam", bucket.num_rows, num_candidates, len(inputs.bias_rows))
            candidates = self._program(key)(self._weights, forward.sample_hidden, pack_beam_inputs(inputs))
        scores = tuple(self._score_prompt(plan, piece, forward.hidden) for piece in plan.prompt_scores)
        return step._replace(sampled=tuple(sampled), candidates=candidates, prompt_scores=scores)

    def forget_pool(self) -> None:
        """A step failed, and with it whatever the pool holds or will hold: the next step starts with an empty one."""
        if not self.cache.pool.is_deleted():
            self.cache.pool.delete()
        if self.host_pool is not None:
            self.host_pool.forget()
        self._latest = self._no_tokens()  # those there were failed with the step

    @property
    def costs(self) -> Costs | None:
        """What bringing KV back costs here, kept current; None until ``measure_costs``."""
        return self.host_pool.costs if self.host_pool is not None else None

    def measure_costs(self) -> None:
        """Measure ``costs``, before the first step: copies both ways, and a prefill that writes to block 0 alone."""
        assert self.host_pool is not None
        bucket, width = self.buckets[-1], min(self.max_model_len, self.buckets[-1].num_tokens)
        num_chunks = min(bucket.num_tokens // width, bucket.num_rows)
        padding = Chunk(0, [0] * width, 0, width, [0] * self.max_blocks)
        plan = StepPlan(chunks=(padding,) * num_chunks)
        packed = self._step_packer.pack(plan, bucket)
        program = self._program(("forward", bucket))
        for _ in range(2):  # the first run loads the program
            started = time.perf_counter()
            self.cache = program(self._weights, self.cache, self._latest, packed).cache
            jax.block_until_ready(self.cache.pool)
            prefill_s = time.perf_counter() - started
        self.host_pool.measure(self.cache, prefill_token_s=prefill_s / plan.num_tokens)

    @property
    def _copy_sizes(self) -> list[int]:
        """Sizes of the copying programs: a step copies one block for each row at most."""
        return sorted({min(8, self.config.max_num_seqs), self.config.max_num_seqs})

    def _copy(self, copies: tuple[BlockCopy, ...]) -> None:
        """All block copies of a step in one call; padding copies block 0 onto itself."""
        size = next(n for n in self._copy_sizes if n >= len(copies))
        src, dst = np.zeros(size, np.int32), np.zeros(size, np.int32)
        src[: len(copies)] = [copy.src for copy in copies]
        dst[: len(copies)] = [copy.dst for copy in copies]
        self.cache = self._program(("copy", size))(self.cache, src, dst)

    def _score_prompt(
        self, plan: StepPlan, piece: PromptScore, hidden: Float[Array, "tokens hidden_size"]
    ) -> list[Scores]:
        """Scores of a piece, ``SCORE_ROWS`` at a time, the last ones padded."""
        first = sum(len(chunk.token_ids) for chunk in plan.chunks[: piece.chunk])
        num_top = min(MAX_LOGPROBS, self.model_config.vocab_size) if piece.num_logprobs else 0
        program = self._program(("score", hidden.shape[0], num_top))
        parts = []
        for start in range(0, len(piece.target_ids), SCORE_ROWS):
            targets = piece.target_ids[start : start + SCORE_ROWS]
            rows, padded = np.zeros(SCORE_ROWS, np.int32), np.zeros(SCORE_ROWS, np.int32)
            rows[: len(targets)] = first + start + np.arange(len(targets))
            padded[: len(targets)] = targets
            parts.append(program(self._weights, hidden, rows, padded))
        return parts


def _cut_scores(parts: list[Scores], num_rows: int) -> TokenScores:
    """The scores of a piece, fetched, without padding."""
    starts = range(0, num_rows, SCORE_ROWS)
    return join_scores(
        [first_rows(part, min(SCORE_ROWS, num_rows - start)) for part, start in zip(parts, starts, strict=True)]
    )
