"""Bodies of requests: JSON to a checked model, and the fields that it does not have."""

import re
import reprlib
from typing import Any

import orjson
from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.requests import Request

from jpaged.server.errors import ApiError

IGNORED_HEADER = "x-jpaged-ignored-params"
MAX_FIELDS = 256
"""Most fields of a body, known or not."""

_MAX_NAMED = 32
"""Most ignored fields that a header names."""


class Body(BaseModel):
    """A body. Types are strict: true is no integer, and "1" is none either."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True, protected_namespaces=())

    model: str | None = None

    @property
    def ignored(self) -> list[str]:
        """Fields that have no meaning here, but those that are null."""
        return [name for name, value in (self.model_extra or {}).items() if value is not None]


async def read_body[T: Body](request: Request, kind: type[T], *, is_strict: bool) -> T:
    """The body of a request.

    Args:
        request: the request.
        kind: the model.
        is_strict: whether unknown fields are refused.

    Raises:
        ApiError: 415 for another content type, 400 for a body that is not what the model says.
    """
    return parse(kind, await read_fields(request), is_strict=is_strict)


async def read_fields(request: Request) -> dict[str, Any]:
    """The fields of a JSON object.

    Raises:
        ApiError: 415 for another content type, 400 for another body.
    """
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        raise ApiError(415, f"content-type is {reprlib.repr(content_type)}: expected application/json")
    try:
        fields = orjson.loads(await request.body())
    except orjson.JSONDecodeError:
        raise ApiError(400, "the body is not valid JSON") from None
    if not isinstance(fields, dict):
        raise ApiError(400, "the body is not a JSON object")
    if len(fields) > MAX_FIELDS:
        raise ApiError(400, f"the body has {len(fields)} fields: at most {MAX_FIELDS} are taken")
    return fields


def parse[T: Body](kind: type[T], fields: dict[str, Any], *, is_strict: bool) -> T:
    """A model of fields.

    Raises:
        ApiError: 400, with the first field that is wrong.
    """
    try:
        body = kind.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        # Members of unions stand in the location too: the name and the numbers are enough.
        where = "".join(f"[{part}]" if isinstance(part, int) else "" for part in first["loc"][1:])
        param = str(first["loc"][0]) if first["loc"] else None
        got = "" if first["type"] == "missing" else f"={reprlib.repr(first['input'])}"
        message = first["msg"].removeprefix("Value error, ")
        raise ApiError(400, f"{param}{where}{got} is not valid: {message}", param=param) from None
    if is_strict and body.ignored:
        names = ", ".join(reprlib.repr(name) for name in body.ignored[:_MAX_NAMED])
        raise ApiError(400, f"unknown fields: {names}", code="unknown_parameter")
    return body


def ignored_header(body: Body) -> dict[str, str]:
    """The header that names ignored fields, if there are any."""
    names = [re.sub(r"[^\w.-]", "?", name, flags=re.ASCII)[:64] for name in body.ignored[:_MAX_NAMED]]
    return {IGNORED_HEADER: ", ".join(names)} if names else {}
