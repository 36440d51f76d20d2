"""A client of HTTP that costs little: raw asyncio, and a parser in C."""

import asyncio
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import httptools


class Answer(NamedTuple):
    """The end of a response.

    Args:
        status: its HTTP status; 0 if the connection ended before.
        body: its body, unless someone else took it.
        is_complete: whether all of it came.
    """

    status: int
    body: bytes
    is_complete: bool


def request(path: str, body: bytes | None = None, *, method: str = "POST") -> bytes:
    """A request as it goes over the wire."""
    head = f"{method} {path} HTTP/1.1\r\nhost: localhost\r\n"
    if body is None:
        return f"{head}\r\n".encode()
    return f"{head}content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body


def completion(**fields: Any) -> bytes:
    """A request for a completion, as it goes over the wire."""
    return request("/v1/completions", json.dumps(fields).encode())


class Connection(asyncio.Protocol):
    """One connection, of one exchange at a time."""

    def __init__(self) -> None:
        self._parser: Any = None
        self._transport: asyncio.Transport | None = None
        self._ended: asyncio.Future[Answer] | None = None
        self._take: Callable[[bytes], object] = bytes  # replaced by every exchange
        self._parts: list[bytes] = []
        self.is_open = False

    async def exchange(self, data: bytes, take: Callable[[bytes], object] | None = None) -> Answer:
        """Send a request and wait for the end of the response.

        Args:
            data: the request.
            take: called with the parts of the body as they come; without it the answer has the body.
        """
        assert self._transport is not None
        self._parser = httptools.HttpResponseParser(self)
        self._parts = []
        self._take = self._parts.append if take is None else take
        self._ended = asyncio.get_running_loop().create_future()
        self._transport.write(data)
        return await self._ended

    def abort(self) -> None:
        """End the connection at once."""
        if self._transport is not None:
            self._transport.abort()

    # asyncio's callbacks ------------------------------------------------------------------------------------------

    def connection_made(self, transport: Any) -> None:
        self._transport, self.is_open = transport, True

    def data_received(self, data: bytes) -> None:
        if self._parser is not None:
            try:
                self._parser.feed_data(data)
            except httptools.HttpParserError:
                self.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_open = False
        self._end(is_complete=False)

    # The parser's callbacks ---------------------------------------------------------------------------------------

    def on_body(self, body: bytes) -> None:
        self._take(body)

    def on_message_complete(self) -> None:
        if not self._parser.should_keep_alive():
            self.is_open = False
            assert self._transport is not None
            self._transport.close()
        self._end(is_complete=True)

    def _end(self, *, is_complete: bool) -> None:
        if self._ended is not None and not self._ended.done():
            status = self._parser.get_status_code()
            self._ended.set_result(Answer(status, b"".join(self._parts), is_complete))


class Client:
    """Connections to one server, used again once they are idle.

    Args:
        address: its host and port.
    """

    def __init__(self, address: tuple[str, int]) -> None:
        self._address = address
        self._idle: list[Connection] = []

    async def connect(self) -> Connection:
        """A connection without an exchange."""
        while self._idle:
            if (connection := self._idle.pop()).is_open:
                return connection
        _, connection = await asyncio.get_running_loop().create_connection(Connection, *self._address)
        return connection

    async def exchange(self, data: bytes, take: Callable[[bytes], object] | None = None) -> Answer:
        """Send a request and wait for the end of the response; see ``Connection.exchange``."""
        connection = await self.connect()
        answer = await connection.exchange(data, take)
        if connection.is_open:
            self._idle.append(connection)
        return answer

    async def get(self, path: str) -> Answer:
        """The response to GET."""
        return await self.exchange(request(path, method="GET"))

    def close(self) -> None:
        """End the idle connections."""
        for connection in self._idle:
            connection.abort()
        self._idle.clear()
