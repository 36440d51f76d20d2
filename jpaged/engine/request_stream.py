"""The outputs of one request in an event loop: what the engine brought, until its consumer reads it."""

import asyncio
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Self

from jpaged.request import (
    CompletionDelta,
    CompletionOutput,
    FinishReason,
    Logprob,
    Request,
    RequestOutput,
    RequestOutputKind,
)

MAX_UNREAD_TOKENS = 8192
"""Tokens that a consumer may leave unread before its request is aborted."""


@dataclass(slots=True)
class _Completion:
    """The tokens of one completion: of several deltas, or since the start."""

    text: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None

    def add(self, delta: CompletionDelta) -> None:
        self.text.append(delta.text)
        self.token_ids += delta.token_ids
        if delta.logprobs is not None:
            self.logprobs = [*(self.logprobs or ()), *delta.logprobs]
        self.finish_reason, self.stop_reason = delta.finish_reason, delta.stop_reason

    def output(self, index: int) -> CompletionOutput:
        chosen = zip(self.token_ids, self.logprobs or (), strict=False)
        return CompletionOutput(
            index=index,
            text="".join(self.text),
            token_ids=self.token_ids.copy(),
            cumulative_logprob=math.nan if self.logprobs is None else sum(each[t].logprob for t, each in chosen),
            logprobs=None if self.logprobs is None else self.logprobs.copy(),
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
        )


class RequestStream:
    """An async iterator over the outputs of a request, of the kind that its ``SamplingParams.output_kind`` says.

    Outputs that were not read are merged into the next one. Each has ``RequestOutput.has_more``, which only the last
    has not. ``cumulative_logprob`` of outputs before the last is NaN without ``logprobs``. Cancelling a read loses
    nothing. Used in the thread of its event loop alone.

    Args:
        request: the request.
        close: ends the request, by its id, when its consumer needs no more.
        max_unread_tokens: a consumer that leaves more tokens unread gets an end with ``FinishReason.ABORT``. One step
            may bring more, since no consumer can read in its middle.

    Attributes:
        max_unread_tokens: as given.
        num_cached_tokens: prompt tokens from the prefix cache; 0 before the first token.
        on_arrival: called when there is something to read, for a consumer that calls ``read_now``.
    """

    def __init__(self, request: Request, close: Callable[[str], None], max_unread_tokens: int) -> None:
        self.request_id = request.request_id
        self.prompt = request.prompt
        self.prompt_token_ids = request.prompt_token_ids
        self.num_cached_tokens = 0
        self.on_arrival: Callable[[], None] | None = None
        self._kind = request.params.output_kind
        self._close = close
        self.max_unread_tokens = max_unread_tokens
        self._completions = {index: _Completion() for index in range(request.params.n)}
        self._unread: list[CompletionDelta] = []
        self._num_unread_tokens = 0
        self._unread_since = 0  # the step of the first unread delta
        self._end: RequestOutput | BaseException | None = None  # not read
        self._is_over = False  # nothing is left to read
        self._reader: asyncio.Future[None] | None = None

    # For the consumer ---------------------------------------------------------------------------------------------

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> RequestOutput:
        """The next output.

        Raises:
            EngineDeadError: the engine has ended.
            RuntimeError: another task reads this stream.
        """
        while not self._unread and self._end is None:
            if self._is_over:
                raise StopAsyncIteration
            if self._reader is not None:
                raise RuntimeError(f"another task reads the outputs of request {self.request_id}: one at a time can")
            self._reader = asyncio.get_running_loop().create_future()
            try:
                await self._reader
            finally:
                self._reader = None
        return self._read()

    def read_now(self) -> tuple[list[CompletionDelta], RequestOutput | None]:
        """The deltas that were not read, and the result if it is there; without waiting.

        For a consumer of many streams, which has no use for a ``RequestOutput`` of every step.

        Raises:
            EngineDeadError: the engine has ended.
        """
        deltas, end = self._unread, self._end
        self._unread, self._end, self._num_unread_tokens = [], None, 0
        for delta in deltas:
            if delta.finish_reason is not None:
                self._completions[delta.index].finish_reason = delta.finish_reason
        if end is not None:
            self._is_over = True
        if isinstance(end, BaseException):
            raise end
        return deltas, end

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Need no more outputs: a request that is unfinished ends, and its blocks are free before the next step."""
        is_open = not self._is_over and self._end is None
        self._unread.clear()
        self._end, self._is_over = None, True
        self.wake()
        if is_open:
            self._close(self.request_id)

    def give_up(self, error: str) -> None:
        """End a request that is unfinished. Its consumer gets what it has not read, and ``FinishReason.ABORT``."""
        if not self._is_over and self._end is None:
            self.break_off(FinishReason.ABORT, error)
            self._close(self.request_id)

    def _read(self) -> RequestOutput:
        deltas, end = self._unread, self._end
        self._unread, self._end, self._num_unread_tokens = [], None, 0
        if end is not None:
            self._is_over = True
        if isinstance(end, BaseException):
            raise end
        if self._kind is RequestOutputKind.DELTA:
            new: dict[int, _Completion] = {}
            for delta in deltas:
                new.setdefault(delta.index, _Completion()).add(delta)
                self._completions[delta.index].finish_reason = delta.finish_reason
            outputs = [completion.output(index) for index, completion in sorted(new.items())]
            if end is not None:
                return replace(end, outputs=[_with_score(output, end) for output in outputs])
        else:
            if end is not None:
                return end
            for delta in deltas:
                self._completions[delta.index].add(delta)
            outputs = [completion.output(index) for index, completion in self._completions.items()]
        return self._output(outputs, has_more=True)

    def _output(
        self, outputs: list[CompletionOutput], *, has_more: bool = False, error: str | None = None
    ) -> RequestOutput:
        return RequestOutput(
            self.request_id,
            self.prompt,
            self.prompt_token_ids,
            outputs,
            num_cached_tokens=self.num_cached_tokens,
            error=error,
            has_more=has_more,
        )

    @property
    def goes_on(self) -> bool:
        """Whether neither an end nor an error was taken."""
        return self._end is None and not self._is_over

    @property
    def is_over(self) -> bool:
        """Whether nothing is left to read."""
        return self._is_over

    # For the hand-over --------------------------------------------------------------------------------------------

    def take(self, delta: CompletionDelta, step: int) -> bool:
        """Take a delta that step number ``step`` brought. The consumer learns of it with ``wake``.

        Returns:
            False if the consumer has left too much unread: the stream has ended then.
        """
        if not self._unread:
            self._unread_since = step
        self._unread.append(delta)
        self._num_unread_tokens += len(delta.token_ids)
        if self._num_unread_tokens <= self.max_unread_tokens or step == self._unread_since:
            return True
        self.break_off(
            FinishReason.ABORT,
            f"{self._num_unread_tokens} tokens were not read: at most {self.max_unread_tokens} wait",
        )
        return False

    def finish(self, end: RequestOutput | BaseException) -> None:
        """Take the result, or the error to raise."""
        self._end = end
        self.wake()

    def break_off(self, reason: FinishReason, error: str) -> None:
        """End without the engine's result: the completions stay as they are, unread tokens included."""
        for delta in self._unread:
            self._completions[delta.index].add(delta)
        for index, completion in self._completions.items():
            if completion.finish_reason is None:
                completion.finish_reason = reason
                self._unread.append(CompletionDelta(self.request_id, index, "", [], reason))
        outputs = [completion.output(index) for index, completion in self._completions.items()]
        self.finish(self._output(outputs, error=error))

    def wake(self) -> None:
        """Let the consumer read what was taken."""
        if self.on_arrival is not None:
            self.on_arrival()
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)


def _with_score(output: CompletionOutput, end: RequestOutput) -> CompletionOutput:
    """A last delta with the log-probability and the score of its whole completion."""
    whole = next((each for each in end.outputs if each.index == output.index), output)
    return replace(output, cumulative_logprob=whole.cumulative_logprob, score=whole.score)
