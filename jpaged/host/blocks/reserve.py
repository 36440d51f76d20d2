"""Reserving: the blocks of a new sequence, of which a prefix match may provide the first."""

from collections.abc import Hashable
from dataclasses import dataclass

from jpaged.contract.plan import BlockCopy
from jpaged.host.blocks.holdings import Holding, Holdings
from jpaged.host.blocks.prefix_cache import PrefixHit, PrefixMatch
from jpaged.host.blocks.ticket import Ticket
from jpaged.host.blocks.tier import TwoTiers


@dataclass(frozen=True, slots=True)
class Reservation:
    """The blocks of a sequence of ``num_tokens`` tokens that begins with ``match``.

    Args:
        tiers: the tiers that hold the match and provide all other blocks.
        num_tokens: tokens to hold, matched ones included.
        match: the cached start.
        kept: hits whose blocks the sequence shares, or loads from the host.
        copied: the last hit, if it is copied because the sequence writes after it.
    """

    tiers: TwoTiers
    num_tokens: int
    match: PrefixMatch
    kept: tuple[PrefixHit, ...]
    copied: tuple[PrefixHit, ...]

    @classmethod
    def of(cls, tiers: TwoTiers, num_tokens: int, match: PrefixMatch) -> "Reservation":
        """Check a match, and divide its hits.

        Raises:
            ValueError: a negative count, or a match that is not, or no longer, cached.
        """
        if num_tokens < 0:
            raise ValueError(f"num_tokens={num_tokens}: give 0 or more")
        if match.num_tokens > num_tokens:
            raise ValueError(f"the match has {match.num_tokens} tokens, more than num_tokens={num_tokens}")
        stale = tiers.find_stale(match)
        if stale is not None:
            raise ValueError(f"{stale} of {len(match.hits)} hits does not continue a cached prefix: match again")
        last = match.hits[-1] if match.hits else None
        is_whole = last is None or last.num_tokens == tiers.block_size
        if last is None or last.is_on_host or is_whole or num_tokens == match.num_tokens:
            return cls(tiers, num_tokens, match, match.hits, ())
        return cls(tiers, num_tokens, match, match.hits[:-1], (last,))

    @property
    def num_covering(self) -> int:
        """Blocks that hold all tokens."""
        return -(-self.num_tokens // self.tiers.block_size)

    @property
    def num_needed(self) -> int:
        """Free blocks that the reservation takes, cached ones that no sequence holds included."""
        return self.tiers.num_needed(
            num_taken=self.num_covering - len(self.kept),
            num_loads=sum(hit.is_on_host for hit in self.kept),
            shared={hit.block for hit in self.kept if not hit.is_on_host},
            copied={hit.block for hit in self.copied},
        )

    def take(self) -> tuple[Holding, list[BlockCopy]]:
        """Take the blocks, which must be there. Returns them, and the copy to run."""
        tiers, block_size = self.tiers, self.tiers.block_size
        for hit in self.kept:
            tiers.tier_of(hit).hold(hit.block)  # before any block is taken, which may evict others
        sources = {hit.block for hit in self.copied}
        blocks: list[int] = []
        copies: list[BlockCopy] = []
        for hit in self.kept:
            if hit.is_on_host:
                blocks.append(tiers.load(hit.block, tiers.prefix_of(hit).cut(hit.num_tokens), copied=sources))
            else:
                blocks.append(hit.block)
        for hit in self.copied:
            tiers.device.touch(hit.block)
            block, copies = tiers.copy(hit.block)
            blocks.append(block)
        while len(blocks) < self.num_covering:
            blocks.append(tiers.take())
        full = [hit for hit in self.match.hits if hit.num_tokens == block_size]
        holding = Holding(
            blocks,
            num_empty=len(blocks) * block_size - self.num_tokens,
            prefix=tiers.prefix_of(full[-1]) if full else None,
            num_published=len(full),
            is_borrowing=any(hit.num_tokens < block_size and not hit.is_on_host for hit in self.kept),
        )
        return holding, copies


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
        self, seq_id: Hashable, num_tokens: int, match: PrefixMatch, *, is_query: bool
    ) -> Ticket[list[BlockCopy]]:
        """The ticket to start a sequence: see ``BlockManager.reserve``."""
        self._holdings.require_new(seq_id)
        reservation = Reservation.of(self._tiers, num_tokens, match)

        def start() -> list[BlockCopy]:
            self._holdings.on_device[seq_id], copies = reservation.take()
            if self._is_counting and is_query:
                self.queried_tokens += num_tokens
                self.hit_tokens += match.num_tokens
                self.host_hit_tokens += sum(hit.num_tokens for hit in match.hits if hit.is_on_host)
            return copies

        return Ticket(reservation.num_needed, self._tiers, self._tiers.device, start)
