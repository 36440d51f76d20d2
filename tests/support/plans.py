"""Plans spelled out: chunks and draws with all that they stand for, to make plans of, and as found in plans."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np

from jpaged.contract.adjustments import BANNED, BANNED_EARLY, BANNED_NOW, AdjustmentsBuilder, RowAdjustments
from jpaged.contract.draws import NO_DRAWS, Draws
from jpaged.contract.plan import BeamSelect, BlockCopy, Chunks, PromptScore, StepPlan
from jpaged.contract.rows import COLUMNS, NO_CHANGES, ON_DEVICE, PADDING_ROW, RowChanges, pack_row
from jpaged.device.sampling.columns import SampleInputs
from jpaged.device.sampling.columns import make_sample_inputs as make_inputs
from jpaged.host.scheduler import Scheduler
from jpaged.request import MAX_LOGIT_BIAS, Request, SamplingParams

NO_CELL = -(2**31)
"""Stands for a cell of a block table that no plan has told of."""


class Chunk(NamedTuple):
    """A chunk, with the row that it belongs to. Its block table has the cells of all layer groups."""

    seq_id: int
    token_ids: Sequence[int]
    start: int
    prompt_len: int
    block_table: Sequence[int]
    row: int = -1

    @property
    def stop(self) -> int:
        return self.start + len(self.token_ids)


class Sample(NamedTuple):
    """A draw, with the row that it belongs to, and its biases and its history."""

    seq_id: int
    chunk: int
    position: int
    seed: int
    params: SamplingParams
    banned_token_ids: Sequence[int] = ()
    prompt_token_ids: Sequence[int] = ()
    output_token_ids: Sequence[int] = ()
    num_tokens: int = 1


def make_plan(
    chunks: Sequence[Chunk] = (), samples: Sequence[Sample] = (), *, with_changes: bool = True, **others
) -> StepPlan:
    """A plan that enters all of its rows: chunk i has row i, and so has sample i.

    Args:
        chunks: token ids below 0 stand for what the row drew last.
        samples: at most one for each row of the table.
        with_changes: whether the table is told of the rows.
        others: further fields of the plan.
    """
    if not chunks:
        return StepPlan(**others)
    num_rows = max(len(chunks), len(samples))
    prompt_lens = [chunk.prompt_len for chunk in chunks] + [0] * (num_rows - len(chunks))
    cells = [
        pack_row(samples[row].params, samples[row].seed, prompt_lens[row], is_adjusted=is_adjusted(samples[row]))
        if row < len(samples)
        else PADDING_ROW.tobytes()[:-4] + np.int32(prompt_lens[row]).tobytes()
        for row in range(num_rows)
    ]
    table_lens = [len(chunk.block_table) for chunk in chunks]
    changes = RowChanges(
        rows=np.arange(num_rows, dtype=np.int32),
        columns=np.frombuffer(b"".join(cells), np.int32).reshape(num_rows, len(COLUMNS)).T,
        block_rows=np.repeat(np.arange(len(chunks), dtype=np.int32), table_lens),
        block_indices=np.concatenate([np.arange(n, dtype=np.int32) for n in table_lens]),
        blocks=np.concatenate([np.array(chunk.block_table, np.int32) for chunk in chunks]),
    )
    return StepPlan(
        changes=changes if with_changes else NO_CHANGES,
        adjustments=adjustments_of(samples if with_changes else ()),
        chunks=Chunks(
            rows=np.arange(len(chunks), dtype=np.int32),
            seq_ids=np.array([chunk.seq_id for chunk in chunks], np.int64),
            starts=np.array([chunk.start for chunk in chunks], np.int32),
            lens=np.array([len(chunk.token_ids) for chunk in chunks], np.int32),
            token_ids=np.array([max(t, ON_DEVICE) for chunk in chunks for t in chunk.token_ids], np.int32),
        ),
        draws=draws_of(samples),
        **others,
    )


def draws_of(samples: Sequence[Sample]) -> Draws:
    """The draws of a plan; sample i has row i."""
    if not samples:
        return NO_DRAWS
    wanted = [sample.params.logprobs for sample in samples if sample.params.logprobs is not None]
    return Draws(
        rows=np.arange(len(samples), dtype=np.int32),
        seq_ids=np.array([sample.seq_id for sample in samples], np.int64),
        chunks=np.array([sample.chunk for sample in samples], np.int32),
        num_tokens=np.array([sample.num_tokens for sample in samples], np.int32),
        num_logprobs=max(wanted, default=None),
        is_adjusted=any(map(is_adjusted, samples)),
    )


def is_adjusted(sample: Sample) -> bool:
    """Whether the logits of a draw have adjustments."""
    return bool(sample.params.has_penalties or sample.params.logit_bias or sample.banned_token_ids)


def adjustments_of(samples: Sequence[Sample]) -> RowAdjustments:
    """The adjustments of draws; sample i has row i."""
    builder = AdjustmentsBuilder()
    for row, sample in enumerate(samples):
        if is_adjusted(sample):
            prompt, banned = list(sample.prompt_token_ids), sample.banned_token_ids
            request = Request("", None, prompt, sample.params, 0, banned_token_ids=banned)
            builder.enter(row, request, sample.output_token_ids, ())
    return builder.take()


def make_sample_inputs(samples: Sequence[Sample], num_rows: int, vocab_size: int | None = None) -> SampleInputs:
    """The inputs of a sampler, row i for ``samples[i]``; with adjustments, if any, for a vocabulary that is given."""
    params, seeds = [sample.params for sample in samples], [sample.seed for sample in samples]
    inputs = make_inputs(params, seeds, [sample.position for sample in samples], num_rows)
    num_biases = np.full(num_rows, -1, np.int32)
    for row, sample in enumerate(samples):
        if is_adjusted(sample):
            num_biases[row] = len(sample.params.logit_bias or ())
    inputs = replace(inputs, num_biases=num_biases)
    if vocab_size is None or not any(map(is_adjusted, samples)):
        return inputs
    changes = adjustments_of(samples)
    marks = np.zeros((num_rows, vocab_size), np.uint16)
    np.add.at(marks, (changes.mark_rows, changes.mark_ids), changes.marks.astype(np.uint16))
    bias_ids, bias_values = (np.zeros((num_rows, MAX_LOGIT_BIAS), dtype) for dtype in (np.int32, np.float32))
    bias_ids[changes.bias_rows, changes.bias_places] = changes.bias_ids
    bias_values[changes.bias_rows, changes.bias_places] = changes.bias_values
    return replace(inputs, marks=marks, bias_ids=bias_ids, bias_values=bias_values)


class Rows:
    """The table of rows as a device keeps it: told of nothing but plans' changes."""

    def __init__(self, num_groups: int = 1) -> None:
        self.num_groups = num_groups
        self.tables: dict[int, dict[int, int]] = {}
        self.columns: dict[int, np.ndarray] = {}
        self.marks: defaultdict[int, Counter[int]] = defaultdict(Counter)

    def enter(self, plan: StepPlan) -> None:
        changes = plan.changes
        assert len(set(changes.rows.tolist())) == len(changes.rows), "a row is entered twice"
        for row, cells in zip(changes.rows.tolist(), changes.columns.T, strict=True):
            self.columns[row] = cells
        cells = list(zip(changes.block_rows.tolist(), changes.block_indices.tolist(), strict=True))
        assert len(set(cells)) == len(cells), "a cell is entered twice"
        for (row, index), block in zip(cells, changes.blocks.tolist(), strict=True):
            self.tables.setdefault(row, {})[index] = block
        adjustments = plan.adjustments
        for row in adjustments.rows.tolist():
            self.marks[row].clear()
        entries = adjustments.mark_rows, adjustments.mark_ids, adjustments.marks
        for row, token_id, mark in zip(*(each.tolist() for each in entries), strict=True):
            self.marks[row][token_id] += mark

    def seed(self, row: int) -> int:
        return int(self._cell(row, "seeds"))

    def prompt_len(self, row: int) -> int:
        return int(self._cell(row, "prompt_lens"))

    def temperature(self, row: int) -> float:
        return float(self._cell(row, "temperature"))

    def bans(self, row: int, position: int) -> tuple[int, ...]:
        """Tokens that may not be drawn at a position."""
        if self._cell(row, "num_biases") < 0:
            return ()
        bans = BANNED | BANNED_NOW | (BANNED_EARLY if position < self._cell(row, "min_lens") else 0)
        return tuple(sorted(token_id for token_id, mark in self.marks[row].items() if mark & bans))

    def _cell(self, row: int, name: str) -> np.generic:
        index = list(COLUMNS).index(name)
        return self.columns[row][index : index + 1].view(COLUMNS[name])[0]

    def chunks(self, plan: StepPlan, block_size: int) -> list[Chunk]:
        """The chunks of a plan whose changes have been entered, with the blocks that the plan's steps need."""
        found, stop = [], 0
        num_tokens = np.maximum(plan.chunks.lens, 1)
        if plan.num_steps > 1:
            num_tokens = plan.draws.num_tokens
        columns = plan.chunks.rows, plan.chunks.seq_ids, plan.chunks.starts, plan.chunks.lens, num_tokens
        for row, seq_id, start, length, num_fed in zip(*(column.tolist() for column in columns), strict=True):
            token_ids = plan.chunks.token_ids[stop : stop + length].tolist()
            stop += length
            num_cells = -(-(start + num_fed) // block_size) * self.num_groups
            table = [self.tables[row].get(index, NO_CELL) for index in range(num_cells)]
            found.append(Chunk(seq_id, token_ids, start, self.prompt_len(row), table, row))
        return found


class SpelledPlan(NamedTuple):
    """A plan of a scheduler, with its chunks and draws spelled out as they were when it was made.

    ``plan`` is the plan itself. Block tables are live views; a token that only the device knows is ``ON_DEVICE``.
    """

    plan: StepPlan
    chunks: list[Chunk]
    samples: list[Sample]

    @property
    def num_tokens(self) -> int:
        return self.plan.num_tokens

    @property
    def num_steps(self) -> int:
        return self.plan.num_steps

    @property
    def copies(self) -> tuple[BlockCopy, ...]:
        return self.plan.copies

    @property
    def to_host(self) -> tuple[BlockCopy, ...]:
        return self.plan.to_host

    @property
    def from_host(self) -> tuple[BlockCopy, ...]:
        return self.plan.from_host

    @property
    def beams(self) -> tuple[BeamSelect, ...]:
        return self.plan.beams

    @property
    def prompt_scores(self) -> tuple[PromptScore, ...]:
        return self.plan.prompt_scores


_tables: WeakKeyDictionary[Scheduler, Rows] = WeakKeyDictionary()


def spell(plan: StepPlan, scheduler: Scheduler) -> SpelledPlan:
    """Spell out a plan that a scheduler has just made. Bans are those of all plans that were spelled out."""
    table = _tables.setdefault(scheduler, Rows(len(scheduler.blocks.groups)))
    table.enter(plan)
    sequences, chunks, samples, stop = scheduler.roster.sequences, [], [], 0
    columns = plan.chunks.seq_ids, plan.chunks.starts, plan.chunks.lens, plan.chunks.rows
    for seq_id, start, length, row in zip(*(column.tolist() for column in columns), strict=True):
        _, seq = sequences[seq_id]
        token_ids = plan.chunks.token_ids[stop : stop + length].tolist()
        stop += length
        if token_ids == [ON_DEVICE] and start < len(seq.token_ids):
            token_ids = [seq.token_ids[start]]
        blocks = scheduler.blocks.holdings.held_by(seq_id).blocks
        chunks.append(Chunk(seq_id, token_ids, start, seq.prompt_len, blocks, row))
    for draw, (seq_id, chunk) in enumerate(zip(plan.draws.seq_ids.tolist(), plan.draws.chunks.tolist(), strict=True)):
        group, seq = sequences[seq_id]
        num_tokens, params = int(plan.draws.num_tokens[draw]), group.request.params
        position, row = chunks[chunk].stop, int(plan.draws.rows[draw])
        bans = table.bans(row, position)
        samples.append(Sample(seq_id, chunk, position, seq.seed, params, bans, num_tokens=num_tokens))
    return SpelledPlan(plan, chunks, samples)
