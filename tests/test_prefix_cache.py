"""The prefix cache: content finds blocks, and nothing but equal content does."""

import hashlib

import numpy as np
import pytest

from jpaged.host import prefix_cache
from jpaged.host.prefix_cache import Prefix, PrefixCache, split_blocks

BLOCK_SIZE = 2


def insert_all(cache: PrefixCache, token_ids: list[int], blocks: list[int], salt: bytes = b"") -> Prefix:
    prefix = Prefix.empty(salt)
    for block, tokens in zip(blocks, split_blocks(token_ids, cache.block_size), strict=True):
        prefix = cache.insert(prefix.extend(tokens), block)
    return prefix


@pytest.fixture
def cache() -> PrefixCache:
    return PrefixCache(BLOCK_SIZE)


def test_match_returns_the_longest_cached_prefix_in_order(cache):
    insert_all(cache, [1, 2, 3, 4, 5, 6], [7, 3, 5])
    assert cache.match([1, 2, 3, 4, 5, 6, 7, 8]) == [7, 3, 5]
    assert cache.match([1, 2, 3, 4, 9, 9]) == [7, 3]
    assert cache.match([9, 9, 3, 4]) == []


def test_only_full_blocks_match(cache):
    insert_all(cache, [1, 2, 3, 4], [1, 2])
    assert cache.match([]) == []
    assert cache.match([1]) == []
    assert cache.match([1, 2, 3]) == [1]


def test_equal_tokens_after_different_prefixes_are_different(cache):
    insert_all(cache, [1, 2, 5, 6], [1, 2])
    insert_all(cache, [3, 4, 5, 6], [3, 4])
    assert cache.match([1, 2, 5, 6]) == [1, 2]
    assert cache.match([3, 4, 5, 6]) == [3, 4]
    assert cache.match([5, 6]) == []


def test_salts_never_share(cache):
    insert_all(cache, [1, 2], [1], salt=b"alice")
    insert_all(cache, [1, 2], [2], salt=b"bob")
    assert cache.match([1, 2], b"alice") == [1]
    assert cache.match([1, 2], b"bob") == [2]
    assert cache.match([1, 2]) == []


def test_the_first_block_of_equal_content_keeps_the_entry(cache):
    first = insert_all(cache, [1, 2, 3, 4], [1, 2])
    assert insert_all(cache, [1, 2, 3, 4], [3, 4]) is first
    assert cache.match([1, 2, 3, 4]) == [1, 2]
    assert 3 not in cache
    assert len(cache) == 2


def test_an_evicted_block_is_not_found_and_others_are(cache):
    insert_all(cache, [1, 2, 3, 4], [1, 2])
    cache.evict(2)
    assert cache.match([1, 2, 3, 4]) == [1]
    cache.evict(2)
    cache.evict(99)
    cache.check_invariants()
    assert len(cache) == 1


def test_a_tail_is_found_again_when_its_evicted_head_returns_in_another_block(cache):
    insert_all(cache, [1, 2, 3, 4, 5, 6], [1, 2, 3])
    cache.evict(1)
    assert cache.match([1, 2, 3, 4, 5, 6]) == []
    insert_all(cache, [1, 2], [9])
    assert cache.match([1, 2, 3, 4, 5, 6]) == [9, 2, 3]


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
    assert list(split_blocks(given, BLOCK_SIZE)) == list(split_blocks(ids, BLOCK_SIZE))
    assert len(list(split_blocks(given, BLOCK_SIZE))) == 2


def test_colliding_digests_never_share(cache, monkeypatch):
    monkeypatch.setattr(prefix_cache, "_sha256", lambda data: b"same")
    insert_all(cache, [1, 2], [1])
    insert_all(cache, [3, 4, 5, 6], [2, 3])
    insert_all(cache, [1, 2], [4], salt=b"other")
    assert cache.match([1, 2]) == [1]
    assert cache.match([3, 4, 5, 6]) == []
    assert cache.match([1, 2], b"other") == []
    assert cache.match([5, 6]) == []
    cache.check_invariants()


def test_a_colliding_parent_never_lends_its_children(cache, monkeypatch):
    """[1, 2] and [3, 4] collide: what follows the one must not be found after the other."""
    real = prefix_cache._sha256
    twins = [next(split_blocks(ids, BLOCK_SIZE)) for ids in ([1, 2], [3, 4])]
    monkeypatch.setattr(prefix_cache, "_sha256", lambda data: b"twin" if data[32:] in twins else real(data))
    insert_all(cache, [1, 2], [1])
    insert_all(cache, [3, 4, 5, 6], [2, 3])
    assert Prefix.empty().extend(twins[0]).digest == Prefix.empty().extend(twins[1]).digest
    assert cache.match([1, 2, 5, 6]) == [1]


def test_chains_as_long_as_a_million_token_context_need_no_recursion():
    num_blocks = 65_536
    token_ids = list(range(num_blocks * BLOCK_SIZE))
    cache = PrefixCache(BLOCK_SIZE)
    last = insert_all(cache, token_ids, list(range(num_blocks)))
    assert last.is_same(insert_all(PrefixCache(BLOCK_SIZE), token_ids, list(range(num_blocks))))
    assert "parent" not in repr(last)
    del cache, last
