"""Holdings: the blocks of every sequence, on the device or on the host."""

from array import array
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

from jpaged.contract.layer_groups import LayerGroups
from jpaged.contract.rows import host_cell
from jpaged.host.blocks.prefix_cache import Prefix
from jpaged.host.blocks.tier import TwoTiers


@dataclass(slots=True)
class Holding:
    """The blocks of one sequence.

    Args:
        blocks: physical blocks in the order of ``LayerGroups``; ``host_cell(i)`` stands for ``host_blocks[i]``.
        num_empty: slots of the last block without a token, so ``0 <= num_empty < block_size``.
        prefix: content of the first ``num_published`` blocks, all full.
        num_published: blocks that this sequence has published.
        is_borrowing: shares a last block in which the cache may hold more tokens than the sequence does.
        host_blocks: host blocks of a streamed sequence that is on the device: its first blocks, all full.
        starts: first logical block that is held in each layer group; empty if there is one group without a window.
        ends: numbers of first blocks after which later requests may start (``prefix_ends``); empty as ``starts`` is.
    """

    blocks: list[int]
    num_empty: int
    prefix: Prefix | None = None
    num_published: int = 0
    is_borrowing: bool = False
    host_blocks: "array[int] | tuple[()]" = ()
    starts: "array[int] | tuple[()]" = ()
    ends: frozenset[int] = frozenset()

    @property
    def live_blocks(self) -> list[int]:
        """The blocks that are held, in the tier of the sequence; those of a streamed sequence included."""
        if not self.starts:
            return self.blocks
        num_groups, starts = len(self.starts), self.starts
        return [block for cell, block in enumerate(self.blocks) if cell // num_groups >= starts[cell % num_groups]]

    @property
    def device_blocks(self) -> list[int]:
        """The blocks on the device of a sequence that is there."""
        return self.blocks[len(self.host_blocks) :] if self.host_blocks else self.live_blocks

    def fork(self) -> "Holding":
        """The same blocks for another sequence."""
        assert not self.host_blocks, "a streamed sequence is never forked"
        copied = self.blocks.copy(), self.num_empty, self.prefix, self.num_published, self.is_borrowing
        return Holding(*copied, starts=self.starts[:], ends=self.ends)


_NOTHING = Holding([], 0)


class Holdings:
    """The holding of every sequence, by its id. Written by the block manager and its rooms.

    Args:
        block_size: tokens in a block.
        groups: the layer groups.
    """

    def __init__(self, block_size: int, groups: LayerGroups) -> None:
        self.block_size = block_size
        self.groups = groups
        self.on_device: dict[Hashable, Holding] = {}
        self.on_host: dict[Hashable, Holding] = {}

    def held_by(self, seq_id: Hashable) -> Holding:
        """The device blocks of a sequence. Raises ValueError if it is unknown or swapped out."""
        holding = self.on_device.get(seq_id)
        if holding is None:
            if seq_id in self.on_host:
                raise ValueError(f"sequence {seq_id!r} is swapped out: swap it in first")
            raise ValueError(f"unknown sequence {seq_id!r}: reserve or fork it first")
        return holding

    def swapped_by(self, seq_id: Hashable) -> Holding:
        """The host blocks of a sequence. Raises ValueError if it is not swapped out."""
        holding = self.on_host.get(seq_id)
        if holding is None:
            raise ValueError(f"sequence {seq_id!r} is not swapped out: there is nothing to swap in")
        return holding

    def require_new(self, seq_id: Hashable) -> None:
        """Raise ValueError if the name is in use."""
        if seq_id in self.on_device or seq_id in self.on_host:
            raise ValueError(f"sequence {seq_id!r} exists already: free it first, or choose another name")

    def require_none(self) -> None:
        """Raise ValueError if any sequence holds blocks."""
        if self.on_device or self.on_host:
            raise ValueError(f"{len(self.on_device) + len(self.on_host)} sequences hold blocks: free them first")

    def require_positions(self, seq_id: Hashable, start: int, stop: int) -> None:
        """Raise ValueError if the sequence does not hold token positions [start, stop) on the device."""
        num_held = self.num_tokens(self.held_by(seq_id))
        if not 0 <= start <= stop <= num_held:
            raise ValueError(f"positions [{start}, {stop}): sequence {seq_id!r} holds [0, {num_held})")

    def fork(self, parent_id: Hashable, child_id: Hashable, tiers: TwoTiers, *, is_new: bool) -> None:
        """Give a sequence all blocks of another one. Blocks that both hold stay; the child's others are released.

        Raises ValueError for an unknown or swapped sequence, or if the name of a new one is in use.
        """
        if is_new:
            self.require_new(child_id)
        child, parent = _NOTHING if is_new else self.held_by(child_id), self.held_by(parent_id)
        assert not child.host_blocks, "a streamed sequence is never forked"
        num_kept = common_len(parent.blocks, child.blocks) if self.groups.is_plain else 0
        tiers.device.share(parent.live_blocks[num_kept:])
        tiers.release(child.live_blocks[num_kept:])
        self.on_device[child_id] = parent.fork()
        tiers.num_changes += 1

    def release(self, seq_id: Hashable, tiers: TwoTiers) -> None:
        """Forget a sequence, and remove it from the holders of its blocks. Raises ValueError if it is unknown."""
        swapped = self.on_host.pop(seq_id, None)
        if swapped is not None:
            tiers.host.release(swapped.live_blocks)
        else:
            holding = self.held_by(seq_id)
            tiers.release(holding.device_blocks)
            tiers.host.release(holding.host_blocks)
            del self.on_device[seq_id]
        tiers.num_changes += 1

    def num_tokens(self, holding: Holding) -> int:
        """Count the tokens that the blocks of a sequence hold or have room for."""
        return len(holding.blocks) // len(self.groups) * self.block_size - holding.num_empty

    def num_covering(self, num_tokens: int) -> int:
        """Count the logical blocks that hold so many tokens."""
        return -(-num_tokens // self.block_size)

    def num_held(self, group: int) -> int:
        """Count the device blocks that hold tokens of a layer group, each physical block once."""
        return len({block for h in self.on_device.values() for block in h.blocks[group :: len(self.groups)]} - {0})

    def num_empty_slots(self, group: int) -> int:
        """Count the device slots without a token in the blocks of a layer group, each physical block once.

        A sequence that borrows a block may see fewer tokens in it than others: the sequence that sees most counts.
        """
        tables = [(h.blocks[group :: len(self.groups)], h.num_empty) for h in self.on_device.values()]
        full = {block for table, num_empty in tables for block in (table[:-1] if num_empty else table)}
        partial = dict(sorted(((table[-1], num_empty) for table, num_empty in tables if num_empty), reverse=True))
        return sum(count for block, count in partial.items() if block not in full)

    def check_invariants(self, tiers: TwoTiers) -> None:
        """Assert what this class and the tiers promise, at the cost of a walk over all blocks."""
        assert not self.on_device.keys() & self.on_host.keys()
        on_device, on_host = self.on_device.values(), self.on_host.values()
        tiers.check_invariants(
            on_device=_count(h.device_blocks for h in on_device),
            on_host=_count([h.live_blocks for h in on_host] + [h.host_blocks for h in on_device]),
        )
        num_groups = len(self.groups)
        for h in [*self.on_device.values(), *self.on_host.values()]:
            assert 0 <= h.num_empty < self.block_size
            assert h.blocks or not h.num_empty
            assert len(set(h.live_blocks)) == len(h.live_blocks)
            assert len(h.blocks) % num_groups == 0
            assert len(h.starts) == (0 if self.groups.is_plain else num_groups)
            for group, start in enumerate(h.starts):
                table = h.blocks[group::num_groups]
                assert start == 0 or self.groups.groups[group].window is not None
                assert start <= (len(table) if h.num_empty == 0 else len(table) - 1), "the last block is live"
                assert not any(table[:start])
            assert len(set(h.host_blocks)) == len(h.host_blocks)
            assert h.blocks[: len(h.host_blocks)] == [host_cell(index) for index in range(len(h.host_blocks))]
            assert len(h.host_blocks) * self.block_size <= self.num_tokens(h), "blocks on the host are full"
            assert not h.num_published or len(h.host_blocks) <= h.num_published
            assert h.num_published * self.block_size <= self.num_tokens(h)
            assert h.num_published == (len(h.prefix.chain()) if h.prefix else 0)
        owners = [h for h in self.on_device.values() if h.blocks and not h.is_borrowing]
        num_empty = {block: h.num_empty for h in owners for block in h.blocks[-num_groups:] if block}
        for h in owners:
            assert not any(num_empty.get(block, 0) for block in h.blocks[:-num_groups])
            for block in filter(None, h.blocks[-num_groups:]):
                assert h.num_empty == num_empty[block], "all owners of a block see the same tokens in it"
                cached = tiers.device.cache.prefix_of(block)
                num_held = self.block_size - h.num_empty
                assert cached is None or cached.num_last_tokens <= num_held, "an owner writes no cached slot"


def common_len(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common beginning of two lists, found by bisection."""
    known, most = 0, min(len(a), len(b))
    while known < most:
        middle = (known + most + 1) // 2
        if a[known:middle] == b[known:middle]:
            known = middle
        else:
            most = middle - 1
    return known


def _count(tables: Iterable[Sequence[int]]) -> Counter[int]:
    return Counter(block for table in tables for block in table)
