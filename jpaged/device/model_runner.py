"""Executes step plans: weights, KV cache and the compiled programs that join them."""

import dataclasses
import gc
import os
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
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
    block_shape,
    check_blocks_fit,
    choose_attention,
    num_blocks_that_fit,
)
from jpaged.device.program_cache import ProgramCache, compile_program, model_identity, program_cache_for
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
from jpaged.device.step_state import StepState, num_decode_inputs, pack_decode_inputs
from jpaged.device.transfer import (
    MAX_STAGED_BLOCKS,
    MOVE_SIZES,
    HostPool,
    block_sharding,
    has_host_pool,
    num_host_blocks_for,
)
from jpaged.host.step_plan import BlockCopy, Chunk, Costs, PromptScore, StepPlan, StepResult, TokenScores
from jpaged.models import ModelConfig, fuse_norms, fuse_projections
from jpaged.request import MAX_LOGPROBS
from pallas_kernels.paged_attention import IMPLEMENTATIONS, INTERPRETERS, why_cannot_run

GPU_COMPILER_OPTIONS = {
    "xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION,CONDITIONAL,WHILE",
    "xla_gpu_graph_min_graph_size": 1,
    "xla_disable_hlo_passes": "rematerialization",
}
"""Loops run inside CUDA graphs, be they all there is of a program: otherwise every turn of one waits for the host to
read whether there is another.

Nothing is computed again to save memory: XLA counts the pool, which every layer writes in place, once for each layer,
and finds that memory is short.
"""

ACCELERATOR_BURST = 4
"""Steps of a burst where nobody says: planning a step takes about as long as a small one runs."""

ACCELERATOR_LEAST_ROWS = 16
"""Of a decode's program: fewer rows read the same weights and take as long."""

ACCELERATOR_HALFWAY_FROM = 64
"""Tokens of a step from which each costs, so that padding does: Llama-3-8B on an H200 decodes 64 rows in 5.9 ms, and
256 in 10.9, of which attention is less than half."""

GUESSED_WORKSPACE = 1 / 32
"""Of the memory of an accelerator: what steps take besides weights and pool, until their programs say it."""

SAMPLING_SCOPE = "sampling"
"""Names the operations that choose tokens, for profiles."""

SCORE_ROWS = 64
"""Prompt tokens scored per call, so that prompt_logprobs never holds [prompt, vocab] logits."""


class StepUnderWay(NamedTuple):
    """A plan that was enqueued, and what it will bring; None where the plan asks for nothing of the kind.

    Args:
        number: counts steps.
        started_s: when, by ``time.perf_counter``.
        num_programs: compiled by then.
        was_idle: whether nothing was under way then.
        drawn: by a decode's own program, as ``StepState.drawn``.
        sampled: otherwise, by each step.
    """

    plan: StepPlan
    number: int
    started_s: float
    num_programs: int
    was_idle: bool
    drawn: Int[Array, "2 steps rows"] | None = None
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
    name, settings = config.attention_implementation, ("attention_implementation", "interpret")
    asked = ", ".join(f"{setting}={getattr(config, setting)!r}" for setting in settings)
    if config.interpret and name not in INTERPRETERS:
        raise ValueError(f"{asked}: only {sorted(INTERPRETERS)} can be interpreted; name one, or leave interpret out")
    if name == "hopper" and config.tensor_parallel_size > 1:
        raise ValueError(
            f"{asked} runs on one device, not on tensor_parallel_size={config.tensor_parallel_size}: leave it out, or "
            "ask for 'xla'"
        )
    reason = None if name is None or config.interpret else why_cannot_run(name)
    if reason is not None:
        raise ValueError(f"{asked} cannot run here: {reason}; leave it out, or have it interpreted, which is slow")
    limit, wanted = model_config.max_model_len, config.max_model_len
    if wanted is not None and wanted > limit:
        raise ValueError(f"max_model_len={wanted} is more than the model's own limit of {limit} tokens: lower it")
    return wanted or limit


class ModelRunner:
    """The device half: ``enqueue`` starts what a StepPlan says, ``fetch`` waits for the StepResult.

    Programs are compiled ahead of time per bucket, by ``warm_up`` or when first needed, and called with the cache
    and the ``StepState`` donated, so that a step writes in place.

    Args:
        model: a flax.nnx model (``jpaged.models``), its weights on the devices of ``mesh``; changed: its projections
            are joined (``fuse_projections``), and on some devices its norms fused (``fuse_norms``).
        model_config: its configuration.
        config: the engine's settings.
        mesh: the devices.
        warm_up: whether to call ``warm_up``, which costs least then.
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
        warm_up: bool = False,
        use_tqdm: bool = True,
    ):
        self.model_config = model_config
        self.config = config
        self.mesh = mesh
        self.max_model_len = check_settings(model_config, config)
        fuse_projections(model)
        floats = (x.dtype for x in jax.tree.leaves(nnx.state(model)) if jnp.issubdtype(x.dtype, jnp.floating))
        self.dtype = jnp.dtype(next(floats))
        self.attention = choose_attention(model_config, config, self.dtype, mesh.size)
        if self.attention.name == "hopper" and not config.interpret:
            fuse_norms(model)
        self._graphdef, state = nnx.split(model)
        # A flat list: flattening an nnx state in every call costs more than a small step.
        self._weights, self._weights_tree = jax.tree.flatten(state)
        self.weight_bytes = sum(x.nbytes for x in self._weights)
        block = block_shape(model_config, config, self.dtype, self.attention)
        self.bytes_per_block = block_bytes(**block)
        self._new_cache = partial(KVCache.allocate, **block)
        grid = () if self._is_on_cpu else (ACCELERATOR_LEAST_ROWS, ACCELERATOR_HALFWAY_FROM)
        self.buckets = all_buckets(config.max_num_seqs, config.token_budget, *grid)
        self._compiled: dict[tuple, jax.stages.Compiled] = {}
        self.num_programs_loaded = 0  # that an earlier start had compiled
        self._model_identity = model_identity(model)
        guessed_bytes = self._guess_sizes()
        self.num_host_blocks = num_host_blocks_for(
            config, self.bytes_per_block, is_on_cpu=self._is_on_cpu, useful_blocks=config.max_num_seqs * self.max_blocks
        )
        with ThreadPoolExecutor(max_workers=1) as thread:  # both take a while
            host_pool = thread.submit(self._allocate_host_pool)
            if warm_up:
                self.warm_up(use_tqdm=use_tqdm)
            if guessed_bytes is not None and self._correct_sizes(guessed_bytes) and warm_up:
                self.warm_up(use_tqdm=use_tqdm)
            self.host_pool = host_pool.result()
        self.cache = self._allocate_cache()
        self._state = self._allocate_state()
        self._step_packer = StepPacker(self.max_blocks, config.block_size)
        self._sample_packer = SamplePacker()
        self._num_enqueued = 0  # steps
        self._newest_waited_for = 0  # the number of a step: it has run

    # Sizes --------------------------------------------------------------------------------------------------------

    def _guess_sizes(self) -> int | None:
        """``num_blocks`` and ``max_model_len``: as asked, or such that a step's workspace should fit beside the pool.

        What a step takes only its programs tell, and the size of the pool is one of theirs: so it is guessed first.

        Returns:
            The bytes left for the workspace if they are guessed, of all devices.
        """
        devices, wanted = list(self.mesh.devices.flat), self.config.num_blocks
        if wanted is not None:
            check_blocks_fit(wanted, self.bytes_per_block, devices)
            self.num_blocks = wanted
        elif self._is_on_cpu:
            self.num_blocks = self._require_blocks(self._num_blocks_beside(0))
        else:
            guessed_bytes = int(available_bytes(devices) * GUESSED_WORKSPACE)
            self.num_blocks = self._num_blocks_beside(guessed_bytes)
            if self.num_blocks <= self.max_blocks:  # a guess refuses nobody
                self.num_blocks = max(2, self._num_blocks_beside(0))
                self._correct_sizes(0)
                return None
            return guessed_bytes
        self._fit_model_len()
        return None

    def _correct_sizes(self, guessed_bytes: int) -> bool:
        """Size the pool by what a step takes, if that is more than was guessed. Returns whether it was."""
        needed = self._workspace_bytes() * self.mesh.size
        if needed <= guessed_bytes:
            return False
        self._compiled.clear()
        self.num_programs_loaded = 0
        self.num_blocks = self._require_blocks(self._num_blocks_beside(needed))
        self._fit_model_len()
        return True

    def _num_blocks_beside(self, reserved_bytes: int) -> int:
        """As many blocks as leave so many bytes of all devices."""
        return num_blocks_that_fit(
            self.bytes_per_block,
            list(self.mesh.devices.flat),
            self.config.memory_fraction,
            reserved_bytes=reserved_bytes,
            least_blocks=self.max_blocks + 1,
            useful_blocks=self.config.max_num_seqs * self.max_blocks + 1,
        )

    def _require_blocks(self, num_blocks: int) -> int:
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
        """Temporaries and results of the largest step on one device, from the compiler, without running it."""
        keys: list[tuple] = [("forward", self.buckets[-1]), ("sample", SampleSizes(self.config.max_num_seqs), None)]
        keys.append(("copy", max(self._copy_sizes)))
        total = 0
        if has_host_pool(self.config, is_on_cpu=self._is_on_cpu):
            keys += ("gather", MOVE_SIZES[-1]), ("scatter", MOVE_SIZES[-1])
            total += 2 * MAX_STAGED_BLOCKS * self.bytes_per_block // self.mesh.size
        for key in keys:
            analysis = self._program(key).memory_analysis()
            assert analysis is not None
            total += analysis.temp_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes
        return total

    def _allocate_cache(self) -> KVCache:
        return self._new_cache(num_blocks=self.num_blocks, sharding=pool_sharding(self.mesh))

    def _allocate_host_pool(self) -> HostPool | None:
        return HostPool(self.num_host_blocks, self._abstract_block(), self._program) if self.num_host_blocks else None

    def _allocate_state(self) -> StepState:
        return StepState.allocate(
            self.buckets,
            max_blocks=self.max_blocks,
            max_burst=self.max_burst,
            hidden_size=self.model_config.hidden_size,
            dtype=self.dtype,
            sharding=replicated(self.mesh),
        )

    # Programs -----------------------------------------------------------------------------------------------------

    def warm_up(self, *, use_tqdm: bool = True) -> None:
        """Compile every bucket's step, its plain sampler and all that moves blocks, in parallel.

        Log-probabilities of alternatives, penalties, logit biases and beams compile when first asked for.
        """
        # Lowered one after the other, always in this order: JAX numbers Pallas kernels as it meets them, and these
        # numbers are part of what its own cache finds programs by. Ours does not lower what it finds.
        keys = [key for key in self._all_keys() if key not in self._compiled]
        threads = ThreadPoolExecutor(max_workers=num_cores())
        kept = self._program_cache()
        try:
            if kept is not None:
                self._compiled |= (loaded := kept.load_all(keys, threads))
                self.num_programs_loaded += len(loaded)
            jobs = {threads.submit(self._compile, self._lower(key)): key for key in keys if key not in self._compiled}
            done = as_completed(jobs)
            saves: list[Future[None]] = []
            for job in tqdm(done, total=len(jobs), desc="Compiling", unit="program", disable=not (use_tqdm and jobs)):
                self._compiled[jobs[job]], can_be_saved = job.result()
                if kept is not None and can_be_saved:
                    saves.append(threads.submit(kept.save, jobs[job], self._compiled[jobs[job]]))
            for save in saves:
                save.result()
        finally:  # an interruption need not wait for programs that nobody started on
            threads.shutdown(cancel_futures=True)
        # Tracing leaves a million objects that stay. Python's garbage collector would visit them between two steps.
        gc.collect()
        gc.freeze()

    def _all_keys(self) -> list[tuple]:
        """Of all programs that plain requests need."""
        keys: list[tuple] = [("forward", bucket) for bucket in reversed(self.buckets)]
        keys += [("sample", SampleSizes(rows), None) for rows in sorted({bucket.num_rows for bucket in self.buckets})]
        keys += [("load", self._num_inputs(bucket)) for bucket in self.buckets]
        keys += [("read",), *(("copy", size) for size in self._copy_sizes)]
        if self.num_host_blocks:
            keys += [(kind, size) for kind in ("gather", "scatter") for size in MOVE_SIZES]
        return list(dict.fromkeys(keys))

    def _program_cache(self) -> ProgramCache | None:
        """Where programs are kept between runs; None on a CPU, which compiles about as fast as it traces."""
        if self._is_on_cpu:
            return None
        weights = [(x.shape, str(x.dtype), str(x.sharding)) for x in self._weights]
        sizes = self.num_blocks, self.config.block_size, self.max_model_len, self.max_burst, self.buckets
        choices = self.model_config, self.attention.name, self.config.interpret, GPU_COMPILER_OPTIONS
        devices = list(self.mesh.devices.flat)
        return program_cache_for(self._model_identity, devices, str(self.mesh), weights, sizes, choices)

    def _num_inputs(self, bucket: Bucket) -> int:
        """Numbers that are loaded for a bucket's program."""
        return num_decode_inputs(bucket, self.max_blocks) if bucket.is_decode else packed_size(bucket, self.max_blocks)

    @property
    def num_programs(self) -> int:
        return len(self._compiled)

    def program(self, bucket: Bucket) -> jax.stages.Compiled:
        """The compiled forward step of one bucket, to inspect (its memory analysis, its HLO)."""
        return self._program(("forward", bucket))

    def _program(self, key: tuple) -> jax.stages.Compiled:
        """The program of ``key``: a kind and its static sizes. Compiled on first use."""
        if key not in self._compiled:
            self._compiled[key], _ = self._compile(self._lower(key))
        return self._compiled[key]

    def _compile(self, lowered: jax.stages.Lowered) -> tuple[jax.stages.Compiled, bool]:
        is_gpu = self.mesh.devices.flat[0].platform == "gpu"
        return compile_program(lowered, GPU_COMPILER_OPTIONS if is_gpu else None)

    def _lower(self, key: tuple) -> jax.stages.Lowered:
        precision = "highest" if self.dtype == jnp.float32 else None
        with jax.default_matmul_precision(precision), jax.set_mesh(self.mesh):
            return self._lower_kind(*key)

    def _lower_kind(self, kind: str, *sizes: Any) -> jax.stages.Lowered:
        weights = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), self._weights)
        cache, state = self._abstract_cache(), self._abstract_state()
        match kind:
            case "load":
                (num_inputs,) = sizes
                inputs = self._abstract((num_inputs,), jnp.int32)
                return jax.jit(StepState.load, donate_argnums=0).lower(state, inputs)
            case "forward":
                (bucket,) = sizes
                method = self._decode if bucket.is_decode else self._forward
                return self._jit(method, bucket, donate=(1, 2)).lower(weights, cache, state)
            case "read":
                return jax.jit(jnp.copy).lower(state.drawn)
            case "sample":
                sample_sizes, num_top = sizes
                packed = self._abstract((sample_sizes.packed_size,), jnp.int32)
                method = self._jit(self._sample_next, sample_sizes, num_top, donate=(1,))
                return method.lower(weights, state.latest, state.sample_hidden, packed, self._abstract((), jnp.int32))
            case "score":
                num_tokens, num_top = sizes
                hidden = self._abstract((num_tokens, self.model_config.hidden_size), self.dtype)
                rows = self._abstract((SCORE_ROWS,), jnp.int32)
                return self._jit(self._score, num_top).lower(weights, hidden, rows, rows)
            case "beam":
                rows, num_candidates, num_biases = sizes
                empty = empty_beam_inputs(rows, num_candidates, num_biases)
                packed = self._abstract(pack_beam_inputs(empty).shape, jnp.int32)
                return self._jit(self._beam, num_candidates, empty).lower(weights, state.sample_hidden, packed)
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
                raise AssertionError(kind)

    def _jit(self, method: Callable, *static: object, donate: tuple[int, ...] = ()):
        return jax.jit(partial(method, *static), donate_argnums=donate)

    def _abstract(self, shape: tuple[int, ...], dtype: jax.typing.DTypeLike) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=replicated(self.mesh))

    def _abstract_cache(self) -> KVCache:
        cache = jax.eval_shape(partial(self._new_cache, num_blocks=self.num_blocks))
        sharding = pool_sharding(self.mesh)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), cache)

    def _abstract_state(self) -> StepState:
        return jax.tree.map(lambda x: self._abstract(x.shape, x.dtype), jax.eval_shape(self._allocate_state))

    def _abstract_block(self) -> jax.ShapeDtypeStruct:
        pool = jax.eval_shape(partial(self._new_cache, num_blocks=1)).pool
        return jax.ShapeDtypeStruct(pool.shape[1:], pool.dtype, sharding=block_sharding(self.mesh))

    # The traced functions -----------------------------------------------------------------------------------------

    def _merge(self, weights: list[Array]) -> Any:
        return nnx.merge(self._graphdef, jax.tree.unflatten(self._weights_tree, weights))

    def _forward(
        self, bucket: Bucket, weights: list[Array], cache: KVCache, state: StepState
    ) -> tuple[KVCache, StepState, Float[Array, "tokens hidden_size"]]:
        """A forward pass over the inputs loaded, and the hidden states of all its tokens.

        Tokens below 0 were drawn by the step before; see ``Chunk.token_ids``.
        """
        inputs = unpack(state.step_inputs(bucket, self.max_blocks), bucket, self.max_blocks)
        token_ids = jnp.where(inputs.token_ids < 0, state.latest[~inputs.token_ids], inputs.token_ids)
        model = self._merge(weights)
        attend = PagedAttend(
            cache, inputs, self.attention.name, interpret=self.config.interpret, num_devices=self.mesh.size
        )
        hidden = model(token_ids, inputs.positions, inputs.prompt_lens, attend)
        return attend.cache, self._replicate(state.with_sample_hidden(hidden[inputs.sample_tokens])), hidden

    def _decode(
        self, bucket: Bucket, weights: list[Array], cache: KVCache, state: StepState
    ) -> tuple[KVCache, StepState]:
        """A forward pass and plain sampling, as often as loaded, each fed with what the one before drew.

        For 0 steps, one forward pass alone.
        """
        packed_samples, num_steps = state.decode_inputs(bucket, self.max_blocks)
        sizes = SampleSizes(bucket.num_rows)

        def step(number: Int[Array, ""], before: tuple[KVCache, StepState]) -> tuple[KVCache, StepState]:
            cache, state, hidden = self._forward(bucket, weights, *before)

            def draw() -> tuple[Int[Array, " rows"], Float[Array, " rows"]]:
                tokens = self._sample(sizes, None, weights, state.sample_hidden, packed_samples, number)
                return tokens.token_ids, tokens.scores.logprobs

            def nothing() -> tuple[Int[Array, " rows"], Float[Array, " rows"]]:
                return jnp.zeros(sizes.num_rows, jnp.int32), jnp.zeros(sizes.num_rows, jnp.float32)

            drawn = jax.lax.cond(num_steps > 0, draw, nothing)
            packed = state.step_inputs(bucket, self.max_blocks)
            after = pack_next(packed, bucket, self.max_blocks, self.config.block_size)
            return cache, self._replicate(state.with_hidden(hidden).with_drawn(number, *drawn).load(after))

        if self.max_burst == 1:
            return step(jnp.int32(0), (cache, state))
        return jax.lax.fori_loop(0, jnp.maximum(num_steps, 1), step, (cache, state))

    def _replicate(self, state: StepState) -> StepState:
        return jax.lax.with_sharding_constraint(state, replicated(self.mesh))

    def _sample(
        self,
        sizes: SampleSizes,
        num_top: int | None,
        weights: list[Array],
        hidden: Float[Array, "max_num_seqs hidden_size"],
        packed: Int[Array, " size"],
        num_before: Int[Array, ""],
    ) -> SampledTokens:
        """The drawn tokens. ``num_before``: steps of the burst before this one."""
        model = self._merge(weights)
        inputs = unpack_samples(packed, sizes)
        inputs = dataclasses.replace(inputs, positions=inputs.positions + num_before)
        with jax.named_scope(SAMPLING_SCOPE):
            logits = model.logits(hidden[: sizes.num_rows])
            return sample(self._whole_rows(logits), inputs, num_top=num_top)

    def _sample_next(
        self,
        sizes: SampleSizes,
        num_top: int | None,
        weights: list[Array],
        latest: Int[Array, " max_num_seqs"],
        hidden: Float[Array, "max_num_seqs hidden_size"],
        packed: Int[Array, " size"],
        num_before: Int[Array, ""],
    ) -> tuple[SampledTokens, Int[Array, " max_num_seqs"]]:
        """The drawn tokens, and ``latest`` with them."""
        sampled = self._sample(sizes, num_top, weights, hidden, packed, num_before)
        latest = jax.lax.dynamic_update_slice(latest, sampled.token_ids, (0,))
        return sampled, jax.lax.with_sharding_constraint(latest, replicated(self.mesh))

    def _whole_rows(self, logits: Float[Array, "rows vocab"]) -> Float[Array, "rows vocab"]:
        """Each row on one device, whose part of the vocabulary is then no concern of what reads it."""
        is_divisible = logits.shape[0] % self.mesh.size == 0
        rows = jax.sharding.PartitionSpec(TENSOR_AXIS if is_divisible else None, None)
        return jax.lax.with_sharding_constraint(logits, jax.sharding.NamedSharding(self.mesh, rows))

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
        self._replace_lost()
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
        for array in jax.tree.leaves((step.drawn, step.sampled, step.candidates)):
            array.copy_to_host_async()
        return step

    def _replace_lost(self) -> None:
        """Anew what went with a program that did not bring it back."""
        if self.cache.pool.is_deleted():
            self.cache = self._allocate_cache()
        if any(x.is_deleted() for x in jax.tree.leaves(self._state)):
            self._state = self._allocate_state()

    def fetch(self, step: StepUnderWay) -> StepResult:
        """Wait for the results of a step. What it moves between the pools may still be under way."""
        plan = step.plan
        results = step.drawn, step.sampled, step.candidates, step.prompt_scores
        drawn, sampled, candidates, prompt_scores = jax.device_get(results)
        num_samples = len(plan.samples)
        if plan.num_logit_rows > 0:
            self._newest_waited_for = step.number
        if self.host_pool is not None:
            self.host_pool.poll()
        if self.host_pool is not None and plan.decodes is None:
            num_prompt_tokens = sum(len(chunk.token_ids) for chunk in plan.chunks if len(chunk.token_ids) > 1)
            is_large = 4 * num_prompt_tokens >= max(self.buckets[-1].num_tokens, 2 * plan.num_tokens)
            is_alone = step.was_idle and self._newest_waited_for == step.number
            if is_large and is_alone and self.num_programs == step.num_programs and not prompt_scores:
                self.host_pool.learn_prefill(plan.num_tokens, time.perf_counter() - step.started_s)
        if drawn is not None:
            draws = _split_draws(drawn, num_samples)[: plan.num_steps]
        else:
            draws = [(tokens.token_ids[:num_samples], first_rows(tokens.scores, num_samples)) for tokens in sampled]
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
        """Enqueue the forward passes and all that is made of their logits."""
        plan, candidates = step.plan, None
        bucket = bucket_for(plan, self.buckets)
        packed = self._step_packer.pack(plan, bucket)
        packed_samples, sizes = self._sample_packer.pack(plan.samples, self._num_sample_rows(plan, bucket))
        num_top = num_top_of(plan.samples)
        if bucket.is_decode and num_top is None and sizes == SampleSizes(bucket.num_rows):
            self._load(pack_decode_inputs(packed, packed_samples, plan.num_steps))
            hidden = self._run(bucket)
            step = step._replace(drawn=self._program(("read",))(self._state.drawn))
        else:
            hidden, sampled = self._run_and_sample(plan, bucket, packed, packed_samples, sizes)
            step = step._replace(sampled=sampled)
        if plan.beams:
            num_candidates = num_candidates_of(plan.beams)
            inputs = make_beam_inputs(plan.beams, first_row=len(plan.samples), num_rows=bucket.num_rows)
            key = ("beam", bucket.num_rows, num_candidates, len(inputs.bias_rows))
            candidates = self._program(key)(self._weights, self._state.sample_hidden, pack_beam_inputs(inputs))
        scores = tuple(self._score_prompt(plan, piece, hidden) for piece in plan.prompt_scores)
        return step._replace(candidates=candidates, prompt_scores=scores)

    def _num_sample_rows(self, plan: StepPlan, bucket: Bucket) -> int:
        """Rows of logits: as few as compiled for, where a chunk of a prompt brings one or none."""
        if bucket.is_decode:
            return bucket.num_rows
        return min(bucket.num_rows for bucket in self.buckets if bucket.num_rows >= len(plan.samples))

    def _run_and_sample(
        self, plan: StepPlan, bucket: Bucket, packed: np.ndarray, packed_samples: np.ndarray, sizes: SampleSizes
    ) -> tuple[Float[Array, "tokens hidden_size"], tuple[SampledTokens, ...]]:
        """Enqueue the forward passes of a plan, and after each a program that samples as this plan asks for.

        Returns:
            The hidden states of the last one, and what was drawn by each.
        """
        draw = self._program(("sample", sizes, num_top_of(plan.samples))) if plan.samples else None
        self._load_step(bucket, packed)
        hidden, sampled = self._state.hidden, []
        for number in range(plan.num_steps):
            hidden = self._run(bucket)
            if draw is not None:
                state = self._state
                args = state.latest, state.sample_hidden, packed_samples, np.int32(number)
                tokens, latest = draw(self._weights, *args)
                self._state = dataclasses.replace(state, latest=latest)
                sampled.append(tokens)
        return hidden, tuple(sampled)

    def _load_step(self, bucket: Bucket, packed: np.ndarray) -> None:
        """Enqueue the upload of a step's inputs, for its forward pass alone."""
        if bucket.is_decode:
            nothing = np.zeros(SampleSizes(bucket.num_rows).packed_size, np.int32)
            packed = pack_decode_inputs(packed, nothing, num_steps=0)
        self._load(packed)

    def _load(self, inputs: np.ndarray) -> None:
        """Enqueue the upload of a step's inputs."""
        self._state = self._program(("load", len(inputs)))(self._state, inputs)

    def _run(self, bucket: Bucket) -> Float[Array, "tokens hidden_size"]:
        """Enqueue the program of a bucket over what is loaded; the hidden states of its tokens, for the time being."""
        self.cache, self._state, *hidden = self._program(("forward", bucket))(self._weights, self.cache, self._state)
        return hidden[0] if hidden else self._state.hidden

    def forget_pool(self) -> None:
        """A step failed, and with it whatever the pool holds or will hold: the next step starts with an empty one."""
        if not self.cache.pool.is_deleted():
            self.cache.pool.delete()
        if self.host_pool is not None:
            self.host_pool.forget()
        self._state = self._allocate_state()

    @property
    def costs(self) -> Costs | None:
        """What bringing KV back costs here, kept current; None until ``measure_costs``."""
        return self.host_pool.costs if self.host_pool is not None else None

    def measure_costs(self) -> None:
        """Measure ``costs``, before the first step: copies both ways, and a prefill that writes to block 0 at most."""
        assert self.host_pool is not None
        bucket, width = self.buckets[-1], min(self.max_model_len, self.buckets[-1].num_tokens)
        num_chunks = min(bucket.num_tokens // width, bucket.num_rows)
        padding = Chunk(0, [0] * width, 0, width, [0] * self.max_blocks)
        plan = StepPlan(chunks=(padding,) * num_chunks)
        packed = self._step_packer.pack(plan, bucket)
        self._replace_lost()
        for _ in range(2):  # the first run loads the program
            started = time.perf_counter()
            self._load_step(bucket, packed)
            self._run(bucket)
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


def _split_draws(
    drawn: Int[np.ndarray, "2 steps rows"], num_rows: int
) -> list[tuple[Int[np.ndarray, " rows"], TokenScores]]:
    """The tokens and scores of each step, without padding rows."""
    token_ids, logprobs = drawn[0, :, :num_rows], drawn[1, :, :num_rows].view(np.float32)
    unasked = TokenScores(
        logprobs=np.zeros(num_rows, np.float32),
        ranks=np.zeros(num_rows, np.int32),
        top_ids=np.zeros((num_rows, 0), np.int32),
        top_logprobs=np.zeros((num_rows, 0), np.float32),
    )
    scores = [dataclasses.replace(unasked, logprobs=of_step) for of_step in logprobs]
    return list(zip(token_ids, scores, strict=True))


def _cut_scores(parts: list[Scores], num_rows: int) -> TokenScores:
    """The scores of a piece, fetched, without padding."""
    starts = range(0, num_rows, SCORE_ROWS)
    return join_scores(
        [first_rows(part, min(SCORE_ROWS, num_rows - start)) for part, start in zip(parts, starts, strict=True)]
    )
