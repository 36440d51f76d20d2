"""Requests that are meant to get past the server, or to hold it up: none does, and no one else notices."""

import ast
import asyncio
import logging
import os
import re
import socket
import struct
import threading
from pathlib import Path

import httpx
import pytest
from starlette.routing import Route

import jpaged.server
from jpaged.server import ServerSettings, create_app
from jpaged.server.dashboard.routes import OPEN_PATHS
from jpaged.server.keys import KEYS_VARIABLE, KeyRing
from tests.server.bystander import bystander
from tests.server.conftest import TIMEOUT_S, Served

KEY = "sk-the-key-of-alice"
LONG = {"prompt": "import", "max_tokens": 280, "ignore_eos": True, "temperature": 0}
JSON = {"content-type": "application/json"}


@pytest.fixture(autouse=True)
def _while_another_client_asks(served):
    with bystander(served):
        yield


def keyed(served: Served, **settings) -> httpx.AsyncClient:
    """A client of an application with a key, over the same engine."""
    app = create_app(served.llm, ServerSettings(**settings), KeyRing.load(None, {KEYS_VARIABLE: KEY}))
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1", timeout=TIMEOUT_S)


def connect(served: Served) -> socket.socket:
    host, port = httpx.URL(served.base_url).host, httpx.URL(served.base_url).port
    return socket.create_connection((host, port or 80), TIMEOUT_S)


def head(path: str = "/v1/completions", **headers: object) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "host: localhost", "content-type: application/json"]
    return "\r\n".join(
        [*lines, *[f"{name.replace('_', '-')}: {value}" for name, value in headers.items()], "", ""]
    ).encode()


def read_all(connection: socket.socket) -> bytes:
    data = b""
    try:
        while part := connection.recv(1 << 16):
            data += part
    except ConnectionResetError:
        pass
    connection.close()
    return data


# The code -------------------------------------------------------------------------------------------------------------


def test_nothing_is_evaluated_and_no_check_vanishes_under_python_o():
    """``python -O`` drops assertions: one that tells more than that something is there may be a check."""
    found = []
    for path in Path(jpaged.server.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            is_bad = isinstance(node, ast.Assert) and not re.fullmatch(r"[\w.]+ is not None", ast.unparse(node.test))
            if isinstance(node, ast.Call):
                is_bad = ast.unparse(node.func) in ("eval", "exec", "os.system", "__import__")
            if isinstance(node, ast.Import | ast.ImportFrom):
                modules = {*(alias.name for alias in node.names), getattr(node, "module", None)}
                is_bad = not modules.isdisjoint({"pickle", "marshal", "shelve", "yaml", "subprocess", "dill"})
            if is_bad:
                found.append(f"{path.name}: {ast.unparse(node)}")
    assert not found


def test_no_setting_is_a_secret():
    """An option is seen by all users of the machine: keys come from a file or the environment."""
    assert not [
        name
        for name in ServerSettings.__dataclass_fields__
        if re.search(r"(api_|^)keys?$|token$|secret|password", name)
    ]


# Keys -----------------------------------------------------------------------------------------------------------------


def test_every_route_needs_a_key_but_those_that_tell_nothing(served):
    async def task() -> list[str]:
        async with keyed(served) as client:
            app = client._transport.app  # pyright: ignore[reportAttributeAccessIssue]
            opened = []
            for route in app.routes:
                assert isinstance(route, Route)
                path = re.sub(r"\{[^}]*\}", "x", route.path)
                for headers in ({}, {"authorization": "Bearer wrong-key"}, {"authorization": f"bearer {KEY}"}):
                    for method in ("GET", "POST", "DELETE", "HEAD", "OPTIONS"):
                        response = await client.request(method, f"{path}?api_key={KEY}", headers=headers)
                        if response.status_code != 401:
                            opened.append(path)
            return opened

    assert set(served.run(task())) == {"/live", *OPEN_PATHS}


def test_a_key_is_shown_nowhere(served, caplog):
    async def task() -> list[str]:
        async with keyed(served) as client:
            headers = {"authorization": f"Bearer {KEY}"}
            texts = []
            for path, body in (("/v1/completions", {"prompt": "x", "max_tokens": 1, "user": "u"}), ("/v1/nothing", {})):
                response = await client.post(path, json=body, headers=headers)
                texts += [response.text, str(response.headers)]
            texts.append((await client.post("/v1/completions", json={"prompt": KEY * 9999}, headers=headers)).text)
            response = await client.get("/metrics", headers=headers)
            assert response.status_code == 200
            return [*texts, response.text]

    with caplog.at_level(logging.DEBUG):
        texts = served.run(task())
    prompts_aside = [text.replace(KEY * 9, "") for text in texts]
    assert KEY not in "".join(prompts_aside)
    assert KEY not in caplog.text
    assert "key env-0" in caplog.text


def test_metrics_may_be_open(served):
    async def task() -> list[int]:
        async with keyed(served, metrics_without_key=True) as client:
            return [(await client.get(path)).status_code for path in ("/metrics", "/v1/models", "/dashboard/feed")]

    assert served.run(task()) == [200, 401, 401]


# Bodies ---------------------------------------------------------------------------------------------------------------


def test_bodies_that_are_none_are_refused(served):
    many = b"{" + b",".join([b'"k%d":0' % i for i in range(200_000)]) + b"}"
    deep = b'{"prompt":' + b"[" * 100_000
    cases = [
        b"",
        b"null",
        b"[]",
        b'"x"',
        b"0",
        b"{",
        b"\xff",
        b"\xef\xbb\xbf{}",
        '{"prompt":"x"}'.encode("utf-16"),
        many,
        deep,
    ]
    cases += [
        deep + b"]" * 100_000 + b"}",
        b'{"prompt":' + b'{"a":' * 50_000 + b"1" + b"}" * 50_001,
        b'{"prompt":"x",}',
    ]
    cases += [b'{"prompt": NaN}', b'{"prompt":"x"}{"prompt":"y"}', b"\x00", b"{'prompt':'x'}"]
    for body in cases:
        response = served.wire.post("/v1/completions", content=body, headers=JSON)
        assert response.status_code in (400, 415), body[:50]
        assert response.json()["error"]
    twice = b'{"max_tokens":1,"prompt":"x","prompt":"import"}'
    assert served.wire.post("/v1/completions", content=twice, headers=JSON).status_code == 200


def test_large_bodies_are_refused_before_they_have_come(served):
    connection = connect(served)
    connection.sendall(head(content_length=10**10))
    assert read_all(connection).startswith(b"HTTP/1.1 413")
    connection = connect(served)
    connection.sendall(head(transfer_encoding="chunked"))
    limit, sent, chunk = served.server.settings.max_body_bytes, 0, b"100000\r\n" + b"[" * 0x100000 + b"\r\n"
    try:
        while sent < 4 * limit:
            sent += connection.send(chunk)
    except OSError:
        pass
    connection.close()
    assert sent < 2 * limit
    for extra in ({"content_length": 2, "transfer_encoding": "chunked"}, {"content_length": -1}):
        connection = connect(served)
        connection.sendall(head(**extra) + b"{}")
        assert read_all(connection).startswith(b"HTTP/1.1 400")
    connection = connect(served)
    connection.sendall(head(content_length=2, content_encoding="gzip") + b"{}")
    assert read_all(connection).startswith(b"HTTP/1.1 415")


# Peers ----------------------------------------------------------------------------------------------------------------


def test_a_reader_that_never_reads_is_given_up(served):
    """The engine is done with it, and its place is another's, while the client still has not read a byte."""
    body = httpx.Request("POST", "http://x", json=LONG | {"stream": True, "max_tokens": 99}).content
    connection = connect(served)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.sendall(head(content_length=len(body)) + body)

    def is_there() -> bool:
        return any(ticket.demand.max_tokens == 99 for ticket in served.server.admission._in_engine.values())

    async def has_come_and_gone() -> None:
        while not is_there():
            await asyncio.sleep(0)
        while is_there():
            await asyncio.sleep(0)

    served.run(has_come_and_gone())
    connection.close()


def num_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("is_reset", [False, True])
def test_clients_that_leave_at_any_moment_leave_nothing(served, is_reset):
    """Tasks and files are as many as before, after clients have left while queued, in a prompt and in an output."""
    forms = [LONG, LONG | {"stream": True}, LONG | {"n": 8, "temperature": 1}, LONG | {"n": 4, "use_beam_search": True}]

    async def num_tasks() -> int:
        return len(asyncio.all_tasks())

    def left() -> tuple[int, int]:
        return num_files(), served.run(num_tasks())

    async def settled() -> None:
        while served.server.calls or served.server.admission.num_placed_sequences:
            await asyncio.sleep(0)
        await served.idle()

    def leave(number: int) -> None:
        form = forms[number % len(forms)]
        body = httpx.Request("POST", "http://x", json=form | {"prompt": f"x = {number}"}).content
        connection = connect(served)
        connection.sendall(head(content_length=len(body)) + body[: len(body) if number % 5 else 10])
        if number % 3 == 0:
            connection.recv(1) if form.get("stream") else served.run(asyncio.sleep(0))
        if is_reset:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()

    leave(0)
    served.run(settled())
    files, tasks = left()
    for number in range(40):
        leave(number)
    served.run(settled())
    for _ in range(1000):  # connections end a moment after their requests; the bystander has one, or none
        now_files, now_tasks = left()
        if now_files <= files + 2 and now_tasks <= tasks + 3:
            return
    pytest.fail(f"{now_files - files} files and {now_tasks - tasks} tasks are left")


# Ids, logs, metrics ---------------------------------------------------------------------------------------------------


def test_what_a_client_writes_makes_no_series_and_no_line_of_its_own(served, caplog):
    def series() -> set[str]:
        lines = served.wire.get("/metrics").text.splitlines()
        return {line.rpartition(" ")[0] for line in lines if not line.startswith("#")}

    def ask(i: int) -> None:
        evil = f"m{i}\n\r\x1b[31m\u202e<img src=x onerror=alert(1)>"
        served.wire.get(f"/{i}/%0a%0d%1b[2J")
        served.wire.request(f"WEIRD{i}", "/v1/models")
        served.post("/v1/completions", model=evil, prompt="x", user=evil)
        served.post("/v1/completions", prompt="x", max_tokens=1, user=evil, **{evil: 1})

    with caplog.at_level(logging.INFO):
        ask(0)
        series()
        before = series()
        for i in range(1, 30):
            ask(i)
        assert series() - before == set()
    for record in caplog.records:
        assert record.getMessage().isprintable()
    assert "alert" not in caplog.text


def test_prompts_and_outputs_are_not_logged(served, caplog):
    with caplog.at_level(logging.DEBUG):
        text = served.complete("a very private prompt", max_tokens=8, ignore_eos=True)["choices"][0]["text"]
        served.post("/v1/completions", prompt=["a very private prompt"] * 9999)
    assert "private" not in caplog.text
    assert text.strip()[:8] not in caplog.text


def test_no_other_site_may_ask_unless_it_is_allowed(served):
    origin = {"origin": "https://evil.example", "access-control-request-method": "POST"}
    for method, path in (("OPTIONS", "/v1/completions"), ("GET", "/v1/models"), ("GET", "/")):
        response = served.wire.request(method, path, headers=origin)
        assert not [name for name in response.headers if name.startswith("access-control")]
    assert served.wire.get("/v1/models", headers={"host": "evil.example"}).status_code == 403

    async def task() -> None:
        async with keyed(served, allowed_origins=["https://good.example"]) as client:
            for site, allowed in (("https://good.example", True), ("https://evil.example", False)):
                asked = {"origin": site, "access-control-request-method": "POST"}
                response = await client.options("/v1/completions", headers=asked)
                assert (response.headers.get("access-control-allow-origin") == site) is allowed
                response = await client.get("/v1/models", headers={"origin": site})
                assert response.status_code == 401

    served.run(task())


def test_nothing_is_fetched_for_a_client(served, monkeypatch):
    """No field makes the server connect to anywhere."""
    connects: list[object] = []
    loop_thread = threading.current_thread()

    def watched(self, address, connect=socket.socket.connect):
        if threading.current_thread() is not loop_thread and not str(address).startswith("('127.0.0.1'"):
            connects.append(address)
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", watched)
    url = "http://198.51.100.1/x"
    for fields in (
        {"prompt": url, "user": url},
        {"prompt": [{"type": "image_url", "image_url": {"url": url}}]},
        {"prompt": "x", "file_url": url, "tools": [{"type": "mcp", "server_url": url}]},
        {"prompt": "x", "response_format": {"type": "json_schema", "json_schema": {"schema": {"$ref": url}}}},
        {"prompt": "x", "model": url},
    ):
        served.wire.post("/v1/completions", json=fields | {"max_tokens": 1}, headers={"x-request-id": url})
    assert connects == []


def test_paths_of_this_machine_are_not_told(served):
    for response in (
        served.wire.get("/v1/models"),
        served.wire.get("/version"),
        served.wire.get("/health"),
        served.post("/v1/completions", prompt="x", max_tokens=1),
        served.post("/v1/completions", prompt="x", model="/etc/passwd"),
        served.wire.get("/../../etc/passwd"),
        served.wire.get("/dashboard/..%2f..%2fsettings.py"),
    ):
        assert not re.search(r"/(work|root|home|usr|tmp)/|site-packages", response.text + str(response.headers))
