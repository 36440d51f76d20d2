"""The statistics of the scheduler."""

from dataclasses import dataclass

from jpaged.host.blocks.manager import BlockManager
from jpaged.host.entry import Entry
from jpaged.host.line import Line
from jpaged.host.pins import Pins
from jpaged.host.preemption import Preemption


@dataclass(frozen=True, slots=True)
class SchedulerStats:
    """Counters since the start, and the queues now (in sequence groups).

    ``num_logical_blocks`` and ``num_physical_blocks`` are sums over all steps: blocks in the tables of running
    sequences, and distinct blocks among them. Sharing saves one minus their ratio (section 6.3).
    """

    num_waiting: int
    num_running: int
    num_pins: int
    num_preemptions: int
    num_swaps_out: int
    num_swaps_in: int
    num_tokens_recomputed: int
    num_steps: int
    num_logical_blocks: int
    num_physical_blocks: int


class StepSums:
    """Sums over all steps of the blocks that running sequences hold; blocks that only pins hold do not count.

    Args:
        blocks: the bookkeeping of the pools.
        pins: the pinned prefixes.
    """

    def __init__(self, blocks: BlockManager, pins: Pins) -> None:
        self.num_steps = 0
        self.num_logical_blocks = 0
        self.num_physical_blocks = 0
        self._blocks = blocks
        self._pins = pins

    def count(self, num_steps: int) -> None:
        """Add the blocks held now, for each step of a plan of so many."""
        device = self._blocks.tiers.device
        num_logical, num_physical = device.num_holders, len(device.blocks) - len(device.free)
        if self._pins.held:
            pins = self._pins.held_seq_ids
            held = map(self._blocks.holdings.held_by, pins)
            num_logical -= sum([len(holding.live_blocks) for holding in held])
            num_physical -= self._blocks.num_blocks_freed_by(pins)
        self.num_steps += num_steps
        self.num_logical_blocks += num_steps * num_logical
        self.num_physical_blocks += num_steps * num_physical


def read_stats(line: Line, pins: Pins, preemption: Preemption, entry: Entry, sums: StepSums) -> SchedulerStats:
    """Read the counters now."""
    return SchedulerStats(
        num_waiting=len(line.waiting),
        num_running=len(line.running),
        num_pins=len(pins),
        num_preemptions=preemption.num_preemptions,
        num_swaps_out=preemption.num_swaps_out,
        num_swaps_in=entry.num_swaps_in,
        num_tokens_recomputed=entry.num_tokens_recomputed,
        num_steps=sums.num_steps,
        num_logical_blocks=sums.num_logical_blocks,
        num_physical_blocks=sums.num_physical_blocks,
    )
