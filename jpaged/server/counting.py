"""Middleware that counts every answer over HTTP."""

from time import monotonic

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jpaged.server.errors import CANCELLED_STATUS
from jpaged.server.metrics import Metrics


class Counting:
    """ASGI middleware: counts answers by route, method and status. It belongs outside of all others.

    Args:
        app: the app.
        metrics: takes the counts.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = monotonic(), CANCELLED_STATUS  # that of a client which left before it had an answer

        async def note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, note)
        except Exception:
            status = 500
            raise
        finally:
            # The path that the route was declared with: the path of the request would make a series of its own.
            handler = getattr(scope.get("route"), "path", None)
            self._metrics.answered(handler, scope["method"], status, monotonic() - began)
