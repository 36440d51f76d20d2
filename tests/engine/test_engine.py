"""The whole engine: its tokens are those of a loop without a cache, whatever else happens."""

import contextlib
import dataclasses
import itertools
import re
import signal
import sys
from unittest import mock

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from jpaged.config import EngineConfig
from jpaged.device.sampling.draw import sample
from jpaged.engine.loop import Engine
from jpaged.host.policies.growth import HORIZON
from jpaged.llm import LLM
from jpaged.models import load_config, load_model
from jpaged.models.groups import grouped
from jpaged.request import FinishReason, RequestOutput, SamplingParams, derive_seed
from jpaged.sharding import make_mesh
from tests.support.oracles import (
    HF_GREEDY,
    HF_REFERENCE,
    assert_equals_reference,
    beam_search_without_cache,
    load_reference,
    teacher_forced_logits,
)
from tests.support.plans import Sample, make_sample_inputs
from tests.support.tiny import ENGINE_MODEL, ENGINE_SIZES, engine_model, engine_runner, tiny_engine

MODEL_LEN = ENGINE_MODEL.max_position_embeddings
ROWS, BUDGET = ENGINE_SIZES.max_num_seqs, ENGINE_SIZES.max_num_batched_tokens
NUM_BLOCKS, NUM_HOST_BLOCKS = ENGINE_SIZES.num_blocks, ENGINE_SIZES.num_host_blocks


def run(engine: Engine, most: int = 2000) -> dict[str, RequestOutput]:
    finished = {}
    for _ in range(most):
        if not engine.has_unfinished:
            assert engine.stats().num_used_blocks == 0
            return finished
        finished |= {output.request_id: output for output in engine.step().finished}
        engine.blocks.check_invariants()
    raise AssertionError(f"unfinished after {most} steps")


def add(engine: Engine, name: str, prompt: list[int], **params) -> None:
    engine.add(engine.make_request(name, {"prompt_token_ids": prompt}, SamplingParams(**params)))


def assert_tokens_are_those_of_a_loop_without_cache(
    prompt: list[int],
    seed: int,
    params: SamplingParams,
    token_ids: list[int],
    banned_sequences: tuple[tuple[int, ...], ...] = (),
) -> None:
    assert token_ids == tokens_of_a_loop_without_cache(prompt, seed, params, token_ids, banned_sequences)


def tokens_of_a_loop_without_cache(
    prompt: list[int],
    seed: int,
    params: SamplingParams,
    token_ids: list[int],
    banned_sequences: tuple[tuple[int, ...], ...] = (),
) -> list[int]:
    """Each token is what the sampler draws from the logits of one dense pass over ``token_ids`` before it."""
    sequence = np.array(prompt + token_ids)
    logits = teacher_forced_logits(engine_model(), [sequence], [len(prompt)], MODEL_LEN)[0]
    stops = (*(params.stop_token_ids or ()), *(() if params.ignore_eos else ENGINE_MODEL.eos_token_ids))

    def banned(before: list[int]) -> list[int]:
        ends = [each[-1] for each in banned_sequences if before[len(before) - len(each) + 1 :] == list(each[:-1])]
        return [*ends, *(stops if len(before) < params.min_tokens else ())]

    samples = [
        Sample(0, 0, len(prompt) + i, seed, params, banned(token_ids[:i]), prompt, token_ids[:i])
        for i in range(len(token_ids))
    ]
    rows = np.zeros((MODEL_LEN, ENGINE_MODEL.vocab_size), np.float32)
    rows[: len(samples)] = logits[len(prompt) - 1 : len(sequence) - 1]
    expected = _sample(jnp.asarray(rows), make_sample_inputs(samples, MODEL_LEN, rows.shape[1]))
    return np.asarray(expected)[: len(token_ids)].tolist()


def logprobs_after(sequences: list[list[int]], banned: tuple[int, ...] = ()) -> np.ndarray:
    """Log-probabilities for ``beam_search_without_cache``: one dense pass over sequences of one length."""
    rows = [np.array(tokens) for tokens in sequences + sequences[:1] * (ROWS - len(sequences))]
    logits = teacher_forced_logits(engine_model(), rows, [1] * ROWS, MODEL_LEN)
    logprobs = np.array(jax.nn.log_softmax(logits[: len(sequences), len(sequences[0]) - 1]))
    logprobs[:, list(banned)] = -np.inf
    return logprobs


@jax.jit
def _sample(logits, inputs):
    return sample(logits, inputs, num_top=0).token_ids


PREFIXES = [[i % ENGINE_MODEL.vocab_size for i in range(start, start + 14)] for start in (0, 5)]


class EngineMachine(RuleBasedStateMachine):
    """Random arrivals, searches, pins, aborts and failures in pools so small that preemption is constant."""

    @initialize(
        num_blocks=st.integers(9, 17),
        num_host_blocks=st.sampled_from([0, 5, NUM_HOST_BLOCKS]),
        preemption=st.sampled_from(["auto", "swap", "recompute"]),
        budget=st.integers(ROWS, BUDGET),
        rows=st.integers(2, ROWS),
        caching=st.booleans(),
        max_burst=st.integers(1, 3),
        horizon=st.sampled_from([0, 0, 8, HORIZON]),
    )
    def start(self, num_blocks, num_host_blocks, preemption, budget, rows, caching, max_burst, horizon):
        self.engine = tiny_engine(
            num_blocks=num_blocks,
            num_host_blocks=num_host_blocks,
            preemption=preemption if num_host_blocks else "auto",
            max_num_batched_tokens=budget,
            max_num_seqs=min(rows, budget),
            enable_prefix_caching=caching,
            max_burst=max_burst,
        )
        self.engine.scheduler.growth.horizon = horizon
        self.requests = {}
        self.finished = {}
        self.pins = set()

    def add(self, prefix, tail, salt, priority, banned_sequences=(), **params):
        prompt = {"prompt_token_ids": prefix + tail} | ({} if salt is None else {"cache_salt": salt})
        name = str(len(self.requests))
        try:
            request = self.engine.make_request(name, prompt, SamplingParams(**params), priority)
        except ValueError as error:
            assert "never fit" in str(error) or "is more than max_num_seqs" in str(error)  # noqa: PT017
            return
        request = dataclasses.replace(request, banned_sequences=banned_sequences)
        self.engine.add(request)
        self.requests[name] = request

    prompts = {  # noqa: RUF012
        "prefix": st.sampled_from([(), (), *PREFIXES]).flatmap(
            lambda p: st.integers(0, len(p)).map(lambda n: [*p[:n]])
        ),
        "tail": st.lists(st.integers(0, ENGINE_MODEL.vocab_size - 1), min_size=1, max_size=10),
        "salt": st.sampled_from([None, None, None, "a"]),
        "priority": st.sampled_from([0, 0, 0, 1, -1]),
    }

    @rule(
        **prompts,
        n=st.integers(1, 2),
        more=st.sampled_from([None, None, 0, 1, 2]),
        max_tokens=st.integers(1, 12),
        temperature=st.sampled_from([0.0, 0.7, 1.5]),
        seed=st.integers(0, 5),
        ignore_eos=st.booleans(),
        penalty=st.sampled_from([1.0, 1.0, 1.3]),
        min_tokens=st.sampled_from([0, 0, 1, 3]),
        stops=st.sampled_from([(), (), (7, 11, 12)]),
        bias=st.sampled_from([None, None, {5: 3.0, 9: -50.0}]),
        prompt_logprobs=st.sampled_from([None, None, 0]),
        logprobs=st.sampled_from([None, None, 2]),
        banned_sequences=st.sampled_from([(), (), (), tuple((i, (7 * i + 3) % 23) for i in range(23))]),
    )
    def arrive(self, prefix, tail, salt, priority, n, more, max_tokens, penalty, min_tokens, stops, bias, **params):
        self.add(
            prefix,
            tail,
            salt,
            priority,
            n=n,
            best_of=None if more is None else n + more,
            max_tokens=max_tokens,
            repetition_penalty=penalty,
            min_tokens=min(min_tokens, max_tokens),
            stop_token_ids=stops,
            logit_bias=bias,
            **params,
        )

    @rule(
        **prompts,
        width=st.integers(1, ROWS),
        max_tokens=st.integers(1, 10),
        length_penalty=st.sampled_from([-0.5, 0.0, 1.0, 2.0]),
        early_stopping=st.sampled_from([False, True, "never"]),
        ignore_eos=st.booleans(),
        min_tokens=st.sampled_from([0, 0, 2]),
    )
    def search(self, prefix, tail, salt, priority, width, max_tokens, min_tokens, **params):
        self.add(
            prefix,
            tail,
            salt,
            priority,
            use_beam_search=True,
            n=width,
            max_tokens=max_tokens,
            min_tokens=min(min_tokens, max_tokens),
            temperature=0,
            **params,
        )

    @rule(steps=st.integers(1, 6))
    def step(self, steps):
        for _ in range(steps):
            self.finished |= {output.request_id: output for output in self.engine.step().finished}
            self.engine.blocks.check_invariants()

    @rule(prefix=st.sampled_from(PREFIXES), length=st.integers(1, 14), salt=st.sampled_from([None, None, "a"]))
    def pin(self, prefix, length, salt):
        name = f"pin {len(self.pins)} {self.engine.scheduler.stats().num_steps}"
        prompt = {"prompt_token_ids": prefix[:length]} | ({} if salt is None else {"cache_salt": salt})
        try:
            self.engine.pin(name, prompt)
        except ValueError as error:
            assert re.search("cannot be pinned|enable_prefix_caching|already in use", str(error))  # noqa: PT017
            return
        self.pins.add(name)

    @precondition(lambda self: self.pins)
    @rule(data=st.data())
    def unpin(self, data):
        name = data.draw(st.sampled_from(sorted(self.pins)))
        self.pins.remove(name)
        self.engine.unpin(name)
        with pytest.raises(ValueError, match="is not pinned"):
            self.engine.unpin(name)

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def abort(self, data):
        name = data.draw(st.sampled_from(sorted(self.requests)))
        was_finished = name in self.finished
        assert self.engine.abort(name) is not was_finished
        output = self.engine.take()
        assert [result.request_id for result in output.finished] == [] if was_finished else [name]
        for result in output.finished:
            self.finished[name] = result
            told = [delta.index for delta in output.deltas]
            if is_ranked(self.requests[name].params):
                assert told == [o.index for o in result.outputs]
            else:
                aborted = [o.index for o in result.outputs if o.finish_reason is FinishReason.ABORT]
                assert aborted
                assert aborted == told

    @precondition(lambda self: self.engine.scheduler.stats().num_running)
    @rule(when=st.sampled_from(["before it runs", "after it ran"]))
    def fail(self, when):
        """A step dies after its blocks were planned: nothing may depend on what it wrote or would have written."""
        runner = self.engine.runner
        fetch = runner.fetch

        def broken(step):
            if when == "after it ran":
                fetch(step)
            raise RuntimeError("the device broke")

        with contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch.object(runner, "fetch", side_effect=broken))
            if when == "before it runs":  # while the one before it is still under way, if one is
                stack.enter_context(mock.patch.object(runner, "enqueue", side_effect=broken))
            with pytest.raises(RuntimeError, match="the device broke"):
                self.engine.step()

    def teardown(self):
        if not hasattr(self, "engine"):
            return
        for name in self.pins:
            self.engine.unpin(name)
        self.finished |= run(self.engine)
        assert self.finished.keys() == self.requests.keys()
        assert self.engine.blocks.num_free_blocks == self.engine.blocks.num_blocks - 1
        assert self.engine.stats().num_host_used_blocks == 0
        assert not self.engine.has_unfinished
        assert self.engine.take().is_empty
        for name, output in self.finished.items():
            request = self.requests[name]
            is_aborted = any(o.finish_reason is FinishReason.ABORT for o in output.outputs)
            if request.params.prompt_logprobs is not None and not is_aborted:
                self.check_prompt_logprobs(request, output)
            if request.params.use_beam_search:
                if not is_aborted:
                    self.check_search(request, output)
                continue
            for i, completion in enumerate(output.outputs):
                if is_ranked(request.params):
                    self.check_is_one_of(request, completion)
                else:
                    self.check(request, derive_seed(request.seed, i), completion)

    def check_search(self, request, output):
        params = request.params
        eos = () if params.ignore_eos else ENGINE_MODEL.eos_token_ids
        prompt_len = len(request.prompt_token_ids)

        def logprobs_of(sequences):
            is_early = len(sequences[0]) - prompt_len < params.min_tokens
            return logprobs_after(sequences, eos if is_early else ())

        expected = beam_search_without_cache(
            logprobs_of,
            request.prompt_token_ids,
            params.n,
            params.max_tokens,
            params.length_penalty,
            params.early_stopping,
            eos,
        )
        assert [o.token_ids for o in output.outputs] == [tokens for tokens, _ in expected]
        np.testing.assert_allclose([o.score for o in output.outputs], [score for _, score in expected], atol=1e-4)

    def check_is_one_of(self, request, completion):
        prompt, params, token_ids = request.prompt_token_ids, request.params, completion.token_ids
        assert token_ids in [
            tokens_of_a_loop_without_cache(
                prompt, derive_seed(request.seed, i), params, token_ids, request.banned_sequences
            )
            for i in range(params.best_of)
        ]

    def check(self, request, seed, completion):
        token_ids, params = completion.token_ids, request.params
        assert_tokens_are_those_of_a_loop_without_cache(
            request.prompt_token_ids, seed, params, token_ids, request.banned_sequences
        )
        if params.logprobs is not None:
            chosen = [entry[t].logprob for t, entry in zip(token_ids, completion.logprobs, strict=True)]
            assert sum(chosen) == pytest.approx(completion.cumulative_logprob, abs=1e-4)
        stops = {*params.stop_token_ids} | (set() if params.ignore_eos else {3})
        match completion.finish_reason:
            case FinishReason.STOP:
                assert token_ids[-1] in stops
                assert len(token_ids) > params.min_tokens
            case FinishReason.LENGTH:
                assert len(token_ids) == params.max_tokens
        assert not stops & {*token_ids[:-1]}

    def check_prompt_logprobs(self, request, output):
        prompt = request.prompt_token_ids
        logits = teacher_forced_logits(engine_model(), [np.array(prompt)], [len(prompt)], MODEL_LEN)[0]
        expected = np.asarray(jax.nn.log_softmax(logits))[np.arange(len(prompt) - 1), prompt[1:]]
        actual = [entry[t].logprob for t, entry in zip(prompt[1:], output.prompt_logprobs[1:], strict=True)]
        np.testing.assert_allclose(actual, expected, atol=1e-4)


def is_ranked(params):
    return params.use_beam_search or params.num_sequences > params.n


def _broken(*args, **kwargs):
    raise RuntimeError("the device broke")


TestEngineMachine = EngineMachine.TestCase
TestEngineMachine.settings = settings(
    max_examples=40, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck)
)


@pytest.mark.usefixtures("no_growth")
def test_preemption_is_as_constant_as_the_state_machine_needs():
    engine = tiny_engine(num_blocks=10, max_num_batched_tokens=8)
    for i in range(12):
        add(engine, str(i), list(range(i, i + 8)), max_tokens=14, temperature=0, ignore_eos=True)
    outputs = run(engine)
    assert engine.stats().num_preemptions > 10
    for output in outputs.values():
        params = SamplingParams(temperature=0)
        assert_tokens_are_those_of_a_loop_without_cache(output.prompt_token_ids, 0, params, output.outputs[0].token_ids)


def test_samples_equal_independent_requests_with_derived_seeds():
    engine = tiny_engine()
    prompt = [5, 6, 7, 8, 9, 10]
    add(engine, "three", prompt, n=3, seed=40, max_tokens=9, ignore_eos=True)
    for i in range(3):
        add(engine, str(i), prompt, seed=derive_seed(40, i), max_tokens=9, ignore_eos=True)
    outputs = run(engine)
    together = [o.token_ids for o in outputs["three"].outputs]
    assert together == [outputs[str(i)].outputs[0].token_ids for i in range(3)]
    assert len({tuple(ids) for ids in together}) == 3


def test_cached_prefixes_are_used_and_change_nothing():
    engine, prompt = tiny_engine(enable_prefix_caching=True), list(range(1, 20))
    results = []
    for name in ("cold", "warm"):
        add(engine, name, prompt, temperature=0, max_tokens=5, ignore_eos=True, logprobs=2)
        results.append(run(engine)[name])
    cold, warm = results
    assert (cold.num_cached_tokens, warm.num_cached_tokens) == (0, 18), (
        "all but the one that is computed for its logits"
    )
    assert cold.outputs[0].token_ids == warm.outputs[0].token_ids
    assert engine.stats().prefix_cache_hit_rate == pytest.approx(18 / 38)


def test_best_of_returns_the_most_probable_of_all_its_samples():
    engine, prompt = tiny_engine(), [5, 6, 7]
    common = {"seed": 9, "max_tokens": 6, "temperature": 1.5, "ignore_eos": True}
    add(engine, "all", prompt, n=4, **common)
    everything = run(engine)["all"].outputs
    add(engine, "best", prompt, n=2, best_of=4, **common)
    best = run(engine)["best"].outputs
    expected = sorted(everything, key=lambda o: -o.cumulative_logprob)[:2]
    assert [o.token_ids for o in best] == [o.token_ids for o in expected]
    assert [o.index for o in best] == [0, 1]


def test_prefixes_under_different_salts_are_not_shared():
    engine, prompt = tiny_engine(), list(range(1, 14))
    cached = []
    for name, salt in enumerate((None, "a", "b", "a", None)):
        request = {"prompt_token_ids": prompt} | ({} if salt is None else {"cache_salt": salt})
        engine.add(engine.make_request(str(name), request, SamplingParams(max_tokens=2, temperature=0)))
        cached.append(run(engine)[str(name)].num_cached_tokens)
    assert cached == [0, 0, 0, 12, 12]


def test_a_pinned_prefix_outlives_pressure_and_a_failed_step(monkeypatch):
    engine, prefix = tiny_engine(num_blocks=12, num_host_blocks=0), list(range(1, 10))
    engine.pin("p", {"prompt_token_ids": prefix})
    engine.step()
    assert engine.is_pinned("p")

    def cached_after_pressure(round_: int) -> int:
        for i in range(4):
            other = [(7 * i + round_ + j) % 23 for j in range(12)]
            add(engine, f"other {round_} {i}", other, max_tokens=9, temperature=0, ignore_eos=True)
        add(engine, f"mine {round_}", [*prefix, 20], max_tokens=1, temperature=0)
        finished = {}
        while engine.has_unfinished:
            finished |= {output.request_id: output for output in engine.step().finished}
            engine.blocks.check_invariants()
        return finished[f"mine {round_}"].num_cached_tokens

    assert cached_after_pressure(0) == len(prefix)
    monkeypatch.setattr(engine.runner, "fetch", _broken)
    add(engine, "unlucky", [1, 2], max_tokens=1)
    with pytest.raises(RuntimeError, match="the device broke"):
        engine.step()
    monkeypatch.undo()
    assert not engine.is_pinned("p")
    assert cached_after_pressure(1) == len(prefix)
    assert engine.is_pinned("p")
    engine.unpin("p")
    assert engine.stats().num_used_blocks == 0


@pytest.mark.parametrize(
    ("prefix", "settings", "match"),
    [
        ([1, 2], {"enable_prefix_caching": False}, "enable_prefix_caching=False"),
        (list(range(20)) * 2, {"num_blocks": 10}, "cannot be pinned: it takes 10 blocks of 4"),
        (list(range(20)) * 4, {}, "max_model_len is 64"),
        ([], {}, "empty"),
        ([99], {}, "99"),
    ],
)
def test_a_prefix_that_cannot_be_pinned_is_refused_and_changes_nothing(prefix, settings, match):
    engine = tiny_engine(**settings)
    with pytest.raises(ValueError, match=match):
        engine.pin("p", {"prompt_token_ids": prefix})
    assert engine.stats().num_pinned_prefixes == 0
    add(engine, "a", [1, 2, 3], max_tokens=2, temperature=0)
    assert run(engine)["a"].outputs[0].token_ids


def test_a_search_with_more_candidates_than_a_step_looks_at_is_refused(monkeypatch):
    engine = tiny_engine()
    search = {"use_beam_search": True, "temperature": 0, "n": 4, "max_tokens": 2}
    monkeypatch.setattr("jpaged.host.admission.MAX_BEAM_CANDIDATES", 16)
    add(engine, "3 stop tokens", [1], ignore_eos=True, stop_token_ids=[4, 5, 6], **search)
    with pytest.raises(ValueError, match=r"a beam of 4 with 4 stop tokens looks at 20 continuations .* at most 16"):
        add(engine, "4 with end-of-sequence", [1], stop_token_ids=[4, 5, 6], **search)
    assert run(engine).keys() == {"3 stop tokens"}


def test_equal_pins_share_their_blocks_and_are_counted_once():
    engine, prefix = tiny_engine(num_blocks=12), list(range(16))
    for name in "abc":
        engine.pin(name, {"prompt_token_ids": prefix})
        engine.step()
    assert engine.stats().num_used_blocks == 4
    add(engine, "other", [20] * 4, max_tokens=24, temperature=0, ignore_eos=True)  # 7 blocks: all that are not pinned
    while engine.has_unfinished:
        engine.step()
    with pytest.raises(ValueError, match=r"has 7 \(4 more are pinned\)"):
        add(engine, "too long", [20] * 4, max_tokens=26, temperature=0, ignore_eos=True)


def test_limits_that_are_left_open_are_those_of_the_runner():
    sizes = {"block_size": ENGINE_SIZES.block_size, "num_blocks": 9}
    limits = [
        Engine(engine_runner(), EngineConfig(**sizes, **given)).config
        for given in ({}, {"max_num_seqs": ROWS - 1}, {"max_num_seqs": 2, "max_num_batched_tokens": 7})
    ]
    expected = [(ROWS, BUDGET), (ROWS - 1, BUDGET), (2, 7)]
    assert [(config.max_num_seqs, config.max_num_batched_tokens) for config in limits] == expected
    with pytest.raises(ValueError, match=f"max_num_seqs={ROWS + 1} is more than the runner's {ROWS}"):
        Engine(engine_runner(), EngineConfig(**sizes, max_num_seqs=ROWS + 1))


def test_an_engine_that_must_swap_needs_a_runner_with_a_host_pool(monkeypatch):
    monkeypatch.setattr(engine_runner(), "num_host_blocks", 0)
    with pytest.raises(ValueError, match="preemption='swap' needs a host pool"):
        tiny_engine(preemption="swap")


def test_a_prefix_is_not_pinned_where_a_request_under_way_needs_the_room():
    engine = tiny_engine(num_blocks=12)
    add(engine, "a", [1, 2, 3, 4], max_tokens=37, temperature=0, ignore_eos=True)  # 10 of 11 blocks in the end
    with pytest.raises(ValueError, match="requests under way may need 10, and 11 are not pinned"):
        engine.pin("p", {"prompt_token_ids": [5] * 8})
    run(engine)
    engine.pin("p", {"prompt_token_ids": [5] * 8})
    with pytest.raises(ValueError, match=r"can never fit.*the pool has 9 \(2 more are pinned\)"):
        engine.make_request("b", {"prompt_token_ids": [1, 2, 3, 4]}, SamplingParams(max_tokens=37))
    shares_it = engine.make_request("c", {"prompt_token_ids": [5] * 8}, SamplingParams(max_tokens=33))
    engine.add(shares_it)
    while engine.has_unfinished:
        engine.step()


@pytest.mark.usefixtures("no_growth")
@pytest.mark.parametrize("preemption", ["swap", "recompute"])
def test_searches_and_samples_come_back_from_preemption_unchanged(preemption):
    """The same requests with room for all of them and with room for one: the way back does not show."""
    results = []
    for num_blocks in (NUM_BLOCKS, 13):
        num_host_blocks = NUM_HOST_BLOCKS if preemption == "swap" else 0
        engine = tiny_engine(num_blocks=num_blocks, preemption=preemption, num_host_blocks=num_host_blocks)
        for i in range(4):
            prompt = list(range(i, 2 * i + 6))
            add(engine, f"samples {i}", prompt, n=2, seed=i, max_tokens=14, ignore_eos=True)
            search = {"use_beam_search": True, "n": 2, "temperature": 0, "early_stopping": "never"}
            add(engine, f"search {i}", prompt, max_tokens=14, ignore_eos=True, **search)
        outputs = run(engine)
        results.append({name: [o.token_ids for o in output.outputs] for name, output in outputs.items()})
    stats = engine.stats()
    assert stats.num_preemptions > 0
    assert (stats.num_swaps_in > 0) == (preemption == "swap")
    assert (engine.blocks.stats().num_blocks_swapped_in > 0) == (preemption == "swap")
    assert results[0] == results[1]


def test_a_request_that_is_not_streamed_has_the_same_result_and_no_deltas():
    prompts = {"plain": [1, 2, 3], "samples": [4, 5], "best": [6, 7], "search": [8, 9]}
    params = {
        "plain": SamplingParams(seed=1, max_tokens=7, ignore_eos=True),
        "samples": SamplingParams(seed=2, n=2, max_tokens=5, stop_token_ids=[4]),
        "best": SamplingParams(seed=3, n=1, best_of=2, max_tokens=4),
        "search": SamplingParams(use_beam_search=True, n=2, temperature=0, max_tokens=3),
    }

    def run_streaming(streamed: set[str]) -> tuple[dict, dict[str, dict[int, list[int]]]]:
        engine = tiny_engine()
        for name, prompt in prompts.items():
            request = engine.make_request(name, {"prompt_token_ids": prompt}, params[name])
            engine.add(request, is_streamed=name in streamed)
        finished, told = {}, {}
        while engine.has_unfinished:
            output = engine.step()
            for delta in output.deltas:
                told.setdefault(delta.request_id, {}).setdefault(delta.index, []).extend(delta.token_ids)
            finished |= {result.request_id: result for result in output.finished}
        assert engine.take().is_empty
        return finished, told

    finished, told = run_streaming(set(prompts))
    assert told == {name: {o.index: o.token_ids for o in result.outputs} for name, result in finished.items()}
    for streamed in (set(), {"samples"}, {"plain", "best"}):
        assert run_streaming(streamed) == (finished, {name: told[name] for name in streamed})


def test_logprobs_are_the_models_own_and_ranked():
    engine, prompt = tiny_engine(), [4, 8, 15, 16]
    add(
        engine,
        "a",
        prompt,
        seed=1,
        max_tokens=6,
        ignore_eos=True,
        logprobs=3,
        prompt_logprobs=2,
        top_k=5,
        logit_bias={7: 4.0},
    )
    output = run(engine)["a"]
    completion = output.outputs[0]
    logits = teacher_forced_logits(engine_model(), [np.array(prompt + completion.token_ids)], [4], MODEL_LEN)[0]
    logprobs = np.asarray(jax.nn.log_softmax(logits))
    for i, (token_id, entry) in enumerate(zip(completion.token_ids, completion.logprobs, strict=True)):
        row = logprobs[len(prompt) - 1 + i]
        best = np.argsort(-row, kind="stable")[:3]
        assert list(entry)[:3] == best.tolist()
        assert len(entry) == (3 if token_id in best else 4)
        for token, logprob in entry.items():
            assert logprob.logprob == pytest.approx(row[token], abs=1e-4)
            assert logprob.rank == 1 + (row > row[token]).sum()
    assert completion.cumulative_logprob == pytest.approx(
        sum(e[t].logprob for t, e in zip(completion.token_ids, completion.logprobs, strict=True))
    )
    assert output.prompt_logprobs[0] is None
    for i, entry in enumerate(output.prompt_logprobs[1:]):
        assert entry[prompt[i + 1]].logprob == pytest.approx(logprobs[i, prompt[i + 1]], abs=1e-4)
        assert len(entry) in (2, 3)


@pytest.mark.parametrize(
    ("prompt", "params", "match"),
    [
        ({"prompt_token_ids": []}, {}, "empty"),
        ({"prompt_token_ids": [1, 23]}, {}, r"prompt_token_ids\[1\]=23 .* 0 to 22"),
        ({"prompt_token_ids": [-1]}, {}, r"prompt_token_ids\[0\]=-1"),
        ({"prompt_token_ids": [1.5]}, {}, "1.5"),
        ({"token_ids": [1]}, {}, "expected a string, "),
        ("text", {}, "no tokenizer"),
        ({"prompt_token_ids": list(range(20)) * 4}, {}, "max_model_len=64"),
        ({"prompt_token_ids": [True]}, {}, r"prompt_token_ids\[0\]=True"),
        ({"prompt_token_ids": 5}, {}, "prompt_token_ids=5 .* expected a list"),
        ({"prompt_token_ids": None}, {}, "prompt_token_ids=None"),
        (5, {}, "prompt=5"),
        (None, {}, "prompt=None"),
        ({"prompt_token_ids": [1]}, {"max_tokens": 10**9}, "max_tokens=1000000000 is more than max_model_len=64"),
        ({"prompt_token_ids": [1]}, {"min_tokens": 65, "max_tokens": None}, "min_tokens=65 is more than max_model_len"),
        ({"prompt_token_ids": [1]}, {"n": 4000}, "n=4000 is more than max_num_seqs=4"),
        ({"prompt_token_ids": [1]}, {"stop": "x"}, "needs a tokenizer"),
        ({"prompt_token_ids": [1]}, {"stop_token_ids": [99]}, "99"),
        ({"prompt_token_ids": [1]}, {"logit_bias": {99: 1.0}}, "99"),
        ({"prompt_token_ids": [1]}, {"best_of": 5}, "best_of=5 is more than max_num_seqs=4"),
        (
            {"prompt_token_ids": [1]},
            {"use_beam_search": True, "temperature": 0, "n": 5},
            "beam width=5 is more than max_num_seqs=4",
        ),
        ({"prompt_token_ids": [1], "prompt": "a"}, {}, "expected a string, "),
        ({"prompt": 5}, {}, "no tokenizer"),
        ({"prompt_token_ids": [1], "cache_slat": "a"}, {}, r"prompt has \['cache_slat'\]: expected"),
        ({"prompt_token_ids": [1], "cache_salt": 5}, {}, "cache_salt=5"),
    ],
)
def test_bad_input_is_refused_and_the_others_go_on(prompt, params, match):
    engine = tiny_engine()
    add(engine, "good", [1, 2, 3], max_tokens=4, temperature=0, ignore_eos=True)
    engine.step()
    held = engine.stats().num_used_blocks
    with pytest.raises(ValueError, match=match):
        engine.make_request("bad", prompt, SamplingParams(**params))
    assert engine.stats().num_used_blocks == held
    assert len(run(engine)["good"].outputs[0].token_ids) == 4


def test_a_failed_step_that_took_the_pool_with_it_is_survived(monkeypatch):
    engine = tiny_engine(enable_prefix_caching=True, max_burst=1)
    add(engine, "a", list(range(9)), max_tokens=6, temperature=0, ignore_eos=True)
    engine.step()
    engine.step()
    engine.runner.cache.pool.delete()
    monkeypatch.setattr(engine.runner.programs, "get", _broken)
    with pytest.raises(RuntimeError, match="the device broke"):
        engine.step()
    monkeypatch.undo()
    output = run(engine)["a"]
    assert_tokens_are_those_of_a_loop_without_cache(
        list(range(9)), 0, SamplingParams(temperature=0), output.outputs[0].token_ids
    )


def test_a_step_interrupted_while_its_tokens_are_taken_in_loses_none(monkeypatch):
    engine = tiny_engine()
    for name in "ab":
        add(engine, name, [1, 2, 3], max_tokens=1, temperature=0, ignore_eos=True)

    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(engine.outputs, "read", interrupted)  # an earlier step left nothing to read
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    monkeypatch.undo()
    assert engine.has_unfinished
    assert run(engine).keys() == {"a", "b"}


class CtrlC:
    """Interrupts a function when it comes to its ``number``-th line of the engine or the host half, over all calls."""

    def __init__(self, number: int):
        self.number, self.num_lines = number, 0

    def run(self, function):
        sys.settrace(self._trace)
        try:
            return function()
        finally:
            sys.settrace(None)

    def _trace(self, frame, event, argument):
        name = frame.f_code.co_filename
        if "/jpaged/host/" not in name and "/jpaged/engine/" not in name:
            return None
        if frame.f_code.co_name == "take":  # what was handed out and not received is lost, whoever it is
            return None
        if event == "line":
            self.num_lines += 1
            if self.num_lines == self.number:
                signal.raise_signal(signal.SIGINT)
        return self._trace


@pytest.fixture
def ctrl_c_interrupts():
    """As it does by default; a process started in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c_interrupts", "no_growth")
def test_ctrl_c_on_whatever_line_of_a_step_changes_nothing():
    """Two samples, a search and a swap, interrupted once: the same results, no block lost."""

    def run_interrupted(number: int) -> tuple[dict, CtrlC, Engine]:
        engine = tiny_engine(num_blocks=9, num_host_blocks=NUM_HOST_BLOCKS, preemption="swap")
        add(engine, "samples", [1, 2, 3], n=2, seed=0, max_tokens=9, ignore_eos=True)
        search = {"use_beam_search": True, "n": 2, "temperature": 0}
        add(engine, "search", [1, 2, 4], max_tokens=9, ignore_eos=True, **search)
        finished, ctrl_c, num_interrupts = {}, CtrlC(number), 0
        while engine.has_unfinished:
            try:
                outputs = ctrl_c.run(engine.step).finished
            except KeyboardInterrupt:
                num_interrupts += 1
                outputs = engine.take().finished
            finished |= {output.request_id: [o.token_ids for o in output.outputs] for output in outputs}
        engine.blocks.check_invariants()
        assert engine.stats().num_used_blocks == engine.stats().num_host_used_blocks == 0
        assert num_interrupts == (number > 0)
        return finished, ctrl_c, engine

    expected, ctrl_c, engine = run_interrupted(0)
    assert engine.stats().num_swaps_in > 0
    for number in range(1, ctrl_c.num_lines, ctrl_c.num_lines // 60):
        assert run_interrupted(number)[0] == expected, number


@pytest.mark.parametrize("end", ["abort", "forget", "unpin"])
def test_a_pin_that_is_not_computed_yet_can_be_ended(end):
    engine = tiny_engine()
    engine.pin("p", {"prompt_token_ids": list(range(20))})
    engine.step()
    getattr(engine, end)("p")
    if end != "unpin":  # they are for requests
        assert not engine.take().deltas
        engine.unpin("p")
    assert not engine.is_pinned("p")
    assert engine.stats().num_used_blocks == 0
    add(engine, "a", [1, 2], max_tokens=2, temperature=0)
    assert run(engine).keys() == {"a"}


def test_an_unseeded_request_that_is_refused_draws_no_seed():
    tokens = []
    for refusals in (0, 2):
        engine = tiny_engine(seed=1)
        for _ in range(refusals):
            with pytest.raises(ValueError, match="empty"):
                engine.make_request("bad", {"prompt_token_ids": []})
        add(engine, "a", [1, 2, 3], max_tokens=8, ignore_eos=True)
        tokens.append(run(engine)["a"].outputs[0].token_ids)
    assert tokens[0] == tokens[1]


def test_an_engine_of_another_block_size_than_its_runners_is_refused():
    with pytest.raises(ValueError, match="block_size=8 is not the runner's 4"):
        tiny_engine(block_size=8)


HF_BLOCK_SIZES = (8, 16, 32)


# Grouped heads, learned positions and a sliding window in all sizes; families of which test_beam.py has no search.
HF_ENGINE_RUNS = [
    *itertools.product(["llama_gqa", "opt", "qwen2_window"], HF_BLOCK_SIZES),
    ("smollm3", 8),
    ("phi3_longrope", 8),
    ("granite", 16),
    ("olmo2", 8),
    ("starcoder2", 32),
    ("mixtral", 8),
    ("qwen3_moe", 16),
    ("gpt_oss_mxfp4", 8),
    ("phi3", 8),
]


@pytest.mark.parametrize(("case", "block_size"), HF_ENGINE_RUNS)
def test_tokens_and_logprobs_equal_hugging_face(case, block_size):
    """All prompts of a case in one batch: chunked, mixed with each other's decodes, then out of the prefix cache."""
    path = HF_REFERENCE / case
    model_config, mesh = load_config(path), make_mesh(1)
    model = load_model(path, model_config, jnp.float32, mesh, use_tqdm=False)
    references = load_reference(case)
    rows = len(references)
    # Few rows make a step of only decodes take the kernel's other path: runs of one block size take it.
    budget = rows if block_size == 16 else 4 * rows
    num_groups = len(grouped(model_config.layer_specs, model_config.max_model_len).groups)  # each has blocks of its own
    num_blocks = 1 + 8 * 15 * num_groups
    config = EngineConfig(
        block_size=block_size, num_blocks=num_blocks, max_num_seqs=rows, max_num_batched_tokens=budget
    )
    llm = LLM.from_model(model, model_config, config, mesh=mesh, warm_up=False, use_tqdm=False)
    del llm.engine.runner.buckets[:-1]  # one program, all rows: compiling dominates here
    prompts = [{"prompt_token_ids": ref.prompt.tolist()} for ref in references.values()]
    outputs = llm.generate(prompts, HF_GREEDY, use_tqdm=False)
    for reference, output in zip(references.values(), outputs, strict=True):
        assert_equals_reference(output, reference)
    unscored = dataclasses.replace(HF_GREEDY, prompt_logprobs=None)  # tokens with scores are computed
    again = llm.generate(prompts, unscored, use_tqdm=False)
    assert [output.outputs[0].token_ids for output in again] == [output.outputs[0].token_ids for output in outputs]
    assert llm.stats().prefix_hit_tokens >= 64
    assert llm.stats().num_used_blocks == 0


class UnpinnableMemory:
    """Host memory that the driver refuses to pin."""

    is_staged = False

    def wait(self):
        raise self.failure()

    def failure(self):
        return RuntimeError("it could not be pinned")

    def forget(self):
        pass


def test_host_memory_that_cannot_be_pinned_costs_recomputation_and_no_request(monkeypatch, caplog):
    host_pool = engine_runner().host_pool
    monkeypatch.setattr(host_pool, "_memory", UnpinnableMemory())
    monkeypatch.setattr(host_pool, "_is_there", False)
    results = []
    for num_blocks in (NUM_BLOCKS, 13):
        engine = tiny_engine(num_blocks=num_blocks, preemption="swap")
        for i in range(4):
            prompt, search = list(range(i, 2 * i + 6)), {"use_beam_search": True, "n": 2, "temperature": 0}
            add(engine, str(i), prompt, max_tokens=14, ignore_eos=True, early_stopping="never", **search)
        results.append({name: [o.token_ids for o in output.outputs] for name, output in run(engine).items()})
    stats = engine.stats()
    assert stats.num_preemptions > 0
    assert (stats.num_swaps_in, stats.num_host_blocks) == (0, 0)
    assert results[0] == results[1]
    assert [record.levelname for record in caplog.records if "could not be pinned" in record.message] == ["ERROR"] * 2


def test_a_bound_below_the_time_of_a_step_is_logged_once_that_time_is_known(caplog, monkeypatch):
    runner = tiny_engine().runner
    monkeypatch.setattr(runner, "profile", dataclasses.replace(runner.profile, prefill_fixed_s=0.0031))
    for bound, num_logged in ((3.2, 0), (None, 0), (2, 1)):
        caplog.clear()
        tiny_engine(max_inter_token_ms=bound)
        found = [
            record.message
            for record in caplog.records
            if "max_inter_token_ms=2 is less than the 3.1 ms" in record.message
        ]
        assert len(found) == num_logged
