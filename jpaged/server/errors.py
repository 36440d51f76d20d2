"""Errors of the API: one exception, and the form in which OpenAI's clients read it."""

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import orjson
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from jpaged.engine.health import EngineDeadError

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    499: "cancelled_error",
    503: "service_unavailable_error",
}

CANCELLED_STATUS = 499
"""The status of a request that was cancelled: clients do not retry it, as they would 408, 409, 429 and 5xx."""


class ApiError(Exception):
    """A request that ends without its answer.

    Args:
        status: the HTTP status.
        message: the reason, and how to fix it.
        type: the class of errors; None follows from the status.
        code: a word for programs.
        param: the field of the request that is wrong.
        headers: headers of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str | None = None,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.type = type or _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
        self.code = code
        self.param = param
        self.headers = dict(headers or {})

    def body(self) -> bytes:
        """The error as JSON."""
        fields = {"message": str(self), "type": self.type, "param": self.param, "code": self.code}
        return orjson.dumps({"error": fields})

    def response(self) -> Response:
        """The whole response."""
        return Response(self.body(), self.status, self.headers, "application/json")


def own_mistake() -> ApiError:
    """The error for a failure of the server, of which the client learns nothing more."""
    return ApiError(500, "the server failed, and its log says why")


@contextmanager
def refusals(names: Iterable[str] = ()) -> Iterator[None]:
    """Turn the errors of the engine's own checks into those of the API.

    Args:
        names: fields of the request, of which a message that begins with one is about that field.

    Raises:
        ApiError: 400 for a ValueError, 503 for an engine that takes no requests.
    """
    try:
        with engine_deaths():
            yield
    except ValueError as error:
        message = str(error).replace("expected None or ", "expected null or ")  # clients write JSON
        first = re.match(r"\w+", message)
        param = first[0] if first is not None and first[0] in set(names) else None
        raise ApiError(400, message, param=param) from error


@contextmanager
def engine_deaths() -> Iterator[None]:
    """Turn the error of an engine that has ended into that of the API.

    Raises:
        ApiError: 503.
    """
    try:
        yield
    except EngineDeadError as error:
        raise ApiError(503, "no answer can be computed: the engine has ended", code="engine_dead") from error


async def _answer_api_error(request: Request, error: Any) -> Response:
    return error.response()


async def _answer_http_error(request: Request, error: Any) -> Response:
    message = {404: "there is no such path", 405: "the path does not take this method"}.get(error.status_code)
    return ApiError(error.status_code, message or error.detail, headers=error.headers).response()


async def _answer_a_mistake_of_ours(request: Request, error: Any) -> Response:
    return own_mistake().response()


async def _answer_a_client_that_left(request: Request, error: Any) -> Response:
    return Response(status_code=CANCELLED_STATUS)  # it is sent to no client


HANDLERS: dict[Any, Any] = {
    ApiError: _answer_api_error,
    HTTPException: _answer_http_error,
    ClientDisconnect: _answer_a_client_that_left,
    Exception: _answer_a_mistake_of_ours,
}
"""The responses to exceptions, for Starlette."""
