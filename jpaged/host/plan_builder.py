"""A StepPlan under construction: chunks, and what their logits are read for."""

from collections import defaultdict

from jpaged.contract.plan import BeamSelect, BlockCopy, Chunk, PromptScore, Sample, StepPlan
from jpaged.host.sequence import Sequence, SequenceGroup, SequenceState


class PlanBuilder:
    """Collects one step.

    Args:
        budget: tokens that may still be added; goes down.
        copies: those already decided; the scheduler adds more.
    """

    def __init__(self, budget: int, copies: list[BlockCopy]):
        self.budget = budget
        self.copies = copies
        self._chunks: list[Chunk] = []
        self._samples: list[Sample] = []
        self._prompt_scores: list[PromptScore] = []
        self._beams: defaultdict[SequenceGroup, list[int]] = defaultdict(list)

    def add(self, group: SequenceGroup, seq: Sequence, num_tokens: int, block_table: list[int]) -> None:
        """Compute the next tokens of ``seq``, as many as the budget allows, with what follows from their logits."""
        start, num_known, total = seq.num_computed, len(seq.token_ids), seq.num_tokens
        stop = start + min(num_tokens, self.budget)
        index = len(self._chunks)
        # A token that is pending is fed alone: all before it have been computed.
        token_ids = [~seq.pending_row] if start >= num_known else seq.token_ids[start:stop]
        self._chunks.append(Chunk(seq.seq_id, token_ids, start, seq.prompt_len, block_table))
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

    def _draw(self, group: SequenceGroup, seq: Sequence, chunk: int) -> None:
        """Draw the next token of ``seq`` from the logits of a chunk."""
        params = group.request.params
        history = (group.request.prompt_token_ids, seq.output_token_ids) if params.has_penalties else ((), ())
        position, row = seq.num_tokens, len(self._samples)
        banned = _banned(group, seq)
        self._samples.append(Sample(seq.seq_id, chunk, position, seq.seed, params, banned, *history))
        seq.pending_row = row
        seq.num_pending += 1

    def build(self, to_host: tuple[BlockCopy, ...], from_host: tuple[BlockCopy, ...]) -> StepPlan:
        return StepPlan(
            copies=tuple(self.copies),
            chunks=tuple(self._chunks),
            samples=tuple(self._samples),
            prompt_scores=tuple(self._prompt_scores),
            beams=tuple(_select(group, chunks) for group, chunks in self._beams.items()),
            to_host=to_host,
            from_host=from_host,
        )


def _select(group: SequenceGroup, chunks: list[int]) -> BeamSelect:
    beam = group.beam
    assert beam is not None
    assert len(chunks) == len(beam.scores), "every live beam feeds its last token in this step"
    return BeamSelect(tuple(chunks), tuple(beam.scores), beam.num_candidates, _banned(group, group.sequences[0]))


def _banned(group: SequenceGroup, seq: Sequence) -> tuple[int, ...]:
    min_tokens = group.request.params.min_tokens
    is_early = min_tokens > 0 and seq.num_tokens - seq.prompt_len < min_tokens
    return tuple(group.stop_token_ids) if is_early else ()
