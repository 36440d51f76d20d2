"""Hashed tokens: the tokens of a sequence, cut into blocks, and the hash of each block, made once."""

from collections.abc import Sequence

from jpaged.host.blocks.prefix_cache import Prefix, hash_block, split_blocks

type HashedBlock = tuple[bytes, bytes]
"""The tokens of a block, as bytes, and the digest of the prefix that ends with them."""


class HashedTokens:
    """The tokens of one sequence and the hashes of its full blocks, which lookups only read.

    Args:
        token_ids: the tokens. The owner appends to the list, and makes any other change right before ``follow``.
        block_size: tokens in a block.
        salt: separates users of one cache.

    Attributes:
        root: the prefix of no tokens, from which the blocks follow.
    """

    __slots__ = ("_block_size", "_full", "_token_ids", "root", "salt")

    def __init__(self, token_ids: Sequence[int], block_size: int, salt: bytes = b"") -> None:
        self.salt = salt
        self.root = Prefix.empty(salt)
        self._token_ids = token_ids
        self._block_size = block_size
        self._full: list[HashedBlock] = []

    def __len__(self) -> int:
        """Count the tokens."""
        return len(self._token_ids)

    def follow(self, other: "HashedTokens", start: int, stop: int) -> None:
        """Note that the tokens from ``start`` on have become those of another sequence, up to its token ``stop``.

        The tokens before ``start`` are the same in both: hashes of these are taken over too.
        """
        first, last = min(start // self._block_size, len(self._full)), stop // self._block_size
        self._full[first:] = other._full[first:last]

    def full_blocks(self, num_tokens: int) -> Sequence[HashedBlock]:
        """The full blocks of the first ``num_tokens`` tokens, and perhaps more."""
        full, block_size = self._full, self._block_size
        start, num_full = len(full), num_tokens // block_size
        if num_full > start:
            new_tokens = self._token_ids[start * block_size : num_full * block_size]
            full += hash_blocks(self._digest_of(start), new_tokens, block_size)
        return full

    def blocks(self, start: int, num_tokens: int) -> list[HashedBlock]:
        """The blocks of the first ``num_tokens`` tokens, from block ``start`` on; the last may be partial."""
        num_full = num_tokens // self._block_size
        blocks = list(self.full_blocks(num_tokens)[start:num_full])
        if start <= num_full and num_tokens % self._block_size:
            rest = self._token_ids[num_full * self._block_size : num_tokens]
            blocks += hash_blocks(self._digest_of(num_full), rest, self._block_size)
        return blocks

    def _digest_of(self, num_full: int) -> bytes:
        """The digest of the prefix that ends with so many full blocks, which have been hashed."""
        return self._full[num_full - 1][1] if num_full else self.root.digest


def hash_blocks(digest: bytes, token_ids: Sequence[int], block_size: int) -> list[HashedBlock]:
    """Hash the blocks of ``token_ids``, which continue a prefix with this digest; the last block may be partial."""
    blocks = []
    for tokens in split_blocks(token_ids, block_size):
        digest = hash_block(digest, tokens)
        blocks.append((tokens, digest))
    return blocks
