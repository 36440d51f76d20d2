"""Decodes that share a prefix read it once, and draw the tokens of a loop without a cache."""

from functools import cache
from unittest import mock

import jax.numpy as jnp
import pytest

from jpaged.config import EngineConfig
from jpaged.device.backends.xla import XlaBackend
from jpaged.device.kv.layout import least_shared_tokens, pool_layout
from jpaged.device.runner import ModelRunner
from jpaged.engine.loop import Engine
from jpaged.request import SamplingParams
from tests.support.oracles import greedy_without_cache
from tests.support.tiny import keep_few_sizes, make_runner, tiny_config, tiny_model

MODEL_LEN = 64
MODELS = {
    "plain": tiny_config(max_position_embeddings=MODEL_LEN),
    "beside windows": tiny_config(num_layers=2, sliding_windows=(9, None), max_position_embeddings=MODEL_LEN),
}
PREFIX = [1 + (i * i + 3 * i) % 22 for i in range(22)]
PROMPTS = [[*PREFIX, 4], [5, 6, 7], [*PREFIX, 8, 9, 10], [*PREFIX, 11, 2]]
LENS = [20, 18, 23, 15]


@cache
def runner_of(name: str) -> ModelRunner:
    sizes = {"block_size": 4, "num_blocks": 120, "max_num_seqs": 4, "max_num_batched_tokens": 16, "max_burst": 4}
    runner = keep_few_sizes(make_runner(model_config=MODELS[name], has_own_programs=True, **sizes))
    runner.programs.background.start(runner)
    return runner


@pytest.fixture(autouse=True)
def _reads_shared_tokens_once(monkeypatch):
    monkeypatch.setattr(XlaBackend, "least_shared_bytes", 1)


@cache
def expected(name: str, prompt: tuple[int, ...], num_tokens: int) -> list[int]:
    return greedy_without_cache(tiny_model(MODELS[name]), list(prompt), num_tokens, padded_len=MODEL_LEN)[0]


def run(engine: Engine, prompts: list[list[int]], lens: list[int]) -> tuple[list[list[int]], list[tuple]]:
    """Greedy tokens of each prompt, and the kinds of programs that were asked for."""
    for index, (prompt, length) in enumerate(zip(prompts, lens, strict=True)):
        params = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True)
        engine.add(engine.make_request(str(index), {"prompt_token_ids": prompt}, params))
    outputs, programs = {}, engine.runner.programs
    with mock.patch.object(programs, "get", wraps=programs.get) as get:
        while engine.has_unfinished:
            outputs |= {int(output.request_id): output for output in engine.step().finished}
            engine.blocks.check_invariants()
    return [outputs[i].outputs[0].token_ids for i in range(len(prompts))], [call.args[0] for call in get.mock_calls]


@pytest.mark.parametrize("name", MODELS)
def test_tokens_are_those_of_a_loop_without_cache(name):
    runner = runner_of(name)
    engine = Engine(runner, runner.config)
    right = [expected(name, tuple(prompt), length) for prompt, length in zip(PROMPTS, LENS, strict=True)]
    run(engine, PROMPTS[:1], [2])  # caches the prefix
    tokens, _ = run(engine, PROMPTS, LENS)
    assert tokens == right
    assert runner.programs.background.wait(120)
    tokens, keys = run(engine, PROMPTS, LENS)
    assert tokens == right
    assert [key for key in keys if key[0] == "shared"]


def test_processes_that_have_programs_at_different_times_share_nothing(monkeypatch):
    monkeypatch.setattr("jax.process_count", lambda: 2)
    config, backend = EngineConfig(), XlaBackend("as asked", 1)
    model = MODELS["plain"]
    layout = pool_layout(model, config, jnp.dtype(jnp.float32), backend)
    assert least_shared_tokens(layout, model, config, backend) == float("inf")


def test_backends_that_gain_nothing_are_told_of_nothing(monkeypatch):
    monkeypatch.undo()
    runner = make_runner(block_size=4, has_own_programs=True)
    assert runner.programs.least_shared_tokens == float("inf")


@pytest.mark.parametrize(
    ("settings", "is_shared"),
    [({}, True), ({"kv_cache_dtype": "int8"}, False), ({"kv_placement": "host", "num_host_blocks": 16}, False)],
)
def test_pools_whose_blocks_are_read_row_by_row_share_nothing(settings, is_shared):
    runner = make_runner(block_size=8, **settings)
    assert (runner.programs.least_shared_tokens < float("inf")) == is_shared
