"""LLM: a checkpoint, an engine and the two ways to use it offline: whole batches, and streams."""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self
from uuid import uuid4

import jax
from flax import nnx
from tqdm import tqdm

from jpaged.config import EngineConfig
from jpaged.device.processes import LeadingRunner, agree, follow, open_channel
from jpaged.device.runner import ModelRunner, check_settings
from jpaged.device.step.compile_cache import enable_compile_cache
from jpaged.device.step.program_cache import SOURCE_DIGEST
from jpaged.device.target import target_of
from jpaged.engine.detokenizer import Tokenizer
from jpaged.engine.loop import Engine, EngineStats, Prompt, StepOutput
from jpaged.models import ModelConfig, import_transformers, load_config, load_model
from jpaged.request import BeamSearchParams, CompletionDelta, Request, RequestOutput, SamplingParams
from jpaged.sharding import make_mesh

DEMO_MODEL = Path(__file__).parent / "demo" / "model"
"""The small model that ships with the package."""


@dataclass(frozen=True, slots=True)
class PinnedPrefix:
    """A prefix that stays in the pool until ``LLM.unpin``.

    Args:
        pin_id: its name in the engine.
        num_tokens: its length.
    """

    pin_id: str
    num_tokens: int


class LLM:
    """Generates text with a Hugging Face checkpoint over a paged KV cache.

    >>> llm = LLM("path/to/checkpoint")  # doctest: +SKIP
    >>> [output] = llm.generate("def add(a, b):")  # doctest: +SKIP
    >>> output.outputs[0].text  # doctest: +SKIP

    Args:
        model: a checkpoint directory (config.json, *.safetensors, tokenizer); None is the small model in the package.
        dtype: of weights, activations and KV: "float32", "bfloat16", "float16", or "auto" (see ``EngineConfig``).
        kv_cache_dtype: "auto" stores K and V in ``dtype``; "fp8" and "int8" in half as many bytes (``EngineConfig``).
        block_size: tokens per KV block.
        num_blocks: blocks in the pool; None takes what ``memory_fraction`` leaves.
        memory_fraction: of the device's memory, for weights, workspace and pool together. On a GPU, of what JAX may
            take: three quarters, unless XLA_PYTHON_CLIENT_MEM_FRACTION is set (the command line sets it to 0.95).
        max_num_seqs: sequences in one step at most.
        max_num_batched_tokens: tokens in one step at most; longer prompts are computed in chunks.
        max_model_len: tokens a sequence may reach; None is the checkpoint's own limit, or what the pool holds if less.
        enable_prefix_caching: share the KV of equal prompt prefixes across requests.
        max_burst: decode steps that may run in a row before the host sees their tokens, while nobody could be admitted;
            streams get their tokens in groups of as many. None is 4 on an accelerator and 1 on a CPU.
        preemption: what becomes of a request that has to make way: "swap" moves its KV to the host pool, "recompute"
            computes it again, "auto" does what is cheaper on this machine.
        num_host_blocks: blocks of the host pool, in pinned memory: for preempted requests, and for cached prefixes that
            the device has no room for. None: as many as ``host_memory_bytes`` hold.
        host_memory_bytes: None is 4 GiB on an accelerator, and nothing on a CPU, where all memory is the host's.
        seed: of the seeds drawn for requests without one.
        tensor_parallel_size: devices the model and its KV heads are spread over.
        attention_implementation: a name from ``pallas_kernels``; None takes the best one for the device.
        interpret: run the kernels of the implementation named in Pallas's interpreter, on any device and slowly.
        warm_up: compile every program now, behind a progress bar; otherwise each when it is first needed. None: now on
            an accelerator, later on a CPU.
        use_tqdm: show progress while loading and compiling.

    Raises:
        ValueError: a setting out of range, a directory that is no checkpoint, an architecture jpaged does not have, or
            a model that leaves no memory for a KV cache.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        dtype: str = "auto",
        kv_cache_dtype: str = "auto",
        block_size: int = 16,
        num_blocks: int | None = None,
        memory_fraction: float = 0.9,
        max_num_seqs: int = 256,
        max_num_batched_tokens: int | None = None,
        max_model_len: int | None = None,
        enable_prefix_caching: bool = True,
        max_burst: int | None = None,
        preemption: str = "auto",
        num_host_blocks: int | None = None,
        host_memory_bytes: int | None = None,
        seed: int = 0,
        tensor_parallel_size: int = 1,
        attention_implementation: str | None = None,
        interpret: bool = False,
        warm_up: bool | None = None,
        use_tqdm: bool = True,
    ):
        config = EngineConfig(
            dtype=dtype,
            kv_cache_dtype=kv_cache_dtype,
            block_size=block_size,
            num_blocks=num_blocks,
            memory_fraction=memory_fraction,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=max_model_len,
            enable_prefix_caching=enable_prefix_caching,
            max_burst=max_burst,
            preemption=preemption,
            num_host_blocks=num_host_blocks,
            host_memory_bytes=host_memory_bytes,
            seed=seed,
            tensor_parallel_size=tensor_parallel_size,
            attention_implementation=attention_implementation,
            interpret=interpret,
        )
        path = DEMO_MODEL if model is None else Path(model)
        model_config = load_config(path)
        check_settings(model_config, config)
        tokenizer = _load_tokenizer(path)
        mesh = make_mesh(tensor_parallel_size)
        use_tqdm = use_tqdm and jax.process_index() == 0
        weights_dtype = target_of(mesh).resolve_dtype(dtype, model_config.dtype)
        load = partial(load_model, path, model_config, weights_dtype, mesh, use_tqdm=use_tqdm)
        self._start(load, model_config, config, mesh, tokenizer, warm_up=warm_up, use_tqdm=use_tqdm)

    @classmethod
    def from_model(
        cls,
        model: nnx.Module,
        model_config: ModelConfig,
        config: EngineConfig | None = None,
        *,
        tokenizer: Tokenizer | None = None,
        mesh: jax.sharding.Mesh | None = None,
        warm_up: bool | None = None,
        use_tqdm: bool = True,
    ) -> Self:
        """An LLM over a model already in memory, such as ``jpaged.models.random_model``; ``mesh`` holds its weights."""
        self = cls.__new__(cls)
        config = config or EngineConfig()
        mesh = mesh or make_mesh(config.tensor_parallel_size)
        clone = partial(nnx.clone, model)  # the runner joins its projections
        self._start(clone, model_config, config, mesh, tokenizer, warm_up=warm_up, use_tqdm=use_tqdm)
        return self

    @classmethod
    def from_engine(cls, engine: Engine) -> Self:
        """An LLM over an engine: one with other settings, say, over a runner whose programs are compiled already.

        Engines over one runner write to the same pools: once a newer one has run, none of the older may.
        """
        self = cls.__new__(cls)
        self._serve(engine)
        return self

    def _start(
        self,
        load: Callable[[], Any],
        model_config: ModelConfig,
        config: EngineConfig,
        mesh: jax.sharding.Mesh,
        tokenizer: Tokenizer | None,
        *,
        warm_up: bool | None,
        use_tqdm: bool,
    ) -> None:
        enable_compile_cache()
        if warm_up is None:
            warm_up = target_of(mesh).warms_up
        channel = open_channel(mesh)
        if channel is None:
            runner = ModelRunner(load(), model_config, config, mesh, warm_up=warm_up, use_tqdm=use_tqdm)
            self._serve(Engine(runner, config, tokenizer))
            return
        options = {"channel": channel, "warm_up": warm_up, "use_tqdm": use_tqdm}
        try:
            agree(channel, code=SOURCE_DIGEST, config=config, model_config=model_config)
            if channel.is_leader:
                self._serve(Engine(LeadingRunner(load(), model_config, config, mesh, **options), config, tokenizer))
            else:
                self._engine = None
                self._followed = partial(follow, ModelRunner(load(), model_config, config, mesh, **options), channel)
        except BaseException:
            channel.close()  # or the others would wait
            raise

    def _serve(self, engine: Engine) -> None:
        self._engine = engine
        self._num_requests = 0
        self._awaited: set[str] = set()
        self._finished: dict[str, RequestOutput] = {}  # of the awaited ones
        self._streams: dict[str, deque[CompletionDelta]] = {}

    # Several processes --------------------------------------------------------------------------------------------

    @property
    def is_leader(self) -> bool:
        """Whether this process decides: process 0 of several (``jax.distributed``) that share a model, or the only one.

        All others call ``follow``, and nothing else.
        """
        return self._engine is not None

    def follow(self) -> None:
        """Do what the leading process decides, until it closes its LLM or ends.

        Raises:
            RuntimeError: this process leads.
            EOFError: the leading process was cut short.
        """
        if self._engine is not None:
            raise RuntimeError("this process leads: only the others follow")
        self._followed()

    def close(self) -> None:
        """Let the processes that follow go on; the LLM is of no more use then. The end of this process does it too."""
        if self._engine is not None and isinstance(self._engine.runner, LeadingRunner):
            self._engine.runner.close()

    @property
    def engine(self) -> Engine:
        """What serves the requests.

        Raises:
            RuntimeError: in a process that follows.
        """
        if self._engine is None:
            raise RuntimeError(f"process {jax.process_index()} follows process 0, which decides: call follow()")
        return self._engine

    @property
    def tokenizer(self) -> Any:
        """The checkpoint's Hugging Face tokenizer; None if it has none."""
        return self.engine.tokenizer

    @property
    def max_model_len(self) -> int:
        """Tokens of prompt and output one sequence may reach."""
        return self.engine.runner.max_model_len

    # Use ----------------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: int | Sequence[int] = 0,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Complete every prompt, all of them batched together.

        Args:
            prompts: strings, ``{"prompt": ...}`` or ``{"prompt_token_ids": [...]}``, one or many. With a "cache_salt"
                a prompt shares cached KV only with prompts of the same salt.
            sampling_params: one for all prompts, or one each; None is ``SamplingParams()``.
            priority: one for all prompts, or one each: lower is served first and preempted last.
            use_tqdm: show progress, with the rate of tokens.

        Returns:
            One result per prompt, in order.

        Raises:
            ValueError: any prompt or parameter is invalid. Raised before anything runs, whichever prompt it is.
        """
        requests = self._make_requests(prompts, sampling_params, priority)
        self._awaited |= {request.request_id for request in requests}
        try:
            for request in requests:
                self.engine.add(request, is_streamed=False)
            self._run(requests, use_tqdm=use_tqdm)
            return [self._finished[request.request_id] for request in requests]
        finally:
            self._abandon(requests)

    def beam_search(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: BeamSearchParams | Sequence[BeamSearchParams],
        *,
        priority: int | Sequence[int] = 0,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Search for the most probable completions of every prompt, all searches batched together.

        Args:
            prompts: as of ``generate``.
            params: one for all prompts, or one each.
            priority: as of ``generate``.
            use_tqdm: show progress, with the rate of tokens.

        Returns:
            One result per prompt, in order: ``outputs`` are the ``beam_width`` best sequences, best first, each with
            its ``score``.

        Raises:
            ValueError: as ``generate``.
        """
        many = [params] if isinstance(params, BeamSearchParams) else params
        if not isinstance(many, list | tuple) or not all(isinstance(one, BeamSearchParams) for one in many):
            raise ValueError(f"params={params!r} is not valid: expected BeamSearchParams or a list of them")
        each = [one.to_sampling_params() for one in many]
        sampling = each[0] if isinstance(params, BeamSearchParams) else each
        return self.generate(prompts, sampling, priority=priority, use_tqdm=use_tqdm)

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: int | Sequence[int] = 0,
    ) -> Generator[CompletionDelta]:
        """Complete prompts, yielding what each completion gains as soon as it is there (see ``max_burst``).

        Beam searches, and ``best_of`` above ``n``, yield their results in the end, one delta each.
        Closing the iterator aborts what is left. Several streams may be read in turns: they share every step.

        Raises:
            ValueError: as ``generate``, when called; when first read only if a prefix pinned since took the room.
        """
        requests = self._make_requests(prompts, sampling_params, priority)
        return self._stream(requests)

    def abort(self, request_id: str) -> bool:
        """End a request of a stream: it yields a last delta for each completion, its reason ABORT.

        Returns:
            False if the request is unknown or has finished.
        """
        is_aborted = self.engine.abort(request_id)
        self._deliver(self.engine.take())
        return is_aborted

    def pin_prefix(self, prefix: Prompt) -> PinnedPrefix:
        """Compute a prefix now and keep its KV in the pool until ``unpin``: prompts that begin with it find it there.

        Args:
            prefix: text, or ``{"prompt_token_ids": [...]}``; "cache_salt" as of ``generate``.

        Raises:
            ValueError: not a valid prompt, or it leaves too little room for requests under way.
        """
        pin_id = f"pin {uuid4()}"  # no other LLM's handle is taken for it
        try:
            token_ids = self.engine.pin(pin_id, prefix)
            while not self.engine.is_pinned(pin_id):
                self._deliver(self.engine.step())
        except BaseException:
            with suppress(ValueError):  # it was refused
                self.engine.unpin(pin_id)
            raise
        return PinnedPrefix(pin_id, len(token_ids))

    def unpin(self, pinned: PinnedPrefix) -> None:
        """Let a pinned prefix go: its blocks stay in the prefix cache like any others, until they are reused.

        Raises:
            ValueError: it is not pinned, or not any more.
        """
        if not isinstance(pinned, PinnedPrefix):
            raise ValueError(f"{pinned!r} is not valid: expected what pin_prefix returned")
        self.engine.unpin(pinned.pin_id)

    def stats(self) -> EngineStats:
        """The state of both pools, and counters since the start: see ``EngineStats``."""
        return self.engine.stats()

    # Inside -------------------------------------------------------------------------------------------------------

    def _make_requests(self, prompts: Any, sampling_params: Any, priority: Any) -> list[Request]:
        if isinstance(prompts, str | Mapping):
            prompts = [prompts]
        if not isinstance(prompts, Iterable):
            raise ValueError(f"prompts={prompts!r} is not valid: expected a prompt or a list of prompts")
        prompts = list(prompts)
        if sampling_params is None or isinstance(sampling_params, SamplingParams):
            sampling_params = [sampling_params] * len(prompts)
        if isinstance(sampling_params, str | Mapping) or not isinstance(sampling_params, Sequence):
            raise ValueError(
                f"sampling_params={sampling_params!r} is not valid: expected SamplingParams or a list of them"
            )
        if len(sampling_params) != len(prompts):
            raise ValueError(
                f"{len(sampling_params)} sampling_params for {len(prompts)} prompts: give one for all, or one each"
            )
        priority = 0 if priority is None else priority
        priorities = priority if isinstance(priority, list | tuple) else [priority] * len(prompts)
        if len(priorities) != len(prompts):
            raise ValueError(f"{len(priorities)} priorities for {len(prompts)} prompts: give one for all, or one each")
        requests = []
        for i, (prompt, params, rank) in enumerate(zip(prompts, sampling_params, priorities, strict=True)):
            try:
                requests.append(self.engine.make_request(str(self._num_requests + i), prompt, params, rank))
            except ValueError as error:
                where = f"prompt {i}: " if len(prompts) > 1 else ""
                raise ValueError(f"{where}{error}") from None
        self._num_requests += len(requests)
        return requests

    def _run(self, requests: list[Request], *, use_tqdm: bool) -> None:
        """Step until all ``requests`` have finished."""
        waiting = {request.request_id for request in requests}
        num_before = self.engine.num_output_tokens
        with tqdm(total=len(requests), desc="Generating", unit="request", disable=not use_tqdm) as bar:
            while waiting:
                num_waiting = len(waiting)
                if self._step().finished:
                    waiting -= self._finished.keys()
                bar.update(num_waiting - len(waiting))
                if use_tqdm:
                    num_tokens = self.engine.num_output_tokens - num_before
                    rate = num_tokens / max(bar.format_dict["elapsed"], 1e-9)
                    bar.set_postfix_str(f"{rate:.0f} tokens/s", refresh=False)

    def _stream(self, requests: list[Request]) -> Generator[CompletionDelta]:
        deltas: deque[CompletionDelta] = deque()
        self._awaited |= {request.request_id for request in requests}
        try:
            for request in requests:
                self.engine.add(request)
                self._streams[request.request_id] = deltas
            while True:
                while deltas:
                    yield deltas.popleft()
                if all(request.request_id in self._finished for request in requests):
                    return
                self._step()
        finally:
            self._abandon(requests)

    def _step(self) -> StepOutput:
        """One step of the engine, its output put where its readers look."""
        output = self.engine.step()
        if not (output.deltas or output.finished or self.engine.has_unfinished):
            raise RuntimeError("a request was dropped after an error and will never finish")
        self._deliver(output)
        return output

    def _deliver(self, output: StepOutput) -> None:
        for delta in output.deltas:
            stream = self._streams.get(delta.request_id)
            if stream is not None:
                stream.append(delta)
        self._finished |= {r.request_id: r for r in output.finished if r.request_id in self._awaited}

    def _abandon(self, requests: list[Request]) -> None:
        """Leave no trace of ``requests``, finished or not."""
        for request in requests:
            self._awaited.discard(request.request_id)
            self.engine.forget(request.request_id)
            self._finished.pop(request.request_id, None)
            self._streams.pop(request.request_id, None)


def _load_tokenizer(path: Path) -> Any:
    """The checkpoint's tokenizer; None if the directory has none."""
    if not any((path / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        return None
    tokenizers = import_transformers().AutoTokenizer
    try:
        return tokenizers.from_pretrained(
            str(path),
            local_files_only=True,
            trust_remote_code=False,
            clean_up_tokenization_spaces=False,
            model_max_length=2**31,  # the engine says itself what is too long
        )
    except Exception as error:  # whatever the many libraries behind it raise
        raise ValueError(
            f"the tokenizer in {path} cannot be loaded ({type(error).__name__}: {error}): download its files again, or "
            "convert it to a tokenizer.json"
        ) from error
