"""Blocks on the host that a step streams through its window: the same tokens as with all blocks on the device."""

import dataclasses
from fractions import Fraction
from functools import cache
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jpaged.config import EngineConfig
from jpaged.contract.plan import BlockCopy, Streamed
from jpaged.contract.rows import host_cell
from jpaged.device.backends.xla import XlaBackend
from jpaged.device.kv.copy_engine import PlainCopier, strided
from jpaged.device.kv.layout import PoolLayout, keeps_activations, layers_at_once
from jpaged.device.kv.pages import PageCapacity
from jpaged.device.kv.pool import KVCache
from jpaged.device.kv.sizing import check_way_to_stream
from jpaged.device.kv.stream import WIDENED_AT_ONCE, HostStream, Window, _runs
from jpaged.device.kv.streaming import most_pages, most_streamed_blocks, window_for
from jpaged.device.runner import ModelRunner
from jpaged.device.step.inputs import Bucket
from jpaged.device.step.programs import kept_programs
from jpaged.device.target import TARGETS, placement_note, why_no_streaming
from jpaged.models import OPTConfig
from jpaged.models.spec import attend_from
from jpaged.request import SamplingParams
from pallas_kernels.block_pool.quantization import dequantize_blocks, quantize_blocks
from tests.support.plans import Chunk, Sample, make_plan
from tests.support.tiny import TINY, keep_few_sizes, make_runner

GREEDY = SamplingParams(temperature=0)
BLOCK_SIZE = 8
MODEL = dataclasses.replace(TINY, num_layers=3)
MHA = dataclasses.replace(MODEL, num_heads=2, hidden_size=32)
OPT = OPTConfig(
    architecture="OPTForCausalLM",
    vocab_size=23,
    hidden_size=32,
    intermediate_size=32,
    num_layers=3,
    num_heads=2,
    num_kv_heads=2,
    head_dim=16,
    max_position_embeddings=128,
    word_embed_proj_dim=32,
)
PROMPTS = [list(np.random.default_rng(i).integers(1, 23, 40)) for i in range(3)]


def make_streaming(dtype=jnp.float32, model_config=MODEL, **settings) -> ModelRunner:
    """A runner whose pool is large, so that the same runner can show that nothing of the pool's size is allocated."""
    sizes = {"num_blocks": 8192, "num_host_blocks": 24, "kv_placement": "host", "max_num_batched_tokens": 64}
    runner = make_runner(dtype, model_config=model_config, has_own_programs=True, **sizes | settings)
    return keep_few_sizes(runner)


_made_once = cache(make_streaming)


def shared(dtype=jnp.float32, model_config=MODEL, **settings) -> ModelRunner:
    """The one runner of these settings, its pools empty: its programs are compiled once a process."""
    runner = _made_once(dtype, model_config, **settings)
    runner.forget_pool()
    return runner


@cache
def _made_by_twos(dtype, **settings) -> ModelRunner:
    with (
        mock.patch("jpaged.device.kv.layout.ROW_BYTES", 1 << 30),
        mock.patch("jpaged.device.kv.layout.MOST_AT_ONCE", Fraction(1, 2)),
    ):
        return make_streaming(dtype, **settings)


def shared_by_twos(dtype=jnp.float32, **settings) -> ModelRunner:
    """As ``shared``, but layers arrive by twos: the first two of three, and the last one alone."""
    runner = _made_by_twos(dtype, **settings)
    assert runner.programs.stream is not None
    assert runner.programs.stream.window.layers_at_once == 2
    runner.forget_pool()
    return runner


def shared_with_pages(
    dtype=jnp.float32, model_config=MHA, *, kv_cache_dtype="auto", pool_sizes=(32768, 512)
) -> ModelRunner:
    """The one runner of these settings whose pages hold activations of 16 tokens."""
    num_blocks, num_host_blocks = pool_sizes
    sizes = {"num_blocks": num_blocks, "num_host_blocks": num_host_blocks, "block_size": 16}
    return shared(dtype, model_config, kv_cache_dtype=kv_cache_dtype, offload_cache="activations", **sizes)


def check_that_nothing_of_the_pools_size_is_allocated(runner: ModelRunner) -> None:
    pool_bytes = sum(array.nbytes for array in jax.tree.leaves(runner.cache))
    for bucket in (Bucket(1, 1), Bucket(4, 4), Bucket(64, 4)):
        memory = runner.programs.get(("stream", bucket)).memory_analysis()
        assert memory is not None
        assert memory.temp_size_in_bytes < pool_bytes / 8
        assert memory.alias_size_in_bytes >= pool_bytes, "the donated pool is written in place"


def sample(chunk: int, position: int) -> Sample:
    return Sample(chunk, chunk, position, 0, GREEDY)


def run(runner: ModelRunner, chunks, streamed=None, to_host=()) -> tuple[list[int], np.ndarray]:
    plan = make_plan(
        chunks, [sample(i, chunk.stop) for i, chunk in enumerate(chunks)], streamed=streamed, to_host=to_host
    )
    result = runner.execute(plan)
    return result.token_ids.tolist(), result.scores.logprobs


@pytest.mark.parametrize(
    ("make", "dtype", "settings"),
    [
        (shared, jnp.bfloat16, {}),
        (shared_by_twos, jnp.float32, {"kv_cache_dtype": "int8"}),
        (shared, jnp.bfloat16, {"offload_dtype": "int8"}),
        (shared_by_twos, jnp.float32, {"offload_dtype": "int8"}),
    ],
)
def test_chunks_and_decodes_over_blocks_on_the_host_equal_those_over_blocks_on_the_device(
    make, dtype, settings, monkeypatch
):
    """Three rows in one step: all full blocks on the host, some of them, and none. Narrow blocks come in batches."""
    monkeypatch.setattr("jpaged.device.kv.stream.WIDENED_AT_ONCE", 3)
    num_on_host, rows = [5, 2, 0], range(3)
    first = 1 + 36  # the window ends before
    tables = [[first + 6 * row + i for i in range(6)] for row in rows]
    results = []
    for is_streaming in (False, True):
        runner = make(dtype, **settings)
        window = runner.num_window_blocks
        assert window < first
        run(runner, [Chunk(i, PROMPTS[i][:20], 0, 40, tables[i]) for i in rows])
        run(runner, [Chunk(i, PROMPTS[i][20:], 20, 40, tables[i]) for i in rows])
        left = jnp.array([b for row in rows for b in tables[row][: num_on_host[row]]])
        if "offload_dtype" in settings and not is_streaming:
            pool = runner.cache.pool
            runner.cache = KVCache(pool.at[left].set(dequantize_blocks(*quantize_blocks(pool[left]), dtype)))
        out = []
        for step in range(3):
            to_host, streamed, cells = (), None, [list(table) for table in tables]
            if is_streaming:
                slots = [[7, 6, 20, 21, 22], [1, 0], []]
                for row, n in enumerate(num_on_host):
                    cells[row][:n] = [host_cell(i) for i in range(n)]
                    if step == 0:
                        to_host += tuple(BlockCopy(b, s) for b, s in zip(tables[row], slots[row], strict=False))
                streamed = Streamed(np.array([*slots[0], *slots[1]], np.int32), np.array([0, 5, 7], np.int32))
            if is_streaming and step == 1:  # nothing but the window and the host is read: the blocks are gone
                runner.cache = jax.tree.map(lambda array, gone=left: array.at[gone].set(99), runner.cache)
            chunks = [Chunk(i, [5 + step], 40 + step, 40, cells[i]) for i in rows]
            if step == 2:  # a chunk of a prompt among decodes
                chunks[0] = Chunk(0, [5, 6, 7], 42, 45, cells[0])
            out.append(run(runner, chunks, streamed, to_host))
        results.append(out)
    for (resident_ids, resident), (streamed_ids, streamed) in zip(*results, strict=True):
        assert resident_ids == streamed_ids
        assert resident.tolist() == streamed.tolist(), "the same numbers in the same order: the same bits"


@pytest.mark.parametrize(
    ("model_config", "pages_at_once", "pool_sizes"),
    [(MHA, (512, 64), (32768, 512)), (OPT, (5, 2), (60, 4))],
    ids=["llama", "opt"],
)
def test_k_and_v_computed_from_activations_equal_those_that_are_kept(
    model_config, pages_at_once, pool_sizes, monkeypatch
):
    """Three rows in one step: pages on the host and on the device, on the device only, and on the host only."""
    monkeypatch.setattr("jpaged.device.kv.streaming.PAGES_AT_ONCE", pages_at_once)
    rows, first = range(3), pool_sizes[0] - 14
    tables = [[first + 4 * row + i for i in range(4)] for row in rows]
    kept = keep_few_sizes(make_runner(model_config=model_config, max_num_batched_tokens=64))
    pages = shared_with_pages(model_config=model_config, pool_sizes=pool_sizes)
    assert pages.programs.keeps_activations
    assert pages.num_window_blocks < first
    assert pages.max_streamed_blocks >= 3
    results = []
    blocks_of_two = [[1 + 2 * (page - first) + i for page in own for i in range(2)] for own in tables]
    for runner, blocks_of in ((kept, blocks_of_two), (pages, tables)):
        for start, stop in ((0, 21), (21, 32)):
            run(runner, [Chunk(i, PROMPTS[i][start:stop], start, 32, blocks_of[i]) for i in rows])
        out = []
        for step in range(3):
            cells, streamed, to_host = [list(table) for table in blocks_of], None, ()
            if runner is pages:
                cells[0][0], cells[2][:2] = host_cell(0), [host_cell(0), host_cell(1)]
                streamed = Streamed(np.array([3, 0, 2], np.int32), np.array([0, 0, 1], np.int32))
                if step == 0:
                    to_host = (BlockCopy(first, 3), BlockCopy(first + 8, 0), BlockCopy(first + 9, 2))
                if step == 1:  # nothing but the window and the host is read: the blocks are gone
                    gone = jnp.array([first, first + 8, first + 9])
                    runner.cache = dataclasses.replace(runner.cache, pool=runner.cache.pool.at[gone].set(jnp.nan))
            chunks = [Chunk(i, [5 + step], 32 + step, 32, cells[i]) for i in rows]
            if step == 2:  # a chunk of a prompt among decodes
                chunks[1] = Chunk(1, [5, 6, 7], 34, 37, cells[1])
            out.append(run(runner, chunks, streamed, to_host))
        results.append(out)
    for (kept_ids, kept_logprobs), (computed_ids, computed) in zip(*results, strict=True):
        assert kept_ids == computed_ids
        np.testing.assert_allclose(kept_logprobs, computed, atol=1e-5)


def test_steps_over_quantised_activations_are_those_over_exact_ones_but_for_rounding():
    """Pages on the host and on the device. Older numbers in the rest of a page are no part of a scale."""
    first, results = 32760, []
    tables = [[first + 4 * row + i for i in range(4)] for row in range(2)]
    exact, rounded = (shared_with_pages(kv_cache_dtype=kind) for kind in ("auto", "int8"))
    for runner, has_older_numbers in ((exact, False), (rounded, False), (rounded, True)):
        assert runner.programs.keeps_activations
        assert runner.num_window_blocks < first
        if has_older_numbers:
            older = {jnp.dtype(jnp.int8): 127, jnp.dtype(jnp.float32): jnp.nan}
            runner.cache = jax.tree.map(lambda array, older=older: array.at[:].set(older[array.dtype]), runner.cache)
        for start, stop in ((0, 16), (16, 37)):
            run(runner, [Chunk(i, PROMPTS[i][start:stop], start, 37, tables[i]) for i in range(2)])
        out = []
        for step in range(4):  # the third fills a page
            cells = [[host_cell(0), *tables[0][1:]], [host_cell(0), host_cell(1), *tables[1][2:]]]
            streamed = Streamed(np.array([3, 0, 2], np.int32), np.array([0, 1], np.int32))
            to_host = (BlockCopy(first, 3), BlockCopy(first + 4, 0), BlockCopy(first + 5, 2)) if step == 0 else ()
            chunks = [Chunk(i, [5 + step], 37 + step, 37, cells[i]) for i in range(2)]
            if step == 3:  # a chunk of a prompt beside a decode
                chunks[1] = Chunk(1, PROMPTS[2][:11], 40, 51, cells[1])
            out.append(run(runner, chunks, streamed, to_host)[1])
        results.append(np.array(out))
    assert not np.array_equal(*results[:2])
    np.testing.assert_allclose(*results[:2], atol=0.02)
    np.testing.assert_array_equal(*results[1:])


def test_a_context_that_both_pools_cannot_hold_is_refused_with_the_arithmetic():
    sizes: dict[str, Any] = {"num_blocks": 8, "num_host_blocks": 4}  # a window of 3 blocks holds 4 streamed ones
    assert make_streaming(**sizes, max_model_len=65).max_streamed_blocks >= 4
    with pytest.raises(ValueError, match=r"max_model_len=66 .* 4 of 8 blocks .* 4 of 4 on the host, .* hold 64 tokens"):
        make_streaming(**sizes, max_model_len=66)


def test_a_machine_whose_devices_compute_in_host_memory_says_in_one_line_that_placements_gain_nothing(caplog):
    make_streaming()
    [record] = caplog.records
    assert record.message == "kv_placement='host' gains nothing here: the device computes in host memory"
    config = EngineConfig(kv_placement="auto", weight_placement="host")
    note = "kv_placement='auto' and weight_placement='host' gain nothing here: the device computes in host memory"
    assert placement_note(config, TARGETS["cpu"]) == note
    assert placement_note(config, TARGETS["gpu"]) is None
    assert placement_note(EngineConfig(), TARGETS["cpu"]) is None


def test_a_layer_that_shows_no_source_takes_that_of_no_other(monkeypatch):
    def only_first(source, attend, spec, q, k, v, sinks):
        return attend_from(source, attend, spec, q, k, v, sinks) if spec.layer == 0 else attend(spec, q, k, v)

    monkeypatch.setattr("jpaged.models.families.llama.attend_from", only_first)
    runner = make_streaming(model_config=MHA)
    with pytest.raises(ValueError, match="layer 1 does not show the source of its K and V, which model_config"):
        run(runner, [Chunk(0, PROMPTS[0][:8], 0, 8, [60])])


def test_activations_are_kept_where_they_are_smaller():
    host: dict[str, Any] = {"kv_placement": "host", "num_host_blocks": 4}
    assert keeps_activations(MHA, EngineConfig(**host))
    assert keeps_activations(OPT, EngineConfig(**host))
    assert not keeps_activations(MODEL, EngineConfig(**host)), "grouped queries: K and V have fewer features"
    others: list[dict[str, Any]] = [{"offload_cache": "kv"}, {"kv_cache_dtype": "int8"}, {"block_size": 15}]
    others.append({"offload_dtype": "int8"})
    for other in [*others, {"kv_placement": "auto"}]:
        assert not keeps_activations(MHA, EngineConfig(**host | other))
    asked: dict[str, Any] = {"kv_cache_dtype": "int8", "offload_cache": "activations"}
    assert keeps_activations(MHA, EngineConfig(**host | asked)), "as asked for: K and V would be rounded twice"
    with pytest.raises(ValueError, match=r"hidden_size is 16 and its K have \[32\] features"):
        make_streaming(offload_cache="activations")
    with pytest.raises(ValueError, match="it needs an even block_size, max_burst=1"):
        make_streaming(model_config=MHA, offload_cache="activations", block_size=15, max_burst=2)


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (shared, {}),
        (shared_by_twos, {"kv_cache_dtype": "int8"}),
        (shared, {"offload_dtype": "int8", "num_host_blocks": 512}),
    ],
    ids=["kv", "int8", "narrow"],
)
def test_a_step_that_streams_allocates_nothing_of_the_pools_size(make, settings):
    check_that_nothing_of_the_pools_size_is_allocated(make(**settings))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("kv_cache_dtype", ["auto", "int8"])
def test_a_step_over_pages_allocates_nothing_of_the_pools_size(dtype, kv_cache_dtype):
    runner = shared_with_pages(dtype, kv_cache_dtype=kv_cache_dtype)
    assert runner.programs.keeps_activations
    check_that_nothing_of_the_pools_size_is_allocated(runner)


def test_a_step_that_fails_leaves_no_blocks_to_the_next():
    runner = shared()
    assert runner.host_pool is not None
    assert runner.programs.stream is not None
    runner.host_pool.stream(runner.programs.stream, np.array([1, 2], np.int32))
    runner.forget_pool()
    table = [40, 41]
    run(runner, [Chunk(0, PROMPTS[0][:8], 0, 8, table)])
    streamed = Streamed(np.array([3], np.int32), np.array([0], np.int32))
    cells = [host_cell(0), 41]
    token_ids, _ = run(runner, [Chunk(0, [5], 8, 8, cells)], streamed, to_host=(BlockCopy(40, 3),))
    other = shared()
    run(other, [Chunk(0, PROMPTS[0][:8], 0, 8, table)])
    assert token_ids == run(other, [Chunk(0, [5], 8, 8, table)])[0]


def test_no_copy_is_in_flight_once_the_stream_has_forgotten():
    """The program that failed waits for none of them, and its pool is deleted next."""
    copier = mock.Mock()
    copier.finish.side_effect = RuntimeError("the device is lost")
    HostStream(Window(2, 3), copier).forget()
    copier.finish.assert_called_once()


def test_a_window_takes_the_host_pool_or_a_part_of_the_devices_pool():
    assert window_for(100, 1000, 4, with_pages=False) == Window(50, 4)
    assert window_for(101, 1000, 4, with_pages=False) == Window(51, 4)
    assert window_for(10**6, 1000, 4, with_pages=False) == Window(499, 4)
    assert most_streamed_blocks(Window(50, 4)) == 100
    # Layers arrive together where the window then has room for as many blocks, and takes a quarter of the pool at most.
    by_twos = Window(100, 4, layers_at_once=2)
    assert window_for(100, 1000, 4, with_pages=False, layers_at_once=2) == by_twos
    assert most_streamed_blocks(by_twos) == 100
    assert window_for(200, 1000, 4, with_pages=False, layers_at_once=3) == Window(200, 4, layers_at_once=2)
    assert window_for(499, 1000, 4, with_pages=False, layers_at_once=3) == Window(250, 4)
    assert window_for(10**6, 1000, 4, with_pages=False, layers_at_once=3) == Window(499, 4)
    # Pages: two cells of K and V for every page, and two parts for those on the host.
    assert window_for(100, 1000, 40, with_pages=True) == Window(60, 40)
    assert window_for(10**6, 1000, 4, with_pages=True) == Window(749, 4)
    assert most_pages(Window(60, 40), 1000) == PageCapacity((60 * 40 - 2 * 940) // 4, 940)
    assert most_pages(Window(2, 4), 1000).num_streamed == 0
    assert most_pages(Window(60, 40, layers_at_once=3), 1000).num_streamed == (60 * 40 - 2 * 940) // 8


@pytest.mark.parametrize("share", [Fraction(132, 256), Fraction(132, 512), Fraction(2052, 4096)])
@pytest.mark.parametrize("num_layers", [1, 3, 32])
@given(num_host_blocks=st.integers(1, 5000), num_blocks=st.integers(4, 10**6), most=st.integers(1, 4))
def test_a_window_for_narrow_blocks_holds_them_as_they_arrive_and_widened(
    share, num_layers, num_host_blocks, num_blocks, most
):
    sizes = num_host_blocks, num_blocks, num_layers
    window = window_for(*sizes, with_pages=False, share=share, layers_at_once=most)
    assert 1 <= window.layers_at_once <= most
    share *= window.layers_at_once
    number, size, num_cells = window.batches
    assert number * (size + 2 * num_cells) <= window.num_cells <= num_layers * (num_blocks - 1) // 2
    assert size * share <= num_cells
    if window.num_blocks < (num_blocks - 1) // 2:
        assert number * size >= num_host_blocks
    elif window.num_cells > 10:
        assert number * size > 0.9 * (window.num_cells / (1 + 2 * share)) - 3
    assert size <= 3 * WIDENED_AT_ONCE


def test_layers_arrive_together_where_one_of_them_makes_short_rows():
    def at_once(num_kv_heads: int, dtype: str, num_layers: int = 32, **settings) -> int:
        layout = PoolLayout(num_layers, num_kv_heads, 128, 16, jnp.dtype(dtype))
        return layers_at_once(layout, EngineConfig(**settings), XlaBackend("as asked"))

    assert at_once(8, "bfloat16") == 1
    assert at_once(8, "int8") == 2, "rows as long as those of 16 bits"
    assert at_once(8, "int8", kv_placement="auto") == 1, "the larger window would take blocks from the device's pool"
    assert at_once(8, "bfloat16", offload_dtype="int8") == 2
    assert at_once(1, "int8", num_layers=8) == 1, "two of eight parts are in the window at once"
    assert at_once(1, "int8", num_layers=28) == 4


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"kv_cache_dtype": "fp8"}, "a CPU streams blocks of kv_cache_dtype 'auto', 'int8', not 'fp8'"),
        ({"tensor_parallel_size": 2}, "tensor_parallel_size=2: blocks are streamed from the host to one device"),
    ],
)
def test_what_cannot_stream_is_refused(settings, match):
    with pytest.raises(ValueError, match=match):
        make_streaming(**settings)


def test_a_tpu_streams_blocks_of_its_own_type(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert why_no_streaming(EngineConfig(kv_placement="host")) is None
    reason = why_no_streaming(EngineConfig(kv_placement="host", kv_cache_dtype="int8"))
    assert reason == "a TPU streams blocks of kv_cache_dtype 'auto', not 'int8'"


def test_a_tpu_streams_with_no_other_backend_than_its_own():
    config, target = EngineConfig(kv_placement="host"), TARGETS["tpu"]
    with pytest.raises(ValueError, match="so the backend pallas_tpu streams, but xla does not; use kv_placement="):
        check_way_to_stream(MODEL, config, jnp.bfloat16, target, XlaBackend("as asked"), 24)


def test_a_gpu_streams_nothing_without_its_driver(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr("jpaged.device.target.why_no_pinned_memory", lambda: "there is no driver")
    assert why_no_streaming(EngineConfig(kv_placement="host")) == "there is no driver"


def test_programs_for_blocks_of_activations_are_not_those_for_blocks_of_k_and_v(tmp_path):
    tmp_path.chmod(0o700)
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    try:
        settings: dict[str, Any] = {"model_config": MHA, "max_burst": 1, "block_size": 16}
        runners = [make_streaming(offload_cache=kind, **settings) for kind in ("kv", "activations")]
        for runner in runners:
            runner.programs.target = TARGETS["gpu"]
        caches = [kept_programs(runner.programs) for runner in runners]
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
    kept, computed = [cache._directory for cache in caches if cache is not None]
    assert kept != computed


def test_without_a_placement_on_the_host_there_is_no_window():
    runner = make_runner(num_host_blocks=8)
    assert runner.num_window_blocks == runner.max_streamed_blocks == 0


def test_runs_end_where_slots_are_not_neighbours_and_where_a_piece_or_a_batch_ends():
    slots = np.array([5, 6, 7, 8, 9, 3, 4, 12, 11], np.int32)

    def runs_of(slots: np.ndarray, batch: int) -> list[tuple[int, int]]:
        firsts, lengths = _runs(slots, 8, batch)
        return list(zip(firsts.tolist(), lengths.tolist(), strict=True))

    assert runs_of(slots, 9) == [(5, 3), (8, 2), (3, 2), (12, 1), (11, 1)]
    assert runs_of(slots, 2) == [(5, 2), (7, 1), (8, 1), (9, 1), (3, 1), (4, 1), (12, 1), (11, 1)]
    assert runs_of(slots[:0], 9) == []


def test_a_plain_copy_moves_strided_rows():
    src, dst = np.arange(24, dtype=np.uint8).reshape(4, 6), np.zeros((3, 3), np.uint8)
    PlainCopier().start(None, 0, strided(src.ctypes.data + 1, 6, dst.ctypes.data, 3, 2, 3))
    assert dst[:, :2].tolist() == src[:3, 1:3].tolist()
    assert dst[:, 2].tolist() == [0] * 3
