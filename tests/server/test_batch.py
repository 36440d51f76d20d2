"""Batches: files of requests, their results, and runs that go on from there."""

import asyncio
import json

import pytest

from jpaged.engine.health import EngineDeadError, Health, HealthState
from jpaged.server import ServerSettings
from jpaged.server.batch import Batch, run_batch
from tests.server.conftest import TIMEOUT_S

BODY = {"prompt": "def add(a, b):", "max_tokens": 4, "temperature": 0}


def line(custom_id: str, **changes) -> str:
    fields = {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": BODY}
    return json.dumps(fields | changes)


@pytest.fixture
def files(tmp_path):
    """The files of requests and results, and a function that writes the first and reads the second."""
    source, destination = tmp_path / "in.jsonl", tmp_path / "out.jsonl"

    def write(*lines: str) -> None:
        source.write_text("\n".join(lines) + "\n")

    def results() -> list[dict]:
        return [json.loads(each) for each in destination.read_text().splitlines()]

    return source, destination, write, results


def compute(served, source, destination) -> Batch:
    batch = Batch.open(source, destination)
    served.run(run_batch(served.llm, batch, ServerSettings()))
    return batch


def test_results_are_the_servers_and_bad_lines_get_their_errors(served, files):
    source, destination, write, results = files
    bad = {
        "{": "line 2: it is not valid JSON",
        "[]": "line 3: it is not a JSON object",
        json.dumps({"url": "/v1/completions", "body": BODY}): "line 4: custom_id is missing",
        line("method", method="GET"): "line 5: method is not POST",
        line("url", url="/v1/models"): "line 6: url is not one of /v1/completions, /v1/chat/completions",
        line("body", body=[]): "line 7: body is missing or no JSON object",
        line("stream", body=BODY | {"stream": True}): "line 8: body has stream=true",
        line("first"): "line 9: custom_id 'first' is that of line 1 too",
    }
    write(line("first"), *bad, "", line("invalid", body=BODY | {"max_tokens": -1}), line("last"))
    batch = compute(served, source, destination)
    assert (batch.num_lines, batch.num_done, batch.num_failed) == (11, 11, 9)
    found = results()
    errors = sorted([each["error"]["message"] for each in found if each["error"]], key=lambda text: int(text[5]))
    for message, expected in zip(errors, bad.values(), strict=True):
        assert message.startswith(expected)
    assert all(each["response"] is None for each in found if each["error"])
    answered = {each["custom_id"]: each["response"] for each in found if each["response"]}
    assert answered["invalid"]["status_code"] == 400
    assert answered["invalid"]["body"]["error"]["param"] == "max_tokens"
    expected = served.complete(**BODY)
    for custom_id in ("first", "last"):
        response = answered[custom_id]
        assert response["status_code"] == 200
        assert response["request_id"]
        assert response["body"]["choices"] == expected["choices"]
        assert response["body"]["usage"]["completion_tokens"] == 4


def test_a_run_that_is_stopped_keeps_its_results_and_the_next_one_goes_on(served, files, monkeypatch):
    source, destination, write, results = files
    write(*[line(f"request-{i}", body=BODY | {"max_tokens": 2 + 3 * i}) for i in range(6)])
    batch = Batch.open(source, destination)
    write_result = batch.write

    async def stopped() -> None:
        task = asyncio.ensure_future(run_batch(served.llm, batch, ServerSettings()))

        def stop_after_two(result: dict) -> None:
            if batch.num_done < 2:
                write_result(result)
            else:
                task.cancel()

        monkeypatch.setattr(batch, "write", stop_after_two)
        with pytest.raises(asyncio.CancelledError):
            await task

    served.run(stopped())
    first = results()
    assert len(first) == 2
    assert served.run(served.idle()) == 0
    with destination.open("a") as file:
        file.write('{"id": "batch_req_')  # a run that is killed may leave a part of a line
    second = compute(served, source, destination)
    assert results()[:2] == first
    assert sorted(each["custom_id"] for each in results()) == [f"request-{i}" for i in range(6)]
    assert second.num_done == 6
    assert Batch.open(source, destination).waiting == []


def test_failures_of_the_server_are_computed_again_and_errors_of_requests_are_not(served, files):
    source, destination, write, results = files
    write(line("a"), line("b", body={}), line("c"))
    compute(served, source, destination)
    before = {each["custom_id"]: each for each in results()}
    before["a"]["response"] = {"status_code": 503, "request_id": "x", "body": {}}
    destination.write_text("".join(json.dumps(each) + "\n" for each in before.values()))
    batch = Batch.open(source, destination)
    assert batch.waiting == [1]
    assert (batch.num_done, batch.num_failed) == (2, 1)
    served.run(run_batch(served.llm, batch, ServerSettings()))
    after = {each["custom_id"]: each for each in results()}
    assert after["a"]["response"]["status_code"] == 200
    assert after["b"] == before["b"]


def test_no_request_of_a_batch_is_refused_for_want_of_room_in_the_queue(served, files):
    source, destination, write, results = files
    write(*[line(str(i), body=BODY | {"n": 8, "temperature": 1}) for i in range(4)])
    batch = Batch.open(source, destination)
    served.run(run_batch(served.llm, batch, ServerSettings(max_waiting_sequences=1, max_waiting_tokens=1)))
    assert [each["response"]["status_code"] for each in results()] == [200] * 4


def test_results_of_other_requests_are_not_overwritten(files):
    source, destination, write, _ = files
    write(line("a"))
    for text in ("notes\n", json.dumps({"id": "batch_req_other", "response": None}) + "\n"):
        destination.write_text(text)
        with pytest.raises(ValueError, match=r"has other results than those of .*, in line 1: name another file"):
            Batch.open(source, destination)
        assert destination.read_text() == text
    with pytest.raises(ValueError, match="is the file of the requests"):
        Batch.open(source, source)
    with pytest.raises(ValueError, match=r"cannot be written: there is no directory .*none"):
        Batch.open(source, destination.parent / "none" / "out.jsonl")


@pytest.mark.parametrize("state", [HealthState.HUNG, HealthState.DEAD])
def test_step_that_does_not_end_ends_the_batch_and_the_next_one_goes_on(served, files, monkeypatch, state):
    source, destination, write, results = files
    monkeypatch.setattr("jpaged.server.batch.WATCH_EVERY_S", 0.01)
    write(line("a"), line("b"))
    with served.held():
        batch = Batch.open(source, destination)
        running = asyncio.run_coroutine_threadsafe(run_batch(served.llm, batch, ServerSettings()), served._loop)
        served.run(until(lambda: served.llm.num_unfinished))
        monkeypatch.setattr(served.llm, "health", lambda: Health(state, None, 0, 0.0, 0.0))
        with pytest.raises(EngineDeadError, match=f"the engine is {state}"):
            running.result(TIMEOUT_S)
    monkeypatch.undo()
    assert served.run(served.idle()) == 0
    assert results() == []
    assert compute(served, source, destination).num_done == 2


async def until(is_true) -> None:
    while not is_true():
        await asyncio.sleep(0.001)
