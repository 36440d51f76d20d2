"""Streamed blocks: sequences whose first blocks stay on the host, where every step reads them."""

from array import array
from collections.abc import Hashable
from typing import NamedTuple

from jpaged.contract.rows import host_cell
from jpaged.host.blocks.hashed_tokens import HashedTokens
from jpaged.host.blocks.holdings import Holding, Holdings
from jpaged.host.blocks.prefix_cache import Prefix, PrefixMatch
from jpaged.host.blocks.reserve import Reserve
from jpaged.host.blocks.ticket import Ticket
from jpaged.host.blocks.tier import TwoTiers


class _Move(NamedTuple):
    """A device block on its way to the host, its content if published, and the host block that has it already."""

    block: int
    prefix: Prefix | None
    twin: int | None


class StreamedMatch(NamedTuple):
    """The cached start of a streamed sequence.

    Args:
        match: the hits, all of full blocks.
        num_kept: hits, the last ones, whose device blocks the sequence shares. The others go to the host, if they are
            not there.
        num_unheld: free device blocks among those shared.
    """

    match: PrefixMatch = PrefixMatch()
    num_kept: int = 0
    num_unheld: int = 0


class StreamedBlocks:
    """Starts streamed sequences and moves their blocks to the host.

    Args:
        tiers: the two tiers of blocks.
        holdings: the blocks of every sequence.
        reserve: counts the prefix hits.
    """

    def __init__(self, tiers: TwoTiers, holdings: Holdings, reserve: Reserve) -> None:
        self.num_blocks_out = 0
        self._tiers = tiers
        self._holdings = holdings
        self._reserve = reserve

    def match(self, tokens: HashedTokens, num_tokens: int, *, most_on_host: int, num_to_spare: int) -> StreamedMatch:
        """Find the longest cached prefix that the host has, can take now from the device, or that stays on the device.

        Args:
            tokens: tokens of a sequence.
            num_tokens: the first of them, to match.
            most_on_host: blocks on the host at most.
            num_to_spare: free device blocks that the sequence may keep.
        """
        tiers = self._tiers
        match = tiers.match(tokens, num_tokens, least_inside=tiers.block_size)
        match = match.cut(min(tiers.num_hits_ready(match), match.num_full_blocks(tiers.block_size)))
        num_kept = num_unheld = 0
        for hit in reversed(match.hits):
            is_free = hit.block in tiers.device.free
            if hit.is_on_host or num_unheld + is_free > num_to_spare:
                break
            num_kept, num_unheld = num_kept + 1, num_unheld + is_free
        num_home = len(match.hits) - num_kept
        num_possible = self._num_possible(self._moves_of(match.cut(min(num_home, most_on_host))))
        return (
            StreamedMatch(match, num_kept, num_unheld)
            if num_possible == num_home
            else StreamedMatch(match.cut(num_possible))
        )

    def ticket_in(self, seq_id: Hashable, num_tokens: int, found: StreamedMatch, num_queried: int) -> Ticket[None]:
        """The ticket to start a sequence, or to resume a swapped one, that streams the blocks it has on the host.

        Args:
            seq_id: a new name, or that of a swapped sequence.
            num_tokens: tokens to hold.
            found: the match that ``match`` just found; empty for a swapped sequence.
            num_queried: tokens of the sequence.
        """
        swapped = self._holdings.on_host.get(seq_id)
        if swapped is None:
            self._holdings.require_new(seq_id)
        match, num_kept, num_unheld = found
        num_held = len(match.hits) if swapped is None else len(swapped.blocks)
        num_taken = self._holdings.num_covering(num_tokens) - num_held
        kept = [hit.block for hit in match.hits[len(match.hits) - num_kept :]]

        def start() -> None:
            if swapped is None:
                prefix = self._tiers.prefix_of(match.hits[-1]) if match.hits else None
                num_published = num_held
                for block in kept:
                    self._tiers.device.hold(block)  # before any block is taken, which may evict others
                homes = self._bring_home(self._moves_of(match.cut(num_held - num_kept)))
                self._reserve.count(num_queried, match)
            else:
                prefix, num_published, homes = swapped.prefix, swapped.num_published, swapped.blocks
                del self._holdings.on_host[seq_id]
            blocks = [host_cell(index) for index in range(len(homes))]
            blocks += [*kept, *self._tiers.take_all(num_taken)]
            num_empty = len(blocks) * self._tiers.block_size - num_tokens
            self._holdings.on_device[seq_id] = Holding(
                blocks, num_empty, prefix, num_published, host_blocks=array("i", homes)
            )

        return Ticket(num_taken + num_unheld, self._tiers, self._tiers.device, start)

    def move_out(self, seq_id: Hashable, num_blocks: int) -> int:
        """Move the first device blocks of a streamed sequence, which planned steps have filled, to the host.

        Args:
            seq_id: the sequence; with prefix caching, these blocks are published.
            num_blocks: blocks to move.

        Returns:
            The number of blocks moved: fewer if host blocks are short.
        """
        holding = self._holdings.held_by(seq_id)
        first, links = len(holding.host_blocks), _last_links(holding, holding.num_published - len(holding.host_blocks))
        moves = []
        for index, block in enumerate(holding.blocks[first : first + num_blocks]):
            prefix = links[index] if links else None
            moves.append(_Move(block, prefix, None if prefix is None else self._tiers.host.cache.find(prefix)))
        moves = moves[: self._num_possible(moves)]
        if moves:
            self._tiers.num_changes += 1
            if not holding.host_blocks:
                holding.host_blocks = array("i")
            holding.host_blocks.extend(self._bring_home(moves))
            stop = first + len(moves)
            holding.blocks[first:stop] = [host_cell(index) for index in range(first, stop)]
            self._tiers.release([move.block for move in moves])
        return len(moves)

    def swap_out(self, seq_id: Hashable) -> None:
        """Release the device blocks of a streamed sequence, which keeps those on the host until it resumes."""
        holding = self._holdings.held_by(seq_id)
        del self._holdings.on_device[seq_id]
        self._tiers.num_changes += 1
        self._tiers.release(holding.device_blocks)
        num_published = min(holding.num_published, len(holding.host_blocks))
        prefix = holding.prefix
        for _ in range(holding.num_published - num_published):
            assert prefix is not None
            prefix = prefix.parent
        self._holdings.on_host[seq_id] = Holding(
            list(holding.host_blocks), 0, prefix if num_published else None, num_published
        )

    def _moves_of(self, match: PrefixMatch) -> list[_Move]:
        moves = []
        for hit in match.hits:
            prefix = self._tiers.prefix_of(hit)
            moves.append(_Move(hit.block, prefix, hit.block if hit.is_on_host else self._tiers.host.cache.find(prefix)))
        return moves

    def _num_possible(self, moves: list[_Move]) -> int:
        """Count the leading moves for which the host has blocks."""
        host = self._tiers.host
        num_free = len(host.free)
        for index, move in enumerate(moves):
            num_free -= move.twin is None or move.twin in host.free
            if num_free < 0:
                return index
        return len(moves)

    def _bring_home(self, moves: list[_Move]) -> list[int]:
        """Hold a host block for each move: the one that has the content, or one that this plan stores it to."""
        for move in moves:
            if move.twin is not None:
                self._tiers.host.hold(move.twin)  # before any block is taken, which may evict others
        leaving = [(move.block, move.prefix) for move in moves if move.twin is None]
        stored = iter(self._tiers.store_all(leaving))
        self.num_blocks_out += len(leaving)
        return [next(stored) if move.twin is None else move.twin for move in moves]


def _last_links(holding: Holding, count: int) -> list[Prefix]:
    """The last links of a sequence's published chain, in order."""
    links, link = [], holding.prefix
    for _ in range(count):
        assert link is not None
        links.append(link)
        link = link.parent
    return links[::-1]
