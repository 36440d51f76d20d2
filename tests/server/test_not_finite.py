"""Requests whose logits are no numbers get an error of the model's, and leave nothing behind."""

import json
from dataclasses import replace

import numpy as np
import pytest

from jpaged.results import ErrorCause

BODY = {"prompt": "def add(a, b):", "temperature": 0, "max_tokens": 8, "ignore_eos": True}


@pytest.fixture
def spoiled(served, monkeypatch):
    """Makes the logits of all requests NaN from some step on."""
    runner = served.llm.engine.runner
    fetch = runner.fetch

    def spoil(num_good):
        left = num_good

        def fetch_nan(step):
            nonlocal left
            result = fetch(step)
            left -= 1
            if left >= 0:
                return result
            nan = np.full_like(result.scores.logprobs, np.nan)
            return replace(result, scores=replace(result.scores, logprobs=nan), later=())

        monkeypatch.setattr(runner, "fetch", fetch_nan)

    yield spoil
    monkeypatch.undo()
    assert served.run(served.idle()) == 0
    assert served.complete("import os", max_tokens=2)["choices"][0]["finish_reason"] == "length"


def assert_is_error(error):
    message = ErrorCause.NOT_FINITE.value
    assert error == {"message": message, "type": "model_error", "param": None, "code": "logits_not_finite"}


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("num_good", [0, 3])
def test_error_is_a_status_that_no_client_tries_again(served, spoiled, num_good, path, caplog):
    spoiled(num_good)
    body = BODY | ({"messages": [{"role": "user", "content": "hi"}]} if "chat" in path else {})
    response = served.post(path, **body)
    [record] = [each for each in caplog.records if ErrorCause.NOT_FINITE.value in each.getMessage()]
    assert record.levelname == "WARNING"
    assert response.headers["x-request-id"] in record.getMessage()
    assert response.status_code == 422
    assert_is_error(response.json()["error"])


def test_stream_that_has_begun_ends_with_the_reason_and_the_error(served, spoiled):
    spoiled(3)
    with served.wire.stream("POST", "/v1/completions", json=BODY | {"stream": True}) as response:
        assert response.status_code == 200
        content = response.read().decode()
    *chunks, last = [json.loads(block.removeprefix("data: ")) for block in content.strip().split("\n\n")]
    assert "[DONE]" not in content
    assert_is_error(last["error"])
    assert [each["choices"][0]["finish_reason"] for each in chunks][-1] == "error"
    assert "".join(each["choices"][0]["text"] for each in chunks)


def test_stream_that_has_not_begun_ends_with_the_status(served, spoiled):
    spoiled(0)
    response = served.post("/v1/completions", **BODY, stream=True)
    assert response.status_code == 422
    assert_is_error(response.json()["error"])
