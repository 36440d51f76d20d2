"""Prefix ends: where later requests are expected to start, which decides the worth of cached blocks of windows.

A hit of n tokens needs the blocks of all n in layers that see all tokens, and those of the window before n in others.
So most cached blocks of a window serve no hit that will ever come. The rule: a cached block of a window is reused
before all needed ones, unless the window before a prefix end covers it; ends are those of prompts, of sequences that
let go of their blocks, of hits, and of what a prompt shares with cached tokens that go on in another way.

A conversation goes on after the end of a sequence, or after that of its prompt if parts of answers are left out. When
several prompts share a beginning, the first of them does not tell where it ends. The second hits it if the blocks have
not been reused. Otherwise the second has an end there, and the third hits that.
"""

from collections.abc import Iterable

from jpaged.contract.layer_groups import LayerGroups
from jpaged.host.blocks.group_match import first_live_blocks
from jpaged.host.blocks.holdings import Holding
from jpaged.host.blocks.prefix_cache import PrefixMatch
from jpaged.host.blocks.tier import TwoTiers


def find_ends(match: PrefixMatch, num_queried: int, block_size: int) -> frozenset[int]:
    """The prefix ends of a new sequence, in blocks.

    Args:
        match: its cached start.
        num_queried: tokens of its prompt, or 0. The same prompt would have to compute one of them.
        block_size: tokens in a block.
    """
    prompt_ends = max(num_queried - 1, 0) // block_size, num_queried // block_size
    return frozenset([match.num_tokens // block_size, match.branch, *prompt_ends]) - {0}


def keep_ends(tiers: TwoTiers, groups: LayerGroups, holding: Holding, ends: Iterable[int]) -> None:
    """Count the blocks of windows that prefix ends need as needed, and as just used.

    Args:
        tiers: the two tiers of blocks.
        groups: the layer groups.
        holding: a sequence on the device. Blocks that it has given up, or has in a copy alone, count too if cached.
        ends: some ends, in blocks; those beyond the blocks that the sequence has published are left out.
    """
    cells = set()
    for end in ends:
        if end <= holding.num_published:
            starts = first_live_blocks(groups, end * tiers.block_size, tiers.block_size)
            cells |= {(index, group) for group in groups.windowed for index in range(starts[group], end)}
    cache, link, length = tiers.device.cache, holding.prefix, holding.num_published
    for index, group in sorted(cells, reverse=True):
        assert link is not None, "published blocks have a prefix"
        while length > index + 1:
            link, length = link.parent, length - 1
            assert link is not None
        block = holding.blocks[index * len(groups) + group]
        if block not in cache:
            block = cache.find(link.of_group(group))
        if block is not None:
            tiers.device.touch(block)


def touch_twins(tiers: TwoTiers, groups: LayerGroups, holding: Holding) -> None:
    """Count cached blocks with the content of a sequence's blocks as just used, the tail first.

    A sequence has such twins in full layers if windows lacked blocks, so that all layers were computed again. The
    blocks of windows are new then, and a hit needs both.

    Args:
        tiers, groups: as for ``keep_ends``.
        holding: a sequence on the device, which is about to give up its blocks.
    """
    cache, link = tiers.device.cache, holding.prefix
    for index in reversed(range(holding.num_published)):
        assert link is not None, "published blocks have a prefix"
        for group in range(groups.num_full):
            if holding.blocks[index * len(groups) + group] not in cache:
                twin = cache.find(link.of_group(group))
                if twin is not None:
                    tiers.device.touch(twin)
        link = link.parent
