"""A StepPlan under construction: chunks, and what their logits are read for."""

import struct
from collections import defaultdict

import numpy as np
from jaxtyping import Int32

from jpaged.contract.draws import Draws, next_banned
from jpaged.contract.plan import NO_CHUNKS, BeamSelect, BlockCopy, Chunks, PromptScore, StepPlan
from jpaged.contract.rows import ON_DEVICE
from jpaged.host.rows import NO_DECODES, Decodes, RowTable
from jpaged.host.sequence import Sequence, SequenceGroup, SequenceState
from jpaged.host.shared_prefix import SharedPrefix


class PlanBuilder:
    """Collects one step: first what steady rows decode, then chunks one by one.

    Args:
        rows: the rows of the running sequences.
        shared_prefix: finds what the steady rows share.
        budget: tokens that may still be added; goes down.
        copies: the copies decided so far; the scheduler adds more.
        unit: a chunk that leaves some of its tokens to later steps ends at a multiple of this many tokens.
    """

    def __init__(
        self, rows: RowTable, shared_prefix: SharedPrefix, budget: int, copies: list[BlockCopy], unit: int = 1
    ):
        self.budget = budget
        self._unit = unit
        self.copies = copies
        self._rows = rows
        self._shared_prefix = shared_prefix
        self._decodes = NO_DECODES
        self._positions: Int32[np.ndarray, " decodes"] = NO_CHUNKS.rows
        self._num_draws: Int32[np.ndarray, " decodes"] = NO_CHUNKS.rows
        self._needs_tokens = False
        self._chunks: list[tuple[int, int, int, int]] = []  # row, sequence, start, length
        self._token_ids: list[int] = []
        self._draws: list[tuple[int, int, int]] = []  # row, sequence, chunk
        self._prompt_scores: list[PromptScore] = []
        self._beams: defaultdict[SequenceGroup, list[int]] = defaultdict(list)

    @property
    def num_tokens(self) -> int:
        """Tokens that the plan computes so far."""
        return len(self._num_draws) + len(self._token_ids)

    @property
    def has_budget(self) -> bool:
        """Whether the budget allows a chunk of any prompt."""
        return self.budget >= self._unit

    def decode(self, decodes: Decodes, num_draws: Int32[np.ndarray, " decodes"]) -> None:
        """Let steady rows feed their newest token and draw; called once, before anything is added.

        Args:
            decodes: the rows.
            num_draws: tokens that each draws.
        """
        if len(num_draws) == 0:
            return
        self._decodes, self._num_draws = decodes, num_draws
        self._positions = self._rows.draw(decodes, num_draws)
        self.budget -= len(num_draws)

    def add(self, group: SequenceGroup, seq: Sequence, num_tokens: int) -> None:
        """Compute the next tokens of ``seq``, as many as the budget allows, with what follows from their logits."""
        start, total = seq.num_computed, seq.num_tokens
        stop = start + num_tokens
        if num_tokens > self.budget:
            stop = (start + self.budget) // self._unit * self._unit
        index = len(self._num_draws) + len(self._chunks)
        assert seq.row is not None
        self._chunks.append((seq.row, seq.seq_id, start, stop - start))
        # A pending token is fed alone: all before it have been computed.
        self._token_ids += seq.token_ids[start:stop] or [ON_DEVICE]
        self.budget -= stop - start
        seq.num_computed = stop
        if start < seq.prompt_len - 1 and group.needs_prompt_scores:
            targets = seq.token_ids[start + 1 : min(stop + 1, seq.prompt_len)]
            self._prompt_scores.append(PromptScore(index, targets, group.request.params.prompt_logprobs or 0))
        if stop < total or group.is_pin:
            return
        if group.beam is not None:
            self._beams[group].append(index)
            return
        self._draw(group, seq, index)
        if total == seq.prompt_len:  # a prompt just finished serves its unforked siblings too: they have no token yet
            for other in group.sequences:
                if other.state is SequenceState.UNFORKED:
                    self._draw(group, other, index)
        self._rows.join(seq)

    def _draw(self, group: SequenceGroup, seq: Sequence, chunk: int) -> None:
        """Draw the next token of ``seq`` from the logits of a chunk."""
        assert seq.row is not None
        if sequences := group.request.banned_sequences:
            self._needs_tokens = True
            self._rows.adjustments.ban_now(seq.row, next_banned(sequences, seq.output_token_ids))
        self._draws.append((seq.row, seq.seq_id, chunk))
        seq.num_pending += 1

    def build(self, to_host: tuple[BlockCopy, ...], from_host: tuple[BlockCopy, ...]) -> StepPlan:
        """The plan. One without chunks leaves changed rows to the next."""
        copies = tuple(self.copies)
        if len(self._num_draws) == 0 and not self._chunks:
            return StepPlan(copies=copies, to_host=to_host, from_host=from_host)
        return StepPlan(
            copies=copies,
            to_host=to_host,
            from_host=from_host,
            changes=self._rows.take_changes(),
            adjustments=self._rows.adjustments.take(),
            chunks=self._build_chunks(),
            draws=self._build_draws(),
            prompt_scores=tuple(self._prompt_scores),
            beams=tuple([_select(group, chunks) for group, chunks in self._beams.items()]),
            num_steps=int(self._num_draws.max(initial=1)),
            shared_lens=None if self._chunks else self._shared_prefix.lens(self._decodes, self._positions),
        )

    def _build_chunks(self) -> Chunks:
        num_decodes = len(self._num_draws)
        token_ids = np.full(num_decodes + len(self._token_ids), ON_DEVICE, np.int32)
        decodes = self._decodes.rows, self._decodes.seq_ids, self._positions - 1, np.ones(num_decodes, np.int32)
        if not self._chunks:
            return Chunks(*decodes, token_ids)
        # An assignment of the list would take three times as long.
        token_ids[num_decodes:] = np.frombuffer(struct.pack(f"{len(self._token_ids)}i", *self._token_ids), np.int32)
        added = np.array(self._chunks, np.int64).T
        columns = zip(decodes, added, strict=True)
        rows, seq_ids, starts, lens = [
            np.concatenate([decoding, column.astype(decoding.dtype)]) for decoding, column in columns
        ]
        return Chunks(rows, seq_ids, starts, lens, token_ids)

    def _build_draws(self) -> Draws:
        rows, seq_ids, num_tokens = self._decodes.rows, self._decodes.seq_ids, self._num_draws
        chunks = np.arange(len(rows), dtype=np.int32)
        if not self._draws:
            return Draws(rows, seq_ids, chunks, num_tokens, self._decodes.num_logprobs, self._decodes.is_adjusted)
        added = np.array(self._draws, np.int64).T
        rows = np.concatenate([rows, added[0].astype(np.int32)])
        chunks = np.concatenate([chunks, added[2].astype(np.int32)])
        seq_ids = np.concatenate([seq_ids, added[1]])
        num_tokens = np.concatenate([num_tokens, np.ones(len(self._draws), np.int32)])
        is_adjusted = bool(self._rows.is_adjusted[rows].any())
        num_logprobs = self._rows.num_logprobs(rows)
        return Draws(rows, seq_ids, chunks, num_tokens, num_logprobs, is_adjusted, self._needs_tokens)


def _select(group: SequenceGroup, chunks: list[int]) -> BeamSelect:
    beam = group.beam
    assert beam is not None
    assert len(chunks) == len(beam.scores), "every live beam feeds its last token in this step"
    return BeamSelect(tuple(chunks), tuple(beam.scores), beam.num_candidates, _banned(group, group.sequences[0]))


def _banned(group: SequenceGroup, seq: Sequence) -> tuple[int, ...]:
    min_tokens = group.request.params.min_tokens
    is_early = min_tokens > 0 and seq.num_tokens - seq.prompt_len < min_tokens
    return tuple(group.stop_token_ids) if is_early else ()
