"""The block manager: unit tests by behaviour, then a state machine against a model with contents."""

import copy
from collections import Counter
from itertools import takewhile

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from jpaged.contract.plan import BlockCopy
from jpaged.host.blocks.manager import BlockManager, OutOfBlocks
from jpaged.host.blocks.prefix_cache import PrefixHit, PrefixMatch
from tests.support.blocks import blocks_of, snapshot


def cached_manager(num_blocks: int = 10, block_size: int = 4) -> BlockManager:
    return BlockManager(num_blocks, block_size, enable_prefix_caching=True)


def run(manager: BlockManager, seq_id, token_ids: list[int], *, salt: bytes = b"", include_partial=False) -> int:
    """Admit, compute and publish a sequence; returns how many blocks it found in the cache."""
    match = manager.match_prefix(token_ids, salt=salt)
    manager.reserve(seq_id, len(token_ids), match=match)
    manager.publish(seq_id, token_ids, len(token_ids), salt=salt, include_partial=include_partial)
    return len(match.hits)


def full_hits(*blocks: int, block_size: int = 4) -> PrefixMatch:
    return PrefixMatch(tuple(PrefixHit(block, block_size) for block in blocks))


# Taking and giving back


@pytest.mark.parametrize(("num_tokens", "num_blocks"), [(0, 0), (1, 1), (4, 1), (5, 2), (8, 2), (9, 3)])
def test_reserve_takes_the_blocks_that_cover_the_tokens(num_tokens, num_blocks):
    manager = BlockManager(10, 4)
    assert manager.to_reserve("new", num_tokens).num_blocks == num_blocks
    manager.reserve("a", num_tokens)
    assert len(manager.block_table("a")) == num_blocks
    assert manager.num_free_blocks == 9 - num_blocks
    assert manager.num_tokens("a") == num_tokens


def test_block_0_is_never_handed_out():
    manager = BlockManager(5, 4)
    manager.reserve("a", 16)
    assert sorted(manager.block_table("a")) == [1, 2, 3, 4]
    with pytest.raises(OutOfBlocks, match="1 blocks needed, 0 free of 4"):
        manager.reserve("b", 1)


def test_append_takes_a_block_only_when_the_last_is_full():
    manager = BlockManager(10, 4)
    manager.reserve("a", 3)
    assert manager.to_append([("a", 1)]).num_blocks == 0
    assert manager.append("a") == []
    assert len(manager.block_table("a")) == 1
    assert manager.to_append([("a", 1)]).num_blocks == 1
    assert manager.append("a") == []
    assert len(manager.block_table("a")) == 2
    assert manager.num_tokens("a") == 5


def test_append_of_several_tokens_fills_the_last_block_first():
    manager = BlockManager(10, 4)
    manager.reserve("a", 3)
    assert manager.to_append([("a", 6)]).num_blocks == 2
    manager.append("a", 6)
    assert manager.num_tokens("a") == 9
    assert len(manager.block_table("a")) == 3


def test_block_table_is_a_live_view():
    manager = BlockManager(10, 4)
    manager.reserve("a", 4)
    table = manager.block_table("a")
    manager.append("a")
    assert len(table) == 2


def test_slots_follow_the_block_table():
    manager = BlockManager(10, 4)
    manager.reserve("x", 4)
    manager.reserve("a", 4)
    manager.append("x")
    manager.append("a", 6)
    first, second, third = manager.block_table("a")
    expected = [first * 4 + 2, first * 4 + 3, *range(second * 4, second * 4 + 4), third * 4]
    assert manager.slots("a", 2, 9).tolist() == expected
    assert manager.slots("a", 4, 5).tolist() == [second * 4]
    assert manager.slots("a", 10, 10).tolist() == []
    assert manager.slots("a", 2, 9).dtype == np.int32


def test_free_gives_every_block_back():
    manager = BlockManager(10, 4)
    manager.reserve("a", 30)
    manager.free("a")
    assert manager.num_free_blocks == 9
    manager.reserve("a", 36)
    manager.check_invariants()


# Sharing and copy-on-write


def test_fork_takes_no_block():
    manager = BlockManager(10, 4)
    manager.reserve("parent", 6)
    manager.fork("parent", "child")
    assert manager.block_table("child") == manager.block_table("parent")
    assert manager.num_free_blocks == 7
    assert manager.stats().num_shared == 2


def test_append_copies_a_shared_partial_block_and_the_last_owner_writes_in_place():
    manager = BlockManager(10, 4)
    manager.reserve("parent", 6)
    manager.fork("parent", "child")
    head, tail = manager.block_table("parent")
    assert manager.to_append([("child", 1)]).num_blocks == 1
    [made] = manager.append("child")
    assert made == BlockCopy(src=tail, dst=manager.block_table("child")[1])
    assert made.dst != tail
    assert manager.to_append([("parent", 1)]).num_blocks == 0
    assert manager.append("parent") == []
    assert manager.block_table("parent") == [head, tail]
    assert manager.block_table("child")[0] == head


def test_append_across_a_shared_partial_block_copies_it_and_takes_more():
    manager = BlockManager(10, 4)
    manager.reserve("parent", 6)
    manager.fork("parent", "child")
    assert manager.to_append([("child", 7)]).num_blocks == 3
    assert len(manager.append("child", 7)) == 1
    assert len(manager.block_table("child")) == 4
    manager.check_invariants()


def test_append_after_a_shared_full_block_copies_nothing():
    manager = BlockManager(10, 4)
    manager.reserve("parent", 8)
    manager.fork("parent", "child")
    assert manager.append("child") == []
    assert manager.block_table("child")[:2] == manager.block_table("parent")


def test_append_of_nothing_to_a_shared_block_copies_nothing():
    manager = BlockManager(10, 4)
    manager.reserve("parent", 6)
    manager.fork("parent", "child")
    before = snapshot(manager)
    assert manager.append("child", 0) == []
    assert snapshot(manager) == before


def test_of_n_sharers_all_but_one_copy():
    manager = BlockManager(10, 4)
    manager.reserve(0, 6)
    for child in range(1, 5):
        manager.fork(0, child)
    assert [len(manager.append(seq_id)) for seq_id in range(5)] == [1, 1, 1, 1, 0]
    manager.check_invariants()


def test_a_group_of_n_sharers_has_room_where_each_but_one_can_copy():
    manager = BlockManager(1 + 2 + 2, 4)
    manager.reserve("a", 6)
    for child in "bc":
        manager.fork("a", child)
    copies = manager.append_all([("a", 1), ("b", 2), ("c", 1)])
    assert manager.num_free_blocks == 0
    assert [copy.src for copy in copies] == [manager.block_table("c")[1]] * 2
    assert {copy.dst for copy in copies} == {manager.block_table("a")[1], manager.block_table("b")[1]}
    assert [manager.num_tokens(seq_id) for seq_id in "abc"] == [7, 8, 7]


def test_shared_blocks_outlive_their_first_holder():
    manager = BlockManager(10, 4)
    manager.reserve("parent", 6)
    manager.fork("parent", "child")
    manager.free("parent")
    assert manager.num_free_blocks == 7
    assert manager.append("child") == []
    manager.free("child")
    assert manager.num_free_blocks == 9


# Blocks that the plan under construction computes


def test_blocks_of_the_same_plan_are_shared_whole_and_known_not_to_be_ready():
    manager = cached_manager()
    run(manager, "before", [1, 2, 3, 4])
    tokens = [1, 2, 3, 4, 5, 6, 7, 8, 9]
    manager.reserve("a", 9, match=manager.match_prefix(tokens))
    manager.publish("a", tokens, 9, is_filling=True)
    match = manager.match_prefix(tokens)
    assert blocks_of(match) == manager.block_table("a")[:2]
    assert manager.tiers.num_hits_ready(match) == 1
    manager.reserve("b", 9, match=match)
    assert manager.block_table("b")[:2] == manager.block_table("a")[:2]
    manager.take_transfers()
    assert manager.tiers.num_hits_ready(match) == 2, "the next plan may read them"
    manager.check_invariants()


def test_a_block_of_the_same_plan_is_not_copied():
    manager = cached_manager()
    manager.reserve("a", 8)
    manager.publish("a", [1, 2, 3, 4, 5, 6, 7, 8], 8, is_filling=True)
    assert blocks_of(manager.match_prefix([1, 2, 3, 4, 5, 6])) == manager.block_table("a")[:1]
    manager.take_transfers()
    match = manager.match_prefix([1, 2, 3, 4, 5, 6])
    assert blocks_of(match) == manager.block_table("a")
    assert len(manager.reserve("b", 7, match=match)) == 1


# Tickets


def test_a_ticket_counts_changes_nothing_and_does_it_when_committed():
    manager = cached_manager()
    run(manager, "a", [1, 2, 3, 4, 5, 6])
    before = snapshot(manager)
    ticket = manager.to_reserve("b", 9, match=manager.match_prefix([1, 2, 3, 4]))
    assert ticket.num_blocks == 2
    assert snapshot(manager) == before
    assert ticket.commit() == []
    assert manager.block_table("b")[0] == manager.block_table("a")[0]
    assert manager.num_tokens("b") == 9


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.reserve("other", 1),
        lambda m: m.append("a"),
        lambda m: m.fork("a", "other"),
        lambda m: m.free("a"),
        lambda m: m.publish("a", [1] * 6, 6, include_partial=True),
        lambda m: m.take_transfers(),
    ],
)
def test_a_ticket_is_valid_until_blocks_change(change):
    manager = cached_manager()
    manager.reserve("a", 6)
    tickets = [manager.to_reserve("new", 4), manager.to_append([("a", 1)])]
    change(manager)
    before = snapshot(manager)
    for ticket in tickets:
        with pytest.raises(ValueError, match="blocks have changed since this ticket was made: ask for a new one"):
            ticket.commit()
    assert snapshot(manager) == before


def test_a_ticket_is_committed_once():
    manager = cached_manager()
    manager.reserve("a", 6)
    ticket = manager.to_append([("a", 1)])
    ticket.commit()
    with pytest.raises(ValueError, match="ask for a new one"):
        ticket.commit()
    assert manager.num_tokens("a") == 7


def test_a_ticket_for_too_many_blocks_changes_nothing():
    manager = cached_manager(3)
    manager.reserve("a", 4)
    before = snapshot(manager)
    for ticket in (manager.to_reserve("b", 5), manager.to_append([("a", 5)])):
        assert ticket.num_blocks == 2
        with pytest.raises(OutOfBlocks, match="2 blocks needed, 1 free of 2"):
            ticket.commit()
        assert snapshot(manager) == before


# Refusals


@pytest.mark.parametrize(
    "call",
    [
        lambda m: m.reserve("new", 13),
        lambda m: m.reserve("new", 20, match=m.match_prefix([1, 2, 3, 4])),
        lambda m: m.append("b", 16),
        lambda m: m.append("child", 11),  # the copy of the shared block and three more
        lambda m: m.append_all([("b", 1), ("child", 11)]),
        lambda m: m.append_all([("b", 1), ("a", 3), ("child", 7)]),  # the copy, and one and two more
    ],
)
def test_out_of_blocks_changes_nothing(call):
    manager = cached_manager(7)
    run(manager, "free", [1, 2, 3, 4])
    run(manager, "a", [9, 8, 7, 6, 5, 4])
    manager.fork("a", "child")
    manager.free("free")
    manager.reserve("b", 1)
    before = snapshot(manager)
    with pytest.raises(OutOfBlocks):
        call(manager)
    assert snapshot(manager) == before


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.reserve("a", 1), "exists already"),
        (lambda m: m.reserve("new", -1), "num_tokens=-1"),
        (lambda m: m.to_reserve("new", -1).num_blocks, "num_tokens=-1"),
        (lambda m: m.reserve("new", 8, match=full_hits(0)), "block=0.*does not continue"),
        (lambda m: m.reserve("new", 8, match=full_hits(999)), "block=999.*does not continue"),
        (lambda m: m.reserve("new", 8, match=full_hits(m.block_table("a")[2])), "does not continue"),
        (lambda m: m.reserve("new", 8, match=full_hits(m.block_table("a")[1])), "does not continue"),
        (lambda m: m.reserve("new", 8, match=full_hits(*[m.block_table("a")[0]] * 2)), "does not continue"),
        (lambda m: m.reserve("new", 7, match=full_hits(*m.block_table("a")[:2])), "more than num_tokens=7"),
        (lambda m: m.append("a", -1), "num_tokens=-1"),
        (lambda m: m.append("nobody"), "unknown sequence 'nobody'"),
        (lambda m: m.append_all([("a", 1), ("b", 1), ("nobody", 1)]), "unknown sequence 'nobody'"),
        (lambda m: m.append_all([("a", 1), ("b", 1), ("a", -1)]), "num_tokens=-1"),
        (lambda m: m.to_append([("a", -1)]).num_blocks, "num_tokens=-1"),
        (lambda m: m.to_append([("nobody", 1)]).num_blocks, "unknown sequence"),
        (lambda m: m.fork("nobody", "new"), "unknown sequence"),
        (lambda m: m.fork("a", "a"), "exists already"),
        (lambda m: m.free("nobody"), "unknown sequence"),
        (lambda m: m.publish("nobody", [], 0), "unknown sequence"),
        (lambda m: m.publish("a", [1] * 20, 11), "room for 10 tokens"),
        (lambda m: m.publish("a", [1] * 9, 10), "9 token_ids"),
        (lambda m: m.publish("a", [1] * 10, -1), "num_computed=-1"),
        (lambda m: m.publish("b", [1] * 8, 8, salt=b"other"), "salt=b'other'"),
        (lambda m: m.block_table("nobody"), "unknown sequence"),
        (lambda m: m.num_tokens("nobody"), "unknown sequence"),
        (lambda m: m.slots("a", 0, 11), "holds \\[0, 10\\)"),
        (lambda m: m.slots("a", 3, 2), "holds"),
        (lambda m: m.slots("a", -1, 2), "holds"),
    ],
)
def test_wrong_calls_are_refused_and_change_nothing(call, message):
    manager = cached_manager()
    run(manager, "a", list(range(10)))
    manager.reserve("b", 8)
    manager.publish("b", [1] * 4, 4)
    before = snapshot(manager)
    with pytest.raises(ValueError, match=message):
        call(manager)
    assert snapshot(manager) == before


def test_a_loading_block_is_not_loaded_again_where_all_free_blocks_are_copied_from():
    manager = BlockManager(9, 4, enable_prefix_caching=True, num_host_blocks=8)
    prompts = [[9] * 6, [8] * 6]
    for seq_id, prompt in enumerate(prompts):
        run(manager, seq_id, prompt, include_partial=True)
    manager.reserve("swapped", 6)
    manager.swap_out(["swapped"])
    manager.take_transfers()
    manager.finish_transfers()
    for seq_id in range(2):
        manager.free(seq_id)
    manager.swap_in(["swapped"])
    manager.fork("swapped", "child")
    for seq_id, prompt in enumerate(prompts):
        longer = [*prompt[:5], 7, 7]
        assert len(manager.reserve(f"longer {seq_id}", 7, match=manager.match_prefix(longer))) == 1
    assert manager.num_free_blocks == 2
    before = snapshot(manager)
    with pytest.raises(OutOfBlocks):
        manager.append("child")
    assert snapshot(manager) == before


@pytest.mark.parametrize(
    ("num_blocks", "block_size", "num_host_blocks"),
    [(1, 16, 0), (0, 16, 0), (4, 0, 0), (4, -1, 0), (2**28, 16, 0), (4, 16, -1)],
)
def test_impossible_sizes_are_refused(num_blocks, block_size, num_host_blocks):
    with pytest.raises(ValueError, match=r"give|int32"):
        BlockManager(num_blocks, block_size, num_host_blocks=num_host_blocks)


# Prefix caching


def test_a_published_prefix_is_shared_by_the_next_sequence():
    manager = cached_manager()
    run(manager, "a", list(range(10)))
    cached = manager.match_prefix([*range(9), 99, 100])
    assert cached == full_hits(*manager.block_table("a")[:2])
    assert manager.to_reserve("new", 11, match=cached).num_blocks == 1
    manager.reserve("b", 11, match=cached)
    assert manager.block_table("b")[:2] == blocks_of(cached)
    assert manager.block_table("b")[2] != manager.block_table("a")[2]


def test_nothing_matches_before_it_is_published_or_when_caching_is_off():
    manager = cached_manager()
    manager.reserve("a", 8)
    assert blocks_of(manager.match_prefix(list(range(8)))) == []
    manager.publish("a", list(range(8)), 7)
    assert len(manager.match_prefix(list(range(8))).hits) == 1
    off = BlockManager(10, 4)
    run(off, "a", list(range(8)))
    assert blocks_of(off.match_prefix(list(range(8)))) == []
    assert off.stats().prefix_queried_tokens == 0


def test_a_freed_prefix_stays_cached_until_its_blocks_are_reused():
    manager = cached_manager(4)
    run(manager, "a", list(range(8)))
    manager.free("a")
    assert manager.num_free_blocks == 3
    cached = manager.match_prefix(list(range(8)))
    assert len(cached.hits) == 2
    assert manager.to_reserve("new", 9, match=cached).num_blocks == 3, (
        "a cached block without a holder leaves the free set"
    )
    manager.reserve("b", 9, match=cached)
    assert manager.num_free_blocks == 0


def test_uncached_blocks_are_reused_first_then_least_recently_freed_tail_first():
    manager = cached_manager(7, block_size=2)
    run(manager, "old", [1, 2, 3, 4])
    run(manager, "new", [5, 6, 7, 8, 9])
    old, new = list(manager.block_table("old")), list(manager.block_table("new"))
    manager.free("old")
    manager.free("new")
    manager.reserve("x", 2)
    manager.append("x", 2)
    assert set(manager.block_table("x")) == {new[2], 6}, "the partial block, and the one never used"
    manager.append("x", 8)
    assert manager.block_table("x")[2:] == [old[1], old[0], new[1], new[0]]
    assert manager.stats().num_cached == 0


def test_a_hit_makes_blocks_most_recent():
    manager = cached_manager(3, block_size=2)
    run(manager, "a", [1, 2])
    run(manager, "b", [3, 4])
    manager.free("a")
    manager.free("b")
    run(manager, "a", [1, 2])
    manager.free("a")
    manager.reserve("x", 2)
    assert blocks_of(manager.match_prefix([3, 4])) == []
    assert len(manager.match_prefix([1, 2]).hits) == 1


def test_of_two_equal_sequences_the_first_keeps_the_entry():
    manager = cached_manager()
    manager.reserve("a", 4)
    manager.reserve("b", 4)
    manager.publish("b", [1, 2, 3, 4], 4)
    manager.publish("a", [1, 2, 3, 4], 4)
    assert blocks_of(manager.match_prefix([1, 2, 3, 4])) == manager.block_table("b")
    manager.free("a")
    manager.check_invariants()
    assert blocks_of(manager.match_prefix([1, 2, 3, 4])) == manager.block_table("b")


def test_salts_never_share():
    manager = cached_manager()
    run(manager, "a", [1, 2, 3, 4], salt=b"alice")
    assert blocks_of(manager.match_prefix([1, 2, 3, 4], salt=b"bob")) == []
    assert blocks_of(manager.match_prefix([1, 2, 3, 4])) == []
    assert run(manager, "b", [1, 2, 3, 4], salt=b"alice") == 1


def test_publish_reads_only_the_tokens_of_new_full_blocks():
    class Watched(list):
        def __getitem__(self, index):
            read.append(index)
            return super().__getitem__(index)

    read: list[slice] = []
    manager = cached_manager()
    tokens = Watched(range(20))
    manager.reserve("a", 20)
    for num_computed in (5, 7, 12, 15, 15):
        manager.publish("a", tokens, num_computed)
    manager.fork("a", "fork")
    manager.reserve("hit", 20, match=manager.match_prefix(list(range(8))))
    for seq_id in ("a", "fork", "hit"):
        manager.publish(seq_id, tokens, 20)
    assert read == [slice(0, 4), slice(4, 12), slice(12, 20), slice(12, 20), slice(8, 20)]
    assert len(manager.match_prefix(list(range(20))).hits) == 5


def test_forks_and_hits_publish_from_where_their_prefix_ends():
    manager = cached_manager()
    run(manager, "a", list(range(8)))
    manager.fork("a", "fork")
    manager.append("fork", 4)
    manager.publish("fork", [*range(8), 9, 9, 9, 9], 12)
    assert blocks_of(manager.match_prefix([*range(8), 9, 9, 9, 9])) == manager.block_table("fork")
    manager.reserve("hit", 12, match=manager.match_prefix(list(range(8))))
    manager.publish("hit", [*range(8), 7, 7, 7, 7], 12)
    assert blocks_of(manager.match_prefix([*range(8), 7, 7, 7, 7])) == manager.block_table("hit")


def test_blocks_matched_before_they_were_reused_are_refused():
    manager = cached_manager(3)
    run(manager, "a", list(range(8)))
    manager.free("a")
    stale = manager.match_prefix(list(range(8)))
    manager.reserve("b", 8)
    manager.free("b")
    with pytest.raises(ValueError, match="does not continue a cached prefix"):
        manager.reserve("c", 8, match=stale)


def test_only_admissions_count_towards_the_hit_rate():
    manager = cached_manager(7)
    run(manager, "a", list(range(10)))
    for _ in range(5):
        cached = manager.match_prefix(list(range(10)))
        with pytest.raises(OutOfBlocks):
            manager.reserve("b", 30, match=cached)
    manager.reserve("b", 10, match=cached)
    assert manager.stats().prefix_queried_tokens == 20
    assert manager.stats().prefix_hit_tokens == 8


def test_stats_count_each_physical_block_once():
    manager = cached_manager()
    run(manager, "a", list(range(6)))
    manager.fork("a", "b")
    manager.append("b", 3)
    stats = manager.stats()
    assert (stats.num_blocks, stats.num_used, stats.num_shared, stats.num_cached) == (9, 4, 1, 1)
    assert stats.tokens_held == 6 + 5
    assert stats.waste == 5 / 16
    assert BlockManager(10, 4).stats().waste == 0


def test_a_duplicate_takes_the_place_of_an_entry_that_was_reused():
    manager = cached_manager(7, block_size=2)
    for seq_id in ("first", "duplicate"):
        manager.reserve(seq_id, 4)
    for seq_id in ("first", "duplicate"):
        manager.publish(seq_id, [1, 2, 3, 4], 4)
    manager.free("first")
    manager.reserve("x", 8)
    assert manager.match_prefix([1, 2, 3, 4]).num_tokens == 0
    manager.publish("duplicate", [1, 2, 3, 4], 4, include_partial=True)
    assert blocks_of(manager.match_prefix([1, 2, 3, 4])) == manager.block_table("duplicate")
    manager.check_invariants()


def test_forget_all_forgets_what_is_cached_and_refuses_while_blocks_are_held():
    manager = cached_manager()
    run(manager, "a", list(range(10)), include_partial=True)
    before = snapshot(manager)
    with pytest.raises(ValueError, match="1 sequences hold blocks"):
        manager.forget_all()
    assert snapshot(manager) == before
    manager.free("a")
    manager.forget_all()
    assert manager.match_prefix(list(range(10))).hits == ()
    assert manager.stats().num_cached == 0
    manager.reserve("b", 36)
    manager.check_invariants()


# Hits inside a block


def test_a_hit_ends_inside_a_full_block_and_is_copied():
    manager = cached_manager()
    run(manager, "a", list(range(8)))
    match = manager.match_prefix([0, 1, 2, 3, 4, 5, 99, 98])
    assert match == PrefixMatch((*full_hits(1).hits, PrefixHit(2, 2)))
    assert manager.to_reserve("new", 8, match=match).num_blocks == 1
    assert manager.reserve("b", 8, match=match) == [BlockCopy(2, manager.block_table("b")[1])]
    assert manager.block_table("b")[0] == 1
    assert manager.block_table("b")[1] != 2
    assert manager.stats().num_copies == 1
    assert manager.stats().prefix_hit_tokens == 6
    manager.check_invariants()


def test_a_partial_block_is_found_once_published_and_stays_found_when_it_fills():
    manager = cached_manager()
    manager.reserve("a", 6)
    manager.publish("a", list(range(6)), 6)
    assert manager.match_prefix(list(range(8))).num_tokens == 4
    manager.publish("a", list(range(6)), 6, include_partial=True)
    assert manager.match_prefix(list(range(8))).num_tokens == 6
    assert manager.append("a", 2) == [], "its one owner writes behind the cached tokens"
    manager.publish("a", list(range(8)), 8)
    assert manager.match_prefix(list(range(8))) == full_hits(1, 2)
    assert manager.stats().num_cached == 2


def test_the_longest_of_several_continuations_matches():
    manager = cached_manager()
    for seq_id, tokens in enumerate([[1], [1, 2, 9, 9], [1, 2, 3], [1, 2, 4, 4], [2, 2]]):
        manager.reserve(seq_id, len(tokens))
        manager.publish(seq_id, tokens, len(tokens), include_partial=True)
    for query, block, num_tokens in [([1, 2, 3, 5], 3, 3), ([1, 2, 4, 5], 4, 3), ([2, 2, 2], 5, 2), ([3], None, 0)]:
        match = manager.match_prefix(query)
        assert blocks_of(match) == ([] if block is None else [block])
        assert match.num_tokens == num_tokens
    assert manager.match_prefix([1, 9]).num_tokens == 1


def test_a_block_that_filled_while_another_held_the_entry_is_entered_whole_in_its_place():
    manager = cached_manager(4)  # three usable blocks
    manager.reserve("a", 1)
    manager.fork("a", "b")
    manager.publish("a", [1], 1, include_partial=True)
    manager.free("a")
    manager.reserve("x", 4)
    manager.publish("x", [1, 2, 3, 4], 4)
    manager.append("b", 3)
    manager.publish("b", [1, 2, 3, 4], 4)  # x was first
    manager.free("x")
    manager.reserve("y", 8)  # the block of x is reused
    manager.publish("b", [1, 2, 3, 4], 4, include_partial=True)
    [hit] = manager.match_prefix([1, 2, 3, 4, 5]).hits
    assert (hit.block, hit.num_tokens) == (manager.block_table("b")[0], 4)
    manager.check_invariants()


def test_one_who_ends_inside_a_cached_block_shares_it_and_copies_before_writing():
    """The cache holds 4 tokens of the block, the sequence 2: in place, it would overwrite the third."""
    manager = cached_manager()
    run(manager, "a", list(range(8)))
    manager.free("a")
    manager.reserve("pin", 6, match=manager.match_prefix(list(range(6))))
    assert manager.block_table("pin") == [1, 2]
    assert manager.stats().tokens_held == 6
    manager.fork("pin", "child")
    assert manager.to_append([("pin", 1)]).num_blocks == manager.to_append([("child", 1)]).num_blocks == 1
    for seq_id in ("pin", "child"):
        assert manager.append(seq_id) == [BlockCopy(2, manager.block_table(seq_id)[1])]
    assert manager.append("pin") == [], "its copy is its own"
    assert manager.match_prefix(list(range(8))) == full_hits(1, 2)
    manager.check_invariants()


def test_an_owner_whose_block_a_pin_shares_copies_it():
    manager = cached_manager()
    run(manager, "owner", list(range(6)), include_partial=True)
    manager.reserve("pin", 6, match=manager.match_prefix(list(range(6))))
    assert manager.append("owner") == [BlockCopy(2, manager.block_table("owner")[1])]
    assert manager.block_table("pin") == [1, 2]
    assert manager.match_prefix(list(range(8))).num_tokens == 6
    manager.free("pin")
    manager.check_invariants()


def test_a_partial_hit_of_the_last_free_block_is_used_in_place():
    """The request fits the pool only if its own copy source becomes the copy; it must not wait for ever."""
    manager = cached_manager(3, block_size=2)
    run(manager, "a", [1, 2, 3, 4])
    manager.free("a")
    match = manager.match_prefix([1, 2, 3])
    assert manager.to_reserve("new", 4, match=match).num_blocks == 2
    assert manager.reserve("b", 4, match=match) == []
    assert manager.block_table("b") == [1, 2]
    assert manager.match_prefix([1, 2, 3, 4]).num_tokens == 2
    manager.check_invariants()


def test_a_partial_hit_makes_its_block_most_recent():
    manager = cached_manager(5, block_size=2)
    for seq_id, tokens in [("a", [1, 2]), ("b", [3, 4])]:
        run(manager, seq_id, tokens)
        manager.free(seq_id)
    manager.reserve("copy", 2, match=manager.match_prefix([1, 9]))
    manager.reserve("x", 4)
    assert manager.match_prefix([1, 2]).num_tokens == 2
    assert manager.match_prefix([3, 4]).num_tokens == 0


@pytest.mark.parametrize("num_tokens", [0, -1, 3, 5])
def test_a_hit_of_more_tokens_than_are_cached_is_refused(num_tokens):
    manager = cached_manager()
    run(manager, "a", [1, 2], include_partial=True)
    before = snapshot(manager)
    with pytest.raises(ValueError, match="does not continue a cached prefix"):
        manager.reserve("b", 8, match=PrefixMatch((PrefixHit(1, num_tokens),)))
    assert snapshot(manager) == before


def test_a_partial_hit_that_others_follow_is_refused():
    manager = cached_manager()
    run(manager, "a", list(range(8)))
    with pytest.raises(ValueError, match="does not continue a cached prefix"):
        manager.reserve("b", 8, match=PrefixMatch((PrefixHit(1, 3), PrefixHit(2, 4))))


# The state machine. The model keeps tokens, a simulated memory, the cache as a plain dict and the free blocks in order.

UNWRITTEN = -1
TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=10)
CHUNKS = st.sampled_from([12, 1, 2, 3, 5])
SALTS = st.sampled_from([b"", b"salt"])


class Sequence:
    def __init__(self, tokens: list[int], computed: int, published: int, salt: bytes, table: list[int]) -> None:
        self.tokens, self.computed, self.published, self.salt, self.table = tokens, computed, published, salt, table
        self.is_borrowing = False


class BlockManagerMachine(RuleBasedStateMachine):
    @initialize(
        num_blocks=st.sampled_from([32, 24, 16, 8, 4]),
        block_size=st.sampled_from([4, 3, 2, 1]),
        caching=st.sampled_from([True, True, True, False]),
    )
    def start(self, num_blocks, block_size, caching):
        self.manager = BlockManager(num_blocks, block_size, enable_prefix_caching=caching)
        self.caching, self.block_size = caching, block_size
        self.sequences: dict[int, Sequence] = {}
        self.memory = np.full(num_blocks * block_size, UNWRITTEN)
        self.cache: dict[tuple[bytes, tuple[int, ...]], int] = {}  # salt and all tokens up to a block's last: the block
        self.unused = set(range(1, num_blocks))
        self.cached_free: list[int] = []  # the first is reused first
        self.next_id = self.queried = self.hit = self.num_copies = 0

    # The model's expectations

    def refs(self) -> Counter:
        return Counter(block for seq in self.sequences.values() for block in seq.table)

    def check_match(self, match: PrefixMatch, tokens: list[int], salt: bytes) -> None:
        """Full blocks as the model has them, then, among the blocks that continue them, one that agrees the longest."""
        blocks = []
        while self.caching and (len(blocks) + 1) * self.block_size <= len(tokens):
            key = salt, tuple(tokens[: (len(blocks) + 1) * self.block_size])
            if key not in self.cache:
                break
            blocks.append(self.cache[key])
        start = len(blocks) * self.block_size
        lens = {
            block: self.common_len(tokens, salt, key) - start
            for key, block in self.cache.items()
            if start < len(key[1]) <= start + self.block_size
        }
        longest = max(lens.values(), default=0)
        hits = [(hit.block, hit.num_tokens) for hit in match.hits]
        assert hits[: len(blocks)] == [(block, self.block_size) for block in blocks]
        if longest <= 0:
            assert len(hits) == len(blocks)
        else:
            [(block, num_tokens)] = hits[len(blocks) :]
            assert num_tokens == lens[block] == longest
        for i, (block, num_tokens) in enumerate(hits):
            held = self.memory[block * self.block_size :][:num_tokens]
            assert held.tolist() == tokens[i * self.block_size :][:num_tokens]

    def common_len(self, tokens: list[int], salt: bytes, key: tuple[bytes, tuple[int, ...]]) -> int:
        pairs = zip(tokens, key[1], strict=False) if salt == key[0] else []
        return len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))

    def check_taken(self, blocks: list[int]) -> None:
        """Blocks newly in a table were free, in the order of reuse; whatever they held is gone."""
        for block in blocks:
            if self.unused:
                self.unused.remove(block)
            else:
                assert self.cached_free.pop(0) == block
            self.cache = {key: b for key, b in self.cache.items() if b != block}
            self.memory[block * self.block_size : (block + 1) * self.block_size] = UNWRITTEN

    def check_copied(self, src: int, dst: int, num_tokens: int, copies: list[BlockCopy]) -> None:
        """A block newly in a table holds the first tokens of another. A copy onto itself is none."""
        view = self.memory.reshape(-1, self.block_size)
        content = view[src].copy()
        self.check_taken([dst])
        assert copies == ([BlockCopy(src, dst)] if src != dst else [])
        view[dst, :num_tokens] = content[:num_tokens]
        self.num_copies += len(copies)

    def num_free(self) -> int:
        return len(self.unused) + len(self.cached_free)

    def pick(self, data) -> int:
        return data.draw(st.sampled_from(sorted(self.sequences)))

    # Rules

    @rule(
        data=st.data(),
        tokens=TOKENS,
        salt=SALTS,
        start=st.sampled_from([12, 0, 1, 2, 3, 5]),
        chunk=CHUNKS,
        is_pin=st.sampled_from([False, False, False, True]),
    )
    def reserve(self, data, tokens, salt, start, chunk, is_pin):
        if self.cache and start:  # go on from something cached, so that hits are long
            salt, known = data.draw(st.sampled_from(list(self.cache)))
            tokens = [*known[:start], *tokens]
        match = self.manager.match_prefix(tokens, salt=salt)
        self.check_match(match, tokens, salt)
        hits = match.hits[: data.draw(st.integers(0, len(match.hits)).map(lambda dropped: len(match.hits) - dropped))]
        match = PrefixMatch(hits)
        if is_pin:  # a sequence that is all cached
            tokens = tokens[: match.num_tokens]
        is_partial = bool(hits) and hits[-1].num_tokens < self.block_size
        is_copying = is_partial and len(tokens) > match.num_tokens
        shared = [hit.block for hit in (hits[:-1] if is_copying else hits)]
        refs = self.refs()
        needed = -(-len(tokens) // self.block_size) - len(shared) + sum(refs[block] == 0 for block in shared)
        assert self.manager.to_reserve("new", len(tokens), match=match).num_blocks == needed
        seq_id = self.next_id
        if needed > self.num_free():
            self.refused(OutOfBlocks, lambda: self.manager.reserve(seq_id, len(tokens), match=match))
            return
        copies = self.manager.reserve(seq_id, len(tokens), match=match)
        self.next_id += 1
        table = list(self.manager.block_table(seq_id))
        assert table[: len(shared)] == shared
        self.cached_free = [block for block in self.cached_free if block not in shared]
        if is_copying:
            src = hits[-1].block
            if src in self.cached_free:  # just used
                self.cached_free.remove(src)
                self.cached_free.append(src)
            self.check_copied(src, table[len(shared)], hits[-1].num_tokens, copies)
        else:
            assert copies == []
        self.check_taken(table[len(hits) :])
        seq = Sequence(tokens, match.num_tokens, len(hits) - is_partial, salt, table)
        seq.is_borrowing = is_partial and not is_copying
        self.sequences[seq_id] = seq
        if self.caching:
            self.queried += len(tokens)
            self.hit += match.num_tokens
        self.compute(seq_id, seq, chunk)
        self.publish(seq_id, seq)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), tokens=st.lists(st.integers(0, 1), max_size=6))
    def append(self, data, tokens):
        self.append_to(self.pick(data), tokens)

    def append_to(self, seq_id: int, tokens: list[int]) -> None:
        seq = self.sequences[seq_id]
        num_last = len(seq.tokens) % self.block_size
        is_copied = bool(tokens and num_last and (self.refs()[seq.table[-1]] > 1 or seq.is_borrowing))
        num_new = -(-(len(seq.tokens) + len(tokens)) // self.block_size) - len(seq.table)
        assert self.manager.to_append([(seq_id, len(tokens))]).num_blocks == num_new + is_copied
        if num_new + is_copied > self.num_free():
            self.refused(OutOfBlocks, lambda: self.manager.append(seq_id, len(tokens)))
            return
        copies = self.manager.append(seq_id, len(tokens))
        table = list(self.manager.block_table(seq_id))
        if is_copied:
            src, dst = seq.table[-1], table[len(seq.table) - 1]
            self.check_copied(src, dst, num_last, copies)
            if self.refs()[src] == 1:
                assert src in self.cache.values(), "it was borrowed from the cache"
                self.cached_free.append(src)
            seq.is_borrowing = False
        else:
            assert copies == []
        self.check_taken(table[len(seq.table) :])
        seq.table = table
        seq.tokens = seq.tokens + tokens

    @precondition(lambda self: self.sequences)
    @rule(num_tokens=CHUNKS, include_partial=st.sampled_from([False, False, True]))
    def step(self, num_tokens, include_partial):
        """The device writes up to ``num_tokens`` of each sequence; then what is computed is published."""
        for seq_id, seq in self.sequences.items():
            self.compute(seq_id, seq, num_tokens)
        for seq_id, seq in self.sequences.items():
            self.publish(seq_id, seq, include_partial)

    def compute(self, seq_id: int, seq: Sequence, num_tokens: int) -> None:
        """Write some of a sequence's tokens: only into slots that are its own and not cached."""
        stop = min(len(seq.tokens), seq.computed + num_tokens)
        slots = self.manager.slots(seq_id, seq.computed, stop)
        for block in set((slots // self.block_size).tolist()):
            for other in self.sequences.values():
                assert other is seq or other.is_borrowing or block not in other.table
        assert (self.memory[slots] == UNWRITTEN).all(), "no content is overwritten, cached or not"
        self.memory[slots] = seq.tokens[seq.computed : stop]
        seq.computed = stop

    def publish(self, seq_id: int, seq: Sequence, include_partial: bool = False) -> None:
        self.manager.publish(seq_id, seq.tokens, seq.computed, salt=seq.salt, include_partial=include_partial)
        if self.caching:
            full = seq.computed // self.block_size
            for i in range(0 if include_partial else seq.published, full):
                self.enter((seq.salt, tuple(seq.tokens[: (i + 1) * self.block_size])), seq.table[i])
            if include_partial and seq.computed % self.block_size:
                self.enter((seq.salt, tuple(seq.tokens[: seq.computed])), seq.table[full])
            seq.published = max(seq.published, full)
        self.check_match(self.manager.match_prefix(seq.tokens, salt=seq.salt), seq.tokens, seq.salt)

    def enter(self, key: tuple[bytes, tuple[int, ...]], block: int) -> None:
        """The first block of equal content keeps its entry; one that holds more tokens than before changes it."""
        salt, tokens = key
        end = -(-len(tokens) // self.block_size) * self.block_size
        if not any(salt == s and t[: len(tokens)] == tokens and len(t) <= end for s, t in self.cache):
            self.cache = {known: b for known, b in self.cache.items() if b != block}
            self.cache[key] = block

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), branches=st.lists(st.lists(st.integers(0, 1), max_size=3), min_size=1, max_size=3))
    def fork(self, data, branches):
        """Beams leave a sequence whose tokens are all computed, and go on with tokens of their own."""
        parent_id = self.pick(data)
        parent = self.sequences[parent_id]
        self.compute(parent_id, parent, len(parent.tokens))
        others = self.sequences.keys() - {parent_id}
        for tokens in branches:
            child_id = data.draw(st.sampled_from([self.next_id, *sorted(others)]))
            is_new = child_id == self.next_id
            self.next_id += is_new
            self.manager.fork(parent_id, child_id, is_new=is_new)
            ended = self.sequences.get(child_id)
            self.sequences[child_id] = copy.deepcopy(parent)
            self.released([] if ended is None else ended.table)
            self.append_to(child_id, tokens)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), include_partial=st.booleans())
    def free(self, data, include_partial):
        seq_id = self.pick(data)
        if include_partial:
            self.publish(seq_id, self.sequences[seq_id], include_partial)
        self.manager.free(seq_id)
        self.released(self.sequences.pop(seq_id).table)

    def released(self, table: list[int]) -> None:
        """A sequence gave up its blocks."""
        refs = self.refs()
        for block in reversed(table):
            if refs[block] == 0 and block in self.cache.values():
                self.cached_free.append(block)
            elif refs[block] == 0:
                self.unused.add(block)

    @rule(data=st.data())
    def misuse(self, data):
        m, unknown = self.manager, self.next_id

        def hits(*blocks: int) -> PrefixMatch:
            return full_hits(*blocks, block_size=self.block_size)

        calls = [
            lambda: m.append(unknown),
            lambda: m.free(unknown),
            lambda: m.fork(unknown, unknown),
            lambda: m.fork(unknown, unknown, is_new=False),
            lambda: m.publish(unknown, [], 0),
            lambda: m.swap_out([unknown]),
            lambda: m.swap_in([unknown]),
            lambda: m.reserve(unknown, -1),
            lambda: m.reserve(unknown, self.block_size, match=hits(0)),
            lambda: m.reserve(unknown, 0, match=hits(next(iter(self.cache.values()), 0))),
        ]
        calls += [lambda b=b: m.reserve(unknown, 2 * self.block_size, match=hits(b, b)) for b in self.unused]
        if self.sequences:
            seq_id = self.pick(data)
            num_tokens = len(self.sequences[seq_id].tokens)
            calls += [
                lambda: m.reserve(seq_id, 1),
                lambda: m.fork(seq_id, seq_id),
                lambda: m.append(seq_id, -1),
                lambda: m.publish(seq_id, [0] * (num_tokens + 1), num_tokens + 1),
                lambda: m.slots(seq_id, 0, num_tokens + 1),
                lambda: m.forget_all(),
            ]
        self.refused(ValueError, data.draw(st.sampled_from(calls)))

    def refused(self, error, call):
        before = snapshot(self.manager)
        with pytest.raises(error):
            call()
        assert snapshot(self.manager) == before

    # After every rule

    @invariant()
    def every_sequence_reads_its_own_tokens(self):
        for seq_id, seq in self.sequences.items():
            assert self.manager.block_table(seq_id) == seq.table
            assert self.manager.num_tokens(seq_id) == len(seq.tokens)
            slots = self.manager.slots(seq_id, 0, len(seq.tokens))
            assert self.memory[slots[: seq.computed]].tolist() == seq.tokens[: seq.computed]

    @invariant()
    def counts_equal_the_model(self):
        self.manager.check_invariants()
        assert self.manager.num_free_blocks == self.num_free()
        refs = self.refs()
        slots = {s for i, seq in self.sequences.items() for s in self.manager.slots(i, 0, len(seq.tokens)).tolist()}
        stats = self.manager.stats()
        assert (stats.num_used, stats.num_logical, stats.num_cached) == (len(refs), refs.total(), len(self.cache))
        assert stats.num_shared == sum(count > 1 for count in refs.values())
        assert stats.num_copies == self.num_copies
        assert stats.tokens_held == len(slots)
        num_slots = len(refs) * self.block_size
        assert stats.waste == ((num_slots - len(slots)) / num_slots if refs else 0)
        assert (stats.prefix_queried_tokens, stats.prefix_hit_tokens) == (self.queried, self.hit)

    def teardown(self):
        for seq_id in list(getattr(self, "sequences", ())):
            self.manager.free(seq_id)
            self.manager.check_invariants()
            if not self.manager.holdings.on_device:
                assert self.manager.num_free_blocks == self.manager.num_blocks - 1


TestBlockManagerAgainstModel = BlockManagerMachine.TestCase
TestBlockManagerAgainstModel.settings = settings(
    max_examples=200, stateful_step_count=50, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
