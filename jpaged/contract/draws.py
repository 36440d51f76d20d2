"""The draws of a plan: rows that get a token."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int32, Int64

from jpaged.contract.rows import NO_INTS


def next_banned(sequences: Iterable[Sequence[int]], output_token_ids: Sequence[int]) -> tuple[int, ...]:
    """The last tokens of those sequences whose other tokens the output ends with."""
    ends = {len(each) - 1: tuple(output_token_ids[len(output_token_ids) - len(each) + 1 :]) for each in sequences}
    return tuple([each[-1] for each in sequences if ends[len(each) - 1] == tuple(each[:-1])])


@dataclass(frozen=True, slots=True, eq=False)
class Draws:
    """Tokens to draw. Each sits behind the last token of a chunk, and is the newest token of its row afterwards.

    Args:
        rows: row id of each draw, all different.
        seq_ids: the sequence that has this row.
        chunks: index into ``StepPlan.chunks`` of the logits read. Several draws read one chunk before a prompt forks.
        num_tokens: tokens to draw, one in each of the plan's first steps, each fed to the next step.
        num_logprobs: most alternatives that any draw asks for; None if no log-probabilities were asked for.
        is_adjusted: whether a draw's row has adjustments.
        needs_tokens: whether a ban of the next draw depends on the tokens of these.
    """

    rows: Int32[np.ndarray, " draws"]
    seq_ids: Int64[np.ndarray, " draws"]
    chunks: Int32[np.ndarray, " draws"]
    num_tokens: Int32[np.ndarray, " draws"]
    num_logprobs: int | None = None
    is_adjusted: bool = False
    needs_tokens: bool = False

    def __len__(self) -> int:
        return len(self.rows)


NO_DRAWS = Draws(NO_INTS, np.zeros(0, np.int64), NO_INTS, NO_INTS)
