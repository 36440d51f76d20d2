"""The outcome of a step: publishes its blocks, appends its tokens, forks, moves beams on, ends sequences."""

from collections.abc import Iterable

import numpy as np

from jpaged.contract.plan import BeamCandidates, Chunk, Decodes, StepPlan, StepResult
from jpaged.host.blocks.manager import BlockManager
from jpaged.host.line import Line
from jpaged.host.pins import Pins
from jpaged.host.roster import Roster
from jpaged.host.sequence import Sequence, SequenceGroup, SequenceState
from jpaged.request import FinishReason


class Outcome:
    """Applies the results of a step to sequences, blocks and queues.

    Args:
        blocks: the bookkeeping of the pools.
        roster: the unfinished requests.
        line: the groups that wait and run.
        pins: the pinned prefixes.
    """

    def __init__(self, blocks: BlockManager, roster: Roster, line: Line, pins: Pins) -> None:
        self.num_output_tokens = 0
        """Tokens drawn since the start; a beam search counts one for each live beam and step."""
        self._blocks = blocks
        self._roster = roster
        self._line = line
        self._pins = pins

    # Sequences ----------------------------------------------------------------------------------------------------

    def finish(self, group: SequenceGroup, seq: Sequence, reason: FinishReason) -> None:
        """End one sequence and free its blocks; the group ends with its last sequence.

        If the sequence has already finished (its last token also completed a stop string), only the reason changes.
        """
        seq.finish_reason = reason
        if seq.is_finished:
            return
        self.release(seq)
        seq.state = SequenceState.FINISHED
        self._roster.remove_sequence(seq)
        if group.is_finished:
            self._leave(group)

    def release(self, seq: Sequence, *, is_trusted: bool = True) -> None:
        """Free the blocks of a sequence, if it holds any. The prefix cache keeps their content if it is trusted."""
        if seq.state is SequenceState.RUNNING and is_trusted:
            self._publish(seq, include_partial=True)
        if seq.state.holds_blocks:
            self._blocks.free(seq.seq_id)

    def _publish(self, seq: Sequence, *, include_partial: bool = False) -> None:
        self._blocks.publish(seq.seq_id, seq.hashed, seq.num_known, include_partial=include_partial)

    def _leave(self, group: SequenceGroup) -> None:
        """Take a group that has finished, or is pinned, out of the roster and the line."""
        self._roster.remove(group)
        self._line.leave(group)

    def publish_planned(self, seq: Sequence, start: int) -> None:
        """Publish the blocks that the plan under construction fills with known tokens, from token ``start`` on.

        Plans run in order: the next plan may read these blocks.
        """
        block_size, stop = self._blocks.block_size, seq.num_computed
        if stop <= len(seq.token_ids) and stop // block_size > start // block_size:
            self._blocks.publish(seq.seq_id, seq.hashed, stop, is_filling=True)

    # Chunks -------------------------------------------------------------------------------------------------------

    def settle_chunks(self, chunks: Iterable[Chunk]) -> None:
        """Publish the blocks that chunks filled; fork the groups, and settle the pins, that waited for their last."""
        block_size, sequences = self._blocks.block_size, self._roster.sequences
        for chunk in chunks:
            if (member := sequences.get(chunk.seq_id)) is None:
                continue  # ended since this was planned
            group, seq = member
            stop = chunk.stop
            if stop // block_size > chunk.start // block_size:
                self._publish(seq)
            if stop == group.fork_at:
                self._fork_siblings(group, seq)
            if group.is_pin and stop == seq.prompt_len:
                self._settle_pin(group, seq)

    def publish_drawn(self, decodes: Decodes) -> None:
        """Publish the blocks that decodes filled."""
        block_size, starts = self._blocks.block_size, decodes.positions - 1
        is_filled = (starts + decodes.num_draws) // block_size > starts // block_size
        for row in np.flatnonzero(is_filled).tolist():
            member = self._roster.sequences.get(decodes.decoders[row].seq_id)
            if member is not None:
                self._publish(member[1])

    def _fork_siblings(self, group: SequenceGroup, leader: Sequence) -> None:
        """Let every sibling share the blocks of the shared tokens, now in the pool (PagedAttention, section 4.4)."""
        for seq in group.unfinished:
            if seq.state is SequenceState.UNFORKED:
                self._blocks.fork(leader.seq_id, seq.seq_id)
                seq.state, seq.num_computed = SequenceState.RUNNING, leader.num_computed
        group.fork_at = None

    def _settle_pin(self, group: SequenceGroup, seq: Sequence) -> None:
        """Hold the very blocks that the prefix cache finds: another sequence may have published equal ones first."""
        self.release(seq)
        match = self._blocks.match_prefix(seq.hashed)
        assert match.num_tokens == seq.prompt_len
        assert not match.is_on_host
        self._blocks.reserve(seq.seq_id, seq.prompt_len, match=match, is_query=False)
        self._roster.remove_sequence(seq)
        self._leave(group)
        self._pins.hold(group)

    # Tokens -------------------------------------------------------------------------------------------------------

    def take_tokens(self, plan: StepPlan, result: StepResult) -> list[SequenceGroup]:
        """Append the drawn tokens, and end the sequences that are complete.

        Returns:
            The group of each sequence that gained tokens, in plan order.
        """
        step_token_ids, scores = zip((result.token_ids, result.scores), *result.later, strict=True)
        drawn = np.stack(step_token_ids, axis=1).tolist()
        sequences = self._roster.sequences
        touched: list[SequenceGroup] = []
        num_taken = 0
        for row, (seq_id, num_draws, token_ids) in enumerate(zip(*plan.draws, drawn, strict=True)):
            if (member := sequences.get(seq_id)) is None:
                continue  # ended since this was planned
            group, seq = member
            touched.append(group)
            del token_ids[num_draws:]
            seq.num_pending -= num_draws
            seq.scores.append(scores)
            seq.score_rows.append(row)
            if (  # the common case, kept free of other work: no token is the last
                len(seq.token_ids) + num_draws < seq.prompt_len + group.max_tokens
                and group.stop_token_ids.isdisjoint(token_ids)
            ):
                seq.token_ids += token_ids
                num_taken += num_draws
            else:
                self._take_last(group, seq, token_ids)
        self.num_output_tokens += num_taken
        return touched

    def _take_last(self, group: SequenceGroup, seq: Sequence, token_ids: list[int]) -> None:
        """Append drawn tokens up to the one that ends the sequence, if there is one."""
        for token_id in token_ids:
            seq.token_ids.append(token_id)
            self.num_output_tokens += 1
            if token_id in group.stop_token_ids and seq.num_outputs > group.request.params.min_tokens:
                return self.finish(group, seq, FinishReason.STOP)
            if seq.num_outputs >= group.max_tokens:
                return self.finish(group, seq, FinishReason.LENGTH)

    # Beams --------------------------------------------------------------------------------------------------------

    def advance_beams(self, group: SequenceGroup, live: list[Sequence], candidates: BeamCandidates) -> None:
        """Fork, continue and free beams (PagedAttention, section 4.4): no block moves until two children write."""
        assert group.beam is not None
        self.num_output_tokens += len(live)
        continuations = group.beam.advance([seq.output_token_ids for seq in live], candidates)
        successors: list[Sequence] = []
        group.sequences = successors
        kept: set[int] = set()
        for beam in continuations:
            parent = live[beam.parent]
            if parent.seq_id in kept:
                child = self._roster.fork_sequence(group, parent)
                self._blocks.fork(parent.seq_id, child.seq_id)
                child.state = SequenceState.RUNNING
            else:
                kept.add(parent.seq_id)
                child = parent
                successors.append(child)
            child.token_ids.append(beam.token_id)
            child.cumulative_logprob = beam.cumulative_logprob
        for seq in live:
            if seq.seq_id not in kept:
                self._blocks.free(seq.seq_id)
                self._roster.remove_sequence(seq)
        if not continuations:
            self._end_search(group)

    def _end_search(self, group: SequenceGroup) -> None:
        """Replace the live sequences of a search by its results."""
        assert group.beam is not None
        for index, hypothesis in enumerate(group.beam.finished[: group.request.params.n]):
            token_ids = [*group.request.prompt_token_ids, *hypothesis.token_ids]
            seq = self._roster.new_sequence(group, index, token_ids)
            seq.state, seq.finish_reason = SequenceState.FINISHED, hypothesis.finish_reason
            seq.cumulative_logprob, seq.score = hypothesis.cumulative_logprob, hypothesis.score
        self._leave(group)
