"""The prefix cache: finds the physical block that already holds the KV of a given prefix of tokens.

The KV of a block depends on its own tokens and on all tokens before them. So a block is named by its whole ``Prefix``:
the paper's "shared prefix" (section 4.4), found automatically. A prefix is pure content; the cache knows the block that
holds its KV. Each tier of blocks (``blocks.tier``) has a cache of its own.
"""

import hashlib
import struct
from bisect import bisect_left, insort
from collections.abc import KeysView, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Self

TOKEN_BYTES = 8


@dataclass(slots=True, eq=False)
class Prefix:
    """The tokens of a chain of blocks, linked from the last block back to the salt. All but the last are full.

    A prefix never changes. Each cached block has one, and a frozen one would take six times as long to make.

    Args:
        parent: the prefix before the last block; None for the empty prefix.
        tokens: the last block's token ids, 8 bytes each; empty for the empty prefix.
        salt: separates users of one cache: prefixes of different salts are different.
        digest: SHA-256 chained over the salt and every block's tokens. It finds, but never proves: see ``is_same``.
        group: layer group whose KV of the last block is meant. The prefixes before have group 0, and serve all groups.
    """

    parent: "Prefix | None" = field(repr=False)
    tokens: bytes
    salt: bytes
    digest: bytes
    group: int = 0

    @classmethod
    def empty(cls, salt: bytes = b"") -> "Prefix":
        """The prefix of no tokens, from which every chain under ``salt`` starts."""
        return cls(None, b"", salt, _sha256(salt))

    def extend(self, tokens: bytes) -> "Prefix":
        """This prefix, all full blocks, followed by one more, whose token ids are ``tokens`` (see ``split_blocks``)."""
        return self.link(tokens, hash_block(self.digest, tokens))

    def link(self, tokens: bytes, digest: bytes) -> "Prefix":
        """Extend as ``extend`` does, with the digest that ``hash_block`` made."""
        return Prefix(self, tokens, self.salt, digest)

    def of_group(self, group: int) -> "Prefix":
        """The same tokens, for another layer group."""
        if group == self.group:
            return self
        return Prefix(self.parent, self.tokens, self.salt, self.digest, group)

    @property
    def key(self) -> bytes:
        """The digest, and the group if it is not the first."""
        return self.digest if self.group == 0 else _key(self.digest, self.group)

    @property
    def key_before(self) -> bytes:
        """The key of the prefix without its last block, of the same group."""
        parent = self.parent
        assert parent is not None, "no block holds no tokens"
        return parent.digest if self.group == 0 else _key(parent.digest, self.group)

    def cut(self, num_tokens: int) -> "Prefix":
        """This prefix with only the first ``num_tokens`` tokens of its last block."""
        if num_tokens == self.num_last_tokens:
            return self
        assert self.parent is not None, "no block holds no tokens"
        assert num_tokens < self.num_last_tokens
        return self.parent.extend(self.tokens[: num_tokens * TOKEN_BYTES])

    @property
    def num_last_tokens(self) -> int:
        """Tokens in the last block."""
        return len(self.tokens) // TOKEN_BYTES

    def chain(self) -> "list[Prefix]":
        """The prefixes that end with the first block, the second, ..., the last one: this one."""
        links, link = [], self
        while link.parent is not None:
            links.append(link)
            link = link.parent
        return links[::-1]

    def is_same(self, other: "Prefix") -> bool:
        """Whether both hold the same tokens under the same salt, compared without trusting a digest.

        Chains that one cache made share their links. So this ends after a step or two, except after an eviction or a
        change of tiers.
        """
        if self.salt != other.salt:
            return False
        a, b = self, other
        while a is not b:
            if a is None or b is None or a.tokens != b.tokens:
                return False
            a, b = a.parent, b.parent
        return True


def hash_block(digest: bytes, tokens: bytes) -> bytes:
    """The digest of a prefix that has ``digest`` before its last block, and ``tokens`` in it."""
    return _sha256(digest + tokens)


def split_blocks(token_ids: Sequence[int], block_size: int) -> list[bytes]:
    """The blocks of ``token_ids`` as fixed-width bytes (8 a token); the last one may be partial, never empty."""
    block_bytes = TOKEN_BYTES * block_size
    data = struct.pack(f"{len(token_ids)}q", *token_ids)
    return [data[start : start + block_bytes] for start in range(0, len(data), block_bytes)]


class PrefixCache:
    """Prefix -> physical block, one to one. One writer: the BlockManager, which decides on entries.

    Args:
        block_size: tokens in a block.
    """

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.block_bytes = block_size * TOKEN_BYTES
        self._blocks: dict[bytes, int] = {}  # key of a prefix -> physical block
        self._prefixes: dict[int, Prefix] = {}  # physical block -> the prefix it ends
        # The key of a prefix, with the group of the block after it -> (tokens, physical block) of all such blocks,
        # sorted: neighbours share the most tokens.
        self._children: dict[bytes, list[tuple[bytes, int]]] = {}
        self.num_inserted = 0  # since the start
        self.unneeded: set[int] = set()
        """Cached blocks that no prefix end needs (``blocks.prefix_ends``)."""

    def __len__(self) -> int:
        return len(self._blocks)

    def __contains__(self, block: int) -> bool:
        return block in self._prefixes

    @property
    def blocks(self) -> KeysView[int]:
        """The physical blocks that are cached: a live view."""
        return self._prefixes.keys()

    def prefix_of(self, block: int) -> Prefix | None:
        """The prefix whose last block lies in this physical block; None when the block is not cached."""
        return self._prefixes.get(block)

    def find(self, prefix: Prefix) -> int | None:
        """The physical block that holds the last block of exactly ``prefix``."""
        block = self._blocks.get(prefix.key)
        return block if block is not None and self._prefixes[block].is_same(prefix) else None

    def find_child(self, parent: Prefix, tokens: bytes, digest: bytes, group: int = 0) -> int | None:
        """The physical block that holds exactly ``tokens`` after ``parent``; ``digest`` is that of both."""
        block = self._blocks.get(_key(digest, group))
        if block is None:
            return None
        known = self._prefixes[block]
        return block if known.tokens == tokens and known.parent is not None and known.parent.is_same(parent) else None

    def has(self, digest: bytes, group: int = 0) -> bool:
        """Whether a prefix with this digest is cached."""
        return _key(digest, group) in self._blocks

    def find_longest(self, parent: Prefix, tokens: bytes) -> tuple[int | None, int]:
        """The block after ``parent`` that starts with most of ``tokens``, and their number; None, 0 if none does."""
        siblings = self._children.get(parent.key, [])
        index = bisect_left(siblings, (tokens,))
        best: tuple[int | None, int] = None, 0
        for known, block in siblings[max(index - 1, 0) : index + 1]:
            num_common, known_parent = _num_common_tokens(known, tokens), self._prefixes[block].parent
            if num_common > best[1] and known_parent is not None and known_parent.is_same(parent):
                best = block, num_common
        return best

    def find_cover(self, prefix: Prefix) -> int | None:
        """A block that holds the tokens of the last block of ``prefix``, and perhaps more after them."""
        if len(prefix.tokens) == self.block_bytes:
            return self.find(prefix)
        assert prefix.parent is not None, "no block holds no tokens"
        block, num_tokens = self.find_longest(prefix.parent.of_group(prefix.group), prefix.tokens)
        return block if num_tokens == prefix.num_last_tokens else None

    def has_child(self, prefix: Prefix) -> bool:
        """Whether a block after ``prefix`` is cached, of the same group."""
        return prefix.key in self._children

    def insert(self, prefix: Prefix, block: int, *, is_needed: bool = True) -> Prefix:
        """Record that ``block`` holds the last block of ``prefix``, unless a block that does is already recorded.

        A block whose content has grown is recorded with the longer prefix instead.

        Args:
            prefix: the content.
            block: the physical block.
            is_needed: False if no prefix end needs the block yet.

        Returns:
            The prefix to extend next: the one already recorded, if the content was known, so that chains share links.
        """
        key = prefix.key
        is_new = key not in self._blocks and len(prefix.tokens) == self.block_bytes
        known = None if is_new else self.find_cover(prefix)
        if known is not None:
            return self._prefixes[known]
        if block in self._prefixes:  # taking the block has evicted it, unless it has grown since
            before = self.evict(block)
            assert before is not None
            assert prefix.tokens.startswith(before.tokens), "cached tokens are never overwritten"
        if key not in self._blocks:  # of two prefixes with one digest, the second goes uncached
            self.num_inserted += 1
            self._blocks[key] = block
            self._prefixes[block] = prefix
            if not is_needed:
                self.unneeded.add(block)
            child = prefix.tokens, block
            siblings = self._children.get(key_before := prefix.key_before)
            if siblings is None:
                self._children[key_before] = [child]
            else:
                insort(siblings, child)
        return prefix

    def evict(self, block: int) -> Prefix | None:
        """Forget ``block``, which is about to be overwritten.

        Returns:
            The prefix that it held; None if it was not cached, or if no prefix end needs it.
        """
        prefix = self._prefixes.pop(block, None)
        if prefix is None:
            return None
        del self._blocks[prefix.key]
        siblings = self._children[key_before := prefix.key_before]
        if len(siblings) == 1:
            del self._children[key_before]
        else:
            del siblings[bisect_left(siblings, (prefix.tokens, block))]
        if block in self.unneeded:
            self.unneeded.remove(block)
            return None
        return prefix

    def check_invariants(self) -> None:
        """Assert that the three maps mirror each other."""
        assert len(self._blocks) == len(self._prefixes) == sum(map(len, self._children.values()))
        assert all(siblings and siblings == sorted(siblings) for siblings in self._children.values())
        assert self.unneeded <= self._prefixes.keys()
        for block, prefix in self._prefixes.items():
            assert self._blocks[prefix.key] == block
            assert 0 < len(prefix.tokens) <= TOKEN_BYTES * self.block_size
            assert prefix.parent is not None
            assert all(len(link.tokens) == TOKEN_BYTES * self.block_size for link in prefix.parent.chain())
            assert (prefix.tokens, block) in self._children[prefix.key_before]


@dataclass(frozen=True, slots=True)
class PrefixHit:
    """A cached block that holds the tokens wanted next.

    Args:
        block: the physical block in its tier.
        num_tokens: tokens of the block that match, from its first on: all of them, except perhaps in the last hit.
        is_on_host: whether the block is in the host tier.
    """

    block: int
    num_tokens: int
    is_on_host: bool = False

    @property
    def is_needed(self) -> bool:
        """Whether there is a block: none is needed of tokens that a window has passed."""
        return self.is_on_host or self.block > 0


@dataclass(frozen=True)
class PrefixMatch:
    """The cached start of a sequence, block by block; the tiers may alternate.

    Args:
        hits: the blocks in the order of the cells of block tables (``LayerGroups``).
        num_groups: number of layer groups, each of which has a hit for each logical block.
        prefix: the tokens of the hits, if there are layer groups or windows; all hits are of full blocks then.
        branch: logical blocks after which cached tokens go on in another way, if windows lack blocks of them; or 0.
    """

    hits: tuple[PrefixHit, ...] = ()
    num_groups: int = 1
    prefix: Prefix | None = None
    branch: int = 0

    @cached_property
    def num_tokens(self) -> int:
        return sum([hit.num_tokens for hit in self.hits]) // self.num_groups

    def num_full_blocks(self, block_size: int) -> int:
        """Count the logical blocks that the hits cover whole."""
        return (len(self.hits) - bool(self.hits and self.hits[-1].num_tokens < block_size)) // self.num_groups

    def cut(self, num_hits: int) -> Self:
        """The first hits, of a model with one layer group and without windows."""
        return self if num_hits == len(self.hits) else type(self)(self.hits[:num_hits])

    @property
    def device_blocks(self) -> set[int]:
        """The blocks of the device's tier."""
        return {hit.block for hit in self.hits if not hit.is_on_host and hit.is_needed}

    @property
    def is_on_host(self) -> bool:
        """Whether any of it lies in the host tier, so that it takes a transfer before it can be read."""
        return True in [hit.is_on_host for hit in self.hits]


def _num_common_tokens(a: bytes, b: bytes) -> int:
    """The number of tokens that ``a`` and ``b`` share at their start."""
    num_bytes = min(len(a), len(b))
    difference = int.from_bytes(a[:num_bytes], "big") ^ int.from_bytes(b[:num_bytes], "big")
    num_from_first_different_byte = (difference.bit_length() + 7) // 8
    return (num_bytes - num_from_first_different_byte) // TOKEN_BYTES


def _key(digest: bytes, group: int) -> bytes:
    return digest if group == 0 else digest + group.to_bytes(2, "little")


def _sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()
