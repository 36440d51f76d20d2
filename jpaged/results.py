"""Results: the outputs of a request, whole and piece by piece."""

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple


class FinishReason(enum.StrEnum):
    """The reason for the end of a completion."""

    STOP = "stop"  # end-of-sequence, a stop token or a stop string
    LENGTH = "length"  # max_tokens, or the model's context is full
    ABORT = "abort"
    ERROR = "error"  # steps failed again and again, its logits are no numbers, or its text cannot be made


class ErrorCause(enum.StrEnum):
    """The errors that end requests of a sound engine. Each is its message."""

    NOT_FINITE = (  # the logits are no distribution
        "the model's logits are NaN or infinite: most often float16 has overflowed, so set dtype='bfloat16' or "
        "dtype='float32'; if it is one of these, weights of the checkpoint are damaged"
    )
    NO_CONTINUATION = (  # a search ends without a finished sequence
        "no beam has a token to go on with: all are banned, or the model gives them no probability"
    )

    __repr__ = str.__repr__


class RequestOutputKind(enum.Enum):
    """The content of each output that ``AsyncLLM.generate`` yields, under vLLM's names."""

    CUMULATIVE = 0  # all so far
    DELTA = 1  # tokens and text that are new
    FINAL_ONLY = 2  # one output, in the end

    def __repr__(self) -> str:
        return str(self)


@dataclass(frozen=True, slots=True)
class Logprob:
    """One token's log-probability under the model, and its rank there (1 is the most probable)."""

    logprob: float
    rank: int
    decoded_token: str | None = None


class _Later(NamedTuple):
    make: Callable[[], Any]


def read_late(make: Callable[[], Any]) -> Any:
    """A value for a field that is made when the field is first read."""
    return _Later(make)


class _ReadLate:
    """A field of a frozen dataclass whose value may be one of ``read_late``. Its default is None."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: Any, owner: type) -> Any:
        if instance is None:
            return None
        value = instance.__dict__[self._name]
        if isinstance(value, _Later):
            value = instance.__dict__[self._name] = value.make()
        return value

    def __set__(self, instance: Any, value: Any) -> None:
        instance.__dict__[self._name] = value


def _late() -> Any:
    return _ReadLate()


def _state(self: Any) -> dict[str, Any]:
    """The fields of a result, all of them made, for copies."""
    return {each.name: getattr(self, each.name) for each in fields(self)}


@dataclass(frozen=True)
class CompletionOutput:
    """One completion of a request, so far or finished.

    ``logprobs`` has one mapping (token id -> Logprob) per generated token, None unless asked for. ``score`` belongs to
    beam search: cumulative_logprob / length ** length_penalty. ``stop_reason`` is the stop string, or the id of
    ``stop_token_ids``, that ended the completion; None after any other end, as in vLLM.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float
    logprobs: list[dict[int, Logprob]] | None = _late()  # noqa: RUF009
    finish_reason: FinishReason | None = None
    score: float | None = None
    stop_reason: int | str | None = None

    __getstate__ = _state

    @property
    def is_finished(self) -> bool:
        return self.finish_reason is not None


class BeamSequence(NamedTuple):
    """One result of a beam search, as vLLM has it: ``tokens`` and ``text`` begin with the prompt."""

    tokens: list[int]
    text: str
    cum_logprob: float
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None


class RequestTimes(NamedTuple):
    """The times of one request, in seconds of ``time.monotonic``; None for what has not happened.

    Args:
        arrived: the request was made.
        first_scheduled: its first step was planned.
        first_token: the step of its first token ended.
        finished: its result was made.
    """

    arrived: float
    first_scheduled: float | None = None
    first_token: float | None = None
    finished: float | None = None


@dataclass(frozen=True)
class RequestOutput:
    """Result of a request: ``outputs[i]`` is its i-th completion, or its i-th best (``best_of``, beams).

    ``prompt_logprobs[0]`` is None (nothing precedes the first token); the whole list is None unless asked for.
    ``num_cached_tokens`` counts prompt tokens whose KV came from the prefix cache. ``error`` says why the engine ended
    completions with ``FinishReason.ERROR`` or ``ABORT``: an ``ErrorCause``, or another text. ``times`` is None while
    the request runs. ``has_more`` says that ``AsyncLLM`` yields further outputs of the request.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput] = field(default_factory=list)
    prompt_logprobs: list[dict[int, Logprob] | None] | None = _late()  # noqa: RUF009
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    times: RequestTimes | None = field(default=None, compare=False)
    error: str | None = None
    has_more: bool = False

    __getstate__ = _state

    @property
    def is_finished(self) -> bool:
        return not self.has_more and all(output.is_finished for output in self.outputs)

    @property
    def finished(self) -> bool:
        """``is_finished`` under vLLM's name."""
        return self.is_finished

    @property
    def sequences(self) -> list[BeamSequence]:
        """The outputs in the form that vLLM gives the results of a beam search."""
        return [
            BeamSequence(
                self.prompt_token_ids + output.token_ids,
                (self.prompt or "") + output.text,
                output.cumulative_logprob,
                output.finish_reason,
                output.stop_reason,
            )
            for output in self.outputs
        ]


class CompletionDelta(NamedTuple):
    """Tokens and text that one completion gained since the last delta of a stream.

    A step makes hundreds of deltas, and a named tuple costs a third of a frozen dataclass. ``logprobs`` has an entry
    for each new token, None unless asked for. ``prompt_index`` counts the prompts of one call of ``LLM.stream``.
    ``error`` says why the engine ended the completion with ``FinishReason.ERROR`` or ``ABORT``, where it knows.
    """

    request_id: str
    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    logprobs: Sequence[dict[int, Logprob]] | None = None
    prompt_index: int = 0
    error: str | None = None
