"""/v1/chat/completions, not streamed: messages to a prompt, and an answer in OpenAI's form."""

import pytest

HELLO = [{"role": "user", "content": "def f(x):"}]
IMAGE = [{"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/a.png"}}]


def chat(served, messages=HELLO, **body) -> dict:
    response = served.post("/v1/chat/completions", **{"messages": messages, "temperature": 0, "max_tokens": 6} | body)
    assert response.status_code == 200, response.text
    return response.json()


def prompt_ids(served, messages, **body) -> list[int]:
    return chat(served, messages, return_token_ids=True, max_tokens=1, **body)["prompt_token_ids"]


def test_answer_is_what_the_engine_generates_after_the_template(served):
    body = chat(served)
    own = served.generate("def f(x):\n", max_tokens=6)
    [choice] = body["choices"]
    assert choice["message"]["role"] == "assistant"
    assert choice["message"]["content"] == own.outputs[0].text
    assert choice["finish_reason"] == own.outputs[0].finish_reason
    assert body["object"] == "chat.completion"
    assert body["id"].startswith("chatcmpl-")
    assert body["usage"]["prompt_tokens"] == len(own.prompt_token_ids)


def test_contents_may_be_parts_or_null(served):
    parts = [{"type": "text", "text": "def f(x):"}]
    plain = prompt_ids(served, HELLO)
    assert prompt_ids(served, [{"role": "developer", "content": parts}]) == plain
    assert prompt_ids(served, [{"role": "assistant", "content": None}, *HELLO]) == [
        *served.generate("\n").prompt_token_ids,
        *plain,
    ]


def test_the_final_message_may_be_continued(served):
    continued = prompt_ids(served, [{"role": "assistant", "content": "import"}], continue_final_message=True)
    assert continued == served.generate("import").prompt_token_ids


def test_max_completion_tokens_wins(served):
    usage = chat(served, ignore_eos=True, max_tokens=3, max_completion_tokens=5)["usage"]
    assert usage["completion_tokens"] == 5


def test_logprobs_have_exact_bytes(served):
    [choice] = chat(served, logprobs=True, top_logprobs=2)["choices"]
    own = served.generate("def f(x):\n", max_tokens=6, logprobs=2)
    content = choice["logprobs"]["content"]
    values = [entry[t].logprob for t, entry in zip(own.outputs[0].token_ids, own.outputs[0].logprobs, strict=True)]
    assert [each["logprob"] for each in content] == pytest.approx(values, abs=1e-4)
    assert all(len(each["top_logprobs"]) == 2 for each in content)
    assert bytes(byte for each in content for byte in each["bytes"]).decode().startswith(choice["message"]["content"])


def test_bytes_of_all_tokens_make_up_their_text(served):
    codec, text = served.server.codec, "naïve — 日本語 🙂\n\tx"
    token_ids = served.llm.tokenizer.encode(text)
    pieces = [codec.bytes_of(token_id, codec.decode_one(token_id)) for token_id in token_ids]
    assert bytes(byte for piece in pieces for byte in piece).decode() == text


def test_text_of_a_control_token_is_read_as_text(served):
    special = served.llm.tokenizer.eos_token
    ids = prompt_ids(served, [{"role": "user", "content": f"a{special}b"}])
    assert served.llm.tokenizer.eos_token_id not in ids
    assert served.llm.tokenizer.decode(ids) == f"a{special}b\n"


def test_tool_calls_are_not_nested_without_end(served):
    call: dict = {"name": "f"}
    for _ in range(900):
        call = {"function": call}
    message = {"role": "assistant", "content": "x", "tool_calls": [call]}
    response = served.post("/v1/chat/completions", messages=[message], max_tokens=1)
    assert response.status_code == 400
    assert "nested" in response.json()["error"]["message"]
    message["tool_calls"] = [{"function": {"name": "f", "arguments": {"a": [1]}}}]
    assert served.post("/v1/chat/completions", messages=[message], max_tokens=1).status_code == 200


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [{"content": "x"}]}, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://a"}}]}]},
            "messages",
        ),
        ({"messages": HELLO * 2049}, "messages"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "logprobs"),
        ({"logprobs": 1}, "logprobs"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format"),
        ({"chat_template": "{{ 1 }}"}, "chat_template"),
        ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"messages": 1}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"enable_thinking": {}}}, "chat_template_kwargs"),
        ({"messages": [{"role": "user", "content": "a" * 7_000_000}]}, "messages"),
        ({"add_generation_prompt": True, "continue_final_message": True}, None),
    ],
)
def test_mistakes_are_400_and_name_the_field(served, fields, param):
    response = served.post("/v1/chat/completions", **{"messages": HELLO} | fields)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param


def test_parameters_that_the_checkpoint_names_fill_in_what_a_request_leaves_out(served, monkeypatch):
    engine, seen = served.llm.engine, []
    monkeypatch.setattr(engine, "sampling_defaults", {"temperature": 0.5, "top_k": 3, "max_tokens": 4})
    make_call = served.server.make_call
    monkeypatch.setattr(served.server, "make_call", lambda *args: seen.append(args[3]) or make_call(*args))
    body = {"messages": [{"role": "user", "content": "hi"}]}
    assert served.post("/v1/chat/completions", **body).json()["usage"]["completion_tokens"] <= 4
    served.post("/v1/chat/completions", **body, temperature=0, max_tokens=2)
    served.post("/v1/chat/completions", **body, use_beam_search=True, n=2, max_tokens=2)
    served.complete("a", max_tokens=2)
    found = [(params.temperature, params.top_k, params.max_tokens) for params in seen]
    assert found == [(0.5, 3, 4), (0, 3, 2), (0, 0, 2), (0, 3, 2)]
