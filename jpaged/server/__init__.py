"""The HTTP server: OpenAI's API over an AsyncLLM. It needs the extra: ``pip install 'jpaged[serve]'``.

``create_app`` loads on first use: the command line reads the settings without the extra.
"""

from typing import TYPE_CHECKING, Any

from jpaged.server.settings import ServerSettings

if TYPE_CHECKING:
    from jpaged.server.app import create_app

__all__ = ["ServerSettings", "create_app"]


if not TYPE_CHECKING:  # a type checker that saw this function would accept every name

    def __getattr__(name: str) -> Any:
        if name != "create_app":
            raise AttributeError(f"module 'jpaged.server' has no attribute {name!r}")
        from jpaged.server.app import create_app

        return create_app
