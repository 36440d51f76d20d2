"""The trace that a client is in, while its request is served."""

import re
from contextvars import ContextVar

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

_TRACEPARENT = re.compile(r"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")
"""Version 0 of W3C's Trace Context, section 3.2."""

traceparent: ContextVar[str | None] = ContextVar("traceparent", default=None)
"""The client's ``traceparent`` header, if it is well formed; ``TraceContext`` writes it."""


class TraceContext:
    """ASGI middleware: sets ``traceparent`` while a request is served.

    Args:
        app: the app.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        given = Headers(scope=scope).getlist("traceparent") if scope["type"] == "http" else []
        is_valid = len(given) == 1 and _TRACEPARENT.fullmatch(given[0]) is not None
        token = traceparent.set(given[0] if is_valid else None)
        try:
            await self._app(scope, receive, send)
        finally:
            traceparent.reset(token)
