"""The padded arrays of one step of a user's own model, so that few compiled programs serve all lengths."""

from collections import Counter
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32

type BatchRow = tuple[Hashable, int, int]
"""A sequence, its first new position, and the position after its last new one."""


class BlockBatch(NamedTuple):
    """The arrays that ``KVCache.write`` and ``KVCache.attend`` take, in their order, all padded.

    Args:
        slots: slot of each new token, one row after the other; 0, in the padding block, for padding tokens.
        block_tables: physical blocks of each row, padded with block 0.
        kv_lens: tokens of each row that the step reads, the new ones included; 0 for padding rows.
        cu_q_lens: row i owns the new tokens ``cu_q_lens[i]`` to ``cu_q_lens[i + 1] - 1``.
    """

    slots: Int32[np.ndarray, " tokens"]
    block_tables: Int32[np.ndarray, "num_seqs max_blocks"]
    kv_lens: Int32[np.ndarray, " num_seqs"]
    cu_q_lens: Int32[np.ndarray, " num_seqs_plus_1"]


def pad_batch(
    rows: Sequence[BatchRow],
    slots: Sequence[Int32[np.ndarray, " new_tokens"]],
    tables: Sequence[Sequence[int]],
    *,
    num_tokens: int,
    num_rows: int,
    max_blocks: int,
) -> BlockBatch:
    """Pad the rows of a step to one shape.

    Args:
        rows: the rows, each sequence once.
        slots: slots of each row's new tokens.
        tables: physical blocks of each row that hold its tokens.
        num_tokens, num_rows, max_blocks: the shape.

    Raises:
        ValueError: a sequence given twice, or rows that need more tokens, rows or blocks than the shape has.
    """
    _check_distinct(rows)
    most_blocks = max(map(len, tables), default=0)
    for name, needed, given, instead in (
        ("num_tokens", sum(map(len, slots)), num_tokens, "compute fewer tokens in this step"),
        ("num_rows", len(tables), num_rows, "give fewer rows in this step"),
        ("max_blocks", most_blocks, max_blocks, "end the longest sequence"),
    ):
        if needed > given:
            raise ValueError(f"{name}={given} is too small: the rows need {needed}; raise it or {instead}")
    batch = BlockBatch(
        np.zeros(num_tokens, np.int32),
        np.zeros((num_rows, max_blocks), np.int32),
        np.zeros(num_rows, np.int32),
        np.zeros(num_rows + 1, np.int32),
    )
    batch.kv_lens[: len(rows)] = [stop for *_, stop in rows]
    stop = 0
    for i, (row, table) in enumerate(zip(slots, tables, strict=True)):
        start, stop = stop, stop + len(row)
        batch.slots[start:stop] = row
        batch.block_tables[i, : len(table)] = table
        batch.cu_q_lens[i + 1] = stop
    batch.cu_q_lens[len(tables) + 1 :] = stop
    return batch


def slots_of(blocks: Sequence[int], start: int, stop: int, block_size: int) -> Int32[np.ndarray, " tokens"]:
    """The slots of token positions [start, stop) of a sequence with these physical blocks."""
    first = start // block_size
    covering = np.asarray(blocks[first : -(-stop // block_size)], dtype=np.int32)
    logical, offsets = np.divmod(np.arange(start, stop, dtype=np.int32), np.int32(block_size))
    return covering[logical - first] * np.int32(block_size) + offsets


def _check_distinct(rows: Sequence[BatchRow]) -> None:
    counts = Counter(seq_id for seq_id, *_ in rows)
    twice = [seq_id for seq_id, count in counts.items() if count > 1]
    if twice:
        raise ValueError(f"rows name {twice} more than once: give each sequence one row a step")
