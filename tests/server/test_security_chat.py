"""Messages, templates, tokens and prefixes that are meant to hurt; what completions refuse, the other routes refuse."""

import json
import socket
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jpaged.engine.template_process import TemplateProcess
from jpaged.server.protocol.chat import MAX_MESSAGES, ChatBody
from tests.server.bystander import bystander
from tests.server.conftest import Served

URL = "http://198.51.100.1/x"
HELLO = [{"role": "user", "content": "x = "}]
CHAT = "/v1/chat/completions"


@pytest.fixture(autouse=True)
def _while_another_client_asks(served):
    with bystander(served):
        yield


def post(served: Served, path: str, body: object):
    content = json.dumps(body).encode()
    return served.wire.post(path, content=content, headers={"content-type": "application/json"})


def refused(served: Served, path: str, body: dict) -> str:
    response = post(served, path, body)
    assert response.status_code == 400, (path, str(body)[:200], response.text[:200])
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert len(error["message"]) < 1000
    return error["message"]


def test_messages_are_bounded_and_of_the_known_forms(served):
    message = HELLO[0]
    for messages in (
        [],
        None,
        "x",
        [[]],
        [None],
        ["x"],
        {},
        [{}],
        HELLO * (MAX_MESSAGES + 1),
        [message | {"role": "root"}],
        [message | {"role": ["user"]}],
        [message | {"role": None}],
        [message | {"content": 7}],
        [message | {"content": {"text": "x"}}],
        [message | {"content": [7]}],
        [message | {"content": [{"type": "text", "text": 7}]}],
        [message | {"content": "x" * 7_000_000}],
        [message | {"content": "\ud800"}],
        [message | {"name": 7}],
        [message | {"tool_calls": "x"}],
    ):
        refused(served, CHAT, {"messages": messages, "max_tokens": 1})
        refused(served, "/tokenize", {"messages": messages})


def test_counts_of_a_conversation_are_bounded(served):
    for fields in (
        {"top_logprobs": 21, "logprobs": True},
        {"top_logprobs": -1, "logprobs": True},
        {"top_logprobs": True, "logprobs": True},
        {"top_logprobs": 3},
        {"logprobs": 3},
        {"n": 4097},
        {"max_completion_tokens": -1},
        {"max_completion_tokens": 2**31},
        {"tools": [{"type": "function", "function": {"name": "x"}}] * 129},
        {"tool_choice": "required"},
        {"response_format": {"type": "json_object"}},
        {"modalities": ["audio"]},
    ):
        refused(served, CHAT, {"messages": HELLO} | fields)


def test_no_request_brings_a_template_or_the_arguments_of_one(served):
    evil = "{{ ''.__class__.__mro__ }}{% for i in range(10**9) %}x{% endfor %}"
    kwargs = [{"tokenize": True, "chat_template": evil}, {"messages": "x"}, {"tools": "x"}, {"return_dict": True}]
    kwargs += [{"bos_token": "x"}, {"__class__": "x"}, {"self": "x"}, {"enable_thinking": {"a": []}}]
    for path in (CHAT, "/tokenize"):
        refused(served, path, {"messages": HELLO, "chat_template": evil})
        for each in kwargs:
            refused(served, path, {"messages": HELLO, "chat_template_kwargs": each})
    refused(served, "/v1/completions", {"prompt": "x", "chat_template": evil})
    response = post(served, "/tokenize", {"prompt": "x", "chat_template": evil})
    assert response.headers["x-jpaged-ignored-params"] == "chat_template"


def test_a_template_without_an_end_holds_no_other_request(served, monkeypatch):
    endless = "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}"
    process = TemplateProcess(endless, timeout_s=0.2)
    monkeypatch.setattr(served.server.template, "_process", process)
    for path in (CHAT, "/tokenize"):
        message = refused(served, path, {"messages": HELLO})
        assert message == "the chat template refuses the messages: it takes more than 0.2 s, or more memory than it may"
    process._timeout_s = 600
    asked = threading.Thread(target=post, args=(served, CHAT, {"messages": HELLO}))
    asked.start()
    while not process._child.is_alive:
        time.sleep(0.01)
    assert post(served, "/v1/completions", {"prompt": "x", "max_tokens": 1}).status_code == 200
    assert asked.is_alive()
    process.close()
    asked.join()


def test_the_text_of_a_control_token_in_a_message_is_text(served):
    specials = served.llm.tokenizer.all_special_tokens
    ids = set(served.llm.tokenizer.all_special_ids)
    assert ids
    for text in specials:
        content = f"{text}system{text * 3}"
        response = post(served, "/tokenize", {"messages": [{"role": "user", "content": content}]})
        plain = post(served, "/tokenize", {"messages": [{"role": "user", "content": "system"}]}).json()["tokens"]
        if response.status_code == 200:
            found = [token for token in response.json()["tokens"] if token in ids]
            assert found == [token for token in plain if token in ids]
        else:
            assert response.status_code == 400


def test_nothing_is_fetched_for_a_conversation(served, monkeypatch):
    connects: list[object] = []

    def watched(self, address, connect=socket.socket.connect):
        if "198.51" in str(address) or threading.current_thread().name == "server":
            connects.append(address)
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", watched)
    for part in (
        {"type": "image_url", "image_url": {"url": URL}},
        {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}},
        {"type": "input_audio", "input_audio": {"data": URL}},
        {"type": "file", "file": {"file_url": URL}},
        {"type": "text", "text": "x", "image_url": URL},
    ):
        post(served, CHAT, {"messages": [{"role": "user", "content": [part]}], "max_tokens": 1})
    assert connects == []


def test_tokens_are_bounded(served):
    limit, size = served.llm.max_model_len, len(served.llm.tokenizer)
    for tokens in ([-1], [size], [2**31], [2**63], [1.5], [True], ["1"], None, "x", [[1]], [1] * (limit + 1)):
        refused(served, "/detokenize", {"tokens": tokens})
    for prompt in (None, 7, ["x"], "x" * 7_000_000, "\U0001f600" * 500_000, "\ud800"):
        refused(served, "/tokenize", {"prompt": prompt})


def test_prefixes_are_bounded(served):
    limit = served.llm.max_model_len
    for fields in (
        {"prompt": [1] * limit * 2},
        {"prompt": ["x", "y"]},
        {"prompt": [-1]},
        {"prompt": [2**63]},
        {"prompt": []},
        {"prompt": "x" * 7_000_000},
        {"prompt": "x", "ttl": -1},
        {"prompt": "x", "ttl": 0},
        {"prompt": "x", "ttl": True},
        {"prompt": "x", "ttl": 1e300},
        {"prompt": "x", "cache_salt": "x" * 129},
        {"prompt": "x", "cache_salt": ""},
        {"prompt": "x", "cache_salt": "a\x00b"},
    ):
        refused(served, "/v1/prefixes", fields)
    for prefix_id in ("x", "prefix-", "%00", "..%2f", "prefix-" + "0" * 32):
        assert served.wire.get(f"/v1/prefixes/{prefix_id}").status_code == 404
        assert served.wire.delete(f"/v1/prefixes/{prefix_id}").status_code == 404


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
MESSAGES = st.lists(
    st.dictionaries(st.sampled_from(["role", "content", "name", "tool_calls", "reasoning"]), VALUES | st.just("user")),
    max_size=4,
)
NAMES = st.sampled_from([*ChatBody.model_fields, "tokens", "prompt", "ttl", "chat_template", "return_token_strs"])
PATHS = st.sampled_from([CHAT, CHAT, "/tokenize", "/detokenize", "/v1/prefixes", "/v1/requests/x/cancel"])


@settings(max_examples=150)
@given(PATHS, st.dictionaries(NAMES | st.text(max_size=8), VALUES, max_size=5), MESSAGES | st.just(HELLO))
def test_no_body_makes_the_server_fail(running, path, fields, messages):
    body = {"messages": messages} | fields | {"max_tokens": 2, "max_completion_tokens": 2}
    response = post(running, path, body)
    assert response.status_code in (200, 201, 400, 404, 429), response.text
    if response.status_code >= 400:
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        for secret in ("Traceback", "site-packages", ".py", "0x7f"):
            assert secret not in error["message"] or secret in json.dumps(body)
    if response.status_code == 201:
        assert running.wire.delete(response.headers["location"]).status_code == 200
