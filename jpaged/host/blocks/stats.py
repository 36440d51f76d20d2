"""The statistics of the pools."""

from dataclasses import dataclass, replace
from typing import Self

from jpaged.contract.layer_groups import LayerGroups
from jpaged.host.blocks.holdings import Holdings
from jpaged.host.blocks.reserve import Reserve
from jpaged.host.blocks.streaming import StreamedBlocks
from jpaged.host.blocks.swap import Swap
from jpaged.host.blocks.tier import TwoTiers
from jpaged.host.blocks.windows import WindowedBlocks


@dataclass(frozen=True, slots=True)
class BlockStats:
    """The blocks held and cached now, and counters since the start.

    Args:
        num_blocks: device blocks that can be handed out: all but block 0 and the window.
        num_used: device blocks held by at least one sequence.
        num_shared: device blocks held by two or more.
        num_logical: device blocks that would be held if none were shared.
        num_cached: device blocks in the prefix cache, held or free.
        num_host_blocks: blocks of the host tier.
        num_host_used: host blocks held by a swapped or streamed sequence, or read by a transfer in flight.
        num_host_cached: host blocks in the prefix cache, held or free.
        num_streamed: host blocks in the tables of streamed sequences.
        tokens_held: device slots that hold a token, each physical block counted once however many share it. A token
            has a slot in each layer group.
        waste: fraction of the slots of used blocks that hold no token (the paper's internal fragmentation). A block of
            a group with fewer layers than others leaves a part of each slot unused.
        prefix_queried_tokens: tokens of all sequences reserved so far while prefix caching was on.
        prefix_hit_tokens: queried tokens whose KV came from the prefix cache, of either tier.
        host_hit_tokens: queried tokens whose KV came from the host tier.
        num_copies: blocks copied on write.
        num_blocks_swapped_out, num_blocks_swapped_in: blocks moved between the tiers for sequences.
        num_blocks_spilled: cached blocks saved to the host tier because their device block was reused.
        num_freed_by_windows: device blocks that running sequences gave up, as sliding windows had passed them.
        num_used_by_group: device blocks held by at least one sequence, for each layer group.
        filled: the part of the slots of used blocks that K and V fill, in slots: ``tokens_held`` if there is one group.
    """

    num_blocks: int
    num_used: int
    num_shared: int
    num_logical: int
    num_cached: int
    num_host_blocks: int
    num_host_used: int
    num_host_cached: int
    num_streamed: int
    tokens_held: int
    waste: float
    prefix_queried_tokens: int
    prefix_hit_tokens: int
    host_hit_tokens: int
    num_copies: int
    num_blocks_swapped_out: int
    num_blocks_swapped_in: int
    num_blocks_spilled: int
    num_freed_by_windows: int
    num_used_by_group: tuple[int, ...]
    filled: float

    def without(self, num_tokens: int, block_size: int, groups: LayerGroups) -> Self:
        """The same without so many tokens, which have slots that are not written yet."""
        num_slots, filled = self.num_used * block_size, self.filled - num_tokens * groups.share_used
        waste = (num_slots - filled) / num_slots if num_slots else 0.0
        return replace(self, tokens_held=self.tokens_held - num_tokens * len(groups), filled=filled, waste=waste)


def count_blocks(
    tiers: TwoTiers,
    holdings: Holdings,
    reserve: Reserve,
    swap: Swap,
    streamed: StreamedBlocks,
    windows: WindowedBlocks,
) -> BlockStats:
    """Count the blocks of the pools, in time proportional to all block tables."""
    device, host = tiers.device, tiers.host
    num_blocks, num_host_blocks = len(device.blocks), len(host.blocks)
    groups, num_used = holdings.groups, num_blocks - len(device.free)
    used = (num_used,) if len(groups) == 1 else tuple([holdings.num_held(group) for group in range(len(groups))])
    num_slots = num_used * tiers.block_size
    held = [number * tiers.block_size - holdings.num_empty_slots(group) for group, number in enumerate(used)]
    filled = sum([number * groups.share_of(group) for group, number in enumerate(held)])
    return BlockStats(
        num_blocks=num_blocks,
        num_used=num_used,
        num_shared=sum(count > 1 for count in device.ref_counts),
        num_logical=device.num_holders,
        num_cached=len(device.cache),
        num_host_blocks=num_host_blocks,
        num_host_used=num_host_blocks - len(host.free),
        num_host_cached=len(host.cache),
        num_streamed=sum([len(holding.host_blocks) for holding in holdings.on_device.values()]),
        tokens_held=sum(held),
        waste=(num_slots - filled) / num_slots if num_slots else 0.0,
        prefix_queried_tokens=reserve.queried_tokens,
        prefix_hit_tokens=reserve.hit_tokens,
        host_hit_tokens=reserve.host_hit_tokens,
        num_copies=tiers.num_copies,
        num_blocks_swapped_out=swap.num_blocks_out + streamed.num_blocks_out,
        num_blocks_swapped_in=swap.num_blocks_in,
        num_blocks_spilled=tiers.num_spilled,
        num_freed_by_windows=windows.num_freed,
        num_used_by_group=used,
        filled=filled,
    )
