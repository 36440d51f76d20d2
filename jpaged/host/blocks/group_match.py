"""Prefix matches of models with layer groups or windows.

Layers that see all tokens need all blocks of a cached start. Layers with a window need its last blocks alone: those
that the next token attends to. So a match of n tokens needs no block that a window has passed at n tokens.
"""

from jpaged.contract.layer_groups import LayerGroups
from jpaged.host.blocks.hashed_tokens import HashedTokens
from jpaged.host.blocks.prefix_cache import Prefix, PrefixHit, PrefixMatch
from jpaged.host.blocks.tier import TwoTiers


class _Finder:
    """Finds the cached blocks of some tokens, each once.

    Args:
        tiers: the two tiers of blocks.
        tokens: tokens of a sequence.
        num_tokens: the first of them, to match.
    """

    def __init__(self, tiers: TwoTiers, tokens: HashedTokens, num_tokens: int) -> None:
        num_blocks = num_tokens // tiers.block_size
        self.blocks = tokens.full_blocks(num_tokens)[:num_blocks]
        self.links: list[Prefix] = [tokens.root]
        """The prefixes of the first 0, 1, ... blocks."""
        self._tiers = tiers
        self._found: dict[tuple[int, int], PrefixHit | None] = {}

    def find(self, index: int, group: int) -> PrefixHit | None:
        """The block of a group that caches a logical block, of either tier; the links must reach there."""
        if (index, group) not in self._found:
            self._found[index, group] = self._tiers.find(self.links[index], *self.blocks[index], group)
        return self._found[index, group]

    def follow(self, num_full: int) -> None:
        """Follow the blocks that all groups without a window cache."""
        for index in range(len(self.blocks)):
            hits = [self.find(index, group) for group in range(num_full)]
            if None in hits:
                return
            # Links of the cache itself: comparisons with other cached prefixes then end at once.
            [first, *_] = hits
            assert first is not None
            self.links.append(self._tiers.prefix_of(first))

    def follow_windows(self, groups: LayerGroups) -> None:
        """Go as far as the last block that all groups seem to cache: most prompts are unknown, and cost little."""
        block_size, num_blocks = self._tiers.block_size, len(self.blocks)
        seeing = [
            group for group, each in enumerate(groups.groups) if each.first_live(block_size, block_size) == 0
        ]  # a window of one token sees no block before the token's own
        while num_blocks > 0:
            digest = self.blocks[num_blocks - 1][1]
            if all(self._tiers.is_cached(digest, group) for group in seeing):
                break
            num_blocks -= 1
        for block in self.blocks[:num_blocks]:
            self.links.append(self.links[-1].link(*block))

    def adopt(self, hit: PrefixHit) -> None:
        """Continue with the links of a cached prefix."""
        chain = self._tiers.prefix_of(hit).chain()
        chain[-1] = chain[-1].of_group(0)
        self.links[1 : 1 + len(chain)] = chain


def match_groups(tiers: TwoTiers, groups: LayerGroups, tokens: HashedTokens, num_tokens: int) -> PrefixMatch:
    """Find the longest cached start of some tokens: full blocks of each group, as far as the group needs them.

    Args:
        tiers: the two tiers of blocks.
        groups: the layer groups.
        tokens: the tokens of a sequence.
        num_tokens: the first of them, to match.
    """
    finder = _Finder(tiers, tokens, num_tokens)
    if groups.num_full > 0:
        finder.follow(groups.num_full)
    else:
        finder.follow_windows(groups)
    num_blocks = num_known = len(finder.links) - 1
    is_adopted = groups.num_full > 0

    def find_missing() -> int | None:
        """The last logical block that a window needs, and that is not cached."""
        nonlocal is_adopted
        missing = None
        for group in groups.windowed:
            first = groups.groups[group].first_live(num_blocks * tiers.block_size, tiers.block_size)
            for index in range(num_blocks - 1, max(first, -1 if missing is None else missing + 1) - 1, -1):
                hit = finder.find(index, group)
                if hit is None:
                    missing = index
                    break
                if not is_adopted:
                    is_adopted = True
                    finder.adopt(hit)
        return missing

    # A start that ends after a missing block, and before its window has passed the block, needs the block too.
    while (missing := find_missing()) is not None:
        num_blocks = missing
    passed = PrefixHit(0, tiers.block_size)
    starts = first_live_blocks(groups, num_blocks * tiers.block_size, tiers.block_size)
    hits = [
        (finder.find(index, group) if index >= start else passed) or passed
        for index in range(num_blocks)
        for group, start in enumerate(starts)
    ]
    branch = num_known if num_known > num_blocks and tiers.has_child(finder.links[num_known]) else 0
    return PrefixMatch(tuple(hits), len(groups), finder.links[num_blocks] if num_blocks else None, branch)


def find_stale_hit(tiers: TwoTiers, groups: LayerGroups, match: PrefixMatch) -> PrefixHit | None:
    """The first hit of ``match_groups`` that does not, or no longer, hold what the match says; None if all do."""
    num_groups, block_size = len(groups), tiers.block_size
    links = [] if match.prefix is None else match.prefix.chain()
    starts = first_live_blocks(groups, len(links) * block_size, block_size)
    if len(match.hits) != len(links) * num_groups:
        return match.hits[0] if match.hits else None
    for cell, hit in enumerate(match.hits):
        index, group = divmod(cell, num_groups)
        if hit.num_tokens != block_size or hit.is_needed != (index >= starts[group]):
            return hit
        if not hit.is_needed:
            continue
        prefix = tiers.tier_of(hit).cache.prefix_of(hit.block)
        is_cached = prefix is not None and prefix.group == group and prefix.is_same(links[index])
        if not is_cached or (hit.is_on_host and tiers.is_storing(hit.block)):
            return hit
    return None


def first_live_blocks(groups: LayerGroups, position: int, block_size: int) -> list[int]:
    """The first logical block of each group that tokens from this position on attend to."""
    return [group.first_live(position, block_size) for group in groups.groups]
