"""Values of fields that are meant to hurt: each is refused by name, nothing is computed for it, no one else notices."""

import json
import math
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jpaged.server.protocol.completions import CompletionBody
from jpaged.server.text_codec import LONG_TOKEN
from tests.server.bystander import PROMPT as BYSTANDERS_PROMPT
from tests.server.bystander import bystander
from tests.server.conftest import Served

PROMPT = [1, 2, 3]


@pytest.fixture(autouse=True)
def _while_another_client_asks(served):
    with bystander(served):
        yield


def post(served: Served, content: str, path: str = "/v1/completions"):
    return served.wire.post(path, content=content.encode(errors="surrogatepass"), headers={"content-type": JSON})


JSON = "application/json"


def refused(served: Served, fields: dict, param: str | None = None, path: str = "/v1/completions") -> str:
    """The message of the refusal, which names the field unless another one is expected."""
    response = post(served, json.dumps({"prompt": PROMPT} | fields), path)
    assert response.status_code == 400, (fields, response.text[:200])
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert len(error["message"]) < 1000
    name = next(iter(fields)) if param is None else param
    content = json.dumps(fields)
    if str(10**400) in content and f'"{10**400}"' not in content:  # no JSON for a parser that knows 64 bits
        name = "JSON"
    assert name in error["message"] or error["param"] == name, (fields, error)
    return error["message"]


NUMBERS = [4097, 2**31, 2**63, 10**400, -1, 0, True, 1.5, "1", [1], {}]


def test_counts_are_bounded(served):
    for name in ("n", "best_of"):
        for value in NUMBERS:
            refused(served, {name: value})
    for value in (1025, 2000, 4096):
        refused(served, {"n": value}, "sequences")
    refused(served, {"prompt": [[1]] * 300, "n": 4}, "sequences")
    refused(served, {"prompt": [[1]] * 1025}, "prompts")
    refused(served, {"prompt": ["x"] * 100_000}, "prompts")
    for value in (21, -1, 2**31, True, 1.0, "1"):
        refused(served, {"logprobs": value})
        refused(served, {"prompt_logprobs": value})
    for value in (["x"] * 65, "", [""], ["x", 1], "x" * 2**20, ["x" * 300] * 20, 7):
        refused(served, {"stop": value})
    refused(served, {"logit_bias": {str(i): 1.0 for i in range(1025)}})
    refused(served, {"n": 65, "use_beam_search": True}, "beam width")
    refused(served, {"bad_words": ["x"] * 1025})
    refused(served, {"bad_words": ["x" * 300] * 20})
    refused(served, {"stop_token_ids": [1] * 1025})
    refused(served, {"max_tokens": -1})
    refused(served, {"min_tokens": -1})
    refused(served, {"max_tokens": 2**40})


def test_log_probabilities_of_a_response_are_bounded(served):
    limit = served.llm.max_model_len
    fields = {"prompt": [[1] * (limit - 1)] * 64, "prompt_logprobs": 20, "max_tokens": 1}
    assert "log-probabilities" in refused(served, fields, "log-probabilities")
    fields = {"n": 1000, "logprobs": 20, "max_tokens": limit - 3}
    assert "log-probabilities" in refused(served, fields, "log-probabilities")


def test_log_probabilities_of_long_prompts_are_whole(served):
    """Cold and from the prefix cache: no row is missing, none is what memory held before."""
    prompt = [5 + i % 90 for i in range(served.llm.max_model_len // 3)]
    fields = {"prompt": [prompt] * 2, "prompt_logprobs": 3, "max_tokens": 1, "temperature": 0}
    cold, warm = [served.post("/v1/completions", **fields).json()["choices"] for _ in range(2)]
    for choice in (*cold, *warm):
        first, *entries = choice["prompt_logprobs"]
        assert first is None
        assert len(entries) == len(prompt) - 1
        values = [[each["logprob"] for each in entry.values()] for entry in entries]
        assert all(math.isfinite(value) and value <= 0 for entry in values for value in entry)
        reference = [[each["logprob"] for each in entry.values()] for entry in cold[0]["prompt_logprobs"][1:]]
        assert [max(entry) for entry in values] == pytest.approx([max(entry) for entry in reference], abs=1e-3)


def test_token_ids_are_in_the_vocabulary(served):
    size = served.llm.engine.model_config.vocab_size
    bad = [-1, size, size + 1, 2**31, 2**63, 2**64, 10**400, 1.5, True, None, "1", [1]]
    for value in bad:
        refused(served, {"prompt": [1, value]}, "prompt")
        refused(served, {"stop_token_ids": [value]})
        refused(served, {"allowed_token_ids": [value]})
    for key in ("-1", str(size), "1.5", "true", "", "x", str(2**31), str(10**400), "0x1", "١"):  # noqa: RUF001
        refused(served, {"logit_bias": {key: 1.0}})
    for value in ("1", None, True, [1], {}):
        refused(served, {"logit_bias": {"1": value}})


def test_numbers_are_finite(served):
    for name in ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"):
        for value in ("NaN", "Infinity", "-Infinity", "1e999", "-1e999"):
            assert post(served, f'{{"prompt": [1], "{name}": {value}}}').status_code == 400
        for value in (-1.0001, "1", True, [], 10**400):
            if (name, value) != ("presence_penalty", -1.0001) and (name, value) != ("frequency_penalty", -1.0001):
                refused(served, {name: value})
    refused(served, {"top_p": 0})
    refused(served, {"top_p": 1.0001})
    refused(served, {"repetition_penalty": 0})
    for value in (2**64, 10**400, -(2**63) - 1, 1.5, True, "1"):
        refused(served, {"seed": value})
    for value in (10**10, -(2**31) - 1, 1.5, "0", True):
        refused(served, {"priority": value})
    for fields in ({"temperature": -0.0}, {"temperature": 1e-320}, {"temperature": 1e-38}, {"top_p": 1e-320}):
        assert served.post("/v1/completions", prompt=PROMPT, max_tokens=2, **fields).status_code == 200


def test_what_comes_later_is_refused_by_name(served):
    """Structured output and tools are not there yet: nothing compiles what a client sends."""
    schema = {"type": "array", "items": {"$ref": "#"}}
    for _ in range(300):
        schema = {"type": "object", "properties": {"x": schema}}
    patterns = ["(a+)+b", "((a{100}){100}){100}", "a{1,1000000}"]
    cases = [
        {"response_format": {"type": "json_object"}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "http://a/b"}}}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": [""] * 10**5}}}},
        *[{"structured_outputs": {"regex": pattern}} for pattern in patterns],
        *[{"guided_regex": pattern} for pattern in patterns],
        {"guided_json": {"$ref": "file:///etc/passwd"}},
        {"guided_choice": []},
        {"guided_grammar": "root ::= root"},
        {"tools": [{"type": "function", "function": {"name": "x"}}] * 129},
        {"chat_template": "{{ ''.__class__ }}"},
        {"suffix": "x"},
    ]
    for fields in cases:
        refused(served, fields)


def test_salts_are_short_words(served):
    for value in ("", "x" * 129, "a\x00b", "a@b", "a b", "é", 7, True, ["a"]):
        refused(served, {"cache_salt": value})
    assert served.post("/v1/completions", prompt=PROMPT, max_tokens=1, cache_salt="x" * 128).status_code == 200


def test_a_long_text_is_refused_before_it_is_tokenised(served):
    """Tokenising it would take seconds. The event loop is free while the longest possible text is tokenised."""
    tokenised: list[int] = []
    threads: set[str] = set()
    encode, limit = served.llm.tokenizer.encode, served.server.codec.max_characters

    def counted(text, **options):
        tokenised.append(len(text))
        threads.add(threading.current_thread().name)
        return encode(text, **options)

    served.llm.tokenizer.encode = counted
    try:
        for text in ("x" * 7_000_000, "a" * 10**6, "\U0001f600" * 500_000, "\u0300" * 10**6, "<|endoftext|>" * 100_000):
            refused(served, {"prompt": text})
            refused(served, {"prompt": ["x", text]}, "prompt")
        assert set(tokenised) <= {len(BYSTANDERS_PROMPT)}
        for text in ("x = ", "\u0300", "\U0001f600"):
            refused(served, {"prompt": text * (limit // len(text))}, "max_model_len")
    finally:
        del served.llm.tokenizer.encode
    assert max(tokenised) == LONG_TOKEN * served.llm.max_model_len
    assert tokenised.count(max(tokenised)) == 3
    assert all(name.startswith("jpaged-prompts") for name in threads)


def test_text_is_text(served):
    for text in ("\ud800", "a\udc00b", "\udbff\udbff"):
        for fields in ({"prompt": text}, {"stop": text}, {"user": text}, {"model": text}, {"cache_salt": text}):
            response = post(served, json.dumps({"prompt": PROMPT} | fields))
            assert response.status_code == 400
            assert response.json()["error"]
            raw = json.dumps({"prompt": PROMPT} | fields, ensure_ascii=False)
            assert post(served, raw).status_code == 400
    for text in ("\x00", "\u2028", "\x1b[31m", "\u202e", "\ufeff", "\U0010ffff"):
        assert served.post("/v1/completions", prompt=text, max_tokens=1, user=text).status_code == 200
    assert post(served, '{"prompt": "a\x00b"}').status_code == 400  # a control character has to be escaped


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.sampled_from(NUMBERS),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
NAMES = st.sampled_from([*CompletionBody.model_fields, "response_format", "tools", "chat_template"])


@settings(max_examples=150)
@given(st.dictionaries(NAMES | st.text(max_size=8), VALUES, max_size=6), st.sampled_from([1, 2, 3]))
def test_no_body_makes_the_server_fail(running, fields, max_tokens):
    body = {"prompt": PROMPT} | fields | {"max_tokens": max_tokens}
    response = post(running, json.dumps(body))
    assert response.status_code in (200, 400, 404), response.text
    if response.status_code != 200:
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        for secret in ("Traceback", "site-packages", ".py", "0x7f"):
            assert secret not in error["message"] or secret in json.dumps(body)
