"""The application: every route and every middleware, in one place."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.routing import Route

from jpaged.async_llm import AsyncLLM
from jpaged.server.completions import completions
from jpaged.server.counting import Counting
from jpaged.server.dashboard.routes import dashboard_routes
from jpaged.server.errors import HANDLERS
from jpaged.server.health import health_routes, report_of
from jpaged.server.metrics import metrics_route
from jpaged.server.models import list_models, show_model
from jpaged.server.settings import ServerSettings
from jpaged.server.state import Server


def create_app(llm: AsyncLLM, settings: ServerSettings) -> Starlette:
    """An ASGI application that serves a model.

    Args:
        llm: the engine; whoever starts the application shuts it down.
        settings: the settings.
    """
    server = Server(llm, settings)
    routes = [
        Route("/v1/models", list_models),
        Route("/v1/models/{model:path}", show_model),
        Route("/v1/completions", completions, methods=["POST"]),
        metrics_route(server.metrics),
        *health_routes(lambda: report_of(llm)),
        *dashboard_routes(server.feed),
    ]

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with server.metrics.watching():
            yield
        await server.feed.close()

    counting = Middleware(Counting, metrics=server.metrics)
    app = Starlette(routes=routes, middleware=[counting], exception_handlers=HANDLERS, lifespan=lifespan)
    app.router.redirect_slashes = False  # a redirect is built from the Host header
    app.state.server = server
    return app
