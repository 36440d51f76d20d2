"""The feed of the dashboard: the engine's picture, made twice a second for all viewers together."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from time import time
from typing import Any

import orjson

from jpaged.async_llm import AsyncLLM
from jpaged.engine.health import EngineDeadError, HealthState
from jpaged.engine.snapshot import EngineSnapshot, RequestSnapshot
from jpaged.server.errors import ApiError
from jpaged.server.metrics import Metrics, own_version

PERIOD_S = 0.5
"""Seconds between two frames."""

PATIENCE_S = 1.0
"""Seconds that a frame waits for the step that runs; it then goes out without the pool."""

MAX_VIEWERS = 20
MAX_UNREAD = 120
"""Frames that a viewer may miss before its feed ends."""

MAX_REQUESTS = 256
"""Requests that a frame describes; those that run come first."""

_AS_DIGITS = bytes(range(48, 58)) + bytes(246)
"""Turns the use of a block into a character: "0" for 0 and so on."""


@dataclass(slots=True, eq=False)
class _Viewer:
    """One reader of the feed.

    Args:
        frame: the newest frame that it has not read.
        num_missed: frames in a row that a newer one has replaced.
        is_woken: set when there is a frame, or the end.
    """

    frame: bytes | None = None
    num_missed: int = 0
    is_woken: asyncio.Event = field(default_factory=asyncio.Event)


class Feed:
    """Makes a frame twice a second while anyone views, and gives it to all viewers. A slow viewer misses frames.

    All methods are for the thread of the event loop. A frame is one line of JSON.

    Args:
        llm: the engine.
        metrics: its latencies.
        model_name: the name that clients call the model by.
    """

    def __init__(self, llm: AsyncLLM, metrics: Metrics, model_name: str) -> None:
        self._llm = llm
        self._metrics = metrics
        self._constant = {
            "model": model_name,
            "version": own_version(),
            "block_size": llm.engine.config.block_size,
            "block_bytes": llm.engine.runner.bytes_per_block,
        }
        self._viewers: set[_Viewer] = set()
        self._task: asyncio.Task[None] | None = None

    @property
    def num_viewers(self) -> int:
        """Viewers that read the feed."""
        return len(self._viewers)

    def open(self) -> AsyncGenerator[bytes]:
        """The frames for one viewer, from the next one on.

        Raises:
            ApiError: 429 if there are ``MAX_VIEWERS``.
        """
        if len(self._viewers) >= MAX_VIEWERS:
            raise ApiError(429, f"{MAX_VIEWERS} dashboards are open: close one", type="rate_limit_error")
        viewer = _Viewer()
        self._viewers.add(viewer)
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._broadcast())
        return self._frames(viewer)

    async def _frames(self, viewer: _Viewer) -> AsyncGenerator[bytes]:
        try:
            while viewer in self._viewers or viewer.frame is not None:
                await viewer.is_woken.wait()
                viewer.is_woken.clear()
                frame, viewer.frame, viewer.num_missed = viewer.frame, None, 0
                if frame is not None:
                    yield frame
        finally:
            self._viewers.discard(viewer)
            if not self._viewers and self._task is not None:
                self._task.cancel()
                self._task = None

    async def close(self) -> None:
        """End the feed of every viewer."""
        viewers, self._viewers = self._viewers, set()
        for viewer in viewers:
            viewer.is_woken.set()
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task

    async def _broadcast(self) -> None:
        """Give frames to the viewers until there are none, or until the engine has ended."""
        while self._viewers:
            is_last = self._llm.health().state in (HealthState.STOPPED, HealthState.DEAD)
            frame = orjson.dumps(await self._picture(), option=orjson.OPT_APPEND_NEWLINE)
            for viewer in list(self._viewers):
                viewer.num_missed += viewer.frame is not None
                viewer.frame = frame
                if is_last or viewer.num_missed > MAX_UNREAD:
                    self._viewers.discard(viewer)
                viewer.is_woken.set()
            await asyncio.sleep(PERIOD_S)

    async def _picture(self) -> dict[str, Any]:
        """One frame; its pool is None while a step keeps the engine for long."""
        snapshot = None
        with suppress(TimeoutError, EngineDeadError):
            async with asyncio.timeout(PATIENCE_S):
                snapshot = await self._llm.snapshot()
        health = self._llm.health()
        stats = self._llm.latest_stats if snapshot is None else snapshot.stats
        return {
            **self._constant,
            "time": time(),
            "health": health.state.value,
            "stats": asdict(stats),
            "queued": self._metrics.num_queued(),
            "ttft": self._metrics.ttft.quantiles(0.5, 0.99),
            "itl": self._metrics.itl.quantiles(0.5, 0.99),
            "pool": None if snapshot is None else _pool(snapshot),
        }


def _pool(snapshot: EngineSnapshot) -> dict[str, Any]:
    """The blocks, a character each, and the requests that hold them."""
    return {
        "blocks": snapshot.blocks.translate(_AS_DIGITS).decode("ascii"),
        "host": snapshot.host_blocks.translate(_AS_DIGITS).decode("ascii"),
        "pins": snapshot.pins,
        "requests": [_request(each) for each in snapshot.requests[:MAX_REQUESTS]],
        "num_requests": len(snapshot.requests),
    }


def _request(request: RequestSnapshot) -> dict[str, Any]:
    return {
        "id": request.request_id,
        "state": request.state,
        "priority": request.priority,
        "prompt": request.num_prompt_tokens,
        "output": request.num_output_tokens,
        "cached": request.num_cached_tokens,
        "preemptions": request.num_preemptions,
        "tables": request.block_tables,
    }
