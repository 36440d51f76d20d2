"""Logits that are NaN or infinite end their request with an error; others go on, and no block is lost."""

import dataclasses
from functools import cache

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jpaged import BeamSearchParams, FinishReason, SamplingParams
from jpaged.config import EngineConfig
from jpaged.device.runner import ModelRunner
from jpaged.engine.loop import Engine
from jpaged.results import ErrorCause
from jpaged.sharding import make_mesh
from tests.support.tiny import enlarged, keep_few_sizes, tiny_config, tiny_model

BAD = 7
"""A token with an infinite embedding: a sequence that has it has no logits from there on."""

CONFIG = tiny_config(max_position_embeddings=64)
SIZES = EngineConfig(
    block_size=4, num_blocks=48, max_num_seqs=8, max_num_batched_tokens=16, max_burst=3, num_host_blocks=0
)
GREEDY = {"temperature": 0, "max_tokens": 9}
FORCED = {"logit_bias": {BAD: 1e4}}
"""Draws the token at once."""


@cache
def runner():
    model = enlarged(nnx.clone(tiny_model(CONFIG)))
    embedding = model.model.embed_tokens.embedding
    embedding[...] = embedding[...].at[BAD].set(jnp.inf)
    return keep_few_sizes(ModelRunner(model, CONFIG, SIZES, make_mesh(1), use_tqdm=False))


def run(*asked, **settings):
    """Results and deltas of requests that are computed together, each a prompt and parameters."""
    engine = Engine(runner(), dataclasses.replace(SIZES, **settings))
    for i, (prompt, params) in enumerate(asked):
        params = params if isinstance(params, SamplingParams) else SamplingParams(**GREEDY | params)
        engine.add(engine.make_request(str(i), {"prompt_token_ids": prompt}, params))
    results, deltas = {}, {str(i): [] for i in range(len(asked))}
    while engine.has_unfinished:
        output = engine.step()
        results |= {result.request_id: result for result in output.finished}
        for delta in output.deltas:
            deltas[delta.request_id].append(delta)
    stats = engine.blocks.stats()
    assert stats.num_used == 0, "no block is held"
    assert not engine.scheduler.roster.sequences
    return [results[str(i)] for i in range(len(asked))], [deltas[str(i)] for i in range(len(asked))]


def tokens_of(*results):
    return [(output.token_ids, output.finish_reason) for result in results for output in result.outputs]


GOOD = [
    ([1, 2, 3, 4, 5, 6], {"logit_bias": {BAD: -1e4}}),
    ([9, 8], {"temperature": 1, "seed": 5, "logprobs": 2, "logit_bias": {BAD: -1e4}}),
]


@cache
def run_good(max_burst):
    return run(*GOOD, max_burst=max_burst)


CASES = {
    "prompt": ([1, BAD, 2], {}, []),
    "prompt in chunks": ([1, *[BAD] * 20], {"temperature": 1, "seed": 1}, []),
    "output": ([1, 2], FORCED, [BAD]),
    "output with log-probabilities": ([1, 2], FORCED | {"logprobs": 1}, [BAD]),
    "filters": ([1, 2], FORCED | {"temperature": 1, "top_k": 3, "top_p": 0.5, "min_p": 0.1}, [BAD]),
    "penalties": ([1, 2], FORCED | {"repetition_penalty": 1.1, "min_tokens": 3}, [BAD]),
    "several completions": ([1, 2], FORCED | {"n": 3}, [BAD]),
    "best of several": ([1, 2], FORCED | {"n": 1, "best_of": 2, "temperature": 1}, [BAD]),
    "scores of the prompt": ([1, 2, BAD, 3], {"prompt_logprobs": 1, "max_tokens": 1}, []),
}


@pytest.mark.parametrize(("case", "max_burst"), [*[(case, 3) for case in CASES], ("prompt", 1), ("output", 1)])
def test_request_without_logits_ends_with_an_error_and_others_go_on(case, max_burst):
    prompt, params, expected = CASES[case]
    alone, _ = run_good(max_burst)
    [good, bad, other], [_, deltas, _] = run(GOOD[0], (prompt, params), GOOD[1], max_burst=max_burst)
    assert tokens_of(good, other) == tokens_of(*alone)
    assert good.error is other.error is None
    assert bad.error is ErrorCause.NOT_FINITE
    assert "bfloat16" in ErrorCause.NOT_FINITE
    for output in bad.outputs:
        assert (output.token_ids, output.finish_reason) == (expected, FinishReason.ERROR)
        assert np.isfinite(output.cumulative_logprob)
        assert output.logprobs is None or len(output.logprobs) == len(expected)
    ends = [delta for delta in deltas if delta.finish_reason is not None]
    assert [delta.error for delta in ends] == [ErrorCause.NOT_FINITE] * len(bad.outputs)


def test_a_token_that_ends_a_completion_is_not_computed():
    [result], _ = run(([1, 2], FORCED | {"n": 2, "stop_token_ids": [BAD]}))
    assert [(output.token_ids, output.finish_reason) for output in result.outputs] == [([BAD], FinishReason.STOP)] * 2
    assert result.error is None


def test_a_completion_that_has_ended_stays_as_it_is_when_its_sibling_fails():
    last = BAD + 1
    either = {"n": 2, "temperature": 1, "logit_bias": {BAD: 1e4, last: 1e4}, "stop_token_ids": [last]}
    results = [run(([1, 2], either | {"seed": seed}))[0][0] for seed in range(6)]
    ends = {BAD: FinishReason.ERROR, last: FinishReason.STOP}
    for result in results:
        assert [output.finish_reason for output in result.outputs] == [ends[o.token_ids[-1]] for o in result.outputs]
        assert result.error == (ErrorCause.NOT_FINITE if any(o.token_ids[-1] == BAD for o in result.outputs) else None)
    assert any(len({output.finish_reason for output in result.outputs}) == 2 for result in results)


def search(width, max_tokens, **options):
    return BeamSearchParams(width, max_tokens, **options).to_sampling_params()


def test_search_without_logits_returns_the_beams_that_it_has():
    alone, _ = run_good(SIZES.max_burst)
    [bad, good, lost, other], [deltas, *_] = run(([1, BAD], search(3, 4)), GOOD[0], ([1, 2], search(6, 12)), GOOD[1])
    assert tokens_of(good, other) == tokens_of(*alone)
    assert [(output.token_ids, output.finish_reason) for output in bad.outputs] == [([], FinishReason.ERROR)]
    assert (bad.error, [delta.error for delta in deltas]) == (ErrorCause.NOT_FINITE, [ErrorCause.NOT_FINITE])
    assert lost.error is ErrorCause.NOT_FINITE, "with such a width, one of the beams takes the token"
    assert len(lost.outputs) == 6
    assert any(output.token_ids[-1] == BAD for output in lost.outputs)
    assert all(np.isfinite(output.score) for output in lost.outputs)


def test_search_without_a_token_to_go_on_with_returns_the_beams_that_it_has():
    every = list(range(CONFIG.vocab_size))
    params = dataclasses.replace(search(2, 4), stop_token_ids=every, min_tokens=2)
    [result], _ = run(([1, 2], params))
    assert [(output.token_ids, output.finish_reason) for output in result.outputs] == [([], FinishReason.ERROR)]
    assert result.error is ErrorCause.NO_CONTINUATION
