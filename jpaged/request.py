"""What a caller asks for and what comes back: the types at the engine's outer edge."""

import enum
import reprlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

MAX_LOGPROBS = 20
"""Most alternatives a token's log-probabilities may list (the OpenAI limit)."""

MAX_LOGIT_BIAS = 1024
MAX_STOP_STRINGS = 64
MAX_N = 4096

MAX_BEAM_WIDTH = 64

MAX_BEAM_CANDIDATES = 512
"""Continuations one search looks at in a step at most: width x (1 + stop tokens), and twice the width at least."""


class FinishReason(enum.StrEnum):
    """Why a completion ended."""

    STOP = "stop"  # end-of-sequence, a stop token or a stop string
    LENGTH = "length"  # max_tokens, or the model's context is full
    ABORT = "abort"


def _require(ok: bool, name: str, value: object, expected: str) -> None:
    if not ok:
        raise ValueError(f"{name}={reprlib.repr(value)} is not valid: expected {expected}")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    """Whether ``value`` is an int or a float that a float can hold: 10**400 is neither finite nor NaN, and is not."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return abs(value) <= sys.float_info.max


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose the tokens of one request. Names and meanings follow vLLM and the OpenAI API.

    Args:
        n: completions to return. The prompt is computed once and forked; completion i draws with
            ``derive_seed(seed, i)``.
        best_of: completions to draw, of which, if they are more than ``n``, the ``n`` of greatest cumulative
            log-probability are returned, best first; with beam search the width of the beam. None is ``n``.
        use_beam_search: search for the ``n`` sequences of greatest score instead of drawing, as Hugging Face's
            ``generate(num_beams=best_of)``; see ``BeamSearchParams``. Needs ``temperature=0``.
        length_penalty: of beam search: a sequence's score is its log-probability / length ** length_penalty.
        early_stopping: of beam search: True ends it with ``best_of`` finished sequences, False when no better one
            seems likely, "never" when none is possible.
        temperature: 0 is greedy; otherwise logits are divided by it.
        top_p: keep the smallest set of tokens whose probability reaches it. In (0, 1].
        top_k: keep the k most probable tokens (ties with the k-th are kept). 0 or -1 keeps all.
        min_p: drop tokens less probable than ``min_p`` times the most probable one. In [0, 1].
        presence_penalty: subtracted from the logit of every token already generated. In [-2, 2].
        frequency_penalty: subtracted once per occurrence of a generated token. In [-2, 2].
        repetition_penalty: divides positive (multiplies negative) logits of tokens in the prompt or output. > 0.
        logit_bias: token id -> value added to its logit.
        seed: 32-bit; the same seed gives the same tokens whatever else the engine runs. None draws one.
        stop: strings that end the completion; the string itself is not returned.
        stop_token_ids: token ids that end the completion, besides the model's own end-of-sequence ids.
        ignore_eos: go on past end-of-sequence.
        max_tokens: tokens to generate at most; None fills the model's context, which ends every completion.
        min_tokens: end-of-sequence and stop tokens cannot be drawn before this many.
        logprobs: also return the log-probability of each token and of this many most probable alternatives.
            Taken from the model's own logits, before penalties, temperature and filters.
        prompt_logprobs: the same for each prompt token but the first.

    Raises:
        ValueError: a value out of range, with the value and the range.
    """

    n: int = 1
    best_of: int | None = None
    use_beam_search: bool = False
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] | None = None
    seed: int | None = None
    stop: str | list[str] | tuple[str, ...] | None = None
    stop_token_ids: list[int] | tuple[int, ...] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        _require(_is_int(self.n) and 1 <= self.n <= MAX_N, "n", self.n, f"an integer from 1 to {MAX_N}")
        _require(
            self.best_of is None or (_is_int(self.best_of) and 1 <= self.best_of <= MAX_N),
            "best_of", self.best_of, f"None or an integer from 1 to {MAX_N}",
        )  # fmt: skip
        if self.num_sequences < self.n:
            raise ValueError(f"best_of={self.best_of} is less than n={self.n}: raise the first or lower the second")
        _require(
            _is_number(self.temperature) and self.temperature >= 0,
            "temperature", self.temperature, "a finite number, 0 (greedy) or more",
        )  # fmt: skip
        _require(_is_number(self.top_p) and 0 < self.top_p <= 1, "top_p", self.top_p, "a number in (0, 1]")
        _require(
            _is_int(self.top_k) and self.top_k >= -1, "top_k", self.top_k, "an integer: -1 or 0 (off), or 1 and up"
        )
        _require(_is_number(self.min_p) and 0 <= self.min_p <= 1, "min_p", self.min_p, "a number in [0, 1]")
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            _require(_is_number(value) and -2 <= value <= 2, name, value, "a number in [-2, 2]")
        _require(
            _is_number(self.repetition_penalty) and self.repetition_penalty > 0,
            "repetition_penalty", self.repetition_penalty, "a finite number above 0 (1 is off)",
        )  # fmt: skip
        self._check_logit_bias()
        _require(
            self.seed is None or (_is_int(self.seed) and 0 <= self.seed < 2**32),
            "seed", self.seed, "None or an integer from 0 to 2**32 - 1",
        )  # fmt: skip
        self._check_stops()
        _require(isinstance(self.ignore_eos, bool), "ignore_eos", self.ignore_eos, "True or False")
        _require(
            self.max_tokens is None or (_is_int(self.max_tokens) and self.max_tokens >= 1),
            "max_tokens", self.max_tokens, "None (fill the context) or an integer of 1 or more",
        )  # fmt: skip
        _require(
            _is_int(self.min_tokens) and self.min_tokens >= 0, "min_tokens", self.min_tokens, "an integer, 0 or more"
        )
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens={self.min_tokens} is more than max_tokens={self.max_tokens}: lower one or raise the other"
            )
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            _require(
                value is None or (_is_int(value) and 0 <= value <= MAX_LOGPROBS),
                name, value, f"None or an integer from 0 to {MAX_LOGPROBS}",
            )  # fmt: skip

        self._check_beam_search()

    def _check_beam_search(self) -> None:
        _require(isinstance(self.use_beam_search, bool), "use_beam_search", self.use_beam_search, "True or False")
        penalty = self.length_penalty
        _require(_is_number(penalty) and -10 <= penalty <= 10, "length_penalty", penalty, "a number in [-10, 10]")
        is_stopping = isinstance(self.early_stopping, bool) or self.early_stopping == "never"
        _require(is_stopping, "early_stopping", self.early_stopping, 'True, False or "never"')
        if not self.use_beam_search:
            for name, default in (("length_penalty", 1.0), ("early_stopping", False)):
                if getattr(self, name) != default:
                    raise ValueError(f"{name}={getattr(self, name)!r} is of beam search: set use_beam_search=True")
            return
        _require(
            self.num_sequences <= MAX_BEAM_WIDTH,
            "best_of" if self.best_of else "n", self.num_sequences, f"a beam width from 1 to {MAX_BEAM_WIDTH}",
        )  # fmt: skip
        # Everything that changes a distribution that a search does not draw from, or speaks of one token's choice.
        unsupported = {
            "temperature": self.temperature != 0,
            "top_p": self.top_p != 1,
            "top_k": self.top_k > 0,
            "min_p": self.min_p != 0,
            "presence_penalty": self.presence_penalty != 0,
            "frequency_penalty": self.frequency_penalty != 0,
            "repetition_penalty": self.repetition_penalty != 1,
            "logit_bias": bool(self.logit_bias),
            "seed": self.seed is not None,
            "stop": bool(self.stop_strings),
            "logprobs": self.logprobs is not None,
        }
        for name, is_set in unsupported.items():
            if is_set:
                remedy = "set temperature=0" if name == "temperature" else f"leave {name} at its default"
                raise ValueError(
                    f"{name}={reprlib.repr(getattr(self, name))} does not go with use_beam_search, which ranks whole "
                    f"sequences by the model's own probabilities: {remedy}"
                )

    @property
    def num_sequences(self) -> int:
        """Sequences that run at once: ``best_of`` or ``n``."""
        return self.n if self.best_of is None else self.best_of

    def _check_logit_bias(self) -> None:
        if self.logit_bias is None:
            return
        _require(isinstance(self.logit_bias, Mapping), "logit_bias", self.logit_bias, "a mapping of token id to number")
        if len(self.logit_bias) > MAX_LOGIT_BIAS:
            raise ValueError(f"logit_bias has {len(self.logit_bias)} entries: at most {MAX_LOGIT_BIAS} are taken")
        for token_id, value in self.logit_bias.items():
            _require(_is_int(token_id) and token_id >= 0, "logit_bias token id", token_id, "an integer, 0 or more")
            _require(_is_number(value), f"logit_bias[{token_id}]", value, "a finite number")

    def _check_stops(self) -> None:
        is_sequence = self.stop is None or isinstance(self.stop, str | list | tuple)
        is_valid = is_sequence and all(isinstance(s, str) and s for s in self.stop_strings)
        _require(is_valid, "stop", self.stop, "a non-empty string, or a list or tuple of them")
        stops = self.stop_strings
        _require(len(stops) <= MAX_STOP_STRINGS, "stop", f"{len(stops)} strings", f"at most {MAX_STOP_STRINGS}")
        is_sequence = self.stop_token_ids is None or isinstance(self.stop_token_ids, list | tuple)
        _require(is_sequence, "stop_token_ids", self.stop_token_ids, "a list or tuple of token ids")
        for token_id in self.stop_token_ids or ():
            _require(_is_int(token_id) and token_id >= 0, "stop_token_ids entry", token_id, "an integer, 0 or more")

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


@dataclass(frozen=True, slots=True)
class BeamSearchParams:
    """How to search for the most probable completions of a prompt; the semantics are Hugging Face ``generate``'s.

    Every step keeps the ``beam_width`` most probable unfinished sequences. One that meets end-of-sequence, or
    ``max_tokens``, while among them is finished, and the finished ones of greatest score are returned. A width of 1 is
    greedy decoding.

    Args:
        beam_width: sequences kept, and returned.
        max_tokens: tokens to generate at most.
        length_penalty: a score is the sum of a sequence's log-probabilities / its generated length ** length_penalty:
            above 0 favours long sequences.
        early_stopping: True ends the search with ``beam_width`` finished sequences, False when no better one seems
            likely, "never" when none is possible.
        ignore_eos: go on past end-of-sequence.
        temperature: only 0: sampled beams are not supported.

    Raises:
        ValueError: a value out of range, with the value and the range.
    """

    beam_width: int
    max_tokens: int
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    ignore_eos: bool = False
    temperature: float = 0.0

    def __post_init__(self) -> None:
        width = self.beam_width
        _require(
            _is_int(width) and 1 <= width <= MAX_BEAM_WIDTH,
            "beam_width", width, f"an integer from 1 to {MAX_BEAM_WIDTH}",
        )  # fmt: skip
        _require(_is_int(self.max_tokens), "max_tokens", self.max_tokens, "an integer of 1 or more")
        _require(self.max_tokens >= 1, "max_tokens", self.max_tokens, "an integer of 1 or more")
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
class Request:
    """A prompt to complete, validated and with its randomness settled.

    Args:
        request_id: unique among the engine's unfinished requests.
        prompt: the text, None when the caller gave token ids.
        prompt_token_ids: what the model reads, at least one token.
        params: how to sample.
        seed: 32-bit; completion i draws with ``derive_seed(seed, i)``. None until the engine draws one.
        prefix_salt: prompts share cached blocks only under equal salts.
        priority: lower is served first and preempted last; among equals, the first to arrive.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    seed: int | None
    prefix_salt: bytes = b""
    priority: int = 0


@dataclass(frozen=True, slots=True)
class Logprob:
    """One token's log-probability under the model, and its rank there (1 is the most probable)."""

    logprob: float
    rank: int
    decoded_token: str | None = None


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One completion of a request, so far or finished.

    ``logprobs`` has one mapping (token id -> Logprob) per generated token, None unless asked for. ``score`` is that of
    beam search: cumulative_logprob / length ** length_penalty.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: FinishReason | None = None
    score: float | None = None

    @property
    def is_finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """What a request has produced: ``outputs[i]`` is its i-th completion, or its i-th best (``best_of``, beams).

    ``prompt_logprobs[0]`` is None (nothing precedes the first token); the whole list is None unless asked for.
    ``num_cached_tokens`` counts prompt tokens whose KV came from the prefix cache.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput] = field(default_factory=list)
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    num_cached_tokens: int = 0

    @property
    def is_finished(self) -> bool:
        return all(output.is_finished for output in self.outputs)


class CompletionDelta(NamedTuple):
    """What one completion gained since the last delta of a stream.

    A step brings hundreds of them, and a named tuple costs a third of a frozen dataclass.
    """

    request_id: str
    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None = None
