"""Open-loop load: requests arrive when they arrive, whatever the server does. Several processes send them."""

import asyncio
import multiprocessing
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import uvloop

from bench.http.connection import Client, completion
from bench.workloads import Workload

LENGTH_CLASSES = (128, 512, None)
"""Most tokens of the prompts of each class; None for no bound. A long prompt takes a step of its own."""

LEAD_S = 1.0
"""Time until the first request, in which the processes start."""


class Job(NamedTuple):
    """One request: seconds after the start at which it is sent, and its bytes."""

    at_s: float
    data: bytes


@dataclass(slots=True)
class Timeline:
    """Times of one streamed response, in seconds from its planned start.

    Args:
        status: HTTP status; 0 if the connection ended before.
        is_complete: whether the stream ended with ``[DONE]``.
        first_s: time of the first event; None without any.
        last_s: time of the last byte.
        gaps_s: times between events.
    """

    status: int = 0
    is_complete: bool = False
    first_s: float | None = None
    last_s: float = 0.0
    gaps_s: list[float] = field(default_factory=list)


class _Stream:
    """Notes when the events of one response come."""

    def __init__(self, began: float) -> None:
        self._began = began
        self._tail = b""
        self.times = Timeline()

    def take(self, part: bytes) -> None:
        times, now = self.times, time.monotonic() - self._began
        num_events = part.count(b"data: {")
        if num_events:
            if times.first_s is None:
                times.first_s = now
                num_events -= 1
            times.gaps_s += [(now - times.last_s) / num_events] * num_events if num_events else []
            times.last_s = now
        self._tail = (self._tail + part)[-16:]

    @property
    def is_done(self) -> bool:
        return self._tail.endswith(b"data: [DONE]\n\n")


def jobs_of(work: Workload, arrivals_s: Sequence[float]) -> list[Job]:
    """The requests of a workload, greedy and of fixed length."""
    triples = zip(arrivals_s, work.prompts, work.output_lens, strict=True)
    options: dict[str, Any] = {"temperature": 0, "ignore_eos": True, "stream": True}
    return [Job(at_s, completion(prompt=ids, max_tokens=n, **options)) for at_s, ids, n in triples]


def run_load(address: tuple[str, int], jobs: Sequence[Job], num_processes: int) -> tuple[list[Timeline], float]:
    """Send requests at their times. Returns a timeline for each, and the seconds from the first arrival to the end."""
    start = time.monotonic() + LEAD_S + len(jobs) / 1000
    shares = [jobs[i::num_processes] for i in range(num_processes)]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_processes, mp_context=context) as pool:
        parts = list(pool.map(_run_share, [address] * num_processes, shares, [start] * num_processes))
    timelines: list[Timeline] = [Timeline()] * len(jobs)
    for i, part in enumerate(parts):
        timelines[i::num_processes] = part
    ends = [job.at_s + times.last_s for job, times in zip(jobs, timelines, strict=True)]
    return timelines, max(ends) - min(job.at_s for job in jobs)


def _run_share(address: tuple[str, int], jobs: Sequence[Job], start: float) -> list[Timeline]:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_send_all(address, jobs, start))


async def _send_all(address: tuple[str, int], jobs: Sequence[Job], start: float) -> list[Timeline]:
    client = Client(address)

    async def send(job: Job) -> Timeline:
        began = start + job.at_s
        await asyncio.sleep(max(began - time.monotonic(), 0.0))
        stream = _Stream(began)
        answer = await client.exchange(job.data, stream.take)
        stream.times.status = answer.status
        stream.times.is_complete = answer.is_complete and stream.is_done
        return stream.times

    try:
        return await asyncio.gather(*[send(job) for job in jobs])
    finally:
        client.close()


def summary(timelines: Sequence[Timeline]) -> dict[str, Any]:
    """Quantiles over the complete responses, in seconds, and the number of others."""
    complete = [times for times in timelines if times.is_complete and times.first_s is not None]
    firsts = [times.first_s for times in complete if times.first_s is not None]
    gaps = [gap for times in complete for gap in times.gaps_s]
    values = {"ttft": firsts, "itl": gaps, "e2e": [times.last_s for times in complete]}
    quantiles = {
        f"{name}_p{percent}_s": float(np.percentile(each, percent)) if each else None
        for name, each in values.items()
        for percent in (50, 99)
    }
    return quantiles | {"num_requests": len(timelines), "num_failed": len(timelines) - len(complete)}


def first_tokens_by_length(prompts: Sequence[Sequence[int]], timelines: Sequence[Timeline]) -> list[dict[str, Any]]:
    """Quantiles of the time to first token, in seconds, for each of ``LENGTH_CLASSES``; complete responses alone."""
    classes, least = [], 0
    for most in LENGTH_CLASSES:
        firsts = [
            times.first_s
            for prompt, times in zip(prompts, timelines, strict=True)
            if least < len(prompt) <= (most or len(prompt)) and times.is_complete and times.first_s is not None
        ]
        quantiles = {f"ttft_p{q}_s": float(np.percentile(firsts, q)) if firsts else None for q in (50, 99)}
        classes.append({"most_prompt_tokens": most, "num_requests": len(firsts)} | quantiles)
        least = most or least
    return classes
