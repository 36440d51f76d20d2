"""``/v1/requests/{id}/cancel``: the end of a request that its sender wants no more."""

from starlette.requests import Request
from starlette.responses import Response

from jpaged.server.errors import ApiError
from jpaged.server.json_response import OrjsonResponse
from jpaged.server.state import server_of


async def cancel(request: Request) -> Response:
    """End an unfinished request: it gets an error with the code "cancelled"."""
    await request.body()  # a client may still send it, and would miss an answer that closes the connection
    call_id = request.path_params["call_id"]
    if not await server_of(request).cancel(request, call_id):
        raise ApiError(404, f"no unfinished request has the id {call_id[:128]!r}", code="request_not_found")
    return OrjsonResponse({"id": call_id, "cancelled": True})
