"""The prefix cache: finds the physical block that already holds the KV of a given prefix of tokens.

The KV of a block depends on its own tokens and on all tokens before them, so a block is named by its whole ``Prefix``
(the paper's "shared prefix", section 4.4, found automatically). A prefix is pure content; where its KV lies is the
cache's business.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Self

import numpy as np


@dataclass(frozen=True, slots=True, eq=False)
class Prefix:
    """The tokens of a chain of full blocks, linked from the last block back to the salt.

    Args:
        parent: everything before the last block; None for the empty prefix.
        tokens: the last block's token ids, 8 bytes each; empty for the empty prefix.
        salt: separates users of one cache: prefixes of different salts are different.
        digest: SHA-256 chained over the salt and every block's tokens. Finds, but never proves: see ``is_same``.
    """

    parent: Self | None = field(repr=False)
    tokens: bytes
    salt: bytes
    digest: bytes

    @classmethod
    def empty(cls, salt: bytes = b"") -> Self:
        """The prefix of no tokens, from which every chain under ``salt`` starts."""
        return cls(None, b"", salt, _sha256(salt))

    def extend(self, tokens: bytes) -> Self:
        """This prefix followed by one more full block, whose token ids are ``tokens`` (see ``split_blocks``)."""
        return type(self)(self, tokens, self.salt, _sha256(self.digest + tokens))

    def is_same(self, other: "Prefix") -> bool:
        """Whether both hold the same tokens under the same salt, compared without trusting a digest.

        Chains that one cache made share their links, so this ends after a step or two except after an eviction.
        """
        if self.salt != other.salt:
            return False
        a, b = self, other
        while a is not b:
            if a is None or b is None or a.tokens != b.tokens:
                return False
            a, b = a.parent, b.parent
        return True


def split_blocks(token_ids: Sequence[int], block_size: int) -> Iterator[bytes]:
    """The full blocks of ``token_ids`` as fixed-width bytes (8 a token); a partial last block is left out."""
    block_bytes = 8 * block_size
    data = np.asarray(token_ids, dtype="<i8").tobytes()
    for start in range(0, len(data) - block_bytes + 1, block_bytes):
        yield data[start : start + block_bytes]


class PrefixCache:
    """Prefix -> physical block, one to one. One writer: the BlockManager, which decides what enters and leaves.

    Args:
        block_size: tokens in a block.
    """

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.queried_tokens = 0
        self.hit_tokens = 0
        self._blocks: dict[bytes, int] = {}  # digest -> physical block
        self._prefixes: dict[int, Prefix] = {}  # physical block -> the prefix it ends

    def __len__(self) -> int:
        return len(self._blocks)

    def __contains__(self, block: int) -> bool:
        return block in self._prefixes

    def prefix_of(self, block: int) -> Prefix | None:
        """The prefix whose last block lies in this physical block; None when the block is not cached."""
        return self._prefixes.get(block)

    def match(self, token_ids: Sequence[int], salt: bytes = b"") -> list[int]:
        """Physical blocks of the longest cached prefix of ``token_ids``, in order. Changes and counts nothing."""
        prefix, blocks = Prefix.empty(salt), []
        for tokens in split_blocks(token_ids, self.block_size):
            block = self._find(prefix.extend(tokens))
            if block is None:
                break
            blocks.append(block)
            prefix = self._prefixes[block]
        return blocks

    def insert(self, prefix: Prefix, block: int) -> Prefix:
        """Record that ``block`` holds the last block of ``prefix``, unless another block already does.

        Returns:
            The prefix to extend next: the one already recorded, if the content was known, so that chains share links.
        """
        known = self._find(prefix)
        if known is not None:
            return self._prefixes[known]
        assert block not in self._prefixes, "a cached block is full: its content never changes"
        if prefix.digest not in self._blocks:  # of two prefixes with one digest, the second goes uncached
            self._blocks[prefix.digest] = block
            self._prefixes[block] = prefix
        return prefix

    def evict(self, block: int) -> None:
        """Forget ``block``, which is about to be overwritten; does nothing when it is not cached."""
        prefix = self._prefixes.pop(block, None)
        if prefix is not None:
            del self._blocks[prefix.digest]

    def record_query(self, queried_tokens: int, hit_tokens: int) -> None:
        """Count one admitted sequence: tokens it holds, and those of them that the cache supplied."""
        self.queried_tokens += queried_tokens
        self.hit_tokens += hit_tokens

    def check_invariants(self) -> None:
        """Assert that the two maps mirror each other."""
        assert len(self._blocks) == len(self._prefixes)
        for block, prefix in self._prefixes.items():
            assert self._blocks[prefix.digest] == block
            assert len(prefix.tokens) == 8 * self.block_size

    def _find(self, prefix: Prefix) -> int | None:
        block = self._blocks.get(prefix.digest)
        return block if block is not None and self._prefixes[block].is_same(prefix) else None


def _sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()
