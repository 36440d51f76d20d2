"""Swapping: moves whole sequences between the device's tier and the host's (PagedAttention, section 4.5)."""

from collections.abc import Callable, Hashable, Iterable
from typing import NamedTuple

from jpaged.host.blocks.holdings import Holding, Holdings
from jpaged.host.blocks.prefix_cache import Prefix, PrefixCache
from jpaged.host.blocks.prefix_ends import keep_ends
from jpaged.host.blocks.ticket import Ticket
from jpaged.host.blocks.tier import BlockTier, TwoTiers


class _Move(NamedTuple):
    """The content of a block that changes tiers, if published, and the block of the other tier that caches it."""

    prefix: Prefix | None
    twin: int | None


class Swap:
    """Moves sequences to the host and back; blocks that they share stay shared.

    Args:
        tiers: the two tiers of blocks.
        holdings: the blocks of every sequence.
    """

    def __init__(self, tiers: TwoTiers, holdings: Holdings) -> None:
        self.num_blocks_out = 0
        self.num_blocks_in = 0
        self._tiers = tiers
        self._holdings = holdings

    def ticket_out(self, seq_ids: Iterable[Hashable]) -> Ticket[None]:
        """The ticket to move sequences to the host; it counts host blocks."""
        holdings = {seq_id: self._holdings.held_by(seq_id) for seq_id in seq_ids}
        host = self._tiers.host
        moves = _moves_of(holdings.values(), host.cache)
        _require_settled(moves, self._tiers.is_loading)
        twins = [move.twin for move in moves.values() if move.twin is not None]
        num_blocks = len(moves) - len(twins) + len([twin for twin in set(twins) if twin in host.free])

        def move_out() -> None:
            for twin in twins:
                host.hold(twin)  # before any block is taken, which may evict others
            homes: dict[int, int] = {}
            for block, (prefix, twin) in moves.items():
                homes[block] = self._tiers.store(block, prefix) if twin is None else twin
                self.num_blocks_out += twin is None
            for seq_id, holding in holdings.items():
                keep_ends(self._tiers, self._holdings.groups, holding, [holding.num_published])
                self._tiers.release(_relocate(holding, homes, host))
                self._holdings.on_host[seq_id] = self._holdings.on_device.pop(seq_id)
            host.release(list(homes.values()))

        return Ticket(num_blocks, self._tiers, host, move_out)

    def ticket_in(self, seq_ids: Iterable[Hashable]) -> Ticket[None]:
        """The ticket to move swapped sequences back; it counts device blocks."""
        holdings = {seq_id: self._holdings.swapped_by(seq_id) for seq_id in seq_ids}
        device, host = self._tiers.device, self._tiers.host
        moves = _moves_of(holdings.values(), device.cache)
        _require_settled(moves, self._tiers.is_storing)
        twins = [move.twin for move in moves.values() if move.twin is not None]
        num_blocks = self._tiers.num_needed(0, num_loads=len(moves) - len(twins), shared=set(twins))

        def move_in() -> None:
            for block, (_, twin) in moves.items():
                if twin is None:
                    host.hold(block)
                else:
                    device.hold(twin)  # before any block is taken, which may evict others
            homes: dict[int, int] = {}
            for block, (prefix, twin) in moves.items():
                homes[block] = self._tiers.load(block, prefix) if twin is None else twin
                self.num_blocks_in += twin is None
            for seq_id, holding in holdings.items():
                host.release(_relocate(holding, homes, device))
                self._holdings.on_device[seq_id] = self._holdings.on_host.pop(seq_id)
            device.release(list(homes.values()))

        return Ticket(num_blocks, self._tiers, device, move_in)


def _moves_of(holdings: Iterable[Holding], cache: PrefixCache) -> dict[int, _Move]:
    """Each block of a group once, with the block that ``cache``, the other tier's, has for its content."""
    moves: dict[int, _Move] = {}
    for holding in holdings:
        prefixes = holding.prefix.chain() if holding.prefix else []
        starts = holding.starts or (0,)
        for cell, block in enumerate(holding.blocks):
            index, group = divmod(cell, len(starts))
            if index < starts[group]:
                continue
            prefix = prefixes[index].of_group(group) if index < len(prefixes) else None
            if block not in moves or prefix is not None:
                moves[block] = _Move(prefix, cache.find(prefix) if prefix is not None else None)
    return moves


def _require_settled(blocks: Iterable[int], is_moving: Callable[[int], bool]) -> None:
    moving = [block for block in blocks if is_moving(block)]
    if moving:
        raise ValueError(f"blocks {moving} of these sequences change tiers in this plan: let it run first")


def _relocate(holding: Holding, homes: dict[int, int], tier: BlockTier) -> list[int]:
    """Let a sequence hold its blocks' ``homes`` in another tier. Returns the blocks that it held, to be released."""
    before, starts = holding.live_blocks, holding.starts or (0,)
    holding.blocks = [
        homes[block] if cell // len(starts) >= starts[cell % len(starts)] else 0
        for cell, block in enumerate(holding.blocks)
    ]
    tier.share(holding.live_blocks)
    return before
