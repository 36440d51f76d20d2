"""Publishing: enters the blocks of a sequence into the prefix cache."""

from collections.abc import Hashable, Sequence

from jpaged.contract.layer_groups import LayerGroups
from jpaged.host.blocks.hashed_tokens import HashedBlock, HashedTokens, hash_blocks
from jpaged.host.blocks.holdings import Holding, Holdings
from jpaged.host.blocks.prefix_cache import Prefix, PrefixCache
from jpaged.host.blocks.prefix_ends import keep_ends
from jpaged.host.blocks.tier import BlockTier, TwoTiers


def holding_to_publish(
    holdings: Holdings, seq_id: Hashable, token_ids: Sequence[int] | HashedTokens, num_computed: int, salt: bytes
) -> Holding:
    """The blocks of a sequence. Raises ValueError if it is not on the device, has fewer tokens, or another salt."""
    holding = holdings.held_by(seq_id)
    num_tokens = holdings.num_tokens(holding)
    if not 0 <= num_computed <= num_tokens or num_computed > len(token_ids):
        raise ValueError(
            f"num_computed={num_computed}: sequence {seq_id!r} has room for {num_tokens} tokens, "
            f"and {len(token_ids)} token_ids were given: expected 0 to the lesser of both"
        )
    if holding.prefix is not None and holding.prefix.salt != salt:
        raise ValueError(f"salt={salt!r}: sequence {seq_id!r} shares or published blocks under {holding.prefix.salt!r}")
    return holding


def publish(
    tiers: TwoTiers,
    groups: LayerGroups,
    holding: Holding,
    token_ids: Sequence[int] | HashedTokens,
    num_computed: int,
    *,
    salt: bytes,
    include_partial: bool,
) -> list[int]:
    """Enter blocks that the sequence has not published. Of two blocks with the same content, the first is kept.

    Args:
        tiers: the two tiers of blocks.
        groups: the layer groups.
        holding: the sequence's blocks.
        token_ids: the sequence's tokens.
        num_computed: tokens of these whose KV is in the pool once all planned steps have run.
        salt: salt of the prefix.
        include_partial: enter the last, partial block too, and blocks whose entries other blocks have lost.

    Returns:
        The full blocks among them, which are cached now, or have the content of cached blocks.
    """
    cache, block_size, start = tiers.device.cache, tiers.block_size, holding.num_published
    root = token_ids.root if isinstance(token_ids, HashedTokens) else Prefix.empty(salt)
    prefix = holding.prefix or root
    tiers.num_changes += 1
    if include_partial and holding.prefix is not None:
        _publish_again(tiers.device, groups, holding, holding.prefix)
    stop = num_computed if include_partial else num_computed // block_size * block_size
    if stop <= start * block_size:
        return []
    if isinstance(token_ids, HashedTokens):
        blocks = token_ids.blocks(start, stop)
    else:
        blocks = hash_blocks(prefix.digest, token_ids[start * block_size : stop], block_size)
    if holding.starts:
        return _publish_groups(tiers, groups, holding, prefix, blocks)
    for (tokens, digest), block in zip(blocks, holding.blocks[start:], strict=False):
        known = cache.insert(prefix.link(tokens, digest), block)
        if len(tokens) == cache.block_bytes:
            prefix = known
            holding.num_published += 1
    if holding.num_published:
        holding.prefix = prefix
    return holding.blocks[start : holding.num_published]


def _publish_groups(
    tiers: TwoTiers, groups: LayerGroups, holding: Holding, prefix: Prefix, blocks: Sequence[HashedBlock]
) -> list[int]:
    """Enter full blocks of each layer group that holds them; no match ends inside a block of several groups."""
    entered = []
    for tokens, digest in blocks:
        if len(tokens) == tiers.device.cache.block_bytes:
            prefix = prefix.link(tokens, digest)
            for group, block in _held_in_groups(holding, holding.num_published):
                known = _enter(tiers.device.cache, groups, prefix.of_group(group), block)
                prefix = known if group == 0 else prefix
                entered.append(block)
            holding.prefix = prefix
            holding.num_published += 1
            if holding.num_published in holding.ends:
                keep_ends(tiers, groups, holding, [holding.num_published])
    return entered


def _enter(cache: PrefixCache, groups: LayerGroups, prefix: Prefix, block: int) -> Prefix:
    """Enter a full block of a layer group. Returns its prefix, as ``PrefixCache.insert`` does."""
    return cache.insert(prefix, block, is_needed=prefix.group < groups.num_full)


def _held_in_groups(holding: Holding, index: int) -> list[tuple[int, int]]:
    """The groups that hold a logical block, and the block of each."""
    num_groups = len(holding.starts)
    return [
        (group, holding.blocks[index * num_groups + group])
        for group, start in enumerate(holding.starts)
        if index >= start
    ]


def _publish_again(device: BlockTier, groups: LayerGroups, holding: Holding, prefix: Prefix) -> None:
    """Enter published blocks that were left out: the blocks that held the entries may have been reused since."""
    cache = device.cache
    if holding.starts:
        for index, link in enumerate(prefix.chain()):
            for group, block in _held_in_groups(holding, index):
                if block not in cache:
                    _enter(cache, groups, link.of_group(group), block)
        return
    start = len(holding.host_blocks)  # the host's tier holds entries of its own
    for link, block in zip(prefix.chain()[start:], holding.blocks[start:], strict=False):
        entered = cache.prefix_of(block)
        # The block may have been entered before it was full.
        if entered is not link and (entered is None or entered.num_last_tokens < link.num_last_tokens):
            cache.insert(link, block)
