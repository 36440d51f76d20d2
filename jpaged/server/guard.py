"""The guard: what every request passes before the app sees it. Keys, names of hosts, sizes of bodies, ids, the log."""

import logging
import re
import secrets
from collections.abc import Collection
from dataclasses import dataclass
from time import monotonic
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jpaged.server.errors import CANCELLED_STATUS, ApiError, own_mistake
from jpaged.server.keys import ANONYMOUS, ApiKey, KeyRing
from jpaged.server.settings import ServerSettings

LONGEST_LOGGED = 200
"""Characters of one value in the log."""

_REQUEST_ID = re.compile(r"[A-Za-z0-9_.-]{1,128}")
_HOST = re.compile(r"(?P<name>[A-Za-z0-9_.-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\])(:[0-9]{1,5})?")
_CLOSE = {"connection": "close"}

_access = logging.getLogger("jpaged.access")
_log = logging.getLogger(__name__)


def escaped(text: str) -> str:
    """A value for the log: no control or formatting character as such, and of ``LONGEST_LOGGED`` characters at most."""
    safe = "".join([c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:LONGEST_LOGGED]])
    return safe if len(text) <= LONGEST_LOGGED and len(safe) <= LONGEST_LOGGED else safe[: LONGEST_LOGGED - 3] + "..."


@dataclass(frozen=True, slots=True)
class GuardRules:
    """Rules of the guard.

    Args:
        open_paths: paths that need no key.
        hosts: names that a Host header may have while no key is needed, against DNS rebinding; None is any.
        max_body_bytes: bytes of one body.
        max_pending_bytes: bytes of the bodies of all requests together.
    """

    open_paths: Collection[str]
    hosts: Collection[str] | None
    max_body_bytes: int
    max_pending_bytes: int


def guard_rules(settings: ServerSettings, pages: Collection[str] = ()) -> GuardRules:
    """The rules that the settings give. ``/live`` tells nothing but that the server runs, and pages hold no secret."""
    open_paths = {"/live", *pages, *(["/metrics"] if settings.metrics_without_key else [])}
    hosts = {"localhost", "127.0.0.1", "[::1]", settings.host.lower()}
    is_any = settings.insecure or settings.unix_socket is not None
    return GuardRules(open_paths, None if is_any else hosts, settings.max_body_bytes, settings.max_pending_bytes)


class Guard:
    """ASGI middleware: refuses requests without a valid key, from foreign pages, or with bodies that are too large.

    It sets ``request.state.key``, ``request.state.request_id``, a new id, and ``request.state.client_id``, a valid
    ``X-Request-Id`` of the client or None. The client's id is sent back, and otherwise the new one.

    Args:
        app: the app.
        rules: the rules.
        keys: the keys; none is needed if the ring is empty.
    """

    def __init__(self, app: ASGIApp, rules: GuardRules, keys: KeyRing) -> None:
        self._app = app
        self._rules = rules
        self._keys = keys
        self._num_pending_bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self._guard(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await self._app(scope, receive, send)

    async def _guard(self, scope: Scope, receive: Receive, send: Send) -> None:
        passage = _Passage(self, scope, receive, send)
        state: dict[str, Any] = scope.setdefault("state", {})
        state["request_id"], state["client_id"] = passage.request_id, passage.client_id
        try:
            state["key"] = passage.key = self._check(scope["path"], passage.headers)
            self._check_body(passage.headers)
            await self._app(scope, passage.receive, passage.send)
        except ApiError as error:
            await passage.answer(error)
        except ClientDisconnect:
            pass  # no client is there to read an answer
        except Exception:
            _log.exception("request %s failed", passage.request_id)
            if passage.status:
                raise  # a part of the response is sent: the connection is closed
            await passage.answer(own_mistake())
        finally:
            self._num_pending_bytes -= passage.num_bytes
            passage.log()

    def _check(self, path: str, headers: Headers) -> ApiKey:
        """The key of a request, whose headers are all that was read."""
        hosts = headers.getlist("host")
        match = _HOST.fullmatch(hosts[0]) if len(hosts) == 1 else None
        if hosts and match is None:
            raise ApiError(400, "the Host header is not valid: expected NAME or NAME:PORT, once", headers=_CLOSE)
        if not self._keys.is_empty:
            return ANONYMOUS if path in self._rules.open_paths else self._authenticate(headers)
        name = "" if match is None else match["name"].lower()
        if self._rules.hosts is not None and name not in self._rules.hosts:
            raise ApiError(
                403,
                "this server without keys answers to its own names only: use localhost, or start it with keys",
                code="unknown_host",
                headers=_CLOSE,
            )
        return ANONYMOUS

    def _authenticate(self, headers: Headers) -> ApiKey:
        values = headers.getlist("authorization")
        scheme, _, token = values[0].partition(" ") if len(values) == 1 else ("", "", "")
        key = self._keys.find(token.encode("latin-1")) if scheme == "Bearer" and token else None
        if key is None:
            raise ApiError(
                401,
                "no valid API key: send the header 'Authorization: Bearer KEY', once",
                code="invalid_api_key",
                headers={"www-authenticate": 'Bearer realm="jpaged"'},
            )
        return key

    def _check_body(self, headers: Headers) -> None:
        """Refuse a body by its headers."""
        length, encoding = headers.get("content-length", "0"), headers.get("content-encoding", "identity")
        if not re.fullmatch(r"[0-9]{1,19}", length):
            raise ApiError(400, "the Content-Length header is no number", headers=_CLOSE)
        if int(length) > self._rules.max_body_bytes:
            raise self._too_large()
        if int(length) == 0 and "transfer-encoding" not in headers:
            return
        if encoding.lower() != "identity":
            raise ApiError(415, "the body is compressed: send it as it is, without Content-Encoding", headers=_CLOSE)
        media_type, _, parameters = headers.get("content-type", "").partition(";")
        charset = re.search(r"charset\s*=\s*\"?([\w-]+)", parameters.lower())
        if media_type.strip().lower() != "application/json" or (charset and charset[1] not in ("utf-8", "utf8")):
            raise ApiError(415, "the body is not JSON: send 'Content-Type: application/json'", headers=_CLOSE)

    def count(self, num_bytes: int, num_before: int) -> None:
        """Count bytes of a body that has ``num_before`` already.

        Raises:
            ApiError: 413, the body is too large; 503, those of all requests are.
        """
        self._num_pending_bytes += num_bytes
        if num_before + num_bytes > self._rules.max_body_bytes:
            raise self._too_large()
        if self._num_pending_bytes > self._rules.max_pending_bytes:
            headers = {**_CLOSE, "retry-after": "1"}
            raise ApiError(503, "the bodies of all requests take too much memory: try again later", headers=headers)

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body has more than {self._rules.max_body_bytes} bytes: send less", headers=_CLOSE)


class _Passage:
    """One request on its way through the guard."""

    def __init__(self, guard: Guard, scope: Scope, receive: Receive, send: Send) -> None:
        self.headers = Headers(scope=scope)
        self.request_id = secrets.token_hex(16)
        self.key: ApiKey | None = None
        self.status = 0  # 0 until a response has begun
        self.num_bytes = 0  # of the body
        given = self.headers.getlist("x-request-id")
        is_valid = len(given) == 1 and _REQUEST_ID.fullmatch(given[0]) is not None
        self.client_id = given[0] if is_valid else None
        self._shown_id = self.client_id or self.request_id
        self._guard = guard
        self._scope, self._receive, self._send = scope, receive, send
        self._began = monotonic()

    async def receive(self) -> Message:
        message = await self._receive()
        if num_bytes := len(message.get("body", b"")):
            before, self.num_bytes = self.num_bytes, self.num_bytes + num_bytes
            self._guard.count(num_bytes, before)
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["x-request-id"] = self._shown_id
            headers["openai-processing-ms"] = str(round((monotonic() - self._began) * 1000))
            headers["x-content-type-options"] = "nosniff"
            headers.setdefault("cache-control", "no-store")
        await self._send(message)

    async def answer(self, error: ApiError) -> None:
        await error.response()(self._scope, self._receive, self.send)

    def log(self) -> None:
        if not _access.isEnabledFor(logging.INFO):
            return
        client = self._scope.get("client") or ("-", 0)
        _access.info(
            '%s "%s %s" %d %.0f ms key %s id %s',
            escaped(str(client[0])),
            escaped(self._scope["method"]),
            escaped(self._scope["path"]),
            self.status or CANCELLED_STATUS,
            (monotonic() - self._began) * 1000,
            "-" if self.key is None else self.key.name,
            self.request_id if self._shown_id == self.request_id else f"{self.request_id} of {self._shown_id}",
        )
