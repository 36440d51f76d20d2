"""The prefix cache: content finds blocks, and nothing but equal content does."""

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jpaged.host.blocks import prefix_cache
from jpaged.host.blocks.prefix_cache import Prefix, PrefixCache, split_blocks

BLOCK_SIZE = 2


def insert_all(cache: PrefixCache, token_ids: list[int], blocks: list[int], salt: bytes = b"") -> Prefix:
    prefix = Prefix.empty(salt)
    for block, tokens in zip(blocks, split_blocks(token_ids, cache.block_size), strict=True):
        prefix = cache.insert(prefix.extend(tokens), block)
    return prefix


def match(cache: PrefixCache, token_ids: list[int], salt: bytes = b"") -> list[int]:
    """The blocks of the longest cached prefix of full blocks."""
    prefix, blocks = Prefix.empty(salt), []
    for tokens in split_blocks(token_ids, cache.block_size):
        block = cache.find(prefix.extend(tokens))
        if block is None:
            break
        blocks.append(block)
        prefix = cache.prefix_of(block)
        assert prefix is not None
    return blocks


def as_bytes(token_ids: list[int]) -> bytes:
    return np.array(token_ids, "<i8").tobytes()


@pytest.fixture
def cache() -> PrefixCache:
    return PrefixCache(BLOCK_SIZE)


def test_match_returns_the_longest_cached_prefix_in_order(cache):
    insert_all(cache, [1, 2, 3, 4, 5, 6], [7, 3, 5])
    assert match(cache, [1, 2, 3, 4, 5, 6, 7, 8]) == [7, 3, 5]
    assert match(cache, [1, 2, 3, 4, 9, 9]) == [7, 3]
    assert match(cache, [9, 9, 3, 4]) == []


def test_full_blocks_are_found_only_by_full_blocks(cache):
    insert_all(cache, [1, 2, 3, 4], [1, 2])
    assert match(cache, []) == []
    assert match(cache, [1]) == []
    assert match(cache, [1, 2, 3]) == [1]


def test_equal_tokens_after_different_prefixes_are_different(cache):
    insert_all(cache, [1, 2, 5, 6], [1, 2])
    insert_all(cache, [3, 4, 5, 6], [3, 4])
    assert match(cache, [1, 2, 5, 6]) == [1, 2]
    assert match(cache, [3, 4, 5, 6]) == [3, 4]
    assert match(cache, [5, 6]) == []


def test_salts_never_share(cache):
    insert_all(cache, [1, 2], [1], salt=b"alice")
    insert_all(cache, [1, 2], [2], salt=b"bob")
    assert match(cache, [1, 2], b"alice") == [1]
    assert match(cache, [1, 2], b"bob") == [2]
    assert match(cache, [1, 2]) == []


def test_the_first_block_of_equal_content_keeps_the_entry(cache):
    first = insert_all(cache, [1, 2, 3, 4], [1, 2])
    assert insert_all(cache, [1, 2, 3, 4], [3, 4]) is first
    assert match(cache, [1, 2, 3, 4]) == [1, 2]
    assert 3 not in cache
    assert len(cache) == 2


def test_an_evicted_block_is_not_found_and_others_are(cache):
    insert_all(cache, [1, 2, 3, 4], [1, 2])
    evicted = cache.prefix_of(2)
    assert cache.evict(2) is evicted is not None
    assert match(cache, [1, 2, 3, 4]) == [1]
    assert cache.evict(2) is None
    assert cache.evict(99) is None
    cache.check_invariants()
    assert len(cache) == 1


def test_a_tail_is_found_again_when_its_evicted_head_returns_in_another_block(cache):
    insert_all(cache, [1, 2, 3, 4, 5, 6], [1, 2, 3])
    cache.evict(1)
    assert match(cache, [1, 2, 3, 4, 5, 6]) == []
    insert_all(cache, [1, 2], [9])
    assert match(cache, [1, 2, 3, 4, 5, 6]) == [9, 2, 3]


def test_digest_is_sha256_chained_over_salt_and_8_byte_tokens():
    prefix = Prefix.empty(b"salt")
    for tokens in split_blocks([1, 258, 3, 2**40], BLOCK_SIZE):
        prefix = prefix.extend(tokens)
    digest = hashlib.sha256(b"salt").digest()
    for a, b in [(1, 258), (3, 2**40)]:
        digest = hashlib.sha256(digest + a.to_bytes(8, "little") + b.to_bytes(8, "little")).digest()
    assert prefix.digest == digest


@pytest.mark.parametrize("as_ids", [list, tuple, np.int32, np.int64])
def test_any_sequence_of_token_ids_is_split_alike(as_ids):
    ids = [1, 2, 300, 70_000, 5]
    given = as_ids(ids) if as_ids in (list, tuple) else np.array(ids, as_ids)
    assert list(split_blocks(given, BLOCK_SIZE)) == [as_bytes([1, 2]), as_bytes([300, 70_000]), as_bytes([5])]
    assert list(split_blocks(given[:0], BLOCK_SIZE)) == []


def test_colliding_digests_never_share(cache, monkeypatch):
    monkeypatch.setattr(prefix_cache, "_sha256", lambda data: b"same")
    insert_all(cache, [1, 2], [1])
    insert_all(cache, [3, 4, 5, 6], [2, 3])
    insert_all(cache, [1, 2], [4], salt=b"other")
    assert match(cache, [1, 2]) == [1]
    assert match(cache, [3, 4, 5, 6]) == []
    assert match(cache, [1, 2], b"other") == []
    assert match(cache, [5, 6]) == []
    cache.check_invariants()


def test_a_colliding_parent_never_lends_its_children(cache, monkeypatch):
    """[1, 2] and [3, 4] collide: what follows the one must not be found after the other."""
    real = prefix_cache._sha256
    twins = [split_blocks(ids, BLOCK_SIZE)[0] for ids in ([1, 2], [3, 4])]
    monkeypatch.setattr(prefix_cache, "_sha256", lambda data: b"twin" if data[32:] in twins else real(data))
    insert_all(cache, [1, 2], [1])
    insert_all(cache, [3, 4, 5, 6], [2, 3])
    assert Prefix.empty().extend(twins[0]).digest == Prefix.empty().extend(twins[1]).digest
    assert match(cache, [1, 2, 5, 6]) == [1]


def test_a_colliding_parent_lends_no_part_of_its_children(cache, monkeypatch):
    real = prefix_cache._sha256
    twins = [as_bytes(ids) for ids in ([1, 2], [3, 4])]
    monkeypatch.setattr(prefix_cache, "_sha256", lambda data: b"twin" if data[32:] in twins else real(data))
    insert_all(cache, [1, 2], [1])
    insert_all(cache, [3, 4, 5, 6], [2, 3])
    first, second = (Prefix.empty().extend(twin) for twin in twins)
    assert cache.find_longest(first, as_bytes([5, 9])) == (None, 0)
    assert cache.find_longest(second, as_bytes([5, 9])) == (3, 1)


# Inside a block

CONTINUATIONS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=4), max_size=12)


@given(
    known=CONTINUATIONS, query=st.lists(st.integers(0, 2), min_size=1, max_size=4), evicted=st.sets(st.integers(0, 12))
)
def test_the_longest_common_start_is_found_among_all_continuations(known, query, evicted):
    """Token ids of several bytes, whose bytes agree where the tokens do not; the oracle tries them all."""
    cache, ids = PrefixCache(4), [1, 257, 2**56 + 1]
    parent = Prefix.empty().extend(as_bytes([7, 7, 7, 7]))
    for block, tokens in enumerate(known):
        cache.insert(parent.extend(as_bytes([ids[t] for t in tokens])), block)
    cache.insert(Prefix.empty().extend(as_bytes([ids[t] for t in query])), 100)  # after other tokens
    for block in evicted:
        cache.evict(block)
    cache.check_invariants()
    lens = {
        block: next(
            (i for i, (a, b) in enumerate(zip(query, tokens, strict=False)) if a != b), min(map(len, (query, tokens)))
        )
        for block, tokens in enumerate(known)
        if block in cache
    }
    block, num_tokens = cache.find_longest(parent, as_bytes([ids[t] for t in query]))
    assert num_tokens == max(lens.values(), default=0)
    assert block is None if num_tokens == 0 else lens[block] == num_tokens


def test_a_prefix_is_covered_by_a_block_that_holds_its_tokens_and_more():
    cache = PrefixCache(4)
    prefixes = {n: Prefix.empty().extend(as_bytes([1, 2, 3, 4][:n])) for n in (1, 2, 3, 4)}
    assert cache.insert(prefixes[2], 5) is prefixes[2]
    assert [cache.find_cover(prefixes[n]) for n in (1, 2, 3, 4)] == [5, 5, None, None]
    cache.insert(prefixes[1], 6)
    assert 6 not in cache, "the first block that holds these tokens keeps the entry"
    cache.insert(prefixes[4], 7)
    assert [cache.find_cover(prefixes[n]) is not None for n in (1, 2, 3, 4)] == [True] * 4
    assert cache.find_cover(Prefix.empty(b"salt").extend(as_bytes([1]))) is None
    cache.check_invariants()


def test_a_block_that_fills_is_found_by_all_it_holds_now():
    cache = PrefixCache(4)
    prefixes = {n: Prefix.empty().extend(as_bytes([1, 2, 3, 4][:n])) for n in (1, 3, 4)}
    for n in (1, 3, 4, 3):
        cache.insert(prefixes[n], 5)
        cache.check_invariants()
    assert len(cache) == 1
    assert cache.prefix_of(5) is prefixes[4]
    assert cache.evict(5) is prefixes[4]
    assert cache.find_longest(Prefix.empty(), as_bytes([1])) == (None, 0)
    cache.check_invariants()


def test_a_block_whose_content_others_hold_in_full_keeps_its_partial_entry():
    cache = PrefixCache(2)
    one, two = (Prefix.empty().extend(as_bytes(ids)) for ids in ([1], [1, 2]))
    cache.insert(one, 5)
    cache.insert(two, 6)
    assert cache.insert(Prefix.empty().extend(as_bytes([1, 2])), 5) is two
    cache.evict(6)
    assert cache.find_longest(Prefix.empty(), as_bytes([1, 2])) == (5, 1)


def test_other_tokens_in_a_cached_block_are_an_error(cache):
    insert_all(cache, [1, 2], [5])
    with pytest.raises(AssertionError, match="never overwritten"):
        cache.insert(Prefix.empty().extend(as_bytes([3, 4])), 5)


def test_a_cut_prefix_is_the_prefix_of_the_tokens_left(cache):
    prefix = insert_all(cache, [1, 2, 3, 4], [1, 2])
    assert prefix.cut(2) is prefix
    cut = prefix.cut(1)
    assert cut.is_same(Prefix.empty().extend(as_bytes([1, 2])).extend(as_bytes([3])))
    assert cut.num_last_tokens == 1
    assert [link.tokens for link in cut.chain()] == [as_bytes([1, 2]), as_bytes([3])]


def test_chains_as_long_as_a_million_token_context_need_no_recursion():
    num_blocks = 65_536
    token_ids = list(range(num_blocks * BLOCK_SIZE))
    cache = PrefixCache(BLOCK_SIZE)
    last = insert_all(cache, token_ids, list(range(num_blocks)))
    assert last.is_same(insert_all(PrefixCache(BLOCK_SIZE), token_ids, list(range(num_blocks))))
    assert "parent" not in repr(last)
    del cache, last
