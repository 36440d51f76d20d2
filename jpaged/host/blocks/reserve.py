"""Reserving: the blocks of a new sequence, of which a prefix match may provide the first."""

from array import array
from collections.abc import Hashable
from functools import partial

from jpaged.contract.plan import BlockCopy
from jpaged.host.blocks.group_match import find_stale_hit, first_live_blocks
from jpaged.host.blocks.holdings import Holding, Holdings
from jpaged.host.blocks.prefix_cache import PrefixHit, PrefixMatch
from jpaged.host.blocks.prefix_ends import find_ends
from jpaged.host.blocks.ticket import Ticket
from jpaged.host.blocks.tier import TwoTiers


class Reserve:
    """Starts sequences, and counts the prefix hits.

    Args:
        tiers: the two tiers of blocks.
        holdings: the blocks of every sequence.
        is_counting: whether prefix caching is on.
    """

    def __init__(self, tiers: TwoTiers, holdings: Holdings, *, is_counting: bool) -> None:
        self.queried_tokens = 0
        self.hit_tokens = 0
        self.host_hit_tokens = 0
        self._tiers = tiers
        self._holdings = holdings
        self._is_counting = is_counting

    def ticket(
        self, seq_id: Hashable, num_tokens: int, match: PrefixMatch, *, num_queried: int
    ) -> Ticket[list[BlockCopy]]:
        """The ticket to start a sequence: see ``BlockManager.reserve``. A query of no tokens is not counted."""
        tiers, groups = self._tiers, self._holdings.groups
        self._holdings.require_new(seq_id)
        if num_tokens < 0:
            raise ValueError(f"num_tokens={num_tokens}: give 0 or more")
        if match.num_tokens > num_tokens:
            raise ValueError(f"the match has {match.num_tokens} tokens, more than num_tokens={num_tokens}")
        stale = tiers.find_stale(match) if groups.is_plain else find_stale_hit(tiers, groups, match)
        if stale is not None:
            raise ValueError(f"{stale} of {len(match.hits)} hits does not continue a cached prefix: match again")
        copied = _hit_to_copy(match, num_tokens, tiers.block_size)
        kept = match.hits if copied is None else match.hits[:-1]
        num_needed = tiers.num_needed(
            num_taken=-(-num_tokens // tiers.block_size) * len(groups) - len(kept),
            num_loads=len([hit for hit in kept if hit.is_on_host]),
            shared={hit.block for hit in kept if not hit.is_on_host and hit.is_needed},
            copied=set() if copied is None else {copied.block},
        )
        start = partial(self._start, seq_id, num_tokens, match, kept, copied, num_queried=num_queried)
        return Ticket(num_needed, tiers, tiers.device, start)

    def _start(
        self,
        seq_id: Hashable,
        num_tokens: int,
        match: PrefixMatch,
        kept: tuple[PrefixHit, ...],
        copied: PrefixHit | None,
        *,
        num_queried: int,
    ) -> list[BlockCopy]:
        """Take the blocks of a sequence, which must be there. Returns the copy to run.

        Args:
            seq_id: its name.
            num_tokens: tokens to hold, matched ones included.
            match: the cached start.
            kept: hits whose blocks the sequence shares, or loads from the host.
            copied: the last hit, if it is copied.
            num_queried: tokens that were looked up, or 0 if they and the hits do not count.
        """
        tiers, block_size, groups = self._tiers, self._tiers.block_size, self._holdings.groups
        for hit in kept:
            if hit.is_needed:
                tiers.tier_of(hit).hold(hit.block)  # before any block is taken, which may evict others
        sources = set() if copied is None else {copied.block}
        blocks: list[int] = []
        copies: list[BlockCopy] = []
        for hit in kept:
            if hit.is_on_host:
                blocks.append(tiers.load(hit.block, tiers.prefix_of(hit).cut(hit.num_tokens), copied=sources))
            else:
                blocks.append(hit.block)
        if copied is not None:
            tiers.device.touch(copied.block)
            block, copies = tiers.copy(copied.block)
            blocks.append(block)
        num_cells = -(-num_tokens // block_size) * len(groups)
        blocks += tiers.take_all(num_cells - len(blocks))
        num_full = match.num_full_blocks(block_size)
        prefix = match.prefix
        if groups.is_plain and num_full:
            prefix = tiers.prefix_of(match.hits[num_full - 1])
        self._holdings.on_device[seq_id] = Holding(
            blocks,
            num_empty=num_cells // len(groups) * block_size - num_tokens,
            prefix=prefix,
            num_published=num_full,
            is_borrowing=bool(kept) and kept[-1].num_tokens < block_size and not kept[-1].is_on_host,
            starts=() if groups.is_plain else array("i", first_live_blocks(groups, match.num_tokens, block_size)),
            ends=frozenset() if groups.is_plain else find_ends(match, num_queried, block_size),
        )
        if num_queried:
            self.count(num_queried, match)
        return copies

    def count(self, num_tokens: int, match: PrefixMatch) -> None:
        """Count a match of so many tokens, if prefix caching is on."""
        if self._is_counting:
            self.queried_tokens += num_tokens
            self.hit_tokens += match.num_tokens
            self.host_hit_tokens += sum([hit.num_tokens for hit in match.hits if hit.is_on_host]) // match.num_groups


def _hit_to_copy(match: PrefixMatch, num_tokens: int, block_size: int) -> PrefixHit | None:
    """The last hit, if the sequence writes after it into a block that it cannot share."""
    last = match.hits[-1] if match.hits else None
    if last is None or last.is_on_host or last.num_tokens == block_size or num_tokens == match.num_tokens:
        return None
    return last
