"""Appending: new blocks, and copies on write, for sequences that grow (PagedAttention, section 4.4)."""

from collections import Counter
from collections.abc import Hashable, Sequence
from itertools import islice

from jpaged.contract.plan import BlockCopy
from jpaged.host.blocks.holdings import Holding, Holdings
from jpaged.host.blocks.ticket import Ticket
from jpaged.host.blocks.tier import TwoTiers

type _Growth = tuple[Holding, int]  # the blocks of a sequence, and the tokens that it gains


class Append:
    """Gives blocks to sequences that grow.

    Args:
        tiers: the two tiers of blocks.
        holdings: the blocks of every sequence.
    """

    def __init__(self, tiers: TwoTiers, holdings: Holdings) -> None:
        self._tiers = tiers
        self._holdings = holdings
        self._num_groups = len(holdings.groups)

    def ticket(self, appends: Sequence[tuple[Hashable, int]]) -> Ticket[list[BlockCopy]]:
        """The ticket to make room for more tokens, by (seq_id, number of tokens).

        The sequences take what each would take alone, less one for every shared block all of whose holders grow. The
        last of these holders writes in place.
        """
        growing = [self._growth(*append) for append in appends]
        num_blocks, writers, num_groups = 0, Counter(), self._num_groups
        for holding, num_tokens in growing:
            num_blocks += _num_blocks_alone(self._tiers, holding, num_tokens, num_groups)
            if holding.num_empty > 0 and not holding.is_borrowing:
                writers[holding.blocks[-1]] += 1
        device = self._tiers.device
        # The sequences share their last blocks of the other layer groups too.
        in_place = num_groups * sum(1 < count == device.ref_counts[block] for block, count in writers.items())
        return Ticket(num_blocks - in_place, self._tiers, device, lambda: self._grow(growing))

    def append(self, appends: Sequence[tuple[Hashable, int]]) -> list[BlockCopy]:
        """Append as the ticket and its commit do, at less cost in the common case."""
        growing = [self._growth(*append) for append in appends]
        most = self._num_groups * (2 * len(growing) + sum([num for _, num in growing]) // self._tiers.block_size)
        if most > len(self._tiers.device.free) or self._tiers.has_loads:
            return self.ticket(appends).commit()
        self._tiers.num_changes += sum([num_tokens for _, num_tokens in growing]) > 0
        return self._grow(growing)

    def _growth(self, seq_id: Hashable, num_tokens: int) -> _Growth:
        holding = self._holdings.held_by(seq_id)
        if num_tokens < 0:
            raise ValueError(f"num_tokens={num_tokens}: give 0 or more")
        return holding, num_tokens

    def _grow(self, growing: Sequence[_Growth]) -> list[BlockCopy]:
        """Give sequences the blocks for their tokens, which must be there. Returns the copies to run."""
        tiers, num_groups = self._tiers, self._num_groups
        copies: list[BlockCopy] = []
        for holding, num_tokens in growing:
            if num_tokens > 0 and _must_copy_last_block(tiers, holding):
                copies += _copy_last_block(tiers, holding, num_groups)
        nums = [_num_new_blocks(tiers, *growth) for growth in growing]
        taken = iter(tiers.take_all(sum(nums) * num_groups))
        for (holding, num_tokens), num_blocks in zip(growing, nums, strict=True):
            if num_blocks > 0:
                holding.blocks += islice(taken, num_blocks * num_groups)
            holding.num_empty += num_blocks * tiers.block_size - num_tokens
        return copies


def _num_blocks_alone(tiers: TwoTiers, holding: Holding, num_tokens: int, num_groups: int) -> int:
    num_new = _num_new_blocks(tiers, holding, num_tokens) * num_groups
    if num_tokens == 0 or not _must_copy_last_block(tiers, holding):
        return num_new
    num_loads = sum([tiers.is_loading(block) for block in holding.blocks[-num_groups:]])
    return tiers.num_needed(num_new + num_groups - num_loads, num_loads=num_loads)


def _num_new_blocks(tiers: TwoTiers, holding: Holding, num_tokens: int) -> int:
    """Count the logical blocks that the tokens need beyond the empty slots."""
    num_beyond = num_tokens - holding.num_empty
    return -(-num_beyond // tiers.block_size) if num_beyond > 0 else 0


def _must_copy_last_block(tiers: TwoTiers, holding: Holding) -> bool:
    """Whether another sequence, or the cache, relies on slots of the last block that the holder would write."""
    return holding.num_empty > 0 and (tiers.device.ref_counts[holding.blocks[-1]] > 1 or holding.is_borrowing)


def _copy_last_block(tiers: TwoTiers, holding: Holding, num_groups: int) -> list[BlockCopy]:
    copies = []
    for cell in range(-num_groups, 0):
        src = holding.blocks[cell]
        if tiers.is_loading(src):
            holding.blocks[cell] = tiers.load_again(src)
        else:
            holding.blocks[cell], made = tiers.copy(src)
            copies += made
        tiers.release([src])
    holding.is_borrowing = False
    return copies
