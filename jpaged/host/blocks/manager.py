"""The block manager: which physical blocks each sequence holds. It decides only; copies and writes are the device's.

The paper's KV cache manager (sections 4.2 to 4.5). Each sequence sees *logical* blocks 0, 1, ... of ``block_size``
tokens; its *block table* maps them to *physical* blocks anywhere in the pool. Blocks are taken on demand, as tokens
arrive, so a sequence wastes less than one block (4.3). Sequences share blocks by reference count, with copy-on-write
of the last one (4.4). Freed blocks keep their content, and stay in the prefix cache, until they are reused.

There are two tiers of blocks, kept alike (``block_tier``): the device's pool, and a pool on the host. The host's holds
the KV of sequences that are swapped out (4.5), and caches prefixes whose device blocks were reused. What has to move
between them is queued while a step is planned and moved by that plan (``take_transfers``, ``finish_transfers``).
"""

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32

from jpaged.contract.plan import BlockCopy
from jpaged.host.blocks.batch import BatchRow, BlockBatch, pad_batch
from jpaged.host.blocks.prefix_cache import Prefix, PrefixCache, PrefixHit, PrefixMatch, split_blocks
from jpaged.host.blocks.tier import BlockTier, Transfers, TwoTiers

NO_MATCH = PrefixMatch()


class OutOfBlocks(Exception):
    """Too few free blocks for this call, which changed nothing. The scheduler preempts or waits (section 4.5)."""


@dataclass(frozen=True, slots=True)
class BlockStats:
    """What the pools hold now, and what has happened since the start.

    Args:
        num_blocks: device blocks that can be handed out (all but block 0).
        num_used: device blocks held by at least one sequence.
        num_shared: device blocks held by two or more.
        num_logical: device blocks that would be held if none were shared.
        num_cached: device blocks in the prefix cache, held or free.
        num_host_blocks: blocks of the host tier.
        num_host_used: those held by a swapped sequence, or read by a transfer under way.
        num_host_cached: those in the prefix cache, held or free.
        tokens_held: device slots that hold a token, each physical block counted once however many share it.
        waste: fraction of the slots of used blocks that hold no token (the paper's internal fragmentation).
        prefix_queried_tokens: tokens of all sequences reserved so far while prefix caching was on.
        prefix_hit_tokens: those among them whose KV came from the prefix cache, of either tier.
        host_hit_tokens: those among them whose KV came from the host tier.
        num_copies: blocks copied on write.
        num_blocks_swapped_out, num_blocks_swapped_in: blocks moved between the tiers for sequences.
        num_blocks_spilled: cached blocks saved to the host tier because their device block was reused.
    """

    num_blocks: int
    num_used: int
    num_shared: int
    num_logical: int
    num_cached: int
    num_host_blocks: int
    num_host_used: int
    num_host_cached: int
    tokens_held: int
    waste: float
    prefix_queried_tokens: int
    prefix_hit_tokens: int
    host_hit_tokens: int
    num_copies: int
    num_blocks_swapped_out: int
    num_blocks_swapped_in: int
    num_blocks_spilled: int


@dataclass(slots=True)
class _Holding:
    """What one sequence holds. ``prefix`` is the content of its first ``num_published`` blocks, all full."""

    blocks: list[int]
    num_empty: int  # slots of the last block without a token, so 0 <= num_empty < block_size
    prefix: Prefix | None = None
    num_published: int = 0
    is_borrowing: bool = False  # shares a last block in which the cache may hold more tokens than the sequence does


class _Move(NamedTuple):
    """What a block that changes tiers holds, if published, and the block of the other tier that caches the same."""

    prefix: Prefix | None
    twin: int | None


class BlockManager:
    """Hands out physical blocks 1 to ``num_blocks - 1`` to sequences. One writer: the scheduler.

    Every call that raises has changed nothing. Sequences are named by any hashable ``seq_id``.

    Args:
        num_blocks: blocks in the pool, block 0 (padding, never handed out) included.
        block_size: tokens in a block.
        enable_prefix_caching: remember published blocks by content and let later sequences share them.
        num_host_blocks: blocks of the host tier, from 0 on; none turns swapping and spilling off.

    Raises:
        ValueError: a size too small, or more slots than int32 can number.
    """

    def __init__(
        self, num_blocks: int, block_size: int, *, enable_prefix_caching: bool = False, num_host_blocks: int = 0
    ) -> None:
        if num_blocks < 2:
            raise ValueError(f"num_blocks={num_blocks}: give 2 or more (block 0 is kept for padding)")
        if block_size < 1:
            raise ValueError(f"block_size={block_size}: give 1 or more")
        if num_blocks * block_size > 2**31:
            raise ValueError(f"num_blocks={num_blocks} x block_size={block_size} slots: int32 numbers at most 2**31")
        if num_host_blocks < 0:
            raise ValueError(f"num_host_blocks={num_host_blocks}: give 0 or more")
        self.num_blocks = num_blocks
        self.num_host_blocks = num_host_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self._tiers = TwoTiers(num_blocks, num_host_blocks, block_size)
        self._device, self._host = self._tiers.device, self._tiers.host
        self._holdings: dict[Hashable, _Holding] = {}  # of device blocks
        self._swapped: dict[Hashable, _Holding] = {}  # of host blocks
        self._queried_tokens = self._hit_tokens = self._host_hit_tokens = 0
        self._num_swapped_out = self._num_swapped_in = 0

    @property
    def num_free_blocks(self) -> int:
        """Blocks held by no sequence; cached ones among them count, they are reused when nothing else is left."""
        return self._device.num_free

    @property
    def num_used_blocks(self) -> int:
        """Blocks held by at least one sequence."""
        return self.num_blocks - 1 - self._device.num_free

    @property
    def num_logical_blocks(self) -> int:
        """Blocks in the tables of all sequences on the device: those that would be held if none were shared."""
        return self._device.num_holders

    @property
    def num_cached_blocks(self) -> int:
        """Device blocks in the prefix cache, held or free."""
        return len(self._device.cache)

    # Starting a sequence ------------------------------------------------------------------------------------------

    def match_prefix(self, token_ids: Sequence[int], *, salt: bytes = b"", least_inside: int = 1) -> PrefixMatch:
        """Find the longest cached prefix of ``token_ids``, of either tier; change nothing.

        Its last block may be cached with other tokens after those that match. A model needs at least one token to
        compute logits from: pass all tokens but the last to be sure of one.

        Args:
            token_ids: what the sequence will hold.
            salt: only blocks published under the same salt match.
            least_inside: tokens of a hit that ends inside a block, at least: it costs a copy, or a load.

        Returns:
            What ``reserve`` takes, valid until the next call that takes blocks. Empty when prefix caching is off.
        """
        if not self.enable_prefix_caching:
            return NO_MATCH
        return self._tiers.match(token_ids, salt, least_inside)

    def num_fresh_blocks(self, num_tokens: int, match: PrefixMatch = NO_MATCH) -> int:
        """Count the free blocks that ``reserve`` needs, cached ones that no sequence holds included.

        Raises:
            ValueError: as ``reserve``.
        """
        _require_count(num_tokens)
        self._require_match(match, num_tokens)
        kept, copied = self._split_match(match, num_tokens)
        return self._tiers.num_needed(
            num_taken=self._num_covering(num_tokens) - len(kept),
            num_loads=sum(hit.is_on_host for hit in kept),
            shared={hit.block for hit in kept if not hit.is_on_host},
            copied={hit.block for hit in copied},
        )

    def reserve(
        self, seq_id: Hashable, num_tokens: int, *, match: PrefixMatch = NO_MATCH, is_query: bool = True
    ) -> list[BlockCopy]:
        """Start a sequence that holds ``num_tokens`` tokens, the first of them as ``match`` says.

        Device blocks are shared; one that matches only in part is copied, unless the sequence ends with the match.
        Host blocks are loaded into device blocks, which nothing may read or write before ``finish_transfers``.

        Args:
            seq_id: a new name.
            num_tokens: tokens to hold, matched ones included.
            match: what ``match_prefix`` just found, or the first few hits of it.
            is_query: count this as one query of the prefix cache (if caching is on).

        Returns:
            The copy to run, as for ``append``.

        Raises:
            OutOfBlocks: fewer free blocks than ``num_fresh_blocks``.
            ValueError: a ``seq_id`` in use, a negative count, or a match that is not, or no longer, cached.
        """
        self._require_new(seq_id)
        _require_free(self._device, self.num_fresh_blocks(num_tokens, match))
        kept, copied = self._split_match(match, num_tokens)
        for hit in kept:
            self._tiers.tier_of(hit).hold(hit.block)  # before any block is taken, which may evict others
        blocks: list[int] = []
        copies: list[BlockCopy] = []
        for hit in kept:
            blocks.append(self._load_hit(hit, copied) if hit.is_on_host else hit.block)
        for hit in copied:
            self._device.touch(hit.block)
            block, copies = self._tiers.copy(hit.block)
            blocks.append(block)
        num_blocks = self._num_covering(num_tokens)
        while len(blocks) < num_blocks:
            blocks.append(self._tiers.take())
        full = [hit for hit in match.hits if hit.num_tokens == self.block_size]
        self._holdings[seq_id] = _Holding(
            blocks,
            num_empty=num_blocks * self.block_size - num_tokens,
            prefix=self._tiers.prefix_of(full[-1]) if full else None,
            num_published=len(full),
            is_borrowing=any(hit.num_tokens < self.block_size and not hit.is_on_host for hit in kept),
        )
        if self.enable_prefix_caching:
            self._queried_tokens += num_tokens
            self._hit_tokens += match.num_tokens
            self._host_hit_tokens += sum(hit.num_tokens for hit in match.hits if hit.is_on_host)
        return copies

    # Running ------------------------------------------------------------------------------------------------------

    def append(self, seq_id: Hashable, num_tokens: int = 1) -> list[BlockCopy]:
        """Make room for ``num_tokens`` more tokens.

        A partial last block that others share, or the cache with more tokens in it, is replaced by a copy
        (copy-on-write, 4.4) and keeps its other holders; the last of them writes in place.

        Returns:
            The copy to run before this step's writes, or nothing. If the sequence is freed or swapped out before the
            step runs, its copy must be dropped: the destination may by then belong to somebody else.

        Raises:
            OutOfBlocks: fewer free blocks than ``num_blocks_to_append``.
            ValueError: an unknown or swapped ``seq_id``, or a negative count.
        """
        return self.append_all([(seq_id, num_tokens)])

    def num_blocks_to_append(self, seq_id: Hashable, num_tokens: int = 1) -> int:
        """Count the free blocks that ``append`` needs.

        Raises:
            ValueError: an unknown or swapped ``seq_id``, or a negative count.
        """
        holding = self._held_by(seq_id)
        _require_count(num_tokens)
        num_new = self._num_covering(max(num_tokens - holding.num_empty, 0))
        if num_tokens == 0 or not self._must_copy_last_block(holding):
            return num_new
        num_loads = int(self._tiers.is_loading(holding.blocks[-1]))
        return self._tiers.num_needed(num_new + 1 - num_loads, num_loads=num_loads)

    def append_all(self, appends: Sequence[tuple[Hashable, int]]) -> list[BlockCopy]:
        """``append`` for a whole group, or a whole batch: all of its sequences or, when blocks are short, none.

        Args:
            appends: (seq_id, num_tokens) of different sequences.

        Returns:
            The copies of all.

        Raises:
            OutOfBlocks: not enough free blocks; nothing has changed.
            ValueError: as ``append``.
        """
        holdings, ref_counts = self._holdings, self._device.ref_counts
        fitting: list[tuple[_Holding, int]] = []
        others: list[tuple[Hashable, int]] = []
        for seq_id, num_tokens in appends:
            holding = holdings.get(seq_id)
            if (  # 15 of 16 decodes with blocks of 16: kept free of other work
                holding is not None
                and 0 < num_tokens <= holding.num_empty
                and ref_counts[holding.blocks[-1]] == 1
                and not holding.is_borrowing
            ):
                fitting.append((holding, num_tokens))
            else:
                others.append((seq_id, num_tokens))
        growing = [(self._held_by(seq_id), _require_count(num_tokens)) for seq_id, num_tokens in others]
        most = sum(2 + num_tokens // self.block_size for _, num_tokens in growing)
        if most > self._device.num_free or self._tiers.has_loads:  # which not every free block can take
            _require_free(self._device, self._num_blocks_to_append_all(others))
        for holding, num_tokens in fitting:
            holding.num_empty -= num_tokens
        return [copy for holding, num_tokens in growing for copy in self._grow(holding, num_tokens)]

    def _grow(self, holding: _Holding, num_tokens: int) -> list[BlockCopy]:
        """Make room for which there are blocks."""
        total = self._tokens_in(holding) + num_tokens
        copies = self._copy_last_block(holding) if num_tokens > 0 and self._must_copy_last_block(holding) else []
        while len(holding.blocks) * self.block_size < total:
            holding.blocks.append(self._tiers.take())
        holding.num_empty = len(holding.blocks) * self.block_size - total
        return copies

    def _num_blocks_to_append_all(self, appends: Sequence[tuple[Hashable, int]]) -> int:
        """What each would need alone, less one for every shared block whose holders are all among them.

        The last of them writes in place.
        """
        needed, writers = 0, Counter()
        for seq_id, num_tokens in appends:
            needed += self.num_blocks_to_append(seq_id, num_tokens)
            holding = self._held_by(seq_id)
            if holding.num_empty > 0 and not holding.is_borrowing:
                writers[holding.blocks[-1]] += 1
        in_place = sum(1 < count == self._device.ref_counts[block] for block, count in writers.items())
        return needed - in_place

    def num_blocks_freed_by(self, seq_ids: Iterable[Hashable], *, match: PrefixMatch = NO_MATCH) -> int:
        """Count the blocks that would be free if these sequences were gone: those that nobody else holds.

        Args:
            seq_ids: the sequences.
            match: of a sequence that would come in their place; what it shares of theirs is not counted.

        Raises:
            ValueError: an unknown or swapped sequence.
        """
        holders = Counter(block for seq_id in seq_ids for block in self._held_by(seq_id).blocks)
        shared = {hit.block for hit in match.hits if not hit.is_on_host}
        return sum(self._device.ref_counts[block] == n for block, n in holders.items() if block not in shared)

    def fork(self, parent_id: Hashable, child_id: Hashable) -> None:
        """Start ``child_id`` with everything ``parent_id`` holds, sharing every block, the partial last one too.

        The paper's fork for parallel sampling and beam search (4.4). No data moves until one of them appends.

        Raises:
            ValueError: an unknown or swapped parent, or a child name in use.
        """
        parent = self._held_by(parent_id)
        self._require_new(child_id)
        self._device.share(parent.blocks)
        self._holdings[child_id] = _Holding(
            parent.blocks.copy(), parent.num_empty, parent.prefix, parent.num_published, parent.is_borrowing
        )

    def free(self, seq_id: Hashable) -> None:
        """End a sequence, swapped or not: it finished, was aborted, or is to be recomputed.

        Blocks nobody else holds become free.

        Raises:
            ValueError: an unknown ``seq_id``.
        """
        if seq_id in self._swapped:
            self._host.release(self._swapped.pop(seq_id).blocks)
        else:
            self._tiers.release(self._held_by(seq_id).blocks)
            del self._holdings[seq_id]

    def publish(
        self,
        seq_id: Hashable,
        token_ids: Sequence[int],
        num_computed: int,
        *,
        salt: bytes = b"",
        include_partial: bool = False,
    ) -> None:
        """Enter the sequence's full blocks into the prefix cache, once a step that writes them is under way.

        Costs only what became full since the last call; does nothing when prefix caching is off. Of two sequences
        that publish the same content, the first keeps the entry.

        Args:
            seq_id: the sequence.
            token_ids: the sequence's tokens from the first one on; those already published are not read again.
            num_computed: how many of them have their KV in the pool.
            salt: only a ``match_prefix`` with the same salt finds the blocks.
            include_partial: the sequence is about to be freed. Enter the last, partial block too, so that a later
                prompt may match inside it; and enter blocks again that were left out because others held the
                entries, in place of those that have been reused since.

        Raises:
            ValueError: an unknown or swapped ``seq_id``, ``num_computed`` beyond the tokens, or a salt that changed.
        """
        holding = self._held_by(seq_id)
        num_tokens = self._tokens_in(holding)
        if not 0 <= num_computed <= num_tokens or num_computed > len(token_ids):
            raise ValueError(
                f"num_computed={num_computed}: sequence {seq_id!r} has room for {num_tokens} tokens, "
                f"and {len(token_ids)} token_ids were given: expected 0 to the lesser of both"
            )
        if holding.prefix is not None and holding.prefix.salt != salt:
            raise ValueError(
                f"salt={salt!r}: sequence {seq_id!r} shares or published blocks under {holding.prefix.salt!r}"
            )
        if not self.enable_prefix_caching:
            return
        num_full = num_computed // self.block_size
        start, stop = holding.num_published, num_computed if include_partial else num_full * self.block_size
        prefix = holding.prefix or Prefix.empty(salt)
        if include_partial:
            for link, block in zip(prefix.chain(), holding.blocks, strict=False):
                entered = self._device.cache.prefix_of(block)  # perhaps before the block was full
                if entered is None or entered.num_last_tokens < link.num_last_tokens:
                    self._device.cache.insert(link, block)
        if stop <= start * self.block_size:
            return
        new_tokens = token_ids[start * self.block_size : stop]
        for index, tokens in enumerate(split_blocks(new_tokens, self.block_size), start):
            known = self._device.cache.insert(prefix.extend(tokens), holding.blocks[index])
            if index < num_full:
                prefix = known
                holding.prefix, holding.num_published = prefix, index + 1

    # Two tiers ----------------------------------------------------------------------------------------------------

    def num_host_blocks_to_swap_out(self, seq_ids: Iterable[Hashable]) -> int:
        """Count the free host blocks that ``swap_out`` needs, cached ones that no sequence holds included.

        Raises:
            ValueError: an unknown or swapped sequence.
        """
        return self._num_to_store(self._moves_of(map(self._held_by, seq_ids), self._host.cache))

    def swap_out(self, seq_ids: Iterable[Hashable]) -> None:
        """Move sequences to the host tier (4.5); blocks they share stay shared. Their device blocks are released.

        Published blocks that the host tier caches already are not transferred again.

        Raises:
            OutOfBlocks: fewer free host blocks than ``num_host_blocks_to_swap_out``.
            ValueError: an unknown or swapped sequence, or one whose blocks this plan still loads from the host.
        """
        holdings = {seq_id: self._held_by(seq_id) for seq_id in seq_ids}
        moves = self._moves_of(holdings.values(), self._host.cache)
        self._require_settled(moves.keys(), self._tiers.is_loading)
        _require_free(self._host, self._num_to_store(moves))
        for move in moves.values():
            if move.twin is not None:
                self._host.hold(move.twin)  # before any block is taken, which may evict others
        homes: dict[int, int] = {}
        for block, (prefix, twin) in moves.items():
            homes[block] = self._tiers.store(block, prefix) if twin is None else twin
            self._num_swapped_out += twin is None
        for seq_id, holding in holdings.items():
            self._tiers.release(_relocate(holding, homes, self._host))
            self._swapped[seq_id] = self._holdings.pop(seq_id)
        self._host.release(list(homes.values()))

    def num_blocks_to_swap_in(self, seq_ids: Iterable[Hashable]) -> int:
        """Count the free device blocks that ``swap_in`` needs, cached ones that no sequence holds included.

        Raises:
            ValueError: a sequence that is not swapped out.
        """
        return self._num_to_load(self._moves_of(map(self._swapped_by, seq_ids), self._device.cache))

    def swap_in(self, seq_ids: Iterable[Hashable]) -> None:
        """Move swapped sequences back; nothing may read or write the blocks loaded before ``finish_transfers``.

        Published blocks that the device caches are shared instead of loaded. Those left behind stay cached.

        Raises:
            OutOfBlocks: fewer free blocks than ``num_blocks_to_swap_in``.
            ValueError: a sequence that is not swapped out, or that this very plan swaps out.
        """
        holdings = {seq_id: self._swapped_by(seq_id) for seq_id in seq_ids}
        moves = self._moves_of(holdings.values(), self._device.cache)
        self._require_settled(moves.keys(), self._tiers.is_storing)
        _require_free(self._device, self._num_to_load(moves))
        for block, (_, twin) in moves.items():
            if twin is None:
                self._host.hold(block)
            else:
                self._device.hold(twin)  # before any block is taken, which may evict others
        homes: dict[int, int] = {}
        for block, (prefix, twin) in moves.items():
            homes[block] = self._tiers.load(block, prefix) if twin is None else twin
            self._num_swapped_in += twin is None
        for seq_id, holding in holdings.items():
            self._host.release(_relocate(holding, homes, self._device))
            self._holdings[seq_id] = self._swapped.pop(seq_id)
        self._device.release(list(homes.values()))

    def is_swapped(self, seq_id: Hashable) -> bool:
        """Whether the sequence's blocks are in the host tier."""
        return seq_id in self._swapped

    def take_transfers(self) -> Transfers:
        """What the plan now complete has to move. Its step must end with ``finish_transfers``."""
        return self._tiers.take_transfers()

    def finish_transfers(self) -> None:
        """The step has run: loaded blocks can be matched and used, host blocks they came from be overwritten."""
        self._tiers.finish_transfers()

    def forget_all(self) -> None:
        """The content of both pools is lost: forget what is cached and what was to move.

        Raises:
            ValueError: a sequence still holds blocks.
        """
        if self._holdings or self._swapped:
            raise ValueError(f"{len(self._holdings) + len(self._swapped)} sequences hold blocks: free them first")
        self._tiers.forget()

    # Reading ------------------------------------------------------------------------------------------------------

    def block_table(self, seq_id: Hashable) -> list[int]:
        """The sequence's physical blocks in logical order: a live view that follows later calls. Read only.

        Raises:
            ValueError: an unknown or swapped ``seq_id``.
        """
        return self._held_by(seq_id).blocks

    def num_tokens(self, seq_id: Hashable) -> int:
        """Tokens the sequence holds or has room for, in either tier: those reserved plus those appended.

        Raises:
            ValueError: an unknown ``seq_id``.
        """
        return self._tokens_in(self._holdings.get(seq_id) or self._swapped.get(seq_id) or self._held_by(seq_id))

    def slots(self, seq_id: Hashable, start: int, stop: int) -> Int32[np.ndarray, " tokens"]:
        """The slots (physical_block * block_size + offset) of the sequence's token positions [start, stop).

        Raises:
            ValueError: an unknown or swapped ``seq_id``, or positions the sequence does not hold.
        """
        holding = self._held_by(seq_id)
        if not 0 <= start <= stop <= self._tokens_in(holding):
            raise ValueError(f"positions [{start}, {stop}): sequence {seq_id!r} holds [0, {self._tokens_in(holding)})")
        first = start // self.block_size
        blocks = np.asarray(holding.blocks[first : self._num_covering(stop)], dtype=np.int32)
        logical, offsets = np.divmod(np.arange(start, stop, dtype=np.int32), np.int32(self.block_size))
        return blocks[logical - first] * np.int32(self.block_size) + offsets

    def batch(self, rows: Sequence[BatchRow], *, num_tokens: int, num_rows: int, max_blocks: int) -> BlockBatch:
        """The arrays of one step of a user's own model, padded to one shape: one compilation serves many lengths.

        Args:
            rows: (seq_id, start, stop) of each sequence: the step computes its positions [start, stop), and reads
                [0, stop). Reserve or append them first.
            num_tokens: new tokens of all rows, padding included.
            num_rows: rows, padding included.
            max_blocks: entries of each block table, padding included.

        Raises:
            ValueError: as ``slots``; or the rows do not fit the shape.
        """
        slots = [self.slots(*row) for row in rows]
        tables = [self.block_table(seq_id)[: self._num_covering(stop)] for seq_id, _, stop in rows]
        kv_lens = [stop for *_, stop in rows]
        return pad_batch(slots, tables, kv_lens, num_tokens=num_tokens, num_rows=num_rows, max_blocks=max_blocks)

    def stats(self) -> BlockStats:
        """Count what is held now. Takes time in proportion to all block tables: for reports, not for every step."""
        holdings = self._holdings.values()
        num_used = self.num_blocks - 1 - self.num_free_blocks
        # One who borrows a block may see fewer tokens in it than others do: who sees most counts.
        full = {block for h in holdings for block in (h.blocks[:-1] if h.num_empty else h.blocks)}
        partial = dict(sorted(((h.blocks[-1], h.num_empty) for h in holdings if h.num_empty), reverse=True))
        num_empty = sum(count for block, count in partial.items() if block not in full)
        num_slots = num_used * self.block_size
        return BlockStats(
            num_blocks=self.num_blocks - 1,
            num_used=num_used,
            num_shared=sum(count > 1 for count in self._device.ref_counts),
            num_logical=sum(len(h.blocks) for h in holdings),
            num_cached=len(self._device.cache),
            num_host_blocks=self.num_host_blocks,
            num_host_used=self.num_host_blocks - self._host.num_free,
            num_host_cached=len(self._host.cache),
            tokens_held=num_slots - num_empty,
            waste=num_empty / num_slots if num_slots else 0.0,
            prefix_queried_tokens=self._queried_tokens,
            prefix_hit_tokens=self._hit_tokens,
            host_hit_tokens=self._host_hit_tokens,
            num_copies=self._tiers.num_copies,
            num_blocks_swapped_out=self._num_swapped_out,
            num_blocks_swapped_in=self._num_swapped_in,
            num_blocks_spilled=self._tiers.num_spilled,
        )

    def check_invariants(self) -> None:
        """Assert everything this class promises about its state, at the cost of a walk over all of it. For tests."""
        assert not self._holdings.keys() & self._swapped.keys()
        self._tiers.check_invariants(
            on_device=Counter(block for h in self._holdings.values() for block in h.blocks),
            on_host=Counter(block for h in self._swapped.values() for block in h.blocks),
        )
        for h in [*self._holdings.values(), *self._swapped.values()]:
            assert 0 <= h.num_empty < self.block_size
            assert h.blocks or not h.num_empty
            assert len(set(h.blocks)) == len(h.blocks)
            assert h.num_published * self.block_size <= self._tokens_in(h)
            assert h.num_published == (len(h.prefix.chain()) if h.prefix else 0)
        owners = [h for h in self._holdings.values() if h.blocks and not h.is_borrowing]
        num_empty = {h.blocks[-1]: h.num_empty for h in owners}
        for h in owners:
            assert h.num_empty == num_empty[h.blocks[-1]], "all owners of a block see the same tokens in it"
            assert not any(num_empty.get(block, 0) for block in h.blocks[:-1])
            cached = self._device.cache.prefix_of(h.blocks[-1])
            num_held = self.block_size - h.num_empty
            assert cached is None or cached.num_last_tokens <= num_held, "an owner writes no cached slot"

    # Inside -------------------------------------------------------------------------------------------------------

    def _load_hit(self, hit: PrefixHit, copied: Sequence[PrefixHit]) -> int:
        """A device block for a hit in the host tier; not one of those the sequence is to copy."""
        prefix = self._tiers.prefix_of(hit).cut(hit.num_tokens)
        return self._tiers.load(hit.block, prefix, copied={hit.block for hit in copied})

    def _copy_last_block(self, holding: _Holding) -> list[BlockCopy]:
        src, copies = holding.blocks[-1], []
        if self._tiers.is_loading(src):
            holding.blocks[-1] = self._tiers.load_again(src)
        else:
            holding.blocks[-1], copies = self._tiers.copy(src)
        self._tiers.release([src])
        holding.is_borrowing = False
        return copies

    def _must_copy_last_block(self, holding: _Holding) -> bool:
        """Whether somebody else, or the cache, relies on slots of the last block that the holder would write."""
        return holding.num_empty > 0 and (self._device.ref_counts[holding.blocks[-1]] > 1 or holding.is_borrowing)

    def _split_match(self, match: PrefixMatch, num_tokens: int) -> tuple[Sequence[PrefixHit], Sequence[PrefixHit]]:
        """The hits that a sequence of ``num_tokens`` holds, shared or loaded, and those (one at most) it copies."""
        last = match.hits[-1] if match.hits else None
        is_whole = last is None or last.num_tokens == self.block_size
        if last is None or last.is_on_host or is_whole or num_tokens == match.num_tokens:
            return match.hits, ()
        return match.hits[:-1], (last,)

    def _moves_of(self, holdings: Iterable[_Holding], cache: PrefixCache) -> dict[int, _Move]:
        """Each block of a group once, with the block that ``cache``, the other tier's, has for its content."""
        moves: dict[int, _Move] = {}
        for holding in holdings:
            prefixes = holding.prefix.chain() if holding.prefix else []
            for block, prefix in zip_longest(holding.blocks, prefixes):
                if block not in moves or prefix is not None:
                    moves[block] = _Move(prefix, cache.find(prefix) if prefix is not None else None)
        return moves

    def _num_to_store(self, moves: dict[int, _Move]) -> int:
        twins = [move.twin for move in moves.values() if move.twin is not None]
        return len(moves) - len(twins) + sum(map(self._host.is_free, set(twins)))

    def _num_to_load(self, moves: dict[int, _Move]) -> int:
        twins = [move.twin for move in moves.values() if move.twin is not None]
        return self._tiers.num_needed(0, num_loads=len(moves) - len(twins), shared=set(twins))

    def _num_covering(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def _tokens_in(self, holding: _Holding) -> int:
        return len(holding.blocks) * self.block_size - holding.num_empty

    def _held_by(self, seq_id: Hashable) -> _Holding:
        holding = self._holdings.get(seq_id)
        if holding is None:
            if seq_id in self._swapped:
                raise ValueError(f"sequence {seq_id!r} is swapped out: swap it in first")
            raise ValueError(f"unknown sequence {seq_id!r}: reserve or fork it first")
        return holding

    def _swapped_by(self, seq_id: Hashable) -> _Holding:
        holding = self._swapped.get(seq_id)
        if holding is None:
            raise ValueError(f"sequence {seq_id!r} is not swapped out: there is nothing to swap in")
        return holding

    def _require_new(self, seq_id: Hashable) -> None:
        if seq_id in self._holdings or seq_id in self._swapped:
            raise ValueError(f"sequence {seq_id!r} exists already: free it first, or choose another name")

    def _require_settled(self, blocks: Iterable[int], is_moving: Callable[[int], bool]) -> None:
        moving = [block for block in blocks if is_moving(block)]
        if moving:
            raise ValueError(f"blocks {moving} of these sequences change tiers in this plan: let it run first")

    def _require_match(self, match: PrefixMatch, num_tokens: int) -> None:
        if match.num_tokens > num_tokens:
            raise ValueError(f"the match has {match.num_tokens} tokens, more than num_tokens={num_tokens}")
        stale = self._tiers.find_stale(match)
        if stale is not None:
            raise ValueError(f"{stale} of {len(match.hits)} hits does not continue a cached prefix: match again")


def _relocate(holding: _Holding, homes: dict[int, int], tier: BlockTier) -> list[int]:
    """Let a sequence hold its blocks' ``homes`` in another tier. Returns the blocks it held, yet to be released."""
    before, holding.blocks = holding.blocks, [homes[block] for block in holding.blocks]
    tier.share(holding.blocks)
    return before


def _require_free(tier: BlockTier, num_blocks: int) -> None:
    if num_blocks > tier.num_free:
        raise OutOfBlocks(f"{num_blocks} blocks needed, {tier.num_free} free of {len(tier.blocks)}")


def _require_count(num_tokens: int) -> int:
    if num_tokens < 0:
        raise ValueError(f"num_tokens={num_tokens}: give 0 or more")
    return num_tokens
