"""The load at one rate after the other, and what the server says of its steps meanwhile."""

import asyncio
from collections.abc import Sequence
from typing import Any

from bench.http.connection import Client
from bench.http.launch import Metrics
from bench.http.load import first_tokens_by_length, jobs_of, run_load, summary
from bench.workloads import Workload, poisson_arrivals

STEP, LAG = "jpaged:step_seconds", "jpaged:event_loop_lag_seconds"
FIRST_STEPS = "jpaged:first_token_steps"


def run_phases(
    address: tuple[str, int],
    work: Workload,
    offline: dict[str, Any],
    fractions: Sequence[float],
    num_processes: int,
) -> list[dict[str, Any]]:
    """Send all requests at once, and then at fractions of the rate at which ``LLM.generate`` finished them."""
    count = len(work.prompts)
    sustained = count / offline["seconds"]
    phases = [_run_phase(address, work, None, num_processes)]
    for fraction in sorted(fractions):
        phases.append(_run_phase(address, work, fraction * sustained, num_processes))
        phases[-1]["arrivals"] = f"{fraction:g} of rate"
    return phases


def _run_phase(address: tuple[str, int], work: Workload, rate: float | None, num_processes: int) -> dict[str, Any]:
    """One phase; without a rate all requests arrive at once."""
    count = len(work.prompts)
    arrivals = [0.0] * count if rate is None else poisson_arrivals(count, rate).tolist()
    before = _metrics(address)
    timelines, seconds = run_load(address, jobs_of(work, arrivals), num_processes)
    after = _metrics(address)
    done = sum(n for n, times in zip(work.output_lens, timelines, strict=True) if times.is_complete)
    step_s, figures = after.mean_since(before, STEP), summary(timelines)
    ttft_s = figures["ttft_p99_s"]
    return figures | {
        "arrivals": "all at once",
        "rate": rate,
        "seconds": seconds,
        "tokens_per_s": done / seconds,
        "step_s": step_s,
        "ttft_p99_steps": ttft_s / step_s if ttft_s and step_s else None,
        "first_token_steps_p99": after.quantile_since(before, FIRST_STEPS, 0.99),
        "first_token_steps": {
            f"{bound:g}": count for bound, count in after.histogram_since(before, FIRST_STEPS).items()
        },
        "ttft_by_length": first_tokens_by_length(work.prompts, timelines),
        "loop_lag_p99_s": after.quantile_since(before, LAG, 0.99),
    }


def _metrics(address: tuple[str, int]) -> Metrics:
    async def read() -> Metrics:
        client = Client(address)
        try:
            return await Metrics.read(client)
        finally:
            client.close()

    return asyncio.run(read())
