"""The guard: keys, names of hosts, bodies, ids and the log, before any route."""

import asyncio
import json
import logging

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from jpaged.server.errors import HANDLERS
from jpaged.server.guard import LONGEST_LOGGED, Guard, GuardRules, escaped
from jpaged.server.keys import KEYS_VARIABLE, KeyRing

KEY = "sk-the-key-of-alice"
AUTHORIZED = {"authorization": f"Bearer {KEY}"}
MAX_BODY = 1000


async def echo(request: Request) -> JSONResponse:
    body = await request.body()
    if body == b'"fail"':
        raise RuntimeError(f"a mistake in /the/file with {KEY}")
    state = request.state
    return JSONResponse({"key": state.key.name, "id": state.request_id, "size": len(body)})


async def dance(request: Request) -> JSONResponse:
    """Reads no body."""
    return JSONResponse({})


def guarded(*keys: str, **rules) -> Guard:
    routes = [Route("/echo", echo, methods=["GET", "POST"]), Route("/live", dance), Route("/v1/models", dance)]
    app = Starlette(routes=routes, exception_handlers=HANDLERS)
    app.router.redirect_slashes = False
    given = {
        "open_paths": {"/live"},
        "hosts": {"localhost", "127.0.0.1"},
        "max_body_bytes": MAX_BODY,
        "max_pending_bytes": 10 * MAX_BODY,
    }
    return Guard(app, GuardRules(**given | rules), KeyRing.load(None, {KEYS_VARIABLE: ",".join(keys)}))


def ask(guard: Guard, path: str = "/echo", method: str = "GET", **options) -> httpx.Response:
    async def run() -> httpx.Response:
        transport = httpx.ASGITransport(guard, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as client:
            return await client.request(method, path, **options)

    return asyncio.run(run())


def error_of(response: httpx.Response) -> dict:
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


PATHS = [
    *("/echo", "/v1/models", "//v1/models", "/v1/../v1/models", "/V1/models", "/v1/models/", "/%2Fv1/models"),
    *("/live/", "//live", "/LIVE", "/live/../echo", "/live%2F", "/absent", "/", "/metrics", "/docs", "/openapi.json"),
]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS", "WEIRD"])
def test_every_path_and_method_needs_a_key(path, method):
    guard = guarded(KEY)
    url = httpx.URL("http://127.0.0.1:8000", raw_path=path.encode())
    for headers in (
        {},
        {"authorization": "Bearer sk-another-key"},
        {"authorization": "Bearer"},
        {"authorization": "Bearer "},
        {"authorization": f"bearer {KEY}"},
        {"authorization": f"Basic {KEY}"},
        {"authorization": KEY},
        {"authorization": f"Bearer  {KEY}"},
        {"authorization": f"Bearer {KEY} "},
        {"api-key": KEY, "x-http-method-override": "GET", "x-forwarded-prefix": "/live", "x-original-url": "/live"},
        [("authorization", f"Bearer {KEY}"), ("authorization", f"Bearer {KEY}")],
        [("authorization", b"Bearer \xd0\xba\xd0\xbb\xd1\x8e\xd1\x87")],
    ):
        response = ask(guard, str(url), method, headers=headers)
        assert response.status_code == 401
        assert response.headers["www-authenticate"].startswith("Bearer")
    assert ask(guard, f"{url}?key={KEY}&api_key={KEY}", method).status_code == 401


def test_open_paths_need_none():
    assert ask(guarded(KEY), "/live").status_code == 200
    assert ask(guarded(KEY), "/live", headers={"authorization": "Bearer wrong"}).status_code == 200


def test_a_valid_key_is_known_to_the_app():
    response = ask(guarded("sk-the-first-key", KEY), headers=AUTHORIZED)
    assert response.json()["key"] == "env-1"
    assert error_of(ask(guarded(KEY), "/absent", headers=AUTHORIZED))["type"] == "not_found_error"
    assert ask(guarded(KEY), "/v1/models/", headers=AUTHORIZED).status_code == 404  # no redirect to the Host header


def test_without_keys_any_authorization_passes():
    for headers in ({}, {"authorization": "Bearer "}, {"authorization": "Bearer x"}):
        assert ask(guarded(), headers=headers).json()["key"] == "anonymous"


@pytest.mark.parametrize("host", ["localhost", "localhost:8000", "127.0.0.1:1", "LOCALHOST"])
def test_without_keys_the_host_is_one_of_ours(host):
    assert ask(guarded(), headers={"host": host}).status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "localhost.", "[::1]:80", "10.0.0.1"])
def test_without_keys_a_page_that_rebinds_its_name_is_refused(host):
    assert error_of(ask(guarded(), headers={"host": host}))["code"] == "unknown_host"
    assert ask(guarded(), "/live", headers={"host": host}).status_code == 403
    assert ask(guarded(KEY), headers=AUTHORIZED | {"host": host}).status_code == 200
    assert ask(guarded(hosts=None), headers={"host": host}).status_code == 200


@pytest.mark.parametrize("host", ["a/?x=", "a/live?", "", " ", "a b", "localhost:99999999", "localhost:x", "a@b", "é"])
def test_a_host_that_is_none_is_refused(host):
    for guard in (guarded(), guarded(KEY)):
        assert ask(guard, headers=AUTHORIZED | {"host": host.encode()}).status_code == 400
    twice = [("host", "localhost"), ("host", "localhost")]
    assert ask(guarded(), headers=twice).status_code == 400


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"content-length": "10000000000"}, 413),
        ({"content-length": str(MAX_BODY + 1)}, 413),
        ({"content-length": "-1"}, 400),
        ({"content-length": "1e3"}, 400),
        ({"content-length": "9" * 30}, 400),
        ({"content-encoding": "gzip"}, 415),
        ({"content-encoding": "br"}, 415),
        ({"content-type": "text/plain"}, 415),
        ({"content-type": ""}, 415),
        ({"content-type": "application/x-www-form-urlencoded"}, 415),
        ({"content-type": "multipart/form-data; boundary=application/json"}, 415),
        ({"content-type": "application/json; charset=utf-16"}, 415),
        ({"content-type": "application/json; charset=utf-8"}, 200),
        ({"content-type": "Application/JSON"}, 200),
        ({"content-encoding": "identity"}, 200),
    ],
)
def test_a_body_is_refused_by_its_headers(headers, status):
    """A page of another site can send text, and forms, but no JSON: the browser asks first."""
    response = ask(guarded(), method="POST", content=b"{}", headers={"content-type": "application/json"} | headers)
    assert response.status_code == status
    if status != 200:
        assert error_of(response)
        assert response.headers["connection"] == "close"


def test_a_body_without_an_end_is_cut():
    sent = 0

    async def endless():
        nonlocal sent
        while True:
            sent += 1
            yield b"[" * 100

    guard = guarded()
    response = ask(guard, method="POST", content=endless(), headers={"content-type": "application/json"})
    assert (response.status_code, error_of(response)["type"]) == (413, "request_too_large")
    assert sent <= MAX_BODY / 100 + 2
    assert guard._num_pending_bytes == 0


def test_the_bodies_of_all_requests_are_bounded():
    guard = guarded(max_pending_bytes=100)
    response = ask(guard, method="POST", json="x" * 100)
    assert (response.status_code, response.headers["retry-after"]) == (503, "1")
    assert ask(guard, method="POST", json="x" * 90).json()["size"] == 92
    assert guard._num_pending_bytes == 0


def test_ids_are_ours_and_the_clients_is_sent_back():
    response = ask(guarded(), headers={"x-request-id": "my-id_1.0"})
    assert response.headers["x-request-id"] == "my-id_1.0"
    assert len(response.json()["id"]) == 32
    assert ask(guarded(), headers={"x-request-id": "my-id_1.0"}).json()["id"] != response.json()["id"]


@pytest.mark.parametrize(
    "given", [b"", b"a b", b"a\r\nset-cookie: x", b"\x00", "😀".encode(), b"x" * 65536, b"http://x"]
)
def test_an_id_that_is_not_valid_is_replaced(given):
    response = ask(guarded(), headers=[("x-request-id", given)])
    assert response.headers["x-request-id"] == response.json()["id"]
    twice = ask(guarded(), headers=[("x-request-id", "a"), ("x-request-id", "b")])
    assert twice.headers["x-request-id"] == twice.json()["id"]


def test_responses_are_not_stored_and_not_guessed_at():
    headers = ask(guarded()).headers
    assert (headers["cache-control"], headers["x-content-type-options"]) == ("no-store", "nosniff")
    assert "access-control-allow-origin" not in headers
    assert int(headers["openai-processing-ms"]) >= 0


def test_a_mistake_of_ours_tells_nothing(caplog):
    response = ask(guarded(), method="POST", json="fail")
    assert response.status_code == 500
    assert error_of(response)["type"] == "server_error"
    assert "mistake" not in response.text
    assert "file" not in response.text
    assert response.headers["x-request-id"] in caplog.text


def test_the_log_has_one_safe_line_for_each_request(caplog):
    guard = guarded(KEY)
    evil = "/a\n\r\x1b[31m\u202e" + "x" * 1_000_000
    scope = {
        "type": "http",
        "method": "G\nET",
        "path": evil,
        "query_string": b"secret=1",
        "headers": [(b"host", b"localhost"), (b"user-agent", b"\x1b[2J"), (b"authorization", f"Bearer {KEY}".encode())],
        "client": ("1.2.3.4", 5),
    }
    sent = []

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message):
        sent.append(message)

    with caplog.at_level(logging.INFO, "jpaged.access"):
        asyncio.run(guard(scope, receive, send))
    [record] = [record for record in caplog.records if record.name == "jpaged.access"]
    line = record.getMessage()
    assert line.isprintable()
    assert len(line) < 3 * LONGEST_LOGGED
    assert "\\n" in line
    assert "404" in line
    for secret in (KEY, "secret=1"):
        assert secret not in line
    assert json.loads(sent[-1]["body"])["error"]["type"] == "not_found_error"


def test_values_are_escaped_for_the_log():
    assert escaped("plain text, ünïcödé") == "plain text, ünïcödé"
    assert escaped("a\nb\r\x1b[0m\u202e\u2028\x00\ud800") == "a\\nb\\r\\x1b[0m\\u202e\\u2028\\x00\\ud800"
    assert len(escaped("\n" * 10**6)) == LONGEST_LOGGED


def test_web_sockets_are_refused():
    sent = []

    async def receive():
        return {"type": "websocket.connect"}

    async def send(message):
        sent.append(message)

    asyncio.run(guarded()({"type": "websocket", "path": "/echo", "headers": []}, receive, send))
    assert sent == [{"type": "websocket.close", "code": 1008}]
