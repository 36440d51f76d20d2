"""The application: every route and every middleware, in one place."""

import asyncio
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Route

from jpaged.async_llm import AsyncLLM
from jpaged.server.cancel import cancel
from jpaged.server.chat import chat
from jpaged.server.completions import completions
from jpaged.server.counting import Counting
from jpaged.server.dashboard.routes import OPEN_PATHS, feed_route, page_routes
from jpaged.server.errors import HANDLERS
from jpaged.server.guard import Guard, guard_rules
from jpaged.server.health import health_routes
from jpaged.server.keys import KeyRing
from jpaged.server.metrics import metrics_route
from jpaged.server.models import list_models, show_model
from jpaged.server.prefix_routes import list_prefixes, pin_prefix, show_prefix, unpin_prefix
from jpaged.server.settings import ServerSettings
from jpaged.server.state import Server
from jpaged.server.tokenizer_routes import detokenize, tokenize, tokenizer_info
from jpaged.server.trace_context import TraceContext


def create_app(
    llm: AsyncLLM, settings: ServerSettings, keys: KeyRing | None = None, aliases: Collection[str] = ()
) -> Starlette:
    """An ASGI application that serves a model.

    Args:
        llm: the engine; whoever starts the application shuts it down.
        settings: the settings.
        keys: the keys; None reads those of the settings and of the environment.
        aliases: other names that requests may call the model by; no response has them.

    Raises:
        ValueError: the keys cannot be read.
    """
    keys = KeyRing.load(settings.api_key_file) if keys is None else keys
    server = Server(llm, settings, keys, aliases)
    routes = [
        Route("/v1/models", list_models),
        Route("/v1/models/{model:path}", show_model),
        Route("/v1/completions", completions, methods=["POST"]),
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/v1/requests/{call_id}/cancel", cancel, methods=["POST"]),
        Route("/tokenize", tokenize, methods=["POST"]),
        Route("/detokenize", detokenize, methods=["POST"]),
        Route("/tokenizer_info", tokenizer_info),
        Route("/v1/prefixes", pin_prefix, methods=["POST"]),
        Route("/v1/prefixes", list_prefixes),
        Route("/v1/prefixes/{prefix_id}", show_prefix),
        Route("/v1/prefixes/{prefix_id}", unpin_prefix, methods=["DELETE"]),
        metrics_route(server.metrics),
        *health_routes(server.report),
        *page_routes(),
        feed_route(server.feed),
    ]

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        server.template.start()
        async with server.metrics.watching():
            yield
        server.template.close()
        await server.feed.close()
        server.prefixes.close()
        if server.tracing is not None:
            await asyncio.to_thread(server.tracing.shutdown)

    guard = Middleware(Guard, rules=guard_rules(settings, OPEN_PATHS), keys=keys)
    cors = [Middleware(CORSMiddleware, **_cors(settings))] if settings.allowed_origins else []
    traces = [Middleware(TraceContext)] if server.tracing is not None else []
    middleware = [Middleware(Counting, metrics=server.metrics), *cors, guard, *traces]
    app = Starlette(routes=routes, exception_handlers=HANDLERS, middleware=middleware, lifespan=lifespan)
    app.router.redirect_slashes = False  # a redirect is built from the Host header
    app.state.server = server
    return app


def _cors(settings: ServerSettings) -> dict[str, Any]:
    methods, headers = ["GET", "POST", "DELETE"], ["authorization", "content-type", "x-request-id"]
    return {"allow_origins": settings.allowed_origins, "allow_methods": methods, "allow_headers": headers}
