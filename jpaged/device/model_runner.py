"""Executes step plans: weights, KV cache and the compiled programs that join them."""

import dataclasses
import os
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
from jpaged.device.kv_cache import KVCache, available_bytes, block_bytes, num_blocks_that_fit
from jpaged.device.sampler import SampledTokens, SampleInputs, Scores, make_sample_inputs, sample, score
from jpaged.device.sharding import pool_sharding
from jpaged.device.step_inputs import (
    Bucket,
    StepInputs,
    all_buckets,
    bucket_for,
    pack,
    packed_size,
    unpack,
)
from jpaged.host.step_plan import BlockCopy, PromptScore, StepPlan, StepResult, TokenScores
from jpaged.models import ModelConfig
from jpaged.request import MAX_LOGPROBS
from pallas_kernels.paged_attention import IMPLEMENTATIONS

SCORE_ROWS = 64
"""Prompt tokens scored per call, so that prompt_logprobs never holds [prompt, vocab] logits."""


NO_SCORES = TokenScores(
    np.zeros(0, np.float32), np.zeros(0, np.int32), np.zeros((0, 0), np.int32), np.zeros((0, 0), np.float32)
)


class PagedAttend:
    """The ``attend`` a model calls in a step: store this layer's K/V, then attend to all of each sequence's context.

    Lives during one trace; ``cache`` is the newest value of the cache.
    """

    def __init__(self, cache: KVCache, inputs: StepInputs, implementation: str | None):
        self.cache = cache
        self._inputs = inputs
        self._implementation = implementation

    def __call__(
        self,
        layer: int,
        q: Float[Array, "tokens num_heads head_dim"],
        k: Float[Array, "tokens num_kv_heads head_dim"],
        v: Float[Array, "tokens num_kv_heads head_dim"],
        *,
        sm_scale: float,
        sliding_window: int | None = None,
    ) -> Float[Array, "tokens num_heads head_dim"]:
        inputs = self._inputs
        self.cache = self.cache.write(layer, k, v, inputs.slots)
        return self.cache.attend(
            layer,
            q,
            inputs.block_tables,
            inputs.kv_lens,
            inputs.cu_q_lens,
            sm_scale=sm_scale,
            sliding_window=sliding_window,
            implementation=self._implementation,
        )


class ForwardResult(NamedTuple):
    cache: KVCache
    hidden: Float[Array, "tokens hidden_size"]
    sample_hidden: Float[Array, "rows hidden_size"]


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
    limit, wanted = model_config.max_model_len, config.max_model_len
    if wanted is not None and wanted > limit:
        raise ValueError(f"max_model_len={wanted} is more than the model's own limit of {limit} tokens: lower it")
    return wanted or limit


class ModelRunner:
    """The device half: ``execute`` turns a StepPlan into a StepResult.

    Programs are compiled ahead of time per bucket, by ``warm_up`` or when first needed, and called with the cache
    donated, so that a step writes its K/V in place.

    Args:
        model: a flax.nnx model (``jpaged.models``), its weights on the devices of ``mesh``.
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
        self._graphdef, state = nnx.split(model)
        # A flat list: flattening an nnx state in every call costs more than a small step.
        self._weights, self._weights_tree = jax.tree.flatten(state)
        self.dtype = jnp.dtype(next(x.dtype for x in self._weights if jnp.issubdtype(x.dtype, jnp.floating)))
        self.weight_bytes = sum(x.nbytes for x in self._weights)
        self.max_model_len = check_settings(model_config, config)
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
        self.cache = self._allocate_cache()

    # Sizes --------------------------------------------------------------------------------------------------------

    def _check_num_blocks(self) -> int:
        """The blocks asked for, or as many as fit."""
        devices, wanted = list(self.mesh.devices.flat), self.config.num_blocks
        if wanted is not None:
            left = available_bytes(devices)
            if wanted * self.bytes_per_block > left:
                raise ValueError(
                    f"num_blocks={wanted} x {self.bytes_per_block:,} bytes do not fit in the {left:,} bytes there are: "
                    f"at most {left // self.bytes_per_block} would"
                )
            return wanted
        is_cpu = devices[0].platform == "cpu"
        num_blocks = num_blocks_that_fit(
            self.bytes_per_block,
            devices,
            self.config.memory_fraction,
            reserved_bytes=0 if is_cpu else self._workspace_bytes() * len(devices),
            least_blocks=self.max_blocks + 1,
            useful_blocks=self.config.max_num_seqs * self.max_blocks + 1,
        )
        if num_blocks < 2:
            remedy = "give num_blocks" if is_cpu else "raise memory_fraction, or lower max_num_batched_tokens"
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
        keys = (("forward", self.buckets[-1]), ("sample", self.config.max_num_seqs, 0, 0, 0), ("copy", largest))
        with ThreadPoolExecutor() as threads:
            programs = list(threads.map(partial(self._compile, pool_blocks=pool_blocks), keys))
        total = 0
        for program in programs:
            analysis = program.memory_analysis()
            assert analysis is not None
            total += analysis.temp_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes
        return total

    def _allocate_cache(self) -> KVCache:
        return self._new_cache(num_blocks=self.num_blocks, sharding=pool_sharding(self.mesh))

    # Programs -----------------------------------------------------------------------------------------------------

    def warm_up(self, *, use_tqdm: bool = True) -> None:
        """Compile every bucket's step, its plain sampler and the block copies, in parallel.

        Log-probabilities of alternatives, penalties and logit biases compile when first asked for.
        """
        keys: list[tuple] = [("forward", bucket) for bucket in reversed(self.buckets)]
        keys += [("sample", rows, 0, 0, 0) for rows in {bucket.num_rows for bucket in self.buckets}]
        keys += [("copy", size) for size in self._copy_sizes]
        threads = ThreadPoolExecutor(max_workers=num_cores())
        try:
            jobs = [threads.submit(self._program, key) for key in keys]
            done = as_completed(jobs)
            for job in tqdm(done, total=len(jobs), desc="Compiling", unit="program", disable=not use_tqdm):
                job.result()
        finally:  # an interruption need not wait for programs that nobody started on
            threads.shutdown(cancel_futures=True)

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
            return self._lower(key, pool_blocks).compile()

    def _lower(self, key: tuple, pool_blocks: int) -> jax.stages.Lowered:
        kind, *sizes = key
        weights = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), self._weights)
        cache = self._abstract_cache(pool_blocks)
        match kind:
            case "forward":
                (bucket,) = sizes
                packed = self._abstract((packed_size(bucket, self.max_blocks),), jnp.int32)
                return self._jit(self._forward, bucket, donate=1).lower(weights, cache, packed)
            case "sample":
                rows, num_biases, num_seen, num_top = sizes
                hidden = self._abstract((rows, self.model_config.hidden_size), self.dtype)
                inputs = _empty_sample_inputs(rows, num_biases, num_seen)
                return self._jit(self._sample, num_top).lower(weights, hidden, inputs)
            case "score":
                num_tokens, num_top = sizes
                hidden = self._abstract((num_tokens, self.model_config.hidden_size), self.dtype)
                rows = self._abstract((SCORE_ROWS,), jnp.int32)
                return self._jit(self._score, num_top).lower(weights, hidden, rows, rows)
            case "copy":
                blocks = self._abstract((sizes[0],), jnp.int32)
                return jax.jit(KVCache.copy, donate_argnums=0).lower(cache, blocks, blocks)
            case _:
                raise AssertionError(key)

    def _jit(self, method: Callable, *static: object, donate: int | None = None):
        return jax.jit(partial(method, *static), donate_argnums=() if donate is None else donate)

    def _abstract(self, shape: tuple[int, ...], dtype: jax.typing.DTypeLike) -> jax.ShapeDtypeStruct:
        replicated = jax.sharding.NamedSharding(self.mesh, jax.sharding.PartitionSpec())
        return jax.ShapeDtypeStruct(shape, dtype, sharding=replicated)

    def _abstract_cache(self, num_blocks: int) -> KVCache:
        cache = jax.eval_shape(partial(self._new_cache, num_blocks=num_blocks))
        sharding = pool_sharding(self.mesh)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), cache)

    # The traced functions -----------------------------------------------------------------------------------------

    def _merge(self, weights: list[Array]) -> Any:
        return nnx.merge(self._graphdef, jax.tree.unflatten(self._weights_tree, weights))

    def _forward(
        self, bucket: Bucket, weights: list[Array], cache: KVCache, packed: Int[Array, " size"]
    ) -> ForwardResult:
        inputs = unpack(packed, bucket, self.max_blocks)
        model = self._merge(weights)
        attend = PagedAttend(cache, inputs, self.config.attention_implementation)
        hidden = model(inputs.token_ids, inputs.positions, inputs.prompt_lens, attend)
        return ForwardResult(attend.cache, hidden, hidden[inputs.sample_tokens])

    def _sample(
        self, num_top: int, weights: list[Array], hidden: Float[Array, "rows hidden_size"], inputs: SampleInputs
    ) -> SampledTokens:
        model = self._merge(weights)
        return sample(model.logits(hidden), inputs, num_top=num_top)

    def _score(
        self,
        num_top: int,
        weights: list[Array],
        hidden: Float[Array, "tokens hidden_size"],
        rows: Int[Array, " score_rows"],
        targets: Int[Array, " score_rows"],
    ) -> Scores:
        model = self._merge(weights)
        return score(model.logits(hidden[rows]), targets, num_top=num_top)

    # A step -------------------------------------------------------------------------------------------------------

    def execute(self, plan: StepPlan) -> StepResult:
        """Run one step: copies, then the forward pass over all chunks, then the samples and scores."""
        if self.cache.pool.is_deleted():
            self.cache = self._allocate_cache()
        if plan.copies:
            self._copy(plan.copies)
        bucket = bucket_for(plan, self.buckets)
        packed = pack(plan, bucket, self.max_blocks, self.config.block_size)
        forward = self._program(("forward", bucket))(self._weights, self.cache, packed)
        self.cache = forward.cache
        num_samples = len(plan.samples)
        prompt_scores = tuple(self._score_prompt(plan, piece, forward.hidden) for piece in plan.prompt_scores)
        if num_samples == 0:
            return StepResult(np.zeros(0, np.int32), NO_SCORES, prompt_scores)
        num_top = MAX_LOGPROBS if any(s.params.logprobs for s in plan.samples) else 0
        inputs = make_sample_inputs(plan.samples, bucket.num_rows)
        key = ("sample", bucket.num_rows, len(inputs.bias_rows), len(inputs.seen_rows), num_top)
        sampled = self._program(key)(self._weights, forward.sample_hidden, inputs)
        token_ids, scores = jax.device_get((sampled.token_ids, sampled.scores))
        return StepResult(token_ids[:num_samples], _token_scores(scores, num_samples), prompt_scores)

    def forget_pool(self) -> None:
        """A step failed, and with it whatever the pool holds or will hold: the next step starts with an empty one."""
        if not self.cache.pool.is_deleted():
            self.cache.pool.delete()

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
    ) -> TokenScores:
        first = sum(len(chunk.token_ids) for chunk in plan.chunks[: piece.chunk])
        num_top = min(MAX_LOGPROBS, self.model_config.vocab_size) if piece.num_logprobs else 0
        program = self._program(("score", hidden.shape[0], num_top))
        parts = []
        for start in range(0, len(piece.target_ids), SCORE_ROWS):
            targets = piece.target_ids[start : start + SCORE_ROWS]
            rows, padded = np.zeros(SCORE_ROWS, np.int32), np.zeros(SCORE_ROWS, np.int32)
            rows[: len(targets)] = first + start + np.arange(len(targets))
            padded[: len(targets)] = targets
            scores = jax.device_get(program(self._weights, hidden, rows, padded))
            parts.append(_token_scores(scores, len(targets)))
        return TokenScores(
            logprobs=np.concatenate([p.logprobs for p in parts]),
            ranks=np.concatenate([p.ranks for p in parts]),
            top_ids=np.concatenate([p.top_ids for p in parts]),
            top_logprobs=np.concatenate([p.top_logprobs for p in parts]),
        )


def _empty_sample_inputs(rows: int, num_biases: int, num_seen: int) -> SampleInputs:
    """Inputs of the given sizes that ask for nothing: what a sampler is compiled for."""
    inputs = make_sample_inputs([], rows)
    flat = {field.name: getattr(inputs, field.name) for field in dataclasses.fields(inputs)}
    for name, value in flat.items():
        size = num_biases if name.startswith("bias") else num_seen if name.startswith("seen") else len(value)
        flat[name] = np.zeros(size, value.dtype)
    return SampleInputs(**flat)


def _token_scores(scores: Any, num_rows: int) -> TokenScores:
    """The first rows of a ``Scores`` fetched to the host."""
    return TokenScores(
        logprobs=scores.logprobs[:num_rows],
        ranks=scores.ranks[:num_rows],
        top_ids=scores.top_ids[:num_rows],
        top_logprobs=scores.top_logprobs[:num_rows],
    )
