"""Tiers of blocks, below the sequences: holders, the order of reuse, cached content, and queued moves."""

from collections import Counter
from collections.abc import Collection, Iterable, Sequence, Set
from dataclasses import dataclass, field

from jpaged.contract.plan import BlockCopy
from jpaged.host.blocks.free_blocks import FreeBlocks
from jpaged.host.blocks.hashed_tokens import HashedTokens
from jpaged.host.blocks.prefix_cache import Prefix, PrefixCache, PrefixHit, PrefixMatch
from jpaged.host.policies.eviction import MAX_SPILLS_PER_STEP, order_release


class BlockTier:
    """The bookkeeping of one pool of physical blocks.

    A block is held, by as many sequences as its reference count says, or free. A free block keeps its content, and its
    entry in ``cache``, until it is taken.

    Args:
        blocks: the physical blocks that can be handed out.
        block_size: tokens in a block.
    """

    def __init__(self, blocks: range, block_size: int) -> None:
        self.blocks = blocks
        self.ref_counts = [0] * blocks.stop
        self.num_holders = 0  # their sum
        self.num_freed = 0  # blocks that lost their last holder, since the start
        self.cache = PrefixCache(block_size)
        self.free = FreeBlocks(blocks)
        """Blocks without a holder, cached ones included. Written here alone."""

    def take(self, avoid: Collection[int] = ()) -> tuple[int, Prefix | None]:
        """Take, for one holder, the free block that is reused next and is not in ``avoid``; there must be one.

        Returns:
            The block, and the cached prefix that it held until now, as ``PrefixCache.evict`` does.
        """
        block = next(block for block in self.free if block not in avoid) if avoid else next(iter(self.free))
        self.free.discard(block)
        assert self.ref_counts[block] == 0, "a free block has no holder"
        self.ref_counts[block] = 1
        self.num_holders += 1
        return block, self.cache.evict(block)

    def take_next(self, count: int) -> list[int]:
        """Take, for one holder each, the free blocks that are reused next, of which there must be as many.

        The cache keeps the entries of these blocks.
        """
        blocks = self.free.take(count)
        for block in blocks:
            assert self.ref_counts[block] == 0, "a free block has no holder"
            self.ref_counts[block] = 1
        self.num_holders += count
        return blocks

    def hold(self, block: int) -> None:
        """Add one holder to a block, free or not. If it is cached, this was a hit, and another may follow."""
        self.free.discard(block)
        self.cache.unneeded.discard(block)
        self.ref_counts[block] += 1
        self.num_holders += 1

    def share(self, blocks: Sequence[int]) -> None:
        """Add one holder to blocks that are held."""
        ref_counts = self.ref_counts
        for block in blocks:
            ref_counts[block] += 1
        self.num_holders += len(blocks)

    def release(self, blocks: Sequence[int]) -> list[int]:
        """Remove one holder from each block of a sequence. Returns the blocks that are free now."""
        ref_counts = self.ref_counts
        self.num_holders -= len(blocks)
        for block in blocks:
            ref_counts[block] -= 1
        freed = [block for block in order_release(blocks) if ref_counts[block] == 0]
        self.free.add(freed, self.cache.blocks, self.cache.unneeded)
        self.num_freed += len(freed)
        return freed

    def num_freed_by(self, tables: Iterable[Sequence[int]], *, but: Set[int] = frozenset()) -> int:
        """Count the blocks that only these block tables hold, without those in ``but``."""
        if not but and self.num_holders == len(self.blocks) - len(self.free):
            return sum(map(len, tables))  # no block is shared
        holders = Counter(block for table in tables for block in table)
        return sum(self.ref_counts[block] == count for block, count in holders.items() if block not in but)

    def touch(self, block: int) -> None:
        """Count a cached block as needed, and as just used: if it is free, it is reused last."""
        self.cache.unneeded.discard(block)
        self.free.touch(block)

    def forget(self) -> None:
        """Forget all cached content, which is lost. Only while no block is held."""
        assert len(self.free) == len(self.blocks)
        self.cache = PrefixCache(self.cache.block_size)
        self.free = FreeBlocks(self.blocks)

    def check_invariants(self, holders: Counter[int]) -> None:
        """Assert the promises of this class, where ``holders`` counts the holders of each held block."""
        assert self.ref_counts == [holders[block] for block in range(self.blocks.stop)]
        assert self.num_holders == holders.total()
        assert len(self.free) + len(holders) == len(self.blocks)
        assert {*self.free} | holders.keys() == set(self.blocks), "no other block is handed out"
        self.free.check_invariants(self.cache.blocks, self.cache.unneeded)
        self.cache.check_invariants()


@dataclass(frozen=True, slots=True)
class Transfers:
    """The moves of one plan between the tiers: see ``StepPlan.to_host`` and ``StepPlan.from_host``."""

    to_host: tuple[BlockCopy, ...]
    from_host: tuple[BlockCopy, ...]


NO_TRANSFERS = Transfers((), ())


@dataclass(slots=True)
class _Load:
    """A copy of host block ``src`` to the device. The device block caches ``prefix`` then, if there is one.

    A chunk of the plan may compute the content instead (``compute_instead``).
    """

    src: int
    prefix: Prefix | None
    is_computed: bool = False


@dataclass(slots=True)
class _Moves:
    """The moves of one plan. Every load is a holder of its host block until it has run."""

    to_host: dict[int, int] = field(default_factory=dict)  # host block -> the device block written to it
    loads: dict[int, _Load] = field(default_factory=dict)  # device block -> the load that fills it
    copies: dict[int, int] = field(default_factory=dict)  # device block -> the device block copied to it
    filled: set[int] = field(default_factory=set)  # cached device blocks whose content the plan computes
    num_spills: int = 0


class TwoTiers:
    """The device's tier and the host's, and the moves between and inside them. One writer: the BlockManager.

    Moves are queued while a plan is made, and follow the order that ``StepPlan`` states. First the plan stores blocks
    on the host, then it copies, then it computes; loads arrive at any time. Therefore a block can be retaken as soon as
    it is stored or copied. A load reads no host block that the same plan writes. It writes no device block that the
    same plan copies from. A plan neither copies nor stores the content that it computes.

    Args:
        num_blocks: blocks of the device's pool; block 0 and the window are never handed out.
        num_host_blocks: blocks of the host's pool, or 0.
        block_size: tokens in a block.
        num_window_blocks: device blocks from 1 on that streamed blocks pass through.
    """

    def __init__(self, num_blocks: int, num_host_blocks: int, block_size: int, num_window_blocks: int = 0) -> None:
        self.device = BlockTier(range(1 + num_window_blocks, num_blocks), block_size)
        self.host = BlockTier(range(num_host_blocks), block_size)
        self.block_size = block_size
        self.num_changes = 0
        """Calls of the block manager that changed blocks; a ticket is valid until the next one."""
        self.num_copies = 0
        self.num_spilled = 0
        self._queued = _Moves()  # by the plan under construction
        self._arriving: dict[int, _Load] = {}  # the loads of the plan that runs

    # Taking device blocks -----------------------------------------------------------------------------------------

    def num_needed(
        self, num_taken: int, *, num_loads: int = 0, shared: Set[int] = frozenset(), copied: Set[int] = frozenset()
    ) -> int:
        """Count the free device blocks needed to take some, load others, and hold ``shared`` too.

        Loads cannot write a block that is copied from, even a free one: those of this plan, and ``copied``.
        """
        free = self.device.free
        num_unheld = len([block for block in shared if block in free])
        if num_loads == 0:
            return num_taken + num_unheld
        avoided = {*self._queued.copies.values(), *copied} - shared
        num_avoided = len([block for block in avoided if block in free])
        return max(num_taken, num_avoided) + num_loads + num_unheld

    def take(self, avoid: Collection[int] = ()) -> int:
        """Take the device block that is reused next. If a prefix end needs its content, the host may save it."""
        block, evicted = self.device.take(avoid)
        if evicted is not None and self.host.blocks:
            self._spill(block, evicted)
        return block

    def take_all(self, count: int) -> list[int]:
        """Take several blocks as ``take`` does."""
        blocks, evict, can_spill = self.device.take_next(count), self.device.cache.evict, bool(self.host.blocks)
        for block in blocks:
            evicted = evict(block)
            if can_spill and evicted is not None:
                self._spill(block, evicted)
        return blocks

    def copy(self, src: int) -> tuple[int, list[BlockCopy]]:
        """Take a device block for a copy of ``src``.

        Returns:
            The block, and the copy to run: none if it is ``src`` itself, which was free.
        """
        dst = self.take()
        if dst == src:
            return dst, []
        self._queued.copies[dst] = src
        self.num_copies += 1
        return dst, [BlockCopy(src, dst)]

    def load(self, src: int, prefix: Prefix | None, *, copied: Set[int] = frozenset()) -> int:
        """Take a device block for the content of host block ``src``; one holder of ``src`` becomes the load.

        Args:
            src: the host block; not one that this plan stores to.
            prefix: prefix that the device block caches once the load has arrived, if any.
            copied: device blocks about to be copied from.
        """
        dst = self.take(avoid={*self._queued.copies.values(), *copied})
        self._queued.loads[dst] = _Load(src, prefix)
        return dst

    def load_again(self, block: int) -> int:
        """Load the host block that this plan loads into ``block`` once more, since ``block`` cannot be copied yet."""
        src = self._queued.loads[block].src
        self.host.hold(src)
        return self.load(src, None)

    def release(self, blocks: Sequence[int]) -> None:
        """Remove one holder from each device block of a sequence. Loads into those that are free now are dropped."""
        freed = self.device.release(blocks)
        if self._queued.loads or self._arriving:
            self._drop_loads(freed)

    def _drop_loads(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            load = self._queued.loads.pop(block, None)
            if load is not None:
                self.host.release([load.src])
            elif block in self._arriving:
                self._arriving[block].prefix = None  # by its arrival, another sequence may hold the block

    @property
    def has_loads(self) -> bool:
        """Whether the plan under construction loads device blocks."""
        return bool(self._queued.loads)

    def is_loading(self, block: int) -> bool:
        """Whether the plan under construction loads this device block."""
        return block in self._queued.loads

    def is_awaited(self, block: int) -> bool:
        """Whether the plan under construction loads this device block, or computes it for another sequence."""
        return block in self._queued.loads or block in self._queued.filled

    @property
    def num_loads_queued(self) -> int:
        """Loads of the plan under construction."""
        return sum(not load.is_computed for load in self._queued.loads.values())

    def compute_instead(self, blocks: Iterable[int]) -> None:
        """Let the plan under construction compute the content of these blocks, which it was to load."""
        for block in blocks:
            self._queued.loads[block].is_computed = True

    @property
    def num_copies_queued(self) -> int:
        """Copies of the plan under construction."""
        return len(self._queued.copies)

    def fill(self, blocks: Iterable[int]) -> None:
        """Note that the plan under construction computes the content of these cached blocks."""
        self._queued.filled.update(blocks)

    def is_cached(self, digest: bytes, group: int = 0) -> bool:
        """Whether a block of either tier is cached under a digest that ``HashedTokens`` made."""
        return self.device.cache.has(digest, group) or self.host.cache.has(digest, group)

    def has_child(self, prefix: Prefix) -> bool:
        """Whether a block of either tier is cached after ``prefix``, of the same group."""
        return self.device.cache.has_child(prefix) or self.host.cache.has_child(prefix)

    def num_hits_ready(self, match: PrefixMatch) -> int:
        """Count the leading hits that the plan under construction does not compute itself."""
        filled = self._queued.filled
        waiting = (i for i, hit in enumerate(match.hits) if not hit.is_on_host and hit.block in filled)
        return next(waiting, len(match.hits)) if filled else len(match.hits)

    # Taking host blocks -------------------------------------------------------------------------------------------

    def store(self, block: int, prefix: Prefix | None) -> int:
        """Take a host block for the content of device block ``block``: the end of ``prefix``, if that is known."""
        [dst] = self.store_all([(block, prefix)])
        return dst

    def store_all(self, contents: Sequence[tuple[int, Prefix | None]]) -> list[int]:
        """Take host blocks in ascending order, each as ``store`` does: a device reads neighbours in one copy."""
        homes = sorted([self.host.take()[0] for _ in contents])
        for dst, (block, prefix) in zip(homes, contents, strict=True):
            if prefix is not None:
                self.host.cache.insert(prefix, dst)
            # A block that this plan copies to does not hold its content yet when the plan stores it.
            self._queued.to_host[dst] = self._queued.copies.get(block, block)
        return homes

    def is_storing(self, host_block: int) -> bool:
        """Whether the plan under construction stores to this host block."""
        return host_block in self._queued.to_host

    def _spill(self, block: int, prefix: Prefix) -> None:
        """Save the content of a cached device block about to be reused, in a host block that is cached and free."""
        known = self.host.cache.find_cover(prefix)
        if known is not None:
            self.host.touch(known)
        elif self._queued.num_spills < MAX_SPILLS_PER_STEP and self.host.free:
            self.host.release([self.store(block, prefix)])
            self._queued.num_spills += 1
            self.num_spilled += 1

    # The prefix caches --------------------------------------------------------------------------------------------

    def match(self, tokens: HashedTokens, num_tokens: int, least_inside: int) -> PrefixMatch:
        """Find the longest cached start of some tokens: full blocks, then perhaps the first tokens of one more.

        Each block is looked up on the device, then on the host.

        Args:
            tokens: the tokens of a sequence.
            num_tokens: the first of them, to match.
            least_inside: tokens of a hit that ends inside a block, at least.
        """
        hits: list[PrefixHit] = []
        prefix = tokens.root
        for block_tokens, digest in tokens.blocks(0, num_tokens):
            hit = self.find(prefix, block_tokens, digest) or self._find_inside(prefix, block_tokens, least_inside)
            if hit is not None:
                hits.append(hit)
            if hit is None or hit.num_tokens < self.block_size:
                break
            prefix = self.prefix_of(hit)
        return PrefixMatch(tuple(hits))

    def find_stale(self, match: PrefixMatch) -> PrefixHit | None:
        """The first hit that does not, or no longer, continue the cached prefix of the hits before it."""
        before: Prefix | None = None
        for hit in match.hits:
            prefix = (self.host if hit.is_on_host else self.device).cache.prefix_of(hit.block)
            if (
                prefix is None
                or prefix.parent is None
                or not (prefix.parent.parent is None if before is None else prefix.parent.is_same(before))
                or not 0 < hit.num_tokens <= prefix.num_last_tokens
                or (hit.num_tokens < self.block_size and hit is not match.hits[-1])
                or (hit.is_on_host and self.is_storing(hit.block))
            ):
                return hit
            before = prefix
        return None

    def prefix_of(self, hit: PrefixHit) -> Prefix:
        """All tokens cached up to the end of the block that was hit."""
        prefix = self.tier_of(hit).cache.prefix_of(hit.block)
        assert prefix is not None, "a hit is cached"
        return prefix

    def tier_of(self, hit: PrefixHit) -> BlockTier:
        return self.host if hit.is_on_host else self.device

    def find(self, prefix: Prefix, tokens: bytes, digest: bytes, group: int = 0) -> PrefixHit | None:
        """The full block that holds ``tokens`` after ``prefix``; none if they are fewer than a block's."""
        if len(tokens) < self.device.cache.block_bytes:
            return None
        block = self.device.cache.find_child(prefix, tokens, digest, group)
        if block is not None:
            return PrefixHit(block, self.block_size)
        block = self.host.cache.find_child(prefix, tokens, digest, group)
        return None if block is None or self.is_storing(block) else PrefixHit(block, self.block_size, is_on_host=True)

    def _find_inside(self, prefix: Prefix, tokens: bytes, least: int) -> PrefixHit | None:
        """The block after ``prefix`` that starts with most of ``tokens``, ``least`` or more; the device's on ties."""
        on_device, num_on_device = self.device.cache.find_longest(prefix, tokens)
        if on_device in self._queued.filled:  # copies come before the plan computes
            on_device, num_on_device = None, 0
        on_host, num_on_host = self.host.cache.find_longest(prefix, tokens)
        if max(num_on_device, num_on_host) < least:
            return None
        if on_host is not None and num_on_host > num_on_device and not self.is_storing(on_host):
            return PrefixHit(on_host, num_on_host, is_on_host=True)
        return None if on_device is None else PrefixHit(on_device, num_on_device)

    # A plan -------------------------------------------------------------------------------------------------------

    def take_transfers(self) -> Transfers:
        """Take the moves of the plan now complete. ``finish_transfers`` must follow."""
        assert not self._arriving, "the plan before has not ended: call finish_transfers first"
        self.num_changes += 1
        moves, self._queued = self._queued, _Moves()
        if not moves.to_host and not moves.loads:
            return NO_TRANSFERS
        self._arriving = moves.loads
        return Transfers(
            to_host=tuple([BlockCopy(src, dst) for dst, src in moves.to_host.items()]),
            from_host=tuple([BlockCopy(load.src, dst) for dst, load in moves.loads.items() if not load.is_computed]),
        )

    def finish_transfers(self) -> None:
        """Note that the plan has run: loaded blocks can be matched, and their host blocks reused."""
        self.num_changes += 1
        if self._arriving:
            for block, load in self._arriving.items():
                if load.prefix is not None:
                    self.device.cache.insert(load.prefix, block)
            self._drop_arriving()

    def _drop_arriving(self) -> None:
        self.host.release([load.src for load in self._arriving.values()])
        self._arriving = {}

    def forget(self) -> None:
        """Forget the content of both pools, which is lost. Only while no sequence holds a block."""
        self.num_changes += 1
        self._drop_arriving()
        self._queued = _Moves()
        self.device.forget()
        self.host.forget()

    def check_invariants(self, on_device: Counter[int], on_host: Counter[int]) -> None:
        """Assert the promises of this class, where the counters count the sequences that hold each block."""
        loads = [*self._queued.loads.values(), *self._arriving.values()]
        self.device.check_invariants(on_device)
        self.host.check_invariants(on_host + Counter(load.src for load in loads))
        assert not any(self.is_storing(load.src) for load in self._queued.loads.values())
        assert not self._queued.loads.keys() & {*self._queued.copies.values()}
        assert self._queued.loads.keys() <= on_device.keys()
        assert not any(block in self.device.cache for block in self._queued.loads), "matched once it has arrived"
