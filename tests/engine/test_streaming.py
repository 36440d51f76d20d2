"""The engine over blocks on the host: its tokens are those of an engine that keeps all of them on the device."""

import dataclasses
from functools import cache
from typing import Any
from unittest import mock

import pytest
from flax import nnx

from jpaged.device.runner import ModelRunner
from jpaged.engine.loading import module_loader
from jpaged.engine.loop import Engine
from jpaged.request import SamplingParams
from jpaged.sharding import make_mesh
from tests.support.tiny import (
    ENGINE_MODEL,
    ENGINE_SIZES,
    engine_model,
    enlarged,
    keep_few_sizes,
    tiny_config,
    tiny_engine,
    tiny_model,
)

SIZES = dataclasses.replace(ENGINE_SIZES, kv_placement="host", num_host_blocks=48)
PROMPTS = [[(5 + i) * j % 23 for j in range(length)] for i, length in enumerate((40, 3, 33, 12))]


@cache
def runner() -> ModelRunner:
    return keep_few_sizes(ModelRunner(nnx.clone(engine_model()), ENGINE_MODEL, SIZES, make_mesh(1)))


def make_engine(num_usable: int, **settings) -> Engine:
    """An engine with so many blocks of 4 tokens beside the window."""
    num_blocks = 1 + runner().num_window_blocks + num_usable
    return Engine(runner(), dataclasses.replace(SIZES, num_blocks=num_blocks, **settings))


def outputs(engine: Engine, prompts: list[list[int]], **params) -> list[list[int]]:
    """The tokens of each prompt, whose requests run together."""
    for i, prompt in enumerate(prompts):
        sampling = SamplingParams(seed=i, ignore_eos=True, **params)
        engine.add(engine.make_request(str(i), {"prompt_token_ids": prompt}, sampling))
    finished = {}
    while engine.has_unfinished:
        finished |= {output.request_id: output.outputs[0].token_ids for output in engine.step().finished}
        engine.blocks.check_invariants()
    assert engine.blocks.stats().num_host_used == 0
    return [list(finished[str(i)]) for i in range(len(prompts))]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(("kind", "num_usable"), [("host", 16), ("host", 5), ("auto", 6)])
def test_tokens_do_not_depend_on_where_blocks_lie(kind, num_usable, temperature):
    params = {"max_tokens": 20, "temperature": temperature}
    expected = outputs(tiny_engine(), PROMPTS, **params)
    engine = make_engine(num_usable, kv_placement=kind)
    assert outputs(engine, PROMPTS, **params) == expected
    assert engine.blocks.stats().num_blocks_swapped_out > 0
    assert outputs(engine, PROMPTS, **params) == expected, "which now start from blocks on the host"


@pytest.mark.starts_first
def test_tokens_are_the_same_where_programs_copy_blocks_by_dma():
    """As on a TPU, in Pallas's interpreter. All full blocks of the longer prompt are on the host."""
    sizes = dataclasses.replace(SIZES, block_size=8, attention_implementation="pallas_tpu", interpret=True)
    dma = keep_few_sizes(ModelRunner(nnx.clone(engine_model()), ENGINE_MODEL, sizes, make_mesh(1)))
    assert dma.programs.streams_by_dma
    prompts, params = [PROMPTS[0][:30], PROMPTS[1]], {"max_tokens": 4, "temperature": 0}
    engine = Engine(dma, dataclasses.replace(sizes, num_blocks=1 + dma.num_window_blocks + 4))
    expected = outputs(tiny_engine(), prompts, **params)
    assert outputs(engine, prompts, **params) == expected
    assert engine.blocks.stats().num_blocks_swapped_out >= 3


def test_a_failed_step_and_an_abort_change_no_token(monkeypatch):
    params: dict[str, Any] = {"max_tokens": 12, "temperature": 0}
    expected = outputs(tiny_engine(), PROMPTS, **params)
    engine = make_engine(6)
    prompt: Any = {"prompt_token_ids": PROMPTS[0][:30]}
    engine.add(engine.make_request("aborted", prompt, SamplingParams(max_tokens=30, ignore_eos=True)))
    for _ in range(6):
        engine.step()
    assert engine.stats().num_streamed_blocks > 0
    assert engine.abort("aborted")
    engine.step()
    assert engine.blocks.stats().num_host_used == 0
    for i, tokens in enumerate(PROMPTS):
        sampling = SamplingParams(seed=i, ignore_eos=True, **params)
        engine.add(engine.make_request(str(i), {"prompt_token_ids": tokens}, sampling))
    for _ in range(5):
        engine.step()
    with monkeypatch.context() as patch:
        patch.setattr(engine.runner, "fetch", mock.Mock(side_effect=RuntimeError("lost")))
        with pytest.raises(RuntimeError, match="lost"):
            engine.step()
    finished = {}
    while engine.has_unfinished:
        finished |= {output.request_id: output.outputs[0].token_ids for output in engine.step().finished}
    assert [list(finished[str(i)]) for i in range(len(PROMPTS))] == expected


def test_a_context_is_bounded_by_the_model_alone():
    engine = make_engine(2)
    [tokens] = outputs(engine, PROMPTS[:1], max_tokens=None, temperature=0)
    assert len(tokens) == 64 - 40
    assert [tokens] == outputs(tiny_engine(), PROMPTS[:1], max_tokens=None, temperature=0)


def test_an_engine_streams_only_with_a_runner_that_can():
    with pytest.raises(ValueError, match="kv_placement='auto': the runner streams no blocks from the host"):
        tiny_engine(kv_placement="auto")


@cache
def runner_over_many_heads(**settings) -> ModelRunner:
    """A runner whose blocks hold activations in host memory; hidden states are smaller than their K and V."""
    model_config = tiny_config(num_heads=2, num_kv_heads=2, hidden_size=32, max_position_embeddings=64)
    config = dataclasses.replace(SIZES, **settings, max_burst=1)
    model = nnx.clone(enlarged(tiny_model(model_config)))
    return keep_few_sizes(ModelRunner(model, model_config, config, make_mesh(1)))


def engine_over_many_heads(**settings) -> Engine:
    runner = runner_over_many_heads(**settings)
    return Engine(runner, runner.config)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_tokens_do_not_depend_on_what_blocks_hold(temperature):
    """Activations, from which K and V are computed in every step; two engines over one model."""
    sizes = {"num_blocks": 48, "num_host_blocks": 24}
    kept, computed = (engine_over_many_heads(kv_placement=placement, **sizes) for placement in ("device", "host"))
    assert computed.runner.programs.keeps_activations
    assert computed.scheduler.blocks.placement.keeps_activations
    params = {"max_tokens": 20, "temperature": temperature}
    expected = outputs(kept, PROMPTS, **params)
    assert outputs(computed, PROMPTS, **params) == expected
    assert computed.blocks.stats().num_blocks_swapped_out > 0
    assert outputs(computed, PROMPTS, **params) == expected, "which now start from blocks on the host"


def test_tokens_over_quantised_activations_do_not_depend_on_the_batch_the_chunks_or_where_blocks_lie():
    sizes = {"num_blocks": 48, "num_host_blocks": 24}
    runner = runner_over_many_heads(kv_cache_dtype="int8", offload_cache="activations", **sizes)
    config = runner.config
    assert runner.programs.keeps_activations
    params: dict[str, Any] = {"max_tokens": 9, "temperature": 1.0}
    engine = Engine(runner, config)
    together = outputs(engine, PROMPTS, **params)
    assert engine.blocks.stats().num_blocks_swapped_out > 0
    assert outputs(engine, PROMPTS, **params) == together, "which now start from blocks on the host"
    other = Engine(runner, dataclasses.replace(config, max_num_batched_tokens=11, enable_prefix_caching=False))
    assert outputs(other, PROMPTS[:1], **params) == together[:1]


def test_a_module_that_cannot_be_streamed_is_refused_before_it_is_copied():
    with pytest.raises(ValueError, match="blocks are streamed from the host to one device"):
        module_loader(engine_model(), ENGINE_MODEL, SIZES, make_mesh(2))


def test_requests_that_share_pages_may_hold_more_of_them_than_there_are():
    """Eight sequences of one prompt: their rows have 56 pages, and 31 blocks are beside the window."""
    tokens = []
    for placement in ("device", "host"):
        engine = engine_over_many_heads(num_blocks=120, num_host_blocks=8, kv_placement=placement, max_num_seqs=8)
        params = SamplingParams(n=8, seed=1, max_tokens=3, temperature=1.0, ignore_eos=True)
        engine.add(engine.make_request("shared", {"prompt_token_ids": PROMPTS[0][:26]}, params))
        while engine.has_unfinished:
            for output in engine.step().finished:
                tokens.append([completion.token_ids for completion in output.outputs])
    assert engine.blocks.num_free_blocks < 8 * 7
    assert tokens[0] == tokens[1]
