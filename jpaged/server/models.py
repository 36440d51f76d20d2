"""``/v1/models``: the model that is served."""

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from jpaged.server.json_response import OrjsonResponse
from jpaged.server.state import Server, server_of


def _card(server: Server) -> dict[str, Any]:
    return {
        "id": server.model_name,
        "object": "model",
        "created": server.created,
        "owned_by": "jpaged",
        "root": server.model_name,
        "parent": None,
        "max_model_len": server.llm.max_model_len,
    }


async def list_models(request: Request) -> Response:
    """List the one model."""
    content = {"object": "list", "data": [_card(server_of(request))]}
    return OrjsonResponse(content)


async def show_model(request: Request) -> Response:
    """Describe a model."""
    server = server_of(request)
    server.check_model(request.path_params["model"])
    return OrjsonResponse(_card(server))
