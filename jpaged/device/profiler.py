"""The profiler: measures the link and the device with the programs of the engine."""

from typing import Protocol

from jpaged.contract.profile import MachineProfile, fit_prefill
from jpaged.device.kv.host_pool import HostPool
from jpaged.device.kv.pool import KVCache
from jpaged.device.step.inputs import Bucket

SHORT_CHUNKS = 8
"""Short chunks in the place of a long one; the difference of their times is what context adds."""


class Measurable(Protocol):
    """The parts of a runner that the profiler uses."""

    cache: KVCache
    host_pool: HostPool | None

    @property
    def buckets(self) -> list[Bucket]: ...
    @property
    def max_model_len(self) -> int: ...
    @property
    def host_bytes_per_block(self) -> int: ...
    def time_prefill(self, num_chunks: int, length: int) -> float: ...


def measure_profile(runner: Measurable) -> MachineProfile:
    """Measure copies both ways, and prefills that write to block 0 at most.

    Three steps are timed: one of a single token, one of the largest size with short chunks, and one with long chunks,
    whose tokens attend to more.

    Args:
        runner: has a host pool; no step is in flight.
    """
    assert runner.host_pool is not None
    bucket = runner.buckets[-1]
    longest = min(runner.max_model_len, bucket.num_tokens)
    num_long = min(bucket.num_tokens // longest, bucket.num_rows)
    num_short = min(SHORT_CHUNKS * num_long, bucket.num_rows)
    shortest = max(num_long * longest // num_short, 1)
    fixed_s = runner.time_prefill(1, 1)
    short_s, long_s = runner.time_prefill(num_short, shortest), runner.time_prefill(num_long, longest)
    token_s, context_s = fit_prefill(
        (shortest, fixed_s + (short_s - fixed_s) / num_short),
        (longest, fixed_s + (long_s - fixed_s) / num_long),
        fixed_s=fixed_s,
    )
    runner.cache, to_host, from_host = runner.host_pool.measure(runner.cache)
    block_bytes = runner.host_bytes_per_block
    return MachineProfile(block_bytes, to_host, from_host, (), fixed_s, token_s, context_s, 0.0, 0.0)
