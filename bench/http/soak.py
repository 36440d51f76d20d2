"""Many streams for minutes, of which some are left by their clients: what leaks, and how the server ends."""

import argparse
import asyncio
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import uvloop

from bench.http.connection import Client, Connection, completion
from bench.http.launch import Child, Metrics

LONGEST_PROMPT, LONGEST_OUTPUT = 32, 96
LOOK_EVERY_S = 5.0
IDLE_TIMEOUT_S = 60.0
DRAIN_S = 35.0
"""The server's own deadline of a drain, and some time to end."""

NUM_DRAINED = 64
"""Streams that run when the server is told to end."""

MOST_GROWTH = 0.05
"""Growth of the resident memory that counts as flat."""

MOST_LAG_S = 0.05


@dataclass(slots=True)
class _Counts:
    """Responses and streams as the clients saw them."""

    statuses: Counter[int] = field(default_factory=Counter)
    num_complete: int = 0
    num_left: int = 0
    num_broken: int = 0


def run_soak(child: Child, args: argparse.Namespace) -> dict[str, Any]:
    """Run the load. Returns the figures, and the checks that failed."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_soak(child, args))


async def _soak(child: Child, args: argparse.Namespace) -> dict[str, Any]:
    client, counts, draw = Client(child.address), _Counts(), random.Random(0)
    await _stream(child, counts, draw, leaves=False)
    baseline, before = await idle_state(child), await Metrics.read(client)
    end = time.monotonic() + 60 * args.minutes
    samples: list[dict[str, Any]] = []

    async def keep_streaming() -> None:
        while time.monotonic() < end:
            await _stream(child, counts, draw, leaves=draw.random() < args.disconnects)

    async def look() -> None:
        while time.monotonic() < end and not child.has_ended:
            await asyncio.sleep(LOOK_EVERY_S)
            left_s = max(end - time.monotonic(), 0.0)
            samples.append({"second": 60 * args.minutes - left_s} | await asyncio.to_thread(child.state))
            print(f"{left_s:4.0f} s left: {samples[-1]}, {counts}", flush=True)

    await asyncio.gather(look(), *[keep_streaming() for _ in range(args.num_streams)])
    lag_s = (await Metrics.read(client)).quantile_since(before, "jpaged:event_loop_lag_seconds", 0.99)
    client.close()
    left = await idle_state(child)
    drained, status, drain_s = await _drain(child, draw)
    settled = [each["rss_bytes"] for each in samples if each["second"] >= 60 * args.minutes / 5]
    growth = settled[-1] / settled[0] - 1 if settled else 0.0
    num_5xx = sum(n for code, n in counts.statuses.items() if code >= 500)
    failures = [
        f"{name}: {left[name]}, before the load {baseline[name]}"
        for name in ("num_used_blocks", "num_unfinished", "num_tasks", "num_files")
        if left[name] > baseline[name]
    ]
    checks = {
        f"{num_5xx} responses have status 5xx": num_5xx > 0,
        f"{counts.num_broken} streams broke off": counts.num_broken > 0,
        f"resident memory grew by {growth:.1%} after the first fifth of the time": growth > MOST_GROWTH,
        f"the event loop is late by {lag_s} s (p99)": lag_s is None or lag_s > MOST_LAG_S,
        f"{drained} of {NUM_DRAINED} streams ended after SIGTERM": drained != NUM_DRAINED,
        f"the status after SIGTERM is {status}": status != 0,
    }
    return {
        "num_streams": args.num_streams,
        "minutes": args.minutes,
        "disconnects": args.disconnects,
        "statuses": dict(counts.statuses),
        "num_complete": counts.num_complete,
        "num_left": counts.num_left,
        "loop_lag_p99_s": lag_s,
        "rss_growth": growth,
        "drain_s": drain_s,
        "baseline": baseline,
        "left": left,
        "samples": samples,
        "failures": failures + [text for text, has_failed in checks.items() if has_failed],
    }


async def idle_state(child: Child) -> dict[str, Any]:
    """The server's state once it has nothing to do, or once it should have."""
    end = time.monotonic() + IDLE_TIMEOUT_S
    while True:
        state = await asyncio.to_thread(child.state)
        if time.monotonic() > end or (state["num_used_blocks"] == 0 and state["num_unfinished"] == 0):
            await asyncio.sleep(1.0)  # closed connections are let go
            return await asyncio.to_thread(child.state)
        await asyncio.sleep(0.1)


async def _stream(child: Child, counts: _Counts, draw: random.Random, *, leaves: bool) -> None:
    """One stream on a connection of its own; a client that leaves does so at a moment that is drawn."""
    _, connection = await asyncio.get_running_loop().create_connection(Connection, *child.address)
    num_events = 0
    leaves_at = draw.randrange(LONGEST_OUTPUT) if leaves else None

    def take(part: bytes) -> None:
        nonlocal num_events
        num_events += part.count(b"data: {")
        if leaves_at is not None and num_events >= leaves_at:
            connection.abort()

    timer = None
    if leaves and draw.random() < 0.3:  # before its first event, perhaps
        timer = asyncio.get_running_loop().call_later(draw.random(), connection.abort)
    answer = await connection.exchange(_request(child, draw), take)
    if timer is not None:
        timer.cancel()
    connection.abort()
    if answer.is_complete:
        counts.statuses[answer.status] += 1
        counts.num_complete += 1
    elif leaves:
        counts.num_left += 1
    else:
        counts.num_broken += 1


def _request(child: Child, draw: random.Random) -> bytes:
    prompt = [draw.randrange(5, child.said["vocab_size"]) for _ in range(draw.randint(1, LONGEST_PROMPT))]
    return completion(
        prompt=prompt,
        max_tokens=draw.randint(1, LONGEST_OUTPUT),
        ignore_eos=True,
        stream=True,
        temperature=draw.random(),
    )


async def _drain(child: Child, draw: random.Random) -> tuple[int, int, float]:
    """Tell the server to end while streams run. Returns those that ended well, the status and the seconds."""
    client, counts = Client(child.address), _Counts()
    streams = [asyncio.ensure_future(_stream(child, counts, draw, leaves=False)) for _ in range(NUM_DRAINED)]
    while counts.num_complete + await _num_open(client) < NUM_DRAINED:
        await asyncio.sleep(0.01)
    client.close()
    child.stop()
    began = time.monotonic()
    await asyncio.gather(*streams)
    status = await asyncio.to_thread(child.wait, DRAIN_S)
    return counts.num_complete, status, time.monotonic() - began


async def _num_open(client: Client) -> int:
    """Requests that the server has: those that run and those that wait."""
    metrics = await Metrics.read(client)
    return int(metrics.total("vllm:num_requests_running") + metrics.total("vllm:num_requests_waiting"))
