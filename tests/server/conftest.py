"""One server over the model in the box for all tests: a real one, in the event loop of a thread."""

import asyncio
import json
import threading
from collections.abc import Awaitable, Iterator
from contextlib import ExitStack, contextmanager

import httpx
import pytest
import uvicorn
from starlette.applications import Starlette

from jpaged import LLM, AsyncLLM, RequestOutput, RequestOutputKind, SamplingParams
from jpaged.server import ServerSettings, create_app
from jpaged.server.run import uvicorn_config
from jpaged.server.state import Server
from tests.support.tiny import with_few_sizes

TIMEOUT_S = 120
"""Only a failing test waits for so long."""


def events(content: bytes) -> list[dict]:
    """The chunks of a stream, which has to end with [DONE]; comments are left out."""
    blocks = [block for block in content.decode().split("\n\n") if block and not block.startswith(":")]
    assert all(block.startswith("data: ") for block in blocks)
    assert blocks[-1] == "data: [DONE]"
    return [json.loads(block.removeprefix("data: ")) for block in blocks[:-1]]


class Served:
    """A running server, the event loop that it runs in, and clients of it.

    ``wire`` is a client of the real server. ``run`` computes in the loop of server and engine.
    """

    def __init__(self, llm: LLM) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="server", daemon=True)
        self._thread.start()
        self.llm = AsyncLLM.from_llm(llm)
        self.app = create_app(self.llm, ServerSettings())
        self.server: Server = self.app.state.server
        self._exits = ExitStack()
        self.address = self._exits.enter_context(self.serving(self.app))
        self.base_url = f"http://127.0.0.1:{self.address[1]}"
        self.wire = httpx.Client(base_url=self.base_url, timeout=TIMEOUT_S, trust_env=False)

    @contextmanager
    def serving(self, app: Starlette) -> Iterator[tuple[str, int]]:
        """Serve an application from the loop of server and engine; the address is good until the block is left."""
        config = uvicorn_config(app, ServerSettings())
        config.port, config.timeout_graceful_shutdown = 0, 1
        server = uvicorn.Server(config)

        async def started() -> None:
            while not server.started:
                await asyncio.sleep(0.01)

        serving = asyncio.run_coroutine_threadsafe(server._serve(), self._loop)
        self.run(started())
        yield server.servers[0].sockets[0].getsockname()
        server.should_exit = True
        serving.result(TIMEOUT_S)

    def run[T](self, work: Awaitable[T]) -> T:
        """The result of a coroutine that runs in the server's loop."""

        async def wait() -> T:
            return await work

        return asyncio.run_coroutine_threadsafe(wait(), self._loop).result(TIMEOUT_S)

    def generate(self, prompt, **params) -> RequestOutput:
        """What the engine itself answers, without HTTP; greedy unless told otherwise."""
        params = SamplingParams(**{"temperature": 0, "output_kind": RequestOutputKind.FINAL_ONLY} | params)

        async def generate() -> RequestOutput:
            return [output async for output in self.llm.generate(prompt, params)][-1]

        return self.run(generate())

    def client(self, **settings) -> httpx.AsyncClient:
        """A client of another application over the same engine, in process; to be used in the server's loop."""
        transport = httpx.ASGITransport(create_app(self.llm, ServerSettings(**settings)))
        return httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", timeout=TIMEOUT_S)

    @contextmanager
    def held(self) -> Iterator[threading.Event]:
        """An engine that makes no step before the event is set, or the block is left."""
        go_on, is_held = threading.Event(), threading.Event()

        def hold(engine) -> None:
            is_held.set()
            go_on.wait(TIMEOUT_S)

        self.llm._thread.call(hold)
        try:
            assert is_held.wait(TIMEOUT_S)
            yield go_on
        finally:
            go_on.set()

    def post(self, path: str, **body) -> httpx.Response:
        return self.wire.post(path, json=body)

    def complete(self, prompt, **body) -> dict:
        """The response of /v1/completions, greedy unless the body says otherwise."""
        response = self.post("/v1/completions", **{"prompt": prompt, "temperature": 0} | body)
        assert response.status_code == 200, response.text
        return response.json()

    async def idle(self) -> int:
        """Let the engine finish or drop all that it has; returns the blocks in use."""
        while self.llm.num_unfinished or await self.llm.ask(lambda engine: engine.has_unfinished):
            await asyncio.sleep(0)
        return (await self.llm.stats()).num_used_blocks

    def close(self) -> None:
        self.wire.close()
        self._exits.close()
        self.llm.shutdown()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


@pytest.fixture(scope="session")
def running() -> Iterator[Served]:
    settings = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "num_blocks": 160}
    served = Served(with_few_sizes(LLM(**settings, warm_up=False, use_tqdm=False)))
    yield served
    served.close()


@pytest.fixture
def served(running) -> Iterator[Served]:
    """The server; the test leaves no request and no block in use."""
    yield running
    assert running.run(running.idle()) == 0
    assert running.server.calls == {}
