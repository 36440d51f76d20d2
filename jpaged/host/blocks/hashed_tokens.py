"""Hashed tokens: the tokens of a sequence, cut into blocks, and the hash of each block, made once."""

from collections.abc import Iterator, Sequence
from itertools import islice

from jpaged.host.blocks.prefix_cache import Prefix, hash_block, split_blocks

type HashedBlock = tuple[bytes, bytes]
"""The tokens of a block, as bytes, and the digest of the prefix that ends with them."""


class HashedTokens:
    """The tokens of one sequence and the hashes of its full blocks, which lookups only read.

    Args:
        token_ids: the tokens; the owner may append to the list, and changes nothing else.
        block_size: tokens in a block.
        salt: separates users of one cache.
    """

    __slots__ = ("_block_size", "_full", "_token_ids", "salt")

    def __init__(self, token_ids: Sequence[int], block_size: int, salt: bytes = b"") -> None:
        self.salt = salt
        self._token_ids = token_ids
        self._block_size = block_size
        self._full: list[HashedBlock] = []

    def __len__(self) -> int:
        """Count the tokens."""
        return len(self._token_ids)

    def fork(self, token_ids: Sequence[int]) -> "HashedTokens":
        """The hashes of another sequence, whose tokens are the first tokens of this one."""
        child = HashedTokens(token_ids, self._block_size, self.salt)
        child._full = self._full[: len(token_ids) // self._block_size]
        return child

    def full_blocks(self, num_tokens: int) -> Sequence[HashedBlock]:
        """The full blocks of the first ``num_tokens`` tokens, and perhaps more."""
        num_full = num_tokens // self._block_size
        if num_full > len(self._full):
            start = len(self._full)
            digest = self._full[-1][1] if start else Prefix.empty(self.salt).digest
            new_tokens = self._token_ids[start * self._block_size : num_full * self._block_size]
            self._full += hash_blocks(digest, new_tokens, self._block_size)
        return self._full

    def blocks(self, start: int, num_tokens: int) -> Iterator[HashedBlock]:
        """The blocks of the first ``num_tokens`` tokens, from block ``start`` on; the last may be partial."""
        num_full = num_tokens // self._block_size
        full = self.full_blocks(num_tokens)
        yield from islice(full, start, num_full)
        if num_tokens > num_full * self._block_size and start <= num_full:
            digest = full[num_full - 1][1] if num_full else Prefix.empty(self.salt).digest
            yield from hash_blocks(digest, self._token_ids[num_full * self._block_size : num_tokens], self._block_size)


def hash_blocks(digest: bytes, token_ids: Sequence[int], block_size: int) -> Iterator[HashedBlock]:
    """Hash the blocks of ``token_ids``, which continue a prefix with this digest."""
    for tokens in split_blocks(token_ids, block_size):
        digest = hash_block(digest, tokens)
        yield tokens, digest
