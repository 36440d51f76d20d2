"""The table of running sequences that both halves keep: its columns, and what changes between two plans."""

import struct
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int32

from jpaged.request import SamplingParams

ON_DEVICE = -1
"""The token id that stands for the newest token that the device drew for the row."""

COLUMNS = {
    "temperature": np.float32,
    "top_p": np.float32,
    "min_p": np.float32,
    "repetition_penalty": np.float32,
    "presence_penalty": np.float32,
    "frequency_penalty": np.float32,
    "top_k": np.int32,
    "seeds": np.uint32,
    "num_logprobs": np.int32,
    "num_biases": np.int32,
    "min_lens": np.int32,
    "prompt_lens": np.int32,
}
"""The columns that stay the same while a sequence has its row, each of numbers of 4 bytes.

``num_logprobs`` is -1 for a row that asks for no log-probabilities, ``num_biases`` is -1 for one without adjustments.
``min_lens`` counts the tokens of prompt and output before which stop tokens are banned.
"""

PROMPT_LEN = list(COLUMNS).index("prompt_lens")

MAX_FLOAT = 1e30
"""Bound of parameters and of their reciprocals, so that both are normal float32: 0 * inf would be NaN."""

_MAX_INT32 = 2**31 - 1
_CELLS = struct.Struct("=6fiIiiii")


def host_cell(index: int) -> int:
    """The cell of a block table for a logical block on the host: the streamed block of this index in its row."""
    return -1 - index


def pack_row(params: SamplingParams, seed: int, prompt_len: int, *, is_adjusted: bool = False) -> bytes:
    """The cells of one row, in the order of ``COLUMNS``."""
    floats = (
        params.temperature,
        params.top_p,
        params.min_p,
        max(params.repetition_penalty, 1 / MAX_FLOAT),
        params.presence_penalty,
        params.frequency_penalty,
    )
    top_k = min(max(params.top_k, 0), _MAX_INT32)
    num_logprobs = -1 if params.logprobs is None else params.logprobs
    num_biases = len(params.logit_bias or ()) if is_adjusted else -1
    others = top_k, seed, num_logprobs, num_biases, prompt_len + params.min_tokens, prompt_len
    return _CELLS.pack(*[min(max(x, -MAX_FLOAT), MAX_FLOAT) for x in floats], *others)


PADDING_ROW = np.frombuffer(_CELLS.pack(0.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0, 0, -1, -1, 0, 0), np.int32)
"""A greedy row without filters: it costs no noise and no search."""


@dataclass(frozen=True, slots=True, eq=False)
class RowChanges:
    """Cells of the table that differ from the table before the plan. Cells of a row's earlier owner may stay behind.

    Args:
        rows: ids of rows that have a new owner.
        columns: bits of the cells of these rows, one line for each of ``COLUMNS``.
        block_rows: row id of each changed cell of the block tables.
        block_indices: place of each in its row: logical block and layer group, as ``LayerGroups`` says.
        blocks: physical block of each. A cell whose block a window has passed may keep it.
    """

    rows: Int32[np.ndarray, " new_rows"]
    columns: Int32[np.ndarray, "columns new_rows"]
    block_rows: Int32[np.ndarray, " cells"]
    block_indices: Int32[np.ndarray, " cells"]
    blocks: Int32[np.ndarray, " cells"]


NO_INTS = np.zeros(0, np.int32)

NO_CHANGES = RowChanges(NO_INTS, np.zeros((len(COLUMNS), 0), np.int32), NO_INTS, NO_INTS, NO_INTS)
