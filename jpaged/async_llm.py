"""AsyncLLM: text generation in an event loop, over an engine that has a thread of its own."""

import asyncio
import dataclasses
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from time import monotonic
from typing import Any, Concatenate, Self
from uuid import uuid4

from jpaged.device.processes import LeadingRunner
from jpaged.engine.chat import ChatMessage, render_chat
from jpaged.engine.dispatcher import Dispatcher, Listener
from jpaged.engine.health import EngineDeadError, Health
from jpaged.engine.loop import Engine
from jpaged.engine.prompts import Prompt, TokensPrompt
from jpaged.engine.request_stream import MAX_UNREAD_TOKENS, RequestStream
from jpaged.engine.snapshot import EngineSnapshot, take_snapshot
from jpaged.engine.stats import EngineStats
from jpaged.engine.vllm_names import EngineArgs
from jpaged.llm import LLM, PinnedPrefix
from jpaged.request import RequestOutput, SamplingParams


def _arguments_of[**P](
    like: Callable[Concatenate[Any, P], None],
) -> Callable[[Any], Callable[Concatenate[Any, P], None]]:
    """Give a method the arguments of another one, for editors and ``help``."""

    def give(method: Any) -> Any:
        method.__wrapped__ = like
        return method

    return give


class AsyncLLM:
    """Generates text as ``LLM`` does, for the tasks of one event loop.

    >>> llm = AsyncLLM("path/to/checkpoint")  # doctest: +SKIP
    >>> async for output in llm.generate("def add(a, b):"):  # doctest: +SKIP
    ...     print(output.outputs[0].text)

    A thread owns the engine and computes all unfinished requests together. The methods are for the thread of the event
    loop, except ``health`` and ``latest_stats``. ``shutdown`` ends the thread, which otherwise keeps the model.

    Args:
        model, ...: all arguments of ``LLM``.

    Raises:
        ValueError: as ``LLM``.
    """

    @_arguments_of(LLM.__init__)
    def __init__(self, *args: Any, **settings: Any) -> None:
        self._serve(LLM(*args, **settings).hand_over())

    @classmethod
    def from_llm(cls, llm: LLM) -> Self:
        """Take over the engine of an LLM, which serves no longer.

        Raises:
            RuntimeError: another process decides, or the LLM has handed its engine over before.
        """
        self = cls.__new__(cls)
        self._serve(llm.hand_over())
        return self

    @classmethod
    def from_engine_args(cls, engine_args: EngineArgs) -> Self:
        """``AsyncLLM`` with the arguments of an ``EngineArgs``, by vLLM's name."""
        return cls(**engine_args.settings)

    def _serve(self, engine: Engine) -> None:
        self._engine = engine  # read only: its parts that never change
        self._reading = ThreadPoolExecutor(1, "jpaged-prompts")  # tokenises, which may take long
        self._dispatcher = Dispatcher(engine)
        self._thread = self._dispatcher.thread

    # Requests -----------------------------------------------------------------------------------------------------

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
    ) -> AsyncGenerator[RequestOutput]:
        """Complete a prompt, yielding the outputs that ``SamplingParams.output_kind`` asks for.

        Leaving the loop, or cancelling the task, aborts the request.

        Args:
            prompt, priority: as for ``LLM.generate``.
            sampling_params: None is as in ``LLM.generate``.
            request_id: unique among unfinished requests; None makes one.

        Raises:
            ValueError: an invalid prompt or parameter, or a ``request_id`` in use.
            EngineDeadError: the engine is shut down, or it ended with an error.
        """
        async with await self.open(prompt, sampling_params, request_id, priority=priority) as stream:
            async for output in stream:
                yield output

    async def open(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
        max_unread_tokens: int = MAX_UNREAD_TOKENS,
        arrived: float | None = None,
    ) -> RequestStream:
        """Queue a request. Returns once it is accepted, with the stream of its outputs, which has to be closed.

        Args:
            prompt, sampling_params, request_id, priority: as for ``generate``.
            max_unread_tokens: a consumer that leaves more tokens unread gets an end with ``FinishReason.ABORT``.
            arrived: when the request was made, of ``time.monotonic``; None is now.

        Raises:
            ValueError: as ``generate``.
            EngineDeadError: as ``generate``.
        """
        arrived = monotonic() if arrived is None else arrived
        request_id = f"request-{uuid4().hex}" if request_id is None else request_id
        if not isinstance(request_id, str) or not request_id:
            raise ValueError(f"request_id={request_id!r} is not valid: expected a non-empty string")
        with self._dispatcher.reserve(request_id) as loop:
            read = self._engine.prompts.read
            request = await loop.run_in_executor(self._reading, read, request_id, prompt, sampling_params, priority)
            return await self._dispatcher.add(dataclasses.replace(request, arrived=arrived), max_unread_tokens)

    async def abort(self, request_id: str | Iterable[str]) -> bool:
        """End requests: their streams get a last output, with ``FinishReason.ABORT``.

        Returns:
            Whether any of them was unfinished.
        """
        request_ids = [request_id] if isinstance(request_id, str) else list(request_id)
        aborts = [asyncio.wrap_future(self._thread.abort(each)) for each in request_ids]  # between the same two steps
        return any(await asyncio.gather(*aborts))

    # The engine ---------------------------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> Any:
        """The checkpoint's Hugging Face tokenizer; None if it has none."""
        return self._engine.tokenizer

    @property
    def max_model_len(self) -> int:
        """Most tokens of prompt and output of a sequence."""
        return self._engine.runner.max_model_len

    @property
    def engine(self) -> Engine:
        """The engine, for what never changes: ``config``, ``model_config``, ``prompts``. ``ask`` reads the rest."""
        return self._engine

    async def get_tokenizer(self) -> Any:
        """The tokenizer, by vLLM's name.

        Raises:
            ValueError: the model has none.
        """
        if self.tokenizer is None:
            raise ValueError("this model has no tokenizer")
        return self.tokenizer

    async def render_chat(self, messages: Sequence[ChatMessage], **options: Any) -> tuple[str, list[int]]:
        """The text and the token ids of a conversation, by the model's chat template; see ``render_chat``."""
        return await self.in_background(lambda: render_chat(self.tokenizer, messages, **options))

    async def in_background[T](self, work: Callable[[], T]) -> T:
        """Run work outside the event loop, one piece after the other: to tokenise, which may take long."""
        return await asyncio.get_running_loop().run_in_executor(self._reading, work)

    async def ask[T](self, question: Callable[[Engine], T]) -> T:
        """The answer of a function that reads the engine between two steps, in the engine's thread.

        Raises:
            EngineDeadError: the engine has ended.
        """
        return await asyncio.wrap_future(self._thread.call(question))

    async def stats(self) -> EngineStats:
        """The state of both pools, and counters since the start: see ``EngineStats``."""
        return await self.ask(lambda engine: engine.stats())

    @property
    def latest_stats(self) -> EngineStats:
        """The statistics of a moment ago: reading them waits for no step, even for one that hangs."""
        return self._thread.latest_stats

    async def snapshot(self) -> EngineSnapshot:
        """The use of every block, and the unfinished requests."""
        return await self.ask(take_snapshot)

    async def reset_prefix_cache(self) -> bool:
        """Forget the KV of earlier prompts; see ``LLM.reset_prefix_cache``."""
        return await self.ask(lambda engine: engine.reset_prefix_cache())

    async def pin_prefix(self, prefix: Prompt) -> PinnedPrefix:
        """Compute a prefix and keep its KV in the pool until ``unpin``; see ``LLM.pin_prefix``.

        Raises:
            ValueError: as ``LLM.pin_prefix``.
        """
        pin_id = f"pin {uuid4()}"
        read = await self.in_background(lambda: self._engine.prompts.read(pin_id, prefix, None, 0))
        tokens: TokensPrompt = {"prompt_token_ids": read.prompt_token_ids}
        if isinstance(prefix, Mapping) and (cache_salt := prefix.get("cache_salt")) is not None:
            tokens["cache_salt"] = cache_salt
        try:
            return PinnedPrefix(pin_id, await asyncio.wrap_future(self._thread.pin(pin_id, tokens)))
        except asyncio.CancelledError:
            self._thread.unpin(pin_id)
            raise

    async def unpin(self, pinned: PinnedPrefix) -> None:
        """Stop pinning a prefix.

        Raises:
            ValueError: the prefix is not pinned, or not any more.
        """
        await asyncio.wrap_future(self._thread.unpin(pinned.pin_id))

    def listen(self, listener: Listener) -> None:
        """Call ``listener`` in the event loop with the output of every step, before the consumers see it."""
        self._dispatcher.listeners.append(listener)

    # Life ---------------------------------------------------------------------------------------------------------

    def health(self) -> Health:
        """The health now; from any thread, without waiting."""
        return self._thread.health()

    async def check_health(self) -> None:
        """Return if requests get their tokens.

        Raises:
            EngineDeadError: the engine has ended, its step hangs, or steps fail one after the other.
        """
        health = self.health()
        if not health.is_healthy:
            raise EngineDeadError(f"the engine is {health.state}: {health.error or 'it serves no requests'}")

    @property
    def num_unfinished(self) -> int:
        """Requests whose streams have not ended."""
        return self._dispatcher.num_unfinished

    async def drain(self, deadline_s: float) -> None:
        """Take no more requests, finish those there are, and end the thread.

        Args:
            deadline_s: seconds until unfinished requests are aborted.
        """
        self._thread.close(deadline_s)
        await self._dispatcher.wait_for_the_end()
        self.shutdown()

    def shutdown(self) -> None:
        """Abort all requests and end the thread, after the step that runs."""
        self._thread.shutdown()
        self._reading.shutdown(wait=False)
        if isinstance(self._engine.runner, LeadingRunner):
            self._engine.runner.close()
