"""The routes of the dashboard: its page, and the feed that the page reads."""

from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from jpaged.server.dashboard.feed import Feed

SECURITY_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}

PAGES = {
    "/": ("page.html", "text/html"),
    "/dashboard/page.js": ("page.js", "text/javascript"),
    "/dashboard/pool.js": ("pool.js", "text/javascript"),
    "/dashboard/chart.js": ("chart.js", "text/javascript"),
    "/dashboard/page.css": ("page.css", "text/css"),
}
"""The files by their paths."""

OPEN_PATHS = frozenset(PAGES)
"""Paths that need no key: a browser loads them before anyone has given one, and nothing in them is secret."""


def page_routes() -> list[Route]:
    """The page, which also tells the progress of a server that loads."""
    return [_page(path, name, media_type) for path, (name, media_type) in PAGES.items()]


def feed_route(feed: Feed) -> Route:
    """The feed, which wants a key where others do."""

    async def show(request: Request) -> Response:
        headers = {"cache-control": "no-store", "x-accel-buffering": "no", **SECURITY_HEADERS}
        return StreamingResponse(feed.open(), media_type="application/x-ndjson", headers=headers)

    return Route("/dashboard/feed", show)


def _page(path: str, name: str, media_type: str) -> Route:
    body = files("jpaged.server.dashboard").joinpath(name).read_bytes()

    async def show(request: Request) -> Response:
        return Response(body, media_type=media_type, headers={"cache-control": "no-cache", **SECURITY_HEADERS})

    return Route(path, show)
