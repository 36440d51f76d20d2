"""The block manager: which physical blocks each sequence holds. It only decides; the device copies and writes.

The paper's KV cache manager (sections 4.2 to 4.5). Each sequence sees *logical* blocks 0, 1, ... of ``block_size``
tokens; its *block table* maps them to *physical* blocks anywhere in the pool. Blocks are taken on demand, as tokens
arrive, so a sequence wastes less than one block (4.3). Sequences share blocks by reference count, with copy-on-write
of the last one (4.4). Freed blocks keep their content, and stay in the prefix cache, until they are reused.

There are two tiers of blocks with the same bookkeeping (``blocks.tier``): the device's pool, and a pool on the host.
The host's holds the KV of swapped sequences (4.5), and caches prefixes whose device blocks were reused. Moves between
the tiers are queued while a step is planned, and made by that plan (``take_transfers``, ``finish_transfers``).
"""

from collections.abc import Hashable, Iterable, Sequence

import numpy as np
from jaxtyping import Int32

from jpaged.contract.layer_groups import LayerGroups
from jpaged.contract.plan import BlockCopy
from jpaged.host.blocks.append import Append
from jpaged.host.blocks.batch import BatchRow, BlockBatch, pad_batch, slots_of
from jpaged.host.blocks.group_match import match_groups
from jpaged.host.blocks.hashed_tokens import HashedTokens
from jpaged.host.blocks.holdings import Holdings
from jpaged.host.blocks.prefix_cache import PrefixMatch
from jpaged.host.blocks.publish import holding_to_publish, publish
from jpaged.host.blocks.reserve import Reserve
from jpaged.host.blocks.stats import BlockStats, count_blocks
from jpaged.host.blocks.streaming import StreamedBlocks
from jpaged.host.blocks.swap import Swap
from jpaged.host.blocks.ticket import OutOfBlocks, Ticket
from jpaged.host.blocks.tier import BlockTier, Transfers, TwoTiers
from jpaged.host.blocks.windows import WindowedBlocks
from jpaged.host.offload.placement import KV_ON_DEVICE, Placement

__all__ = ["NO_MATCH", "BlockManager", "OutOfBlocks"]

NO_MATCH = PrefixMatch()


class BlockManager:
    """Hands out physical blocks 1 to ``num_blocks - 1`` to sequences. One writer: the scheduler.

    Every call that raises has changed nothing. Sequences are named by any hashable ``seq_id``. Calls raise ValueError
    for an unknown name, and for a swapped sequence whose device blocks they need.

    Args:
        num_blocks: blocks in the pool, block 0 (padding, never handed out) included.
        block_size: tokens in a block.
        enable_prefix_caching: remember published blocks by content and let later sequences share them.
        num_host_blocks: blocks of the host tier, from 0 on; none turns swapping and spilling off.
        placement: which sequences keep blocks on the host while they run; blocks of its window are never handed out.
        groups: the layer groups, each with block tables of its own; None is one group that keeps all blocks.

    Raises:
        ValueError: a size too small, or more slots than int32 can number.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        enable_prefix_caching: bool = False,
        num_host_blocks: int = 0,
        placement: Placement = KV_ON_DEVICE,
        groups: LayerGroups | None = None,
    ) -> None:
        _check_sizes(num_blocks, block_size, num_host_blocks, placement.num_window_blocks)
        self.num_blocks = num_blocks
        self.num_host_blocks = num_host_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.placement = placement
        self.groups = groups or LayerGroups.single()
        assert self.groups.is_plain or placement.kind == "device", "blocks are streamed for one group alone"
        self.is_quantized = False  # the engine sets it for 8-bit pools: the tokens of a block share a scale
        self.tiers = TwoTiers(num_blocks, num_host_blocks, block_size, placement.num_window_blocks)
        """The two tiers of blocks. Read only."""
        self.holdings = Holdings(block_size, self.groups)
        """The blocks of every sequence. Read only."""
        rooms = self.tiers, self.holdings
        self._swap, self._append, self.windows = Swap(*rooms), Append(*rooms), WindowedBlocks(*rooms)
        self._reserve = Reserve(*rooms, is_counting=enable_prefix_caching)
        self.streamed = StreamedBlocks(*rooms, self._reserve)

    @property
    def num_free_blocks(self) -> int:
        """Blocks that no sequence holds, cached ones included: they are reused when nothing else is left."""
        return len(self.tiers.device.free)

    @property
    def num_used_blocks(self) -> int:
        """Blocks held by at least one sequence."""
        return len(self.tiers.device.blocks) - len(self.tiers.device.free)

    # Starting a sequence ------------------------------------------------------------------------------------------

    def match_prefix(
        self,
        token_ids: Sequence[int] | HashedTokens,
        num_tokens: int | None = None,
        *,
        salt: bytes = b"",
        least_inside: int = 1,
    ) -> PrefixMatch:
        """Find the longest cached prefix of ``token_ids``, of either tier, which may end inside a block.

        A model computes logits from at least one token: match all but the last.

        Args:
            token_ids: tokens of the sequence. ``HashedTokens`` bring their own salt, and are hashed once for all calls.
            num_tokens: the first of them, to match; None is all.
            salt: only blocks published under the same salt match.
            least_inside: tokens of a hit that ends inside a block, at least: it costs a copy, or a load.

        Returns:
            The match, valid until the next call that takes blocks. Empty when prefix caching is off.
        """
        if not self.enable_prefix_caching:
            return NO_MATCH
        tokens = token_ids if isinstance(token_ids, HashedTokens) else HashedTokens(token_ids, self.block_size, salt)
        num_tokens = len(tokens) if num_tokens is None else num_tokens
        if self.groups.is_plain:
            return self.tiers.match(tokens, num_tokens, least_inside)
        return match_groups(self.tiers, self.groups, tokens, num_tokens)

    def to_reserve(
        self, seq_id: Hashable, num_tokens: int, *, match: PrefixMatch = NO_MATCH, num_queried: int | None = None
    ) -> Ticket[list[BlockCopy]]:
        """The ticket of ``reserve``. The match was looked up for ``num_queried`` tokens: None is all, 0 is no query."""
        num_queried = num_tokens if num_queried is None else num_queried
        return self._reserve.ticket(seq_id, num_tokens, match, num_queried=num_queried)

    def reserve(
        self, seq_id: Hashable, num_tokens: int, *, match: PrefixMatch = NO_MATCH, is_query: bool = True
    ) -> list[BlockCopy]:
        """Start a sequence that holds ``num_tokens`` tokens, the first of them as ``match`` says.

        Device blocks are shared; one that matches only in part is copied, unless the sequence ends with the match.
        Host blocks are loaded into device blocks, which no step may read or write before ``finish_transfers``.

        Args:
            seq_id: a new name.
            num_tokens: tokens to hold, matched ones included.
            match: the match that ``match_prefix`` just found, or its first few hits.
            is_query: count this as one query of the prefix cache (if caching is on).

        Returns:
            The copy to run, as for ``append``.

        Raises:
            OutOfBlocks: too few free blocks.
            ValueError: a ``seq_id`` in use, a negative count, or a match that is not, or no longer, cached.
        """
        return self.to_reserve(seq_id, num_tokens, match=match, num_queried=None if is_query else 0).commit()

    def fork(self, parent_id: Hashable, child_id: Hashable, *, is_new: bool = True) -> None:
        """Start ``child_id`` with all blocks of ``parent_id``, the partial last one too (4.4).

        No data moves until one of them appends. A child that is not new releases its own blocks, as ``free`` does.
        Raises ValueError for an unknown or swapped sequence, or if the name of a new one is in use.
        """
        self.holdings.fork(parent_id, child_id, self.tiers, is_new=is_new)

    # Running ------------------------------------------------------------------------------------------------------

    def append(self, seq_id: Hashable, num_tokens: int = 1) -> list[BlockCopy]:
        """Make room for ``num_tokens`` more tokens.

        A partial last block that others share, or the cache with more tokens in it, is replaced by a copy
        (copy-on-write, 4.4) and keeps its other holders; the last of them writes in place.

        Returns:
            The copy to run before this step's writes, or nothing. If the sequence is freed or swapped out before the
            step runs, its copy must be dropped: by then, another sequence may hold the destination.

        Raises:
            OutOfBlocks: too few free blocks.
            ValueError: an unknown or swapped ``seq_id``, or a negative count.
        """
        return self.append_all([(seq_id, num_tokens)])

    def to_append(self, appends: Sequence[tuple[Hashable, int]]) -> Ticket[list[BlockCopy]]:
        """The ticket of ``append_all``: it knows the number of blocks. Raises ValueError as ``append`` does."""
        return self._append.ticket(appends)

    def append_all(self, appends: Sequence[tuple[Hashable, int]]) -> list[BlockCopy]:
        """``append`` for (seq_id, num_tokens) of different sequences: all of them or, when blocks are short, none.

        Raises OutOfBlocks and ValueError as ``append`` does.
        """
        return self._append.append(appends)

    def num_blocks_freed_by(self, seq_ids: Iterable[Hashable], *, match: PrefixMatch = NO_MATCH) -> int:
        """Count the blocks that only these sequences hold, without those that ``match`` would share."""
        holdings = map(self.holdings.held_by, seq_ids)
        return self.tiers.device.num_freed_by([h.device_blocks for h in holdings], but=match.device_blocks)

    def free(self, seq_id: Hashable) -> None:
        """End a sequence, swapped or not. Blocks that no other sequence holds become free."""
        self.windows.keep_ends(seq_id)
        self.holdings.release(seq_id, self.tiers)

    def publish(
        self,
        seq_id: Hashable,
        token_ids: Sequence[int] | HashedTokens,
        num_computed: int,
        *,
        salt: bytes = b"",
        include_partial: bool = False,
        is_filling: bool = False,
    ) -> None:
        """Enter the sequence's full blocks into the prefix cache, once a step that writes them is planned.

        Costs only the blocks that became full since the last call; does nothing when prefix caching is off. Of two
        sequences that publish the same content, the first keeps the entry.

        Args:
            seq_id: the sequence.
            token_ids: the sequence's tokens from the first one on; those already published are not read again.
            num_computed: tokens of these whose KV is in the pool once all planned steps have run.
            salt: only a ``match_prefix`` with the same salt finds the blocks. ``HashedTokens`` bring their own.
            include_partial: the sequence is about to be freed. Enter the last, partial block too, so that a later
                prompt may match inside it. Also enter blocks whose entries other blocks held, and have lost since.
            is_filling: the plan under construction computes these tokens. Until ``take_transfers``, another sequence
                can share the blocks, but not read them in the same step: ``TwoTiers.num_hits_ready`` tells.

        Raises:
            ValueError: an unknown or swapped ``seq_id``, ``num_computed`` beyond the tokens, or a salt that changed.
        """
        salt = token_ids.salt if isinstance(token_ids, HashedTokens) else salt
        holding = holding_to_publish(self.holdings, seq_id, token_ids, num_computed, salt)
        if self.enable_prefix_caching:
            entered = publish(
                self.tiers, self.groups, holding, token_ids, num_computed, salt=salt, include_partial=include_partial
            )
            self.tiers.fill(entered if is_filling else ())

    # Two tiers ----------------------------------------------------------------------------------------------------

    def to_swap_out(self, seq_ids: Iterable[Hashable]) -> Ticket[None]:
        """The ticket of ``swap_out``: it knows the number of host blocks. Raises ValueError as ``swap_out`` does."""
        return self._swap.ticket_out(seq_ids)

    def swap_out(self, seq_ids: Iterable[Hashable]) -> None:
        """Move sequences to the host tier (4.5); blocks they share stay shared. Their device blocks are released.

        Published blocks that the host tier caches already are not transferred again.

        Raises:
            OutOfBlocks: too few free host blocks.
            ValueError: an unknown or swapped sequence, or one whose blocks this plan still loads from the host.
        """
        self.to_swap_out(seq_ids).commit()

    def to_swap_in(self, seq_ids: Iterable[Hashable]) -> Ticket[None]:
        """The ticket of ``swap_in``: it knows the number of blocks. Raises ValueError as ``swap_in`` does."""
        return self._swap.ticket_in(seq_ids)

    def swap_in(self, seq_ids: Iterable[Hashable]) -> None:
        """Move swapped sequences back; no step may read or write the loaded blocks before ``finish_transfers``.

        Published blocks that the device caches are shared instead of loaded. Those left behind stay cached.

        Raises:
            OutOfBlocks: too few free blocks.
            ValueError: a sequence that is not swapped out, or that this very plan swaps out.
        """
        self.to_swap_in(seq_ids).commit()

    def is_swapped(self, seq_id: Hashable) -> bool:
        """Whether the sequence's blocks are in the host tier."""
        return seq_id in self.holdings.on_host

    def take_transfers(self) -> Transfers:
        """The moves between the tiers of the plan now complete. Its step must end with ``finish_transfers``."""
        return self.tiers.take_transfers()

    def finish_transfers(self) -> None:
        """The step has run: loaded blocks can be matched and used, host blocks they came from be overwritten."""
        self.tiers.finish_transfers()

    def forget_all(self) -> None:
        """Forget all cached content and all queued moves: the content of both pools is lost.

        Raises ValueError if a sequence still holds blocks.
        """
        self.holdings.require_none()
        self.tiers.forget()

    # Reading ------------------------------------------------------------------------------------------------------

    def block_table(self, seq_id: Hashable, group: int = 0) -> list[int]:
        """The sequence's physical blocks of a layer group in logical order, 0 for those that were freed. Read only.

        It is a live view that follows later calls, if there is one group.
        """
        blocks = self.holdings.held_by(seq_id).blocks
        return blocks if len(self.groups) == 1 else blocks[group :: len(self.groups)]

    def num_tokens(self, seq_id: Hashable) -> int:
        """Tokens the sequence holds or has room for, in either tier: those reserved plus those appended."""
        return self.holdings.num_tokens(self.holdings.on_host.get(seq_id) or self.holdings.held_by(seq_id))

    def slots(self, seq_id: Hashable, start: int, stop: int) -> Int32[np.ndarray, " tokens"]:
        """The slots (physical_block * block_size + offset) of the sequence's token positions [start, stop).

        Raises:
            ValueError: an unknown or swapped ``seq_id``, or positions the sequence does not hold.
        """
        self.holdings.require_positions(seq_id, start, stop)
        return slots_of(self.block_table(seq_id), start, stop, self.block_size)

    def batch(self, rows: Sequence[BatchRow], *, num_tokens: int, num_rows: int, max_blocks: int) -> BlockBatch:
        """The arrays of one step of a user's own model, padded to one shape: one compilation serves many lengths.

        Args:
            rows: (seq_id, start, stop) of each sequence: the step computes its positions [start, stop), and reads
                [0, stop). Reserve or append them first.
            num_tokens: new tokens of all rows, padding included, as in ``num_rows`` and ``max_blocks``.
            num_rows: rows.
            max_blocks: entries of each block table.

        Raises:
            ValueError: as ``slots``; a sequence given twice; or rows that do not fit the shape.
        """
        slots = [self.slots(*row) for row in rows]
        tables = [self.block_table(seq_id)[: self.holdings.num_covering(stop)] for seq_id, _, stop in rows]
        return pad_batch(rows, slots, tables, num_tokens=num_tokens, num_rows=num_rows, max_blocks=max_blocks)

    def stats(self) -> BlockStats:
        """Count the blocks held now. Takes time in proportion to all block tables: for reports, not for every step."""
        return count_blocks(self.tiers, self.holdings, self._reserve, self._swap, self.streamed, self.windows)

    def check_invariants(self) -> None:
        """Assert everything this class promises about its state, at the cost of a walk over all of it. For tests."""
        self.holdings.check_invariants(self.tiers)


def drop_host_tier(blocks: BlockManager) -> None:
    """Use no host tier from now on. Nothing may be stored in it."""
    host = blocks.tiers.host
    assert len(host.free) == len(host.blocks)
    blocks.num_host_blocks = 0
    blocks.tiers.host = BlockTier(range(0), blocks.block_size)


def _check_sizes(num_blocks: int, block_size: int, num_host_blocks: int, num_window_blocks: int) -> None:
    if num_blocks < 2 + num_window_blocks:
        window = f" and {num_window_blocks} for streamed blocks" if num_window_blocks else ""
        raise ValueError(
            f"num_blocks={num_blocks}: give {2 + num_window_blocks} or more (block 0 is kept for padding{window})"
        )
    if block_size < 1:
        raise ValueError(f"block_size={block_size}: give 1 or more")
    if num_blocks * block_size > 2**31:
        raise ValueError(f"num_blocks={num_blocks} x block_size={block_size} slots: int32 numbers at most 2**31")
    if num_host_blocks < 0:
        raise ValueError(f"num_host_blocks={num_host_blocks}: give 0 or more")
