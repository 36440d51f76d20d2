"""The serving benchmark: profiles and figures against counts by hand, and the command on a tiny model."""

import json
import os
import subprocess
import time
from argparse import Namespace
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from bench import machine
from bench.__main__ import main
from bench.machine import MachineLimits
from bench.peers import SERVING
from bench.report import CONFIGS
from bench.serving import command, profiling, scenarios
from bench.serving import options as options_bench
from bench.serving.breakdown import Kernel, break_down, kernels_of, read_kernels, scopes_of
from bench.serving.clock import BREAKDOWN, PREPARATION, TIMED, Clock, TimeIsUp
from bench.serving.figures import ExpertBytes, Figures, Floor, experts_of
from bench.serving.profiling import time_decode
from bench.serving.runs import Bench, sampling
from bench.serving.scenarios import run_workload
from bench.serving.sizes import QUICK, WORKLOADS
from bench.serving.startup import StartUp, keep_sizes, start_cold
from bench.serving.stopwatch import HOST_PARTS, Stopwatch
from jpaged import LLM, EngineConfig
from jpaged.device.step.steps import SAMPLING_SCOPE
from jpaged.models import load_config, random_model
from jpaged.sharding import make_mesh
from tests.support.tiny import tiny_config

LIMITS = MachineLimits(read_bytes_per_s=1e9, matmul_flops_per_s=1e12, dtype="float32")
TINY = tiny_config(
    num_layers=1, vocab_size=64, head_dim=8, max_position_embeddings=256, dtype="float32", eos_token_ids=(3,)
)
SIZES = replace(
    QUICK,
    num_sharegpt=12,
    num_shared_prefix=6,
    num_system_prompt=3,
    num_parallel=3,
    length_divisor=16,
    prompt_len=32,
    num_decoded=4,
    num_prefill=2,
    num_beam_prompts=2,
    beam_len=4,
    num_pressure_blocks=6,
    num_timed_steps=2,
    num_traced_steps=2,
)


@pytest.fixture(scope="module")
def tiny_path(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(TINY.to_hf()))
    return path


# Breakdowns


@pytest.mark.parametrize(
    ("name", "program", "group"),
    [
        ("nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_NNT", "jit__forward", "gemm"),
        ("gemm_fusion_dot_general_130", "jit__forward", "gemm"),
        ("void cutlass::Kernel2<cutlass_80_tensorop>", "jit__forward", "gemm"),
        ("void cublasLt::splitKreduce_kernel<32, 16>", "jit__forward", "gemm"),
        ("gemm_fusion_dot_1", "jit__sample", "gemm"),
        ("paged_decode_mosaic_gpu_kernel", "jit__forward", "attention"),
        ("merge_decode_parts_mosaic_gpu_kernel", "jit__forward", "attention"),
        ("paged_prefill_mosaic_gpu_kernel", "jit__forward", "attention"),
        ("input_reduce_fusion_12", "jit__sample", "sampling"),
        ("input_reduce_fusion_12", "jit__beam", "sampling"),
        ("input_reduce_fusion_12", "jit__forward", "other"),
        ("MemcpyH2D", "", "other"),
    ],
)
def test_kernels_are_grouped_by_name_and_program(name, program, group):
    assert Kernel(name, 0, 1, program).group == group


def test_sampling_inside_of_a_larger_program_is_told_by_its_scope():
    @jax.jit
    def step(x):
        with jax.named_scope(SAMPLING_SCOPE):
            return jnp.sort(x * 2)

    scopes = scopes_of(step.lower(jnp.ones(1000)).compile().as_text())
    sorts = [key for key, scope in scopes.items() if scope.endswith("/sort")]
    assert sorts
    assert {Kernel(name, 0, 1, program, scopes[program, name]).group for program, name in sorts} == {"sampling"}
    assert {program for program, _ in sorts} == {"jit_step"}
    assert Kernel(sorts[0][1], 0, 1, "jit_step", "jit(step)/sort").group == "other"


def test_breakdown_sums_kernels_a_step_and_leaves_the_rest_as_gaps():
    one_step = [
        Kernel("gemm_fusion_dot", 0, 4000, "jit__forward"),
        Kernel("paged_decode", 5000, 3000, "jit__forward"),
        Kernel("MemcpyD2H", 7000, 2000),  # beside the kernel before it for 1 us
        Kernel("loop_add_fusion", 10_000, 1000, "jit__forward"),
        Kernel("loop_add_fusion", 12_000, 2000, "jit__sample"),
    ]
    kernels = one_step + [replace(kernel, start_ns=kernel.start_ns + 20_000) for kernel in one_step]
    step = break_down(kernels[::-1], 2, step_us=15.0, host_us={"schedule": 1.0})
    assert (step.gemm_us, step.attention_us, step.sampling_us, step.other_us) == pytest.approx((4, 3, 2, 3))
    assert step.gaps_us == pytest.approx(15 - 11)
    assert step.traced_step_us == pytest.approx(34 / 2)
    assert (step.num_launches, step.num_steps) == (5, 2)
    assert [(k.name, k.group, k.us, k.num_launches) for k in step.largest[:2]] == [
        ("gemm_fusion_dot", "gemm", pytest.approx(4), 1),
        ("paged_decode", "attention", pytest.approx(3), 1),
    ]
    fusions = {k.group: k.us for k in step.largest if k.name == "loop_add_fusion"}
    assert fusions == {"other": pytest.approx(1), "sampling": pytest.approx(2)}


def test_without_programs_sampling_is_unknown_rather_than_nothing():
    step = break_down([Kernel("loop_add_fusion", 0, 1000)], 1, step_us=2.0, host_us={})
    assert step.sampling_us is None
    assert step.other_us == pytest.approx(1)


def test_nothing_profiled_is_refused():
    with pytest.raises(ValueError, match="nothing of the device was profiled"):
        break_down([], 3, step_us=1.0, host_us={})


def event(name: str, start_ns: int, duration_ns: int, stats: dict) -> SimpleNamespace:
    return SimpleNamespace(name=name, start_ns=start_ns, duration_ns=duration_ns, stats=list(stats.items()))


def plane(name: str, **lines) -> SimpleNamespace:
    return SimpleNamespace(
        name=name,
        lines=[
            SimpleNamespace(name=line.replace("_", " "), events=[event(*values) for values in events])
            for line, events in lines.items()
        ],
    )


def test_kernels_are_those_on_the_streams_of_the_first_gpu():
    launch = ("nvjet", 10, 5, {"hlo_module": "jit__forward"})
    host = plane("/host:CPU", python=[("f", 0, 9, {"hlo_op": "f"})])
    gpu = plane("/device:GPU:0", Stream_7=[launch, ("MemcpyH2D", 1, 2, {})], XLA_Ops=[launch], Stream_9=[launch])
    other = plane("/device:GPU:1", Stream_7=[launch])
    forward = Kernel("nvjet", 10, 5, "jit__forward")
    assert list(kernels_of([host, other, gpu], {})) == [forward, Kernel("MemcpyH2D", 1, 2), forward]


@pytest.mark.filterwarnings("ignore:builtin type event_stats:DeprecationWarning")
def test_a_real_profile_tells_the_programs_apart(tmp_path):
    def _forward(x):
        return x @ x

    def _sample(x):
        return jnp.sort(x, -1)[:, 0]

    forward, sample = jax.jit(_forward), jax.jit(_sample)
    x = jnp.ones((64, 64))
    jax.block_until_ready(sample(forward(x)))
    with jax.profiler.trace(str(tmp_path)):
        jax.block_until_ready(sample(forward(x)))
    programs = {kernel.program: kernel.group for kernel in read_kernels(tmp_path)}
    assert programs["jit__sample"] == "sampling"
    assert programs["jit__forward"] != "sampling"
    with pytest.raises(FileNotFoundError):
        read_kernels(tmp_path / "nowhere")


# Figures


def make_floor(**changes: Any) -> Floor:
    values: dict[str, Any] = {
        "weight_bytes": 1000,
        "embedding_bytes": 100,
        "has_tied_logits": False,
        "weight_item_bytes": 2,
    }
    return Floor(LIMITS, **values | {"bytes_per_block": 64, "block_size": 4} | changes)


def test_floors_are_bytes_over_bandwidth_and_flops_over_rate():
    untied, tied = make_floor(), make_floor(has_tied_logits=True)
    assert untied.decode_s(batch=3, context=10) == pytest.approx((900 + 3 * 10 * 16) / 1e9)
    assert tied.decode_s(batch=3, context=10) == pytest.approx((1000 + 3 * 10 * 16) / 1e9)
    assert untied.compute_s(num_tokens=7) == pytest.approx(2 * 7 * 400 / 1e12)  # without both tables of 50 weights
    assert tied.compute_s(num_tokens=7) == pytest.approx(2 * 7 * 450 / 1e12)
    assert untied.run_s(num_steps=5, num_blocks=11, num_tokens=1) == pytest.approx((5 * 900 + 11 * 64) / 1e9)
    assert untied.run_s(num_steps=1, num_blocks=0, num_tokens=10**6) == pytest.approx(untied.compute_s(10**6))
    reads_and_products = untied.run_in_turn_s(num_steps=1, num_blocks=11, num_tokens=10**6)
    assert reads_and_products == pytest.approx(untied.compute_s(10**6) + 11 * 64 / 1e9)


def test_floor_counts_the_tokens_of_each_window():
    floor = make_floor(windows=(4, None, 40))
    assert floor.decode_s(batch=3, context=10) == pytest.approx((900 + 3 * (4 + 10 + 10) / 3 * 16) / 1e9)
    floor = make_floor(windows=(4, None, 40), layers_per_block=1)  # each in a block of its own
    assert floor.decode_s(batch=3, context=10) == pytest.approx((900 + 3 * (4 + 10 + 10) * 16) / 1e9)


def test_floor_counts_the_experts_that_tokens_choose():
    experts = ExpertBytes(num_bytes=640, num_experts=8, top_k=2)
    floor = make_floor(experts=experts)
    assert floor.decode_s(batch=1, context=0) == pytest.approx((900 - 640 + 160) / 1e9)
    assert experts.of_step(3) == pytest.approx(640 * (1 - 0.75**3))
    assert floor.decode_s(batch=1000, context=0) == pytest.approx(900 / 1e9)
    assert floor.compute_s(num_tokens=7) == pytest.approx(2 * 7 * (400 - 480 / 2) / 1e12)
    assert floor.run_s(num_steps=2, num_blocks=0, num_tokens=6) == pytest.approx(2 * (260 + experts.of_step(3)) / 1e9)


@pytest.mark.parametrize(
    ("shapes", "num_weights", "num_of_token"),  # of all layers, 3 matrices of 3 sizes an expert; biases of gpt-oss
    [
        ("qwen3-30b-a3b", 48 * 128 * 3 * 2048 * 768, 48 * 8 * 3 * 2048 * 768),
        ("mixtral-8x7b", 32 * 8 * 3 * 4096 * 14336, 32 * 2 * 3 * 4096 * 14336),
        ("gpt-oss-20b", 24 * 32 * (3 * 2880 * 2880 + 3 * 2880), 24 * 4 * (3 * 2880 * 2880 + 3 * 2880)),
    ],
)
def test_experts_of_a_models_shapes_are_counted(shapes, num_weights, num_of_token):
    experts = experts_of(load_config(CONFIGS / shapes), jnp.bfloat16)
    assert experts is not None
    assert experts.num_bytes == 2 * num_weights
    assert experts.of_step(1) == pytest.approx(2 * num_of_token)
    assert experts_of(load_config(CONFIGS / "llama3-8b"), jnp.bfloat16) is None


def test_ratios_and_fractions_are_above_one_where_we_are_better(capsys):
    saved = []
    report = {"figures": {}, "steps": {}}
    figures = Figures(
        report,
        {"slow": {"time": 9.0}, "peer": {"time": 6.0, "rate_of_peer": 50.0}},
        lambda: saved.append(len(report["figures"])),
    )
    figures.add("time", 4.0, lower_is_better=True, floor=3.0, floor_in_turn=3.6)
    figures.add("rate", 100.0, lower_is_better=False, floor=125.0, peer_name="rate_of_peer", num_steps=7)
    figures.add("alone", 1.0, lower_is_better=True)
    assert saved == [1, 2, 3]
    time_, rate, alone = report["figures"].values()
    assert (time_["ratio_to_peer"], time_["fraction_of_floor"]) == (pytest.approx(1.5), pytest.approx(0.75))
    assert time_["fraction_of_floor_in_turn"] == pytest.approx(0.9)
    assert (rate["ratio_to_peer"], rate["fraction_of_floor"]) == (pytest.approx(2), pytest.approx(0.8))
    assert (rate["peer"], rate["num_steps"]) == (50, 7)
    assert (alone["peer"], alone["ratio_to_peer"], alone["floor"], alone["fraction_of_floor"]) == (None,) * 4
    assert capsys.readouterr().out.splitlines()[0].split() == ["time", "4", "6", "1.5", "3", "75%", "3.6", "90%"]


def test_stopwatch_times_calls_and_leaves_no_trace():
    class Slow:
        def sleep(self, seconds: float) -> float:
            time.sleep(seconds)
            return seconds

    one, other, watch = Slow(), Slow(), Stopwatch()
    with watch.watch(one, "sleep", "one"), watch.watch(Slow, "sleep", "all"):
        assert one.sleep(0.01) == 0.01
        other.sleep(0.02)
    one.sleep(0)
    assert watch.calls == {"one": 1, "all": 1}
    assert watch.seconds["one"] >= 0.01
    assert watch.seconds["all"] >= 0.02
    assert vars(one) == {}


# The engine


@pytest.fixture(scope="module")
def bench() -> Bench:
    """Over a tiny model."""
    # The sizes of the command below: its programs are compiled once.
    config = EngineConfig(num_blocks=60, max_num_seqs=4, max_num_batched_tokens=32, max_model_len=192)
    model = random_model(TINY, jnp.dtype("float32"), make_mesh(1), 0)
    runner = LLM.from_model(model, TINY, config, warm_up=True).engine.runner
    figures = Figures({"figures": {}, "steps": {}}, {}, lambda: None)
    return Bench(runner, config, SIZES, figures, make_floor(), limit_s=3600.0)


def prompts_of(count: int, length: int) -> list[list[int]]:
    return [[5 + i] * length for i in range(count)]


def test_a_run_counts_its_work_and_the_hosts_time(bench):
    llm = bench.llm()
    run = bench.run(llm, prompts_of(3, 20), sampling(max_tokens=6))
    assert run.is_complete
    assert (run.num_requests, run.num_prompt_tokens, run.num_output_tokens) == (3, 60, 18)
    assert set(run.host_us_per_step) == {name for _, _, name in HOST_PARTS}
    assert all(us > 0 for us in run.host_us_per_step.values())
    assert sum(run.host_us_per_step.values()) * run.num_steps <= 1e6 * run.elapsed_s
    again = bench.run(llm, prompts_of(3, 20), sampling(max_tokens=6))
    assert again.num_cached_prompt_tokens == 3 * 16
    assert (again.num_programs_compiled, again.num_computed_tokens) == (0, 60 - 48 + 18)


def test_a_run_stops_at_the_deadline_with_what_it_has(bench, monkeypatch):
    llm = bench.llm()
    step, num_steps = llm.engine.step, 0

    def counted():
        nonlocal num_steps
        num_steps += 1
        return step()

    monkeypatch.setattr(llm.engine, "step", counted)
    monkeypatch.setattr("bench.serving.runs.time", SimpleNamespace(perf_counter=lambda: num_steps))
    bench.clock.deadline = 10
    run = bench.run(llm, prompts_of(2, 4), [sampling(max_tokens=n) for n in (3, 100)])
    assert (run.is_complete, run.num_requests, run.num_output_tokens) == (False, 1, 3 + 11)
    assert "STOPPED" in run.note()
    assert not llm.engine.has_unfinished
    assert llm.stats().num_used_blocks == 0
    bench.clock.deadline = 1000
    assert bench.run(llm, prompts_of(1, 4), sampling(max_tokens=5)).num_output_tokens == 5, "the engine still serves"


@pytest.mark.filterwarnings("ignore:builtin type event_stats:DeprecationWarning")
def test_decode_steps_are_profiled_and_forgotten(bench, tmp_path):
    llm = bench.llm()
    times = time_decode(llm, prompts_of(4, 16), 5, 3, tmp_path, clock := Clock())
    assert all(clock.seconds[part] > 0 for part in (PREPARATION, TIMED, BREAKDOWN))
    assert times.breakdown is not None
    assert times.breakdown.num_steps == 3
    assert times.step_us == times.breakdown.step_us > 0
    assert times.breakdown.sampling_us is not None
    assert times.host_us["enqueue"] > 0
    assert times.num_programs_compiled == 0
    assert not llm.engine.has_unfinished
    assert llm.stats().num_used_blocks == 0
    assert list(tmp_path.rglob("*.xplane.pb"))
    with pytest.raises(ValueError, match="the pool is too small"):
        time_decode(bench.llm(num_blocks=13), prompts_of(4, 60), 2, 2, tmp_path, Clock())


def test_decode_steps_are_timed_without_a_profile_and_until_a_deadline(bench):
    llm = bench.llm()
    assert time_decode(llm, prompts_of(4, 16), 5, 0, None, Clock()).breakdown is None
    with pytest.raises(TimeIsUp):
        time_decode(llm, prompts_of(4, 16), 5, 0, None, Clock(limit_s=0))
    with pytest.raises(ValueError, match="the requests ended before 300 steps: max_model_len=192 is too small"):
        time_decode(llm, prompts_of(4, 16), 300, 0, None, Clock())
    assert not llm.engine.has_unfinished
    assert llm.stats().num_used_blocks == 0


@pytest.mark.filterwarnings("ignore:builtin type event_stats:DeprecationWarning")
def test_decode_steps_that_were_timed_are_profiled_behind_the_deadline(bench, monkeypatch, tmp_path):
    is_over, kept = False, profiling._kept

    def over(directory):
        nonlocal is_over
        is_over = True
        return kept(directory)

    late = SimpleNamespace(perf_counter=lambda: time.perf_counter() + (1e9 if is_over else 0.0), sleep=time.sleep)
    monkeypatch.setattr(profiling, "time", late)
    monkeypatch.setattr(profiling, "_kept", over)
    times = time_decode(bench.llm(), prompts_of(4, 16), 2, 1, tmp_path, Clock(limit_s=1e6))
    assert times.breakdown is not None
    assert times.breakdown.num_steps == 1


def test_loading_runs_every_program_of_plain_steps(bench, monkeypatch):
    program = bench.runner.programs.get

    def programs_of(call) -> set[tuple]:
        used = set()
        monkeypatch.setattr(bench.runner.programs, "get", lambda key: used.add(key) or program(key))
        call()
        return used

    compiled = set(bench.runner.programs.all_keys())
    assert len(compiled) >= 8
    assert {key for key in compiled if key[0] != "copy"} <= programs_of(bench.load_programs)


def test_breakdowns_can_be_left_out_and_no_workload_begins_after_the_end(bench, monkeypatch):
    options = SimpleNamespace(decode_batches=[2], no_breakdown=True, profile=None)
    report = {"figures": {}, "steps": {}}
    monkeypatch.setattr(bench, "figures", Figures(report, {}, lambda: None))
    run_workload("decode", bench, options)
    run_workload("prefill32", bench, options)
    assert (list(report["figures"]), report["steps"]) == (["decode_2_ms", "prefill2_s"], {})
    assert [seconds["breakdown"] for seconds in report["seconds"].values()] == [0, 0]
    monkeypatch.setattr(bench, "end", 0.0)
    with pytest.raises(TimeIsUp):
        run_workload("decode", bench, options)


def fake_time(monkeypatch) -> SimpleNamespace:
    now = SimpleNamespace(s=0.0)
    monkeypatch.setattr("bench.serving.clock.time", SimpleNamespace(perf_counter=lambda: now.s))
    return now


def test_preparation_does_not_use_up_the_limit_of_a_workload(monkeypatch):
    now = fake_time(monkeypatch)
    clock = Clock(limit_s=60, end=500)
    with clock.part(PREPARATION):
        assert clock.deadline == 60
        now.s = 45
    with clock.part(TIMED):
        assert clock.deadline == 105
        now.s = 100
    with clock.part(PREPARATION):
        assert clock.deadline == 160
        now.s = 400
    assert clock.deadline == 405
    clock.extend()
    assert clock.deadline == 460
    with clock.part(PREPARATION):
        assert clock.deadline == 460
        now.s = 490
    assert clock.deadline == 500
    assert clock.summary() == {"preparation": 435, "timed": 55, "breakdown": 0, "total": 490}
    now.s = 500
    with pytest.raises(TimeIsUp):
        clock.extend()


@pytest.mark.parametrize(
    ("num_requests", "least_tokens", "rows"),
    [(300, 0, [1, 2, 4]), (3, 0, [1, 2, 4]), (2, 0, [1, 2]), (300, 30, [4]), (300, float("inf"), [])],
)
def test_programs_for_a_shared_prefix_are_those_that_the_requests_pass_through(
    bench, monkeypatch, capsys, num_requests, least_tokens, rows
):
    store, made = SimpleNamespace(programs={}), []
    store.make_all = lambda keys, kept, use_tqdm: made.extend(keys)
    buckets = bench.runner.buckets
    programs = SimpleNamespace(buckets=buckets, store=store, least_shared_tokens=least_tokens)
    monkeypatch.setattr(scenarios, "kept_programs", lambda _: None)
    fake = SimpleNamespace(runner=SimpleNamespace(programs=programs), config=bench.config)
    assert scenarios._make_shared(fake, 16, num_requests, "work") == len(rows)
    assert [(kind, size.num_rows, size.is_decode) for kind, size in made] == [("shared", n, True) for n in rows]
    assert bool(rows) == ("for " + ", ".join(map(str, rows)) + " rows" in capsys.readouterr().out)
    store.programs = dict.fromkeys(made)
    assert scenarios._make_shared(fake, 16, num_requests, "work") == len(rows)
    assert len(made) == len(rows), "none is made twice"


# The command


@pytest.fixture
def run_serving(monkeypatch, tmp_path, capsys):
    """Runs the command on the tiny model: status, printed lines, report."""
    monkeypatch.setattr(machine, "measure_limits", lambda dtype: LIMITS)
    monkeypatch.setattr(command, "QUICK", SIZES)

    def run(model: Path, *options: str) -> tuple[int, list[str], dict]:
        args = ["serving", "--random-weights", str(model), "--quick", "--commit", "abc", "--out", str(tmp_path)]
        args += ["--num-blocks", "60", "--max-num-seqs", "4", "--max-num-batched-tokens", "32"]
        status = main([*args, "--max-model-len", "192", "--host-memory-gib", "0.001", *options])
        report = json.loads((tmp_path / "serving_tiny_cpu_quick.json").read_text())
        return status, capsys.readouterr().out.splitlines(), report

    return run


@pytest.mark.usefixtures("no_growth")
@pytest.mark.starts_first
@pytest.mark.filterwarnings("ignore:builtin type event_stats:DeprecationWarning")
def test_command_measures_all_workloads(run_serving, tiny_path, tmp_path):
    status, lines, report = run_serving(tiny_path, "--decode-batches", "1", "4", "--profile", str(tmp_path / "traces"))
    assert (status, report["failed"], report["unfinished"]) == (0, {}, [])
    pressure = [
        f"sharegpt12_6blocks_{preemption}_{unit}"
        for preemption in command.PREEMPTIONS
        for unit in ("tokens_per_s", "kept_percent")
    ]
    assert list(report["figures"]) == [
        "startup_s", "sharegpt12_tokens_per_s", "decode_1_ms", "decode_4_ms", "prefill2_s",
        "sharedprefix21_6_requests_per_s", "sharedprefix256_3_requests_per_s", "parallel4_3_tokens_per_s",
        "beam4_2x4_tokens_per_s", *pressure,
    ]  # fmt: skip
    assert report["figures"]["sharegpt12_6blocks_swap_tokens_per_s"]["num_preemptions"] > 0
    assert report["figures"]["sharegpt12_tokens_per_s"]["num_programs_compiled"] == 0
    assert list(report["steps"]) == ["decode_1", "decode_4", "prefill"]
    assert (tmp_path / "traces" / "decode_4").is_dir()
    assert (report["is_quick"], report["sizes"]["num_sharegpt"], report["environment"]["commit"]) == (True, 12, "abc")
    assert list(report["seconds"]) == ["before the workloads", *WORKLOADS]
    for workload in WORKLOADS:
        seconds = report["seconds"][workload]
        assert seconds["preparation"] + seconds["timed"] + seconds["breakdown"] <= seconds["total"]
        assert seconds["timed"] > 0
        assert (seconds["breakdown"] > 0) == (workload in ("decode", "prefill32"))
    startup = report["startup"]
    parts = ("weights_s", "sizing_s", "compiling_s", "engine_s")
    assert all(startup[part] > 0 for part in parts)
    assert sum(startup[part] for part in parts) <= startup["total_s"] == report["figures"]["startup_s"]["value"]
    assert startup["num_programs"] == report["num_programs"] > 10
    header = next(i for i, line in reversed(list(enumerate(lines))) if line.split()[:3] == ["here", "peer", "ratio"])
    assert lines[header + 1].split()[0] == "startup_s"
    assert any(line.split()[:2] == ["us", "a"] and "gemm" in line for line in lines[header:])


def test_command_goes_on_after_failures_and_time_limits(run_serving, tiny_path, monkeypatch, capsys):
    def break_down(*args):
        raise RuntimeError("no profiler here")

    monkeypatch.setattr("bench.serving.scenarios.profile_prefill", break_down)
    monkeypatch.setattr("bench.serving.runs.Bench.load_programs", lambda bench: None)
    options = ("--workloads", "prefill32", "sharedprefix341_500", "--limit-s")
    status, lines, report = run_serving(tiny_path, *options, "3600")
    assert status == 1
    assert report["failed"] == {"prefill32": "RuntimeError: no profiler here"}
    assert list(report["figures"]) == ["startup_s", "prefill2_s", "sharedprefix21_6_requests_per_s"]
    status, lines, report = run_serving(tiny_path, *options, "0")
    assert (status, report["unfinished"]) == (0, ["prefill32", "sharedprefix341_500"])
    assert "prefill32: NOT FINISHED within 0 s" in lines


def test_cold_start_is_measured_by_a_process_that_leaves_its_cache(monkeypatch, tmp_path):
    times = StartUp(9, 1, 1, 1, 1, 1, 1, 0, 1, 12, 2)

    def run(args, **options):
        assert args[1:4] == ["-m", "bench", "serving"]
        assert args[4:] == ["--quick", "--startup-only", "--out", str(tmp_path), "--name", "cold"]
        (tmp_path / "cold.json").write_text(json.dumps({"startup": asdict(times)}))
        return subprocess.CompletedProcess(args, 0)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/elsewhere")
    args = SimpleNamespace(argv=["serving", "--quick", "--warm-start"])
    assert start_cold(args, tmp_path) == times  # pyright: ignore[reportArgumentType]
    assert os.environ["XDG_CACHE_HOME"] == str(tmp_path / "cache")
    assert "JAX_COMPILATION_CACHE_DIR" not in os.environ


def test_kept_sizes_are_the_decodes_that_batches_take_and_the_largest(bench):
    decodes = [bucket for bucket in bench.runner.buckets if bucket.is_decode]
    assert [bucket.num_rows for bucket in decodes] == [1, 2, 4]
    for batches, kept in (([1], [1]), ([2, 1], [1, 2]), ([3], [4]), ([9], [4])):
        runner = SimpleNamespace(buckets=list(bench.runner.buckets))
        keep_sizes(runner, batches)  # pyright: ignore[reportArgumentType]
        expected = [bucket for bucket in decodes if bucket.num_rows in kept]
        assert runner.buckets == [*expected, bench.runner.buckets[-1]]


def test_few_sizes_and_prompts_of_another_length_serve_two_workloads(run_serving, tiny_path, capsys):
    options = ("--few-sizes", "--prompt-len", "40", "--decode-batches", "1", "--no-breakdown")
    status, _, report = run_serving(tiny_path, *options, "--workloads", "decode", "prefill32")
    assert (status, report["failed"], report["sizes"]["prompt_len"]) == (0, {}, 40)
    assert list(report["figures"]) == ["startup_s", "decode_1_ms", "prefill2_s"]
    assert all(figure["num_programs_compiled"] == 0 for figure in list(report["figures"].values())[1:])
    with pytest.raises(SystemExit):
        run_serving(tiny_path, *options, "--workloads", "parallel4_200")
    assert "give --workloads decode prefill32, or one of them" in capsys.readouterr().err


def test_options_that_need_random_weights_say_so(capsys):
    for options in (["--warm-start"], ["--startup-only"]):
        with pytest.raises(SystemExit):
            main(["serving", *options])
        assert "need --random-weights" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["serving", "--random-weights", "llama3-8b", "--max-num-seqs", "8", "--decode-batches", "1", "9"])
    assert "--decode-batches" in capsys.readouterr().err


def test_a_preset_loads_and_its_peer_has_figures_under_our_names():
    peers = SERVING["vLLM 0.24.0"]["figures"]
    assert set(command.preset_names()) == set(peers)
    assert load_config(CONFIGS / "llama3-8b").vocab_size == 128256
    names = {name.rsplit("_", 2)[0] for name in peers["llama3-8b"]}
    assert {
        "sharegpt1000_tokens",
        "sharedprefix341_500_requests",
        "parallel4_200_tokens",
        "beam4_64x64_tokens",
    } <= names


def test_options_are_compared_with_plain_sampling(monkeypatch):
    chosen = {name: options_bench.OPTIONS[name] for name in ("min_tokens",)}
    monkeypatch.setattr(options_bench, "OPTIONS", chosen)
    model = random_model(TINY, jnp.dtype("float32"), make_mesh(1), 0)
    llm = LLM.from_model(model, TINY, EngineConfig(num_blocks=65, max_num_seqs=1, max_num_batched_tokens=8))
    args = Namespace(random_weights=None, model=None, quick=True, name=None, commit="none", argv=[])
    name, report = options_bench.measure_options(llm, args)
    assert name == "serving_options_demo_cpu_quick"
    rows = [*chosen, options_bench.MIXED, *(each + options_bench.ALONE for each in chosen)]
    assert list(report["options"]) == rows
    for each in report["options"].values():
        assert each["shares"] == [each["tokens_per_s"] / each["plain"]]
    assert report["num_programs_compiled"] == 0
