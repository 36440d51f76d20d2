"""Hashed tokens: the same names as plain tokens get, each made once."""

import random
from unittest import mock

import pytest

from jpaged.host.blocks import hashed_tokens
from jpaged.host.blocks.hashed_tokens import HashedTokens, hash_blocks
from jpaged.host.blocks.manager import BlockManager
from jpaged.host.blocks.prefix_cache import Prefix, split_blocks


def names_of(token_ids: list[int], salt: bytes, block_size: int) -> list[tuple[bytes, bytes]]:
    """The blocks of some tokens and their digests, by prefixes."""
    prefix, names = Prefix.empty(salt), []
    for tokens in split_blocks(token_ids, block_size):
        prefix = prefix.extend(tokens)
        names.append((tokens, prefix.digest))
    return names


@pytest.mark.parametrize("block_size", [1, 3, 4])
def test_blocks_are_those_of_the_prefixes(block_size):
    token_ids = list(range(10))
    hashed = HashedTokens(token_ids, block_size, b"salt")
    for num_tokens in (0, 5, 10, 3, 9):
        expected = names_of(token_ids[:num_tokens], b"salt", block_size)
        for start in range(len(expected) + 2):
            assert list(hashed.blocks(start, num_tokens)) == expected[start:]


def test_each_full_block_is_hashed_once_while_the_tokens_grow():
    token_ids = list(range(6))
    hashed = HashedTokens(token_ids, 4)
    with mock.patch.object(hashed_tokens, "hash_blocks", side_effect=hash_blocks) as made:
        for num_tokens in (4, 4, 8, 8, 12):
            token_ids += range(len(token_ids), num_tokens)
            assert [tokens for tokens, _ in hashed.blocks(0, num_tokens)] == list(split_blocks(token_ids, 4))[
                : num_tokens // 4
            ]
    assert [len(call.args[1]) for call in made.call_args_list] == [4, 4, 4]


@pytest.mark.parametrize("num_hashed", [0, 4, 12])
def test_a_sequence_that_follows_another_keeps_the_hashes_of_the_shared_tokens_alone(num_hashed):
    hashed = HashedTokens(list(range(12)), 4, b"salt")
    hashed.full_blocks(12)
    own = [*range(5), 50, 51, 52, 53, 54, 55, 56]
    child = HashedTokens(own, 4, b"salt")
    child.full_blocks(num_hashed)
    own[5:] = range(5, 9)
    child.follow(hashed, 5, 9)
    own += [77, 78, 79]
    other = [*range(9), 77, 78, 79]
    with mock.patch.object(hashed_tokens, "hash_blocks", side_effect=hash_blocks) as made:
        assert list(child.blocks(0, 9)) == names_of(other[:9], b"salt", 4)
        assert list(child.blocks(0, 12)) == names_of(other, b"salt", 4)
    assert [len(call.args[1]) for call in made.call_args_list] == [1, 4], "no shared block is hashed again"
    assert list(hashed.blocks(0, 12)) == names_of(list(range(12)), b"salt", 4)


def test_hashed_and_plain_tokens_find_and_publish_the_same():
    draw = random.Random(0)
    plain, hashing = (BlockManager(40, 4, enable_prefix_caching=True) for _ in range(2))
    texts = [draw.choices(range(3), k=40) for _ in range(2)]
    for seq_id in range(60):
        text = draw.choice(texts)[: draw.randint(1, 30)] + draw.choices(range(3), k=draw.randint(0, 5))
        num_tokens = draw.randint(0, len(text))
        salt = draw.choice([b"", b"other"])
        hashed = HashedTokens(text, 4, salt)
        match = plain.match_prefix(text[:num_tokens], salt=salt)
        assert hashing.match_prefix(hashed, num_tokens) == match
        for manager, tokens in ((plain, text), (hashing, hashed)):
            manager.reserve(seq_id, len(text), match=match)
            for num_computed in (len(text) // 2, len(text)):
                manager.publish(seq_id, tokens, num_computed, salt=salt, include_partial=num_computed == len(text))
            manager.free(seq_id)
            manager.check_invariants()
        assert plain.stats() == hashing.stats()
    assert plain.stats().prefix_hit_tokens > 0
