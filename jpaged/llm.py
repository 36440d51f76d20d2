"""LLM: text generation from Python, in whole batches and in streams."""

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self
from uuid import uuid4

import jax
from flax import nnx

from jpaged.config import EngineConfig, warm_up_word
from jpaged.engine.chat import ChatMessage, render_chats
from jpaged.engine.detokenizer import Tokenizer
from jpaged.engine.inbox import Inbox
from jpaged.engine.loading import Follow, load_checkpoint, module_loader, start_engine
from jpaged.engine.loop import Engine
from jpaged.engine.progress import run_with_bar
from jpaged.engine.prompts import Prompt, as_sampling_params
from jpaged.engine.stats import EngineStats, Metric, metrics_of
from jpaged.engine.tokenizers import load_tokenizer
from jpaged.engine.vllm_names import takes_vllm_names
from jpaged.models import ModelConfig
from jpaged.models.checkpoint.hub import TOKENIZER_FILES, find_checkpoint
from jpaged.request import BeamSearchParams, CompletionDelta, RequestOutput, SamplingParams
from jpaged.rules import describe, settings_of
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
    >>> llm.generate("def add(a, b):")[0].outputs[0].text  # doctest: +SKIP

    Its methods may be called from several threads, which share the steps of the engine. ``jpaged/docs/from-vllm.md``
    lists the arguments of vLLM's LLM that are taken too.

    Args:
        model: a checkpoint directory (config.json, *.safetensors, tokenizer), or a repository of Hugging Face's hub,
            ORG/NAME or ORG/NAME@REVISION; None is the small model in the package.
        tokenizer: the directory or repository of a tokenizer other than the checkpoint's.
        warm_up: sizes of steps to compile now: "all"; "first", a few, and the others in the background; "none", each
            when needed; "auto", "first" or on a CPU "none". True, False and None stand for all, none and auto.
        use_tqdm: whether to show progress while downloading, loading and compiling.

    Raises:
        ValueError: a setting out of range, no checkpoint, an unknown architecture, or no memory for a KV cache.
    """

    @takes_vllm_names
    def __init__(
        self,
        model: str | Path | None = None,
        *,
        tokenizer: str | Path | None = None,
        dtype: str = "auto",
        kv_cache_dtype: str = "auto",
        block_size: int = 16,
        num_blocks: int | None = None,
        memory_fraction: float = 0.9,
        max_num_seqs: int | None = None,
        max_num_batched_tokens: int | None = None,
        max_inter_token_ms: float | None = None,
        max_model_len: int | None = None,
        enable_prefix_caching: bool = True,
        max_burst: int | None = None,
        preemption: str = "auto",
        num_host_blocks: int | None = None,
        host_memory_bytes: int | None = None,
        kv_placement: str = "device",
        offload_cache: str = "auto",
        offload_dtype: str = "auto",
        weight_placement: str = "device",
        generation_config: str = "auto",
        seed: int = 0,
        tensor_parallel_size: int = 1,
        attention_implementation: str | None = None,
        interpret: bool = False,
        warm_up: str | bool | None = "auto",
        use_tqdm: bool = True,
    ):
        config = _config_of(locals())
        shows = use_tqdm and jax.process_index() == 0
        source = _directory_of(model, shows), config, None if tokenizer is None else _load_tokenizer(tokenizer, shows)
        self._serve(load_checkpoint(*source, warm_up=warm_up, use_tqdm=use_tqdm))

    @classmethod
    def from_model(
        cls,
        model: nnx.Module,
        model_config: ModelConfig,
        config: EngineConfig | None = None,
        *,
        tokenizer: Tokenizer | None = None,
        mesh: jax.sharding.Mesh | None = None,
        warm_up: str | bool | None = "auto",
        use_tqdm: bool = True,
    ) -> Self:
        """Serve a module that is in memory (``jpaged/docs/models.md`` has an example).

        The LLM keeps a copy of the module, which shares its weights.

        Args:
            model: a ``flax.nnx.Module`` that keeps the contract of ``jpaged.models.CausalLM``: a call that returns
                hidden states, and ``logits``.
            model_config: its shape: a ``ModelConfig`` made by hand, or of a subclass.
            config: the engine's settings; its dtype is "auto" or that of the weights.
            tokenizer: has ``encode`` and ``decode`` as a Hugging Face tokenizer; None serves token ids only.
            mesh: the devices, with one axis "tensor", where weights are moved to; None makes one by ``config``.
            warm_up, use_tqdm: as for ``LLM``.

        Raises:
            ValueError: the module breaks the contract, or disagrees with ``model_config``, ``config`` or ``mesh``.
        """
        self = cls.__new__(cls)
        config = config or EngineConfig()
        mesh = mesh or make_mesh(config.tensor_parallel_size)
        load = module_loader(model, model_config, config, mesh)
        del model  # or the weights that the runner joins would exist twice
        self._serve(start_engine(load, model_config, config, mesh, tokenizer, warm_up=warm_up, use_tqdm=use_tqdm))
        return self

    @classmethod
    def from_engine(cls, engine: Engine) -> Self:
        """An LLM over an engine. Engines over one runner write to the same pools: only the newest may run."""
        self = cls.__new__(cls)
        self._serve(engine)
        return self

    def _serve(self, engine: Engine | Follow) -> None:
        self._inbox = Inbox(engine) if isinstance(engine, Engine) else None
        self._follow = None if isinstance(engine, Engine) else engine

    @property
    def is_leader(self) -> bool:
        """Whether this process decides: process 0 of several (``jax.distributed``). The others call ``follow``."""
        return self._inbox is not None

    def follow(self) -> None:
        """Do what the leading process decides, until it closes its LLM or ends.

        Raises RuntimeError if this process leads, and OSError if the leading process was cut short.
        """
        if self._follow is None:
            raise RuntimeError("this process leads: only the others follow")
        self._follow()

    def close(self) -> None:
        """Let the processes that follow go on, and use this LLM no more. The end of this process does it too."""
        if self._inbox is not None:
            with self._inbox.between_steps() as engine:
                engine.close()

    def hand_over(self) -> Engine:
        """Give the engine to another owner, as ``AsyncLLM``; this LLM serves no longer."""
        if len(self.inbox):
            raise RuntimeError(f"{len(self.inbox)} requests are unfinished: read or close their streams first")
        engine, self._inbox = self.inbox.engine, None
        return engine

    @property
    def inbox(self) -> Inbox:
        """The unfinished requests, and their callers. RuntimeError in a process that follows, or without an engine."""
        if self._inbox is None and self._follow is None:
            raise RuntimeError("this LLM has handed its engine over, and serves no longer")
        if self._inbox is None:
            raise RuntimeError(f"process {jax.process_index()} follows process 0, which decides: call follow()")
        return self._inbox

    @property
    def engine(self) -> Engine:
        """The engine that serves the requests: for one thread, unlike the methods of an LLM."""
        return self.inbox.engine

    @property
    def tokenizer(self) -> Any:
        """The checkpoint's Hugging Face tokenizer; None if it has none."""
        return self.engine.tokenizer

    @property
    def max_model_len(self) -> int:
        """Most tokens of prompt and output of a sequence."""
        return self.engine.runner.max_model_len

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
            sampling_params: one for all prompts, or one each; None is ``get_default_sampling_params()``.
            priority: one for all prompts, or one each: lower is served first and preempted last.
            use_tqdm: whether to show progress, with the rate of tokens.

        Returns:
            One result per prompt, in order.

        Raises:
            ValueError: any prompt or parameter is invalid. Raised before anything runs, whichever prompt it is.
        """
        inbox = self.inbox
        with inbox.expecting(
            lambda engine: engine.make_requests(prompts, sampling_params, priority), is_streamed=False
        ) as mailbox:
            if use_tqdm:
                run_with_bar(inbox, mailbox)
            else:
                inbox.run_until(mailbox.is_complete)
            return mailbox.outputs()

    def chat(
        self,
        messages: Sequence[ChatMessage] | Sequence[Sequence[ChatMessage]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        **options: Any,
    ) -> list[RequestOutput]:
        """Answer one conversation or many, in the words of the model's chat template.

        Args:
            messages: ``{"role": ..., "content": ...}`` of a conversation in order, or a list of such conversations.
            sampling_params, use_tqdm: as for ``generate``.
            options: those of ``jpaged.engine.chat.chat_text``, as ``add_generation_prompt`` and ``tools``.

        Returns, Raises: as ``generate``. A ValueError too without a chat template, or if it refuses the messages.
        """
        texts, prompts = render_chats(self.tokenizer, messages, **options)
        outputs = self.generate(prompts, sampling_params, use_tqdm=use_tqdm)
        return [replace(output, prompt=text) for output, text in zip(outputs, texts, strict=True)]

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
            prompts, priority, use_tqdm: as for ``generate``.
            params: one for all prompts, or one each.

        Returns, Raises: as ``generate``. The ``outputs`` of a result are its ``beam_width`` best sequences, best first.
        """
        return self.generate(prompts, as_sampling_params(params), priority=priority, use_tqdm=use_tqdm)

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: int | Sequence[int] = 0,
    ) -> Generator[CompletionDelta]:
        """Complete prompts, yielding the new text and tokens of each completion after every step (see ``max_burst``).

        Beam searches, and ``best_of`` above ``n``, yield their results in the end, one delta each. Closing the iterator
        aborts the unfinished requests. Several streams may be read in turns: they share every step.

        Raises:
            ValueError: as for ``generate``, when called; when first read, if a prefix pinned since took the capacity.
        """
        with self.inbox.between_steps() as engine:
            requests = engine.make_requests(prompts, sampling_params, priority)
        return self.inbox.stream(requests)

    def abort(self, request_id: str) -> bool:
        """End a request of a stream, which yields a last delta for each completion, with the reason ABORT.

        Returns:
            False if the request is unknown or has finished.
        """
        with self.inbox.between_steps() as engine:
            return engine.abort(request_id)

    def pin_prefix(self, prefix: Prompt) -> PinnedPrefix:
        """Compute a prefix now and keep its KV in the pool until ``unpin``: prompts that begin with it find it there.

        Args:
            prefix: text, or ``{"prompt_token_ids": [...]}``; "cache_salt" as for ``generate``.

        Raises:
            ValueError: not a valid prompt, or the pool is too small for it beside the unfinished requests.
        """
        pin_id = f"pin {uuid4()}"
        return PinnedPrefix(pin_id, self.inbox.pin(pin_id, prefix))

    def unpin(self, pinned: PinnedPrefix) -> None:
        """Stop pinning a prefix: its blocks stay in the prefix cache like any others, until they are reused.

        Raises:
            ValueError: the prefix is not pinned, or not any more.
        """
        if not isinstance(pinned, PinnedPrefix):
            raise ValueError(f"{pinned!r} is not valid: expected what pin_prefix returned")
        with self.inbox.between_steps() as engine:
            engine.unpin(pinned.pin_id)

    def reset_prefix_cache(self) -> bool:
        """Forget the KV of earlier prompts. False, without effect, while requests run or prefixes are pinned."""
        with self.inbox.between_steps() as engine:
            return engine.reset_prefix_cache()

    def get_tokenizer(self) -> Any:
        """``tokenizer``, by vLLM's name."""
        return self.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """The parameters of a call without any, by vLLM's name: see ``generation_config``."""
        return self.engine.default_params

    def get_metrics(self) -> list[Metric]:
        """``stats`` as vLLM's list of metrics, under its names where it has them."""
        return metrics_of(self.stats())

    def stats(self) -> EngineStats:
        """The state of both pools, and counters since the start: see ``EngineStats``."""
        with self.inbox.between_steps() as engine:
            return engine.stats()


LLM.__doc__ = describe(LLM.__doc__, EngineConfig)


def _config_of(given: Mapping[str, Any]) -> EngineConfig:
    """The settings of the engine among the arguments of an LLM. All of these are checked before anything is loaded."""
    warm_up_word(given["warm_up"])
    return EngineConfig(**{name: given[name] for name in settings_of(EngineConfig)})


def _directory_of(model: object, use_tqdm: bool) -> Path:
    """The checkpoint directory that an LLM is made of. Raises ValueError for anything that names no checkpoint."""
    if model is not None and not isinstance(model, str | Path):
        raise ValueError(
            f"model is a {type(model).__name__}: expected a checkpoint directory or ORG/NAME; "
            "LLM.from_model(model, model_config) serves a module in memory"
        )
    return DEMO_MODEL if model is None else find_checkpoint(model, use_tqdm=use_tqdm)


def _load_tokenizer(source: str | Path, use_tqdm: bool = False) -> Tokenizer:
    """The tokenizer of a directory or a repository that a caller named. Raises ValueError if it has none."""
    tokenizer = load_tokenizer(find_checkpoint(source, files=TOKENIZER_FILES, use_tqdm=use_tqdm))
    if tokenizer is None:
        raise ValueError(f"tokenizer={str(source)!r} is no directory with a tokenizer: give one, or None")
    return tokenizer
