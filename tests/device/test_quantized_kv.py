"""8-bit pools in the engine: scales stay with their blocks, wherever these go."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jpaged.contract.plan import BlockCopy
from jpaged.device.backends import Rows
from jpaged.device.kv.attend import PagedAttend
from jpaged.device.kv.layout import PoolLayout, kv_dtype
from jpaged.device.kv.pool import KVCache
from jpaged.device.runner import ModelRunner
from jpaged.device.target import BACKENDS
from jpaged.engine.loop import Engine
from jpaged.models.spec import LayerSpec
from jpaged.request import CompletionOutput, SamplingParams, derive_seed
from jpaged.sharding import make_mesh, pool_sharding
from pallas_kernels.chips import here
from tests.support import tiny

SETTINGS = ["int8", "fp8"]
BLOCK_SIZE = 4


def runner_over(kv_cache_dtype: str) -> ModelRunner:
    config = replace(tiny.ENGINE_SIZES, kv_cache_dtype=kv_cache_dtype, max_num_batched_tokens=32)
    return ModelRunner(nnx.clone(tiny.engine_model()), tiny.ENGINE_MODEL, config, make_mesh(1), use_tqdm=False)


@cache
def int8_runner() -> ModelRunner:
    return runner_over("int8")


def outputs_of(engine: Engine, requests: list[tuple[list[int], SamplingParams]]) -> list[list[CompletionOutput]]:
    """The completions of some requests, which run together."""
    for index, (prompt, params) in enumerate(requests):
        engine.add(engine.make_request(str(index), {"prompt_token_ids": prompt}, params))
    finished = []
    while engine.has_unfinished:
        finished += engine.step().finished
    return [output.outputs for output in sorted(finished, key=lambda output: int(output.request_id))]


def engine_with(runner: ModelRunner, **settings) -> Engine:
    return Engine(runner, replace(runner.config, **settings))


def drawn(**changed) -> SamplingParams:
    defaults = {"temperature": 1.0, "max_tokens": 9, "seed": 5, "ignore_eos": True, "logprobs": 0}
    return SamplingParams(**defaults | changed)


def prompt_of(length: int, step: int = 7) -> list[int]:
    return [4 + (step * i) % 19 for i in range(length)]


def assert_same(outputs: list[CompletionOutput], expected: list[CompletionOutput]) -> None:
    assert [output.token_ids for output in outputs] == [output.token_ids for output in expected]
    scores = [[output.cumulative_logprob for output in some] for some in (outputs, expected)]
    np.testing.assert_allclose(scores[0], scores[1], atol=1e-5)


def random_cache(dtype: jnp.dtype, num_devices: int = 1) -> KVCache:
    """Random bits in blocks and scales, different in every block."""
    mesh = make_mesh(num_devices)
    layout = PoolLayout(num_layers=2, num_kv_heads=2, head_dim=128, block_size=8, dtype=dtype)
    cache = layout.allocate(40, pool_sharding(mesh))
    rng = np.random.default_rng(0)
    pool = rng.integers(0, 256, cache.pool.shape, np.uint8).view(dtype)
    scales = rng.standard_normal(cache.kv_scales.shape).astype(np.float32)
    scales[3] = np.nan
    return KVCache(*jax.device_put((pool, scales), pool_sharding(mesh)))


def bits(cache: KVCache) -> tuple[np.ndarray, np.ndarray]:
    return np.asarray(cache.pool).view(np.uint8), np.asarray(cache.kv_scales).view(np.uint32)


@pytest.mark.parametrize("name", ["xla", "pallas_tpu"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_blocks_move_with_their_scales_bit_for_bit(setting, name):
    """Copied within the pool, or out of it and back."""
    num_devices = 2
    cache = random_cache(kv_dtype(setting, jnp.float32), num_devices)
    backend = BACKENDS[name]("", num_devices, interpret=name != "xla")
    src, dst = np.array([3, 9, 0], np.int32), np.array([20, 21, 0], np.int32)

    def moved(cache: KVCache) -> tuple[KVCache, KVCache]:
        blocks = backend.gather(cache, jnp.asarray(src))
        assert {block.dtype for block in blocks} == {jnp.dtype(jnp.uint8)}, "one array for each block"
        return backend.copy(cache, jnp.asarray(src), jnp.asarray(dst)), backend.scatter(cache, jnp.asarray(dst), blocks)

    with jax.sharding.use_abstract_mesh(make_mesh(num_devices).abstract_mesh):
        moves = jax.jit(moved)(cache)
    for after in moves:
        for array, before in zip(bits(after), bits(cache), strict=True):
            expected = before.copy()
            expected[dst] = before[src]
            np.testing.assert_array_equal(array[1:], expected[1:])


@pytest.mark.parametrize(("setting", "num_devices"), [("int8", 2), ("fp8", 1)])
def test_blocks_come_back_from_the_host_with_their_scales(setting, num_devices):
    settings = {"kv_cache_dtype": setting, "num_host_blocks": 4}
    runner = tiny.make_runner(tensor_parallel_size=num_devices, **settings)
    rng = np.random.default_rng(1)
    shapes = runner.cache.pool.shape, runner.cache.kv_scales.shape
    pool = rng.integers(0, 256, shapes[0], np.uint8).view(runner.cache.pool.dtype)
    content = pool, rng.standard_normal(shapes[1]).astype(np.float32)
    cache = KVCache(*jax.device_put(content, pool_sharding(runner.mesh)))
    before = bits(cache)
    out = runner.host_pool.start(cache, [BlockCopy(5, 0), BlockCopy(7, 3)], [])
    back = runner.host_pool.start(out, [], [BlockCopy(3, 11), BlockCopy(0, 12)])
    back = runner.host_pool.finish(back)
    for array, expected in zip(bits(back), before, strict=True):
        np.testing.assert_array_equal(array[[11, 12]], expected[[7, 5]])
        np.testing.assert_array_equal(array[1:11], expected[1:11])
    assert runner.host_pool.bytes_to_host == 2 * runner.bytes_per_block, "scales included"


@pytest.mark.usefixtures("no_growth")
def test_tokens_do_not_depend_on_swaps_hits_siblings_or_the_batch():
    runner = int8_runner()
    shared, other = prompt_of(13), prompt_of(9, step=5)
    alone = engine_with(runner, enable_prefix_caching=False)
    params = [drawn(seed=derive_seed(5, index)) for index in range(3)]
    expected = [outputs_of(alone, [(shared, each)])[0][0] for each in params]
    [[other_alone]] = outputs_of(alone, [(other, drawn(seed=9))])

    siblings, [beside] = outputs_of(engine_with(runner), [(shared, drawn(n=3)), (other, drawn(seed=9))])
    assert_same(siblings, expected)
    assert_same([beside], [other_alone])

    caching = engine_with(runner)
    for _ in range(2):
        assert_same(outputs_of(caching, [(shared, params[0])])[0], expected[:1])
    assert caching.blocks.stats().prefix_hit_tokens > 0

    long = [(prompt_of(5), replace(each, max_tokens=20)) for each in params]
    expected = [outputs_of(alone, [each])[0][0] for each in long]
    swapping = engine_with(runner, num_blocks=13, preemption="swap", enable_prefix_caching=False)
    assert_same([output[0] for output in outputs_of(swapping, long)], expected)
    assert swapping.stats().num_swaps_in > 0


@pytest.mark.parametrize("setting", SETTINGS)
def test_tokens_do_not_depend_on_how_prompts_are_cut(setting):
    """A block's tokens share a scale: a prompt that is cut inside a block would leave other numbers in the block."""
    runner = int8_runner() if setting == "int8" else runner_over(setting)
    requests = [(prompt_of(length, step), drawn(seed=step)) for length, step in ((31, 7), (22, 5), (6, 3), (29, 11))]
    expected = [outputs_of(engine_with(runner, max_num_batched_tokens=32), [request])[0] for request in requests]
    for budget in (7, 11, 17):
        engine = engine_with(runner, max_num_batched_tokens=budget, enable_prefix_caching=False)
        for outputs, alone in zip(outputs_of(engine, requests), expected, strict=True):
            assert_same(outputs, alone)


def forced_logprob(runner: ModelRunner, prompt: list[int], token_ids: list[int]) -> float:
    """Log-probability of a completion whose tokens are written one by one to blocks of its own."""
    backend, model = BACKENDS["xla"](""), tiny.engine_model()
    cache = runner.programs.new_cache()
    num_blocks = -(-(len(prompt) + len(token_ids)) // BLOCK_SIZE)
    table, total = np.arange(1, 1 + num_blocks, dtype=np.int32), 0.0

    @jax.jit
    def step(cache, token_ids, start):
        positions = start + jnp.arange(len(token_ids), dtype=jnp.int32)
        slots = jnp.asarray(table)[positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
        starts = jnp.array([0, len(token_ids)], jnp.int32)
        rows = Rows(slots, jnp.asarray(table)[None], (start + len(token_ids))[None], starts)
        attend = PagedAttend(cache, rows, backend)
        hidden = model(token_ids, positions, jnp.zeros_like(positions), attend)
        return attend.cache, jax.nn.log_softmax(model.logits(hidden[-1:]))[0]

    fed, start = prompt, 0
    for token_id in token_ids:
        cache, logprobs = step(cache, jnp.array(fed, jnp.int32), jnp.int32(start))
        start += len(fed)
        fed, total = [token_id], total + float(logprobs[token_id])
    return total


def test_beams_over_shared_blocks_score_as_if_each_had_blocks_of_its_own():
    runner, prompt = int8_runner(), prompt_of(14)
    search = SamplingParams(n=3, use_beam_search=True, temperature=0, max_tokens=7, ignore_eos=True)
    engine = engine_with(runner)
    [beams] = outputs_of(engine, [(prompt, search)])
    assert engine.stats().num_copies_on_write > 0
    for beam in beams:
        expected = forced_logprob(runner, prompt, beam.token_ids)
        assert beam.cumulative_logprob == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(("name", "setting"), [("pallas_tpu", "int8"), ("hopper", "fp8")])
def test_the_kernels_of_chips_read_and_write_quantised_pools(monkeypatch, name, setting):
    """A prompt, then a decode in its last block: outputs of an interpreted backend are those of XLA's."""
    monkeypatch.setattr(here, "num_sms", lambda: 1)
    dtype = jnp.bfloat16 if name == "hopper" else jnp.float32
    spec = LayerSpec(layer=0, num_kv_heads=1, head_dim=128, sm_scale=0.1)
    shape = PoolLayout(num_layers=1, num_kv_heads=1, head_dim=128, block_size=8, dtype=kv_dtype(setting, dtype))
    draw = np.random.default_rng(2).standard_normal((12, 4, 128)).astype(np.float32) * np.arange(1, 13)[:, None, None]
    tokens = jnp.asarray(draw, dtype)
    outputs = []
    for backend in (BACKENDS["xla"](""), BACKENDS[name]("", interpret=True)):

        @jax.jit
        def attend(cache, tokens, start, backend=backend):
            positions = start + jnp.arange(len(tokens), dtype=jnp.int32)
            starts = jnp.array([0, len(tokens)], jnp.int32)
            rows = Rows(16 + positions, jnp.array([[2, 3]], jnp.int32), (start + len(tokens))[None], starts)
            door = PagedAttend(cache, rows, backend)
            out = door(spec, tokens[:, :2], tokens[:, 2:3], tokens[:, 3:])
            return out, door.cache

        prompt, cache = attend(shape.allocate(5), tokens[:11], jnp.int32(0))
        decoded, cache = attend(cache, tokens[11:], jnp.int32(11))
        outputs.append([np.asarray(out, np.float32) for out in (prompt, decoded)])
    tolerance = 0.05 if dtype == jnp.bfloat16 else 1e-4
    for out, expected in zip(outputs[1], outputs[0], strict=True):
        np.testing.assert_allclose(out, expected, rtol=tolerance, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_pool_of_the_same_bytes_holds_twice_the_tokens(setting):
    whole, small = (PoolLayout(32, 8, 128, 16, kv_dtype(name, jnp.bfloat16)).block_bytes for name in ("auto", setting))
    assert 1.9 <= whole / small < 2
    runner = tiny.make_runner(kv_cache_dtype=setting)
    arrays = runner.cache.pool, runner.cache.kv_scales
    assert runner.bytes_per_block * runner.num_blocks == sum(array.nbytes for array in arrays)
    assert runner.cache.pool.dtype == kv_dtype(setting, jnp.float32)
