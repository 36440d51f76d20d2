"""Connections: uvicorn's HTTP protocol with bounds on the time and the bytes that a peer may take."""

import asyncio
import enum
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from jpaged.server.errors import ApiError

MAX_PIPELINED = 16
"""Requests that one connection may send before it has the response to the first."""

LEAST_BYTES_PER_S = 1 << 16
"""A body gets a second more for so many bytes."""

LINGER_BYTES, LINGER_S = 1 << 20, 2.0
"""The rest of a body whose response is sent is read as far as this, and then the connection is closed.

A peer that still sends when the connection closes may lose the response.
"""


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """Bounds on one connection, and on their number.

    Args:
        head_bytes: bytes of a request line and its headers.
        head_s: seconds from the first byte of a request, or from the connection, to the end of the headers.
        body_s: seconds for a body, besides those that ``LEAST_BYTES_PER_S`` gives it.
        write_s: seconds that a peer may leave the output unread which waits for it.
        num_connections: connections at once.
    """

    head_bytes: int = 1 << 16
    head_s: float = 10.0
    body_s: float = 30.0
    write_s: float = 60.0
    num_connections: int = 4096


class _Phase(enum.Enum):
    """The part of a request that is awaited."""

    HEAD = 0
    BODY = 1
    NOTHING = 2
    REST = 3  # of a body whose response is sent: it is dropped


class _TooLarge(Exception):
    """The headers of a request are too many, or too many requests were sent ahead."""


class GuardedProtocol(HttpToolsProtocol):
    """One connection. A peer that is too slow or sends too much is told so, where a response can still be sent.

    ``limited`` makes the class for uvicorn, which knows no limits.
    """

    limits = ConnectionLimits()

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.access_log = False  # the guard has a log of its own
        self._phase = _Phase.HEAD
        self._timer: asyncio.TimerHandle | None = None  # of the phase
        self._write_timer: asyncio.TimerHandle | None = None
        self._num_head_bytes = 0
        self._num_body_bytes = 0
        self._body_began = 0.0
        self._running: RequestResponseCycle | None = None  # the request that is served; later ones wait

    # The connection -----------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        super().connection_made(transport)
        if len(self.connections) > self.limits.num_connections:
            self._refuse(ApiError(503, "the server has too many connections: try again later", headers=_RETRY))
        else:
            self._await_phase()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        self._stop_write_timer()
        self._disconnect()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        if self._phase in (_Phase.BODY, _Phase.REST):
            self._num_body_bytes += len(data)
        else:
            self._num_head_bytes += len(data)
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self._phase is _Phase.HEAD and self._num_head_bytes > self.limits.head_bytes:
            self._refuse(self._head_too_large())
        elif self._phase is _Phase.REST and self._num_body_bytes > LINGER_BYTES:
            self.transport.close()
        elif self._phase is not _Phase.NOTHING and self._timer is None:
            self._await_phase()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._expect_reader()

    def resume_writing(self) -> None:
        super().resume_writing()
        if not self.transport.is_closing():
            self._stop_write_timer()

    # The request --------------------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._unset_keepalive_if_required()
        self._phase = _Phase.HEAD

    def on_headers_complete(self) -> None:
        self._stop_timer()
        size = len(self.url) + sum([len(name) + len(value) for name, value in self.headers])
        if size > self.limits.head_bytes or len(self.pipeline) >= MAX_PIPELINED:
            raise _TooLarge
        self._phase, self._num_head_bytes, self._num_body_bytes = _Phase.BODY, 0, 0
        super().on_headers_complete()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def on_message_complete(self) -> None:
        self._stop_timer()
        is_rest, self._phase = self._phase is _Phase.REST, _Phase.NOTHING
        super().on_message_complete()
        if is_rest:  # the bytes have stopped uvicorn's timer
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._phase is _Phase.BODY and self.cycle.response_complete:
            self._drop_rest()
        if self.transport.is_closing():
            self._expect_reader()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._expect_reader()

    def send_400_response(self, msg: str) -> None:
        """Refuse what the parser cannot read, headers that are too large, and what the peer does not finish."""
        is_too_large = self._phase is _Phase.HEAD and self._num_head_bytes > self.limits.head_bytes
        self._refuse(self._head_too_large() if is_too_large else ApiError(400, "this is no HTTP request"))

    # Bounds -------------------------------------------------------------------------------------------------------

    def _await_phase(self) -> None:
        if self._phase is _Phase.HEAD:
            self._timer = self.loop.call_later(self.limits.head_s, self._end_late_head)
        else:
            self._body_began = self.loop.time()
            self._timer = self.loop.call_later(self.limits.body_s, self._end_late_body)

    def _end_late_head(self) -> None:
        if self._num_head_bytes:
            self._refuse(ApiError(408, f"the headers did not come within {self.limits.head_s:g} s"))
        else:
            self.transport.close()

    def _end_late_body(self) -> None:
        """Close the connection, unless the peer is fast enough or the server is what it waits for."""
        end = self._body_began + self.limits.body_s + self._num_body_bytes / LEAST_BYTES_PER_S
        if self.flow.read_paused or self.loop.time() < end:
            wait_s = max(end - self.loop.time(), self.limits.body_s)
            self._timer = self.loop.call_later(wait_s, self._end_late_body)
        else:
            self._refuse(ApiError(408, f"the body did not come within {self.limits.body_s:g} s"))

    def _drop_rest(self) -> None:
        """Read the rest of a body that is not wanted, and keep the connection for the next request."""
        self._stop_timer()
        self._phase, self._num_body_bytes = _Phase.REST, 0
        if not self.transport.is_closing():
            self._timer = self.loop.call_later(LINGER_S, self.transport.close)

    def _expect_reader(self) -> None:
        """Give the peer a while to read what waits for it, before the connection is cut."""
        if self._write_timer is None:
            self._write_timer = self.loop.call_later(self.limits.write_s, self.transport.abort)

    def _refuse(self, error: ApiError) -> None:
        """Send an error, unless the response to an earlier request is due, and close the connection."""
        self._stop_timer()
        running = self._running
        if running is None or running.response_complete or (running is self.cycle and not running.response_started):
            body = error.body()
            headers = {
                "content-type": "application/json",
                "content-length": str(len(body)),
                "connection": "close",
                **error.headers,
            }
            lines = [f"{name}: {value}\r\n".encode("latin-1") for name, value in headers.items()]
            self.transport.write(b"".join([STATUS_LINE[error.status], *lines, b"\r\n", body]))
        self._disconnect()
        self.transport.close()
        self._expect_reader()

    def _disconnect(self) -> None:
        """Tell the request that is served of the end; uvicorn tells the last one that came."""
        if self._running is not None:
            self._running.disconnected = True
            self._running.message_event.set()

    def _head_too_large(self) -> ApiError:
        return ApiError(431, f"the headers have more than {self.limits.head_bytes} bytes", code="headers_too_large")

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None


_RETRY = {"retry-after": "1"}


class DirectBody:
    """Writes parts of a body to the connection at once: a stream has a part for each token.

    All middleware looks at the start of a response alone, and uvicorn's ``send`` does no more for a part of a chunked
    body whose peer reads.

    Args:
        cycle: the request and its response.
    """

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = cycle

    @property
    def is_ready(self) -> bool:
        """Whether a part can be written: the response has started and not ended, and the peer reads it."""
        cycle = self._cycle
        is_open = cycle.response_started and not cycle.response_complete and not cycle.disconnected
        return bool(is_open and cycle.chunked_encoding and not cycle.flow.write_paused)

    def write(self, part: bytes) -> None:
        """Write a part, of a byte at least, while ``is_ready``."""
        self._cycle.transport.write(b"%x\r\n%b\r\n" % (len(part), part))


DIRECT_BODY = "direct_body"
"""The name of a request's ``DirectBody`` in its state."""


class DirectBodies:
    """ASGI middleware: sets ``DIRECT_BODY`` for requests of uvicorn. It belongs outside of all others.

    Args:
        app: the app, with all other middleware.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        cycle = getattr(send, "__self__", None)
        if not isinstance(cycle, RequestResponseCycle) or scope["method"] == "HEAD":
            await self._app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        state[DIRECT_BODY] = DirectBody(cycle)
        try:
            await self._app(scope, receive, send)
        finally:
            del state[DIRECT_BODY]  # or the request would be a cycle, which only a collection frees


def limited(limits: ConnectionLimits) -> type[GuardedProtocol]:
    """The protocol with other limits, for ``uvicorn.Config(http=...)``."""
    return type("LimitedProtocol", (GuardedProtocol,), {"limits": limits})
