"""The block manager: which physical blocks each sequence holds. It decides only; copies and writes are the device's.

The paper's KV cache manager (sections 4.2 to 4.5). Each sequence sees *logical* blocks 0, 1, ... of ``block_size``
tokens; its *block table* maps them to *physical* blocks anywhere in the pool. Blocks are taken on demand, as tokens
arrive, so a sequence wastes less than one block (4.3). Sequences share blocks by reference count, with copy-on-write
of the last one (4.4). Freed blocks keep their content, and stay in the prefix cache, until they are reused.
"""

from collections import Counter, OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int32

from jpaged.host.policies.eviction import enters_at_front, order_release
from jpaged.host.prefix_cache import Prefix, PrefixCache, split_blocks
from jpaged.host.step_plan import BlockCopy


class OutOfBlocks(Exception):
    """Too few free blocks for this call, which changed nothing. The scheduler preempts or waits (section 4.5)."""


@dataclass(frozen=True, slots=True)
class BlockStats:
    """What the pool holds now, and what the prefix cache has saved so far.

    Args:
        num_blocks: blocks that can be handed out (all but block 0).
        num_used: blocks held by at least one sequence.
        num_shared: blocks held by two or more.
        num_cached: blocks in the prefix cache, held or free.
        tokens_held: slots that hold a token, each physical block counted once however many share it.
        waste: fraction of the slots of used blocks that hold no token (the paper's internal fragmentation).
        prefix_queried_tokens: tokens of all sequences reserved so far while prefix caching was on.
        prefix_hit_tokens: those among them whose KV came from the prefix cache.
    """

    num_blocks: int
    num_used: int
    num_shared: int
    num_cached: int
    tokens_held: int
    waste: float
    prefix_queried_tokens: int
    prefix_hit_tokens: int


@dataclass(slots=True)
class _Holding:
    """What one sequence holds. ``prefix`` is the content of its first ``num_published`` blocks."""

    blocks: list[int]
    num_empty: int  # slots of the last block without a token, so 0 <= num_empty < block_size
    prefix: Prefix | None = None
    num_published: int = 0


class BlockManager:
    """Hands out physical blocks 1 to ``num_blocks - 1`` to sequences. One writer: the scheduler.

    Every call that raises has changed nothing. Sequences are named by any hashable ``seq_id``.

    Args:
        num_blocks: blocks in the pool, block 0 (padding, never handed out) included.
        block_size: tokens in a block.
        enable_prefix_caching: remember published blocks by content and let later sequences share them.

    Raises:
        ValueError: a size too small, or more slots than int32 can number.
    """

    def __init__(self, num_blocks: int, block_size: int, *, enable_prefix_caching: bool = False) -> None:
        if num_blocks < 2:
            raise ValueError(f"num_blocks={num_blocks}: give 2 or more (block 0 is kept for padding)")
        if block_size < 1:
            raise ValueError(f"block_size={block_size}: give 1 or more")
        if num_blocks * block_size > 2**31:
            raise ValueError(f"num_blocks={num_blocks} x block_size={block_size} slots: int32 numbers at most 2**31")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self._holdings: dict[Hashable, _Holding] = {}
        self._ref_counts = [0] * num_blocks  # sequences that hold each physical block
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, num_blocks))  # front: reused first
        self._cache = PrefixCache(block_size)

    @property
    def num_free_blocks(self) -> int:
        """Blocks held by no sequence; cached ones among them count, they are reused when nothing else is left."""
        return len(self._free)

    @property
    def num_cached_blocks(self) -> int:
        """Blocks in the prefix cache, held or free."""
        return len(self._cache)

    def match_prefix(self, token_ids: Sequence[int], *, salt: bytes = b"") -> list[int]:
        """Find the physical blocks of the longest cached prefix of full blocks of ``token_ids``; change nothing.

        A model needs at least one token to compute logits from: pass all tokens but the last to be sure of one.

        Args:
            token_ids: what the sequence will hold.
            salt: only blocks published under the same salt match.

        Returns:
            Blocks for ``reserve(cached_blocks=...)``, valid until the next call that takes blocks. Empty when prefix
            caching is off.
        """
        return self._cache.match(token_ids, salt) if self.enable_prefix_caching else []

    def num_fresh_blocks(self, num_tokens: int, cached_blocks: Sequence[int] = ()) -> int:
        """Count the free blocks that ``reserve`` would take, cached ones that no sequence holds included.

        Raises:
            ValueError: as ``reserve``.
        """
        _require_count(num_tokens)
        self._require_cached_prefix(cached_blocks, num_tokens)
        num_unheld = sum(self._ref_counts[block] == 0 for block in cached_blocks)
        return self._num_covering(num_tokens) - len(cached_blocks) + num_unheld

    def reserve(self, seq_id: Hashable, num_tokens: int, *, cached_blocks: Sequence[int] = ()) -> None:
        """Start a sequence that holds ``num_tokens`` tokens, the first of them in ``cached_blocks``.

        Counts one query of the prefix cache (when caching is on), so retried admissions count once.

        Args:
            seq_id: a new name.
            num_tokens: tokens to hold, cached ones included.
            cached_blocks: what ``match_prefix`` just found, or the first few of it; shared, not copied.

        Raises:
            OutOfBlocks: fewer free blocks than ``num_fresh_blocks``.
            ValueError: a ``seq_id`` in use, a negative count, or blocks that are no cached prefix.
        """
        self._require_new(seq_id)
        num_fresh = self.num_fresh_blocks(num_tokens, cached_blocks)
        self._require_free(num_fresh)
        for block in cached_blocks:
            self._hold(block)
        blocks = list(cached_blocks)
        num_blocks = self._num_covering(num_tokens)
        while len(blocks) < num_blocks:
            blocks.append(self._take())
        prefix = self._cache.prefix_of(blocks[len(cached_blocks) - 1]) if cached_blocks else None
        num_empty = num_blocks * self.block_size - num_tokens
        self._holdings[seq_id] = _Holding(blocks, num_empty, prefix, len(cached_blocks))
        if self.enable_prefix_caching:
            self._cache.record_query(num_tokens, len(cached_blocks) * self.block_size)

    def append(self, seq_id: Hashable, num_tokens: int = 1) -> list[BlockCopy]:
        """Make room for ``num_tokens`` more tokens.

        A partial last block that others share is replaced by a copy (copy-on-write, 4.4) and keeps its other holders;
        the last of them writes in place.

        Returns:
            The copy to run before this step's writes, or nothing. If the sequence is freed before the step runs, its
            copy must be dropped: the destination may by then belong to somebody else.

        Raises:
            OutOfBlocks: fewer free blocks than ``num_blocks_to_append``.
            ValueError: an unknown ``seq_id`` or a negative count.
        """
        holding = self._held_by(seq_id)
        if 0 < num_tokens <= holding.num_empty and self._ref_counts[holding.blocks[-1]] == 1:
            holding.num_empty -= num_tokens  # 15 of 16 decodes with blocks of 16: kept free of other work
            return []
        self._require_free(self.num_blocks_to_append(seq_id, num_tokens))
        total = self._tokens_in(holding) + num_tokens
        copies = []
        if num_tokens > 0 and self._is_last_block_shared_partial(holding):
            src, dst = holding.blocks[-1], self._take()
            holding.blocks[-1] = dst
            self._ref_counts[src] -= 1
            copies.append(BlockCopy(src, dst))
        while len(holding.blocks) * self.block_size < total:
            holding.blocks.append(self._take())
        holding.num_empty = len(holding.blocks) * self.block_size - total
        return copies

    def num_blocks_to_append(self, seq_id: Hashable, num_tokens: int = 1) -> int:
        """Count the free blocks that ``append`` would take.

        Raises:
            ValueError: an unknown ``seq_id`` or a negative count.
        """
        holding = self._held_by(seq_id)
        _require_count(num_tokens)
        num_new = self._num_covering(max(num_tokens - holding.num_empty, 0))
        return num_new + (num_tokens > 0 and self._is_last_block_shared_partial(holding))

    def fork(self, parent_id: Hashable, child_id: Hashable) -> None:
        """Start ``child_id`` with everything ``parent_id`` holds, sharing every block, the partial last one too.

        The paper's fork for parallel sampling and beam search (4.4). No data moves until one of them appends.

        Raises:
            ValueError: an unknown parent, or a child name in use.
        """
        parent = self._held_by(parent_id)
        self._require_new(child_id)
        for block in parent.blocks:
            self._ref_counts[block] += 1
        self._holdings[child_id] = _Holding(parent.blocks.copy(), parent.num_empty, parent.prefix, parent.num_published)

    def free(self, seq_id: Hashable) -> None:
        """End a sequence: it finished, was aborted, or is preempted. Blocks nobody else holds become free.

        Raises:
            ValueError: an unknown ``seq_id``.
        """
        holding = self._held_by(seq_id)
        del self._holdings[seq_id]
        for block in order_release(holding.blocks):
            self._ref_counts[block] -= 1
            if self._ref_counts[block] == 0:
                self._free[block] = None
                if enters_at_front(block in self._cache):
                    self._free.move_to_end(block, last=False)

    def publish(self, seq_id: Hashable, token_ids: Sequence[int], num_computed: int, *, salt: bytes = b"") -> None:
        """Enter the sequence's full blocks into the prefix cache, once the step that wrote them has run.

        Costs only what became full since the last call; does nothing when prefix caching is off. Of two sequences
        that publish the same content, the first keeps the entry.

        Args:
            seq_id: the sequence.
            token_ids: the sequence's tokens from the first one on; those already published are not read again.
            num_computed: how many of them have their KV in the pool.
            salt: only a ``match_prefix`` with the same salt finds the blocks.

        Raises:
            ValueError: an unknown ``seq_id``, ``num_computed`` beyond the tokens, or a salt that changed.
        """
        holding = self._held_by(seq_id)
        num_tokens = self._tokens_in(holding)
        if not 0 <= num_computed <= num_tokens or num_computed > len(token_ids):
            raise ValueError(
                f"num_computed={num_computed}: sequence {seq_id!r} has room for {num_tokens} tokens, "
                f"and {len(token_ids)} token_ids were given: expected 0 to the lesser of both"
            )
        start, stop = holding.num_published, num_computed // self.block_size
        if stop <= start or not self.enable_prefix_caching:
            return
        prefix = holding.prefix or Prefix.empty(salt)
        if prefix.salt != salt:
            raise ValueError(f"salt={salt!r}: sequence {seq_id!r} shares or published blocks under {prefix.salt!r}")
        new_tokens = token_ids[start * self.block_size : stop * self.block_size]
        for block, tokens in zip(holding.blocks[start:stop], split_blocks(new_tokens, self.block_size), strict=True):
            prefix = self._cache.insert(prefix.extend(tokens), block)
        holding.prefix, holding.num_published = prefix, stop

    def clear_prefix_cache(self) -> None:
        """Forget all published content: the pool no longer holds it. Only while no sequence holds blocks."""
        assert not self._holdings, "a running sequence may have published its blocks"
        for block in range(1, self.num_blocks):
            self._cache.evict(block)

    def block_table(self, seq_id: Hashable) -> list[int]:
        """The sequence's physical blocks in logical order: a live view that follows later calls. Read only.

        Raises:
            ValueError: an unknown ``seq_id``.
        """
        return self._held_by(seq_id).blocks

    def num_tokens(self, seq_id: Hashable) -> int:
        """Tokens the sequence holds or has room for: those reserved plus those appended.

        Raises:
            ValueError: an unknown ``seq_id``.
        """
        return self._tokens_in(self._held_by(seq_id))

    def slots(self, seq_id: Hashable, start: int, stop: int) -> Int32[np.ndarray, " tokens"]:
        """The slots (physical_block * block_size + offset) of the sequence's token positions [start, stop).

        Raises:
            ValueError: an unknown ``seq_id``, or positions the sequence does not hold.
        """
        holding = self._held_by(seq_id)
        if not 0 <= start <= stop <= self._tokens_in(holding):
            raise ValueError(f"positions [{start}, {stop}): sequence {seq_id!r} holds [0, {self._tokens_in(holding)})")
        first = start // self.block_size
        blocks = np.asarray(holding.blocks[first : self._num_covering(stop)], dtype=np.int32)
        logical, offsets = np.divmod(np.arange(start, stop, dtype=np.int32), np.int32(self.block_size))
        return blocks[logical - first] * np.int32(self.block_size) + offsets

    def stats(self) -> BlockStats:
        """Count what is held now. Takes time in proportion to the pool's blocks: for reports, not for every step."""
        num_used = self.num_blocks - 1 - self.num_free_blocks
        # Only a last block can be partial, and all who share one see the same tokens in it.
        num_empty = sum({h.blocks[-1]: h.num_empty for h in self._holdings.values() if h.blocks}.values())
        num_slots = num_used * self.block_size
        return BlockStats(
            num_blocks=self.num_blocks - 1,
            num_used=num_used,
            num_shared=sum(count > 1 for count in self._ref_counts),
            num_cached=len(self._cache),
            tokens_held=num_slots - num_empty,
            waste=num_empty / num_slots if num_slots else 0.0,
            prefix_queried_tokens=self._cache.queried_tokens,
            prefix_hit_tokens=self._cache.hit_tokens,
        )

    def check_invariants(self) -> None:
        """Assert everything this class promises about its state, at the cost of a walk over all of it. For tests."""
        holdings = self._holdings.values()
        held = Counter(block for h in holdings for block in h.blocks)
        assert self._ref_counts == [held[block] for block in range(self.num_blocks)]
        assert len(self._free) + len(held) == self.num_blocks - 1
        assert self._free.keys() | held.keys() == set(range(1, self.num_blocks)), "block 0 is never handed out"
        assert sorted(self._free, key=self._cache.__contains__) == list(self._free), "cached blocks are reused last"
        partial = {h.blocks[-1]: h.num_empty for h in holdings if h.num_empty}
        for h in holdings:
            assert 0 <= h.num_empty < self.block_size
            assert h.blocks or not h.num_empty
            assert len(set(h.blocks)) == len(h.blocks)
            assert h.num_published * self.block_size <= self._tokens_in(h)
            assert (h.prefix is None) == (h.num_published == 0)
            for block in h.blocks[:-1]:
                assert block not in partial, "all holders of a block see the same tokens in it"
            assert not h.blocks or partial.get(h.blocks[-1], 0) == h.num_empty
        assert not any(block in self._cache for block in partial), "only full blocks are cached"
        self._cache.check_invariants()

    def _take(self) -> int:
        """Take the block at the front of the free queue, whatever it held."""
        block, _ = self._free.popitem(last=False)
        assert self._ref_counts[block] == 0, "a free block has no holder"
        self._cache.evict(block)
        self._ref_counts[block] = 1
        return block

    def _hold(self, block: int) -> None:
        """Add one holder to a block, which leaves the free queue if it was there."""
        self._free.pop(block, None)
        self._ref_counts[block] += 1

    def _num_covering(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def _tokens_in(self, holding: _Holding) -> int:
        return len(holding.blocks) * self.block_size - holding.num_empty

    def _is_last_block_shared_partial(self, holding: _Holding) -> bool:
        return holding.num_empty > 0 and self._ref_counts[holding.blocks[-1]] > 1

    def _held_by(self, seq_id: Hashable) -> _Holding:
        holding = self._holdings.get(seq_id)
        if holding is None:
            raise ValueError(f"unknown sequence {seq_id!r}: reserve or fork it first")
        return holding

    def _require_new(self, seq_id: Hashable) -> None:
        if seq_id in self._holdings:
            raise ValueError(f"sequence {seq_id!r} exists already: free it first, or choose another name")

    def _require_free(self, num_blocks: int) -> None:
        if num_blocks > len(self._free):
            raise OutOfBlocks(f"{num_blocks} blocks needed, {len(self._free)} free of {self.num_blocks - 1}")

    def _require_cached_prefix(self, blocks: Sequence[int], num_tokens: int) -> None:
        """Check that ``blocks`` are the cached blocks of one prefix, from its start, within ``num_tokens``."""
        if len(blocks) * self.block_size > num_tokens:
            raise ValueError(f"{len(blocks)} cached blocks of {self.block_size} hold more than num_tokens={num_tokens}")
        before: Prefix | None = None
        for block in blocks:
            prefix = self._cache.prefix_of(block)
            parent = prefix.parent if prefix else None
            if prefix is None or parent is None or not parent.is_same(before or Prefix.empty(prefix.salt)):
                raise ValueError(f"cached_blocks={list(blocks)}: block {block} does not continue a cached prefix")
            before = prefix


def _require_count(num_tokens: int) -> None:
    if num_tokens < 0:
        raise ValueError(f"num_tokens={num_tokens}: give 0 or more")
