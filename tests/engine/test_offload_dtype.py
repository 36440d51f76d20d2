"""Requests whose KV went through the host in 8 bits: log-probabilities close to those of KV that stayed."""

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from flax import nnx

from jpaged.device.runner import ModelRunner
from jpaged.engine.loop import Engine
from jpaged.request import SamplingParams
from jpaged.sharding import make_mesh
from tests.support.tiny import ENGINE_MODEL, ENGINE_SIZES, engine_model, keep_few_sizes, tiny_engine

FORCED = 7
"""The token that every step draws, so that rounding changes no context."""

CLOSE = 0.05
"""Most that a log-probability may change, in nats: those of the enlarged model reach from -6 to 0."""

PROMPTS = [[(5 + i) * j % 23 for j in range(length)] for i, length in enumerate((14, 9, 11, 12))]


@cache
def rounding_runner(kv_placement: str = "device") -> ModelRunner:
    config = replace(ENGINE_SIZES, offload_dtype="int8", kv_placement=kv_placement)
    return keep_few_sizes(ModelRunner(nnx.clone(engine_model()), ENGINE_MODEL, config, make_mesh(1)))


def make_engine(kv_placement: str = "device", **settings: Any) -> Engine:
    runner = rounding_runner(kv_placement)
    return Engine(runner, replace(runner.config, **settings))


def logprobs_of(engine: Engine, prompts: list[list[int]]) -> np.ndarray:
    """The model's own log-probabilities of the drawn tokens."""
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, logprobs=0, logit_bias={FORCED: 100.0})
    for i, prompt in enumerate(prompts):
        engine.add(engine.make_request(str(i), {"prompt_token_ids": prompt}, params))
    finished: dict[str, Any] = {}
    while engine.has_unfinished:
        finished |= {output.request_id: output.outputs[0] for output in engine.step().finished}
        engine.blocks.check_invariants()
    outputs = [finished[str(i)] for i in range(len(prompts))]
    assert all(set(output.token_ids) == {FORCED} for output in outputs)
    return np.array([[entry[FORCED].logprob for entry in output.logprobs] for output in outputs])


def assert_close_but_rounded(found: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, expected, atol=CLOSE)
    assert np.abs(found - expected).max() > 1e-4, "KV came back from the host"


@pytest.mark.usefixtures("no_growth")
def test_requests_come_back_from_a_swap_with_close_log_probabilities():
    engine = make_engine(num_blocks=13, preemption="swap")
    assert_close_but_rounded(logprobs_of(engine, PROMPTS), logprobs_of(tiny_engine(), PROMPTS))
    assert engine.stats().num_swaps_in > 0


def test_a_prefix_comes_back_from_the_host_with_close_log_probabilities():
    engine = make_engine(num_blocks=17)
    expected = logprobs_of(engine, PROMPTS[:1])
    logprobs_of(engine, [[3 + i % 20 for i in range(40)]])  # takes the blocks of the prefix
    assert_close_but_rounded(logprobs_of(engine, PROMPTS[:1]), expected)
    assert engine.blocks.stats().host_hit_tokens > 0


def test_streamed_requests_have_close_log_probabilities():
    engine = make_engine("host")
    assert_close_but_rounded(logprobs_of(engine, PROMPTS), logprobs_of(tiny_engine(), PROMPTS))
    assert engine.stats().bytes_from_host > 0
    assert engine.blocks.stats().num_host_used == 0
