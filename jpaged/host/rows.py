"""The rows of running sequences: most iterations are arithmetic on columns."""

from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from itertools import chain

import numpy as np
from jaxtyping import Bool, Float32, Int32, Int64

from jpaged.contract.adjustments import AdjustmentsBuilder
from jpaged.contract.layer_groups import LayerGroups
from jpaged.contract.plan import BlockCopy
from jpaged.contract.result import TokenScores
from jpaged.contract.rows import COLUMNS, NO_CHANGES, NO_INTS, RowChanges, pack_row
from jpaged.host.blocks.holdings import common_len
from jpaged.host.blocks.manager import BlockManager
from jpaged.host.blocks.windows import NEVER
from jpaged.host.sequence import Sequence, SequenceGroup, SequenceState

MOST_STOPS = 4
"""Stop tokens that the table holds for each row; those of a sequence with more are its group's."""

_TAIL_LEN = 256
_NO_TOKEN = -1  # never drawn


@dataclass(frozen=True, slots=True, eq=False)
class Decodes:
    """The steady rows that have a token to draw, and what stays the same of them from plan to plan.

    Args:
        rows: the rows.
        seq_ids: the sequence of each.
        is_adjusted: whether one of the rows has adjustments.
        num_logprobs: most alternatives that a row asks for; None if no log-probabilities were asked for.
    """

    rows: Int32[np.ndarray, " decodes"]
    seq_ids: Int64[np.ndarray, " decodes"]
    is_adjusted: bool
    num_logprobs: int | None


NO_DECODES = Decodes(NO_INTS, np.zeros(0, np.int64), is_adjusted=False, num_logprobs=None)


class RowTable:
    """One row for each sequence of a running group, from when the group starts until the sequence ends or is preempted.

    A row is *steady* while its sequence does nothing but decode: its last token is on the device, nothing is forked,
    and the host bans nothing. The columns then own the sequence's state, and ``Sequence`` reads it from here.

    Args:
        num_rows: sequences that run at once at most.
        blocks: the bookkeeping of the pools, which knows the block tables.
        max_burst: tokens that a plan may draw for a row.

    Attributes:
        seq_ids: sequence of each row; -1 for a free row.
        positions: tokens of each steady sequence, pending tokens counted: position of the next token.
        known: tokens of these that the host knows.
        tail: tokens of each steady sequence, up to the last known, that ``flush`` has not appended yet.
        prompt_lens: tokens of the prompt of each sequence.
        least_ends: tokens before which each sequence does not end.
        limits: tokens at which each sequence ends.
        capacity: tokens that the blocks of each sequence hold without another block or a copy.
        next_slide: position from which windows have passed a block that each sequence holds.
        is_steady: whether each row is steady.
        is_due: whether steps have filled blocks of each steady row that are not published yet.
        is_adjusted: whether each row has adjustments.
        adjustments: changes of these for the next plan.
    """

    def __init__(self, num_rows: int, blocks: BlockManager, max_burst: int = 1) -> None:
        self._blocks = blocks
        self._free = list(range(num_rows))
        heapify(self._free)
        self._groups: list[SequenceGroup | None] = [None] * num_rows
        self._seqs: list[Sequence | None] = [None] * num_rows
        self._tables: list[list[int]] = [[] for _ in range(num_rows)]  # live views of the cells of each row
        self._entered: dict[int, bytes] = {}  # columns of rows with a new owner since the last plan
        self._changed: dict[int, int] = {}  # first logical block that changed since the last plan, by row
        self.num_restless = 0
        """Rows that have an owner and are not steady; written here alone."""
        self._decodes: Decodes | None = None  # as long as they are the same
        self._num_sure = 0  # tokens that all of them can draw
        self.seq_ids: Int64[np.ndarray, " rows"] = np.full(num_rows, -1, np.int64)
        self.positions: Int32[np.ndarray, " rows"] = np.zeros(num_rows, np.int32)
        self.known: Int32[np.ndarray, " rows"] = np.zeros(num_rows, np.int32)
        self.prompt_lens: Int32[np.ndarray, " rows"] = np.zeros(num_rows, np.int32)
        self.least_ends: Int32[np.ndarray, " rows"] = np.zeros(num_rows, np.int32)
        self.limits: Int32[np.ndarray, " rows"] = np.zeros(num_rows, np.int32)
        self.capacity: Int32[np.ndarray, " rows"] = np.zeros(num_rows, np.int32)
        self.next_slide: Int32[np.ndarray, " rows"] = np.full(num_rows, NEVER, np.int32)
        self.is_steady: Bool[np.ndarray, " rows"] = np.zeros(num_rows, bool)
        self.is_due: Bool[np.ndarray, " rows"] = np.zeros(num_rows, bool)
        self.is_adjusted: Bool[np.ndarray, " rows"] = np.zeros(num_rows, bool)
        self.adjustments = AdjustmentsBuilder()
        self._has_more_stops: Bool[np.ndarray, " rows"] = np.zeros(num_rows, bool)  # than ``MOST_STOPS``
        self._num_logprobs: Int32[np.ndarray, " rows"] = np.full(num_rows, -1, np.int32)
        self._stops: Int32[np.ndarray, "rows stops"] = np.full((num_rows, MOST_STOPS), _NO_TOKEN, np.int32)
        self._flushed: Int32[np.ndarray, " rows"] = np.zeros(num_rows, np.int32)
        self.tail: Int32[np.ndarray, "rows tail"] = np.zeros((num_rows, max(_TAIL_LEN, max_burst)), np.int32)
        self._tail_logprobs: Float32[np.ndarray, "rows tail"] = np.zeros(self.tail.shape, np.float32)
        self._tail_scores: dict[int, list[tuple[TokenScores, range]]] = {}  # of rows that ask for log-probabilities

    # Owners -------------------------------------------------------------------------------------------------------

    def enter(self, group: SequenceGroup, seq: Sequence) -> None:
        """Give a sequence a row."""
        row = heappop(self._free)
        params = group.request.params
        self._groups[row], self._seqs[row] = group, seq
        self.seq_ids[row] = seq.seq_id
        self.prompt_lens[row] = seq.prompt_len
        self.least_ends[row] = seq.prompt_len + group.least_tokens
        self.limits[row] = seq.prompt_len + group.max_tokens
        self.capacity[row] = 0
        self.is_adjusted[row] = is_adjusted = group.is_adjusted
        if is_adjusted:
            self.adjustments.enter(row, group.request, seq.output_token_ids, group.stop_token_ids)
        self._num_logprobs[row] = -1 if params.logprobs is None else params.logprobs
        self._has_more_stops[row] = len(group.stop_token_ids) > MOST_STOPS
        self._stops[row] = _NO_TOKEN
        if len(group.stop_token_ids) <= MOST_STOPS:
            self._stops[row, : len(group.stop_token_ids)] = list(group.stop_token_ids)
        self._entered[row] = pack_row(params, seq.seed, seq.prompt_len, is_adjusted=is_adjusted)
        self.num_restless += 1
        seq.rows, seq.row = self, row

    def leave(self, seq: Sequence) -> None:
        """Free the row of a sequence, if it has one; the sequence then owns its state."""
        if (row := seq.row) is None:
            return
        self._settle(row)
        self.num_restless -= 1
        seq.rows = seq.row = None
        self._groups[row] = self._seqs[row] = None
        self._tables[row] = []
        self.seq_ids[row] = -1
        self.is_due[row] = False
        if self.is_adjusted[row]:
            self.adjustments.leave(row)
        self._entered.pop(row, None)
        self._changed.pop(row, None)
        heappush(self._free, row)

    def join(self, seq: Sequence) -> None:
        """Let the columns own the state of a sequence, whose last token was drawn for its row, if it is steady now."""
        row = seq.row
        assert row is not None
        group = self._groups[row]
        assert group is not None
        is_running, num_tokens = seq.state is SequenceState.RUNNING, seq.num_tokens
        if not is_running or seq.num_computed != num_tokens - 1 or not group.is_steady:
            return
        self.positions[row] = num_tokens
        self.known[row] = self._flushed[row] = len(seq.token_ids)
        self.is_steady[row] = seq.is_steady = True
        self.num_restless -= 1
        self._decodes = None

    def _settle(self, row: int) -> None:
        """Give a steady sequence its state back."""
        seq = self._seqs[row]
        assert seq is not None
        if seq.is_steady:
            self.flush(row)
            position, known = int(self.positions[row]), int(self.known[row])
            self.is_steady[row] = seq.is_steady = False
            self.num_restless += 1
            self._decodes = None
            seq.num_computed, seq.num_pending = position - 1, position - known

    def member(self, row: int) -> tuple[SequenceGroup, Sequence]:
        """The group and the sequence of a row that has an owner."""
        group, seq = self._groups[row], self._seqs[row]
        assert group is not None
        assert seq is not None
        return group, seq

    def groups_of(self, rows: Int32[np.ndarray, " some"]) -> list[SequenceGroup]:
        """The group of each of these rows."""
        groups = self._groups
        return [groups[row] for row in rows.tolist()]  # pyright: ignore[reportReturnType]

    def owned(self, rows: Int32[np.ndarray, " some"], seq_ids: Int64[np.ndarray, " some"]) -> Bool[np.ndarray, " some"]:
        """Whether each row still belongs to the sequence that had it when a plan was made."""
        return self.seq_ids[rows] == seq_ids

    def restless_groups(self) -> list[SequenceGroup]:
        """The groups with a sequence whose row is not steady, each once."""
        rows = np.flatnonzero((self.seq_ids >= 0) & ~self.is_steady)
        return list(dict.fromkeys(self.groups_of(rows.astype(np.int32))))

    # Blocks -------------------------------------------------------------------------------------------------------

    def hold(self, seq: Sequence) -> None:
        """Note that a sequence holds other blocks than before: those that differ are told to the device."""
        if (row := seq.row) is not None:
            holding = self._blocks.holdings.held_by(seq.seq_id)
            self.change_from(row, common_len(self._tables[row], holding.blocks) // len(self._blocks.groups))
            self.capacity[row] = self._blocks.holdings.num_tokens(holding)
            self._tables[row] = holding.blocks
            if holding.starts:
                self.next_slide[row] = self._blocks.windows.next_slide(seq.seq_id)

    def missing(
        self, rows: Int32[np.ndarray, " some"], ends: Int32[np.ndarray, " some"]
    ) -> tuple[Int32[np.ndarray, " short"], Int32[np.ndarray, " short"]]:
        """The rows that need more blocks to hold so many tokens, and the tokens up to the end of the last block."""
        block_size = self._blocks.block_size
        is_short = ends > self.capacity[rows]
        short = rows[is_short]
        return short, -(-ends[is_short] // block_size) * block_size - self.capacity[short]

    def grow(
        self, rows: Int32[np.ndarray, " some"], num_tokens: Int32[np.ndarray, " some"], copies: list[BlockCopy]
    ) -> None:
        """Note that the blocks of some rows hold more tokens, and that ``copies`` replace some of their last blocks."""
        num_groups, copied = len(self._blocks.groups), {copy.dst for copy in copies}
        num_held = -(-self.capacity[rows] // self._blocks.block_size)
        self.capacity[rows] += num_tokens
        for row, held in zip(rows.tolist(), num_held.tolist(), strict=True):
            table = self._tables[row]
            is_copied = held > 0 and table[(held - 1) * num_groups] in copied
            if is_copied or len(table) > held * num_groups:
                self.change_from(row, held - is_copied)

    def change_from(self, row: int, first: int) -> None:
        """Note that blocks of a row are others, or on the host, from logical block ``first`` on."""
        self._changed[row] = min(first, self._changed.get(row, first))

    @property
    def num_unwritten(self) -> int:
        """Tokens that the block manager gave slots to, and that steady rows have still to write."""
        ends, capacity = self.positions[self.is_steady] - 1, self.capacity[self.is_steady]
        return int(np.maximum(capacity - ends, 0).sum())

    def take_changes(self) -> RowChanges:
        """The cells that changed since the last call, for the plan that is sent next."""
        if not self._entered and not self._changed:
            return NO_CHANGES
        tables = {row: (first, self._tables[row]) for row, first in self._changed.items()}
        columns = b"".join(self._entered.values())
        changes = RowChanges(
            np.array(list(self._entered), np.int32),
            np.frombuffer(columns, np.int32).reshape(len(self._entered), len(COLUMNS)).T,
            *_changed_cells(tables, self._blocks.groups),
        )
        self._entered.clear()
        self._changed.clear()
        return changes

    # Decoding -----------------------------------------------------------------------------------------------------

    def decodes(self) -> Decodes:
        """The rows that decode next."""
        if self._decodes is None or self._num_sure <= 0:
            rows = np.flatnonzero(self.is_steady & (self.positions < self.limits)).astype(np.int32)
            self._num_sure = int((self.limits[rows] - self.positions[rows]).min(initial=_TAIL_LEN))
            is_adjusted, num_logprobs = bool(self.is_adjusted[rows].any()), self.num_logprobs(rows)
            self._decodes = Decodes(rows, self.seq_ids[rows], is_adjusted, num_logprobs)
        return self._decodes

    def num_draws(self, decodes: Decodes, max_burst: int) -> Int32[np.ndarray, " decodes"]:
        """Tokens that each row draws next: ``max_burst`` if all can, but none after its last."""
        if max_burst <= self._num_sure:
            return np.full(len(decodes.rows), max_burst, np.int32)
        return np.minimum(self.limits[decodes.rows] - self.positions[decodes.rows], np.int32(max_burst))

    def draw(self, decodes: Decodes, num_draws: Int32[np.ndarray, " decodes"]) -> Int32[np.ndarray, " decodes"]:
        """Count the tokens of a plan as pending. Returns the position of the first of each row."""
        positions = self.positions[decodes.rows]
        self.positions[decodes.rows] = positions + num_draws
        self._num_sure -= int(num_draws.max(initial=0))
        return positions

    def num_logprobs(self, rows: Int32[np.ndarray, " some"]) -> int | None:
        """The most alternatives that a row asks for; None if no log-probabilities were asked for."""
        most = int(self._num_logprobs[rows].max(initial=-1))
        return None if most < 0 else most

    def take(
        self,
        rows: Int32[np.ndarray, " some"],
        num_draws: Int32[np.ndarray, " some"],
        token_ids: Int32[np.ndarray, "steps some"],
        scores: list[TokenScores],
        draws: Int64[np.ndarray, " some"],
    ) -> Bool[np.ndarray, " some"]:
        """Append drawn tokens to steady rows that none of the tokens can end.

        Args:
            rows: the rows.
            num_draws: tokens that each has drawn.
            token_ids: the tokens of each step.
            scores: the scores of each step.
            draws: line of each row in ``scores``.

        Returns:
            The rows that took nothing: their tokens are for the sequences.
        """
        num_steps, logprobs = len(token_ids), np.stack([step.logprobs[draws] for step in scores])
        is_left = self.known[rows] + num_draws >= self.limits[rows]
        is_left |= (token_ids[:, :, None] == self._stops[rows][None]).any(axis=(0, 2))
        is_left |= np.isnan(logprobs).any(axis=0)
        for index in np.flatnonzero(self._has_more_stops[rows]).tolist():
            group, _ = self.member(int(rows[index]))
            is_left[index] |= not group.stop_token_ids.isdisjoint(token_ids[:, index].tolist())
        if is_left.any():
            taking = ~is_left
            rows, num_draws, draws = rows[taking], num_draws[taking], draws[taking]
            token_ids, logprobs = token_ids[:, taking], logprobs[:, taking]
        offsets = self.known[rows] - self._flushed[rows]
        for index in np.flatnonzero(offsets + num_steps > self.tail.shape[1]).tolist():
            self.flush(int(rows[index]))
            offsets[index] = 0
        for step in range(num_steps):  # a row that draws fewer tokens ends with them, and has taken none
            self.tail[rows, offsets + step] = token_ids[step]
            self._tail_logprobs[rows, offsets + step] = logprobs[step]
        self.known[rows] += num_draws
        for index in np.flatnonzero(self._num_logprobs[rows] >= 0).tolist():
            own = range(draw := int(draws[index]), draw + 1)
            self._tail_scores.setdefault(int(rows[index]), []).extend([(step, own) for step in scores])
        return is_left

    def hand_over(self, seq: Sequence, num_drawn: int) -> None:
        """Give a sequence its state back, for it to append tokens that were pending."""
        assert seq.row is not None
        self._settle(seq.row)
        seq.num_pending -= num_drawn

    def flush(self, row: int) -> None:
        """Append to a steady sequence what was drawn for it."""
        start, stop = int(self._flushed[row]), int(self.known[row])
        if start == stop:
            return
        seq = self._seqs[row]
        assert seq is not None
        num_tokens = stop - start
        self._flushed[row] = stop
        scored = self._tail_scores.pop(row, None)
        if scored is None:
            scored = [(TokenScores.plain(self._tail_logprobs[row, :num_tokens].copy()), range(num_tokens))]
        seq.extend(self.tail[row, :num_tokens].tolist(), scored)


def _changed_cells(
    changed: dict[int, tuple[int, list[int]]], groups: LayerGroups
) -> tuple[Int32[np.ndarray, " cells"], Int32[np.ndarray, " cells"], Int32[np.ndarray, " cells"]]:
    """Row, place and block of each cell, of rows whose first changed logical block and whose cells are given."""
    num_groups = len(groups)
    tables = [table[first * num_groups :] for first, table in changed.values()]
    lens = np.array([len(table) for table in tables], np.int64)
    ends, starts = np.cumsum(lens), np.array([first for first, _ in changed.values()], np.int64) * num_groups
    rows = np.repeat(np.array(list(changed), np.int32), lens)
    places = (np.arange(ends[-1] if changed else 0) + np.repeat(starts - ends + lens, lens)).astype(np.int32)
    blocks = np.array(list(chain.from_iterable(tables)), np.int32)
    if groups.has_windows:  # which may leave a long table almost empty
        is_held = blocks != 0
        return rows[is_held], places[is_held], blocks[is_held]
    return rows, places, blocks
