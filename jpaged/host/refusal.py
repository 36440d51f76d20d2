"""Refusals: the reason why the first waiting group could not start, so that it is not matched in every iteration."""

from dataclasses import dataclass

from jpaged.host.blocks.tier import TwoTiers
from jpaged.host.sequence import SequenceGroup


@dataclass(frozen=True, slots=True)
class Refusal:
    """A group that was short of blocks, and the events without which it stays short.

    Each block that becomes free shortens the lack by one. Each block that enters the device's cache may do the same, if
    the group would load its content from the host. Otherwise only the first block that its match lacked matters. In
    models with windows any block may: a long match may lack a single one.

    Args:
        group: the group.
        num_rows: rows that it needed.
        is_on_host: whether it would load blocks from the host.
        has_windows: whether the model has layers with windows.
        is_running: whether other groups were running, for which some blocks must stay free.
        num_short: blocks that it lacked at least.
        num_taken: blocks that it would have taken.
        num_freed: device blocks that had become free by then, since the start.
        num_cached: blocks that had entered the device's prefix cache by then, since the start.
        lacking: digest of the first block that its match lacked, if more of it can match.
    """

    group: SequenceGroup
    num_rows: int
    is_on_host: bool
    has_windows: bool
    is_running: bool
    num_short: int
    num_taken: int
    num_freed: int
    num_cached: int
    lacking: bytes | None

    def num_short_now(self, group: SequenceGroup, tiers: TwoTiers, *, is_running: bool) -> int:
        """Count the blocks that the first waiting group is known to lack still; 0 if it has to be matched again."""
        if group is not self.group or group.num_rows != self.num_rows or is_running != self.is_running:
            return 0
        if self.lacking is not None and tiers.is_cached(self.lacking):
            return 0
        if self.has_windows and tiers.device.cache.num_inserted > self.num_cached:
            return 0
        num_gained = tiers.device.num_freed - self.num_freed
        if self.is_on_host:
            num_gained += tiers.device.cache.num_inserted - self.num_cached
        return max(self.num_short - num_gained, 0)

    def num_taken_at_least(self, group: SequenceGroup, tiers: TwoTiers) -> int:
        """Count the blocks that the first waiting group would still take; 0 if it has to be matched again."""
        if group is not self.group or (self.lacking is not None and tiers.is_cached(self.lacking)):
            return 0
        return 0 if self.is_on_host else self.num_taken
