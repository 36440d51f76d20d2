"""Streamed completions: the same as the whole ones, event by event."""

import asyncio
import json
from typing import ClassVar

import pytest

from jpaged.engine.request_stream import RequestStream
from jpaged.request import (
    CompletionDelta,
    CompletionOutput,
    FinishReason,
    Request,
    RequestOutput,
    SamplingParams,
)
from jpaged.server import ServerSettings, create_app
from jpaged.server.opening import Opening
from jpaged.server.sse import DONE, KEEP_ALIVE, Encoder, EventStream, send_events
from tests.server.conftest import events

PROMPT = "def add(a, b):"


def stream(served, path="/v1/completions", **body):
    body = {"temperature": 0, "stream": True} | body
    if path == "/v1/completions":
        body = {"prompt": PROMPT} | body
    with served.wire.stream("POST", path, json=body) as response:
        assert response.status_code == 200, response.read()
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["x-accel-buffering"] == "no"
        return events(response.read())


def joined(chunks, num_choices):
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    return ["".join(each["text"] for each in choices if each["index"] == i) for i in range(num_choices)]


def ends(chunks):
    choices = [choice for chunk in chunks for choice in chunk["choices"] if choice["finish_reason"]]
    return {choice["index"]: choice["finish_reason"] for choice in choices}


@pytest.mark.parametrize(
    "body",
    [
        {"max_tokens": 9},
        {"max_tokens": 9, "echo": True},
        {"max_tokens": 0, "echo": True},
        {"prompt": [PROMPT, "import os", "class"], "n": 2, "temperature": 1, "seed": 3, "max_tokens": 5},
        {"max_tokens": 40, "stop": ["return", "\n"]},
        {"use_beam_search": True, "n": 2, "max_tokens": 4},
    ],
    ids=str,
)
def test_joined_events_are_the_whole_completion(served, body):
    chunks = stream(served, **body)
    whole = served.complete(
        body.get("prompt", PROMPT), **{key: value for key, value in body.items() if key != "prompt"}
    )
    texts = [each["text"] for each in whole["choices"]]
    assert joined(chunks, len(texts)) == texts
    assert ends(chunks) == {each["index"]: each["finish_reason"] for each in whole["choices"]}
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}
    assert len({chunk["id"] for chunk in chunks}) == 1


def test_streamed_logprobs_and_ids_are_those_of_the_whole(served):
    chunks = stream(served, max_tokens=6, logprobs=2, return_token_ids=True)
    [whole] = served.complete(PROMPT, max_tokens=6, logprobs=2, return_token_ids=True)["choices"]
    choices = [chunk["choices"][0] for chunk in chunks]
    assert choices[0]["prompt_token_ids"] == whole["prompt_token_ids"]
    assert [each for choice in choices for each in choice["token_ids"]] == whole["token_ids"]
    parts = [choice["logprobs"] for choice in choices if choice["logprobs"]]
    for name in ("tokens", "text_offset"):
        assert [each for part in parts for each in part[name]] == whole["logprobs"][name]
    values = [each for part in parts for each in part["token_logprobs"]]
    assert values == pytest.approx(whole["logprobs"]["token_logprobs"], abs=1e-4)


def test_usage_comes_last_or_always(served):
    plain = stream(served, max_tokens=4)
    assert not any("usage" in chunk for chunk in plain)
    last = stream(served, max_tokens=4, stream_options={"include_usage": True})
    assert [chunk["usage"] for chunk in last[:-1]] == [None] * (len(last) - 1)
    assert last[-1]["choices"] == []
    assert last[-1]["usage"]["completion_tokens"] == 4
    always = stream(served, max_tokens=4, stream_options={"include_usage": True, "continuous_usage_stats": True})
    assert [chunk["usage"]["completion_tokens"] for chunk in always] == [1, 2, 3, 4, 4]


def test_chat_begins_with_its_role_and_ends_with_a_reason(served):
    messages = [{"role": "user", "content": "def f(x):"}]
    chunks = stream(served, "/v1/chat/completions", messages=messages, max_tokens=5, ignore_eos=True)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert all("role" not in delta for delta in deltas[1:])
    whole = served.post("/v1/chat/completions", messages=messages, max_tokens=5, temperature=0, ignore_eos=True).json()[
        "choices"
    ][0]
    assert "".join(delta.get("content", "") for delta in deltas) == whole["message"]["content"]
    assert chunks[-1]["choices"][0]["finish_reason"] == whole["finish_reason"]


def test_silent_streams_get_comments_before_their_first_token(served):
    app = create_app(served.llm, ServerSettings(keep_alive_s=0.01))
    body = json.dumps({"prompt": PROMPT, "max_tokens": 2, "stream": True}).encode()
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"", "http_version": "1.1"}
    scope["headers"] = [(b"host", b"localhost"), (b"content-type", b"application/json")]

    async def task():
        sent = asyncio.Queue()
        received = asyncio.Queue()
        received.put_nowait({"type": "http.request", "body": body})
        with served.held() as go_on:
            answering = asyncio.ensure_future(app(scope, received.get, sent.put))
            assert (await sent.get())["status"] == 200
            content = (await sent.get())["body"]
            go_on.set()
            await answering
        while not sent.empty():
            content += sent.get_nowait()["body"]
        return content

    content = served.run(task())
    assert content.startswith(b": keep-alive\n\n")
    assert ends(events(content)) == {0: "length"}


class Direct:
    """A connection that a stream writes to without waiting, unless ``is_ready`` is off."""

    def __init__(self):
        self.is_ready, self.parts = True, []

    def write(self, part):
        self.parts.append(part)


class TextForm:
    """Events of nothing but text."""

    chunk_head: ClassVar[dict] = {"id": "x"}
    text_frame = b'"text":', b""
    needs_choice = False

    def first_choices(self, number, index):
        return []

    def choice(self, index, delta):
        return {"index": index, "text": delta.text, "end": delta.finish_reason}


def test_deltas_are_sent_as_they_arrive_and_past_a_slow_reader_by_the_task_alone():
    params, direct, sent = SamplingParams(max_tokens=9), Direct(), []
    streams = [RequestStream(Request("a", "x", [1], params, 0), lambda name: None, 8)]

    async def open_one(number):
        return streams[number]

    async def send(message):
        sent.append(message.get("body"))

    async def turns():
        for _ in range(9):
            await asyncio.sleep(0)

    def arrive(text, reason=None):
        streams[0].take(CompletionDelta("a", 0, text, [1], reason), 1)
        if reason is not None:
            streams[0].finish(RequestOutput("a", "x", [1], [CompletionOutput(0, "", [1], 0.0, None, reason)]))
        streams[0].wake()

    async def task():
        opening = Opening(1, open_one, lambda: None)
        events = EventStream(send, {}, direct)
        options = {"include_usage": False, "tells_usage_always": False, "hides_tokens": False}
        encoder = Encoder(TextForm(), opening, 1, 1, **options)
        sending = asyncio.ensure_future(send_events(events, opening, encoder))
        direct.is_ready = False  # no response has started
        await turns()
        arrive("a")
        await turns()
        direct.is_ready = True
        assert (sent, direct.parts) == ([None, event("a")], [])
        arrive("b")
        arrive("c")
        assert direct.parts == [event("b"), event("c")], "no turn of the loop was taken"
        events.keep_alive(0.0)
        arrive("d")
        await turns()
        assert sent[2:] == [KEEP_ALIVE, event("d")]
        direct.is_ready = False
        arrive("e")
        await turns()
        direct.is_ready = True
        arrive("f", FinishReason.STOP)
        await sending
        await opening.close()
        assert sent[4:] == [event("e"), b'data: {"id":"x","choices":[{"index":0,"text":"f","end":"stop"}]}\n\n' + DONE]
        assert len(direct.parts) == 2

    def event(text):
        return b'data: {"id":"x","choices":[{"index":0,"text":"%b"}]}\n\n' % text.encode()

    asyncio.run(task())


def test_events_past_the_middleware_are_those_of_other_servers(served):
    """A server other than ours has no direct way to its connections."""
    body = {"prompt": PROMPT, "max_tokens": 30, "temperature": 0, "stream": True, "stop": "never seen"}
    [direct, through] = [[], []]

    async def task():
        async with served.client() as client:
            response = await client.post("/v1/completions", json=body)
            return events(response.content)

    for chunks, into in ((stream(served, **body), direct), (served.run(task()), through)):
        for chunk in chunks:
            into.append({key: value for key, value in chunk.items() if key not in ("id", "created")})
    assert direct == through


def test_refused_streams_have_a_status(served):
    response = served.post("/v1/completions", prompt=[10**6], stream=True)
    assert response.status_code == 400
    assert json.loads(response.content)["error"]["message"]


def test_a_failure_within_a_stream_is_told_without_its_text(served, monkeypatch, caplog):
    async def fail(events, streams, encoder) -> None:
        await events.write(b"data: {}\n\n")
        raise ValueError("a secret of ours")

    monkeypatch.setattr("jpaged.server.answer.send_events", fail)
    response = served.post("/v1/completions", prompt="x", max_tokens=1, stream=True)
    assert response.status_code == 200
    first, error, rest = response.text.split("\n\n")
    assert (first, rest) == ("data: {}", "")
    assert json.loads(error.removeprefix("data: "))["error"]["type"] == "server_error"
    assert "secret" not in response.text
    assert "a secret of ours" in caplog.text


# Several prompts ------------------------------------------------------------------------------------------------------


@pytest.fixture
def late(served, monkeypatch):
    """Holds back the second prompt of a call until it is told to go on, or to fail."""
    go_on, open_one = asyncio.Event(), served.llm.open
    errors = []

    async def open_late(prompt, params, request_id, **options):
        if request_id.endswith("-1"):
            await go_on.wait()
            for error in errors:
                raise error
        return await open_one(prompt, params, request_id, **options)

    monkeypatch.setattr(served.llm, "open", open_late)

    def release(error=None):
        errors.extend([] if error is None else [error])
        served._loop.call_soon_threadsafe(go_on.set)

    yield release
    release()
    assert served.run(served.idle()) == 0
    assert not served.server.calls
    assert not served.server._waiting
    assert not served.server._tickets


def lines_until_first_text(lines):
    for line in lines:
        yield line
        if '"text"' in line:
            return


BODY = {"prompt": [PROMPT, "import os"], "temperature": 0, "max_tokens": 5, "stream": True}


def test_prompt_is_streamed_while_another_waits_for_its_turn(served, late):
    whole = [served.complete(prompt, max_tokens=5)["choices"][0]["text"] for prompt in BODY["prompt"]]
    with served.wire.stream("POST", "/v1/completions", json=BODY) as response:
        lines = response.iter_lines()
        before = list(lines_until_first_text(lines))
        assert response.status_code == 200
        late()
        chunks = events("\n".join([*before, *lines]).strip().encode())
    assert joined(chunks, 2) == whole
    assert ends(chunks) == {0: "length", 1: "length"}


def test_prompt_that_is_refused_after_others_have_begun_ends_the_stream_with_an_error(served, late):
    with served.wire.stream("POST", "/v1/completions", json=BODY) as response:
        lines = response.iter_lines()
        list(lines_until_first_text(lines))
        late(ValueError("too late"))
        rest = "".join(lines)
    assert '"error":{"message":"too late"' in rest
    assert "[DONE]" not in rest


def test_call_of_which_one_prompt_waits_can_be_cancelled(served, late):
    with served.wire.stream("POST", "/v1/completions", json=BODY | {"max_tokens": 500}) as response:
        lines = response.iter_lines()
        [first, *_] = [line for line in lines_until_first_text(lines) if line]
        call_id = json.loads(first.removeprefix("data: "))["id"]
        assert served.post(f"/v1/requests/{call_id}/cancel").status_code == 200
        late()
        rest = "".join(lines)
    assert '"code":"cancelled"' in rest


def test_prompts_are_all_checked_before_one_of_them_runs(served):
    response = served.post("/v1/completions", **BODY | {"prompt": [[1, 2], [3, 10**6]]})
    assert response.status_code == 400
    assert "prompt_token_ids[1]=1000000 is not valid" in response.json()["error"]["message"]


def test_prompts_of_one_whole_response_may_have_their_turns_one_by_one(served, late):
    late()
    choices = served.complete(BODY["prompt"], max_tokens=5)["choices"]
    assert [choice["index"] for choice in choices] == [0, 1]
