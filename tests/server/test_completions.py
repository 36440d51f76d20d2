"""/v1/completions, not streamed: what OpenAI's and vLLM's fields mean."""

import json

import httpx
import pytest

from jpaged.engine.token_texts import BYTE_LETTERS
from jpaged.server import ServerSettings, create_app
from tests.server.conftest import events

PROMPT = "def add(a, b):"


def test_text_is_what_the_engine_generates(served):
    body = served.complete(PROMPT, max_tokens=8)
    expected = served.generate(PROMPT, max_tokens=8)
    [choice] = body["choices"]
    assert choice["text"] == expected.outputs[0].text
    assert choice["finish_reason"] == "length"
    assert body["object"] == "text_completion"
    assert body["id"].startswith("cmpl-")
    assert body["model"] == "jpaged"
    num_tokens = len(expected.prompt_token_ids)
    assert body["usage"]["prompt_tokens"] == num_tokens
    assert body["usage"]["completion_tokens"] == 8
    assert body["usage"]["total_tokens"] == num_tokens + 8


def test_max_tokens_is_16_unless_null_which_fills_the_context(served):
    assert served.complete(PROMPT, ignore_eos=True)["usage"]["completion_tokens"] == 16
    prompt = [5] * (served.llm.max_model_len - 20)
    assert served.complete(prompt, ignore_eos=True, max_tokens=None)["usage"]["completion_tokens"] == 20


def test_prompts_may_be_texts_or_token_ids(served):
    ids = served.generate(PROMPT).prompt_token_ids
    text = served.complete(PROMPT, max_tokens=4)["choices"][0]["text"]
    for prompt in ([PROMPT, PROMPT], [ids, ids]):
        choices = served.complete(prompt, max_tokens=4)["choices"]
        assert [(each["index"], each["text"]) for each in choices] == [(0, text), (1, text)]
    assert served.complete(ids, max_tokens=4)["choices"][0]["text"] == text


def test_choices_of_several_prompts_are_counted_on(served):
    body = served.complete([PROMPT, "import"], n=2, temperature=1, seed=5, max_tokens=4)
    assert [each["index"] for each in body["choices"]] == [0, 1, 2, 3]
    own = served.generate("import", n=2, temperature=1, seed=5, max_tokens=4)
    assert [each["text"] for each in body["choices"][2:]] == [each.text for each in own.outputs]


def test_echo_begins_with_the_prompt(served):
    ids = served.generate(PROMPT).prompt_token_ids
    plain = served.complete(PROMPT, max_tokens=4)["choices"][0]["text"]
    assert served.complete(PROMPT, max_tokens=4, echo=True)["choices"][0]["text"] == PROMPT + plain
    assert served.complete(ids, max_tokens=4, echo=True)["choices"][0]["text"] == PROMPT + plain


def test_echoed_logprobs_have_an_entry_for_every_token(served):
    expected = served.generate(PROMPT, max_tokens=1, logprobs=1, prompt_logprobs=1)
    logprobs = served.complete(PROMPT, max_tokens=1, logprobs=1, echo=True)["choices"][0]["logprobs"]
    ids = [*expected.prompt_token_ids, *expected.outputs[0].token_ids]
    entries = [*expected.prompt_logprobs[1:], *expected.outputs[0].logprobs]
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["top_logprobs"][0] is None
    chosen = [entry[token_id].logprob for token_id, entry in zip(ids[1:], entries, strict=True)]
    assert logprobs["token_logprobs"][1:] == pytest.approx(chosen, abs=1e-4)
    assert "".join(logprobs["tokens"]) == PROMPT + expected.outputs[0].text
    for value, top in zip(logprobs["token_logprobs"][1:], logprobs["top_logprobs"][1:], strict=True):
        assert value in top.values()
    assert logprobs["text_offset"][:2] == [0, len(logprobs["tokens"][0])]


def test_no_tokens_may_be_asked_for(served):
    body = served.complete(PROMPT, max_tokens=0, logprobs=1, echo=True)
    [choice] = body["choices"]
    assert choice["text"] == PROMPT
    assert choice["finish_reason"] == "length"
    assert len(choice["logprobs"]["tokens"]) == body["usage"]["prompt_tokens"]
    assert body["usage"]["completion_tokens"] == 0


def test_prompt_logprobs_and_token_ids_are_in_vllms_form(served):
    [choice] = served.complete(PROMPT, max_tokens=2, prompt_logprobs=1, return_token_ids=True)["choices"]
    expected = served.generate(PROMPT, max_tokens=2)
    assert choice["prompt_token_ids"] == expected.prompt_token_ids
    assert choice["token_ids"] == expected.outputs[0].token_ids
    assert choice["prompt_logprobs"][0] is None
    assert set(choice["prompt_logprobs"][1][str(expected.prompt_token_ids[1])]) == {"logprob", "rank", "decoded_token"}


def test_beams_have_vllms_names(served):
    body = served.complete(PROMPT, use_beam_search=True, n=2, max_tokens=4)
    own = served.generate(PROMPT, use_beam_search=True, n=2, max_tokens=4)
    assert [each["text"] for each in body["choices"]] == [each.text for each in own.outputs]


def test_seed_is_folded_into_32_bits_and_told(served):
    response = served.post("/v1/completions", prompt=PROMPT, seed=2**32 + 7, max_tokens=4)
    assert response.headers["x-jpaged-seed"] == "7"
    expected = served.generate(PROMPT, temperature=1, seed=7, max_tokens=4)
    assert response.json()["choices"][0]["text"] == expected.outputs[0].text


def test_usage_counts_cached_tokens_which_salts_keep_apart(served):
    prompt = [7] * 64

    def cached(**body):
        return served.complete(prompt, max_tokens=1, **body)["usage"]["prompt_tokens_details"]["cached_tokens"]

    cold, warm, other = cached(cache_salt="tests"), cached(cache_salt="tests"), cached(cache_salt="more")
    assert (cold, other) == (0, 0)
    assert warm >= 48


def test_unknown_fields_are_named_or_refused(served):
    response = served.post("/v1/completions", prompt=PROMPT, max_tokens=1, foo=1, bar=None, **{"a b\n": 2})
    assert response.headers["x-jpaged-ignored-params"] == "foo, a?b?"

    async def strict():
        async with served.client(strict_params=True) as client:
            return await client.post("/v1/completions", json={"prompt": PROMPT, "foo": 1, "bar": None})

    refused = served.run(strict())
    assert refused.status_code == 400
    assert refused.json()["error"]["message"] == "unknown fields: 'foo'"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": ["a", [1]]}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": [-1]}, None),
        ({"prompt": [2**63]}, None),
        ({"prompt": "a" * 7_000_000}, "prompt"),
        ({"prompt": ["a"] * 1025}, "prompt"),
        ({"prompt": ["a"] * 300, "n": 4}, None),
        ({"n": 0}, "n"),
        ({"n": True}, "n"),
        ({"n": 1.0}, "n"),
        ({"n": "1"}, "n"),
        ({"n": 2, "best_of": 1}, "best_of"),
        ({"n": 2, "best_of": 3, "stream": True}, "best_of"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 2**31}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"logprobs": 21}, "logprobs"),
        ({"seed": 2**64}, "seed"),
        ({"seed": 10**400}, None),
        ({"stop": [""]}, "stop"),
        ({"stop": ["x"] * 65}, "stop"),
        ({"stop": "x" * 5000}, "stop"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"1": "2"}}, "logit_bias"),
        ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias"),
        ({"logit_bias": {str(2**31): 1}}, "logit_bias"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"cache_salt": ""}, "cache_salt"),
        ({"cache_salt": "x" * 129}, "cache_salt"),
        ({"cache_salt": "\0"}, "cache_salt"),
        ({"cache_salt": "@"}, "cache_salt"),
        ({"cache_salt": 1}, "cache_salt"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "prompt_logprobs": 1}, "prompt_logprobs"),
        ({"stream": True, "echo": True, "logprobs": 1}, "echo"),
        ({"suffix": "end"}, "suffix"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"guided_regex": "a"}, "guided_regex"),
        ({"logprobs": 20, "max_tokens": None, "n": 100}, None),
    ],
)
def test_mistakes_are_400_and_name_the_field(served, fields, param):
    response = served.post("/v1/completions", **{"prompt": PROMPT} | fields)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert error["message"]
    assert "None" not in error["message"]


@pytest.mark.parametrize(
    "body",
    [b"", b"null", b"[]", b"{", b"[" * 100_000, b'{"prompt": NaN}', b'{"prompt": "\\ud800"}', b"\xff\xfe{\x00}\x00"],
)
def test_bodies_that_are_no_json_object_are_400(served, body):
    response = served.wire.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_other_content_types_are_415(served):
    response = served.wire.post("/v1/completions", content=json.dumps({"prompt": PROMPT}))
    assert response.status_code == 415


def test_fields_that_change_nothing_are_taken(served):
    fields = {"suffix": "", "tools": [], "response_format": {"type": "text"}, "user": "u", "stop": None, "n": None}
    response = served.post("/v1/completions", prompt=PROMPT, max_tokens=1, **fields)
    assert response.status_code == 200
    assert "x-jpaged-ignored-params" not in response.headers


def test_errors_of_routing_have_the_form_of_the_api(served):
    assert served.wire.get("/v1/nothing").json()["error"]["type"] == "not_found_error"
    response = served.wire.get("/v1/completions")
    assert response.status_code == 405
    assert response.json()["error"]["message"]


def test_only_the_served_model_is_served(served):
    [card] = served.wire.get("/v1/models").json()["data"]
    assert card["id"] == "jpaged"
    assert served.wire.get("/v1/models/jpaged").json() == card
    for response in (served.wire.get("/v1/models/other/one"), served.post("/v1/completions", prompt="a", model="x")):
        assert response.status_code == 404
        assert response.json()["error"]["code"] == "model_not_found"
        assert "ask for 'jpaged'" in response.json()["error"]["message"]


def test_the_model_may_be_asked_for_as_it_was_given(served):
    app = create_app(served.llm, ServerSettings(), aliases=["/models/tiny"])
    body = {"prompt": PROMPT, "max_tokens": 1}

    async def ask():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1") as client:
            names = "/models/tiny", "tiny"
            answers = [await client.post("/v1/completions", json=body | {"model": name}) for name in names]
            return [*answers, await client.get("/v1/models")]

    by_alias, by_other, models = served.run(ask())
    assert (by_alias.status_code, by_alias.json()["model"]) == (200, "jpaged")
    assert by_other.status_code == 404
    assert "/models" not in by_other.text, "no path of the server is shown"
    assert [card["id"] for card in models.json()["data"]] == ["jpaged"]


@pytest.mark.parametrize(("is_streamed", "echo"), [(False, False), (False, True), (True, False)])
def test_offsets_index_the_text_that_is_sent(served, is_streamed, echo):
    body = {"prompt": PROMPT, "temperature": 0, "max_tokens": 6, "logprobs": 0, "echo": echo, "stream": is_streamed}
    letter = next(letter for letter, byte in BYTE_LETTERS.items() if byte == 0x80)
    token_id = served.llm.tokenizer.convert_tokens_to_ids(letter)
    response = served.post("/v1/completions", **body, logit_bias={str(token_id): 100})
    chunks = events(response.content) if is_streamed else [response.json()]
    choices = [each for chunk in chunks for each in chunk["choices"]]
    start = len(PROMPT) if echo else 0
    assert "".join(each["text"] for each in choices)[start:] == "\ufffd" * 6
    offsets = [at for each in choices if each["logprobs"] for at in each["logprobs"]["text_offset"]]
    assert offsets[-6:] == list(range(start, start + 6))


def test_the_id_of_an_answer_is_that_of_the_log(served):
    response = served.post("/v1/completions", prompt=PROMPT, max_tokens=1)
    assert response.json()["id"] == f"cmpl-{response.headers['x-request-id']}"


def test_a_mistake_of_ours_is_no_mistake_of_the_client(served, monkeypatch):
    def fail(result) -> None:
        raise ValueError("a secret of ours")

    monkeypatch.setattr("jpaged.server.answer.check_end", fail)
    response = served.post("/v1/completions", prompt=PROMPT, max_tokens=1)
    assert response.status_code == 500
    assert "secret" not in response.text


def test_ids_that_cannot_fit_are_refused_before_they_become_text(served, monkeypatch):
    monkeypatch.setattr(served.server.llm, "in_background", None)
    response = served.post("/v1/completions", prompt=[1] * (served.llm.max_model_len + 1), echo=True)
    assert response.status_code == 400
