"""Requests: their parameters and checks. The types of results are here by name too."""

import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from jpaged.results import (
    CompletionDelta,
    CompletionOutput,
    ErrorCause,
    FinishReason,
    Logprob,
    RequestOutput,
    RequestOutputKind,
    RequestTimes,
)
from jpaged.rules import (
    FLAG,
    Rule,
    check_all,
    documented,
    integer,
    is_int,
    is_number,
    number,
    number_above,
    optional,
    setting,
)

__all__ = [
    "MAX_BEAM_CANDIDATES",
    "MAX_BEAM_WIDTH",
    "MAX_LOGIT_BIAS",
    "MAX_LOGPROBS",
    "MAX_N",
    "MAX_STOP_STRINGS",
    "BeamSearchParams",
    "CompletionDelta",
    "CompletionOutput",
    "ErrorCause",
    "FinishReason",
    "Logprob",
    "Request",
    "RequestOutput",
    "RequestOutputKind",
    "RequestTimes",
    "SamplingParams",
    "Terms",
    "derive_seed",
]

MAX_LOGPROBS = 20
"""Most alternatives a token's log-probabilities may list (the OpenAI limit)."""

MAX_LOGIT_BIAS = 1024
MAX_STOP_STRINGS = 64
MAX_BAD_WORDS = 1024
MAX_N = 4096

MAX_BEAM_WIDTH = 64

MAX_BEAM_CANDIDATES = 512
"""Most continuations that one search looks at in a step: width x (1 + stop tokens), at least twice the width."""


def _parameter(default: Any, rule: Rule, help_: str, *, beams: Callable[[Any], bool] | None, unset: str = "") -> Any:
    """Declare a sampling parameter.

    Args:
        default: the default.
        rule: the valid values.
        help_: the meaning.
        beams: which values a beam search takes; None if it takes all. A search ranks whole sequences by the model's own
            probabilities: it refuses what changes a distribution, and what speaks of the choice of one token.
        unset: the meaning of the default where the value does not say it.
    """
    return setting(default, rule, help_, unset=unset, beams=beams)


def _is_strings(value: Any) -> bool:
    if not isinstance(value, str | list | tuple):
        return False
    strings = (value,) if isinstance(value, str) else value
    return len(strings) <= MAX_STOP_STRINGS and all(isinstance(each, str) and each for each in strings)


def _is_words(value: Any) -> bool:
    return (
        isinstance(value, list | tuple)
        and len(value) <= MAX_BAD_WORDS
        and all(isinstance(each, str) and each.strip() for each in value)
    )


def _is_token_ids(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(is_int(each) and each >= 0 for each in value)


_LENGTH_PENALTY = number(-10, 10)
_EARLY_STOPPING = Rule(object, lambda x: isinstance(x, bool) or x == "never", 'True, False or "never"')
_TEMPERATURE = Rule(float, lambda x: is_number(x) and x >= 0, "a finite number, 0 (greedy) or more")
_LENGTH_PENALTY_HELP = "a score is the log-probability / length ** X: above 0 favours long sequences"
_EARLY_STOPPING_HELP = (
    "when the search ends: true with as many finished sequences as it follows, false when no better one is likely, "
    "never when none is possible"
)


@documented
@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Parameters that choose the tokens of one request. Names and meanings follow vLLM and the OpenAI API.

    A prompt is computed once and forked: completion i draws with ``derive_seed(seed, i)``. ``max_tokens=None`` fills
    the context. Log-probabilities are the model's own, before penalties, temperature and filters.

    Raises:
        ValueError: a value out of range, with the value and the range; parameters that exclude each other.
    """

    n: int = _parameter(
        1,
        integer(1, MAX_N),
        f"completions of the prompt, computed together; at most {MAX_N}",
        beams=None,
    )
    best_of: int | None = _parameter(
        None,
        optional(integer(1, MAX_N)),
        "completions to draw, of which the ``n`` of greatest log-probability are returned, best first",
        beams=None,
        unset="``n``",
    )
    use_beam_search: bool = _parameter(
        False,
        FLAG,
        "search for the ``n`` sequences of greatest score, following ``best_of`` at once, as ``BeamSearchParams`` says",
        beams=None,
    )
    length_penalty: float = _parameter(1.0, _LENGTH_PENALTY, f"for a beam search: {_LENGTH_PENALTY_HELP}", beams=None)
    early_stopping: bool | str = _parameter(
        False, _EARLY_STOPPING, f"for a beam search: {_EARLY_STOPPING_HELP}", beams=None
    )
    temperature: float = _parameter(
        1.0,
        _TEMPERATURE,
        "0 always takes the most probable token; higher is more varied",
        beams=lambda value: value == 0,
    )
    top_p: float = _parameter(
        1.0,
        number_above(0, 1),
        "draw from the most probable tokens that together reach this probability; 1 is off",
        beams=lambda value: value == 1,
    )
    top_k: int = _parameter(
        0,
        Rule(int, lambda x: is_int(x) and x >= -1, "an integer: -1 or 0 (off), or 1 and up"),
        "draw from this many most probable tokens, and from those as probable as the last; 0 or -1 is off",
        beams=lambda value: value <= 0,
    )
    min_p: float = _parameter(
        0.0,
        number(0, 1),
        "drop tokens less probable than this share of the most probable one's probability",
        beams=lambda value: value == 0,
    )
    presence_penalty: float = _parameter(
        0.0,
        number(-2, 2),
        "subtracted from the logit of every token already generated, -2 to 2",
        beams=lambda value: value == 0,
    )
    frequency_penalty: float = _parameter(
        0.0,
        number(-2, 2),
        "subtracted from the logit of a token for each time that it was generated, -2 to 2",
        beams=lambda value: value == 0,
    )
    repetition_penalty: float = _parameter(
        1.0,
        Rule(float, lambda x: is_number(x) and x > 0, "a finite number above 0 (1 is off)"),
        "divides the positive logits of tokens in the prompt or the output, and multiplies the negative ones; 1 is off",
        beams=lambda value: value == 1,
    )
    logit_bias: Mapping[int, float] | None = _parameter(
        None,
        optional(Rule(dict, lambda x: isinstance(x, Mapping), "a mapping of token id to number")),
        f"token id -> number added to its logit; at most {MAX_LOGIT_BIAS} of them",
        beams=lambda value: not value,
        unset="none",
    )
    seed: int | None = _parameter(
        None,
        optional(integer(0, 2**32 - 1)),
        "equal seeds give equal tokens, whatever else runs",
        beams=lambda value: value is None,
        unset="a new one every time",
    )
    stop: str | list[str] | tuple[str, ...] | None = _parameter(  # noqa: RUF009
        None,
        optional(
            Rule(list, _is_strings, f"a non-empty string, or a list or tuple of them, at most {MAX_STOP_STRINGS}")
        ),
        f"text that ends the completion, and is no part of it; may be a special token; at most {MAX_STOP_STRINGS}",
        beams=lambda value: not value,
        unset="none; may be given several times",
    )
    stop_token_ids: list[int] | tuple[int, ...] | None = _parameter(  # noqa: RUF009
        None,
        optional(Rule(list, _is_token_ids, "a list or tuple of token ids, each an integer of 0 or more")),
        "token ids that end the completion, besides the model's own end-of-sequence ids",
        beams=None,
        unset="none; may be given several times",
    )
    include_stop_str_in_output: bool = _parameter(
        False, FLAG, "let the text end with the stop string that ended it", beams=None
    )
    ignore_eos: bool = _parameter(False, FLAG, "go on past the end of text, up to ``max_tokens``", beams=None)
    max_tokens: int | None = _parameter(
        16,
        optional(integer(1)),
        "most tokens to generate; a full context ends the completion sooner",
        beams=None,
    )
    min_tokens: int = _parameter(0, integer(0), "no end of text before this many tokens", beams=None)
    logprobs: int | None = _parameter(
        None,
        optional(integer(0, MAX_LOGPROBS)),
        "also return the model's own log-probability of each token, and of this many most probable ones, "
        f"0 to {MAX_LOGPROBS}",
        beams=lambda value: value is None,
        unset="off",
    )
    prompt_logprobs: int | None = _parameter(
        None,
        optional(integer(0, MAX_LOGPROBS)),
        f"the same for the tokens of the prompt but the first, 0 to {MAX_LOGPROBS}",
        beams=None,
        unset="off",
    )
    bad_words: list[str] | tuple[str, ...] | None = _parameter(  # noqa: RUF009
        None,
        optional(Rule(list, _is_words, f"a list or tuple of non-empty strings, at most {MAX_BAD_WORDS}")),
        "texts that are never generated: the last token of each may not follow its other tokens; at most "
        f"{MAX_BAD_WORDS}",
        beams=lambda value: not value,
        unset="none",
    )
    allowed_token_ids: list[int] | tuple[int, ...] | None = _parameter(  # noqa: RUF009
        None,
        optional(
            Rule(list, lambda x: _is_token_ids(x) and len(x) > 0, "a non-empty list or tuple of token ids, 0 or more")
        ),
        "the only token ids that may be generated",
        beams=lambda value: value is None,
        unset="all",
    )
    detokenize: bool = _parameter(True, FLAG, "make text of the tokens", beams=None)
    skip_special_tokens: bool = _parameter(True, FLAG, "leave special tokens out of the text", beams=None)
    output_kind: RequestOutputKind = _parameter(  # noqa: RUF009
        RequestOutputKind.CUMULATIVE,
        Rule(int, lambda x: isinstance(x, RequestOutputKind), "a RequestOutputKind"),
        "for AsyncLLM, what each output has: all so far, what is new, or one output in the end",
        beams=None,
    )

    def __post_init__(self) -> None:
        check_all(self)
        self._check_logit_bias()
        if self.num_sequences < self.n:
            raise ValueError(f"best_of={self.best_of} is less than n={self.n}: raise the first or lower the second")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens={self.min_tokens} is more than max_tokens={self.max_tokens}: lower one or raise the other"
            )
        if self.use_beam_search:
            self._check_beam_search()
            return
        for name, default in (("length_penalty", 1.0), ("early_stopping", False)):
            if getattr(self, name) != default:
                raise ValueError(f"{name}={getattr(self, name)!r} is of beam search: set use_beam_search=True")
        if self.stop and not self.detokenize:
            raise ValueError("detokenize=False makes no text, in which stop would be found: use stop_token_ids")

    def _check_beam_search(self) -> None:
        width = Rule(int, lambda x: x <= MAX_BEAM_WIDTH, f"a beam width from 1 to {MAX_BEAM_WIDTH}")
        width.check("best_of" if self.best_of else "n", self.num_sequences)
        for each in fields(self):
            takes, value = each.metadata["beams"], getattr(self, each.name)
            if takes is not None and not takes(value):
                remedy = "set temperature=0" if each.name == "temperature" else f"leave {each.name} at its default"
                raise ValueError(
                    f"{each.name}={reprlib.repr(value)} does not go with use_beam_search, which ranks whole sequences "
                    f"by the model's own probabilities: {remedy}"
                )

    def _check_logit_bias(self) -> None:
        if self.logit_bias is None:
            return
        if len(self.logit_bias) > MAX_LOGIT_BIAS:
            raise ValueError(f"logit_bias has {len(self.logit_bias)} entries: at most {MAX_LOGIT_BIAS} are taken")
        for token_id, value in self.logit_bias.items():
            integer(0).check("logit_bias token id", token_id)
            Rule(float, is_number, "a finite number").check(f"logit_bias[{token_id}]", value)

    @property
    def num_sequences(self) -> int:
        """Sequences that run at once: ``best_of`` or ``n``."""
        return self.n if self.best_of is None else self.best_of

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """``stop`` as a tuple, whatever form it was given in."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def has_penalties(self) -> bool:
        """Whether any penalty needs the tokens seen so far."""
        return self.presence_penalty != 0 or self.frequency_penalty != 0 or self.repetition_penalty != 1


@documented
@dataclass(frozen=True, slots=True)
class BeamSearchParams:
    """Parameters of a search for the most probable completions of a prompt, with Hugging Face ``generate``'s semantics.

    Every step keeps the ``beam_width`` most probable unfinished sequences. A sequence that meets end-of-sequence, or
    ``max_tokens``, while it is among them is finished. The finished sequences of greatest score are returned. A width
    of 1 is greedy decoding.

    Raises:
        ValueError: a value out of range, with the value and the range.
    """

    beam_width: int = setting(
        MISSING, integer(1, MAX_BEAM_WIDTH), f"sequences followed at once, and returned; at most {MAX_BEAM_WIDTH}"
    )
    max_tokens: int = setting(MISSING, integer(1), "most tokens to generate")
    length_penalty: float = setting(1.0, _LENGTH_PENALTY, _LENGTH_PENALTY_HELP)
    early_stopping: bool | str = setting(False, _EARLY_STOPPING, _EARLY_STOPPING_HELP)
    ignore_eos: bool = setting(False, FLAG, "go on past the end of text")
    temperature: float = setting(0.0, _TEMPERATURE, "only 0: no sampled beams")

    def __post_init__(self) -> None:
        check_all(self)
        self.to_sampling_params()

    def to_sampling_params(self) -> SamplingParams:
        """The same as parameters of ``LLM.generate``, to mix searches with other requests."""
        return SamplingParams(
            n=self.beam_width,
            best_of=self.beam_width,
            use_beam_search=True,
            max_tokens=self.max_tokens,
            length_penalty=self.length_penalty,
            early_stopping=self.early_stopping,
            ignore_eos=self.ignore_eos,
            temperature=self.temperature,
        )


def derive_seed(seed: int, index: int) -> int:
    """The seed of completion ``index`` of a request; ``seed`` itself for the first.

    Steps of 2**32 over the golden ratio, so that requests with seeds counted up do not repeat each other's completions.
    """
    return (seed + index * 0x9E3779B9) % 2**32


@dataclass(frozen=True, slots=True)
class Terms:
    """The limits of a request that the scheduler has checked.

    Args:
        max_tokens: output tokens that each sequence may reach.
        stop_token_ids: tokens that end a sequence.
        pins: state of the pinned prefixes of the scheduler that checked. The limits hold there until the next change.
        is_streamed: whether full blocks stay on the host while the request runs.
    """

    max_tokens: int
    stop_token_ids: frozenset[int]
    pins: object
    is_streamed: bool


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt to complete, validated.

    Args:
        request_id: unique among the engine's unfinished requests.
        prompt: the text, None when the caller gave token ids.
        prompt_token_ids: tokens that the model reads, at least one.
        params: sampling parameters.
        seed: 32-bit; completion i draws with ``derive_seed(seed, i)``. None until the engine draws one.
        prefix_salt: prompts share cached blocks only under equal salts.
        priority: lower is served first and preempted last; among equals, the first to arrive.
        banned_token_ids: tokens that are never drawn.
        banned_sequences: token ids whose last may not follow the others in the output; of two tokens or more.
        special_stops: stop strings that are special tokens, by the ids of these.
        arrived: time of arrival, of ``time.monotonic``; None is the time at which the engine takes it.
        terms: limits settled by ``Scheduler.check``; None until then.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    seed: int | None
    prefix_salt: bytes = b""
    priority: int = 0
    banned_token_ids: Sequence[int] = ()
    banned_sequences: tuple[tuple[int, ...], ...] = ()
    special_stops: Mapping[int, str] = field(default_factory=dict)
    arrived: float | None = field(default=None, compare=False)
    terms: Terms | None = field(default=None, compare=False, repr=False)
