"""Two tiers of blocks: unit tests by behaviour, then a state machine that carries out every plan on simulated pools."""

import random
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from jpaged.contract.plan import BlockCopy
from jpaged.host.blocks.manager import BlockManager, OutOfBlocks
from jpaged.host.blocks.prefix_cache import Prefix, PrefixHit, PrefixMatch
from jpaged.host.blocks.tier import BlockTier, Transfers
from jpaged.host.policies.eviction import MAX_SPILLS_PER_STEP
from tests.support.blocks import blocks_of, snapshot

NO_TRANSFERS = Transfers((), ())


def two_tiers(num_blocks: int = 10, num_host_blocks: int = 10, *, block_size: int = 4) -> BlockManager:
    return BlockManager(num_blocks, block_size, enable_prefix_caching=True, num_host_blocks=num_host_blocks)


def run(manager: BlockManager, seq_id, token_ids: list[int], *, include_partial: bool = False) -> None:
    """Admit, compute and publish a sequence."""
    manager.reserve(seq_id, len(token_ids), match=manager.match_prefix(token_ids))
    finish(manager)
    manager.publish(seq_id, token_ids, len(token_ids), include_partial=include_partial)


def finish(manager: BlockManager) -> Transfers:
    """End the plan under construction, and its step."""
    transfers = manager.take_transfers()
    manager.finish_transfers()
    manager.check_invariants()
    return transfers


def spill(manager: BlockManager) -> None:
    """Overwrite all device blocks that are free."""
    manager.reserve("spill", manager.num_free_blocks * manager.block_size)
    manager.free("spill")
    finish(manager)


# One tier


def test_a_tier_reuses_uncached_blocks_first_then_cached_ones_least_recently_used():
    tier = BlockTier(range(3, 7), block_size=1)
    assert [tier.take() for _ in range(4)] == [(3, None), (4, None), (5, None), (6, None)]
    prefixes = {block: Prefix.empty().extend(bytes([block] * 8)) for block in (3, 4, 6)}
    for block, prefix in prefixes.items():
        tier.cache.insert(prefix, block)
    assert tier.release([3, 4]) == [4, 3], "a sequence's tail first"
    tier.release([5])
    tier.release([6])
    tier.touch(4)
    assert [tier.take(avoid={5}), tier.take()] == [(3, prefixes[3]), (5, None)]
    assert [tier.take(), tier.take()] == [(6, prefixes[6]), (4, prefixes[4])]
    assert len(tier.free) == 0


def test_a_shared_block_is_freed_by_its_last_holder():
    tier = BlockTier(range(2), block_size=1)
    block, _ = tier.take()
    tier.hold(block)
    tier.share([block])
    assert [tier.release([block]) for _ in range(3)] == [[], [], [block]]


# Swapping


def test_a_group_comes_back_with_its_sharing():
    manager = two_tiers()
    manager.reserve("a", 6)
    manager.fork("a", "b")
    manager.append("b", 3)
    finish(manager)
    (head, a_tail), b_table = manager.block_table("a"), list(manager.block_table("b"))
    assert manager.to_swap_out(["a", "b"]).num_blocks == 4
    manager.swap_out(["a", "b"])
    assert manager.is_swapped("a")
    assert manager.is_swapped("b")
    assert manager.num_free_blocks == 9
    to_host = manager.take_transfers().to_host
    manager.finish_transfers()
    assert sorted(copy.src for copy in to_host) == sorted({head, a_tail, *b_table})
    assert (manager.num_tokens("a"), manager.num_tokens("b")) == (6, 9)
    assert manager.to_swap_in(["a", "b"]).num_blocks == 4
    manager.swap_in(["a", "b"])
    home = {copy.dst: copy.src for copy in to_host}
    origin = {copy.dst: home[copy.src] for copy in manager.take_transfers().from_host}
    assert [origin[block] for block in manager.block_table("a")] == [head, a_tail]
    assert [origin[block] for block in manager.block_table("b")] == b_table
    manager.finish_transfers()
    stats = manager.stats()
    assert (stats.num_shared, stats.num_logical, stats.num_used) == (1, 5, 4)
    assert (stats.num_blocks_swapped_out, stats.num_blocks_swapped_in, stats.num_host_used) == (4, 4, 0)
    manager.check_invariants()


def test_a_full_host_pool_refuses_a_group_whole():
    manager = two_tiers(num_host_blocks=3)
    manager.reserve("a", 8)
    manager.reserve("b", 8)
    assert manager.to_swap_out(["a", "b"]).num_blocks == 4
    before = snapshot(manager)
    with pytest.raises(OutOfBlocks, match="4 blocks needed, 3 free of 3"):
        manager.swap_out(["a", "b"])
    assert snapshot(manager) == before
    manager.swap_out(["a"])
    with pytest.raises(OutOfBlocks):
        manager.swap_out(["b"])


def test_swap_in_without_room_changes_nothing():
    manager = two_tiers(num_blocks=4)
    manager.reserve("a", 8)
    manager.swap_out(["a"])
    finish(manager)
    manager.reserve("b", 8)
    before = snapshot(manager)
    with pytest.raises(OutOfBlocks, match="2 blocks needed, 1 free of 3"):
        manager.swap_in(["a"])
    assert snapshot(manager) == before


def test_a_swapped_sequence_can_only_be_freed_or_swapped_in():
    manager = two_tiers()
    manager.reserve("a", 4)
    manager.reserve("b", 4)
    manager.swap_out(["a"])
    calls: list[Callable] = [
        lambda: manager.append("a"),
        lambda: manager.to_append([("a", 1)]).num_blocks,
        lambda: manager.fork("a", "c"),
        lambda: manager.publish("a", [1], 1),
        lambda: manager.block_table("a"),
        lambda: manager.slots("a", 0, 1),
        lambda: manager.swap_out(["b", "a"]),
        lambda: manager.to_swap_out(["a"]).num_blocks,
        lambda: manager.swap_in(["a", "b"]),
        lambda: manager.swap_in(["nobody"]),
        lambda: manager.to_swap_in(["b"]).num_blocks,
        lambda: manager.reserve("a", 1),
        lambda: manager.fork("b", "a"),
        lambda: manager.forget_all(),
    ]
    before = snapshot(manager)
    for call in calls:
        with pytest.raises(ValueError, match=r"swapped out|exists already|sequences hold blocks"):
            call()
        assert snapshot(manager) == before
    manager.free("a")
    assert manager.stats().num_host_used == 0
    assert not manager.is_swapped("a")


def test_a_plan_does_not_read_the_host_blocks_it_writes():
    manager = two_tiers()
    run(manager, "a", list(range(8)))
    manager.swap_out(["a"])
    spill_blocks = manager.num_free_blocks
    manager.reserve("b", spill_blocks * 4)
    assert manager.match_prefix(list(range(8))).hits == ()
    manager.free("b")
    before = snapshot(manager)
    with pytest.raises(ValueError, match="does not continue a cached prefix"):
        manager.reserve("c", 8, match=PrefixMatch((PrefixHit(0, 4, is_on_host=True),)))
    with pytest.raises(ValueError, match="change tiers in this plan"):
        manager.swap_in(["a"])
    assert snapshot(manager) == before
    finish(manager)
    assert manager.match_prefix(list(range(8))).is_on_host
    manager.swap_in(["a"])
    before = snapshot(manager)
    with pytest.raises(ValueError, match="change tiers in this plan"):
        manager.swap_out(["a"])
    assert snapshot(manager) == before


def test_published_blocks_move_only_if_the_other_tier_lacks_them():
    manager = two_tiers()
    run(manager, "a", list(range(9)))
    table = list(manager.block_table("a"))
    manager.swap_out(["a"])
    assert len(finish(manager).to_host) == 3
    assert manager.to_swap_in(["a"]).num_blocks == 3
    manager.swap_in(["a"])
    assert manager.block_table("a")[:2] == table[:2], "still cached on the device"
    assert len(finish(manager).from_host) == 1
    assert manager.stats().num_host_cached == 2
    assert manager.to_swap_out(["a"]).num_blocks == 3
    tail = manager.block_table("a")[2]
    manager.swap_out(["a"])
    assert [copy.src for copy in finish(manager).to_host] == [tail]
    assert manager.stats().num_blocks_swapped_out == 4
    assert manager.stats().num_blocks_swapped_in == 1


def test_blocks_of_equal_content_take_one_place_in_the_other_tier():
    manager = two_tiers(num_blocks=7)
    for seq_id in "ab":
        manager.reserve(seq_id, 4)
    for seq_id in "ab":
        manager.publish(seq_id, [1, 2, 3, 4], 4)
    manager.fork("a", "c")
    manager.swap_out(["c"])
    finish(manager)
    manager.free("c")
    assert manager.to_swap_out(["a", "b"]).num_blocks == 1
    manager.swap_out(["a", "b"])
    assert finish(manager) == NO_TRANSFERS
    assert manager.to_swap_in(["a", "b"]).num_blocks == 1
    manager.swap_in(["a", "b"])
    assert manager.block_table("a") == manager.block_table("b")
    manager.check_invariants()


def test_a_shared_block_is_cached_on_the_host_if_one_of_its_holders_published_it():
    manager = two_tiers()
    manager.reserve("a", 4)
    manager.fork("a", "b")
    manager.publish("a", [1, 2, 3, 4], 4)
    manager.swap_out(["b", "a"])
    assert manager.stats().num_host_cached == 1


def test_what_is_swapped_in_can_be_matched_once_it_has_arrived():
    manager = two_tiers(num_blocks=4)
    run(manager, "a", list(range(8)))
    manager.swap_out(["a"])
    finish(manager)
    spill(manager)
    manager.swap_in(["a"])
    assert manager.match_prefix(list(range(8))).is_on_host
    manager.take_transfers()
    manager.finish_transfers()
    match = manager.match_prefix(list(range(8)))
    assert not match.is_on_host
    assert blocks_of(match) == manager.block_table("a")


def test_a_group_swapped_out_after_its_copies_were_planned_saves_what_they_would_copy():
    manager = two_tiers()
    manager.reserve("a", 6)
    manager.fork("a", "b")
    finish(manager)
    [copy] = manager.append("a")
    manager.swap_out(["a", "b"])
    to_host = manager.take_transfers().to_host
    assert sorted(move.src for move in to_host) == [1, copy.src, copy.src]


def test_a_held_host_block_is_never_evicted_and_a_cached_one_is():
    manager = two_tiers(num_blocks=4, num_host_blocks=2)
    run(manager, "a", list(range(8)))
    manager.free("a")
    spill(manager)
    assert manager.stats().num_host_cached == 2
    manager.reserve("b", 5)
    assert manager.to_swap_out(["b"]).num_blocks == 2
    manager.swap_out(["b"])
    finish(manager)
    assert manager.stats().num_host_cached == 0
    run(manager, "c", list(range(8)))
    manager.free("c")
    spill(manager)
    assert manager.match_prefix(list(range(8))).hits == ()
    manager.swap_in(["b"])
    assert len(finish(manager).from_host) == 2


# Spilling


def test_an_evicted_prefix_is_found_on_the_host_and_returns():
    manager = two_tiers(num_blocks=4)
    run(manager, "a", list(range(10)), include_partial=True)
    manager.free("a")
    manager.reserve("b", 12)
    transfers = manager.take_transfers()
    assert sorted(copy.src for copy in transfers.to_host) == [1, 2, 3]
    manager.finish_transfers()
    manager.free("b")
    match = manager.match_prefix(list(range(12)))
    assert [(hit.num_tokens, hit.is_on_host) for hit in match.hits] == [(4, True), (4, True), (2, True)]
    assert manager.to_reserve("new", 12, match=match).num_blocks == 3
    assert manager.reserve("c", 12, match=match) == [], "a block loaded is the sequence's own"
    table = list(manager.block_table("c"))
    assert not any(hit.block in table for hit in manager.match_prefix(list(range(12))).hits if not hit.is_on_host)
    transfers = manager.take_transfers()
    assert transfers.from_host == tuple(map(BlockCopy, blocks_of(match), table))
    manager.finish_transfers()
    assert manager.match_prefix(list(range(10))) == PrefixMatch(tuple(map(PrefixHit, table, [4, 4, 2])))
    stats = manager.stats()
    assert (stats.num_blocks_spilled, stats.host_hit_tokens, stats.prefix_hit_tokens) == (3, 10, 10)
    manager.check_invariants()


def test_a_prefix_may_alternate_between_the_tiers():
    manager = two_tiers(num_blocks=5)
    run(manager, "a", list(range(12)))
    manager.free("a")
    manager.reserve("b", 12)
    finish(manager)
    manager.free("b")
    assert [hit.is_on_host for hit in manager.match_prefix(list(range(12))).hits] == [False, True, True]
    manager.reserve("c", 8, match=PrefixMatch(manager.match_prefix(list(range(8))).hits))
    finish(manager)
    assert [hit.is_on_host for hit in manager.match_prefix(list(range(12))).hits] == [False, False, True]


def test_a_partial_hit_prefers_the_longer_tier_and_the_device_on_ties():
    manager = two_tiers(num_blocks=3)
    run(manager, "a", [1, 2, 3])
    manager.publish("a", [1, 2, 3], 3, include_partial=True)
    manager.free("a")
    spill(manager)
    run(manager, "b", [1, 2, 9], include_partial=True)
    hits = [manager.match_prefix(tokens).hits[0] for tokens in ([1, 2, 3, 4], [1, 2, 5], [1, 2, 9])]
    assert [(hit.num_tokens, hit.is_on_host) for hit in hits] == [(3, True), (2, False), (3, False)]


def test_a_prefix_that_the_host_holds_is_not_spilled_again_but_used_last():
    manager = two_tiers(num_blocks=3, num_host_blocks=2, block_size=2)
    for seq_id, tokens in [("a", [1, 1]), ("b", [2, 2])]:
        run(manager, seq_id, tokens)
        manager.free(seq_id)
        spill(manager)
    manager.reserve("a", 2)  # computes anew what the host holds
    manager.publish("a", [1, 1], 2)
    manager.free("a")
    spill(manager)
    assert manager.stats().num_blocks_spilled == 2
    run(manager, "c", [3, 3])
    manager.free("c")
    spill(manager)
    assert manager.match_prefix([1, 1]).num_tokens == 2
    assert manager.match_prefix([2, 2]).num_tokens == 0
    assert manager.match_prefix([3, 3]).num_tokens == 2


def test_a_full_block_on_the_host_covers_the_partial_one_evicted_later():
    manager = two_tiers(num_blocks=3)
    run(manager, "a", [1, 2, 3, 4])
    manager.free("a")
    spill(manager)
    manager.reserve("b", 2)
    manager.publish("b", [1, 2], 2, include_partial=True)
    manager.free("b")
    spill(manager)
    assert manager.stats().num_blocks_spilled == manager.stats().num_host_cached == 1


def test_a_step_spills_only_so_many_blocks():
    num_blocks = MAX_SPILLS_PER_STEP + 8
    manager = two_tiers(num_blocks=num_blocks + 1, num_host_blocks=2 * num_blocks, block_size=1)
    for batch in range(2):
        tokens = list(range(1000 * batch, 1000 * batch + num_blocks))
        run(manager, batch, tokens)
        manager.free(batch)
        manager.reserve("next", num_blocks)
        assert len(manager.take_transfers().to_host) == MAX_SPILLS_PER_STEP
        manager.finish_transfers()
        manager.free("next")


def test_no_host_blocks_means_no_spills_and_no_swaps():
    manager = two_tiers(num_host_blocks=0)
    run(manager, "a", list(range(8)))
    with pytest.raises(OutOfBlocks):
        manager.swap_out(["a"])
    manager.free("a")
    manager.reserve("b", 36)
    assert finish(manager) == NO_TRANSFERS


# Within one plan


def test_a_host_block_being_read_is_not_overwritten_by_the_same_plan():
    manager = two_tiers(num_blocks=4, num_host_blocks=2, block_size=2)
    run(manager, "a", [1, 1, 1, 1])
    manager.free("a")
    spill(manager)
    match = manager.match_prefix([1, 1, 1, 1])
    run(manager, "b", [2, 2])
    manager.free("b")
    manager.reserve("c", 6, match=match)
    transfers = manager.take_transfers()
    assert transfers.to_host == (), "both host blocks are read"
    assert {copy.src for copy in transfers.from_host} == {0, 1}
    assert manager.stats().num_host_used == 2
    manager.finish_transfers()
    assert manager.stats().num_host_used == 0


def test_a_load_goes_to_no_block_that_the_plan_copies_from():
    manager = two_tiers(num_blocks=4, num_host_blocks=4, block_size=2)
    run(manager, "a", [1, 1])
    manager.free("a")
    spill(manager)
    run(manager, "b", [2, 2])
    manager.free("b")
    match = manager.match_prefix([2, 3])
    [copy] = manager.reserve("c", 2, match=match)
    manager.reserve("d", 2)
    assert manager.num_free_blocks == 1, "only the source of the copy is left"
    on_host = manager.match_prefix([1, 1])
    assert on_host.is_on_host
    assert manager.to_reserve("new", 2, match=on_host).num_blocks == 2
    before = snapshot(manager)
    with pytest.raises(OutOfBlocks):
        manager.reserve("e", 2, match=on_host)
    assert snapshot(manager) == before
    finish(manager)
    assert manager.to_reserve("new", 2, match=on_host).num_blocks == 1
    manager.reserve("e", 2, match=on_host)
    assert manager.block_table("e") == [copy.src]


def evicted_head(manager: BlockManager) -> None:
    """Cache [0, 1] on the host only, and [2, 3], which continues it, on the device, free."""
    manager.reserve("head", 2)
    manager.publish("head", [0, 1], 2)
    manager.reserve("both", 4)
    manager.publish("both", [0, 1, 2, 3], 4)
    manager.free("head")
    spill(manager)
    manager.free("both")


def test_a_load_skips_the_block_that_its_own_sequence_copies():
    manager = two_tiers(num_blocks=5, block_size=2)
    evicted_head(manager)
    run(manager, "later", [8, 8])
    manager.free("later")
    manager.reserve("rest", 4)
    match = manager.match_prefix([0, 1, 2, 9])
    assert [(hit.num_tokens, hit.is_on_host) for hit in match.hits] == [(2, True), (1, False)]
    assert manager.to_reserve("new", 4, match=match).num_blocks == manager.num_free_blocks == 2
    copies = manager.reserve("a", 4, match=match)
    manager.check_invariants()
    source = match.hits[1].block
    assert manager.block_table("a")[1] == source, "the load took the other one, so the copy is the source itself"
    assert copies == []


def test_a_load_waits_while_all_free_blocks_are_being_copied():
    manager = two_tiers(num_blocks=6, block_size=2)
    evicted_head(manager)
    run(manager, "later", [8, 8])
    manager.free("later")
    [copy] = manager.reserve("copy", 2, match=manager.match_prefix([8, 9]))
    manager.reserve("rest", 4)
    match = manager.match_prefix([0, 1, 2, 9])
    assert manager.num_free_blocks == 2, "this sequence's own source, and the source of the copy before"
    assert manager.to_reserve("new", 4, match=match).num_blocks == 3
    before = snapshot(manager)
    with pytest.raises(OutOfBlocks):
        manager.reserve("a", 4, match=match)
    assert snapshot(manager) == before
    finish(manager)
    manager.reserve("a", 4, match=match)
    assert {copy.src, match.hits[1].block} == set(manager.block_table("a"))


def test_a_load_skips_a_source_that_is_next_to_be_reused():
    manager = two_tiers(num_blocks=5, block_size=2)
    run(manager, "a", [1, 1])
    manager.free("a")
    spill(manager)
    run(manager, "b", [2, 2])
    run(manager, "later", [8, 8])
    manager.free("b")
    [copy] = manager.reserve("c", 2, match=manager.match_prefix([2, 3]))
    manager.reserve("rest", 2)
    later = manager.block_table("later")
    manager.free("later")
    manager.reserve("d", 2, match=manager.match_prefix([1, 1]))
    assert manager.block_table("d") == later != [copy.src]


def test_a_source_that_becomes_shared_is_no_loss():
    manager = two_tiers(num_blocks=5, block_size=2)
    run(manager, "a", [1, 1, 2, 2])
    manager.free("a")
    manager.reserve("b", 6)  # reuses what was never used, and the tail
    finish(manager)
    manager.free("b")
    [copy] = manager.reserve("c", 2, match=manager.match_prefix([1, 3]))
    manager.reserve("rest", 2)
    match = manager.match_prefix([1, 1, 2, 2])
    assert match.hits[0] == PrefixHit(copy.src, 2)
    assert match.hits[1].is_on_host
    assert manager.to_reserve("new", 4, match=match).num_blocks == manager.num_free_blocks == 2
    manager.reserve("d", 4, match=match)
    manager.check_invariants()


def test_copy_on_write_of_a_block_under_way_waits_while_all_free_blocks_are_being_copied():
    manager = two_tiers(num_blocks=4, block_size=2)
    manager.reserve("a", 1)
    manager.fork("a", "b")
    manager.swap_out(["a", "b"])
    finish(manager)
    run(manager, "c", [8, 8])
    manager.free("c")
    manager.reserve("copy", 2, match=manager.match_prefix([8, 9]))
    manager.swap_in(["a", "b"])
    assert manager.num_free_blocks == 1
    assert manager.to_append([("a", 1)]).num_blocks == 2
    before = snapshot(manager)
    with pytest.raises(OutOfBlocks):
        manager.append("a")
    assert snapshot(manager) == before
    finish(manager)
    assert len(manager.append("a")) == 1


def test_copy_on_write_of_a_block_under_way_loads_it_twice():
    manager = two_tiers()
    manager.reserve("a", 6)
    manager.fork("a", "b")
    manager.swap_out(["a", "b"])
    finish(manager)
    manager.swap_in(["a", "b"])
    assert manager.to_append([("a", 1)]).num_blocks == 1
    assert manager.append("a") == []
    assert manager.append("b") == []
    from_host = finish(manager).from_host
    tails = {manager.block_table(seq_id)[1] for seq_id in "ab"}
    assert len(tails) == 2
    assert len({copy.src for copy in from_host if copy.dst in tails}) == 1


@pytest.mark.parametrize("is_taken", [False, True])
def test_a_sequence_freed_before_its_blocks_arrive_is_forgotten(is_taken):
    manager = two_tiers(num_blocks=3)
    run(manager, "a", list(range(8)))
    manager.free("a")
    spill(manager)
    manager.reserve("b", 8, match=manager.match_prefix(list(range(8))))
    if is_taken:
        assert len(manager.take_transfers().from_host) == 2
    manager.free("b")
    if not is_taken:
        assert manager.take_transfers().from_host == ()
    manager.reserve("c", 8)
    manager.finish_transfers()
    manager.check_invariants()
    assert all(hit.is_on_host for hit in manager.match_prefix(list(range(8))).hits)
    assert manager.stats().num_host_used == 0


def test_forget_all_drops_transfers_under_way():
    manager = two_tiers(num_blocks=3)
    run(manager, "a", list(range(8)))
    manager.free("a")
    spill(manager)
    manager.reserve("b", 8, match=manager.match_prefix(list(range(8))))
    manager.take_transfers()
    manager.free("b")
    manager.forget_all()
    manager.check_invariants()
    assert manager.match_prefix(list(range(8))).hits == ()
    assert finish(manager) == NO_TRANSFERS
    assert manager.stats().num_host_used == manager.stats().num_host_cached == manager.stats().num_used == 0


# The state machine. The pools hold what a real device's would: every slot, the KV of its token, which depends on all
# tokens up to there. Plans are carried out as StepPlan states; the model knows nothing of how blocks are chosen.

Content = tuple[bytes, tuple[int, ...]] | None  # salt, and the tokens up to and including the slot's


class Sequence:
    def __init__(self, tokens: list[int], computed: int, salt: bytes) -> None:
        self.tokens, self.computed, self.salt = tokens, computed, salt
        self.copies: list[BlockCopy] = []
        self.is_loading = self.is_leaving = False  # on its way from or to the host in the plan under construction

    def content(self, position: int) -> Content:
        return self.salt, tuple(self.tokens[: position + 1])


class Simulation:
    """A manager, its pools, and a scheduler that leaves every decision to ``choose``, which picks one of a sequence."""

    def __init__(self, choose: Callable) -> None:
        self.choose = choose
        self.block_size = choose([4, 3, 2, 1])
        self.manager = two_tiers(choose([14, 10, 6, 3]), choose([12, 5, 2]), block_size=self.block_size)
        self.sequences: dict[int, Sequence] = {}
        self.next_id = 0
        self.prompts: list[tuple[bytes, list[int]]] = []
        self.is_copying = False  # a copy is part of the plan under construction
        self.wipe()

    def wipe(self) -> None:
        self.device: list[list[Content]] = [[None] * self.block_size for _ in range(self.manager.num_blocks)]
        self.host: list[list[Content]] = [[None] * self.block_size for _ in range(self.manager.num_host_blocks)]

    def choose_group(self, ids: list[int]) -> list[int]:
        return list(dict.fromkeys(self.choose(ids) for _ in range(self.choose([1, 2, 3]))))

    def choose_tokens(self, max_len: int) -> list[int]:
        return [self.choose([0, 1]) for _ in range(self.choose(range(1, max_len + 1)))]

    def on_device(self) -> list[int]:
        return [seq_id for seq_id in self.sequences if not self.manager.is_swapped(seq_id)]

    def at_rest(self) -> list[int]:
        return [seq_id for seq_id in self.on_device() if not self.sequences[seq_id].is_loading]

    def in_host(self) -> list[int]:
        return [i for i, seq in self.sequences.items() if self.manager.is_swapped(i) and not seq.is_leaving]

    def attempt(self, num_needed: int, num_free: int, call: Callable):
        """Run a call that must succeed if ``num_needed`` blocks are free, and change nothing otherwise."""
        if num_needed <= num_free:
            return call()
        before = snapshot(self.manager)
        with pytest.raises(OutOfBlocks):
            call()
        assert snapshot(self.manager) == before
        return None

    def act(self) -> None:
        """One more decision of a plan, or its step."""
        choices: list[Callable] = [self.reserve, self.reserve, self.reserve, self.overwrite, self.step, self.step]
        choices += [self.append, self.append] if self.on_device() else []
        choices += [self.swap_out, self.free] if self.at_rest() else []
        choices += [self.swap_in, self.swap_in] if self.in_host() else []
        self.choose(choices)()

    # Planning

    def reserve(self) -> None:
        salt, tokens = self.choose([b"", b"", b"salt"]), self.choose_tokens(6)
        if self.prompts:  # go on from what was asked before, so that hits are long
            salt, known = self.choose(self.prompts[-6:])
            tokens = [*known[: self.choose([12, 5, 3, 0])], *tokens]
        is_pin = self.choose([False, False, False, True])
        match = self.manager.match_prefix(tokens, salt=salt)
        self.check_match(match, tokens, salt)
        if is_pin:
            tokens = tokens[: match.num_tokens]
        needed = self.manager.to_reserve("new", len(tokens), match=match).num_blocks
        num_free, seq_id = self.manager.num_free_blocks, self.next_id
        copies = self.attempt(needed, num_free, lambda: self.manager.reserve(seq_id, len(tokens), match=match))
        if copies is None:
            return
        num_taken = num_free - self.manager.num_free_blocks
        assert num_taken <= needed
        assert num_taken == needed or (match.is_on_host and self.is_copying)
        self.next_id += 1
        seq = self.sequences[seq_id] = Sequence(tokens, match.num_tokens, salt)
        seq.copies, seq.is_loading = copies, match.is_on_host
        self.is_copying |= bool(copies)
        self.prompts.append((salt, tokens))

    def overwrite(self) -> None:
        """Take free blocks for a sequence that is preempted before it computes anything."""
        num_blocks = self.manager.num_free_blocks - self.choose(range(self.manager.num_free_blocks + 1))
        self.manager.reserve("preempted", num_blocks * self.block_size)
        self.manager.free("preempted")

    def append(self) -> None:
        self.append_to(self.choose(self.on_device()), self.choose_tokens(3))

    def append_to(self, seq_id: int, tokens: list[int]) -> None:
        needed = self.manager.to_append([(seq_id, len(tokens))]).num_blocks
        num_free = self.manager.num_free_blocks
        copies = self.attempt(needed, num_free, lambda: self.manager.append(seq_id, len(tokens)))
        if copies is not None:
            self.sequences[seq_id].tokens += tokens
            self.sequences[seq_id].copies += copies
            self.is_copying |= bool(copies)

    def swap_out(self) -> None:
        group = self.choose_group(self.at_rest())
        needed = self.manager.to_swap_out(group).num_blocks
        stats = self.manager.stats()
        num_free = stats.num_host_blocks - stats.num_host_used
        self.attempt(needed, num_free, lambda: self.manager.swap_out(group))
        if needed <= num_free:
            assert self.manager.stats().num_host_used == stats.num_host_used + needed
            for seq_id in group:
                self.sequences[seq_id].is_leaving, self.sequences[seq_id].copies = True, []

    def swap_in(self) -> None:
        group = self.choose_group(self.in_host())
        needed, num_free = self.manager.to_swap_in(group).num_blocks, self.manager.num_free_blocks
        self.attempt(needed, num_free, lambda: self.manager.swap_in(group))
        if needed <= num_free:
            for seq_id in group:
                self.sequences[seq_id].is_loading = True

    def free(self) -> None:
        seq_id = self.choose(list(self.sequences))
        if self.choose([True, False]) and seq_id in self.at_rest() and not self.sequences[seq_id].copies:
            self.publish(seq_id, include_partial=True)
        self.manager.free(seq_id)
        del self.sequences[seq_id]  # and its copies

    # A step

    def step(self) -> None:
        transfers = self.manager.take_transfers()
        if self.choose([False] * 40 + [True]):
            self.lose_the_pools()
            return
        running = self.carry_out(transfers)
        finishes_first = self.choose([True, False])
        if finishes_first:
            self.finish()
        for seq_id in running:
            self.publish(seq_id, include_partial=self.choose([False, False, False, True]))
        self.update()
        if not finishes_first:
            self.finish()

    def finish(self) -> None:
        self.manager.finish_transfers()
        for seq in self.sequences.values():
            seq.is_loading = False

    def carry_out(self, transfers: Transfers) -> list[int]:
        """Do on the pools what the plan says, in the order that StepPlan states. Returns what was computed."""
        running = self.at_rest()
        copies = [copy for seq in self.sequences.values() for copy in seq.copies]
        arriving = {copy.dst for copy in transfers.from_host}
        assert len(arriving) == len(transfers.from_host)
        assert len({copy.dst for copy in transfers.to_host}) == len(transfers.to_host)
        assert not {copy.dst for copy in transfers.to_host} & {copy.src for copy in transfers.from_host}
        assert not arriving & {block for copy in copies for block in (copy.src, copy.dst)}
        assert not arriving & {block for seq_id in running for block in self.manager.block_table(seq_id)}
        stored = [(copy.dst, list(self.device[copy.src])) for copy in transfers.to_host]
        for block, content in stored:
            self.host[block] = content
        arrived = [(copy.dst, list(self.host[copy.src])) for copy in transfers.from_host]
        copied = [(copy.dst, list(self.device[copy.src])) for copy in copies]
        for block, content in copied:
            self.device[block] = content
        for seq in self.sequences.values():
            seq.copies, seq.is_leaving = [], False
        self.is_copying = False
        for seq_id in running:
            self.compute(seq_id, self.choose([9, 1, 3]))
        for block, content in arrived:
            self.device[block] = content
        return running

    def compute(self, seq_id: int, num_tokens: int) -> None:
        seq = self.sequences[seq_id]
        stop = min(len(seq.tokens), seq.computed + num_tokens)
        for position, slot in enumerate(self.manager.slots(seq_id, seq.computed, stop).tolist(), seq.computed):
            self.device[slot // self.block_size][slot % self.block_size] = seq.content(position)
        seq.computed = stop

    def publish(self, seq_id: int, include_partial: bool) -> None:
        seq = self.sequences[seq_id]
        self.manager.publish(seq_id, seq.tokens, seq.computed, salt=seq.salt, include_partial=include_partial)

    def update(self) -> None:
        """Let samples be appended and sequences fork and end, as between a step and the next plan."""
        for seq_id in self.choose_group(list(self.sequences)) if self.sequences else []:
            kind = self.choose(["fork", "append", "free", "none"])
            if kind == "free":
                self.manager.free(seq_id)
                del self.sequences[seq_id]
            elif kind == "append" and seq_id in self.on_device():
                self.append_to(seq_id, [1])
            elif kind == "fork" and seq_id in self.at_rest():
                self.fork(seq_id)

    def fork(self, seq_id: int) -> None:
        """As the scheduler does: once the parent's tokens are all computed."""
        parent = self.sequences[seq_id]
        if parent.computed == len(parent.tokens):
            self.manager.fork(seq_id, self.next_id)
            self.sequences[self.next_id] = Sequence(list(parent.tokens), parent.computed, parent.salt)
            self.next_id += 1

    def lose_the_pools(self) -> None:
        """The step failed: its plan was made, but nothing in the pools can be trusted."""
        for seq_id in list(self.sequences):
            self.manager.free(seq_id)
        self.sequences.clear()
        self.is_copying = False
        self.manager.forget_all()
        self.wipe()

    # Always

    def check_reads(self) -> None:
        """Every sequence reads its own tokens."""
        self.manager.check_invariants()
        for seq_id in self.at_rest():
            seq = self.sequences[seq_id]
            to_copy = {copy.dst: copy.src for copy in seq.copies}
            for position, slot in enumerate(self.manager.slots(seq_id, 0, seq.computed).tolist()):
                block, offset = divmod(slot, self.block_size)
                assert self.device[to_copy.get(block, block)][offset] == seq.content(position)

    def check_cached(self) -> None:
        """Every cached block holds what it is cached for."""
        for salt, tokens, is_on_host, block in self.cached():
            num_last = (len(tokens) - 1) % self.block_size + 1
            for offset in range(num_last):
                expected = salt, tokens[: len(tokens) - num_last + offset + 1]
                assert (self.host if is_on_host else self.device)[block][offset] == expected

    def cached(self) -> list[tuple[bytes, tuple[int, ...], bool, int]]:
        """(salt, all tokens up to the block's last, tier, block) of all that can be matched."""
        tiers = self.manager.tiers
        entries = [(False, block, prefix) for block, prefix in tiers.device.cache._prefixes.items()]
        entries += [(True, b, prefix) for b, prefix in tiers.host.cache._prefixes.items() if not tiers.is_storing(b)]
        return [
            (prefix.salt, tuple(np.frombuffer(b"".join(p.tokens for p in prefix.chain()), "<i8").tolist()), tier, block)
            for tier, block, prefix in entries
        ]

    def check_match(self, match: PrefixMatch, tokens: list[int], salt: bytes) -> None:
        """The hits hold the tokens, and nothing longer is cached: full blocks first, then most of one more."""
        for i, hit in enumerate(match.hits):
            pool = self.host if hit.is_on_host else self.device
            start = i * self.block_size
            expected = [(salt, tuple(tokens[: start + offset + 1])) for offset in range(hit.num_tokens)]
            assert pool[hit.block][: hit.num_tokens] == expected
        known = [(entry, tier) for entry_salt, entry, tier, _ in self.cached() if entry_salt == salt]
        entries = {entry for entry, _ in known}
        start = 0
        while start + self.block_size <= len(tokens) and tuple(tokens[: start + self.block_size]) in entries:
            start += self.block_size
        longest, tiers = 0, []
        for num_tokens in range(1, min(self.block_size, len(tokens) - start) + 1):
            wanted, end = tuple(tokens[: start + num_tokens]), start + self.block_size
            found = [tier for entry, tier in known if entry[: len(wanted)] == wanted and len(entry) <= end]
            if found:
                longest, tiers = num_tokens, found
        if self.manager.tiers._queued.to_host:  # a block that cannot be read yet may hide one that can
            assert match.num_tokens <= start + longest
        else:
            assert match.num_tokens == start + longest
            assert not longest or match.hits[-1].is_on_host == all(tiers), "the device's on ties"

    def check_end(self) -> None:
        """No block is lost."""
        for seq_id in self.sequences:
            self.manager.free(seq_id)
        finish(self.manager)
        assert self.manager.num_free_blocks == self.manager.num_blocks - 1
        assert self.manager.stats().num_host_used == 0


class SimulationMachine(RuleBasedStateMachine):
    """Hypothesis chooses. One rule: it leaves out rules for whole runs, and few decisions are of use without others."""

    @initialize(data=st.data())
    def start(self, data):
        self.simulation = Simulation(lambda options: data.draw(st.sampled_from(options)))

    @rule(data=st.data())
    def act(self, data):
        self.simulation.choose = lambda options: data.draw(st.sampled_from(options))
        self.simulation.act()

    @invariant()
    def holds(self):
        if hasattr(self, "simulation"):
            self.simulation.check_reads()
            self.simulation.check_cached()

    def teardown(self):
        if hasattr(self, "simulation"):
            self.simulation.check_end()


TestTwoTiersAgainstSimulatedPools = SimulationMachine.TestCase
TestTwoTiersAgainstSimulatedPools.settings = settings(
    max_examples=60, stateful_step_count=50, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


@pytest.mark.parametrize("seed", range(40))
def test_long_runs_of_plans_keep_every_token(seed):
    """Hypothesis finds small counterexamples; states that take many steps to build are found by going on for long."""
    simulation = Simulation(random.Random(seed).choice)
    for _ in range(300):
        simulation.act()
        simulation.check_reads()
        simulation.check_cached()
    simulation.check_end()
