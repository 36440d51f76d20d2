"""Streamed responses: deltas of the engine to server-sent events, at a few microseconds each."""

import asyncio
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import orjson
from starlette.types import Send

from jpaged.engine.request_stream import RequestStream
from jpaged.request import CompletionDelta, ErrorCause, FinishReason, RequestOutput
from jpaged.server.connections import DirectBody
from jpaged.server.errors import CANCELLED_STATUS, ApiError
from jpaged.server.opening import Opening
from jpaged.server.protocol.results import usage, without_tokens

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"

_log = logging.getLogger(__name__)

_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",
}


class ChunkForm(Protocol):
    """The form of the events of one call.

    Attributes:
        chunk_head: the fields that all chunks have.
        text_frame: the JSON around the text of a choice: what comes before it, and what comes after.
        needs_choice: whether every choice has more than its text.
    """

    chunk_head: dict[str, Any]
    text_frame: tuple[bytes, bytes]
    needs_choice: bool

    def first_choices(self, number: int, index: int) -> list[dict[str, Any]]:
        """Choices that come before those of the first delta of choice ``index``, which is of prompt ``number``."""
        ...

    def choice(self, index: int, delta: CompletionDelta) -> dict[str, Any]:
        """The choice for a delta."""
        ...


class Pulse:
    """Looks at all open streams now and then, and lets those that were silent for long send a comment.

    Args:
        every_s: seconds of silence, of which a stream gets at most twice as many.
    """

    def __init__(self, every_s: float) -> None:
        self._every_s = every_s
        self._open: set[EventStream] = set()
        self._timer: asyncio.TimerHandle | None = None

    @contextmanager
    def watching(self, stream: "EventStream") -> Iterator[None]:
        """Look after a stream until the block is left."""
        self._open.add(stream)
        if self._timer is None:
            self._set_timer()
        try:
            yield
        finally:
            self._open.discard(stream)

    def _set_timer(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(self._every_s, self._beat)

    def _beat(self) -> None:
        self._timer = None
        for stream in self._open:
            stream.keep_alive(self._every_s)
        if self._open:
            self._set_timer()


class EventStream:
    """One streamed response.

    The response starts with its first event, so that an error before it has a status of its own.

    Args:
        send: takes ASGI's messages.
        headers: headers beside those of every stream.
        direct: writes events past ``send``; None where the server has nothing of the kind.
    """

    def __init__(self, send: Send, headers: dict[str, str], direct: DirectBody | None = None) -> None:
        self._send = send
        self._direct = direct
        self._headers = [(name.encode(), value.encode()) for name, value in (_HEADERS | headers).items()]
        self._loop = asyncio.get_running_loop()
        self._last_sent = self._loop.time()
        self._comment: asyncio.Task[None] | None = None  # is being sent
        self._is_sending = False
        self._has_started = False

    def keep_alive(self, after_s: float) -> None:
        """Send a comment if nothing was sent for ``after_s`` seconds."""
        if not self._is_sending and self._loop.time() - self._last_sent >= after_s:
            self._comment = asyncio.ensure_future(self._write(KEEP_ALIVE, more=True))

    @property
    def is_direct(self) -> bool:
        """Whether ``write_now`` can send: the response has started, nothing is being sent, and the peer reads."""
        direct = self._direct
        return direct is not None and self._comment is None and not self._is_sending and direct.is_ready

    def write_now(self, events: bytes) -> None:
        """Send events without waiting, while ``is_direct``."""
        assert self._direct is not None
        self._direct.write(events)
        self._last_sent = self._loop.time()

    async def write(self, events: bytes) -> None:
        """Send events."""
        await self._after_comment()
        await self._write(events, more=True)

    async def end(self, events: bytes) -> None:
        """Send the last events, and end the response."""
        await self._after_comment()
        await self._write(events, more=False)

    async def write_rest(self, events: bytes) -> None:
        """Send the events before an error, unless the error is to be the status of the response."""
        if self._has_started and events:
            await self.write(events)

    async def fail(self, error: ApiError) -> None:
        """End with an error: as a status if none was sent, otherwise as an event without ``[DONE]`` after it.

        Raises:
            ApiError: the error, if no status was sent.
        """
        await self._after_comment()
        if not self._has_started:
            raise error
        await self._write(b"data: " + error.body() + b"\n\n", more=False)

    async def _after_comment(self) -> None:
        if self._comment is not None:
            comment, self._comment = self._comment, None
            await comment

    async def _write(self, events: bytes, *, more: bool) -> None:
        self._is_sending = True
        try:
            if not self._has_started:
                self._has_started = True
                await self._send({"type": "http.response.start", "status": 200, "headers": self._headers})
            await self._send({"type": "http.response.body", "body": events, "more_body": more})
        finally:
            self._is_sending = False
            self._last_sent = self._loop.time()


class Reader:
    """Reads the streams of one call, as they open and have something to read.

    While a task waits in ``read``, deltas of a call of one prompt are sent as they arrive, and the task waits on.

    Args:
        opening: the streams.
        events: the response.
        encoder: makes events of deltas.
    """

    def __init__(self, opening: Opening, events: EventStream, encoder: "Encoder") -> None:
        self._events = events
        self._encoder = encoder
        self._is_single = len(opening) == 1
        self._streams: dict[int, RequestStream] = {}
        self._ready: dict[int, None] = {}
        self._error: BaseException | None = None  # of a prompt that was refused
        self._waiter: asyncio.Future[None] | None = None
        opening.watch(self._add, self._fail)

    async def read(self) -> list[tuple[int, list[CompletionDelta], RequestOutput | None]]:
        """Wait for something to read. Returns, for each prompt that has it, its number, its deltas and its result.

        Raises:
            ApiError: a prompt was refused.
            EngineDeadError: the engine has ended.
        """
        while True:
            if self._error is not None:
                raise self._error
            ready, self._ready = self._ready, {}
            found = [(number, *self._streams[number].read_now()) for number in ready]
            found = [each for each in found if each[1] or each[2] is not None]
            if found:
                return found
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None

    def _add(self, number: int, stream: RequestStream) -> None:
        self._streams[number] = stream
        stream.on_arrival = partial(self._pass_on, stream) if self._is_single else partial(self._note, number)
        self._note(number)  # something may have come before

    def _pass_on(self, stream: RequestStream) -> None:
        """Send what the only stream brings, or let the task do it."""
        is_waiting = self._waiter is not None and not self._waiter.done()
        if not (is_waiting and stream.goes_on and self._events.is_direct):
            self._note(0)
            return
        try:
            deltas, _ = stream.read_now()
            if encoded := self._encoder.encode(0, deltas):
                self._events.write_now(b"".join(encoded))
        except Exception as error:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        self._error = error
        self._wake()

    def _note(self, number: int) -> None:
        self._ready[number] = None
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Encoder:
    """Makes events of deltas.

    Args:
        form: the form of the events.
        opening: the streams of the call.
        num_prompt_tokens: tokens of its prompts.
        num_completions: completions of each prompt.
        include_usage: whether an event in the end tells the tokens.
        tells_usage_always: whether all events do.
        hides_tokens: whether no token was asked for, of which the engine computes one.
    """

    def __init__(
        self,
        form: ChunkForm,
        opening: Opening,
        num_prompt_tokens: int,
        num_completions: int,
        *,
        include_usage: bool,
        tells_usage_always: bool,
        hides_tokens: bool,
    ) -> None:
        self._form = form
        self._opening = opening
        self._num_completions = num_completions
        self._include_usage = include_usage
        self._tells_usage_always = include_usage and tells_usage_always
        self._hides_tokens = hides_tokens
        self._needs_choice = form.needs_choice or self._tells_usage_always
        self._num_prompt_tokens = num_prompt_tokens
        self._num_output_tokens = 0
        self._heads: dict[int, bytes] = {}  # of the choices that have begun
        before = orjson.dumps(form.chunk_head)[:-1] + b',"choices":[{"index":'
        self._before, self._text_head = b"data: " + before, b"," + form.text_frame[0]
        self._text_tail = form.text_frame[1] + b"}]" + (b',"usage":null' if include_usage else b"") + b"}\n\n"

    def encode(self, number: int, deltas: Sequence[CompletionDelta]) -> list[bytes]:
        """The events for the deltas of prompt ``number``."""
        events: list[bytes] = []
        for delta in map(without_tokens, deltas) if self._hides_tokens else deltas:
            index = number * self._num_completions + delta.index
            self._num_output_tokens += len(delta.token_ids)
            head = self._heads.get(index)
            if head is None:
                self._heads[index] = head = b"%b%d%b" % (self._before, index, self._text_head)
                events.extend(self._chunk(choice) for choice in self._form.first_choices(number, index))
            if delta.finish_reason is None and not self._needs_choice:
                if delta.text:
                    events.append(head + orjson.dumps(delta.text) + self._text_tail)
            elif delta.finish_reason is not FinishReason.ABORT:
                events.append(self._chunk(self._form.choice(index, delta)))
        return events

    def last(self) -> bytes:
        """The events after all deltas."""
        if not self._include_usage:
            return DONE
        return _event(self._form.chunk_head | {"choices": [], "usage": self._usage()}) + DONE

    def _chunk(self, choice: dict[str, Any]) -> bytes:
        fields = self._form.chunk_head | {"choices": [choice]}
        if self._include_usage:
            fields["usage"] = self._usage() if self._tells_usage_always else None
        return _event(fields)

    def _usage(self) -> dict[str, Any]:
        num_cached_tokens = sum(stream.num_cached_tokens for stream in self._opening.open_streams)
        return usage(self._num_prompt_tokens, self._num_output_tokens, num_cached_tokens)


async def send_events(events: EventStream, opening: Opening, encoder: Encoder) -> None:
    """Send what the streams bring, until all have ended.

    Raises:
        ApiError: a prompt was refused, or ended without its result.
        EngineDeadError: the engine has ended.
    """
    reader, num_open = Reader(opening, events, encoder), len(opening)
    while True:
        encoded: list[bytes] = []
        for number, deltas, end in await reader.read():
            encoded += encoder.encode(number, deltas)
            if end is not None:
                try:
                    check_end(end)
                except ApiError:
                    await events.write_rest(b"".join(encoded))
                    raise
                num_open -= 1
        if num_open == 0:
            break
        if encoded:
            await events.write(b"".join(encoded))
    await events.end(b"".join([*encoded, encoder.last()]))


def check_end(result: RequestOutput) -> None:
    """Refuse a result that is none.

    Raises:
        ApiError: 422 for logits that are no numbers, which another try would not change; 500 after steps that failed,
            499 after a cancellation, 503 after the end of the engine.
    """
    reasons = {output.finish_reason for output in result.outputs}
    if FinishReason.ERROR in reasons and result.error is ErrorCause.NOT_FINITE:
        _log.warning("request %s failed: %s", result.request_id, result.error.value)
        raise ApiError(422, result.error.value, type="model_error", code="logits_not_finite")
    if FinishReason.ERROR in reasons and result.error is not ErrorCause.NO_CONTINUATION:
        _log.error("request %s failed: %s", result.request_id, result.error)
        raise ApiError(500, "the request failed, and the server's log says why", code="engine_error")
    if FinishReason.ABORT in reasons:
        if result.error is None:
            raise ApiError(CANCELLED_STATUS, "the request was cancelled", code="cancelled")
        raise ApiError(503, f"the request was ended: {result.error}", code="aborted")


def _event(fields: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(fields) + b"\n\n"
