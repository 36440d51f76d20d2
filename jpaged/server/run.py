"""Running a server: bound before its model is there, drained by a signal, ended when its engine is lost."""

import asyncio
import contextlib
import errno
import ipaddress
import logging
import os
import resource
import signal
import socket
import stat
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from jpaged.async_llm import AsyncLLM
from jpaged.engine.health import HealthState
from jpaged.interpreter import short_switches
from jpaged.server.app import create_app
from jpaged.server.connections import ConnectionLimits, DirectBodies, limited
from jpaged.server.dashboard.routes import OPEN_PATHS, page_routes
from jpaged.server.errors import HANDLERS, ApiError
from jpaged.server.guard import Guard, guard_rules
from jpaged.server.health import Startup, health_routes
from jpaged.server.keys import KEYS_VARIABLE, KeyRing
from jpaged.server.settings import ServerSettings
from jpaged.server.state import Server

WATCH_EVERY_S = 1.0
"""The health of the engine is looked at this often, to end a server whose engine is lost."""

GRACE_S = 2.0
"""Time that the last responses, the engine's thread and the compiling threads get after the deadline of a drain."""

_SPARE_FILES = 512

_log = logging.getLogger(__name__)


def serve(
    make_llm: Callable[[], AsyncLLM],
    settings: ServerSettings,
    on_ready: Callable[[str], None] | None = None,
    aliases: Collection[str] = (),
) -> int:
    """Serve until a signal ends the server, or until the engine is lost.

    SIGTERM and SIGINT drain it: no more requests are taken, and those that run get ``drain_timeout_s``. A second signal
    ends them at once. SIGHUP reads the keys again.

    Args:
        make_llm: makes the engine, in a thread of its own, while ``/health`` tells of its progress.
        settings: the settings.
        on_ready: called with the server's address once requests are taken.
        aliases: other names that requests may call the model by.

    Returns:
        The status for the process to end with: 0 after a signal, 1 if the engine was lost.

    Raises:
        ValueError: an address of other machines without keys, keys that cannot be read, or what ``make_llm`` raises.
        OSError: the address cannot be bound.
    """
    keys = KeyRing.load(settings.api_key_file)
    check_exposure(settings, keys)
    _allow_files(settings.max_connections + _SPARE_FILES)
    with _bound(settings) as listener, short_switches():
        life = _Life(make_llm, settings, keys, listener, on_ready, aliases)
        with asyncio.Runner(loop_factory=life.config.get_loop_factory()) as runner:
            status = runner.run(life.run())
        if life.is_stuck:
            _log.warning("the process ends, and threads of the engine with it")
            with contextlib.suppress(OSError):
                _remove(settings)
            logging.shutdown()
            os._exit(status)
    return status


def check_exposure(settings: ServerSettings, keys: KeyRing) -> None:
    """Refuse to serve other machines without keys.

    Raises:
        ValueError: the address is not this machine's own, there is no key, and ``insecure`` is off.
    """
    if settings.unix_socket is not None or settings.insecure or not keys.is_empty or _is_loopback(settings.host):
        return
    raise ValueError(
        f"host={settings.host!r} lets other machines ask, and there is no key: give keys by api_key_file or by the "
        f"variable {KEYS_VARIABLE}, bind 127.0.0.1, or set insecure=True"
    )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class _Server(uvicorn.Server):
    """uvicorn's server without its handling of signals."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Door:
    """The app that is served: one that loads first, then the one that is loaded."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.app(scope, receive, send)


class _Life:
    """The life of one server, from the bound address to the status of the process.

    Attributes:
        config: the settings of uvicorn.
        is_stuck: whether a thread is left that does not end.
    """

    def __init__(
        self,
        make_llm: Callable[[], AsyncLLM],
        settings: ServerSettings,
        keys: KeyRing,
        listener: socket.socket,
        on_ready: Callable[[str], None] | None,
        aliases: Collection[str],
    ) -> None:
        self._make_llm = make_llm
        self._settings = settings
        self._keys = keys
        self._listener = listener
        self._on_ready = on_ready
        self._aliases = aliases
        self._startup = Startup()
        self._door = _Door(_loading_app(self._startup, settings, keys))
        self._stop = asyncio.Event()  # drain
        self._stop_now = asyncio.Event()
        self.config = uvicorn_config(self._door, settings)
        self.is_stuck = False

    async def run(self) -> int:
        """Serve. Returns the status of the process."""
        http = _Server(self.config)
        with self._signals():
            serving = asyncio.ensure_future(http.serve(sockets=[self._listener]))
            try:
                return await self._load_and_serve(serving)
            finally:
                http.should_exit = True
                await serving
                await _cut_off(http)

    async def _load_and_serve(self, serving: asyncio.Future[None]) -> int:
        loading = self._load()
        if await _first(loading, self._stop.wait()) != 0:
            self.is_stuck = True  # nothing can end the thread that loads
            return 0
        llm = loading.result()
        app = create_app(llm, self._settings, self._keys, self._aliases)
        async with app.router.lifespan_context(app):
            self._door.app = app
            if self._on_ready is not None:
                self._on_ready(_address(self._settings, self._listener))
            status = 1 if await _first(self._watch(llm), self._stop.wait()) == 0 else 0
            await self._drain(app.state.server, 0.0 if status else self._settings.drain_timeout_s)
        return status

    def _load(self) -> asyncio.Future[AsyncLLM]:
        """Make the engine in a thread that the end of the process does not wait for."""
        loop = asyncio.get_running_loop()
        made: asyncio.Future[AsyncLLM] = loop.create_future()

        def load() -> None:
            try:
                llm = self._startup.load(self._make_llm)
            except BaseException as error:
                tell(made.set_exception, error)
            else:
                tell(made.set_result, llm)

        def tell(settle: Callable[[Any], None], value: Any) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(lambda: made.cancelled() or settle(value))

        threading.Thread(target=load, name="jpaged-loading", daemon=True).start()
        return made

    async def _watch(self, llm: AsyncLLM) -> None:
        """Return once the engine is lost: its thread has ended, or its steps fail for good."""
        while True:
            health = llm.health()
            if health.state is HealthState.DEAD or health.num_failures >= self._settings.max_failed_steps:
                _log.critical("the engine is lost: %s", health.error)
                return
            await asyncio.sleep(WATCH_EVERY_S)

    async def _drain(self, server: Server, deadline_s: float) -> None:
        """Take no more requests, wait for those there are, and end the engine."""
        loop = asyncio.get_running_loop()
        end = loop.time() + deadline_s
        _log.info("the server takes no more requests; those that run get %g s", deadline_s)
        server.admission.close()
        await _first(server.admission.wait_until_empty(), self._stop_now.wait(), asyncio.sleep(deadline_s))
        await _first(server.llm.drain(0), asyncio.sleep(GRACE_S))
        background = server.llm.engine.runner.programs.background
        is_over = await loop.run_in_executor(None, background.wait, 0.0 if self._stop_now.is_set() else GRACE_S)
        has_ended = server.llm.health().state in (HealthState.STOPPED, HealthState.DEAD)
        if not has_ended:
            _log.critical("the engine's thread does not end")
        self.is_stuck = not (is_over and has_ended)
        left_s = 0.0 if self._stop_now.is_set() else max(end - loop.time(), 0.0)
        self.config.timeout_graceful_shutdown = round(left_s + GRACE_S)

    # Signals ------------------------------------------------------------------------------------------------------

    @contextmanager
    def _signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop, handlers = asyncio.get_running_loop(), {signal.SIGHUP: self._keys.reload}
        handlers |= dict.fromkeys((signal.SIGTERM, signal.SIGINT), self.stop)
        for number, handler in handlers.items():
            loop.add_signal_handler(number, handler)
        try:
            yield
        finally:
            for number in handlers:
                loop.remove_signal_handler(number)

    def stop(self) -> None:
        """Drain; at a second call, end at once."""
        if self._stop.is_set():
            self._stop_now.set()
        self._stop.set()


async def _cut_off(http: uvicorn.Server) -> None:
    """Close the connections of clients that do not read, of which a transport would be left to the loop's end."""
    for connection in list(http.server_state.connections):
        if (transport := getattr(connection, "transport", None)) is not None:
            transport.abort()
    await asyncio.sleep(0)  # they learn of it


async def _first(*awaitables: Any) -> int:
    """Wait until one of several is done, and stop waiting for the others. Returns the number of that one."""
    futures = [asyncio.ensure_future(each) for each in awaitables]
    try:
        await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)
        return next(i for i, future in enumerate(futures) if future.done())
    finally:
        for future in futures:
            future.cancel()


def _loading_app(startup: Startup, settings: ServerSettings, keys: KeyRing) -> ASGIApp:
    """The app while the model is not there: it tells of its health, and refuses all else."""

    async def refuse(request: Request, error: Any) -> Any:
        headers = {"retry-after": "5"}
        return ApiError(503, "the model is being loaded: try again later", code="loading", headers=headers).response()

    app = Starlette(
        routes=[*health_routes(startup.report), *page_routes()],
        middleware=[Middleware(Guard, rules=guard_rules(settings, OPEN_PATHS), keys=keys)],
        exception_handlers=HANDLERS | {404: refuse},
    )
    app.router.redirect_slashes = False
    return app


def uvicorn_config(app: ASGIApp, settings: ServerSettings) -> uvicorn.Config:
    """The settings of uvicorn: connections are bounded, and no header of a client names its address."""
    limits = ConnectionLimits(
        head_s=settings.head_timeout_s,
        body_s=settings.body_timeout_s,
        write_s=settings.write_timeout_s,
        num_connections=settings.max_connections,
    )
    return uvicorn.Config(
        DirectBodies(app),
        http=limited(limits),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=round(settings.idle_timeout_s),
    )


# The address ----------------------------------------------------------------------------------------------------------


@contextmanager
def _bound(settings: ServerSettings) -> Iterator[socket.socket]:
    """A socket that is bound to the address."""
    path = settings.unix_socket
    if path is None:
        with _bound_port(settings.host, settings.port) as listener:
            yield listener
        return
    with socket.socket(socket.AF_UNIX) as probe:
        if probe.connect_ex(path) == 0:
            raise OSError(errno.EADDRINUSE, "the address is in use by a server that answers", path)
    _remove(settings)
    with socket.socket(socket.AF_UNIX) as listener:
        before = os.umask(0o177)
        try:
            listener.bind(path)
        except OSError as error:
            raise OSError(f"unix_socket={path} cannot be bound: {error.strerror}") from error
        finally:
            os.umask(before)
        try:
            yield listener
        finally:
            _remove(settings)


def _bound_port(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise OSError(
            f"host={host}, port={port} cannot be bound: {error.strerror} (port=0 takes a port that is free)"
        ) from error
    return listener


def _remove(settings: ServerSettings) -> None:
    """Remove the file of a socket, if it is one: an earlier server may have left it."""
    path = settings.unix_socket
    with contextlib.suppress(FileNotFoundError):
        if path is not None and stat.S_ISSOCK(os.lstat(path).st_mode):
            os.unlink(path)


def _address(settings: ServerSettings, listener: socket.socket) -> str:
    """The URL of the server, or the path of its socket."""
    if settings.unix_socket is not None:
        return f"unix:{settings.unix_socket}"
    host = f"[{settings.host}]" if listener.family == socket.AF_INET6 else settings.host
    return f"http://{host}:{listener.getsockname()[1]}"


def _allow_files(number: int) -> None:
    """Raise the limit of open files as far as it may be raised."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = number if hard == resource.RLIM_INFINITY else min(number, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
