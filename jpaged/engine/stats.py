"""The engine's statistics: name, type, meaning and source of each, written once."""

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, Literal, NamedTuple

from jpaged.contract.profile import MachineProfile
from jpaged.device.kv.host_pool import HostPool
from jpaged.device.step.programs import Programs
from jpaged.host.blocks.manager import BlockStats
from jpaged.host.scheduler import SchedulerStats

Kind = Literal["gauge", "counter"]


class Sources(NamedTuple):
    """Owners of the numbers that statistics are made of."""

    blocks: BlockStats
    scheduler: SchedulerStats
    num_output_tokens: int
    pool: HostPool | None
    profile: MachineProfile | None
    programs: Programs


def _gauge(help_: str, read: Callable[[Sources], Any]) -> Any:
    return field(metadata={"kind": "gauge", "help": help_, "read": read})


def _counter(help_: str, read: Callable[[Sources], Any]) -> Any:
    return field(metadata={"kind": "counter", "help": help_, "read": read})


@dataclass(frozen=True, slots=True)
class EngineStats:
    """The state of the pools, and counters since the start. ``STATISTICS`` says what each field means."""

    num_blocks: int = _gauge("device blocks that can be handed out", lambda of: of.blocks.num_blocks)
    num_used_blocks: int = _gauge(
        "device blocks held by a sequence or a pinned prefix, or by several", lambda of: of.blocks.num_used
    )
    num_shared_blocks: int = _gauge("device blocks held by two or more", lambda of: of.blocks.num_shared)
    num_cached_blocks: int = _gauge("device blocks in the prefix cache, held or not", lambda of: of.blocks.num_cached)
    tokens_held: int = _gauge(
        "slots that hold a token of a running sequence, shared ones counted once", lambda of: of.blocks.tokens_held
    )
    internal_waste_percent: float = _gauge(
        "slots of used blocks that hold no token, in percent", lambda of: 100 * of.blocks.waste
    )
    saved_by_sharing_percent: float = _gauge(
        "blocks saved by sharing / blocks needed without it, in percent, over all steps (paper, section 6.3)",
        lambda of: (
            100 * (1 - of.scheduler.num_physical_blocks / max(of.scheduler.num_logical_blocks, 1))
            if of.scheduler.num_logical_blocks
            else 0.0
        ),
    )
    num_copies_on_write: int = _counter(
        "blocks copied because a sequence wrote to one that others, or the prefix cache, rely on",
        lambda of: of.blocks.num_copies,
    )
    num_blocks_freed_by_windows: int = _counter(
        "blocks that running requests gave up, as sliding windows had passed them",
        lambda of: of.blocks.num_freed_by_windows,
    )
    num_waiting: int = _gauge(
        "requests, and prefixes to be pinned, that wait for admission", lambda of: of.scheduler.num_waiting
    )
    num_running: int = _gauge("requests, and prefixes to be pinned, that run", lambda of: of.scheduler.num_running)
    num_pinned_prefixes: int = _gauge(
        "prefixes that stay in the pool, or will once they are computed", lambda of: of.scheduler.num_pins
    )
    num_preemptions: int = _counter(
        "preemptions; a request counts each time it is preempted", lambda of: of.scheduler.num_preemptions
    )
    num_swaps_out: int = _counter("preemptions that moved KV to the host pool", lambda of: of.scheduler.num_swaps_out)
    num_swaps_in: int = _counter("returns of such KV to the device", lambda of: of.scheduler.num_swaps_in)
    num_restored_by_recompute: int = _counter(
        "tokens that restores computed again while the KV of their other tokens arrived from the host",
        lambda of: of.scheduler.num_tokens_recomputed,
    )
    link_to_host_bytes_per_s: float = _gauge(
        "rate of copies to the host pool, measured at the start and kept current; 0 until it is measured",
        lambda of: of.profile.to_host.bytes_per_s if of.profile is not None else 0.0,
    )
    link_from_host_bytes_per_s: float = _gauge(
        "the same of copies from the host pool",
        lambda of: of.profile.from_host.bytes_per_s if of.profile is not None else 0.0,
    )
    prefill_token_s: float = _gauge(
        "seconds that each token adds to a large step of prompts, measured in the same way",
        lambda of: of.profile.prefill_token_s if of.profile is not None else 0.0,
    )
    bytes_to_host: int = _counter(
        "bytes moved to the host pool, for swaps and for the prefix cache",
        lambda of: getattr(of.pool, "bytes_to_host", 0),
    )
    bytes_from_host: int = _counter(
        "bytes moved from the host pool, for swaps and for the prefix cache",
        lambda of: getattr(of.pool, "bytes_from_host", 0),
    )
    transfer_stalled_s: float = _counter(
        "seconds that steps waited for such transfers", lambda of: getattr(of.pool, "stalled_s", 0.0)
    )
    num_host_blocks: int = _gauge("blocks of the host pool", lambda of: of.blocks.num_host_blocks)
    num_host_used_blocks: int = _gauge(
        "blocks of the host pool held by preempted or streamed requests", lambda of: of.blocks.num_host_used
    )
    num_streamed_blocks: int = _gauge(
        "blocks of the host pool that running requests attend to, shared ones counted for each",
        lambda of: of.blocks.num_streamed,
    )
    num_host_cached_blocks: int = _gauge(
        "blocks of the host pool in the prefix cache", lambda of: of.blocks.num_host_cached
    )
    prefix_cache_hit_rate: float = _gauge(
        "fraction of admitted tokens whose KV came from the prefix cache, of either pool",
        lambda of: of.blocks.prefix_hit_tokens / max(of.blocks.prefix_queried_tokens, 1),
    )
    prefix_queried_tokens: int = _counter(
        "tokens of admitted requests that were looked up in the prefix cache",
        lambda of: of.blocks.prefix_queried_tokens,
    )
    prefix_hit_tokens: int = _counter(
        "those whose KV came from the prefix cache, of either pool", lambda of: of.blocks.prefix_hit_tokens
    )
    host_cache_hit_tokens: int = _counter(
        "tokens whose KV came from the prefix cache in the host pool", lambda of: of.blocks.host_hit_tokens
    )
    num_steps: int = _counter(
        "steps planned; a multi-step decode counts each of its steps", lambda of: of.scheduler.num_steps
    )
    num_programs: int = _gauge("compiled programs that steps can run", lambda of: len(of.programs))
    num_programs_to_compile: int = _gauge(
        "programs that are still to be compiled beside the steps, which meanwhile have larger sizes or wait",
        lambda of: 0 if (now := of.programs.background.progress) is None else now.of - now.done,
    )
    num_sizes_missing: int = _gauge(
        "sizes of steps whose programs are not there, since they are still to be compiled or failed",
        lambda of: len(of.programs.background.pending),
    )
    num_output_tokens: int = _counter(
        "tokens drawn; a beam search counts one for each live beam and step", lambda of: of.num_output_tokens
    )


class Statistic(NamedTuple):
    """Meaning of one field of ``EngineStats``.

    Args:
        kind: "gauge" for a state, "counter" for a sum since the start.
        help: the meaning, in words.
        read: makes the value.
    """

    kind: Kind
    help: str
    read: Callable[[Sources], Any]


STATISTICS: dict[str, Statistic] = {each.name: Statistic(**each.metadata) for each in fields(EngineStats)}
"""Every statistic by name."""


def read_stats(
    blocks: BlockStats,
    scheduler: SchedulerStats,
    num_output_tokens: int,
    pool: HostPool | None,
    profile: MachineProfile | None,
    programs: Programs,
) -> EngineStats:
    """The statistics now."""
    sources = Sources(blocks, scheduler, num_output_tokens, pool, profile, programs)
    return EngineStats(**{name: each.read(sources) for name, each in STATISTICS.items()})


@dataclass(frozen=True, slots=True)
class Metric:
    """A statistic in vLLM's form.

    Args:
        name: vLLM's name, or "jpaged:" and the name in ``EngineStats``.
        labels: none.
        value: the value.
    """

    name: str
    labels: dict[str, str]
    value: float


class Counter(Metric):
    """A sum since the start."""


class Gauge(Metric):
    """A state."""


VLLM_NAMES = {
    "num_running": "vllm:num_requests_running",
    "num_waiting": "vllm:num_requests_waiting",
    "num_preemptions": "vllm:num_preemptions",
    "num_output_tokens": "vllm:generation_tokens",
    "prefix_queried_tokens": "vllm:prefix_cache_queries",
    "prefix_hit_tokens": "vllm:prefix_cache_hits",
}
"""The names that vLLM has for statistics; the others are "jpaged:" and their own."""


def metrics_of(stats: EngineStats) -> list[Metric]:
    """Statistics as vLLM's ``LLM.get_metrics`` has them."""
    metrics: list[Metric] = [Gauge("vllm:kv_cache_usage_perc", {}, stats.num_used_blocks / max(stats.num_blocks, 1))]
    for name, each in STATISTICS.items():
        cls = Counter if each.kind == "counter" else Gauge
        metrics.append(cls(VLLM_NAMES.get(name, f"jpaged:{name}"), {}, getattr(stats, name)))
    return metrics
