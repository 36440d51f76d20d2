"""The response to a call: opened, awaited and sent, unless the client leaves before."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from typing import Any, Protocol

import orjson
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from jpaged.request import RequestOutput
from jpaged.server.connections import DIRECT_BODY, DirectBody
from jpaged.server.errors import ApiError, engine_deaths, own_mistake
from jpaged.server.opening import Opening
from jpaged.server.protocol.sampling import GenerationBody
from jpaged.server.sse import ChunkForm, Encoder, EventStream, check_end, send_events
from jpaged.server.state import Call, Server

_log = logging.getLogger(__name__)


class Form(ChunkForm, Protocol):
    """The form of the responses of one call."""

    def whole(self, results: Sequence[RequestOutput]) -> dict[str, Any]:
        """The response to a request that is not streamed."""
        ...


class Answer:
    """An ASGI response that computes what it sends. A client that leaves ends the computation.

    Args:
        server: the server.
        call: the work.
        form: the form of the result.
        body: the body of the request.
    """

    def __init__(self, server: Server, call: Call, form: Form, body: GenerationBody) -> None:
        self._server = server
        self._call = call
        self._form = form
        self._body = body
        self._headers = body.headers()
        server.metrics.ignored(len(body.ignored))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with until_client_leaves(receive):
                if self._body.is_streamed:
                    await self._stream(send, scope.get("state", {}).get(DIRECT_BODY))
                else:
                    response = await self._whole()
                    await response(scope, receive, send)
        except ClientDisconnect:
            return

    async def _whole(self) -> Response:
        async with self._server.open(self._call) as opening:
            with engine_deaths():
                results = await _results(opening)
        params = self._call.params
        if params.logprobs is None and params.prompt_logprobs is None:
            content = self._content(results)
        else:  # may take seconds
            content = await asyncio.to_thread(self._content, results)
        return Response(content, 200, self._headers, "application/json")

    def _content(self, results: Sequence[RequestOutput]) -> bytes:
        return orjson.dumps(self._form.whole(results))

    async def _stream(self, send: Send, direct: DirectBody | None) -> None:
        options = self._body.stream_options
        events = EventStream(send, self._headers, direct)
        with self._server.pulse.watching(events):
            try:
                async with self._server.open(self._call) as opening:
                    encoder = Encoder(
                        self._form,
                        opening,
                        self._call.num_prompt_tokens,
                        self._call.params.n,
                        include_usage=bool(options and options.include_usage),
                        tells_usage_always=bool(options and options.continuous_usage_stats),
                        hides_tokens=self._body.token_limit == 0,
                    )
                    with engine_deaths():
                        await send_events(events, opening, encoder)
            except ApiError as error:
                await events.fail(error)
            except Exception:
                _log.exception("call %s failed", self._call.call_id)
                await events.fail(own_mistake())


async def _results(opening: Opening) -> list[RequestOutput]:
    """The results of all prompts.

    Raises:
        ApiError: a prompt was refused, or ended without its result.
    """

    async def last(number: int) -> RequestOutput:
        result = [output async for output in await opening.stream(number)][-1]
        check_end(result)
        return result

    reading = [asyncio.ensure_future(last(number)) for number in range(len(opening))]
    try:
        return await asyncio.gather(*reading)
    finally:
        for each in reading:
            each.cancel()


@asynccontextmanager
async def until_client_leaves(receive: Receive) -> AsyncGenerator[None]:
    """Cancel the block when the client closes its connection. The body of the request has been read before.

    Raises:
        ClientDisconnect: the client left.
    """
    task: Any = asyncio.current_task()
    has_left = is_over = False

    def leave(watch: asyncio.Future[None]) -> None:
        nonlocal has_left
        if not is_over:  # or the callback was on its way when the block ended
            has_left = True
            task.cancel()

    watch = asyncio.ensure_future(_disconnected(receive))
    watch.add_done_callback(leave)
    try:
        yield
    except asyncio.CancelledError:
        if has_left and task.uncancel() == 0:
            raise ClientDisconnect from None
        raise
    finally:
        is_over = True
        watch.cancel()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
