"""A step as devices take it: a plan, packed into a few arrays. Processes need nothing else of each other."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
from jaxtyping import Int32

from jpaged.contract.plan import BeamSelect, BlockCopy, PromptScore, StepPlan
from jpaged.contract.rows import COLUMNS, NO_INTS, RowChanges
from jpaged.device.sampling.beams import make_beam_inputs, num_candidates_of, pack_beam_inputs
from jpaged.device.sampling.columns import pack_draws
from jpaged.device.step.adjust import pack_adjustments
from jpaged.device.step.inputs import Bucket, bucket_for
from jpaged.device.step.layout import Layout
from jpaged.request import MAX_LOGPROBS

SCORE_ROWS = 64
"""Prompt tokens scored per call, so that prompt_logprobs never holds [prompt, vocab] logits."""

CHANGED_ROWS = 64
"""New rows that one call enters into the table, if there can be so many."""

CHANGED_BLOCKS = 1024
"""Cells of block tables that one call enters into the table."""


def step_layout(bucket: Bucket) -> Layout:
    """The packed inputs of a step."""
    tokens, rows = bucket.num_tokens, bucket.num_rows
    return Layout(
        token_ids=(tokens,),
        chunks=(tokens,),  # index of each token's chunk
        rows=(rows,),
        starts=(rows,),
        cu_q_lens=(rows + 1,),
        stream_starts=(rows,),
        sample_tokens=(rows,),
        sample_rows=(rows,),
        num_draws=(rows,),  # 0 outside of bursts
        shared_lens=(rows,),
        num_steps=(1,),  # 0 if the program is to draw nothing
    )


def change_layout(num_table_rows: int) -> Layout:
    """Packed changes of a table, as many as one call enters."""
    num_rows = min(CHANGED_ROWS, num_table_rows)
    return Layout(
        rows=(num_rows,),
        columns=(len(COLUMNS), num_rows),
        cells=(CHANGED_BLOCKS,),  # in StepState.block_tables
        blocks=(CHANGED_BLOCKS,),
    )


def loaded_size(bucket: Bucket) -> int:
    """Length of ``PackedStep.inputs``: the inputs of a step, then as many changed cells as the bucket has rows."""
    return step_layout(bucket).size + 2 * bucket.num_rows


def copy_sizes(most_rows: int, num_groups: int) -> list[int]:
    """Sizes of the copying programs: a step copies one block for each row and layer group at most."""
    most_copies = most_rows * num_groups
    return sorted({min(8, most_copies), most_copies})


@dataclass(frozen=True, slots=True)
class PackedSamples:
    """The input of a program that samples: see ``pack_draws``."""

    inputs: Int32[np.ndarray, "2 rows"]
    num_top: int | None
    is_adjusted: bool


@dataclass(frozen=True, slots=True)
class PackedBeams:
    """The input of a program that finds the continuations of beams: see ``pack_beam_inputs``."""

    inputs: Int32[np.ndarray, " size"]
    num_candidates: int
    num_biases: int


@dataclass(frozen=True, slots=True)
class PackedScores:
    """The input of scoring a piece of a prompt: rows of the hidden states and tokens, ``SCORE_ROWS`` at a time."""

    rows: Int32[np.ndarray, "parts score_rows"]
    targets: Int32[np.ndarray, "parts score_rows"]
    num_top: int


@dataclass(frozen=True, slots=True)
class PackedStep:
    """One ``StepPlan``.

    Args:
        to_host: as in the plan.
        from_host: as in the plan.
        copies: blocks to copy, and the blocks that become their copies, each the input of one call.
        bucket: the program of the forward pass; None if there is nothing to compute.
        changes: changes of the table that ``inputs`` have no place for, each the input of one call.
        adjustments: changes of the adjustments, each the input of one call; see ``pack_adjustments``.
        inputs: inputs that the program loads; see ``loaded_size``.
        num_steps: steps of a burst.
        draws: whether that program draws too: a decode's, with nothing but what all rows ask for.
        samples: draws by a program of its own; None if nothing is drawn, or a decode's own program draws.
        beams: searches; None without.
        scores: pieces of prompts to score.
        streamed: blocks on the host that the program streams; None for a program that streams none.
        has_shared: whether rows share tokens that the program may read once.
    """

    to_host: tuple[BlockCopy, ...]
    from_host: tuple[BlockCopy, ...]
    copies: tuple[Int32[np.ndarray, "2 copies"], ...]
    bucket: Bucket | None = None
    changes: tuple[Int32[np.ndarray, " change_size"], ...] = ()
    adjustments: tuple[Int32[np.ndarray, " adjustment_size"], ...] = ()
    inputs: Int32[np.ndarray, " size"] | None = None
    num_steps: int = 1
    draws: bool = False
    samples: PackedSamples | None = None
    beams: PackedBeams | None = None
    scores: tuple[PackedScores, ...] = ()
    streamed: Int32[np.ndarray, " streamed"] | None = None
    has_shared: bool = False


class Packer:
    """Packs plans, each by itself.

    Args:
        buckets: sizes of steps, smallest first.
        num_rows: rows of the table, the padding row, which is the last, included.
        max_blocks: width of a block table.
        vocab_size: the model's vocabulary.
        streams_always: whether programs stream even if a plan names no blocks.
        num_groups: layer groups, each with a block table.
    """

    def __init__(
        self,
        buckets: Sequence[Bucket],
        num_rows: int,
        max_blocks: int,
        vocab_size: int,
        *,
        streams_always: bool = False,
        num_groups: int = 1,
    ) -> None:
        self.buckets = buckets
        self.padding_row = num_rows - 1
        self._num_rows = num_rows
        self._max_blocks = max_blocks
        self._num_groups = num_groups
        self._vocab_size = vocab_size
        self._streams_always = streams_always
        self._num_cells = num_rows * max_blocks * num_groups  # of all tables: the place of padding, which is dropped
        self._copy_sizes = copy_sizes(num_rows - 1, num_groups)
        self._layouts = {bucket: step_layout(bucket) for bucket in buckets}
        self._change_layout = change_layout(num_rows)

    def pack(self, plan: StepPlan, usable: Sequence[Bucket] | None = None) -> PackedStep:
        """Pack all of a plan.

        Args:
            plan: the plan.
            usable: the buckets that the step may have, smallest first; None for all.
        """
        buckets = self.buckets if usable is None else usable
        moves = plan.to_host, plan.from_host, self._pack_copies(plan.copies) if plan.copies else ()
        num_new, num_blocks = len(plan.changes.rows), len(plan.changes.blocks)
        if len(plan.chunks.rows) == 0:
            assert num_new == num_blocks == 0
            return PackedStep(*moves)
        num_draws, is_adjusted = len(plan.draws.rows), plan.draws.is_adjusted
        bucket = bucket_for(plan, buckets)
        # A program scores no alternatives, or all that a request may ask for. Few rows have adjustments alone.
        num_top = None if plan.draws.num_logprobs is None and not is_adjusted else MAX_LOGPROBS
        draws = bucket.is_decode and num_top is None and num_draws > 0
        samples = None
        if num_draws > 0 and not draws:
            inputs = pack_draws(plan, _num_sample_rows(plan, bucket, buckets), self.padding_row)
            samples = PackedSamples(inputs, num_top, is_adjusted)
        is_fitting = num_blocks <= bucket.num_rows  # the inputs of the step have a place for the changed cells
        return PackedStep(
            *moves,
            bucket,
            () if num_new == 0 and is_fitting else self._pack_changes(plan.changes, with_blocks=not is_fitting),
            () if plan.adjustments.is_empty else pack_adjustments(plan.adjustments, self._num_rows),
            self._pack_inputs(plan, bucket, draws=draws, with_changes=is_fitting),
            plan.num_steps,
            draws,
            samples,
            _pack_beams(plan.beams, num_draws, bucket) if plan.beams else None,
            tuple([self._pack_scores(plan, piece) for piece in plan.prompt_scores]),
            self._pack_streamed(plan),
            plan.shared_lens is not None and bucket.is_decode,
        )

    def _pack_copies(self, copies: Sequence[BlockCopy]) -> tuple[Int32[np.ndarray, "2 copies"], ...]:
        """All copies of a plan; padding copies block 0 onto itself."""
        packed = []
        for wave in copy_waves(copies):
            size = min([size for size in self._copy_sizes if size >= len(wave)])
            packed.append(np.zeros((2, size), np.int32))
            packed[-1][:, : len(wave)] = np.array(wave, np.int32).T
        return tuple(packed)

    def _pack_streamed(self, plan: StepPlan) -> Int32[np.ndarray, " streamed"] | None:
        """The blocks that the program streams; None if it cannot stream."""
        if plan.streamed is not None:
            return plan.streamed.blocks
        return NO_INTS if self._streams_always and plan.num_steps == 1 else None

    def _pack_inputs(
        self, plan: StepPlan, bucket: Bucket, *, draws: bool, with_changes: bool
    ) -> Int32[np.ndarray, " size"]:
        """The inputs that a bucket's program loads: one transfer a step.

        Args:
            draws: whether the program draws.
            with_changes: whether the changed cells of block tables are among them.
        """
        chunks, num_chunks, num_tokens = plan.chunks, len(plan.chunks.rows), len(plan.chunks.token_ids)
        layout = self._layouts[bucket]
        packed = np.zeros(layout.size + 2 * bucket.num_rows, np.int32)
        fields = layout.split(packed)
        ends = np.cumsum(chunks.lens, dtype=np.int32)
        fields["token_ids"][:num_tokens] = chunks.token_ids
        fields["rows"][:num_chunks] = chunks.rows
        fields["rows"][num_chunks:] = self.padding_row
        fields["starts"][:num_chunks] = chunks.starts
        index = np.arange(num_chunks, dtype=np.int32)
        fields["chunks"][:num_tokens] = index if num_tokens == num_chunks else np.repeat(index, chunks.lens)
        fields["cu_q_lens"][1 : num_chunks + 1] = ends
        fields["cu_q_lens"][num_chunks + 1 :] = num_tokens
        if plan.streamed is not None:
            fields["stream_starts"][:num_chunks] = plan.streamed.starts
        num_draws, read = len(plan.draws.rows), plan.draws.chunks
        if plan.beams:
            beams = list(chain.from_iterable([beam.chunks for beam in plan.beams]))
            read = np.concatenate([read, np.array(beams, np.int32)])
        fields["sample_tokens"][: len(read)] = ends[read] - 1
        fields["sample_rows"][:num_draws] = plan.draws.rows
        fields["sample_rows"][num_draws:] = self.padding_row
        if plan.shared_lens is not None:
            fields["shared_lens"][:num_chunks] = plan.shared_lens
        if plan.num_steps > 1:
            fields["num_draws"][:num_draws] = plan.draws.num_tokens
        fields["num_steps"][:] = plan.num_steps if draws else 0
        cells, blocks = packed[layout.size :].reshape(2, bucket.num_rows)
        cells[:] = self._num_cells
        if with_changes and (num_blocks := len(plan.changes.blocks)):
            cells[:num_blocks] = self._cells_of(plan.changes)
            blocks[:num_blocks] = plan.changes.blocks
        return packed

    def _cells_of(self, changes: RowChanges) -> Int32[np.ndarray, " cells"]:
        places = changes.block_indices
        if self._num_groups > 1:  # on the device, the tables of a row lie one after the other
            logical, group = np.divmod(places, np.int32(self._num_groups))
            places = group * np.int32(self._max_blocks) + logical
        return changes.block_rows * np.int32(self._max_blocks * self._num_groups) + places

    def _pack_changes(self, changes: RowChanges, *, with_blocks: bool) -> tuple[Int32[np.ndarray, " change_size"], ...]:
        """Changes that the inputs of a step have no place for: new rows, and blocks if they are too many."""
        packed, row, block = [], 0, 0
        num_new, end = len(changes.rows), len(changes.blocks) if with_blocks else 0
        cells = self._cells_of(changes) if with_blocks else changes.blocks[:0]
        while row < num_new or block < end:
            packed.append(np.zeros(self._change_layout.size, np.int32))
            fields = self._change_layout.split(packed[-1])
            rows_each = len(fields["rows"])
            fields["rows"][:] = self._num_rows  # padding, which is dropped
            fields["cells"][:] = self._num_cells
            rows, blocks = slice(row, row + rows_each), slice(block, min(block + CHANGED_BLOCKS, end))
            own_rows, own_cells = changes.rows[rows], cells[blocks]
            fields["rows"][: len(own_rows)] = own_rows
            fields["columns"][:, : len(own_rows)] = changes.columns[:, rows]
            fields["cells"][: len(own_cells)] = own_cells
            fields["blocks"][: len(own_cells)] = changes.blocks[blocks]
            row, block = row + rows_each, block + CHANGED_BLOCKS
        return tuple(packed)

    def _pack_scores(self, plan: StepPlan, piece: PromptScore) -> PackedScores:
        first = int(plan.chunks.lens[: piece.chunk].sum())
        num_targets = len(piece.target_ids)
        shape = -(-num_targets // SCORE_ROWS), SCORE_ROWS
        rows, targets = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        rows.reshape(-1)[:num_targets] = first + np.arange(num_targets)
        targets.reshape(-1)[:num_targets] = piece.target_ids
        return PackedScores(rows, targets, min(MAX_LOGPROBS, self._vocab_size) if piece.num_logprobs else 0)


def copy_waves(copies: Sequence[BlockCopy]) -> list[list[BlockCopy]]:
    """Split copies into waves: no block is a source and a destination in one, and each is read before it is written.

    A block may be both: one that was copied and then freed may be the destination of the next copy. Mostly there is
    one wave.
    """
    left, waves = list(copies), []
    while left:
        still_read = {copy.src for copy in left}
        waves.append([copy for copy in left if copy.dst not in still_read])
        assert waves[-1], f"copies in a circle: {left}"
        left = [copy for copy in left if copy.dst in still_read]
    return waves


def _num_sample_rows(plan: StepPlan, bucket: Bucket, buckets: Sequence[Bucket]) -> int:
    """Rows of logits: as few as compiled for, where a chunk of a prompt brings one or none."""
    if bucket.is_decode:
        return bucket.num_rows
    return min(bucket.num_rows for bucket in buckets if bucket.num_rows >= len(plan.draws.rows))


def _pack_beams(beams: tuple[BeamSelect, ...], first_row: int, bucket: Bucket) -> PackedBeams:
    inputs = make_beam_inputs(beams, first_row=first_row, num_rows=bucket.num_rows)
    return PackedBeams(pack_beam_inputs(inputs), num_candidates_of(beams), len(inputs.bias_rows))
