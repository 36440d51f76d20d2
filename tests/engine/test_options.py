"""Sampling options of some rows: the same tokens and log-probabilities in bursts, under preemption, after forks."""

from dataclasses import replace
from functools import cache
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jpaged import LLM, EngineConfig, SamplingParams
from jpaged.device.runner import ModelRunner
from jpaged.engine.loop import Engine
from jpaged.models import random_model
from jpaged.sharding import make_mesh
from tests.support.tiny import tiny_config

MODEL = tiny_config(
    num_layers=1, vocab_size=48, head_dim=8, max_position_embeddings=64, dtype="float32", eos_token_ids=(3,)
)
CONFIG = EngineConfig(block_size=8, num_blocks=33, max_num_seqs=4, max_num_batched_tokens=16, max_burst=4)
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"top_p": 0.8, "top_k": 9},
    {"min_tokens": 9, "stop_token_ids": list(range(5, 15))},
    {"stop_token_ids": list(range(5, 15))},
    {"logprobs": 0},
    {"logprobs": 3},
    {"repetition_penalty": 1.4},
    {"frequency_penalty": 0.7, "presence_penalty": -0.3, "logprobs": 2},
    {"logit_bias": {each: 0.5 * each for each in range(40)}, "repetition_penalty": 0.8},
    {"allowed_token_ids": [1, 4, 9, 16, 25, 36], "frequency_penalty": 2.0},
)


class Numerals:
    """A text of the token ids, in which stop strings are found."""

    def encode(self, text: str) -> list[int]:
        return [int(each) for each in text.split()]

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = True) -> str:
        return "".join([f" {token_id}" for token_id in token_ids])


@cache
def runner() -> ModelRunner:
    model = random_model(MODEL, jnp.dtype("float32"), make_mesh(1), 0)
    return ModelRunner(model, MODEL, CONFIG, make_mesh(1))


def generate(params: list[SamplingParams], **changes):
    """Tokens, text, reason and scores of every completion."""
    llm = LLM.from_engine(Engine(runner(), replace(CONFIG, **changes), Numerals()))
    prompts: list[Any] = [
        {"prompt_token_ids": [(7 * i + j) % 40 for j in range(5 + 3 * i)]} for i in range(len(params))
    ]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    found = [
        (each.token_ids, each.text, each.finish_reason, scores_of(each.logprobs))
        for output in outputs
        for each in output.outputs
    ]
    blocks = llm.engine.blocks
    assert blocks.num_free_blocks == blocks.num_blocks - 1
    assert llm.engine.num_output_tokens == sum(len(token_ids) for token_ids, *_ in found)
    return found


def scores_of(logprobs):
    return [{key: (value.logprob, value.rank) for key, value in each.items()} for each in logprobs or ()]


def assert_same(found, expected) -> None:
    for (*own, scores), (*other, other_scores) in zip(found, expected, strict=True):
        assert own == other
        assert len(scores) == len(other_scores)
        for each, same in zip(scores, other_scores, strict=True):
            assert list(each) == list(same)
            np.testing.assert_allclose(list(each.values()), list(same.values()), atol=1e-4)


@settings(max_examples=4, deadline=None, derandomize=True)
@given(data=st.data())
def test_options_of_some_rows_change_no_other_and_do_not_depend_on_the_schedule(data):
    params = [
        SamplingParams(
            temperature=data.draw(st.sampled_from([0.0, 1.0])),
            max_tokens=data.draw(st.sampled_from([9, 14, 22])),
            n=data.draw(st.sampled_from([1, 1, 2])),
            seed=seed,
            ignore_eos=True,
            stop=data.draw(st.sampled_from([None, None, "7", "12 "])),
            **data.draw(st.sampled_from(OPTIONS)),
        )
        for seed in range(5)
    ]
    expected = generate(params, max_burst=1, max_num_seqs=2)
    assert_same(generate(params), expected)
    assert_same(generate(params, num_blocks=13), expected)


def test_rows_with_options_are_preempted_and_go_on():
    common: dict[str, Any] = {"max_tokens": 24, "ignore_eos": True, "logprobs": 1}
    options: tuple[dict[str, Any], ...] = (
        {"repetition_penalty": 1.3},
        {"min_tokens": 20, "stop_token_ids": list(range(5, 20)), "logit_bias": {9: 2}},
    )
    params = [SamplingParams(seed=seed, **common, **each) for seed, each in enumerate(options)]
    expected = generate(params, max_burst=1)
    engine = Engine(runner(), replace(CONFIG, num_blocks=10), Numerals())

    def add(name: str, priority: int, params: SamplingParams, length: int) -> None:
        prompt: Any = {"prompt_token_ids": [(7 * int(name) + j) % 40 for j in range(length)]}
        engine.add(engine.make_request(name, prompt, params, priority))

    finished = {}
    for index, each in enumerate(params):
        add(str(index), 1, each, 5 + 3 * index)
    for number in range(40):
        if number == 3:  # the others' blocks are for this one
            add("9", 0, SamplingParams(max_tokens=8, ignore_eos=True), 40)
        finished |= {output.request_id: output.outputs[0] for output in engine.step().finished}
    assert engine.scheduler.stats().num_preemptions > 0
    found = [finished[str(index)] for index in range(2)]
    assert_same([(o.token_ids, o.text, o.finish_reason, scores_of(o.logprobs)) for o in found], expected)


@pytest.mark.parametrize("options", [*OPTIONS, {"stop": "40 41 42"}])
def test_every_option_leaves_bursts_to_all_rows(options):
    engine, sizes = Engine(runner(), CONFIG, Numerals()), []
    common: dict[str, Any] = {"temperature": 0.0, "max_tokens": 17, "ignore_eos": True, "seed": 0}
    schedule_ahead = engine.scheduler.schedule_ahead

    def noted():
        plan = schedule_ahead()
        sizes.append(0 if plan is None else plan.num_steps)
        return plan

    engine.scheduler.schedule_ahead = noted
    params = [SamplingParams(**common), SamplingParams(**common | {"stop_token_ids": []} | options)]
    prompts: list[Any] = [{"prompt_token_ids": [1, 2]}] * 2
    LLM.from_engine(engine).generate(prompts, params, use_tqdm=False)
    assert sizes.count(4) >= 3
