"""The batch in steady decode, when all that runs draws token after token and a step changes nothing but counters."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import compress
from typing import Self

import numpy as np
from jaxtyping import Bool, Int32

from jpaged.contract.plan import Decoder, Decodes
from jpaged.host.blocks.manager import BlockManager
from jpaged.host.sequence import Sequence, SequenceGroup, SequenceState


@dataclass(frozen=True, slots=True, eq=False)
class DecodeBatch:
    """All sequences that run, each with a last token that the plan under way brings, and that it feeds next.

    Args:
        seqs: the sequences.
        decoders: what plans tell of them.
        rows: [sequences] int32, the sample of each in the plan under way.
        positions: [sequences] int32, tokens of each, those pending counted: where the next will sit.
        limits: [sequences] int32, tokens at which each ends.
        can_burst: [sequences] bool, whether the host need not see each token before the next is drawn.
    """

    seqs: list[Sequence]
    decoders: list[Decoder]
    rows: Int32[np.ndarray, " sequences"]
    positions: Int32[np.ndarray, " sequences"]
    limits: Int32[np.ndarray, " sequences"]
    can_burst: Bool[np.ndarray, " sequences"]

    @classmethod
    def find(cls, running: Iterable[SequenceGroup], blocks: BlockManager) -> Self | None:
        """All that runs, while one plan is under way; None if somebody has something else to do than to decode."""
        members: list[tuple[SequenceGroup, Sequence]] = []
        for group in running:
            if not group.is_steady:
                return None
            for seq in group.sequences:
                if seq.state is SequenceState.RUNNING and seq.num_pending > 0:
                    members.append((group, seq))
                elif not seq.is_finished:
                    return None
        return cls(
            seqs=[seq for _, seq in members],
            decoders=[
                Decoder(seq.seq_id, seq.prompt_len, seq.seed, group.request.params, blocks.block_table(seq.seq_id))
                for group, seq in members
            ],
            rows=np.array([seq.pending_row for _, seq in members], np.int32),
            positions=np.array([seq.num_tokens for _, seq in members], np.int32),
            limits=np.array([seq.prompt_len + group.max_tokens for group, seq in members], np.int32),
            can_burst=np.array([not group.request.params.stop_strings for group, _ in members], bool),
        )

    def those_that_go_on(self) -> Self:
        """Without those that have ended, and those whose last token is under way."""
        is_running = np.array([seq.state is SequenceState.RUNNING for seq in self.seqs], bool)
        goes_on = (self.positions < self.limits) & is_running
        if goes_on.all():
            return self
        return replace(
            self,
            seqs=list(compress(self.seqs, goes_on)),
            decoders=list(compress(self.decoders, goes_on)),
            rows=self.rows[goes_on],
            positions=self.positions[goes_on],
            limits=self.limits[goes_on],
            can_burst=self.can_burst[goes_on],
        )

    def num_draws(self, max_burst: int) -> Int32[np.ndarray, " sequences"]:
        """Tokens that each draws next: one, or in a burst as many as ``max_burst``, but none after its last."""
        return np.minimum(self.limits - self.positions, max_burst if self.can_burst.all() else 1)

    def draw(self, num_draws: Int32[np.ndarray, " sequences"]) -> tuple[Self, Decodes]:
        """Plan the next tokens of all. Returns the batch once the plan that does so is under way, and what it does."""
        for row, (seq, num_tokens) in enumerate(zip(self.seqs, num_draws.tolist(), strict=True)):
            seq.num_computed += num_tokens
            seq.num_pending += num_tokens
            seq.pending_row = row
        rows = np.arange(len(self.seqs), dtype=np.int32)
        decodes = Decodes(self.decoders, self.rows, self.positions, num_draws)
        return replace(self, rows=rows, positions=self.positions + num_draws), decodes
