"""The whole engine: its tokens are those of a loop without a cache, whatever else happens."""

import dataclasses
from functools import cache

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from oracles import HF_CASES, HF_REFERENCE, load_reference, teacher_forced_logits

from jpaged.config import EngineConfig
from jpaged.device.model_runner import ModelRunner
from jpaged.device.sampler import make_sample_inputs, sample
from jpaged.device.sharding import make_mesh
from jpaged.engine import Engine
from jpaged.host.step_plan import Sample
from jpaged.llm import LLM
from jpaged.models import LlamaConfig, Rope, load_config, load_model, random_model
from jpaged.request import FinishReason, RequestOutput, SamplingParams, derive_seed

MODEL_LEN = 64
ROWS, BUDGET, NUM_BLOCKS, BLOCK_SIZE = 4, 16, 40, 4

TINY = LlamaConfig(
    architecture="LlamaForCausalLM",
    vocab_size=23,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_position_embeddings=MODEL_LEN,
    rms_norm_eps=1e-5,
    rope=Rope(8, 10000.0, MODEL_LEN),
    eos_token_ids=(3,),
)


@cache
def tiny_model() -> nnx.Module:
    """Weights large enough that logits differ by far more than rounding."""
    model = random_model(TINY, jnp.float32, make_mesh(1), 0)
    graphdef, state = nnx.split(model)
    return nnx.merge(graphdef, jax.tree.map(lambda x: x * 12 if x.ndim > 1 else x, state))


@cache
def tiny_runner() -> ModelRunner:
    config = EngineConfig(
        block_size=BLOCK_SIZE, num_blocks=NUM_BLOCKS, max_num_seqs=ROWS, max_num_batched_tokens=BUDGET
    )
    return ModelRunner(tiny_model(), TINY, config, make_mesh(1))


def tiny_engine(**settings) -> Engine:
    """An engine over the one compiled runner, with no more than its blocks, rows and tokens."""
    runner = tiny_runner()
    return Engine(runner, dataclasses.replace(runner.config, **settings))


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
    prompt: list[int], seed: int, params: SamplingParams, token_ids: list[int]
) -> None:
    """Each token is what the sampler draws from the logits of one dense pass over all tokens before it."""
    sequence = np.array(prompt + token_ids)
    logits = teacher_forced_logits(tiny_model(), [sequence], [len(prompt)], MODEL_LEN)[0]
    stops = (*(params.stop_token_ids or ()), *(() if params.ignore_eos else TINY.eos_token_ids))
    samples = [
        Sample(0, 0, len(prompt) + i, seed, params, stops if i < params.min_tokens else (), prompt, token_ids[:i])
        for i in range(len(token_ids))
    ]
    rows = np.zeros((MODEL_LEN, TINY.vocab_size), np.float32)
    rows[: len(samples)] = logits[len(prompt) - 1 : len(sequence) - 1]
    expected = _sample(jnp.asarray(rows), make_sample_inputs(samples, MODEL_LEN))
    assert token_ids == np.asarray(expected)[: len(token_ids)].tolist()


@jax.jit
def _sample(logits, inputs):
    return sample(logits, inputs, num_top=0).token_ids


class EngineMachine(RuleBasedStateMachine):
    """Random arrivals, aborts, budgets and pools so small that preemption is constant."""

    @initialize(
        num_blocks=st.integers(9, 17),
        budget=st.integers(ROWS, BUDGET),
        rows=st.integers(2, ROWS),
        caching=st.booleans(),
    )
    def start(self, num_blocks, budget, rows, caching):
        self.engine = tiny_engine(
            num_blocks=num_blocks,
            max_num_batched_tokens=budget,
            max_num_seqs=min(rows, budget),
            enable_prefix_caching=caching,
        )
        self.requests = {}
        self.finished = {}

    @rule(
        prefix=st.sampled_from([0, 0, 4, 9, 12]),
        tail=st.lists(st.integers(0, TINY.vocab_size - 1), min_size=1, max_size=10),
        n=st.integers(1, 2),
        max_tokens=st.integers(1, 12),
        temperature=st.sampled_from([0.0, 0.7, 1.5]),
        seed=st.integers(0, 5),
        ignore_eos=st.booleans(),
        penalty=st.sampled_from([1.0, 1.0, 1.3]),
        min_tokens=st.sampled_from([0, 0, 1, 3]),
        stops=st.sampled_from([(), (), (7, 11, 12)]),
        bias=st.sampled_from([None, None, {5: 3.0, 9: -50.0}]),
        prompt_logprobs=st.sampled_from([None, None, 0]),
    )
    def arrive(
        self,
        prefix,
        tail,
        n,
        max_tokens,
        temperature,
        seed,
        ignore_eos,
        penalty,
        min_tokens,
        stops,
        bias,
        prompt_logprobs,
    ):
        prompt = [i % TINY.vocab_size for i in range(prefix)] + tail
        params = SamplingParams(
            n=n,
            max_tokens=max_tokens,
            temperature=temperature,
            seed=seed,
            ignore_eos=ignore_eos,
            repetition_penalty=penalty,
            min_tokens=min(min_tokens, max_tokens),
            stop_token_ids=stops,
            logit_bias=bias,
            prompt_logprobs=prompt_logprobs,
        )
        name = str(len(self.requests))
        try:
            request = self.engine.make_request(name, {"prompt_token_ids": prompt}, params)
        except ValueError as error:
            assert "never fit" in str(error)  # noqa: PT017
            return
        self.engine.add(request)
        self.requests[name] = request

    @rule(steps=st.integers(1, 6))
    def step(self, steps):
        for _ in range(steps):
            self.finished |= {output.request_id: output for output in self.engine.step().finished}
            self.engine.blocks.check_invariants()

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
            aborted = [o.index for o in result.outputs if o.finish_reason is FinishReason.ABORT]
            assert aborted
            assert aborted == [delta.index for delta in output.deltas]

    @precondition(lambda self: self.engine.scheduler.stats().num_running)
    @rule(when=st.sampled_from(["before it runs", "after it ran"]))
    def fail(self, when):
        """A step dies after its blocks were planned: nothing may depend on what it wrote or would have written."""
        runner = self.engine.runner
        execute = runner.execute

        def broken(plan):
            if when == "after it ran":
                execute(plan)
            raise RuntimeError("the device broke")

        runner.execute = broken
        try:
            with pytest.raises(RuntimeError, match="the device broke"):
                self.engine.step()
        finally:
            runner.execute = execute

    def teardown(self):
        if not hasattr(self, "engine"):
            return
        self.finished |= run(self.engine)
        assert self.finished.keys() == self.requests.keys()
        assert self.engine.blocks.num_free_blocks == self.engine.blocks.num_blocks - 1
        assert not any((self.engine._groups, self.engine._to_collect, self.engine._progress))
        for name, output in self.finished.items():
            request = self.requests[name]
            is_aborted = any(o.finish_reason is FinishReason.ABORT for o in output.outputs)
            if request.params.prompt_logprobs is not None and not is_aborted:
                self.check_prompt_logprobs(request, output)
            for i, completion in enumerate(output.outputs):
                self.check(request, derive_seed(request.seed, i), completion)

    def check(self, request, seed, completion):
        token_ids, params = completion.token_ids, request.params
        assert_tokens_are_those_of_a_loop_without_cache(request.prompt_token_ids, seed, params, token_ids)
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
        logits = teacher_forced_logits(tiny_model(), [np.array(prompt)], [len(prompt)], MODEL_LEN)[0]
        expected = np.asarray(jax.nn.log_softmax(logits))[np.arange(len(prompt) - 1), prompt[1:]]
        actual = [entry[t].logprob for t, entry in zip(prompt[1:], output.prompt_logprobs[1:], strict=True)]
        np.testing.assert_allclose(actual, expected, atol=1e-4)


def _broken(*args, **kwargs):
    raise RuntimeError("the device broke")


TestEngineMachine = EngineMachine.TestCase
TestEngineMachine.settings = settings(
    max_examples=40, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck)
)


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
    assert (cold.num_cached_tokens, warm.num_cached_tokens) == (0, 16)
    assert cold.outputs[0].token_ids == warm.outputs[0].token_ids
    assert engine.stats().prefix_cache_hit_rate == pytest.approx(16 / 38)


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
    logits = teacher_forced_logits(tiny_model(), [np.array(prompt + completion.token_ids)], [4], MODEL_LEN)[0]
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
        ({"token_ids": [1]}, {}, "expected a string or"),
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
    engine = tiny_engine(enable_prefix_caching=True)
    add(engine, "a", list(range(9)), max_tokens=6, temperature=0, ignore_eos=True)
    engine.step()
    engine.step()
    engine.runner.cache.pool.delete()
    monkeypatch.setattr(engine.runner, "_program", _broken)
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

    def interrupted(group):
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "_collect", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    monkeypatch.undo()
    assert engine.has_unfinished
    assert run(engine).keys() == {"a", "b"}


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


@pytest.mark.parametrize("block_size", [8, 16, 32])
@pytest.mark.parametrize("case", HF_CASES)
def test_tokens_and_logprobs_equal_hugging_face(case, block_size):
    """All prompts of a case in one batch: chunked, mixed with each other's decodes."""
    path = HF_REFERENCE / case
    model_config, mesh = load_config(path), make_mesh(1)
    model = load_model(path, model_config, jnp.float32, mesh, use_tqdm=False)
    references = load_reference(case)
    rows = len(references)
    # Few rows make a step of only decodes take the kernel's other path: every second case runs with it.
    budget = rows if block_size == 16 else 4 * rows
    config = EngineConfig(
        block_size=block_size, num_blocks=1 + 8 * 15, max_num_seqs=rows, max_num_batched_tokens=budget
    )
    llm = LLM.from_model(model, model_config, config, mesh=mesh, warm_up=False, use_tqdm=False)
    llm.engine.runner.buckets = llm.engine.runner.buckets[-1:]  # one program, all rows: compiling dominates here
    prompts = [{"prompt_token_ids": ref.prompt.tolist()} for ref in references.values()]
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, logprobs=0, prompt_logprobs=0)
    outputs = llm.generate(prompts, params, use_tqdm=False)
    for reference, output in zip(references.values(), outputs, strict=True):
        completion = output.outputs[0]
        assert completion.token_ids == reference.tokens.tolist()
        chosen = [entry[t].logprob for t, entry in zip(completion.token_ids, completion.logprobs, strict=True)]
        np.testing.assert_allclose(chosen, reference.logprobs, atol=1e-4, rtol=0)
        scored = [e[t].logprob for t, e in zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)]
        np.testing.assert_allclose(scored, reference.prompt_logprobs, atol=1e-4, rtol=0)
    assert llm.stats().num_used_blocks == 0
