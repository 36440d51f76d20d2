"""Tokens to results: detokenised text, deltas of streams, log-probabilities, ranked completions."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from time import monotonic
from typing import NamedTuple

from jpaged.engine.detokenizer import Detokenizer, TokenDecoder, Tokenizer
from jpaged.engine.logprobs import ScoredTokens
from jpaged.engine.token_texts import TokenTexts
from jpaged.host.scheduler import Scheduler
from jpaged.host.sequence import Sequence, SequenceGroup, SequenceState
from jpaged.request import (
    CompletionDelta,
    CompletionOutput,
    FinishReason,
    Request,
    RequestOutput,
    RequestTimes,
)
from jpaged.results import read_late


class FirstToken(NamedTuple):
    """The first token of a request. Times are of ``time.monotonic``.

    Args:
        request: the request.
        num_cached_tokens: prompt tokens from the prefix cache.
        arrived: when the request was made.
        first_scheduled: when its first step was planned.
    """

    request: Request
    num_cached_tokens: int
    arrived: float
    first_scheduled: float | None


@dataclass(frozen=True, slots=True)
class StepOutput:
    """Output of one step.

    Args:
        deltas: new tokens and text of each completion of a streamed request.
        finished: results of the requests that ended.
        failed: by request id, errors that ended requests whose text could not be made.
        started: by request id, the requests that got their first token.
        num_tokens: tokens that the step computed, those of prompts and those of decodes.
        num_steps: steps of the model that it took: several for a multi-step decode.
        seconds: time that the step took, if the engine thread made it.
    """

    deltas: list[CompletionDelta] = field(default_factory=list)
    finished: list[RequestOutput] = field(default_factory=list)
    failed: dict[str, Exception] = field(default_factory=dict)
    started: dict[str, FirstToken] = field(default_factory=dict)
    num_tokens: int = 0
    num_steps: int = 0
    seconds: float = 0.0

    @property
    def is_empty(self) -> bool:
        return not (self.deltas or self.finished or self.failed or self.started or self.num_tokens)


@dataclass(slots=True)
class _Progress:
    """Decoding state of one sequence.

    Args:
        detokenizer: the text so far; None without a tokenizer.
        num_tokens: tokens in deltas so far, the prompt counted in.
        num_characters: characters in deltas so far.
        is_ended: whether its end was read.
    """

    detokenizer: Detokenizer | None
    num_tokens: int
    num_characters: int = 0
    is_ended: bool = False


@dataclass(slots=True, eq=False)
class _Answer:
    """A request whose result was not made yet.

    Args:
        group: the sequences.
        is_streamed: whether deltas are wanted.
        is_ranked: whether the results are the best of more sequences: no delta can be told before all of them end.
        is_watched: whether tokens become text before the request ends, for deltas or to find stop strings.
        plain: the one sequence of a request whose deltas are tokens and their text, until it ends; None for others.
        arrived: when the request was made, of ``time.monotonic``.
        first_token: when the step of its first token had ended.
        progress: decoding state by sequence id.
    """

    group: SequenceGroup
    is_streamed: bool
    is_ranked: bool
    is_watched: bool
    plain: Sequence | None
    arrived: float
    first_token: float | None = None
    progress: dict[int, _Progress] = field(default_factory=dict)


class Outputs:
    """Owner of every request that has no result yet, from ``open`` until its result is made or it is dropped.

    An interrupted ``read`` loses nothing: the next one reads the same groups again.

    Args:
        tokenizer: makes text of token ids; None makes none.
        scheduler: told of sequences whose text met a stop string.
    """

    def __init__(self, tokenizer: Tokenizer | None, scheduler: Scheduler) -> None:
        self._decoder = None if tokenizer is None else TokenDecoder(tokenizer)
        self._scheduler = scheduler
        self.answers: dict[str, _Answer] = {}
        """The requests without a result, by id; written here alone."""
        self.unread: dict[str, _Answer] = {}  # the part of them that gained tokens
        self._output = StepOutput()  # not taken yet
        self._texts = None if tokenizer is None else TokenTexts(tokenizer)

    @property
    def groups(self) -> list[SequenceGroup]:
        """The sequences of the requests without a result."""
        return [answer.group for answer in self.answers.values()]

    def open(self, group: SequenceGroup, *, is_streamed: bool) -> None:
        """Expect tokens of a request."""
        params = group.request.params
        is_ranked = group.beam is not None or params.num_sequences > params.n
        is_watched = (is_streamed and not is_ranked) or (self._decoder is not None and bool(params.stop))
        is_plain = is_streamed and not is_ranked and params.logprobs is None and not params.stop
        plain = group.sequences[0] if is_plain and len(group.sequences) == 1 else None
        arrived = monotonic() if group.request.arrived is None else group.request.arrived
        self.answers[group.request.request_id] = _Answer(group, is_streamed, is_ranked, is_watched, plain, arrived)

    def drop(self, request_id: str) -> None:
        """Keep nothing of a request."""
        self.answers.pop(request_id, None)
        self.unread.pop(request_id, None)

    def take(self) -> StepOutput:
        """The output that was read and not taken before."""
        output, self._output = self._output, StepOutput()
        return output

    def note(self, groups: Iterable[SequenceGroup]) -> None:
        """Remember groups that gained tokens or ended, until they are read."""
        for group in groups:
            answer = self.answers.get(group.request.request_id)
            if answer is None:
                continue
            if answer.first_token is None:
                self._note_first_token(answer)
            if answer.is_watched or group.is_finished:
                self.unread[group.request.request_id] = answer

    def _note_first_token(self, answer: _Answer) -> None:
        group = answer.group
        if not any(seq.num_outputs for seq in group.sequences):
            return  # it ended without one
        answer.first_token = monotonic()
        first = FirstToken(group.request, group.num_cached_tokens or 0, answer.arrived, group.first_scheduled)
        self._output.started[group.request.request_id] = first

    def note_all(self) -> None:
        """Remember all groups: it is unknown which of them gained tokens."""
        self.unread |= self.answers

    def read(self) -> None:
        """Make text, deltas and results of the tokens that groups gained.

        A request whose text cannot be made ends with the tokenizer's error; the others go on.
        """
        for request_id, answer in list(self.unread.items()):
            try:
                if answer.plain is not None and self._read_plain(request_id, answer, answer.plain):
                    del self.unread[request_id]
                else:
                    self._read(request_id, answer)
            except Exception as error:
                self._scheduler.abort(request_id)
                self.drop(request_id)
                self._output.failed[request_id] = error

    def _read_plain(self, request_id: str, answer: _Answer, seq: Sequence) -> bool:
        """Make the delta of a plain request that goes on: most deltas are of this kind.

        Returns:
            False, without effect, if it ends, begins, or was interrupted.
        """
        progress = answer.progress.get(seq.seq_id)
        if progress is None or seq.state is SequenceState.FINISHED:
            return False
        detokenizer, text = progress.detokenizer, ""
        if detokenizer is not None and seq.prompt_len + detokenizer.num_tokens != progress.num_tokens:
            return False
        new_ids = seq.token_ids_from(progress.num_tokens)
        if not new_ids:
            return False
        if detokenizer is not None:
            detokenizer.extend(new_ids)
            text = detokenizer.text[progress.num_characters :]
        self._output.deltas.append(CompletionDelta(request_id, seq.index, text, new_ids))
        progress.num_characters += len(text)
        progress.num_tokens += len(new_ids)
        return True

    def _read(self, request_id: str, answer: _Answer) -> None:
        group, is_finished = answer.group, answer.group.is_finished
        if answer.is_watched:
            for seq in group.sequences:
                self._read_sequence(answer, seq, is_told=answer.is_streamed and not answer.is_ranked)
        if is_finished or (answer.is_watched and group.is_finished):  # a stop string may have ended it
            sequences = _returned(answer)
            result = self._result(answer, sequences)
            if answer.is_streamed and answer.is_ranked:
                self._output.deltas.extend(
                    CompletionDelta(
                        request_id,
                        o.index,
                        o.text,
                        o.token_ids,
                        o.finish_reason,
                        o.stop_reason,
                        self._scored(group, seq),
                        error=_error(group, o.finish_reason),
                    )
                    for o, seq in zip(result.outputs, sequences, strict=True)
                )
            self._output.finished.append(result)
            self.drop(request_id)
        else:
            del self.unread[request_id]

    def _read_sequence(self, answer: _Answer, seq: Sequence, *, is_told: bool) -> None:
        progress = answer.progress.get(seq.seq_id)
        if progress is None:
            progress = answer.progress[seq.seq_id] = _Progress(self._detokenizer(answer.group), seq.prompt_len)
        if progress.is_ended:
            return
        detokenizer = progress.detokenizer
        if detokenizer is not None:
            self._decode(answer.group, seq, detokenizer)
        is_finished = seq.is_finished
        if is_told:
            new_ids = seq.token_ids_from(progress.num_tokens)
            if new_ids or is_finished:
                end = 0 if detokenizer is None else detokenizer.num_decided(is_last=is_finished)
                text = "" if detokenizer is None else detokenizer.text[progress.num_characters : end]
                self._output.deltas.append(self._delta(answer.group, seq, progress, text, new_ids))
                progress.num_characters = max(progress.num_characters, end)
                progress.num_tokens += len(new_ids)
        progress.is_ended = is_finished

    def _delta(
        self, group: SequenceGroup, seq: Sequence, progress: _Progress, text: str, new_ids: list[int]
    ) -> CompletionDelta:
        request_id = group.request.request_id
        logprobs = self._scored(group, seq, progress.num_tokens - seq.prompt_len)
        if (reason := seq.finish_reason) is None:
            return CompletionDelta(request_id, seq.index, text, new_ids, None, None, logprobs)
        stop_reason = _stop_reason(group, seq, progress.detokenizer)
        return CompletionDelta(
            request_id, seq.index, text, new_ids, reason, stop_reason, logprobs, error=_error(group, reason)
        )

    def _scored(self, group: SequenceGroup, seq: Sequence, start: int = 0) -> ScoredTokens | None:
        """The log-probabilities of the output tokens from ``start`` on; None if none were asked for."""
        num_top = group.request.params.logprobs
        if num_top is None:
            return None
        return ScoredTokens(seq.token_ids[seq.prompt_len + start :], seq.scores_from(start), num_top, self._texts)

    def _detokenizer(self, group: SequenceGroup) -> Detokenizer | None:
        """A detokenizer for one sequence of a group; None without a tokenizer, or if no text is wanted."""
        request, params = group.request, group.request.params
        if self._decoder is None or not params.detokenize:
            return None
        return Detokenizer(
            self._decoder,
            request.prompt_token_ids,
            params.stop_strings,
            includes_stop=params.include_stop_str_in_output,
            skip_special_tokens=params.skip_special_tokens,
        )

    def _decode(self, group: SequenceGroup, seq: Sequence, detokenizer: Detokenizer) -> None:
        """Turn new tokens into text."""
        num_read, params = detokenizer.num_tokens, group.request.params
        new_ids = seq.token_ids_from(seq.prompt_len + num_read)
        is_stopped = seq.finish_reason is FinishReason.STOP and not params.include_stop_str_in_output
        if is_stopped and new_ids and new_ids[-1] in group.stop_token_ids:
            del new_ids[-1]  # a stop token ends the text and is no part of it
        if not params.stop:
            if new_ids:
                detokenizer.extend(new_ids)
        else:
            for number, token_id in enumerate(new_ids, num_read + 1):
                if detokenizer.append(token_id, may_stop=number >= params.min_tokens):
                    self._scheduler.outcome.stop_at(group, seq, number)
                    break
        if seq.finish_reason is not None:
            self._finish_text(group, seq, detokenizer)

    def _finish_text(self, group: SequenceGroup, seq: Sequence, detokenizer: Detokenizer) -> None:
        """Turn the rest of a sequence into text, in which a stop string may be complete."""
        params, special_stop = group.request.params, _special_stop(group, seq)
        is_hidden = special_stop is not None and params.skip_special_tokens
        is_complete = seq.finish_reason in (FinishReason.STOP, FinishReason.LENGTH)
        detokenizer.finish(
            may_stop=is_complete and bool(params.stop) and seq.num_outputs >= params.min_tokens,
            ending=special_stop or "" if is_hidden and params.include_stop_str_in_output else "",
        )
        if detokenizer.is_stopped:
            self._scheduler.finish(group, seq, FinishReason.STOP)

    # Results ------------------------------------------------------------------------------------------------------

    def _result(self, answer: _Answer, sequences: list[Sequence]) -> RequestOutput:
        group, request = answer.group, answer.group.request
        indices = [i if answer.is_ranked else seq.index for i, seq in enumerate(sequences)]
        prompt_scored = self._scored_prompt(group)
        return RequestOutput(
            request_id=request.request_id,
            prompt=request.prompt,
            prompt_token_ids=request.prompt_token_ids,
            outputs=[self._completion(answer, *each) for each in zip(indices, sequences, strict=True)],
            prompt_logprobs=None if prompt_scored is None else read_late(prompt_scored.behind_first),
            num_cached_tokens=group.num_cached_tokens or 0,
            num_preemptions=group.num_preemptions,
            times=RequestTimes(answer.arrived, group.first_scheduled, answer.first_token, monotonic()),
            error=group.error,
        )

    def _completion(self, answer: _Answer, index: int, seq: Sequence) -> CompletionOutput:
        group, scored = answer.group, self._scored(answer.group, seq)
        cumulative_logprob, score = _totals(group, seq)
        if answer.is_watched:
            detokenizer = answer.progress[seq.seq_id].detokenizer
        elif (detokenizer := self._detokenizer(group)) is not None:
            self._decode(group, seq, detokenizer)
        return CompletionOutput(
            index=index,
            text="" if detokenizer is None else detokenizer.text,
            token_ids=seq.output_token_ids,
            cumulative_logprob=cumulative_logprob,
            logprobs=None if scored is None else read_late(scored.to_list),
            finish_reason=seq.finish_reason,
            score=score,
            stop_reason=_stop_reason(group, seq, detokenizer),
        )

    def _scored_prompt(self, group: SequenceGroup) -> ScoredTokens | None:
        """The log-probabilities of the prompt but its first token; None if none were asked for."""
        num_top = group.request.params.prompt_logprobs
        if num_top is None:
            return None
        rows = [(piece, row) for piece in group.prompt_scores for row in range(len(piece.logprobs))]
        return ScoredTokens(group.request.prompt_token_ids[1 : 1 + len(rows)], rows, num_top, self._texts)


def _returned(answer: _Answer) -> list[Sequence]:
    """The sequences whose completions are the result, in order."""
    sequences = answer.group.sequences
    if not answer.is_ranked:
        return sequences

    def rank(seq: Sequence) -> float:
        logprob, score = _totals(answer.group, seq)
        return -(logprob if score is None else score)

    return sorted(sequences, key=rank)[: answer.group.request.params.n]


def _totals(group: SequenceGroup, seq: Sequence) -> tuple[float, float | None]:
    """The log-probability of a sequence, and its score in a search."""
    if group.beam is None:
        return float(sum([of_step.logprobs[row] for of_step, row in seq.output_scores])), None
    logprob = seq.cumulative_logprob or 0.0
    return logprob, group.beam.score(logprob, max(seq.num_outputs, 1)) if seq.score is None else seq.score


def _error(group: SequenceGroup, reason: FinishReason | None) -> str | None:
    """The explanation of an end that is no completion's own."""
    return group.error if reason in (FinishReason.ABORT, FinishReason.ERROR) else None


def _stop_reason(group: SequenceGroup, seq: Sequence, detokenizer: Detokenizer | None) -> int | str | None:
    """The stop string or the stop token of the request that ended a sequence."""
    if seq.finish_reason is not FinishReason.STOP:
        return None
    if detokenizer is not None and detokenizer.is_stopped:
        return detokenizer.stop
    last = seq.token_ids[-1]
    return last if last in (group.request.params.stop_token_ids or ()) else _special_stop(group, seq)


def _special_stop(group: SequenceGroup, seq: Sequence) -> str | None:
    """The stop string that a sequence ended with as a special token."""
    if seq.finish_reason is not FinishReason.STOP or not group.request.special_stops:
        return None
    return group.request.special_stops.get(seq.token_ids[-1])
