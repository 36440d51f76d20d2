"""The response of a route that answers with JSON."""

from typing import Any

import orjson
from starlette.responses import JSONResponse


class OrjsonResponse(JSONResponse):
    """A response with a value as JSON. It takes what ``JSONResponse`` takes; orjson writes it, and faster."""

    def render(self, content: Any) -> bytes:
        return orjson.dumps(content)
