"""Adjustments of logits: bans, biases and counted tokens of rows, as both halves number them."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float32, Int32

from jpaged.contract.rows import MAX_FLOAT, NO_INTS
from jpaged.request import Request

IN_PROMPT = 1
BANNED = 2
BANNED_EARLY = 4
"""The ban ends once the sequence has ``min_tokens``."""
BANNED_NOW = 8
"""The ban ends with a later plan."""
GENERATED = 16
"""A mark has this for each time that the sequence generated the token."""
MOST_GENERATED = 2**16 // GENERATED - 1
"""Times that are counted at most: a mark has 16 bits."""


@dataclass(frozen=True, slots=True, eq=False)
class RowAdjustments:
    """Changes of the rows' adjustments, in order: rows begin anew, then entries are added and biases are set.

    Args:
        rows: rows without marks from now on.
        mark_rows: row of each mark.
        mark_ids: token of each mark.
        marks: number added to the mark of that token, which may be negative.
        bias_rows: row of each bias.
        bias_places: number of each bias in its row.
        bias_ids: token of each bias.
        bias_values: number that the bias adds to the token's logit.
    """

    rows: Int32[np.ndarray, " rows"] = field(default_factory=lambda: NO_INTS)
    mark_rows: Int32[np.ndarray, " marks"] = field(default_factory=lambda: NO_INTS)
    mark_ids: Int32[np.ndarray, " marks"] = field(default_factory=lambda: NO_INTS)
    marks: Int32[np.ndarray, " marks"] = field(default_factory=lambda: NO_INTS)
    bias_rows: Int32[np.ndarray, " biases"] = field(default_factory=lambda: NO_INTS)
    bias_places: Int32[np.ndarray, " biases"] = field(default_factory=lambda: NO_INTS)
    bias_ids: Int32[np.ndarray, " biases"] = field(default_factory=lambda: NO_INTS)
    bias_values: Float32[np.ndarray, " biases"] = field(default_factory=lambda: NO_INTS.view(np.float32))

    @property
    def is_empty(self) -> bool:
        return len(self.rows) == len(self.mark_rows) == 0


NO_ADJUSTMENTS = RowAdjustments()


class AdjustmentsBuilder:
    """Collects the changes for the next plan. Written by the table of rows."""

    def __init__(self) -> None:
        self._entered: dict[int, tuple[Request, Int32[np.ndarray, " tokens"], Int32[np.ndarray, " tokens"]]] = {}
        self._banned: dict[int, frozenset[int]] = {}  # tokens with BANNED_NOW, of rows on the device
        self._changed: dict[tuple[int, int], int] = {}

    def enter(
        self, row: int, request: Request, output_token_ids: Sequence[int], stop_token_ids: Collection[int]
    ) -> None:
        """Let a row begin anew.

        Args:
            row: the row.
            request: the request of its sequence.
            output_token_ids: tokens that the sequence has generated.
            stop_token_ids: tokens that are banned until it has ``min_tokens``.
        """
        params = request.params
        prompt = request.prompt_token_ids if params.repetition_penalty != 1 else ()
        output = output_token_ids if params.has_penalties else ()
        early = stop_token_ids if params.min_tokens else ()
        self._entered[row] = (request, *_marks(prompt, output, request.banned_token_ids, early))

    def leave(self, row: int) -> None:
        """Forget a row whose sequence leaves it."""
        self._entered.pop(row, None)
        if self._banned.pop(row, None) is not None:
            self._changed = {key: mark for key, mark in self._changed.items() if key[0] != row}

    def ban_now(self, row: int, token_ids: Iterable[int]) -> None:
        """Ban these tokens of a row, and no others, until the next call. Called once for each plan."""
        before, now = self._banned.get(row, frozenset()), frozenset(token_ids)
        self._changed |= dict.fromkeys([(row, each) for each in before - now], -BANNED_NOW)
        self._changed |= dict.fromkeys([(row, each) for each in now - before], BANNED_NOW)
        self._banned[row] = now

    def take(self) -> RowAdjustments:
        """The changes since the last call."""
        if not self._entered and not self._changed:
            return NO_ADJUSTMENTS
        rows = np.array(list(self._entered), np.int32)
        lens = [len(token_ids) for _, token_ids, _ in self._entered.values()]
        biases = [
            (row, place, token_id, min(max(value, -MAX_FLOAT), MAX_FLOAT))
            for row, (request, _, _) in self._entered.items()
            for place, (token_id, value) in enumerate((request.params.logit_bias or {}).items())
        ]
        bias_ints = np.array([each[:3] for each in biases], np.int32).reshape(-1, 3).T
        others = np.array([(*key, value) for key, value in self._changed.items()], np.int32).reshape(-1, 3).T
        built = RowAdjustments(
            rows,
            np.concatenate([np.repeat(rows, lens), others[0]]),
            np.concatenate([*[token_ids for _, token_ids, _ in self._entered.values()], others[1]]),
            np.concatenate([*[marks for _, _, marks in self._entered.values()], others[2]]),
            bias_ints[0],
            bias_ints[1],
            bias_ints[2],
            np.array([each[3] for each in biases], np.float32),
        )
        self._entered.clear()
        self._changed.clear()
        return built


def _marks(
    prompt: Sequence[int], output: Sequence[int], banned: Sequence[int], early: Collection[int]
) -> tuple[Int32[np.ndarray, " tokens"], Int32[np.ndarray, " tokens"]]:
    """The tokens that have a mark, each once, and their marks."""
    parts = [np.array(list(each), np.int32) for each in (prompt, banned, early, output)]
    token_ids, places = np.unique(np.concatenate(parts), return_inverse=True)
    marks = np.zeros(len(token_ids), np.int32)
    of_part = np.split(places, np.cumsum([len(part) for part in parts])[:-1])
    for own, mark in zip(of_part, (IN_PROMPT, BANNED, BANNED_EARLY), strict=False):
        marks[own] |= mark
    counts = np.bincount(of_part[3], minlength=len(token_ids))
    return token_ids, marks + GENERATED * np.minimum(counts, MOST_GENERATED).astype(np.int32)
