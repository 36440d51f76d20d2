"""Batches: requests of a file, answered as the server would answer them, without a server.

The format is OpenAI's: each line is a JSON object with ``custom_id``, ``method``, ``url`` and ``body``.
"""

import asyncio
import hashlib
import os
import tempfile
from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import orjson
from starlette.types import ASGIApp, Message
from tqdm import tqdm

from jpaged.async_llm import AsyncLLM
from jpaged.engine.health import EngineDeadError, HealthState
from jpaged.server.app import create_app
from jpaged.server.keys import KeyRing
from jpaged.server.settings import ServerSettings

URLS = "/v1/completions", "/v1/chat/completions"
"""Endpoints of a batch."""

WATCH_EVERY_S = 1.0
"""The health of the engine is looked at this often."""

NUM_WAITING = 64
"""Requests that wait for the engine, beside those that fill its rows."""


class Batch:
    """Requests and their results, in two files. Every result is written once it is there.

    Attributes:
        source: file of the requests.
        num_lines: requests.
        num_done: requests with a result.
        num_failed: results that are errors.
        num_lost: those of them that are the server's own failures, which another run computes again.
        waiting: numbers of the lines without a result, in order.
    """

    def __init__(self, source: Path, destination: Path, kept: dict[str, bool]) -> None:
        self.source = source
        self.num_lines = 0
        self.num_done = len(kept)
        self.num_failed = sum(kept.values())
        self.num_lost = 0
        self.waiting: list[int] = []
        for number, line in _lines_of(source):
            self.num_lines += 1
            if result_id(number, line) not in kept:
                self.waiting.append(number)
        self._destination = destination

    @classmethod
    def open(cls, source: Path, destination: Path) -> Self:
        """Read the requests, and keep the results of an earlier run that stopped before its end.

        Results of the server's own failures are dropped, to be computed again.

        Raises:
            ValueError: the file of results has others than those of these requests, or there is no such directory.
            OSError: a file cannot be read or written.
        """
        if not destination.parent.is_dir():
            raise ValueError(f"{destination} cannot be written: there is no directory {destination.parent}")
        ids = {result_id(number, line) for number, line in _lines_of(source)}
        lines, kept = [], {}
        if destination.exists() and os.path.samefile(source, destination):
            raise ValueError(f"{destination} is the file of the requests: name another file for the results")
        for number, line in _lines_of(destination) if destination.exists() else ():
            if not line.endswith(b"\n"):
                break  # a run was killed while it wrote
            result = _result_of(line)
            if result is None or result["id"] not in ids:
                raise ValueError(
                    f"{destination} has other results than those of {source}, in line {number}: name another file"
                )
            status = (result.get("response") or {}).get("status_code", 400)
            if status < 500:
                lines.append(line)
                kept[result["id"]] = status >= 400
        _replace(destination, lines)
        return cls(source, destination, kept)

    def write(self, result: dict[str, Any]) -> None:
        """Append a result."""
        response = result["response"]
        self.num_done += 1
        self.num_failed += response is None or response["status_code"] >= 400
        self.num_lost += response is not None and response["status_code"] >= 500
        with self._destination.open("ab") as file:
            file.write(orjson.dumps(result) + b"\n")


async def run_batch(
    llm: AsyncLLM, batch: Batch, settings: ServerSettings, aliases: Collection[str] = (), *, use_tqdm: bool = False
) -> None:
    """Compute all requests of a batch that have no result. A request that is not valid gets its error.

    Args:
        llm: the engine.
        batch: the requests.
        settings: the settings of the server, as far as they say which requests are taken.
        aliases: other names that requests may call the model by.
        use_tqdm: show how far it is.

    Raises:
        EngineDeadError: the engine has ended, or its step hangs. Results that are written stay.
    """
    queue = dict.fromkeys(("max_waiting_sequences", "max_waiting_tokens"), 1 << 24)  # bounded by ``places``
    app = create_app(llm, replace(settings, **queue), KeyRing.load(None, {}), aliases)
    places = asyncio.Semaphore(llm.engine.config.most_rows + NUM_WAITING)
    waiting, first_lines = set(batch.waiting), {}
    bar = tqdm(total=batch.num_lines, initial=batch.num_done, unit="request", disable=not use_tqdm)

    async def compute(number: int, line: bytes) -> None:
        try:
            batch.write(await _result(app, number, line, first_lines))
            bar.update()
        finally:
            places.release()

    async def compute_all() -> None:
        async with asyncio.TaskGroup() as tasks:
            for number, line in _lines_of(batch.source):
                first_lines.setdefault(_custom_id(line), number)
                if number in waiting:
                    await places.acquire()
                    tasks.create_task(compute(number, line))

    with bar:
        async with app.router.lifespan_context(app):
            computing, watching = asyncio.ensure_future(compute_all()), asyncio.ensure_future(_watch(llm))
            try:
                await asyncio.wait([computing, watching], return_when=asyncio.FIRST_COMPLETED)
            finally:
                watching.cancel()
                computing.cancel()  # of no effect if it is done
                await asyncio.wait([computing, watching])
            (computing if watching.cancelled() else watching).result()


async def _watch(llm: AsyncLLM) -> None:
    """Raise EngineDeadError once the engine is lost: a file has no client that would give up on a step that hangs."""
    while True:
        health = llm.health()
        if health.state in (HealthState.HUNG, HealthState.DEAD):
            raise EngineDeadError(f"the engine is {health.state}: {health.error or 'its step does not end'}")
        await asyncio.sleep(WATCH_EVERY_S)


def result_id(number: int, line: bytes) -> str:
    """The id of the result of a line: equal lines at the same place have the same."""
    return f"batch_req_{hashlib.sha256(b'%d %s' % (number, line.strip())).hexdigest()[:32]}"


async def _result(app: ASGIApp, number: int, line: bytes, first_lines: dict[str | None, int]) -> dict[str, Any]:
    """The result of one line."""
    custom_id = _custom_id(line)
    result: dict[str, Any] = {"id": result_id(number, line), "custom_id": custom_id, "response": None, "error": None}
    if (problem := _problem_of(line)) is None and (first := first_lines[custom_id]) != number:
        problem = f"custom_id {custom_id!r} is that of line {first} too: give each line its own"
    if problem is not None:
        return result | {"error": {"code": "invalid_line", "message": f"line {number}: {problem}"}}
    fields = orjson.loads(line)
    status, request_id, body = await _post(app, fields["url"], orjson.dumps(fields["body"]))
    return result | {"response": {"status_code": status, "request_id": request_id, "body": orjson.loads(body)}}


def _problem_of(line: bytes) -> str | None:
    """The reason why a line is no request; None for one that is."""
    try:
        fields = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        return f"it is not valid JSON: {error}"
    if not isinstance(fields, dict):
        return "it is not a JSON object"
    if not isinstance(fields.get("custom_id"), str):
        return "custom_id is missing or no string"
    if fields.get("method", "POST") != "POST":
        return "method is not POST"
    if fields.get("url") not in URLS:
        return f"url is not one of {', '.join(URLS)}"
    if not isinstance(body := fields.get("body"), dict):
        return "body is missing or no JSON object"
    if body.get("stream"):
        return "body has stream=true, which does not go with a batch: leave it out"
    return None


def _custom_id(line: bytes) -> str | None:
    try:
        custom_id = orjson.loads(line)["custom_id"]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return None
    return custom_id if isinstance(custom_id, str) else None


async def _post(app: ASGIApp, path: str, body: bytes) -> tuple[int, str, bytes]:
    """Give the app one request as a server would. Returns the status, the request's id and the body."""
    headers = [(b"host", b"localhost"), (b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": headers,
        "client": None,
        "server": None,
    }
    given, sent = iter([{"type": "http.request", "body": body, "more_body": False}]), []

    async def receive() -> Message:
        if (message := next(given, None)) is not None:
            return message
        return await asyncio.get_running_loop().create_future()  # no client that could leave

    async def send(message: Message) -> None:
        sent.append(message)

    await app(scope, receive, send)
    start, *parts = sent
    request_id = dict(start["headers"]).get(b"x-request-id", b"").decode()
    return start["status"], request_id, b"".join(part.get("body", b"") for part in parts)


def _lines_of(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a file that are not empty, with their numbers, from 1."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, line


def _result_of(line: bytes) -> dict[str, Any] | None:
    """A line of results; None for anything else."""
    try:
        result = orjson.loads(line)
    except orjson.JSONDecodeError:
        return None
    return result if isinstance(result, dict) and isinstance(result.get("id"), str) else None


def _replace(path: Path, lines: list[bytes]) -> None:
    """Replace a file by these lines, all at once."""
    file, unfinished = tempfile.mkstemp(dir=path.parent)
    with open(file, "wb") as opened:
        opened.writelines(lines)
    os.replace(unfinished, path)
