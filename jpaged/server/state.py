"""The server's state: the one object that every route shares."""

import asyncio
from collections.abc import AsyncGenerator, Collection, Iterator
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass
from time import time
from typing import TYPE_CHECKING, Any

from starlette.requests import Request

from jpaged.async_llm import AsyncLLM
from jpaged.engine.health import HealthState
from jpaged.engine.prompts import TokensPrompt
from jpaged.engine.request_stream import RequestStream
from jpaged.host.capacity import Capacity, width_name
from jpaged.request import Request as EngineRequest
from jpaged.request import SamplingParams
from jpaged.server.admission import Admission, Demand, Limits, Ticket
from jpaged.server.dashboard.feed import Feed
from jpaged.server.errors import CANCELLED_STATUS, ApiError, refusals
from jpaged.server.health import Report, report_of
from jpaged.server.keys import ANONYMOUS, ApiKey, KeyRing
from jpaged.server.metrics import Metrics
from jpaged.server.opening import Opening
from jpaged.server.pinned_prefixes import Prefixes
from jpaged.server.protocol.sampling import GenerationBody
from jpaged.server.settings import ServerSettings
from jpaged.server.sse import Pulse
from jpaged.server.template import ChatTemplate
from jpaged.server.text_codec import TextCodec

if TYPE_CHECKING:
    from jpaged.server.tracing import Tracing


@dataclass(frozen=True, slots=True)
class Call:
    """The work that one HTTP request asks of the engine: each prompt is a request of its own there.

    Args:
        call_id: the id in the response, of 128 random bits, which are the request's in the log.
        prompts: the prompts as token ids.
        params: sampling parameters of all of them.
        arrived: when its body had come, of ``time.monotonic``.
        priority: lower is served first.
        cache_salt: prompts of a key share cached KV only under equal salts; None shares with all that have none.
        key: the key under which it is asked for.
        client_id: the id that the client gave it in the header ``x-request-id``.
    """

    call_id: str
    prompts: list[list[int]]
    params: SamplingParams
    arrived: float
    priority: int = 0
    cache_salt: str | None = None
    key: ApiKey = ANONYMOUS
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

    @property
    def allowed_priority(self) -> int:
        """The priority that its key may have."""
        return self.key.priority(self.priority)

    @property
    def demands(self) -> list[Demand]:
        """The size of each prompt's request."""
        num_sequences, max_tokens, priority = self.params.num_sequences, self.params.max_tokens, self.allowed_priority
        pairs = zip(self.request_ids, self.prompts, strict=True)
        return [Demand(each, len(prompt), num_sequences, max_tokens, priority) for each, prompt in pairs]

    def prompt(self, i: int) -> TokensPrompt:
        """The i-th prompt, as the engine takes it."""
        prompt: TokensPrompt = {"prompt_token_ids": self.prompts[i]}
        if (salt := self.key.cache_salt(self.cache_salt)) is not None:
            prompt["cache_salt"] = salt
        return prompt


class Server:
    """Opens calls to the engine. Its methods are for the thread of the event loop.

    Args:
        llm: the engine.
        settings: the settings.
        keys: the keys.
        aliases: other names that requests may call the model by; paths of this machine may be among them.

    Attributes:
        admission: the queue before the engine.
        created: the start of the server, in seconds since 1970.
        calls: by id, the calls of which a prompt has had its turn; written here alone.
        codec: text to token ids and back.
        template: conversations to token ids.
        pulse: keeps silent streams open.
        metrics: counts what happens.
        feed: shows the dashboard what happens.
        prefixes: the prefixes that clients have pinned.
        tracing: makes traces; None if none are asked for.
    """

    def __init__(self, llm: AsyncLLM, settings: ServerSettings, keys: KeyRing, aliases: Collection[str] = ()) -> None:
        self.llm = llm
        self.settings = settings
        self.keys = keys
        self.model_name = settings.served_model_name
        self._model_names = frozenset((self.model_name, *aliases))
        self.metrics = Metrics(llm, self.model_name, num_queued=lambda: self.admission.num_waiting)
        self.admission = Admission(_limits(llm, settings), on_rejection=self.metrics.rejected)
        llm.listen(self.admission.note)
        self.prefixes = Prefixes(llm, settings, self.admission)
        self.tracing = _tracing(llm, settings)
        self.created = int(time())
        self.calls: dict[str, Call] = {}
        self._waiting: dict[str, Call] = {}  # calls of which no prompt is open yet
        self._tickets: dict[str, list[Ticket]] = {}  # of all of these
        self.codec = TextCodec(llm)
        self.template = ChatTemplate(llm, self.codec)
        self.pulse = Pulse(settings.keep_alive_s)
        self.feed = Feed(llm, self.metrics, self.model_name)

    def report(self) -> Report:
        """The health now; a server that drains takes no requests."""
        report = report_of(self.llm)
        if report.is_ready and self.admission.is_closed:
            return report._replace(body={"state": HealthState.DRAINING.value}, is_ready=False)
        return report

    def make_call(
        self,
        request: Request,
        kind: str,
        prompts: list[list[int]],
        params: SamplingParams,
        body: GenerationBody,
        arrived: float,
    ) -> Call:
        """The call for a request.

        Args:
            request: the request.
            kind: beginning of the call's id.
            prompts: the prompts as token ids.
            params: sampling parameters of all of them.
            body: the body of the request.
            arrived: when the body had come, of ``time.monotonic``.
        """
        return Call(
            f"{kind}-{request.state.request_id}",
            prompts,
            params,
            arrived,
            priority=body.priority or 0,
            cache_salt=body.cache_salt,
            key=request.state.key,
            client_id=request.state.client_id,
        )

    @asynccontextmanager
    async def open(self, call: Call) -> AsyncGenerator[Opening]:
        """Give a call to the engine; the streams of its prompts open one by one, until the block is left.

        Every call passes through here.

        Raises:
            ApiError: 400 if the engine refuses a prompt, 429 if the queue is full, 503 if the engine takes none, 408 if
                no prompt starts in time, 504 if the call does not end in time.
        """
        self._check_sizes(call)
        self._check_fits(call)
        end = None if (limit := self.settings.request_timeout_s) is None else asyncio.get_running_loop().time() + limit
        with self.admission.queue(call.key, call.demands) as tickets:
            self._tickets[call.call_id] = tickets
            self._waiting[call.call_id] = call
            if self.tracing is not None:
                self.tracing.open(call.request_ids)
            opening = Opening(
                len(tickets), lambda i: self._open_one(call, i, tickets[i], end), lambda: self._note_open(call)
            )
            try:
                with _ending(opening, end):
                    yield opening
            finally:
                try:
                    await opening.close()
                finally:
                    self._forget(call, opening)

    def _forget(self, call: Call, opening: Opening) -> None:
        del self._tickets[call.call_id]
        self._waiting.pop(call.call_id, None)
        self.calls.pop(call.call_id, None)
        if self.tracing is not None:
            pairs = zip(call.request_ids, opening.streams, strict=True)
            self.tracing.close([request_id for request_id, stream in pairs if stream is None])

    def _note_open(self, call: Call) -> None:
        self._waiting.pop(call.call_id, None)
        self.calls[call.call_id] = call

    async def _open_one(self, call: Call, i: int, ticket: Ticket, end: float | None) -> RequestStream:
        """Open the stream of a prompt when it is its turn.

        Raises:
            ApiError: see ``open``.
        """
        options = {"priority": call.allowed_priority, "arrived": call.arrived}
        try:
            async with asyncio.timeout_at(end):
                with _refusals():
                    await ticket.turn
                    return await self.llm.open(call.prompt(i), call.params, ticket.demand.request_id, **options)
        except TimeoutError:
            raise ApiError(
                408, f"the request waited for {self.settings.request_timeout_s:g} s: try again", code="queue_timeout"
            ) from None

    def _check_fits(self, call: Call) -> None:
        """Refuse a call that can never fit, before it waits. It asks for nothing that a step may hold up.

        The engine counts the blocks of pinned prefixes too, when it is the call's turn.
        """
        engine, params, longest = self.llm.engine, call.params, max(call.prompts, key=len)
        most, blocks = engine.config.most_rows, engine.blocks
        capacity = Capacity(
            blocks.num_blocks - 1 + blocks.num_host_blocks,
            0,
            blocks.block_size,
            self.llm.max_model_len,
            groups=blocks.groups,
        )
        with _refusals():
            if params.num_sequences > most:
                name = width_name(params)
                raise ValueError(f"{name}={params.num_sequences} is more than max_num_seqs={most}: lower {name}")
            capacity.check(EngineRequest(call.call_id, None, longest, params, None))
            if len(call.prompts) > 1:  # a stream may have begun when it is the turn of another prompt
                for i, prompt in enumerate(call.prompts):
                    if min(prompt) < 0 or max(prompt) >= engine.model_config.vocab_size:
                        engine.prompts.read(call.call_id, call.prompt(i), params, 0)

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

    async def cancel(self, request: Request, call_id: str) -> bool:
        """End unfinished calls of the request's own key that have an id, the server's or the client's.

        Returns:
            Whether there was any.
        """

        def is_meant(call: Call) -> bool:
            return call.key.name == request.state.key.name and call_id in (call.call_id, call.client_id)

        error = ApiError(CANCELLED_STATUS, "the request was cancelled", code="cancelled")
        open_calls = [call for call in self.calls.values() if is_meant(call)]
        meant = [*open_calls, *[call for call in self._waiting.values() if is_meant(call)]]
        refused = [ticket.refuse(error) for call in meant for ticket in self._tickets[call.call_id]]
        has_any = any(refused)
        with refusals():
            for call in open_calls:
                has_any |= await self.llm.abort(call.request_ids)
        return has_any

    def check_model(self, name: str | None) -> None:
        """Refuse a request for another model.

        Raises:
            ApiError: 404.
        """
        if name is not None and name not in self._model_names:
            message = f"the model {name[:200]!r} is not served here: ask for {self.model_name!r}"
            raise ApiError(404, message, code="model_not_found", param="model")


def _limits(llm: AsyncLLM, settings: ServerSettings) -> Limits:
    """The limits of the queue.

    A few requests wait in the engine, so that no row stays empty. Their prompts fill a few steps: two steps are planned
    before the server learns what has started.
    """
    config = llm.engine.config
    return Limits(
        settings.max_waiting_sequences,
        settings.max_waiting_tokens,
        num_places=config.most_rows + max(1, config.most_rows // 16),
        max_unstarted_tokens=4 * config.token_budget,
    )


def _tracing(llm: AsyncLLM, settings: ServerSettings) -> "Tracing | None":
    if settings.otlp_traces_endpoint is None:
        return None
    try:
        from jpaged.server.tracing import Tracing, batches_to
    except ModuleNotFoundError as error:
        raise ValueError(f"otlp_traces_endpoint needs {error.name}: pip install 'jpaged[otel]'") from None
    tracing = Tracing(batches_to(settings.otlp_traces_endpoint), settings.served_model_name)
    llm.listen(tracing.listen)
    return tracing


def _refusals() -> AbstractContextManager[None]:
    return refusals(SamplingParams.__dataclass_fields__)


@contextmanager
def _ending(opening: Opening, end: float | None) -> Iterator[None]:
    """End the open streams at a time of the loop's clock.

    Raises:
        ApiError: 504, the block failed because they were ended.
    """
    if end is None:
        yield
        return
    is_late = False

    def expire() -> None:
        nonlocal is_late
        is_late = bool(opening.open_streams)
        for stream in opening.open_streams:
            stream.give_up("it took too long")

    timer = asyncio.get_running_loop().call_at(end, expire)
    try:
        yield
    except ApiError as error:
        if not is_late:
            raise
        headers = {"x-should-retry": "false"}
        raise ApiError(504, "the request took too long", code="request_timeout", headers=headers) from error
    finally:
        timer.cancel()


def server_of(request: Request) -> Server:
    """The server that serves a request."""
    server: Any = request.app.state.server
    return server
