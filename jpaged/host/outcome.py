"""The outcome of a step: publishes its blocks, appends its tokens, forks, moves beams on, ends sequences."""

import math

import numpy as np
from jaxtyping import Bool, Int32

from jpaged.contract.plan import StepPlan
from jpaged.contract.result import BeamCandidates, StepResult, TokenScores
from jpaged.host.blocks.manager import BlockManager
from jpaged.host.growth import Growth
from jpaged.host.line import Line
from jpaged.host.pins import Pins
from jpaged.host.roster import Roster
from jpaged.host.rows import RowTable
from jpaged.host.sequence import Sequence, SequenceGroup, SequenceState
from jpaged.request import ErrorCause, FinishReason


class Outcome:
    """Applies the results of a step to sequences, blocks and queues.

    Args:
        blocks: the bookkeeping of the pools.
        roster: the unfinished requests.
        line: the groups that wait and run.
        pins: the pinned prefixes.
        rows: the rows of the running sequences.
        growth: learns from the sequences that end.
    """

    def __init__(
        self, blocks: BlockManager, roster: Roster, line: Line, pins: Pins, rows: RowTable, growth: Growth
    ) -> None:
        self.num_output_tokens = 0
        """Tokens drawn since the start; a beam search counts one for each live beam and step."""
        self._blocks = blocks
        self._roster = roster
        self._line = line
        self._pins = pins
        self._rows = rows
        self._growth = growth

    # Sequences ----------------------------------------------------------------------------------------------------

    def finish(self, group: SequenceGroup, seq: Sequence, reason: FinishReason) -> None:
        """End one sequence and free its blocks; the group ends with its last sequence.

        If the sequence has already finished (its last token also completed a stop string), only the reason changes.
        """
        seq.finish_reason = reason
        if seq.state is SequenceState.FINISHED:
            return
        self._growth.note_end(group, reason)
        self.release(seq, is_trusted=reason is not FinishReason.ERROR)
        seq.state = SequenceState.FINISHED
        self._roster.remove_sequence(seq)
        if group.is_finished:
            self._leave(group)

    def stop_at(self, group: SequenceGroup, seq: Sequence, num_outputs: int) -> None:
        """End a sequence at a token that it has: a stop string is complete there. Tokens drawn after it are dropped."""
        num_surplus = seq.num_outputs - num_outputs
        self.finish(group, seq, FinishReason.STOP)
        if num_surplus > 0:
            seq.cut(num_outputs)
            self.num_output_tokens -= num_surplus

    def _fail(self, group: SequenceGroup, error: ErrorCause) -> None:
        """End all unfinished sequences of a group with an error."""
        group.error = error
        for seq in group.unfinished:
            self.finish(group, seq, FinishReason.ERROR)

    def release(self, seq: Sequence, *, is_trusted: bool = True) -> None:
        """Free the row and the blocks of a sequence, if it has any.

        The prefix cache keeps the content of the blocks if it is trusted.
        """
        self._rows.leave(seq)
        if seq.state is SequenceState.RUNNING and is_trusted:
            self.publish(seq, include_partial=True)
        if seq.state.holds_blocks:
            self._blocks.free(seq.seq_id)

    def publish(self, seq: Sequence, *, include_partial: bool = False) -> None:
        """Enter the known blocks of a running sequence into the prefix cache."""
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

    def settle_chunks(self, plan: StepPlan) -> None:
        """Publish the blocks that chunks filled; fork the groups, and settle the pins, that waited for their last.

        Steady rows are left out: they publish once their tokens are known.
        """
        chunks = plan.chunks
        is_due = ~self._rows.is_steady[chunks.rows] & self._rows.owned(chunks.rows, chunks.seq_ids)
        block_size = self._blocks.block_size
        columns = chunks.rows[is_due], chunks.starts[is_due], chunks.stops[is_due]
        for row, start, stop in zip(*[column.tolist() for column in columns], strict=True):
            group, seq = self._rows.member(row)
            if stop // block_size > start // block_size:
                self.publish(seq)
            if stop == group.fork_at:
                self._fork_siblings(group, seq)
            if group.is_pin and stop == seq.prompt_len:
                self._settle_pin(group, seq)

    def note_decoded(self, plan: StepPlan) -> None:
        """Note the steady rows that filled a block: ``publish_due`` publishes them before anything is looked up."""
        chunks, block_size = plan.chunks, self._blocks.block_size
        stops = chunks.starts + (chunks.lens if plan.num_steps == 1 else plan.draws.num_tokens)
        is_filled = stops // block_size > chunks.starts // block_size
        if is_filled.any():
            rows, seq_ids = chunks.rows[is_filled], chunks.seq_ids[is_filled]
            self._rows.is_due[rows] |= self._rows.is_steady[rows] & self._rows.owned(rows, seq_ids)

    def publish_due(self) -> None:
        """Publish the blocks that steady rows filled since the last call."""
        for row in np.flatnonzero(self._rows.is_due).tolist():
            self.publish(self._rows.member(row)[1])
        self._rows.is_due[:] = False

    def _fork_siblings(self, group: SequenceGroup, leader: Sequence) -> None:
        """Let every sibling share the blocks of the shared tokens, now in the pool (PagedAttention, section 4.4)."""
        for seq in group.unfinished:
            if seq.state is SequenceState.UNFORKED:
                self._blocks.fork(leader.seq_id, seq.seq_id)
                seq.state, seq.num_computed = SequenceState.RUNNING, leader.num_computed
                self._rows.hold(seq)
        group.fork_at = None
        for seq in group.running:
            if seq.num_pending > 0:
                self._rows.join(seq)

    def _settle_pin(self, group: SequenceGroup, seq: Sequence) -> None:
        """Hold the very blocks that the prefix cache finds: another sequence may have published equal ones first."""
        self.release(seq)
        match = self._blocks.match_prefix(seq.hashed)
        is_plain, block_size = self._blocks.groups.is_plain, self._blocks.block_size
        assert match.num_tokens == (seq.prompt_len if is_plain else seq.prompt_len // block_size * block_size)
        assert not match.is_on_host
        self._blocks.reserve(seq.seq_id, match.num_tokens, match=match, is_query=False)
        self._roster.remove_sequence(seq)
        self._leave(group)
        self._pins.hold(group)

    # Tokens -------------------------------------------------------------------------------------------------------

    def take_prompt_scores(self, plan: StepPlan, result: StepResult) -> list[SequenceGroup]:
        """Give each group the scores of its prompt tokens. Returns the groups that end, as their scores are wrong."""
        ended: list[SequenceGroup] = []
        for score, piece in zip(plan.prompt_scores, result.prompt_scores, strict=True):
            member = self._roster.sequences.get(int(plan.chunks.seq_ids[score.chunk]))
            if member is None:
                continue
            group, _ = member
            if np.isnan(piece.logprobs).any():
                self._fail(group, ErrorCause.NOT_FINITE)
                ended.append(group)
            else:
                group.prompt_scores.append(piece)
        return ended

    def take_tokens(self, plan: StepPlan, result: StepResult) -> list[SequenceGroup]:
        """Append the drawn tokens, and end the sequences that are complete.

        Returns:
            The group of each sequence that gained tokens, in plan order.
        """
        draws, table = plan.draws, self._rows
        steps = [(result.token_ids, result.scores), *result.later]
        token_ids = np.stack([drawn for drawn, _ in steps])
        rows, num_draws, is_owned = draws.rows, draws.num_tokens, table.owned(draws.rows, draws.seq_ids)
        is_steady = is_owned if table.num_restless == 0 else is_owned & table.is_steady[rows]
        num_steady = np.count_nonzero(is_steady)
        touched = table.groups_of(rows if num_steady == len(rows) else rows[is_owned])
        is_left = is_owned  # rows whose tokens are for the sequences themselves
        if num_steady > 0:
            scores = [of_step for _, of_step in steps]
            if num_steady == len(rows):
                is_left = table.take(rows, num_draws, token_ids, scores, np.arange(num_steady))
            else:
                steady = np.flatnonzero(is_steady)
                is_left = is_owned & ~is_steady
                is_left[steady] = table.take(rows[steady], num_draws[steady], token_ids[:, steady], scores, steady)
        self.num_output_tokens += int(num_draws[is_owned].sum())
        is_taken = is_owned & ~is_left
        self._growth.note_draws(rows[is_taken], num_draws[is_taken])
        if is_left.any():
            self._take_left(plan, token_ids, [scores for _, scores in steps], is_left)
        return touched

    def _take_left(
        self,
        plan: StepPlan,
        token_ids: Int32[np.ndarray, "steps draws"],
        scores: list[TokenScores],
        is_left: Bool[np.ndarray, " draws"],
    ) -> None:
        """Append the tokens of some draws one by one, up to the token that ends the sequence."""
        for draw in np.flatnonzero(is_left).tolist():
            row, num_draws = int(plan.draws.rows[draw]), int(plan.draws.num_tokens[draw])
            if self._rows.seq_ids[row] != plan.draws.seq_ids[draw]:  # its group failed just now
                self.num_output_tokens -= num_draws
                continue
            group, seq = self._rows.member(row)
            drawn = token_ids[:num_draws, draw].tolist()
            is_wrong = any(math.isnan(step.logprobs[draw]) for step in scores[:num_draws])
            self._rows.hand_over(seq, num_draws)
            for number, (token_id, step_scores) in enumerate(zip(drawn, scores, strict=False), 1):
                if is_wrong and math.isnan(step_scores.logprobs[draw]):
                    self.num_output_tokens -= num_draws - number + 1
                    self._fail(group, ErrorCause.NOT_FINITE)
                    break
                seq.append([token_id], step_scores, range(draw, draw + 1))
                self._growth.note_draw(group)
                num_outputs = seq.num_outputs
                is_stop = token_id in group.stop_token_ids and num_outputs > group.request.params.min_tokens
                if is_stop or num_outputs >= group.max_tokens:
                    self.num_output_tokens -= num_draws - number
                    self.finish(group, seq, FinishReason.STOP if is_stop else FinishReason.LENGTH)
                    break
            else:
                self._rows.join(seq)

    # Beams --------------------------------------------------------------------------------------------------------

    def take_beams(self, plan: StepPlan, result: StepResult) -> list[SequenceGroup]:
        """Move searches on. Returns their groups, without those that have ended."""
        sequences, chunk_seq_ids = self._roster.sequences, plan.chunks.seq_ids
        touched: list[SequenceGroup] = []
        for select, candidates in zip(plan.beams, result.beams, strict=True):
            members = [sequences.get(int(chunk_seq_ids[chunk])) for chunk in select.chunks]
            live = [member[1] for member in members if member is not None]
            if members[0] is None:
                continue
            assert len(live) == len(members), "beams end together"
            self._advance_beams(members[0][0], live, candidates)
            touched.append(members[0][0])
        return touched

    def _advance_beams(self, group: SequenceGroup, live: list[Sequence], candidates: BeamCandidates) -> None:
        """Fork, continue and free beams (PagedAttention, section 4.4): no block moves until two children write."""
        search = group.beam
        assert search is not None
        outputs, scores = [seq.output_token_ids for seq in live], search.scores
        is_wrong = math.isnan(candidates.scores[0])  # all of them are NaN, or none
        self.num_output_tokens += 0 if is_wrong else len(live)
        continuations = [] if is_wrong else search.advance(outputs, candidates)
        if is_wrong or not (continuations or search.finished):
            group.error = ErrorCause.NOT_FINITE if is_wrong else ErrorCause.NO_CONTINUATION
            search.give_up(outputs, scores)
        group.sequences = []
        kept = {live[beam.parent].seq_id for beam in continuations}
        ended = [seq for seq in live if seq.seq_id not in kept]
        for beam in continuations:
            child = parent = live[beam.parent]
            if parent.seq_id in kept:
                kept.remove(parent.seq_id)
                group.sequences.append(parent)
            else:
                child = self._fork_beam(group, parent, ended)
            child.token_ids.append(beam.token_id)
            child.cumulative_logprob = beam.cumulative_logprob
        for seq in ended:
            self._rows.leave(seq)
            self._blocks.free(seq.seq_id)
            self._roster.remove_sequence(seq)
        if not continuations:
            self._end_search(group)

    def _fork_beam(self, group: SequenceGroup, parent: Sequence, ended: list[Sequence]) -> Sequence:
        """Append a beam that continues another one: one that ended, whose row and shared blocks stay, or a new one."""
        if ended:
            child = ended.pop()
            child.follow(parent)
            group.sequences.append(child)
            self._blocks.fork(parent.seq_id, child.seq_id, is_new=False)
        else:
            child = self._roster.fork_sequence(group, parent)
            self._blocks.fork(parent.seq_id, child.seq_id)
            child.state = SequenceState.RUNNING
            self._rows.enter(group, child)
        self._rows.hold(child)
        return child

    def _end_search(self, group: SequenceGroup) -> None:
        """Replace the live sequences of a search by its results."""
        assert group.beam is not None
        for index, hypothesis in enumerate(group.beam.finished[: group.request.params.n]):
            token_ids = [*group.request.prompt_token_ids, *hypothesis.token_ids]
            seq = self._roster.new_sequence(group, index, token_ids)
            seq.state, seq.finish_reason = SequenceState.FINISHED, hypothesis.finish_reason
            seq.cumulative_logprob, seq.score = hypothesis.cumulative_logprob, hypothesis.score
        self._leave(group)
