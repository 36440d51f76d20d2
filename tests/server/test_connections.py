"""Connections that are slow, idle or send too much end; all others are served meanwhile."""

import asyncio
import logging
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import ClassVar

import pytest
import uvicorn
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from jpaged.server.connections import (
    DIRECT_BODY,
    MAX_PIPELINED,
    ConnectionLimits,
    DirectBodies,
    DirectBody,
    GuardedProtocol,
    limited,
)

TIMEOUT_S = 300
"""Only a failing test waits for so long."""

SHORT_S = 0.05
HEAD = b"POST /%b HTTP/1.1\r\nHost: localhost\r\n"
GET = b"GET /%b HTTP/1.1\r\nHost: localhost\r\n\r\n"


class App:
    """Reads bodies, or endless output, as the path says; counts the requests that it has."""

    def __init__(self) -> None:
        self.num_running = 0
        self.sizes: list[int] = []
        self.may_go_on = threading.Event()
        self.changed = threading.Condition()

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            return
        self._count(1)
        try:
            await self._respond(scope["path"], receive, send)
        finally:
            self._count(-1)

    async def _respond(self, path: str, receive, send) -> None:
        if path == "/early":
            await self._send(send, b"early")
            return
        size, more = 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            size += len(message["body"])
            more = message["more_body"]
        self.sizes.append(size)
        if path == "/wait":
            while not self.may_go_on.is_set():
                await asyncio.sleep(0.001)
        if path == "/forever":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            while (await receive())["type"] != "http.disconnect":
                pass
            return
        if path == "/endless":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            left = asyncio.ensure_future(receive())
            while not left.done():
                await send({"type": "http.response.body", "body": b"x" * 65536, "more_body": True})
                await asyncio.sleep(0)
            return
        await self._send(send, b"%d" % size)

    async def _send(self, send, body: bytes) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
        await send({"type": "http.response.body", "body": body})

    def _count(self, change: int) -> None:
        with self.changed:
            self.num_running += change
            self.changed.notify_all()

    def wait_until_idle(self) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: self.num_running == 0, TIMEOUT_S)


class Peer:
    """A client that sends bytes as it likes; ``close_all`` closes all there are."""

    made: ClassVar[list["Peer"]] = []

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), TIMEOUT_S)
        self.made.append(self)

    @classmethod
    def close_all(cls) -> None:
        while cls.made:
            cls.made.pop().close()

    def send(self, data: bytes) -> "Peer":
        self._socket.sendall(data)
        return self

    def send_until_closed(self, data: bytes) -> int:
        """Send the same again and again. Returns the bytes that went out."""
        sent = 0
        try:
            while True:
                sent += self._socket.send(data)
        except OSError:
            return sent

    def read(self) -> bytes:
        """All that comes until the server closes the connection."""
        data = b""
        try:
            while part := self._socket.recv(1 << 16):
                data += part
        except ConnectionResetError:
            pass
        return data

    def read_response(self) -> bytes:
        """The next response, head and body."""
        head = self.read_head()
        length = re.search(rb"content-length: (\d+)", head)
        assert length is not None
        return head + b"".join([self._receive(1) for _ in range(int(length[1]))])

    def read_head(self) -> bytes:
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += self._receive(1)
        return head

    def _receive(self, size: int) -> bytes:
        data = self._socket.recv(size)
        assert data
        return data

    def close(self) -> None:
        self._socket.close()


@contextmanager
def serving(app: App | None = None, **limits) -> Iterator[int]:
    """A server. At its end, no connection and no task is left."""
    app = App() if app is None else app
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(
        app, http=limited(ConnectionLimits(**limits)), ws="none", lifespan="off", log_config=None, access_log=False
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        port = listener.getsockname()[1]
        yield port
        assert Peer(port).send(GET % b"").read_response().startswith(b"HTTP/1.1 200")
        app.wait_until_idle()
    finally:
        app.may_go_on.set()
        Peer.close_all()
        server.should_exit = True
        thread.join(TIMEOUT_S)
        assert not thread.is_alive()
    assert not server.server_state.connections
    assert not server.server_state.tasks


def status(response: bytes) -> int:
    return int(response.split(b" ", 2)[1]) if response else 0


def test_requests_are_served_one_after_the_other():
    with serving() as port:
        peer = Peer(port)
        for _ in range(3):
            assert peer.send(GET % b"").read_response().endswith(b"\r\n\r\n0")
        assert peer.send(HEAD % b"" + b"Content-Length: 2\r\n\r\n{}").read_response().endswith(b"\r\n\r\n2")
        peer.send(GET % b"" + HEAD % b"" + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n")
        assert [peer.read_response()[-1:] for _ in range(2)] == [b"0", b"2"]


def test_the_parser_is_the_one_that_is_guarded():
    """The class overrides private parts of uvicorn: a release that renames one would leave connections unguarded."""
    own = {name for name in vars(GuardedProtocol) if name.startswith("on_") or not name.startswith("_")}
    assert own - {"limits"} <= {*dir(HttpToolsProtocol)}


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        (b"", 0),
        (b"G", 408),
        (b"GET / HTTP/1.1\r\nHost: local", 408),
        (GET % b"" + b"GET / HT", 200),
    ],
)
def test_a_head_that_does_not_come_ends_the_connection(sent, expected):
    with serving(head_s=SHORT_S) as port:
        assert status(Peer(port).send(sent).read()) == expected


def test_many_idle_connections_end_while_others_are_served():
    with serving(head_s=SHORT_S) as port:
        peers = [Peer(port) for _ in range(200)]
        assert Peer(port).send(GET % b"").read_response()
        assert [peer.read() for peer in peers] == [b""] * 200


@pytest.mark.parametrize("body", [b"Content-Length: 100\r\n\r\n{", b"Transfer-Encoding: chunked\r\n\r\n2\r\n{"])
def test_a_body_that_does_not_come_ends_the_connection(body):
    with serving(body_s=SHORT_S) as port:
        assert status(Peer(port).send(HEAD % b"" + body).read()) == 408


def test_a_body_that_waits_for_the_server_is_not_late():
    """The second request waits for the first, and the server reads no more of it meanwhile."""
    app = App()
    with serving(app, body_s=SHORT_S) as port:
        peer = Peer(port).send(GET % b"wait" + HEAD % b"" + b"Content-Length: 200000\r\n\r\n" + b"x" * 100_000)
        sending = threading.Thread(target=peer.send, args=(b"x" * 100_000,))
        sending.start()
        asyncio.run(asyncio.sleep(5 * SHORT_S))
        app.may_go_on.set()
        sending.join(TIMEOUT_S)
        peer.send(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert peer.read().count(b"HTTP/1.1 200") == 3


@pytest.mark.parametrize(
    "start",
    [b"GET /", b"GET / HTTP/1.1\r\nX: ", b"GET / HTTP/1.1\r\nHost: localhost\r\nX-Flood: a\r\n", b"A: b\r\n", b"A"],
)
def test_a_head_that_is_too_large_is_cut(start):
    with serving() as port:
        sent = Peer(port).send(start).send_until_closed(b"X-Header: aaaaaaaaaaaaaa\r\n" * 100)
        assert sent < 64 << 20  # what fits into the buffers of the sockets, of 64 MiB and more that would be sent


def test_a_head_that_is_too_large_is_refused_with_its_reason():
    with serving(head_bytes=1000) as port:
        assert status(Peer(port).send(b"GET / HTTP/1.1\r\nX: " + b"x" * 2000).read()) == 431
        assert status(Peer(port).send(b"GET / HTTP/1.1\r\nX: " + b"x" * 2000 + b"\r\n\r\n").read()) == 431
        assert status(Peer(port).send(b"GET /" + b"x" * 2000 + b" HTTP/1.1\r\n\r\n").read()) == 431


@pytest.mark.parametrize(
    "request_",
    [
        b"nonsense\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        HEAD % b"" + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n{}",
        HEAD % b"" + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
        HEAD % b"" + b"Content-Length: -1\r\n\r\n",
        HEAD % b"" + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n",
        b"GET / HTTP/1.1\nHost: localhost\n\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: a\x00b\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost : localhost\r\n\r\n",
        b"GET / HTTP/9.9\r\nHost: localhost\r\n\r\n",
    ],
)
def test_what_is_no_request_is_refused(request_):
    with serving() as port:
        response = Peer(port).send(request_).read()
        assert status(response) == 400
        assert b'"error"' in response


def test_a_response_before_the_body_closes_the_connection():
    with serving() as port:
        peer = Peer(port).send(HEAD % b"early" + b"Transfer-Encoding: chunked\r\n\r\n")
        peer.send_until_closed(b"4\r\nabcd\r\n" * 1000)


def test_a_response_before_the_body_reaches_a_peer_that_still_sends():
    with serving() as port:
        peer = Peer(port).send(HEAD % b"early" + b"Content-Length: 1000000\r\n\r\n")
        assert peer.read_head().startswith(b"HTTP/1.1 200")  # the response is complete
        for _ in range(10):
            peer.send(b"x" * 50_000)
        assert peer.read() == b"early"


def test_a_connection_serves_on_after_a_body_that_nothing_waited_for():
    with serving() as port:
        peer = Peer(port).send(HEAD % b"early" + b"Content-Length: 100000\r\n\r\n")
        assert peer.read_response().endswith(b"early")
        peer.send(b"x" * 100_000 + GET % b"")
        assert peer.read_response().endswith(b"0")


def test_a_client_that_never_reads_is_cut_off():
    app = App()
    with serving(app, write_s=SHORT_S) as port:
        Peer(port).send(GET % b"endless")
        with app.changed:
            assert app.changed.wait_for(lambda: app.num_running == 1, TIMEOUT_S)
        # The server's end asserts that the request has ended, and with it the connection.


def test_requests_sent_ahead_are_few():
    app = App()
    with serving(app) as port:
        peer = Peer(port).send(GET % b"wait" + GET % b"" * (2 * MAX_PIPELINED))
        assert peer.read() == b""


def test_a_client_that_leaves_ends_the_request_that_is_served_too():
    """Of two requests, uvicorn tells the last one alone that the client has left."""
    with serving() as port:
        peer = Peer(port).send(GET % b"forever" + GET % b"")
        assert peer.read_head().startswith(b"HTTP/1.1 200")
        peer.close()
        # The server's end waits for the request.


def test_connections_are_counted():
    with serving(num_connections=3) as port:
        peers = [Peer(port).send(GET % b"") for _ in range(3)]
        assert all(peer.read_response() for peer in peers)
        assert status(Peer(port).read()) == 503
        Peer.close_all()


def test_a_part_written_directly_is_the_part_that_uvicorn_sends():
    written = []

    def begun(method="GET"):
        transport = SimpleNamespace(write=written.append, close=lambda: None)
        flow = FlowControl(transport)  # pyright: ignore[reportArgumentType]
        log, event = logging.getLogger("test"), asyncio.Event()
        scope = {"type": "http", "method": method}
        options = {"expect_100_continue": False, "keep_alive": True, "on_response": lambda: None}
        cycle = RequestResponseCycle(scope, transport, flow, log, log, False, [], event, **options)  # pyright: ignore
        return cycle, DirectBody(cycle)

    async def task():
        cycle, direct = begun()
        assert not direct.is_ready, "no response has started"
        await cycle.send({"type": "http.response.start", "status": 200, "headers": []})
        assert direct.is_ready
        written.clear()
        part = b"data: 1\n\n" * 30
        await cycle.send({"type": "http.response.body", "body": part, "more_body": True})
        direct.write(part)
        assert written[0] == written[1]
        cycle.flow.pause_writing()
        assert not direct.is_ready, "the peer does not read"
        cycle.flow.resume_writing()
        assert direct.is_ready
        await cycle.send({"type": "http.response.body", "body": b"", "more_body": False})
        assert not direct.is_ready, "the response has ended"
        cycle, direct = begun()
        await cycle.send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        assert not direct.is_ready, "the body is in one piece"
        cycle, direct = begun()
        await cycle.send({"type": "http.response.start", "status": 200, "headers": []})
        cycle.disconnected = True
        assert not direct.is_ready, "the peer has left"

    asyncio.run(task())


@pytest.mark.parametrize(("method", "is_direct"), [("POST", True), ("HEAD", False)])
def test_the_direct_way_is_there_while_a_request_with_a_body_is_served(method, is_direct):
    seen = []

    async def app(scope, receive, send):
        seen.append(DIRECT_BODY in scope.get("state", {}))

    class Cycle(RequestResponseCycle):
        def __init__(self):
            pass

    async def task():
        scope = {"type": "http", "method": method, "state": {}}
        await DirectBodies(app)(scope, None, Cycle().send)  # pyright: ignore[reportArgumentType]
        assert scope["state"] == {}

    asyncio.run(task())
    assert seen == [is_direct]
