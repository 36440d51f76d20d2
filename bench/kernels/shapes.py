"""The batches that the kernel benchmarks attend, as numbers: no accelerator and no JAX needed.

The measured shapes are those of the peers' tables. A context or a chunk "at 2k" ends at position 2047, so its
``kv_len`` is 2048 with its own tokens.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from bench import UsageError
from bench.workloads import shared_prefix

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "int8": 1}

NOWHERE = 2**30
"""Entry of a block table past a row's length: a block that no pool has."""

UNSEEN = -1
"""The position of a slot that no query may read."""

PREFIX_LEN = 341
"""Tokens before every request of the workload sharedprefix341_500."""


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """One ragged batch, and the attention of its model.

    Args:
        name: a distinct name.
        q_lens, kv_lens: lengths of each row; 0 and 0 for a padding row.
        dtype: type of the queries.
        kv_dtype: type of the pool.
        shared_blocks: number of blocks at the beginning that all rows share.
        reads_shared_once: whether these are told to ``paged_attention`` as shared tokens.
        padding_tokens: queries after the last row's.
        has_alibi, has_sinks: whether each head has a slope, a sink.
    """

    name: str
    q_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    block_size: int = 16
    dtype: str = "bfloat16"
    kv_dtype: str = "bfloat16"
    shared_blocks: int = 0
    reads_shared_once: bool = False
    padding_tokens: int = 0
    sliding_window: int | None = None
    soft_cap: float | None = None
    has_alibi: bool = False
    has_sinks: bool = False

    @property
    def num_tokens(self) -> int:
        return sum(self.q_lens) + self.padding_tokens

    @property
    def cu_q_lens(self) -> np.ndarray:
        """[num_seqs + 1] int32."""
        return np.concatenate([[0], np.cumsum(self.q_lens)]).astype(np.int32)

    @property
    def group(self) -> int:
        """Query heads that read one KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def kind(self) -> str:
        """Kind of the rows: all single queries, all chunks, or both."""
        is_decode = {q_len == 1 for q_len in self.q_lens if q_len}
        return "mixed" if len(is_decode) == 2 else "decode" if True in is_decode else "prefill"

    @property
    def is_quantized(self) -> bool:
        return self.kv_dtype != self.dtype

    @property
    def is_ragged(self) -> bool:
        return len(set(self.kv_lens)) > 1 or len(set(self.q_lens)) > 1

    @property
    def num_row_blocks(self) -> np.ndarray:
        """Blocks of each row, shared ones counted in every row. [num_seqs]"""
        return -(-np.array(self.kv_lens) // self.block_size)

    @property
    def num_blocks(self) -> int:
        """Blocks of a pool that holds the batch, with one for padding and one that no row has."""
        return 2 + self.shared_blocks + int(np.maximum(self.num_row_blocks - self.shared_blocks, 0).sum())

    @property
    def kv_bytes(self) -> int:
        """Bytes that a layer must read: K and V of all contexts, shared blocks once."""
        num_shared = (len(self.kv_lens) - 1) * self.shared_blocks * self.block_size
        num_tokens = sum(self.kv_lens) - num_shared
        return num_tokens * 2 * self.num_kv_heads * self.head_dim * ITEM_BYTES[self.kv_dtype]

    @property
    def flops(self) -> int:
        """FLOPs of a layer: 4 for each visible pair of query and key, head and element, in two products."""
        q_lens, kv_lens = np.array(self.q_lens, np.int64), np.array(self.kv_lens, np.int64)
        num_pairs = int((q_lens * (kv_lens - q_lens) + q_lens * (q_lens + 1) // 2).sum())
        return 4 * num_pairs * self.num_heads * self.head_dim

    def block_tables(self, seed: int = 0) -> np.ndarray:
        """[num_seqs, max_blocks] int32: distinct blocks in random order, shared ones first, NOWHERE past the end."""
        blocks = np.random.default_rng(seed).permutation(np.arange(1, self.num_blocks - 1))
        shared, own = np.split(blocks, [self.shared_blocks])
        tables = np.full((len(self.kv_lens), self.num_row_blocks.max()), NOWHERE, np.int32)
        ends = np.cumsum(np.maximum(self.num_row_blocks - self.shared_blocks, 0))
        for row, (end, num_blocks) in enumerate(zip(ends, self.num_row_blocks, strict=True)):
            if num_blocks:
                tables[row, : self.shared_blocks] = shared
                tables[row, self.shared_blocks : num_blocks] = own[end - num_blocks + self.shared_blocks : end]
        return tables

    def positions(self, tables: np.ndarray) -> np.ndarray:
        """[num_blocks, block_size] int32: each slot's position in its sequence, or UNSEEN."""
        positions = np.full((self.num_blocks, self.block_size), UNSEEN, np.int32)
        for q_len, kv_len, table in zip(self.q_lens, self.kv_lens, tables, strict=True):
            first = 0 if self.sliding_window is None else max(kv_len - q_len - self.sliding_window + 1, 0)
            seen = np.arange(first, kv_len)
            positions[table[seen // self.block_size], seen % self.block_size] = seen
        return positions

    def shrunk(self, divisor: int) -> "AttentionShape":
        """The same shape with rows and tokens divided by ``divisor``, for a slow device."""
        num_rows = max(len(self.q_lens) // divisor, 2)
        q_lens = tuple(-(-q_len // divisor) for q_len in self.q_lens)
        kv_lens = tuple(-(-kv_len // divisor) for kv_len in self.kv_lens)
        if self.kind == "mixed":  # the first and the last rows keep both kinds
            rows = [*range(num_rows // 2), *range(num_rows // 2 - num_rows, 0)]
            q_lens, kv_lens = tuple(q_lens[row] for row in rows), tuple(kv_lens[row] for row in rows)
        return replace(
            self,
            q_lens=q_lens[:num_rows],
            kv_lens=kv_lens[:num_rows],
            shared_blocks=self.shared_blocks // divisor,
        )

    def describe(self) -> dict[str, Any]:
        """Content of a result file."""
        return {
            "num_seqs": len(self.q_lens),
            "num_tokens": self.num_tokens,
            "longest_q_len": max(self.q_lens),
            "kv_lens": {"sum": sum(self.kv_lens), "min": min(self.kv_lens), "max": max(self.kv_lens)},
            "shared_blocks": self.shared_blocks,
            "reads_shared_once": self.reads_shared_once,
            "num_heads": self.num_heads,
            "num_kv_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "block_size": self.block_size,
            "dtype": self.dtype,
            "kv_dtype": self.kv_dtype,
            "kv_bytes_per_layer": self.kv_bytes,
            "flops_per_layer": self.flops,
        }


def value_deviations(positions: np.ndarray) -> np.ndarray:
    """Deviations of V with which a layer's outputs can be the next one's queries; NaN for slots that no query may read.

    They are sqrt((position + 1) / 2). With queries of deviation s and normal keys, scores are of deviation s. The
    output at position p has variance e^(s^2) * sum over j <= p of (j + 1) / 2 / (p + 1)^2, about e^(s^2) / 4 for every
    p. So s becomes e^(s^2 / 2) / 2, which settles at 0.6. After many layers, softmaxes neither freeze on one key nor
    become uniform. The speed of a GPU's products depends on their values.
    """
    return np.where(positions == UNSEEN, np.nan, np.sqrt((positions + 1) / 2)).astype(np.float32)


def _decode(name: str, batch: int, kv_len: int, **options: Any) -> AttentionShape:
    return AttentionShape(f"decode_{name}", (1,) * batch, (kv_len,) * batch, **options)


def _chunks(name: str, count: int, q_len: int, kv_len: int, **options: Any) -> AttentionShape:
    return AttentionShape(f"prefill_{name}", (q_len,) * count, (kv_len,) * count, **options)


def _ragged() -> AttentionShape:
    kv_lens = np.random.default_rng(0).lognormal(6.5, 1, 128).clip(16, 8192).astype(int)
    return AttentionShape("decode_b128_ragged", (1,) * 128, tuple(kv_lens.tolist()))


def _shared_prefix(name: str, prefix_len: int, *, reads_once: bool = False) -> AttentionShape:
    """256 requests of the workload sharedprefix341_500, or with another prefix, each half-way through its answer."""
    work = shared_prefix(256, prefix_len)
    lens = (len(prompt) + output_len // 2 for prompt, output_len in zip(work.prompts, work.output_lens, strict=True))
    shared = {"shared_blocks": prefix_len // 16, "reads_shared_once": reads_once}
    return AttentionShape(f"decode_b256_shared_{name}", (1,) * 256, tuple(lens), **shared)


def _mixed() -> AttentionShape:
    return AttentionShape("mixed_128x2k_2x1024_at_4k", (1,) * 128 + (1024,) * 2, (2048,) * 128 + (4096,) * 2)


MEASURED = (
    _decode("b64_1k", 64, 1024),
    _decode("b128_2k", 128, 2048),
    _decode("b256_1k", 256, 1024),
    _decode("b16_8k", 16, 8192),
    _decode("b1_128k", 1, 131_072),
    _ragged(),
    _decode("mha40_b32_1k", 32, 1024, num_heads=40, num_kv_heads=40),
    _decode("b128_2k_block64", 128, 2048, block_size=64),
    _decode("b128_2k_block128", 128, 2048, block_size=128),
    _decode("b128_2k_fp8", 128, 2048, kv_dtype="float8_e4m3fn"),
    _decode("b128_2k_int8", 128, 2048, kv_dtype="int8"),
    _shared_prefix("prefix", PREFIX_LEN),
    _shared_prefix("prefix_read_once", PREFIX_LEN, reads_once=True),
    _shared_prefix("4k", 4096),
    _shared_prefix("4k_read_once", 4096, reads_once=True),
    _chunks("4x4096", 4, 4096, 4096),
    _chunks("1x16384", 1, 16_384, 16_384),
    _chunks("8x512_at_8k", 8, 512, 8192),
    _chunks("2x1024_at_4k", 2, 1024, 4096),
    _chunks("2x1024_at_4k_fp8", 2, 1024, 4096, kv_dtype="float8_e4m3fn"),
    _chunks("2x1024_at_4k_int8", 2, 1024, 4096, kv_dtype="int8"),
    _mixed(),
)


def choose(words: str | None, shapes: tuple[AttentionShape, ...] = MEASURED) -> list[AttentionShape]:
    """The shapes whose name contains one of some words; see ``choose_names``."""
    names = choose_names(words, [shape.name for shape in shapes])
    return [shape for shape in shapes if shape.name in names]


def choose_names(words: str | None, names: list[str]) -> list[str]:
    """The names that contain one of some words, separated by commas; all if None.

    Raises:
        UsageError: a word fits no name.
    """
    if words is None:
        return names
    for word in words.split(","):
        if not any(word in name for name in names):
            raise UsageError(f"--shapes: no name contains {word!r}: expected parts of {', '.join(names)}")
    return [name for name in names if any(word in name for word in words.split(","))]
