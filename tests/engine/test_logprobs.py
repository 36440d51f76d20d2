"""Log-probabilities become objects when they are read: making a million of them would hold up every other request."""

import copy
import pickle
from dataclasses import asdict, replace

import pytest

from jpaged import LLM, CompletionDelta, Logprob, SamplingParams
from jpaged.engine.logprobs import ScoredTokens
from tests.support.tiny import tiny_engine

PROMPT = {"prompt_token_ids": [1, 2, 4]}
PARAMS = {"max_tokens": 5, "ignore_eos": True, "logprobs": 2, "prompt_logprobs": 1, "seed": 1}


def run(**params):
    engine = tiny_engine()
    engine.add(engine.make_request("0", PROMPT, SamplingParams(**PARAMS | params)))
    results, deltas = [], []
    while engine.has_unfinished:
        output = engine.step()
        results += output.finished
        deltas += output.deltas
    return results[0], deltas


@pytest.mark.parametrize("params", [{}, {"n": 2}, {"n": 1, "best_of": 3}], ids=str)
def test_engine_makes_no_object_before_a_result_is_read(monkeypatch, params):
    expected, _ = run(**params)
    made = []
    monkeypatch.setattr("jpaged.engine.logprobs.Logprob", lambda *args: made.append(args) or Logprob(*args))
    result, deltas = run(**params)
    assert not made
    assert result == expected
    assert made, "now it was read"
    for index, output in enumerate(result.outputs):
        told = [entry for delta in deltas if delta.index == index for entry in delta.logprobs or ()]
        assert told == output.logprobs


def test_results_are_lists_however_they_are_copied():
    results = [run()[0] for _ in range(5)]
    result = results[0]
    whole = [
        pickle.loads(pickle.dumps(results[1])),
        copy.deepcopy(results[2]),
        copy.copy(results[3]),
        replace(results[4]),
    ]
    assert all(each == result for each in whole)
    assert type(result.outputs[0].logprobs) is type(result.prompt_logprobs) is list
    assert result.outputs[0].logprobs is result.outputs[0].logprobs, "they are made once"
    assert asdict(result)["outputs"][0]["logprobs"] == [
        {token_id: asdict(entry) for token_id, entry in entries.items()} for entries in result.outputs[0].logprobs
    ]
    assert repr(result).count("Logprob(") == sum(map(len, result.outputs[0].logprobs)) + sum(
        len(entries or ()) for entries in result.prompt_logprobs
    )


def test_stream_yields_lists():
    deltas = list(LLM.from_engine(tiny_engine()).stream(PROMPT, SamplingParams(**PARAMS)))
    assert all(type(delta.logprobs) is list for delta in deltas)
    assert isinstance(deltas[0], CompletionDelta)


def test_parts_of_scored_tokens_are_those_of_the_list():
    _, deltas = run(max_tokens=8)
    scored = deltas[0].logprobs
    assert isinstance(scored, ScoredTokens)
    assert list(scored[:1]) == scored.to_list()[:1]
    assert scored[-1] == scored.to_list()[-1]
