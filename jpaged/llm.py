"""LLM: text generation from Python, in whole batches and in streams."""

from collections.abc import Generator, Sequence
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
from jpaged.device.processes import LeadingRunner
from jpaged.engine.detokenizer import Tokenizer
from jpaged.engine.inbox import Inbox, Mailbox
from jpaged.engine.loading import Follow, load_checkpoint, start_engine
from jpaged.engine.loop import Engine
from jpaged.engine.prompts import Prompt, pair_up
from jpaged.engine.stats import EngineStats
from jpaged.interrupts import InterruptsWait
from jpaged.models import ModelConfig
from jpaged.models.contract import check_model, place
from jpaged.request import BeamSearchParams, CompletionDelta, Request, RequestOutput, SamplingParams
from jpaged.rules import describe
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

    Its methods may be called from several threads, which share the steps of the engine.

    Args:
        model: a checkpoint directory (config.json, *.safetensors, tokenizer); None is the small model in the package.
        warm_up: whether to compile every program now, behind a progress bar; otherwise each is compiled when it is
            first needed. None: now on an accelerator, later on a CPU.
        use_tqdm: whether to show progress while loading and compiling.

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
        if model is not None and not isinstance(model, str | Path):
            raise ValueError(
                f"model is a {type(model).__name__}: expected a checkpoint directory; LLM.from_model(model, "
                "model_config) serves a module in memory"
            )
        path = DEMO_MODEL if model is None else Path(model)
        with InterruptsWait():
            self._serve(load_checkpoint(path, config, warm_up=warm_up, use_tqdm=use_tqdm))

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
        """Serve a model that is in memory: one's own, or one of ``jpaged.models``, such as ``random_model``.

        The LLM keeps a copy of the module, which shares its weights; the module itself is not changed.

        >>> class Net(nnx.Module):  # doctest: +SKIP
        ...     def __call__(self, token_ids, positions, prompt_lens, attend):  # -> hidden states [tokens, hidden_size]
        ...         ...  # each layer: attend(config.layer_specs[layer], q, k, v)
        ...     def logits(self, hidden): ...  # -> float32 [rows, vocab_size]
        >>> config = ModelConfig(  # doctest: +SKIP
        ...     vocab_size=32000, hidden_size=512, num_layers=8, num_heads=8, num_kv_heads=8, head_dim=64,
        ...     max_position_embeddings=2048, eos_token_ids=(2,),
        ... )
        >>> llm = LLM.from_model(Net(config, rngs=nnx.Rngs(0)), config, tokenizer=tokenizer)  # doctest: +SKIP

        Args:
            model: a ``flax.nnx.Module`` that keeps the contract of ``jpaged.models.CausalLM``.
            model_config: its shape: a ``ModelConfig``, or a subclass.
            config: the engine's settings; its dtype is "auto" or that of the weights.
            tokenizer: has ``encode`` and ``decode`` as a Hugging Face tokenizer; None serves token ids only.
            mesh: the devices, with one axis "tensor"; None makes a mesh of ``config.tensor_parallel_size`` devices.
                Weights that lie elsewhere are moved to it, replicated unless their metadata ``logical_axes`` says more.
            warm_up, use_tqdm: as for ``LLM``.

        Raises:
            ValueError: the module breaks the contract, or disagrees with ``model_config``, ``config`` or ``mesh``.
        """
        self = cls.__new__(cls)
        config = config or EngineConfig()
        mesh = mesh or make_mesh(config.tensor_parallel_size)
        check_model(model, model_config, config.dtype, mesh)
        load = partial(place, model, mesh)
        with InterruptsWait():
            self._serve(start_engine(load, model_config, config, mesh, tokenizer, warm_up=warm_up, use_tqdm=use_tqdm))
        return self

    @classmethod
    def from_engine(cls, engine: Engine) -> Self:
        """An LLM over an engine: one with other settings, say, over a runner whose programs are compiled already.

        Engines over one runner write to the same pools: once a newer one has run, none of the older may.
        """
        self = cls.__new__(cls)
        self._serve(engine)
        return self

    def _serve(self, engine: Engine | Follow) -> None:
        self._inbox = Inbox(engine) if isinstance(engine, Engine) else None
        self._follow = None if isinstance(engine, Engine) else engine
        self._num_requests = 0

    # Several processes --------------------------------------------------------------------------------------------

    @property
    def is_leader(self) -> bool:
        """Whether this process decides: process 0 of several (``jax.distributed``) that share a model, or the only one.

        All others call ``follow``, and nothing else.
        """
        return self._inbox is not None

    def follow(self) -> None:
        """Do what the leading process decides, until it closes its LLM or ends.

        Raises:
            RuntimeError: this process leads.
            EOFError: the leading process was cut short.
        """
        if self._follow is None:
            raise RuntimeError("this process leads: only the others follow")
        self._follow()

    def close(self) -> None:
        """Let the processes that follow go on, and use this LLM no more. The end of this process does it too."""
        if self._inbox is not None and isinstance(self.engine.runner, LeadingRunner):
            self.engine.runner.close()

    @property
    def inbox(self) -> Inbox:
        """The requests under way, and who waits for them.

        Raises:
            RuntimeError: in a process that follows.
        """
        if self._inbox is None:
            raise RuntimeError(f"process {jax.process_index()} follows process 0, which decides: call follow()")
        return self._inbox

    @property
    def engine(self) -> Engine:
        """The engine that serves the requests. It is for one thread; the methods of an LLM are for several.

        Raises:
            RuntimeError: in a process that follows.
        """
        return self.inbox.engine

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
        make_requests = partial(self._make_requests, prompts, sampling_params, priority)
        with self.inbox.expecting(make_requests, is_streamed=False) as mailbox:
            self._run(mailbox, use_tqdm=use_tqdm)
            return mailbox.outputs()

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
        with self.inbox.between_steps() as engine:
            requests = self._make_requests(prompts, sampling_params, priority, engine)
        return self._stream(requests)

    def abort(self, request_id: str) -> bool:
        """End a request of a stream: it yields a last delta for each completion, its reason ABORT.

        Returns:
            False if the request is unknown or has finished.
        """
        with self.inbox.between_steps() as engine:
            return engine.abort(request_id)

    def pin_prefix(self, prefix: Prompt) -> PinnedPrefix:
        """Compute a prefix now and keep its KV in the pool until ``unpin``: prompts that begin with it find it there.

        Args:
            prefix: text, or ``{"prompt_token_ids": [...]}``; "cache_salt" as of ``generate``.

        Raises:
            ValueError: not a valid prompt, or it leaves too little room for requests under way.
        """
        pin_id = f"pin {uuid4()}"  # no other LLM's handle is taken for it
        try:
            with self.inbox.between_steps() as engine:
                token_ids = engine.pin(pin_id, prefix)
            self.inbox.run_until(lambda: engine.is_pinned(pin_id))
        except BaseException:
            with suppress(ValueError), self.inbox.between_steps() as engine:  # it may have been refused
                engine.unpin(pin_id)
            raise
        return PinnedPrefix(pin_id, len(token_ids))

    def unpin(self, pinned: PinnedPrefix) -> None:
        """Let a pinned prefix go: its blocks stay in the prefix cache like any others, until they are reused.

        Raises:
            ValueError: it is not pinned, or not any more.
        """
        if not isinstance(pinned, PinnedPrefix):
            raise ValueError(f"{pinned!r} is not valid: expected what pin_prefix returned")
        with self.inbox.between_steps() as engine:
            engine.unpin(pinned.pin_id)

    def stats(self) -> EngineStats:
        """The state of both pools, and counters since the start: see ``EngineStats``."""
        with self.inbox.between_steps() as engine:
            return engine.stats()

    # Inside -------------------------------------------------------------------------------------------------------

    def _make_requests(self, prompts: Any, sampling_params: Any, priority: Any, engine: Engine) -> list[Request]:
        asked = pair_up(prompts, sampling_params, priority)
        requests = []
        for i, (prompt, params, rank) in enumerate(asked):
            try:
                requests.append(engine.make_request(str(self._num_requests + i), prompt, params, rank))
            except ValueError as error:
                where = f"prompt {i}: " if len(asked) > 1 else ""
                raise ValueError(f"{where}{error}") from None
        self._num_requests += len(requests)
        return requests

    def _run(self, mailbox: Mailbox, *, use_tqdm: bool) -> None:
        """Wait until the mailbox is complete, behind a progress bar."""
        if not use_tqdm:
            self.inbox.run_until(mailbox.is_complete)
            return
        num_before = self.engine.num_output_tokens
        with tqdm(total=len(mailbox.request_ids), desc="Generating", unit="request") as bar:

            def update() -> None:
                bar.update(len(mailbox.results) - bar.n)
                num_tokens = self.engine.num_output_tokens - num_before
                rate = num_tokens / max(bar.format_dict["elapsed"], 1e-9)
                bar.set_postfix_str(f"{rate:.0f} tokens/s", refresh=False)

            self.inbox.run_until(mailbox.is_complete, after_step=update)
            update()

    def _stream(self, requests: list[Request]) -> Generator[CompletionDelta]:
        with self.inbox.expecting(lambda engine: requests, is_streamed=True) as mailbox:
            while True:
                while mailbox.deltas:
                    yield mailbox.deltas.popleft()
                if mailbox.is_complete():
                    mailbox.outputs()  # raises the error of a request that failed
                    return
                self.inbox.run_until(lambda: bool(mailbox.deltas) or mailbox.is_complete())


LLM.__doc__ = describe(LLM.__doc__, EngineConfig)
