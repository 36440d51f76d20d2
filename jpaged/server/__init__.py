"""The HTTP server: OpenAI's API over an AsyncLLM. It needs the extra: ``pip install 'jpaged[serve]'``."""

from jpaged.server.app import create_app
from jpaged.server.settings import ServerSettings

__all__ = ["ServerSettings", "create_app"]
