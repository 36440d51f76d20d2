"""SamplingParams refuses every value it cannot honour, by name, and passes on every value it can."""

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jpaged.request import (
    MAX_BAD_WORDS,
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    MAX_N,
    MAX_STOP_STRINGS,
    BeamSearchParams,
    CompletionOutput,
    FinishReason,
    RequestOutput,
    RequestOutputKind,
    SamplingParams,
)
from jpaged.rules import settings_of
from tests.support.setting_cases import cases

NOT_NUMBERS = [None, True, "1", [1.0], math.nan, math.inf, -math.inf, 10**400]
NOT_INTEGERS = [True, 1.0, "1", [1], math.nan]

INVALID = {
    "n": [*NOT_INTEGERS, None, 0, -1, MAX_N + 1, 10**400],
    "best_of": [*NOT_INTEGERS, 0, -1, MAX_N + 1],
    "use_beam_search": [None, 0, 1, "yes"],
    "length_penalty": [*NOT_NUMBERS, -10.5, 11, 2.0],
    "early_stopping": [None, 1, 0.5, "sometimes", True],
    "temperature": [*NOT_NUMBERS, -0.1],
    "top_p": [*NOT_NUMBERS, 0, 0.0, -0.5, 1.01],
    "top_k": [*NOT_INTEGERS, None, -2],
    "min_p": [*NOT_NUMBERS, -0.01, 1.5],
    "presence_penalty": [*NOT_NUMBERS, -2.1, 2.1],
    "frequency_penalty": [*NOT_NUMBERS, -2.1, 2.1],
    "repetition_penalty": [*NOT_NUMBERS, 0, -1.0],
    "logit_bias": [5, "ab", [(1, 2.0)], {1: math.nan}, {1: math.inf}, {1: "x"}, {1: True}, {1: 10**400}],
    "seed": [*NOT_INTEGERS, -1, 2**32, 10**400],
    "stop": [5, 1.5, "", [""], ["a", ""], [None], ["a", 3], b"bytes", {"a": 1}],
    "stop_token_ids": [5, "ab", [-1], [1.0], [True], [None], {1: 2}],
    "ignore_eos": [None, 0, 1, "yes"],
    "max_tokens": [*NOT_INTEGERS, 0, -1],
    "min_tokens": [*NOT_INTEGERS, None, -1],
    "logprobs": [*NOT_INTEGERS, -1, MAX_LOGPROBS + 1, 10**400],
    "prompt_logprobs": [*NOT_INTEGERS, -1, MAX_LOGPROBS + 1, 10**400],
    "include_stop_str_in_output": [None, 0, "yes"],
    "bad_words": [5, "ab", [""], [" "], [None], ["a", 3], {"a": 1}],
    "allowed_token_ids": [5, "ab", [], [-1], [1.0], [True], [None], {1: 2}],
    "detokenize": [None, 0, "yes"],
    "skip_special_tokens": [None, 1, "yes"],
    "output_kind": [None, 1, "delta", True],
}

VALID = {
    "n": [1, MAX_N],
    "best_of": [None, 1, MAX_N],
    "use_beam_search": [False],
    "length_penalty": [1, 1.0],
    "early_stopping": [False],
    "temperature": [0, 0.0, 1, 1e-300, 1e300],
    "top_p": [1, 1.0, 1e-9],
    "top_k": [-1, 0, 1, 10**12],
    "min_p": [0, 1, 0.5],
    "presence_penalty": [-2, 2, 0.5],
    "frequency_penalty": [-2.0, 2.0],
    "repetition_penalty": [1e-3, 1, 100],
    "logit_bias": [None, {}, {0: -100, 7: 1.5}],
    "seed": [None, 0, 2**32 - 1],
    "stop": [None, "a", [], ["a", "b"], ("a",)],
    "stop_token_ids": [None, [], [0, 5], (3,)],
    "ignore_eos": [True, False],
    "max_tokens": [None, 1, 10**12],
    "min_tokens": [0, 1, 16],
    "logprobs": [None, 0, MAX_LOGPROBS],
    "prompt_logprobs": [None, 0, MAX_LOGPROBS],
    "include_stop_str_in_output": [True, False],
    "bad_words": [None, [], ["a", "b c"], ("a",)],
    "allowed_token_ids": [None, [0, 5], (3,)],
    "detokenize": [True, False],
    "skip_special_tokens": [True, False],
    "output_kind": list(RequestOutputKind),
}


def test_every_field_has_invalid_and_valid_values():
    assert set(settings_of(SamplingParams)) == INVALID.keys() == VALID.keys()


@pytest.mark.parametrize(("name", "value"), cases(INVALID))
def test_invalid_value_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=name):
        SamplingParams(**{name: value})


@pytest.mark.parametrize(("name", "value"), cases(VALID))
def test_valid_value_is_kept(name, value):
    assert getattr(SamplingParams(**{name: value}), name) == value


@pytest.mark.parametrize(("name", "value"), [("temperature", -0.25), ("n", 5000), ("top_p", 1.25), ("seed", -7)])
def test_message_names_the_value_and_what_was_expected(name, value):
    with pytest.raises(ValueError, match=rf"{name}={value}.*expected"):
        SamplingParams(**{name: value})


def test_message_stays_short_however_long_the_value():
    with pytest.raises(ValueError, match="stop") as error:
        SamplingParams(stop=["a" * 100_000, ""])
    assert len(str(error.value)) < 400


def test_more_min_tokens_than_max_tokens_are_refused():
    with pytest.raises(ValueError, match=r"min_tokens=5 is more than max_tokens=4"):
        SamplingParams(max_tokens=4, min_tokens=5)
    assert SamplingParams(max_tokens=None, min_tokens=10**6).min_tokens == 10**6


def test_too_many_entries_are_refused():
    with pytest.raises(ValueError, match=f"logit_bias has {MAX_LOGIT_BIAS + 1} entries"):
        SamplingParams(logit_bias=dict.fromkeys(range(MAX_LOGIT_BIAS + 1), 0.0))
    with pytest.raises(ValueError, match="stop"):
        SamplingParams(stop=["x"] * (MAX_STOP_STRINGS + 1))


@pytest.mark.parametrize(
    ("name", "most", "value_of"),
    [
        ("n", MAX_N, lambda number: number),
        ("logit_bias", MAX_LOGIT_BIAS, lambda number: dict.fromkeys(range(number), 1.0)),
        ("stop", MAX_STOP_STRINGS, lambda number: ["x"] * number),
        ("bad_words", MAX_BAD_WORDS, lambda number: ["x"] * number),
        ("logprobs", MAX_LOGPROBS, lambda number: number),
        ("prompt_logprobs", MAX_LOGPROBS, lambda number: number),
    ],
)
def test_the_most_of_a_parameter_is_taken_and_its_help_has_the_number(name, most, value_of):
    assert getattr(SamplingParams(**{name: value_of(most)}), name) == value_of(most)
    with pytest.raises(ValueError, match=name):
        SamplingParams(**{name: value_of(most + 1)})
    assert re.search(rf"\b{most}\b", settings_of(SamplingParams)[name].help)


@pytest.mark.parametrize("token_id", [-1, 1.0, True, "a", None])
def test_logit_bias_of_something_else_than_a_token_is_refused(token_id):
    with pytest.raises(ValueError, match="logit_bias"):
        SamplingParams(logit_bias={token_id: 1.0})


def test_stop_strings_is_a_tuple_whatever_was_given():
    assert SamplingParams().stop_strings == ()
    assert SamplingParams(stop="ab").stop_strings == ("ab",)
    assert SamplingParams(stop=["ab", "c"]).stop_strings == SamplingParams(stop=("ab", "c")).stop_strings == ("ab", "c")


@pytest.mark.parametrize(
    ("penalties", "expected"),
    [
        ({}, False),
        ({"presence_penalty": 0.1}, True),
        ({"frequency_penalty": -1}, True),
        ({"repetition_penalty": 2}, True),
    ],
)
def test_has_penalties(penalties, expected):
    assert SamplingParams(**penalties).has_penalties is expected


@pytest.mark.parametrize(
    ("params", "match"),
    [
        ({"n": 3, "best_of": 2}, "best_of=2 is less than n=3"),
        ({"best_of": 0}, "best_of=0"),
        ({"best_of": True}, "best_of=True"),
        ({"length_penalty": 2.0}, "length_penalty=2.0 is of beam search"),
        ({"early_stopping": True}, "early_stopping=True is of beam search"),
        ({"use_beam_search": 1}, "use_beam_search=1"),
        ({"use_beam_search": True}, "temperature=1.0 does not go with use_beam_search.*set temperature=0"),
    ],
)
def test_incompatible_parameters_are_refused(params, match):
    with pytest.raises(ValueError, match=match):
        SamplingParams(**params)


@pytest.mark.parametrize(
    "option",
    [
        {"top_p": 0.9},
        {"top_k": 5},
        {"min_p": 0.1},
        {"presence_penalty": 1.0},
        {"frequency_penalty": 1.0},
        {"repetition_penalty": 1.1},
        {"logit_bias": {1: 1.0}},
        {"seed": 3},
        {"stop": "x"},
        {"logprobs": 1},
        {"bad_words": ["x"]},
        {"allowed_token_ids": [1]},
    ],
)
def test_sampling_options_do_not_go_with_beam_search(option):
    [name] = option
    with pytest.raises(ValueError, match=f"{name}=.* does not go with use_beam_search"):
        SamplingParams(use_beam_search=True, temperature=0, n=2, **option)


TAKEN_BY_BEAMS = {
    "n": 2,
    "best_of": 3,
    "use_beam_search": True,
    "length_penalty": 0.5,
    "early_stopping": "never",
    "temperature": 0,
    "stop_token_ids": [5],
    "ignore_eos": True,
    "max_tokens": 9,
    "min_tokens": 3,
    "prompt_logprobs": 1,
    "include_stop_str_in_output": True,
    "detokenize": False,
    "skip_special_tokens": False,
    "output_kind": RequestOutputKind.DELTA,
}
REFUSED_BY_BEAMS = {
    "top_p": 0.9, "top_k": 5, "min_p": 0.1, "presence_penalty": 1.0, "frequency_penalty": 1.0,
    "repetition_penalty": 1.1, "logit_bias": {1: 1.0}, "seed": 3, "stop": "x", "logprobs": 1,
    "bad_words": ["x"], "allowed_token_ids": [1],
}  # fmt: skip


def test_every_parameter_goes_with_beam_search_or_is_refused_by_it():
    """A new parameter has to be put into one of the two tables."""
    assert TAKEN_BY_BEAMS.keys() | REFUSED_BY_BEAMS.keys() == set(settings_of(SamplingParams))
    assert SamplingParams(**TAKEN_BY_BEAMS).use_beam_search
    for name, value in REFUSED_BY_BEAMS.items():
        with pytest.raises(ValueError, match=f"{name}=.* does not go with use_beam_search"):
            SamplingParams(**TAKEN_BY_BEAMS, **{name: value})


@pytest.mark.parametrize(
    ("params", "match"),
    [
        ({"beam_width": 0}, "beam_width=0 is not valid: expected an integer from 1 to 64"),
        ({"beam_width": 65}, "beam_width=65"),
        ({"beam_width": 2.0}, "beam_width=2.0"),
        ({"max_tokens": None}, "max_tokens=None"),
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"length_penalty": float("nan")}, "length_penalty=nan"),
        ({"length_penalty": 1e9}, "length_penalty=1000000000.0"),
        ({"early_stopping": "sometimes"}, "early_stopping='sometimes'.*never"),
        ({"temperature": 0.5}, "temperature=0.5 does not go with"),
    ],
)
def test_invalid_beam_search_parameters_are_refused(params, match):
    with pytest.raises(ValueError, match=match):
        BeamSearchParams(**({"beam_width": 4, "max_tokens": 8} | params))


def test_a_beam_wider_than_the_cap_is_refused_as_sampling_parameters_too():
    with pytest.raises(ValueError, match="best_of=65 is not valid: expected a beam width from 1 to 64"):
        SamplingParams(use_beam_search=True, temperature=0, best_of=65)


def test_beam_search_parameters_become_sampling_parameters():
    params = BeamSearchParams(4, 8, length_penalty=0.5, early_stopping="never", ignore_eos=True)
    assert params.to_sampling_params() == SamplingParams(
        n=4,
        best_of=4,
        use_beam_search=True,
        temperature=0,
        max_tokens=8,
        length_penalty=0.5,
        early_stopping="never",
        ignore_eos=True,
    )


anything = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.lists(st.integers(), max_size=2)
)


@given(name=st.sampled_from(sorted(INVALID)), value=anything)
def test_any_value_is_kept_or_refused_with_a_value_error(name, value):
    kept, refusal = None, ""
    try:
        kept = SamplingParams(**{name: value})
    except ValueError as error:
        refusal = str(error)
    assert name in refusal if kept is None else getattr(kept, name) == value


@pytest.mark.parametrize(
    ("reasons", "expected"),
    [([], True), ([FinishReason.STOP], True), ([FinishReason.LENGTH, None], False), ([None], False)],
)
def test_request_is_finished_when_every_completion_is(reasons, expected):
    outputs = [CompletionOutput(i, "", [], 0.0, finish_reason=reason) for i, reason in enumerate(reasons)]
    assert RequestOutput("r", None, [1], outputs).is_finished is expected
