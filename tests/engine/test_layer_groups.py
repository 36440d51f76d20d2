"""Engines over models whose layers have windows: tokens are those of dense attention, while blocks are freed."""

import dataclasses
from functools import cache, partial
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpaged.cli.layer_groups import describe_groups
from jpaged.config import EngineConfig
from jpaged.contract.plan import StepPlan
from jpaged.device.backends.xla import XlaBackend
from jpaged.device.kv.layout import pool_layout
from jpaged.device.runner import ModelRunner
from jpaged.engine.loop import Engine
from jpaged.models import ModelConfig
from jpaged.models.spec import LayerSpec
from jpaged.request import RequestOutput, SamplingParams
from tests.support.oracles import beam_search_without_cache, greedy_without_cache, teacher_forced_logits
from tests.support.tiny import make_runner, tiny_config, tiny_model

MODEL_LEN = 64
MODELS = {
    "beside full layers": tiny_config(num_layers=3, sliding_windows=(9, 9, None), max_position_embeddings=MODEL_LEN),
    "alone": tiny_config(num_layers=2, sliding_windows=(6, 6), max_position_embeddings=MODEL_LEN),
}
SIZES = {"block_size": 4, "num_blocks": 120, "max_num_seqs": 4, "max_num_batched_tokens": 16}
SIZES |= {"num_host_blocks": 40, "max_burst": 4}
PROMPTS = [[1 + (i * i + step * i) % 22 for i in range(length)] for length, step in ((37, 3), (5, 5), (30, 7), (21, 2))]
both_models = pytest.mark.parametrize("name", MODELS)


@cache
def runner_of(name: str) -> ModelRunner:
    return make_runner(model_config=MODELS[name], **SIZES)


def make_engine(name: str, **settings) -> Engine:
    runner = runner_of(name)
    runner.forget_pool()
    return Engine(runner, dataclasses.replace(runner.config, **{"preemption": "recompute"} | settings))


@cache
def expected(name: str, prompt: tuple[int, ...], num_tokens: int) -> list[int]:
    return greedy_without_cache(tiny_model(MODELS[name]), list(prompt), num_tokens, padded_len=MODEL_LEN)[0]


def run(engine: Engine, prompts: list[list[int]], num_tokens: int, **params) -> list[RequestOutput]:
    params = {"temperature": 0, "max_tokens": num_tokens, "ignore_eos": True} | params
    for index, prompt in enumerate(prompts):
        engine.add(engine.make_request(str(index), {"prompt_token_ids": prompt}, SamplingParams(**params)))
    outputs = {}
    while engine.has_unfinished:
        outputs |= {int(output.request_id): output for output in engine.step().finished}
        engine.blocks.check_invariants()
    assert engine.stats().num_used_blocks == 0
    return [outputs[index] for index in range(len(prompts))]


def assert_greedy(name: str, outputs: list[RequestOutput], prompts: list[list[int]], num_tokens: int) -> None:
    for output, prompt in zip(outputs, prompts, strict=True):
        assert output.outputs[0].token_ids == expected(name, tuple(prompt), num_tokens)


def poisoning(engine: Engine):
    """Fill all blocks that no sequence holds, and that are not cached, before each step, with NaN."""
    runner, enqueue = engine.runner, ModelRunner.enqueue

    def poison(runner: ModelRunner, plan: StepPlan):
        kept = {move.src for move in (*plan.copies, *plan.to_host)} | {*engine.blocks.tiers.device.cache.blocks}
        free = np.array([block for block in engine.blocks.tiers.device.free if block not in kept], np.int32)
        runner.cache = dataclasses.replace(runner.cache, pool=runner.cache.pool.at[free].set(jnp.nan))
        return enqueue(runner, plan)

    return mock.patch.object(runner, "enqueue", partial(poison, runner))


@both_models
def test_chunks_decodes_and_bursts_read_no_block_that_a_window_has_freed(name):
    engine = make_engine(name, enable_prefix_caching=False)
    assert engine.scheduler.max_burst == 4
    with poisoning(engine):
        outputs = run(engine, PROMPTS, 20)
    assert_greedy(name, outputs, PROMPTS, 20)
    assert engine.stats().num_blocks_freed_by_windows > 20


@both_models
@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_tokens_are_the_same_under_preemption(name, preemption):
    engine = make_engine(name, preemption=preemption, num_blocks={"beside full layers": 46, "alone": 10}[name])
    prompts = [prompt[: 5 + i] for i, prompt in enumerate(PROMPTS)]
    assert_greedy(name, run(engine, prompts, 32), prompts, 32)
    stats = engine.stats()
    assert stats.num_preemptions > 0
    assert (stats.num_swaps_in > 0) == (preemption == "swap")


@both_models
def test_a_prompt_known_but_for_its_last_tokens_is_not_computed_again(name):
    engine = make_engine(name)
    first = run(engine, PROMPTS[:1], 12)[0].outputs[0].token_ids
    longer = [*PROMPTS[0], *first[:8], 3, 5]
    output = run(engine, [longer, PROMPTS[0]], 8)
    assert_greedy(name, output, [longer, PROMPTS[0]], 8)
    assert output[0].num_cached_tokens == 44
    assert output[1].num_cached_tokens == 36, "of 37 tokens, one is computed"


@both_models
def test_tokens_are_the_same_when_prompts_return_to_a_pool_that_reuses_blocks(name):
    engine = make_engine(name, num_blocks={"beside full layers": 46, "alone": 24}[name])
    prompts = [[*PROMPTS[0][:30], step, 3] for step in (1, 5, 7)] + [PROMPTS[2]]
    num_cached = 0
    for _ in range(3):
        with poisoning(engine):
            outputs = run(engine, prompts, 16)
        assert_greedy(name, outputs, prompts, 16)
        num_cached += sum(output.num_cached_tokens or 0 for output in outputs)
    assert num_cached > 0


@both_models
def test_samples_fork_and_beams_search_as_without_a_cache(name):
    model, prompt = tiny_model(MODELS[name]), PROMPTS[3]
    alone = run(make_engine(name), [prompt], 12, n=3, temperature=1.0, seed=7)[0]
    engine = make_engine(name)
    sampled = run(engine, [PROMPTS[0], prompt], 12, n=3, temperature=1.0, seed=7)[1]
    assert [each.token_ids for each in sampled.outputs] == [each.token_ids for each in alone.outputs]

    def logprobs_of(sequences: list[list[int]]) -> np.ndarray:
        rows = [np.array(tokens) for tokens in sequences + sequences[:1] * (3 - len(sequences))]
        logits = teacher_forced_logits(model, rows, [1] * 3, MODEL_LEN)
        return np.array(jax.nn.log_softmax(logits[: len(sequences), len(sequences[0]) - 1]))

    found = run(engine, [prompt], 12, n=3, use_beam_search=True)[0]
    best = beam_search_without_cache(logprobs_of, prompt, 3, 12, 1.0, False, ())
    assert [each.token_ids for each in found.outputs] == [token_ids for token_ids, _ in best]
    assert engine.stats().num_copies_on_write > 0


def test_a_context_longer_than_all_blocks_is_served_where_all_layers_have_windows():
    engine = make_engine("alone", num_blocks=8)
    assert (engine.blocks.num_blocks - 1) * engine.config.block_size < len(PROMPTS[0]) + 20
    assert_greedy("alone", run(engine, PROMPTS[:1], 20), PROMPTS[:1], 20)


def test_a_pool_with_fewer_blocks_than_groups_is_refused():
    with pytest.raises(ValueError, match="num_blocks=3 is too few: a token takes a block in each of 3 layer groups"):
        make_runner(model_config=MODELS["beside full layers"], **SIZES | {"num_blocks": 3})


def test_streaming_keeps_all_layers_in_one_group():
    config = dataclasses.replace(runner_of("alone").config, kv_placement="host")
    assert pool_layout(MODELS["beside full layers"], config, jnp.float32, XlaBackend("")).num_layers == 3


# Sizes


@dataclasses.dataclass(frozen=True, kw_only=True)
class GemmaShapes(ModelConfig):
    """Shapes of Gemma 3 27B."""

    vocab_size: int = 262_208
    hidden_size: int = 5376
    num_layers: int = 62
    num_heads: int = 32
    num_kv_heads: int = 16
    head_dim: int = 128
    max_position_embeddings: int = 131_072
    dtype: str = "bfloat16"

    @property
    def layer_specs(self) -> tuple[LayerSpec, ...]:
        specs = super().layer_specs
        return tuple(dataclasses.replace(spec, sliding_window=None if spec.layer % 6 == 5 else 1024) for spec in specs)


def test_gemma_holds_more_than_five_times_the_sequences_that_one_group_holds():
    config, backend = EngineConfig(), XlaBackend("")
    layout = pool_layout(GemmaShapes(), config, jnp.bfloat16, backend)
    assert layout.block_bytes == 10 * 2 * 16 * 128 * 2 * config.block_size
    made = describe_groups(GemmaShapes(), config, jnp.bfloat16, backend, int(80e9) // layout.block_bytes)
    assert made is not None
    assert made.max_model_len == 131_072
    assert [group.num_blocks for group in made.groups] == [131_072 // 16, *[65] * 6]
    assert made.num_sequences >= 5.5 * made.num_sequences_ungrouped > 5.5
    assert "7, blocks of 1,310,720 bytes; 131,072 tokens take 8,582 blocks" in str(made)


@both_models
def test_info_counts_the_blocks_that_a_sequence_holds(name):
    model, config = MODELS[name], runner_of(name).config
    made = describe_groups(model, config, jnp.float32, XlaBackend(""), 61)
    engine = make_engine(name, enable_prefix_caching=False)
    engine.scheduler.max_burst = 1
    engine.add(engine.make_request("0", {"prompt_token_ids": [1]}, SamplingParams(max_tokens=63, ignore_eos=True)))
    most = 0
    while engine.has_unfinished:
        engine.step()
        most = max(most, engine.stats().num_used_blocks)
    assert made is not None
    assert most == sum(group.num_blocks for group in made.groups)
