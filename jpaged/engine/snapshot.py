"""A picture of the engine between two steps: every block of the pool, and every unfinished request."""

import enum
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jpaged.engine.loop import Engine
from jpaged.engine.stats import EngineStats
from jpaged.host.blocks.tier import BlockTier
from jpaged.host.sequence import SequenceGroup


class BlockUse(enum.IntEnum):
    """The use of a physical block."""

    RESERVED = 0  # padding, and the window of streamed blocks
    FREE = 1
    CACHED = 2  # free, with content that a prompt may find
    PRIVATE = 3  # held once
    SHARED = 4  # held by several
    PINNED = 5


@dataclass(frozen=True, slots=True)
class RequestSnapshot:
    """One unfinished request.

    Args:
        request_id: its id.
        state: "waiting", "running" or "preempted".
        priority: lower is served first.
        num_prompt_tokens: its prompt's tokens.
        num_output_tokens: tokens of all its sequences so far.
        num_cached_tokens: prompt tokens from the prefix cache; None before it is first scheduled.
        num_preemptions: times that it was preempted.
        block_tables: for each running sequence its blocks on the device, in logical order.
    """

    request_id: str
    state: str
    priority: int
    num_prompt_tokens: int
    num_output_tokens: int
    num_cached_tokens: int | None
    num_preemptions: int
    block_tables: list[list[int]]


@dataclass(frozen=True, slots=True)
class EngineSnapshot:
    """The pool and the requests at one moment.

    Args:
        blocks, host_blocks: the ``BlockUse`` of each physical block of the device's and the host's pool, a byte each.
        requests: the unfinished requests, those that run first, in the order in which they are served.
        pins: by id, the blocks of each pinned prefix that is computed.
        stats: the statistics.
    """

    blocks: bytes
    host_blocks: bytes
    requests: list[RequestSnapshot]
    pins: dict[str, list[int]]
    stats: EngineStats


def take_snapshot(engine: Engine) -> EngineSnapshot:
    """The state of an engine between two steps, in time in proportion to its blocks."""
    scheduler, stats = engine.scheduler, engine.stats()
    held = scheduler.pins.held
    pins = {
        pin_id: list(engine.blocks.holdings.held_by(pin.sequences[0].seq_id).live_blocks)
        for pin_id, pin in held.items()
    }
    groups = [group for group in (*scheduler.line.running, *scheduler.line.waiting) if not group.is_pin]
    return EngineSnapshot(
        blocks=_uses(engine.blocks.tiers.device, [block for table in pins.values() for block in table]),
        host_blocks=_uses(engine.blocks.tiers.host),
        requests=[_picture(engine, group) for group in groups],
        pins=pins,
        stats=stats,
    )


def _uses(tier: BlockTier, pinned: Sequence[int] = ()) -> bytes:
    usable = slice(tier.blocks.start, tier.blocks.stop)
    holders = np.array(tier.ref_counts[usable])
    uses = np.full(tier.blocks.stop, BlockUse.RESERVED, np.uint8)
    is_cached = np.zeros(tier.blocks.stop, bool)
    is_cached[list(tier.cache.blocks)] = True
    free = np.where(is_cached[usable], BlockUse.CACHED, BlockUse.FREE)
    uses[usable] = np.select([holders > 1, holders == 1], [BlockUse.SHARED, BlockUse.PRIVATE], free)
    uses[list(pinned)] = BlockUse.PINNED
    return uses.tobytes()


def _picture(engine: Engine, group: SequenceGroup) -> RequestSnapshot:
    is_running = group in engine.scheduler.line.running
    return RequestSnapshot(
        request_id=group.request.request_id,
        state="running" if is_running else "preempted" if group.num_preemptions else "waiting",
        priority=group.request.priority,
        num_prompt_tokens=group.prompt_len,
        num_output_tokens=sum(seq.num_outputs for seq in group.sequences),
        num_cached_tokens=group.num_cached_tokens,
        num_preemptions=group.num_preemptions,
        block_tables=[list(engine.blocks.holdings.held_by(seq.seq_id).device_blocks) for seq in group.running],
    )
