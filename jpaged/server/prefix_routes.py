"""``/v1/prefixes``: prompts whose KV stays in the pool for a while."""

from typing import Annotated, Any

from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from jpaged.server.answer import until_client_leaves
from jpaged.server.json_response import OrjsonResponse
from jpaged.server.protocol.body import Body, ignored_header, parse, read_fields
from jpaged.server.protocol.chat import ChatOptions
from jpaged.server.protocol.completions import prompts_of
from jpaged.server.protocol.sampling import CacheSalt
from jpaged.server.state import Server, server_of

_Seconds = Annotated[float, Field(gt=0)]


class PrefixBody(Body):
    """The body of a request to pin a text or token ids.

    ``ttl`` is the seconds that it stays pinned, ``cache_salt`` that of the requests which are to find it.
    """

    prompt: Any
    ttl: _Seconds | None = None
    cache_salt: CacheSalt | None = None
    add_special_tokens: bool | None = None


class ChatPrefixBody(ChatOptions):
    """The body of a request to pin the first messages of conversations."""

    add_generation_prompt: bool | None = False  # another message follows
    ttl: _Seconds | None = None


async def pin_prefix(request: Request) -> Response:
    """Pin a prefix."""
    server, fields = server_of(request), await read_fields(request)
    kind = ChatPrefixBody if "messages" in fields else PrefixBody
    body = parse(kind, fields, is_strict=server.settings.strict_params)
    server.check_model(body.model)
    token_ids = await _read(server, body)
    async with until_client_leaves(request.receive):
        prefix = await server.prefixes.pin(request.state.key, token_ids, body.cache_salt, body.ttl)
    headers = ignored_header(body) | {"location": f"/v1/prefixes/{prefix.prefix_id}"}
    return OrjsonResponse(prefix.card(), 201, headers)


async def _read(server: Server, body: PrefixBody | ChatPrefixBody) -> list[int]:
    """The token ids of a prefix."""
    if isinstance(body, ChatPrefixBody):
        body.check()
        return await server.template.render(body)
    [prompt] = prompts_of(body.prompt, 1)
    if not isinstance(prompt, str):
        return prompt
    [token_ids] = await server.codec.encode([prompt], add_special_tokens=body.add_special_tokens is not False)
    return token_ids


async def list_prefixes(request: Request) -> Response:
    """List the prefixes of the key."""
    cards = [each.card() for each in server_of(request).prefixes.owned_by(request.state.key)]
    return OrjsonResponse({"object": "list", "data": cards})


async def show_prefix(request: Request) -> Response:
    """Describe a prefix."""
    prefix = server_of(request).prefixes.find(request.state.key, request.path_params["prefix_id"])
    return OrjsonResponse(prefix.card())


async def unpin_prefix(request: Request) -> Response:
    """Unpin a prefix."""
    prefixes = server_of(request).prefixes
    prefix = prefixes.find(request.state.key, request.path_params["prefix_id"])
    await prefixes.unpin(prefix)
    content = {"id": prefix.prefix_id, "object": "prefix", "deleted": True}
    return OrjsonResponse(content)
