"""The cost of a step: its memory, its number of programs; and that execution does what the plan says."""

import dataclasses
import threading
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jpaged.contract.plan import BeamSelect, BlockCopy
from jpaged.device.kv import sizing
from jpaged.device.kv.host_pool import MOVE_SIZES
from jpaged.device.kv.sizing import num_blocks_that_fit
from jpaged.device.runner import ModelRunner
from jpaged.device.step.inputs import Bucket
from jpaged.device.step.pack import copy_waves
from jpaged.device.step.program_cache import ProgramCache
from jpaged.device.step.programs import Programs, kept_programs
from jpaged.device.target import TARGETS
from jpaged.engine.loop import Engine
from jpaged.request import CompletionOutput, SamplingParams
from jpaged.sharding import make_mesh
from tests.support.plans import Chunk, Sample, make_plan
from tests.support.tiny import TINY, make_runner


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(
    ("bucket", "max_burst"),
    [(Bucket(4, 4), 1), (Bucket(4, 4), 3), (Bucket(16, 4), 3)],
    ids=["decode", "burst", "mixed"],
)
def test_no_step_allocates_anything_of_the_pools_size(dtype, bucket, max_burst):
    runner = make_runner(dtype, num_blocks=4096, max_burst=max_burst)
    pool_bytes = runner.cache.pool.nbytes
    memory = runner.programs.get(("forward", bucket)).memory_analysis()
    assert memory.temp_size_in_bytes < pool_bytes / 2
    assert memory.alias_size_in_bytes >= pool_bytes, "the donated pool is written in place"
    # Not hidden in one large buffer that is also an output: outputs are the pool and little else.
    assert memory.output_size_in_bytes - memory.alias_size_in_bytes < pool_bytes / 100


def test_block_copies_allocate_nothing_of_the_pools_size():
    runner = make_runner(num_blocks=4096)
    memory = runner.programs.get(("copy", 8)).memory_analysis()
    assert memory.temp_size_in_bytes < runner.cache.pool.nbytes / 2


FEW_PROGRAMS = {"model_config": dataclasses.replace(TINY, num_layers=1), "max_num_seqs": 2, "max_num_batched_tokens": 8}
"""For tests that compile whatever there is."""


def test_warm_up_compiles_every_bucket_and_serving_plain_requests_nothing_more():
    runner = make_runner(**FEW_PROGRAMS, num_host_blocks=2, has_own_programs=True)
    assert len(runner.programs) == 0
    runner.warm_up(use_tqdm=False)
    num_rows = {bucket.num_rows for bucket in runner.buckets}
    expected = 2 * len(runner.buckets) + len(num_rows)  # steps, what loads their inputs, samplers
    expected += 1 + 1 + 1 + 2 * len(MOVE_SIZES)  # what enters rows and reads results, copies, and moves both ways
    assert len(runner.programs) == expected
    engine = Engine(runner, runner.config)
    for i in range(9):
        prompt = {"prompt_token_ids": list(range(1, 2 + i))}
        engine.add(
            engine.make_request(str(i), prompt, SamplingParams(max_tokens=3 + i, n=1 + i % 2, seed=i, top_p=0.9))
        )
    while engine.has_unfinished:
        engine.step()
    runner.execute(make_plan(to_host=(BlockCopy(1, 0),)))
    runner.execute(make_plan(from_host=(BlockCopy(0, 1),)))
    assert len(runner.programs) == expected


def test_programs_are_lowered_in_one_order_by_one_thread(monkeypatch):
    """JAX numbers Pallas kernels as it lowers them; in another order they would not be found in the compile cache."""
    lower, calls = Programs.lower, []

    def noted(programs: Programs, key: tuple) -> jax.stages.Lowered:
        calls[-1].append((key, threading.current_thread() is threading.main_thread()))
        return lower(programs, key)

    monkeypatch.setattr(Programs, "lower", noted)
    for _ in range(2):
        calls.append([])
        runner = make_runner(**FEW_PROGRAMS, warm_up=True)
        assert [key for key, _ in calls[-1]] == runner.programs.all_keys()
    assert calls[0] == calls[1]
    assert all(is_main for _, is_main in calls[0])


def test_copies_run_before_the_chunks_write():
    runner = make_runner()
    chunk = Chunk(0, [1, 2, 3, 4, 5], 0, 5, [7])
    runner.execute(make_plan(chunks=(chunk,)))
    before = np.asarray(runner.cache.pool[7])
    rewrite = Chunk(0, [9], 4, 5, [7])
    runner.execute(make_plan(copies=(BlockCopy(7, 9), BlockCopy(7, 11)), chunks=(rewrite,)))
    for copy in (9, 11):
        np.testing.assert_array_equal(np.asarray(runner.cache.pool[copy]), before)
    assert not np.array_equal(np.asarray(runner.cache.pool[7]), before)


def test_a_fork_draws_several_tokens_from_one_chunk():
    runner = make_runner()
    params = SamplingParams(temperature=3.0)
    samples = tuple(Sample(i, 1, 2, seed, params, (), (), ()) for i, seed in enumerate((1, 2, 1)))
    chunks = (Chunk(8, [3], 0, 1, [1]), Chunk(9, [1, 2], 0, 2, [2]))
    result = runner.execute(make_plan(chunks=chunks, samples=samples))
    assert result.token_ids.shape == (3,)
    assert result.token_ids[0] == result.token_ids[2]
    assert result.scores.logprobs[0] == result.scores.logprobs[2]


def test_beams_read_the_logits_of_their_own_chunks_beside_samples():
    """A search's candidates do not depend on what shares the step; a sample's token and score neither."""
    prompts = [1, 2, 3], [4, 5], [6, 7, 8, 9], [10]
    chunks = tuple(Chunk(i, ids, 0, len(ids), [1 + i]) for i, ids in enumerate(prompts))
    sample = Sample(0, 3, 1, 0, SamplingParams(temperature=0), (), (), ())
    pair, single = BeamSelect([2, 0], [-1.0, -2.0], 4, (3,)), BeamSelect([1], [0.0], 2)
    together = make_runner(max_num_seqs=8).execute(make_plan(chunks=chunks, samples=(sample,), beams=(pair, single)))
    runner = make_runner(max_num_seqs=8)
    alone = [runner.execute(make_plan(chunks=chunks, beams=(beam,))).beams[0] for beam in (pair, single)]
    for mixed, by_itself, beam in zip(together.beams, alone, (pair, single), strict=True):
        assert len(mixed.scores) == beam.num_candidates
        assert mixed.beams.tolist() == by_itself.beams.tolist()
        assert mixed.token_ids.tolist() == by_itself.token_ids.tolist()
        np.testing.assert_allclose(mixed.scores, by_itself.scores, rtol=1e-5)
    assert 3 not in together.beams[0].token_ids
    sampled = runner.execute(make_plan(chunks=chunks, samples=(sample,)))
    assert together.token_ids.tolist() == sampled.token_ids.tolist()
    assert together.scores.logprobs == pytest.approx(sampled.scores.logprobs, rel=1e-5)


def test_the_best_beam_candidate_after_a_prompt_is_the_greedy_token():
    chunk = Chunk(0, [1, 2, 3], 0, 3, [1])
    runner = make_runner()
    greedy = runner.execute(
        make_plan(chunks=(chunk,), samples=(Sample(0, 0, 3, 0, SamplingParams(temperature=0), (), (), ()),))
    )
    [found] = runner.execute(make_plan(chunks=(chunk,), beams=(BeamSelect([0], [0.0], 8),))).beams
    assert found.token_ids[0] == greedy.token_ids[0]
    assert found.scores[0] == pytest.approx(greedy.scores.logprobs[0], rel=1e-5)
    assert found.beams.tolist() == [0] * 8


def test_a_step_of_beams_alone_runs_no_sampler():
    runner = make_runner(has_own_programs=True)
    chunk = Chunk(0, [1, 2, 3], 0, 3, [1])
    result = runner.execute(make_plan(chunks=(chunk,), beams=(BeamSelect([0], [0.0], 2),)))
    assert result.token_ids.tolist() == []
    assert {key[0] for key in runner.programs.store.programs} == {"enter", "load", "forward", "beam"}


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), unique_by=lambda pair: pair[1], max_size=9))
def test_copies_in_turns_are_those_of_all_sources_read_first(pairs):
    copies = [BlockCopy(src, dst) for src, dst in pairs]
    pool = list(range(10))
    try:
        waves = list(copy_waves(copies))
    except AssertionError:  # a circle: some block's content would have to wait elsewhere
        targets = {copy.dst: copy.src for copy in copies}
        assert any(_comes_back(targets, block) for block in targets)
        return
    for wave in waves:
        assert not {copy.src for copy in wave} & {copy.dst for copy in wave}
        for copy in wave:
            pool[copy.dst] = pool[copy.src]
    expected = list(range(10))
    for copy in copies:
        expected[copy.dst] = copy.src
    assert pool == expected


def _comes_back(targets: dict[int, int], start: int) -> bool:
    block, seen = targets.get(start), set()
    while block is not None and block not in seen and block != start:
        seen.add(block)
        block = targets.get(block)
    return block == start


def test_any_mixture_of_searches_shares_a_program():
    runner = make_runner(max_num_seqs=8, has_own_programs=True)
    chunks = tuple(Chunk(i, [1 + i], 0, 1, [1 + i]) for i in range(8))
    for widths in ((3,), (4,), (3, 4), (2, 3, 1), (1, 1, 1, 4)):
        starts = np.cumsum((0, *widths))
        beams = tuple(
            BeamSelect(range(start, start + width), [0.0] * width, 2 * width)
            for start, width in zip(starts, widths, strict=False)
        )
        runner.execute(make_plan(chunks=chunks, beams=beams))
    assert [key for key in runner.programs.store.programs if key[0] == "beam"] == [("beam", 8, 8, 0)], (
        "rows, candidates, bans"
    )


BURST_PARAMS = [
    SamplingParams(temperature=1.5),
    SamplingParams(temperature=0.7, top_p=0.8),
    SamplingParams(temperature=0),
    SamplingParams(temperature=1.0, top_k=5),
]


@pytest.mark.parametrize("changed", [{}, {"logprobs": 3}, {"logit_bias": {5: 2.0}}], ids=["plain", "scored", "biased"])
def test_a_burst_draws_what_single_steps_draw(changed):
    """With rows that end before the others, and whatever program samples."""
    params = [dataclasses.replace(params, **changed) for params in BURST_PARAMS]
    starts, num_draws = [3, 6, 7, 9], [3, 1, 2, 3]
    fed = [[(7 * row + i) % 17 for i in range(start + 1)] for row, start in enumerate(starts)]
    tables = [[2 * row + 1, 2 * row + 2] for row in range(4)]

    def chunks_of(token_ids, starts):
        return tuple(
            Chunk(row, ids, start, 2, table)
            for row, (ids, start, table) in enumerate(zip(token_ids, starts, tables, strict=True))
        )

    def samples_of(positions, num_draws):
        return tuple(
            Sample(row, row, positions[row], 40 + row, params[row], (), (), (), num_draws[row]) for row in range(4)
        )

    def prefilled() -> ModelRunner:
        runner = make_runner(max_num_batched_tokens=32, max_burst=3)
        runner.execute(make_plan(chunks=chunks_of([ids[:-1] for ids in fed], [0] * 4)))
        return runner

    single, tokens, expected = prefilled(), [ids[-1] for ids in fed], []
    for step in range(3):
        chunks = chunks_of([[token] for token in tokens], [start + step for start in starts])
        result = single.execute(make_plan(chunks=chunks, samples=samples_of([c.stop for c in chunks], [1] * 4)))
        tokens = result.token_ids.tolist()
        expected.append((tokens, result.scores))
    plan = make_plan(
        chunks=chunks_of([ids[-1:] for ids in fed], starts),
        samples=samples_of([start + 1 for start in starts], num_draws),
        num_steps=3,
    )
    burst = prefilled().execute(plan)
    for step, (token_ids, scores) in enumerate([(burst.token_ids, burst.scores), *burst.later]):
        going_on = [row for row in range(4) if step < num_draws[row]]
        assert token_ids[going_on].tolist() == [expected[step][0][row] for row in going_on]
        np.testing.assert_allclose(scores.logprobs[going_on], expected[step][1].logprobs[going_on], rtol=1e-5)
        np.testing.assert_array_equal(scores.top_ids[going_on], expected[step][1].top_ids[going_on])


def test_a_step_feeds_what_the_step_before_drew_whichever_programs_ran():
    """The tokens that one plan draws are those the next one knows by their rows alone."""
    chunk = Chunk(0, [1, 2, 3], 0, 3, [1])

    def sample(position: int, **changed) -> Sample:
        return Sample(0, 0, position, 7, SamplingParams(temperature=2.0, **changed), (), (), ())

    ahead, known = make_runner(), make_runner()
    for kinds in product(({}, {"logprobs": 2}), repeat=3):
        drawn = [ahead.enqueue(make_plan(chunks=(chunk,), samples=(sample(3, **kinds[0]),)))]
        [token] = known.execute(drawn[0].plan).token_ids.tolist()
        tokens = [token]
        for position, kind in enumerate(kinds[1:], 3):
            follower = make_plan(chunks=(Chunk(0, [~0], position, 3, [1]),), samples=(sample(position + 1, **kind),))
            drawn.append(ahead.enqueue(follower))
            spelled_out = make_plan(
                chunks=(Chunk(0, [token], position, 3, [1]),), samples=(sample(position + 1, **kind),)
            )
            [token] = known.execute(spelled_out).token_ids.tolist()
            tokens.append(token)
        assert [ahead.fetch(step).token_ids.tolist() for step in drawn] == [[token] for token in tokens]


def test_prompts_have_a_step_where_the_budget_is_no_more_than_the_rows_and_what_was_lost_is_replaced():
    runner = make_runner(max_num_seqs=4, max_num_batched_tokens=4, num_host_blocks=2)
    assert runner.buckets[-2:] == [Bucket(4, 4), Bucket(5, 4)]
    runner.measure_profile()
    assert runner.profile is not None
    for array in jax.tree.leaves((runner.cache, runner._state)):  # as an interruption leaves them
        array.delete()
    runner.measure_profile()
    assert len(greedy_tokens(runner, list(range(1, 12)), 5)) == 5


def greedy_tokens(runner: ModelRunner, prompt: list[int], max_tokens: int) -> list[int]:
    engine = Engine(runner, runner.config)
    params = SamplingParams(temperature=0, max_tokens=max_tokens)
    engine.add(engine.make_request("a", {"prompt_token_ids": prompt}, params))
    finished = []
    while engine.has_unfinished:
        finished += engine.step().finished
    return finished[0].outputs[0].token_ids


def outputs_of(runner: ModelRunner, num_kinds: int = 4, max_tokens: int = 6) -> list[CompletionOutput]:
    """Outputs of greedy, drawn, filtered and penalised requests together, more than fit in one step."""
    del runner.buckets[:-2]  # a program for prompts and one for decodes: compiling dominates here
    engine = Engine(runner, runner.config)
    kinds = [
        {"temperature": 0},
        {"temperature": 1.0, "seed": 1},
        {"temperature": 1.0, "top_p": 0.7, "seed": 2},
        {"temperature": 0, "logprobs": 2, "presence_penalty": 1.0},
    ]
    for index, kind in enumerate(kinds[:num_kinds]):
        prompt = {"prompt_token_ids": [1 + n % 16 for n in range(3 + 9 * index)]}
        engine.add(
            engine.make_request(str(index), prompt, SamplingParams(max_tokens=max_tokens, ignore_eos=True, **kind))
        )
    finished = []
    while engine.has_unfinished:
        finished += engine.step().finished
    return [output.outputs[0] for output in sorted(finished, key=lambda output: output.request_id)]


def test_two_devices_in_bursts_give_the_tokens_of_one_in_steps():
    results = [outputs_of(make_runner(tensor_parallel_size=size, max_burst=size), num_kinds=3) for size in (1, 2)]
    assert [output.token_ids for output in results[0]] == [output.token_ids for output in results[1]]
    expected = [pytest.approx(output.cumulative_logprob, abs=1e-4) for output in results[0]]
    assert [output.cumulative_logprob for output in results[1]] == expected


EIGHT_HEADS = dataclasses.replace(TINY, num_layers=1, num_heads=8, num_kv_heads=2, intermediate_size=16, vocab_size=24)


@pytest.mark.parametrize(
    ("num_devices", "num_kv_heads", "kernel"),
    [(8, 2, {}), (8, 8, {}), (4, 2, {"attention_implementation": "pallas_tpu", "interpret": True})],
)
def test_many_devices_give_the_tokens_of_one_with_fewer_kv_heads_or_as_many(num_devices, num_kv_heads, kernel):
    config = dataclasses.replace(EIGHT_HEADS, num_kv_heads=num_kv_heads)
    alone = make_runner(model_config=config, max_burst=1)
    together = make_runner(model_config=config, tensor_parallel_size=num_devices, max_burst=3, **kernel)
    shares = {shard.data.shape[3] for shard in together.cache.pool.addressable_shards}
    assert shares == {1}, "one KV head a device"
    work = (1, 3) if kernel else (3, 6)  # interpreted, four devices take half a second a step
    results = [outputs_of(runner, *work) for runner in (alone, together)]
    assert [output.token_ids for output in results[0]] == [output.token_ids for output in results[1]]


def test_context_beyond_the_model_is_refused():
    with pytest.raises(ValueError, match="max_model_len=129 is more than the model's own limit of 128"):
        make_runner(max_model_len=129)


def test_the_default_context_shrinks_to_the_pool():
    assert make_runner(num_blocks=9).max_model_len == 64
    assert make_runner(num_blocks=90).max_model_len == 128


def test_a_pool_is_sized_from_memory_when_not_given():
    runner = make_runner(num_blocks=None)
    assert runner.num_blocks == 4 * 128 // 8 + 1, "all rows at full length, and the padding block"


def test_the_pool_of_one_row_holds_its_whole_context():
    """On a CPU no block is rounded away."""
    runner = make_runner(num_blocks=None, max_num_seqs=1, block_size=1)
    assert runner.num_blocks == 129
    assert runner.max_model_len == 128


@pytest.mark.parametrize(("free", "expected"), [(10_000, 9_984), (10_100, 10_048), (130, 130), (129, 129), (90, 90)])
def test_the_number_of_blocks_on_an_accelerator_is_a_round_one_if_the_context_fits(monkeypatch, free, expected):
    monkeypatch.setattr(sizing, "available_bytes", lambda mesh, target, fraction: 1000 * free + 5000)
    sizes = {"reserved_bytes": 5000, "least_blocks": 130, "useful_blocks": 50}
    blocks = num_blocks_that_fit(1000, make_mesh(1), TARGETS["gpu"], 0.9, **sizes)
    assert blocks == expected


SIZED_FROM_MEMORY = {"num_blocks": None, "num_host_blocks": 0, "preemption": "recompute", "max_burst": 1}


def pretend_to_be_an_accelerator(monkeypatch) -> None:
    """Give CPU devices the defaults of a GPU, but not its compiler options."""
    monkeypatch.setitem(TARGETS, "cpu", dataclasses.replace(TARGETS["gpu"], compiler_options=()))


def give_memory(monkeypatch, memory: int, guess: float) -> None:
    """So many bytes for pool and workspace, as on a device with memory of its own; ``guess`` is the latter's part."""
    monkeypatch.setattr(sizing, "available_bytes", lambda mesh, target: memory)
    monkeypatch.setattr(sizing, "GUESSED_WORKSPACE", guess)
    pretend_to_be_an_accelerator(monkeypatch)
    monkeypatch.setattr(
        sizing,
        "num_blocks_that_fit",
        lambda bytes_per_block, *_, reserved_bytes, **__: (memory - reserved_bytes) // bytes_per_block,
    )


@pytest.mark.parametrize(("guess", "num_compilations"), [(0.5, 1), (1e-6, 2)], ids=["enough", "too little"])
def test_room_for_a_step_is_guessed_and_programs_compiled_again_only_if_it_was_too_little(
    monkeypatch, guess, num_compilations
):
    memory, compiled = 1 << 22, []
    give_memory(monkeypatch, memory, guess)
    warm_up = ModelRunner.warm_up
    monkeypatch.setattr(ModelRunner, "warm_up", lambda self, **_: compiled.append(self.num_blocks) or warm_up(self))
    runner = make_runner(**FEW_PROGRAMS, **SIZED_FROM_MEMORY, warm_up=True)
    assert len(compiled) == num_compilations
    assert runner.num_blocks == compiled[-1] == runner.cache.pool.shape[0]
    assert runner.num_blocks * runner.bytes_per_block + runner.programs.workspace_bytes() <= memory
    assert runner.execute(make_plan(chunks=(Chunk(0, [1], 0, 1, [1]),))).token_ids.tolist() == []


def test_a_guess_refuses_nobody(monkeypatch):
    """Where the pool beside it would be too small for a context, the programs are asked at once."""
    memory = 600_000
    give_memory(monkeypatch, memory, 0.95)
    runner = make_runner(**SIZED_FROM_MEMORY, max_model_len=64)
    assert runner.num_blocks > 64 // 8
    assert runner.num_blocks * runner.bytes_per_block + runner.programs.workspace_bytes() <= memory
    with pytest.raises(ValueError, match="no memory for a KV cache"):
        make_runner(**SIZED_FROM_MEMORY, max_model_len=128, max_num_batched_tokens=64)


def test_the_host_pool_is_no_larger_than_the_context_that_the_device_pool_holds():
    runner = make_runner(num_blocks=5, preemption="swap")
    assert runner.max_model_len == 32
    assert runner.num_host_blocks == 4 * 32 // 8


def test_a_fraction_of_memory_too_small_for_a_block_is_refused():
    with pytest.raises(ValueError, match="no memory for a KV cache: one block takes"):
        make_runner(num_blocks=None, memory_fraction=1e-9)


@pytest.mark.usefixtures("nothing_kept_by_jax")
def test_a_second_start_loads_its_programs_without_tracing_them(monkeypatch, tmp_path):
    kept = ProgramCache(tmp_path / "kept", jax.devices()[:1])
    monkeypatch.setattr("jpaged.device.step.programs.kept_programs", lambda programs: kept)
    first = make_runner(**FEW_PROGRAMS, warm_up=True, max_burst=2)
    monkeypatch.setattr(Programs, "lower", lambda self, key: pytest.fail(f"{key} was traced"))
    second = make_runner(**FEW_PROGRAMS, warm_up=True, max_burst=2)
    assert (first.programs.num_loaded, second.programs.num_loaded) == (0, len(first.programs))
    tokens = [greedy_tokens(runner, list(range(1, 12)), 6) for runner in (first, second)]
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize("max_burst", [1, 3])
def test_a_forward_pass_alone_draws_nothing(max_burst):
    runner = make_runner(max_burst=max_burst)
    chunks = (Chunk(0, [5], 0, 1, [1]),)
    for logprobs, draws in ((None, True), (1, False)):  # with log-probabilities, a sampler of its own draws
        params = SamplingParams(temperature=0, logprobs=logprobs)
        runner.execute(make_plan(chunks=chunks, samples=(Sample(0, 0, 1, 0, params, (), (), ()),)))
        assert np.asarray(runner._state.drawn)[:, 0].any() == draws


@pytest.mark.parametrize(
    ("settings", "is_same"),
    [
        ({"seed": 1}, True),
        ({"num_host_blocks": 2}, True),  # no program addresses the host pool by its size
        ({"max_burst": 2}, False),
        ({"num_blocks": 65}, False),
        ({"block_size": 16}, False),
        ({"max_num_seqs": 5}, False),
        ({"dtype": jnp.bfloat16}, False),
        ({"tensor_parallel_size": 2}, False),
    ],
    ids=str,
)
def test_programs_are_kept_apart_by_what_they_depend_on(tmp_path, settings, is_same):
    tmp_path.chmod(0o700)
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    try:
        runners = make_runner(), make_runner(**settings)
        assert [kept_programs(runner.programs) for runner in runners] == [None, None], "on a CPU"
        for runner in runners:
            runner.programs.target = TARGETS["gpu"]
        caches = [kept_programs(runner.programs) for runner in runners]
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
    assert None not in caches
    assert (caches[0]._directory == caches[1]._directory) == is_same
