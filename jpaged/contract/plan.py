"""The plan of one step: the host half makes it, the device half executes it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32, Int64

from jpaged.contract.adjustments import NO_ADJUSTMENTS, RowAdjustments
from jpaged.contract.draws import NO_DRAWS, Draws
from jpaged.contract.rows import NO_CHANGES, NO_INTS, RowChanges


class BlockCopy(NamedTuple):
    """Block ``dst`` becomes a copy of block ``src``, in the pools that the list of copies names."""

    src: int
    dst: int


@dataclass(frozen=True, slots=True, eq=False)
class Chunks:
    """Consecutive tokens of sequences to compute: a decode (one token) or a piece of a prompt each.

    Args:
        rows: row id of each chunk, all different.
        seq_ids: the sequence that has this row.
        starts: tokens of the sequence whose KV is already in the pool.
        lens: tokens to feed.
        token_ids: the tokens of all chunks, one chunk after the other; ``ON_DEVICE`` for a token drawn before.
    """

    rows: Int32[np.ndarray, " chunks"]
    seq_ids: Int64[np.ndarray, " chunks"]
    starts: Int32[np.ndarray, " chunks"]
    lens: Int32[np.ndarray, " chunks"]
    token_ids: Int32[np.ndarray, " tokens"]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def stops(self) -> Int32[np.ndarray, " chunks"]:
        """Tokens of each sequence whose KV is in the pool once the step has run."""
        return self.starts + self.lens


NO_CHUNKS = Chunks(NO_INTS, np.zeros(0, np.int64), NO_INTS, NO_INTS, NO_INTS)


@dataclass(frozen=True, slots=True, eq=False)
class Streamed:
    """Blocks on the host that the rows of a step attend to. The device streams them layer by layer into its window.

    A block table has ``host_cell(i)`` for the i-th streamed block of its row.

    Args:
        blocks: host blocks, those of one row side by side and in logical order.
        starts: index in ``blocks`` of the first block of each chunk's row, aligned with ``StepPlan.chunks``.
    """

    blocks: Int32[np.ndarray, " streamed"]
    starts: Int32[np.ndarray, " chunks"]


@dataclass(frozen=True, slots=True)
class BeamSelect:
    """Find the best continuations of one beam search: the top ``num_candidates`` of its beams x vocabulary.

    Args:
        chunks: indices into ``StepPlan.chunks``, one for each live beam: the last token's logits are read.
        scores: cumulative log-probability of each of these beams.
        num_candidates: how many continuations to return; 2 x width or more, so that enough of them go on.
        banned_token_ids: tokens that may not be chosen now (end-of-sequence before ``min_tokens``).
    """

    chunks: Sequence[int]
    scores: Sequence[float]
    num_candidates: int
    banned_token_ids: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class PromptScore:
    """Score the prompt tokens that follow each of the first ``len(target_ids)`` tokens of a chunk."""

    chunk: int
    target_ids: Sequence[int]
    num_logprobs: int


@dataclass(frozen=True, slots=True, eq=False)
class StepPlan:
    """One step of the device half, complete.

    Args:
        to_host: device block ``src`` to host block ``dst``, as it is before this step writes anything.
        from_host: host block ``src`` to device block ``dst``. The copies start before the forward pass and end after
            it: nothing else in this plan reads or writes these device blocks. They see what ``to_host`` of this plan
            stores; no host block is both read here and written there.
        copies: device to device (copy-on-write), after ``to_host`` and before the forward pass. All sources are read
            before any destination is written.
        changes: cells of the row table, entered before the forward pass. The table then covers all that chunks and
            further steps of a burst feed.
        adjustments: changes of the rows' adjustments, made after ``changes``.
        chunks: all in one ragged batch. May be empty when blocks move.
        draws: tokens to draw.
        prompt_scores: prompt tokens to score.
        beams: searches to continue.
        num_steps: more than one is a burst: steps in a row without the host. All chunks are decodes then, draw i
            reads chunk i, and nothing else is made of the logits.
        streamed: blocks on the host that the chunks attend to, as they are after ``to_host``; None if there are none.
            Such a plan is no burst.
        shared_lens: tokens at the front of each chunk's sequence that the device may read once for all of them: one
            number where block tables begin with the same blocks, which hold these tokens already, and 0 elsewhere.
            All chunks are decodes then. None if no sequences share enough.
    """

    copies: tuple[BlockCopy, ...] = ()
    changes: RowChanges = NO_CHANGES
    adjustments: RowAdjustments = NO_ADJUSTMENTS
    chunks: Chunks = NO_CHUNKS
    draws: Draws = NO_DRAWS
    prompt_scores: tuple[PromptScore, ...] = ()
    beams: tuple[BeamSelect, ...] = ()
    to_host: tuple[BlockCopy, ...] = ()
    from_host: tuple[BlockCopy, ...] = ()
    num_steps: int = 1
    streamed: Streamed | None = None
    shared_lens: Int32[np.ndarray, " chunks"] | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.chunks.token_ids)

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to do."""
        return not (len(self.chunks.rows) or self.copies or self.to_host or self.from_host)

    @property
    def can_be_followed(self) -> bool:
        """Whether the next step can be planned before this one's results are known.

        Bans of several words depend on the tokens drawn here, and a search chooses among its candidates. Blocks from
        the host can be used when the host says so. (To leave those sequences out of the next plan would split the batch
        in two that take turns.)
        """
        return not (self.beams or self.from_host or self.draws.needs_tokens)

    @property
    def num_logit_rows(self) -> int:
        """Rows of logits that the step reads: one for each draw, then one for each live beam, in plan order."""
        return len(self.draws.rows) + sum([len(beam.chunks) for beam in self.beams])
