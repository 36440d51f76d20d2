"""Whether the server lives, is healthy and takes requests, and its progress until it does."""

from collections.abc import Callable
from time import monotonic
from typing import Any, NamedTuple

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from jpaged.async_llm import AsyncLLM
from jpaged.progress import Progress, watched
from jpaged.server.json_response import OrjsonResponse
from jpaged.server.metrics import own_version


class Report(NamedTuple):
    """The health of a server.

    Args:
        body: the answer, for people and programs.
        is_healthy: whether requests get their tokens, or will once the model is there.
        is_ready: whether requests are taken.
    """

    body: dict[str, Any]
    is_healthy: bool
    is_ready: bool


class Startup:
    """Progress of a server whose model is not there yet. ``load`` writes it, any thread reads it."""

    def __init__(self) -> None:
        self._progress: Progress | None = None
        self._error: BaseException | None = None

    def load[T](self, make: Callable[[], T]) -> T:
        """Make the engine, and follow its progress."""
        try:
            with watched(self._take):
                return make()
        except BaseException as error:
            self._error = error
            raise

    def _take(self, progress: Progress) -> None:
        self._progress = progress

    def report(self) -> Report:
        """The health now: green while the model is loaded and compiled, however long that takes."""
        if self._error is not None:
            return Report({"state": "dead"}, is_healthy=False, is_ready=False)
        body = {"state": "loading"} if self._progress is None else self._progress._asdict()
        return Report(body, is_healthy=True, is_ready=False)


def report_of(llm: AsyncLLM) -> Report:
    """The health of an engine, read without waiting for it. The text of its errors stays in the log."""
    health = llm.health()
    body: dict[str, Any] = {"state": health.state.value}
    if health.num_failures:
        body["failed_steps"] = health.num_failures
    if health.step_began is not None:
        body["step_running_s"] = round(monotonic() - health.step_began, 3)
    if health.compiling is not None:
        body["compiling"] = {"done": health.compiling.done, "of": health.compiling.of}
    return Report(body, health.is_healthy, health.is_ready)


def health_routes(report: Callable[[], Report]) -> list[Route]:
    """The routes of health, for a server that starts and for one that serves.

    ``/live`` says that the process answers. ``/health`` and ``/ping`` say that requests get their tokens, ``/ready``
    that new requests are taken.

    Args:
        report: the health now.
    """

    async def live(request: Request) -> Response:
        return _answer({"state": "live"}, is_good=True)

    async def health(request: Request) -> Response:
        now = report()
        return _answer(now.body, is_good=now.is_healthy)

    async def ready(request: Request) -> Response:
        now = report()
        return _answer(now.body, is_good=now.is_ready)

    async def version(request: Request) -> Response:
        return _answer({"version": own_version()}, is_good=True)

    return [
        Route("/live", live),
        Route("/health", health),
        Route("/ping", health, methods=["GET", "POST"]),
        Route("/ready", ready),
        Route("/version", version),
    ]


def _answer(body: dict[str, Any], *, is_good: bool) -> Response:
    headers = {"cache-control": "no-store"}
    return OrjsonResponse(body, 200 if is_good else 503, headers)
