"""The server's state: the one object that every route shares."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from time import time
from typing import Any
from uuid import uuid4

from starlette.requests import Request

from jpaged.async_llm import AsyncLLM
from jpaged.engine.prompts import TokensPrompt
from jpaged.engine.request_stream import RequestStream
from jpaged.request import SamplingParams
from jpaged.server.errors import ApiError, refusals
from jpaged.server.protocol.sampling import GenerationBody
from jpaged.server.settings import ServerSettings
from jpaged.server.sse import Pulse
from jpaged.server.template import ChatTemplate
from jpaged.server.tokens import TextCodec


@dataclass(frozen=True, slots=True)
class Call:
    """The work that one HTTP request asks of the engine: each prompt is a request of its own there.

    Args:
        call_id: the id in the response, of 128 random bits.
        prompts: the prompts as token ids.
        params: sampling parameters of all of them.
        priority: lower is served first.
        cache_salt: prompts share cached KV only under equal salts; None shares with all that have none.
        client_id: the id that the client gave it in the header ``x-request-id``.
    """

    call_id: str
    prompts: list[list[int]]
    params: SamplingParams
    priority: int = 0
    cache_salt: str | None = None
    client_id: str | None = None

    @property
    def request_ids(self) -> list[str]:
        """The engine's id of each prompt."""
        return [f"{self.call_id}-{i}" for i in range(len(self.prompts))]

    @property
    def num_sequences(self) -> int:
        """Sequences that run at once, over all prompts."""
        return len(self.prompts) * self.params.num_sequences

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(map(len, self.prompts))

    def prompt(self, i: int) -> TokensPrompt:
        """The i-th prompt, as the engine takes it."""
        prompt: TokensPrompt = {"prompt_token_ids": self.prompts[i]}
        if self.cache_salt is not None:
            prompt["cache_salt"] = self.cache_salt
        return prompt


class Server:
    """Opens calls to the engine. Its methods are for the thread of the event loop.

    Args:
        llm: the engine.
        settings: the settings.

    Attributes:
        created: the start of the server, in seconds since 1970.
        calls: the open calls by id; written here alone.
        codec: text to token ids and back.
        template: conversations to token ids.
        pulse: keeps silent streams open.
    """

    def __init__(self, llm: AsyncLLM, settings: ServerSettings) -> None:
        self.llm = llm
        self.settings = settings
        self.model_name = settings.served_model_name
        self.created = int(time())
        self.calls: dict[str, Call] = {}
        self.codec = TextCodec(llm)
        self.template = ChatTemplate(llm, self.codec)
        self.pulse = Pulse(settings.keep_alive_s)

    def make_call(
        self, request: Request, kind: str, prompts: list[list[int]], params: SamplingParams, body: GenerationBody
    ) -> Call:
        """The call for a request.

        Args:
            request: the request.
            kind: beginning of the call's id.
            prompts: the prompts as token ids.
            params: sampling parameters of all of them.
            body: the body of the request.
        """
        return Call(
            f"{kind}-{uuid4().hex}",
            prompts,
            params,
            priority=body.priority or 0,
            cache_salt=body.cache_salt,
            client_id=request.headers.get("x-request-id"),
        )

    @asynccontextmanager
    async def open(self, call: Call) -> AsyncGenerator[list[RequestStream]]:
        """Give a call to the engine; the streams of its prompts are open until the block is left.

        Every call passes through here.

        Raises:
            ApiError: 400 if the engine refuses a prompt, 503 if it takes none.
        """
        self._check_sizes(call)
        with refusals(SamplingParams.__dataclass_fields__):
            streams = await self._open_all(call)
        self.calls[call.call_id] = call
        try:
            yield streams
        finally:
            del self.calls[call.call_id]
            for stream in streams:
                stream.close()

    def _check_sizes(self, call: Call) -> None:
        settings, params = self.settings, call.params
        if call.num_sequences > settings.max_sequences:
            raise ApiError(
                400, f"the request has {call.num_sequences} sequences: at most {settings.max_sequences} are taken"
            )
        limit = self.llm.max_model_len
        num_outputs = min(params.max_tokens or limit, limit) * params.n * len(call.prompts)
        entries = 0 if params.logprobs is None else num_outputs * (params.logprobs + 1)
        entries += 0 if params.prompt_logprobs is None else call.num_prompt_tokens * (params.prompt_logprobs + 1)
        if entries > settings.max_logprobs_entries:
            raise ApiError(
                400,
                f"the request asks for up to {entries} log-probabilities: at most {settings.max_logprobs_entries} are "
                "returned; lower logprobs, max_tokens, n or the number of prompts",
            )

    async def _open_all(self, call: Call) -> list[RequestStream]:
        """The streams of all prompts; none is left open if one is refused."""
        opening = [
            asyncio.ensure_future(self.llm.open(call.prompt(i), call.params, request_id, priority=call.priority))
            for i, request_id in enumerate(call.request_ids)
        ]
        try:
            return await asyncio.gather(*opening)
        except BaseException:
            for each in opening:
                each.cancel()
            for result in await asyncio.gather(*opening, return_exceptions=True):
                if isinstance(result, RequestStream):
                    result.close()
            raise

    async def cancel(self, request: Request, call_id: str) -> bool:
        """End unfinished calls that have an id, be it the server's or the client's. Returns whether there was any."""
        calls = [call for call in self.calls.values() if call_id in (call.call_id, call.client_id)]
        with refusals():
            ended = [await self.llm.abort(call.request_ids) for call in calls]
        return any(ended)

    def check_model(self, name: str | None) -> None:
        """Refuse a request for another model.

        Raises:
            ApiError: 404.
        """
        if name is not None and name != self.model_name:
            raise ApiError(404, f"the model {name[:200]!r} is not served here", code="model_not_found", param="model")


def server_of(request: Request) -> Server:
    """The server that serves a request."""
    server: Any = request.app.state.server
    return server
