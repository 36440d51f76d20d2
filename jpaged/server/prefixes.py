"""``/v1/prefixes``: prompts whose KV stays in the pool for a while."""

from typing import Annotated, Any

import orjson
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from jpaged.server.answer import until_client_leaves
from jpaged.server.protocol.body import Body, ignored_header, read_body
from jpaged.server.protocol.completions import prompts_of
from jpaged.server.state import server_of


class PrefixBody(Body):
    """The body of a request to pin.

    ``prompt`` is a text or token ids, ``ttl`` the seconds that it stays pinned, ``cache_salt`` that of the requests
    which are to find it.
    """

    prompt: Any
    ttl: Annotated[float, Field(gt=0)] | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    add_special_tokens: bool | None = None


async def pin_prefix(request: Request) -> Response:
    """Pin a prefix."""
    server = server_of(request)
    body = await read_body(request, PrefixBody, is_strict=server.settings.strict_params)
    server.check_model(body.model)
    [prompt] = prompts_of(body.prompt, 1)
    if isinstance(prompt, str):
        [prompt] = await server.codec.encode([prompt], add_special_tokens=body.add_special_tokens is not False)
    async with until_client_leaves(request.receive):
        prefix = await server.prefixes.pin(request.state.key, prompt, body.cache_salt, body.ttl)
    headers = ignored_header(body) | {"location": f"/v1/prefixes/{prefix.prefix_id}"}
    return Response(orjson.dumps(prefix.card()), 201, headers, "application/json")


async def list_prefixes(request: Request) -> Response:
    """List the prefixes of the key."""
    cards = [each.card() for each in server_of(request).prefixes.owned_by(request.state.key)]
    return Response(orjson.dumps({"object": "list", "data": cards}), media_type="application/json")


async def show_prefix(request: Request) -> Response:
    """Describe a prefix."""
    prefix = server_of(request).prefixes.find(request.state.key, request.path_params["prefix_id"])
    return Response(orjson.dumps(prefix.card()), media_type="application/json")


async def unpin_prefix(request: Request) -> Response:
    """Unpin a prefix."""
    prefixes = server_of(request).prefixes
    prefix = prefixes.find(request.state.key, request.path_params["prefix_id"])
    await prefixes.unpin(prefix)
    content = {"id": prefix.prefix_id, "object": "prefix", "deleted": True}
    return Response(orjson.dumps(content), media_type="application/json")
