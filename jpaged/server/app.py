"""The application: every route and every middleware, in one place."""

from starlette.applications import Starlette
from starlette.routing import Route

from jpaged.async_llm import AsyncLLM
from jpaged.server.cancel import cancel
from jpaged.server.chat import chat
from jpaged.server.completions import completions
from jpaged.server.errors import HANDLERS
from jpaged.server.models import list_models, show_model
from jpaged.server.settings import ServerSettings
from jpaged.server.state import Server
from jpaged.server.tokenization import detokenize, tokenize, tokenizer_info


def create_app(llm: AsyncLLM, settings: ServerSettings) -> Starlette:
    """An ASGI application that serves a model.

    Args:
        llm: the engine; whoever starts the application shuts it down.
        settings: the settings.
    """
    routes = [
        Route("/v1/models", list_models),
        Route("/v1/models/{model:path}", show_model),
        Route("/v1/completions", completions, methods=["POST"]),
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/v1/requests/{call_id}/cancel", cancel, methods=["POST"]),
        Route("/tokenize", tokenize, methods=["POST"]),
        Route("/detokenize", detokenize, methods=["POST"]),
        Route("/tokenizer_info", tokenizer_info),
    ]
    app = Starlette(routes=routes, exception_handlers=HANDLERS)
    app.router.redirect_slashes = False  # a redirect is built from the Host header
    app.state.server = Server(llm, settings)
    return app
