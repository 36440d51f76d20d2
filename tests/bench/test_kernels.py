"""The kernel benchmarks at tiny sizes: their counts against brute force, and checks that find what is wrong."""

import json
import operator
import pickle
import re
import subprocess
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bench import UsageError, machine
from bench.__main__ import main
from bench.kernels import check, check_norms, check_writes, checking, command, compare, compiling, copies, timing, tune
from bench.kernels.case import Case, Verdict
from bench.kernels.compiling import Source, compile_each, one_line
from bench.kernels.contenders import Ours
from bench.kernels.inputs import make_queries
from bench.kernels.shapes import MEASURED, NOWHERE, UNSEEN, AttentionShape, choose
from bench.kernels.table import Rows
from bench.kernels.timing import Timing, time_program
from bench.machine import MachineLimits
from bench.peers import run_flashinfer
from pallas_kernels.block_pool.xla import read_kv
from pallas_kernels.dispatch import Kernel
from pallas_kernels.paged_attention import IMPLEMENTATIONS
from pallas_kernels.paged_attention.hopper.decode_memory import DecodeSizes
from pallas_kernels.paged_attention.hopper.prefill_plan import PrefillSizes
from pallas_kernels.paged_attention.hopper.tuning import Sizes

LIMITS = MachineLimits(read_bytes_per_s=1e9, matmul_flops_per_s=1e12, dtype="bfloat16")
RAGGED = AttentionShape(
    "ragged", (1, 0, 40, 1, 5), (33, 0, 40, 1, 70), 4, 2, 64, block_size=16, padding_tokens=3, dtype="bfloat16"
)
SHARED = AttentionShape("shared", (1, 1, 1), (20, 33, 17), 4, 2, 64, block_size=8, shared_blocks=2)


# Shapes


@pytest.mark.parametrize("shape", [RAGGED, SHARED, replace(SHARED, kv_dtype="int8")], ids=["ragged", "shared", "int8"])
def test_bytes_and_flops_are_those_of_a_count_by_hand(shape):
    slots = {
        (table[position // shape.block_size], position % shape.block_size)
        for table, kv_len in zip(shape.block_tables(), shape.kv_lens, strict=True)
        for position in range(kv_len)
    }
    item_bytes = 1 if shape.kv_dtype == "int8" else 2
    assert shape.kv_bytes == len(slots) * 2 * 2 * 64 * item_bytes
    pairs = sum(
        kv_position <= q_position
        for q_len, kv_len in zip(shape.q_lens, shape.kv_lens, strict=True)
        for q_position in range(kv_len - q_len, kv_len)
        for kv_position in range(kv_len)
    )
    assert shape.flops == pairs * 4 * (2 * 64 + 2 * 64)


def test_measured_shapes_are_those_of_the_tables():
    by_name = {shape.name: shape for shape in MEASURED}
    assert by_name["decode_b128_2k"].kv_bytes == 128 * 2048 * 4096
    assert by_name["decode_b128_2k_fp8"].kv_bytes == 128 * 2048 * 2048
    assert by_name["decode_mha40_b32_1k"].kv_bytes == 32 * 1024 * 2 * 40 * 128 * 2
    assert by_name["prefill_1x16384"].flops == 4 * 16384 * 16385 // 2 * 32 * 128
    ragged = by_name["decode_b128_ragged"].kv_lens
    assert (len(ragged), min(ragged) >= 16, max(ragged) <= 8192) == (128, True, True)
    prefixed = by_name["decode_b256_shared_prefix"]
    assert prefixed.shared_blocks == 21
    assert min(prefixed.kv_lens) > 341


@pytest.mark.parametrize(
    "shape", [RAGGED, SHARED, replace(RAGGED, sliding_window=7)], ids=["ragged", "shared", "window"]
)
def test_positions_tell_every_slot_that_a_query_sees_and_no_other(shape):
    tables = shape.block_tables()
    positions = shape.positions(tables)
    seen = set()
    window = shape.sliding_window or 10**6
    for table, q_len, kv_len in zip(tables, shape.q_lens, shape.kv_lens, strict=True):
        for q_position in range(kv_len - q_len, kv_len):
            for position in range(max(0, q_position - window + 1), q_position + 1):
                block, offset = table[position // shape.block_size], position % shape.block_size
                assert positions[block, offset] == position
                seen.add((int(block), offset))
    assert seen == set(zip(*map(np.ndarray.tolist, np.nonzero(positions != UNSEEN)), strict=True))
    assert not any(block == 0 for block, _ in seen)


def test_rows_have_blocks_of_their_own_behind_those_they_share():
    tables, counts = SHARED.block_tables(), SHARED.num_row_blocks
    assert (tables[:, :2] == tables[0, :2]).all()
    own = [block for table, count in zip(tables, counts, strict=True) for block in table[2:count]]
    assert len({*own, *tables[0, :2]}) == len(own) + 2
    assert all((table[count:] == NOWHERE).all() for table, count in zip(tables, counts, strict=True))


@pytest.mark.parametrize("shape", MEASURED, ids=lambda shape: shape.name)
def test_shrunk_shapes_stay_of_their_kind(shape):
    small = shape.shrunk(64)
    assert small.kind == shape.kind
    assert all(1 <= q_len <= kv_len for q_len, kv_len in zip(small.q_lens, small.kv_lens, strict=True))
    assert small.kv_bytes < shape.kv_bytes / 50


def test_shapes_are_chosen_by_parts_of_their_names():
    assert [shape.name for shape in choose("b16_8k,4x4096")] == ["decode_b16_8k", "prefill_4x4096"]
    with pytest.raises(UsageError, match="no name contains 'b7'"):
        choose("b16_8k,b7")


# Programs and their time


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "int8"])
def test_after_many_layers_queries_have_neither_died_nor_exploded(kv_dtype):
    shape = AttentionShape("prompt", (256,), (256,), 4, 2, 64, kv_dtype=kv_dtype)
    xla = Ours("xla", num_layers=2)
    q, rest, program = make_queries(shape), xla.make_rest(shape), jax.jit(xla.programs(shape)[""])
    for _ in range(20):
        q = program(q, rest)
    deviations = np.asarray(q, np.float32).reshape(8, -1).std(axis=1)  # of each eighth of the prompt
    assert (deviations > 0.4).all()
    assert (deviations < 3).all()  # a softmax frozen on one key gives up to sqrt(256 / 2)


def test_layers_have_keys_and_values_of_their_own():
    rest = Ours("xla", num_layers=2).make_rest(SHARED)
    first, second = (
        np.asarray(read_kv(rest.pool, layer, rest.block_tables[:1, :2])[0], np.float32) for layer in (0, 1)
    )
    assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 0.1


def test_time_is_that_of_a_run_without_what_waiting_costs(monkeypatch):
    now = 0.0

    def wait(_state):
        nonlocal now
        now += 0.5  # what waiting costs, however long the chain

    def program(state, step):
        nonlocal now
        now += 0.002
        return state + step

    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: now))
    monkeypatch.setattr(timing.jax, "block_until_ready", wait)
    measured, state = time_program(program, 0, (1,), num_samples=4)
    assert measured.median_s == pytest.approx(0.002)
    assert measured.slowest_s == pytest.approx(measured.fastest_s)
    assert measured.divided(4).median_s == pytest.approx(0.0005)
    assert state > 4


# Correctness


def programs_of(case: Case) -> tuple[dict, dict]:
    return tuple({name: jax.jit(source.function) for name, source in each.items()} for each in case[:2])


def examine(shape: AttentionShape, implementation: str) -> Verdict:
    case = check.case_of(shape, [implementation])
    programs, tools = programs_of(case)
    return case.examine(programs[implementation], tools)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dtype": "float32", "kv_dtype": "float32", "head_dim": 80},
        {"kv_dtype": "int8"},
        {"kv_dtype": "float8_e4m3fn", "sliding_window": 7},
        {"sliding_window": 9, "soft_cap": 2.0, "has_alibi": True, "has_sinks": True},
    ],
    ids=lambda options: "-".join(map(str, options)) or "plain",
)
def test_the_portable_implementation_passes(options):
    verdict = examine(replace(RAGGED, **options), "xla")
    assert verdict.problem is None
    assert 0 < verdict.error < check.TOLERANCE[options.get("dtype", "bfloat16")]


def attend_xla(call):
    return IMPLEMENTATIONS["xla"].run(call)


def scaled(call):
    return (attend_xla(call) * 1.03).astype(call.q.dtype)


def without_first_key(call):
    return attend_xla(replace(call, scoring=replace(call.scoring, sliding_window=69)))


def other_heads(call):
    return attend_xla(replace(call, q=call.q[:, ::-1]))[:, ::-1]


def beyond_the_end(call):
    return attend_xla(replace(call, batch=call.batch._replace(kv_lens=call.batch.kv_lens.at[0].add(1))))


def other_layer(call):
    return attend_xla(replace(call, kv=call.kv._replace(layer=0)))


def dirty_padding(call):
    return attend_xla(call).at[-1].set(1)


def put(monkeypatch, name, run):
    """Puts a function in the place of an implementation."""
    monkeypatch.setitem(IMPLEMENTATIONS, name, Kernel(name, run))


@pytest.mark.parametrize(
    ("implementation", "problem"),
    [
        (scaled, "error above 0.01"),
        (other_heads, "error above 0.01"),
        (without_first_key, "error above 0.01"),
        (beyond_the_end, "a slot was read that must not be"),
        (other_layer, "a slot was read that must not be"),
        (dirty_padding, "padding is not zero"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_what_is_wrong_is_found(implementation, problem, monkeypatch):
    put(monkeypatch, "wrong", implementation)
    assert problem in (examine(RAGGED, "wrong").problem or "")


def test_runs_that_differ_are_found():
    shape, turns = replace(RAGGED, padding_tokens=0), iter((0, 2**-9))
    case = check.case_of(shape, ["xla"])
    programs, tools = programs_of(case)
    verdict = case.examine(lambda q, inputs: programs["xla"](q, inputs) + jnp.asarray(next(turns), q.dtype), tools)
    assert verdict.problem == "two runs differ"


def test_a_mixed_up_scale_is_found(monkeypatch):
    def next_block(call):
        return attend_xla(replace(call, kv=call.kv._replace(kv_scales=jnp.roll(call.kv.kv_scales, 1, axis=3))))

    put(monkeypatch, "wrong", next_block)
    assert "error above" in (examine(replace(RAGGED, kv_dtype="int8"), "wrong").problem or "")


def test_coverage_names_are_distinct_and_cover_what_the_kernels_promise():
    cases = check.coverage()
    assert len({case.name for case in cases}) == len(cases)
    assert {case.head_dim for case in cases} == {64, 80, 96, 128, 192, 256}
    assert {case.block_size for case in cases} == {8, 16, 32, 64, 128}
    assert {case.group for case in cases} >= {1, 2, 4, 8, 32, 71}
    assert {case.kv_dtype for case in cases} == {"bfloat16", "float16", "float8_e4m3fn", "int8"}


# The command


@pytest.fixture
def run_kernels(monkeypatch, tmp_path, capsys):
    """Runs the command on tiny batches, every program once and said to take 4 ms: status, printed lines, report."""

    def run_once(program, state, args, num_samples):
        return Timing(4e-3, 2e-3, 6e-3, num_samples), program(state, *args)

    monkeypatch.setattr(machine, "measure_limits", lambda dtype: LIMITS)
    for module in (timing, copies):
        monkeypatch.setattr(module, "time_program", run_once)

    def run(*options: str) -> tuple[int, list[str], dict]:
        args = ["--shrink", "256", "--quick", "--commit", "abc", "--pool-gb", "0.02", "--out", str(tmp_path), *options]
        status = main(["kernels", *args])
        return status, capsys.readouterr().out.splitlines(), json.loads((tmp_path / "kernels_cpu.json").read_text())

    return run


def test_command_reports_every_shape_and_why_others_are_missing(run_kernels):
    status, lines, report = run_kernels("--shapes", "b16_8k", "--implementations", "xla,jax", "--no-copies")
    assert status == 0
    rows = {row["implementation"]: row for row in report["rows"]}
    assert rows["jax"]["skipped"] == "it needs a GPU"
    row, shape = rows["xla"], report["shapes"]["decode_b16_8k"]
    assert shape["kv_lens"] == {"sum": 64, "min": 32, "max": 32}
    assert (row["fastest_us"], row["us"], row["slowest_us"]) == (1000, 2000, 3000)  # of one of two layers
    assert row["bytes_per_s"] == pytest.approx(64 * 4096 / 2e-3)
    assert row["fraction_of_read_bandwidth"] == pytest.approx(64 * 4096 / 2e-3 / 1e9)
    assert row["fraction_of_matmul_rate"] == pytest.approx(64 * 4 * 32 * 128 / 2e-3 / 1e12)
    assert row["tokens_per_s"] == pytest.approx(2 / 2e-3)
    assert report["environment"]["commit"] == "abc"
    assert any(line.startswith("  xla") for line in lines)


def test_command_skips_what_says_it_cannot_and_fails_on_what_breaks(run_kernels, monkeypatch):
    def cannot(*args, **options):
        raise NotImplementedError("no kernel for a CPU")

    def breaks(*args, **options):
        raise RuntimeError("too much shared memory\nand more")

    put(monkeypatch, "hopper", cannot)
    status, _, report = run_kernels("--shapes", "b16_8k", "--implementations", "hopper", "--no-copies")
    assert (status, report["rows"][0]["skipped"]) == (0, "no kernel for a CPU")
    put(monkeypatch, "hopper", breaks)
    status, _, report = run_kernels("--shapes", "b16_8k", "--implementations", "hopper", "--no-copies")
    assert (status, report["rows"][0]["failed"]) == (1, "RuntimeError: too much shared memory")


def test_command_measures_writes_and_their_memory(run_kernels):
    status, _, report = run_kernels("--shapes", "b16_8k", "--implementations", "none")
    assert (status, report["rows"]) == (0, [])
    decodes, prompt, blocks = report["copies"]
    names = [copy["name"] for copy in report["copies"]]
    assert names == ["write_kv_8_decodes", "write_kv_8_of_a_prompt", "copy_blocks_4"]
    assert decodes["num_bytes"] == prompt["num_bytes"] == 2 * 8 * 4096
    assert decodes["us"] == pytest.approx(4000 / 8)  # of one of 8 layers
    assert decodes["temporary_bytes"] < decodes["pool_bytes"] / 20
    assert (blocks["num_bytes"], blocks["us"]) == (2 * 4 * 2**21, pytest.approx(4000))
    assert blocks["pool_bytes"] == 9 * 2**21


@pytest.fixture
def run_check(tmp_path, capsys):
    """Runs the check on tiny batches: status, printed lines, report."""

    def run(*options: str) -> tuple[int, list[str], dict]:
        status = main(["kernels", "--check", "--shrink", "256", "--out", str(tmp_path), *options])
        report = json.loads((tmp_path / "kernels_check_cpu.json").read_text())
        return status, capsys.readouterr().out.splitlines(), report

    return run


def test_check_command_prints_and_keeps_every_verdict_and_fails_if_one_is_wrong(run_check, monkeypatch):
    def cannot(*args, **options):
        raise NotImplementedError("no kernel for a CPU")

    options = "--shapes", "b16_8k", "--implementations", "xla,hopper"
    put(monkeypatch, "hopper", cannot)
    status, (right, absent, summary, _), report = run_check(*options)
    assert (status, report["is_complete"], report["num_checked"], report["num_wrong"]) == (0, True, 1, 0)
    assert right.split()[:2] == ["decode_b16_8k", "xla"]
    assert right.endswith("ok")
    assert absent.endswith("not taken: no kernel for a CPU")
    assert summary.startswith("1 checked, 0 wrong")
    first, second = report["verdicts"]
    assert (first["case"], first["implementation"], "problem" in first) == ("decode_b16_8k", "xla", False)
    assert second["not_taken"] == "no kernel for a CPU"
    put(monkeypatch, "hopper", scaled)
    status, lines, report = run_check(*options)
    assert (status, report["num_wrong"]) == (1, 1)
    assert "WRONG: error above 0.01" in lines[1]
    assert report["verdicts"][1]["problem"] == "error above 0.01"


def test_a_check_that_checks_nothing_fails(run_check, monkeypatch):
    def cannot(*args, **options):
        raise NotImplementedError("no kernel for a CPU")

    put(monkeypatch, "hopper", cannot)
    status, _, report = run_check("--shapes", "b16_8k", "--implementations", "hopper")
    assert (status, report["num_checked"], report["num_wrong"]) == (1, 0, 0)


def test_only_an_implementation_may_not_take_a_case():
    refusal = NotImplementedError("no kernel")
    case = SimpleNamespace(examine=lambda program, tools: None)
    assert checking._findings(case, refusal, {}) == {"not_taken": "no kernel"}
    assert checking._findings(case, print, {"right": refusal}) == {"problem": "NotImplementedError: no kernel"}


def test_check_refuses_an_implementation_that_is_none_of_ours():
    with pytest.raises(UsageError, match="--implementations hoper: --check takes"):
        list(checking._wanted(SimpleNamespace(implementations="hoper,xla")))


def test_a_check_that_is_cut_short_keeps_its_verdicts(run_check, monkeypatch, tmp_path):
    def kill(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(checking, "_findings", lambda case, *_: {} if case is not last else kill(case))
    cases = {name: check.case_of(replace(SHARED, name=name), ["xla"]) for name in ("one", "two")}
    last = cases["two"]
    monkeypatch.setattr(checking, "_wanted", lambda _: [(name, lambda _, c=c: c, []) for name, c in cases.items()])
    with pytest.raises(KeyboardInterrupt):
        run_check()
    report = json.loads((tmp_path / "kernels_check_cpu.json").read_text())
    assert not report["is_complete"]
    assert [verdict["case"] for verdict in report["verdicts"]] == ["one"]


def wanted(monkeypatch, *options: str) -> dict[str, list[str]]:
    """The implementations of each case that a GPU would check."""
    monkeypatch.setattr(checking, "why_no_hopper", lambda: None)
    defaults = {"shapes": None, "implementations": None, "quick": False, "no_copies": False, "shrink": 1}
    given = dict(zip(options[::2], options[1::2], strict=True))
    return {name: names for name, _, names in checking._wanted(SimpleNamespace(**defaults | given))}


def test_words_select_among_all_cases(monkeypatch):
    chosen = wanted(monkeypatch, "shapes", "b16_8k,write_kv_37,norm_gemma_1x,mixed_soft_cap")
    assert list(chosen) == ["decode_b16_8k", "mixed_soft_cap=2.0", "write_kv_37", "add_rms_norm_gemma_1x4096_bfloat16"]
    assert wanted(monkeypatch, "shapes", "b16_8k", "quick", True) == {}  # known, though left out
    with pytest.raises(UsageError, match="no name contains 'b7'"):
        wanted(monkeypatch, "shapes", "b7", "quick", True)


def test_one_implementation_asked_for_leaves_out_all_others(monkeypatch):
    assert {name for names in wanted(monkeypatch, "implementations", "hopper").values() for name in names} == {"hopper"}
    by_default = wanted(monkeypatch)
    assert "xla" in by_default["mixed_head_dim=64"]
    assert by_default["decode_b16_8k"] == ["hopper", "pallas_tpu"]
    assert "decode_b16_8k" in wanted(monkeypatch, "implementations", "xla")
    assert not by_default.keys() & set(checking.REPEATED)
    assert checking.REPEATED[0] in wanted(monkeypatch, "shapes", checking.REPEATED[0])


WRITES = check_writes.cases() | check_norms.cases()


@pytest.mark.parametrize(
    "name",
    [
        "copy_blocks_7",
        "write_kv_37",
        "write_kv_quantized_37_int8",
        "rope_write_37_4",
        "add_rms_norm_gemma_37x768_bfloat16",
    ],
)
def test_comparison_finds_one_wrong_element(name, monkeypatch):
    monkeypatch.setattr(check_writes, "NUM_BLOCKS", 24)
    case = WRITES[name](["hopper"])
    _, tools = programs_of(case)
    assert case.examine(tools["right"], tools) == Verdict(None, None)
    num_calls = iter(range(100))

    def spoiled(*args):
        results = tools["right"](*args)
        if next(num_calls) == compare.NUM_REPEATS - 1:
            part, place = ("pool", (3, 1, 1, 2, 5, 7)) if "pool" in results else ("norm", (36, 7))
            results |= {part: results[part].at[place].add(1)}
        return results

    problem = case.examine(spoiled, tools).problem
    assert problem is not None
    assert problem.startswith("1 of ")


@pytest.mark.parametrize(
    ("name", "kernel"),
    [
        ("rope_write_1_1", "rope_write"),
        ("rope_write_4_4", "rope_write"),
        *((f"add_rms_norm_{form}_1x4096_bfloat16", "add_rms_norm") for form in check_norms.FORMS),
    ],
)
def test_comparison_takes_the_kernel_for_right(name, kernel, monkeypatch):
    """One of four tokens is padding in some of the runs."""
    monkeypatch.setattr(check_writes, "NUM_BLOCKS", 24)
    monkeypatch.setattr(check_writes, "NUM_TOKENS", (1, 4))
    module = check_writes if kernel == "rope_write" else check_norms
    monkeypatch.setattr(module, kernel, partial(getattr(module, kernel), interpret=True))
    case = module.cases()[name](["hopper"])
    programs, tools = programs_of(case)
    assert case.examine(programs["hopper"], tools) == Verdict(None, None)


def test_a_kernel_that_writes_padding_is_found(monkeypatch):
    monkeypatch.setattr(check_writes, "NUM_BLOCKS", 24)
    case = WRITES["rope_write_37_1"](["hopper"])
    _, tools = programs_of(case)

    def with_padding(*args):
        results = tools["right"](*args)
        return results | {"first block": results["pool"][0]}

    assert "of the first block differ" in (case.examine(with_padding, tools).problem or "")


# Compiling


@pytest.mark.parametrize("num_processes", [0, 1])
def test_programs_come_in_order_and_failures_in_their_place(num_processes):
    case = check.case_of(RAGGED, ["hopper", "xla"])
    numbers = jax.ShapeDtypeStruct((4,), jnp.float32)
    sources = {"negative": Source(operator.neg, (numbers,)), "broken": Source(operator.index, (numbers,))}
    sources |= case.tools | case.implementations
    programs = dict(compile_each(sources, num_processes=num_processes))
    assert list(programs) == list(sources)
    assert programs["negative"](jnp.arange(4.0)).tolist() == [0, -1, -2, -3]
    assert "TypeError: Only integer" in one_line(programs["broken"])
    assert isinstance(programs["hopper"], NotImplementedError)
    assert "need an NVIDIA GPU, not cpu" in str(programs["hopper"])
    assert case.examine(programs["xla"], programs).problem is None


def test_a_process_without_a_gpu_hands_over_kernels_for_one(monkeypatch):
    """The kernels are those that the process with the GPU would trace."""
    h200 = compiling.Device("gpu", "NVIDIA H200", 132, "9.0")
    monkeypatch.setattr("pallas_kernels.chips.here.default_device", lambda: h200)
    case = check.case_of(RAGGED, ["hopper"])
    source = case.implementations["hopper"]
    exported = pickle.loads(pickle.dumps(compiling._export(source, "cuda")))

    def kernels(function):
        text = jax.jit(function).trace(*source.arguments).lower(lowering_platforms=("cuda",)).as_text()
        return re.findall(r'kernel_hash = "([^"]*)"', text)

    assert len(kernels(exported.call)) >= 2
    assert kernels(exported.call) == kernels(source.function)


# Table


@dataclass(frozen=True)
class Peer:
    name: str
    us: float
    is_paged: bool = True


def test_ratio_is_to_the_best_peer_that_pages():
    report = {"rows": [], "copies": [], "comparisons": {}}
    rows = Rows(report, LIMITS, lambda: Path())
    for peer in (Peer("jax", 300), Peer("flashinfer", 200), Peer("cudnn", 100, is_paged=False)):
        rows.add(SHARED, peer.name, Timing(peer.us / 1e6, 0, 1, 3), is_paged=peer.is_paged)
    rows.add(RAGGED, "jax", Timing(1e-6, 0, 1, 3))
    rows.add(SHARED, "hopper", Timing(160e-6, 0, 1, 3), is_ours=True)
    assert report["rows"][-1]["speed_over_best_peer"] == pytest.approx(1.25)
    assert report["rows"][0]["speed_over_best_peer"] is None


def test_mixed_batches_are_compared_with_their_parts():
    report = {"rows": [], "copies": [], "comparisons": {}}
    rows, by_name = Rows(report, LIMITS, lambda: Path()), {shape.name: shape for shape in MEASURED}
    times = {
        "mixed_128x2k_2x1024_at_4k": 330,
        "decode_b128_2k": 200,
        "prefill_2x1024_at_4k": 100,
        "decode_b128_2k_fp8": 110,
    }
    for name, us in times.items():
        rows.add(by_name[name], "hopper", Timing(us / 1e6, 0, 1, 3), is_ours=True)
    rows.add(by_name["decode_b128_2k"], "xla", Timing(1, 0, 1, 3), is_ours=True)
    rows.compare()
    assert report["comparisons"] == {
        "mixed over its decodes and chunks alone": {"hopper": pytest.approx(1.1)},
        "fp8 over bf16": {"hopper": pytest.approx(0.55)},
    }


# FlashInfer and kernel sizes


def test_pages_are_those_of_the_tables():
    tables = np.array([[5, 6, 7], [9, NOWHERE, NOWHERE], [2, 3, NOWHERE]], np.int32)
    arrays = run_flashinfer.page_arrays((1, 1, 4), (33, 16, 20), tables, 16)
    assert {name: array.tolist() for name, array in arrays.items()} == {
        "q_starts": [0, 1, 2, 6],
        "page_starts": [0, 3, 4, 6],
        "pages": [5, 6, 7, 9, 2, 3],
        "last_page_lens": [1, 16, 4],
        "kv_lens": [33, 16, 20],
    }


def test_without_flashinfer_the_peer_says_so_and_succeeds(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    assert run_flashinfer.main([]) == 0
    assert "flashinfer" in json.loads(capsys.readouterr().out)["unavailable"]


def test_flashinfer_rows_come_from_its_process(run_kernels, monkeypatch):
    result = {"shape": "decode_b16_8k", "configuration": "NHD, fa2", "us": 2.0, "fastest_us": 1.0, "slowest_us": 3.0}
    result |= {"num_samples": 3, "all_us": {"NHD, fa2": 2.0}, "failures": {}}
    printed = [json.dumps({"versions": {"flashinfer": "0.6.12"}}), "a log line", json.dumps(result)]

    def run(command, **options):
        return subprocess.CompletedProcess(command, 0, stdout="\n".join(printed))

    monkeypatch.setattr(command.subprocess, "run", run)
    _, _, report = run_kernels("--shapes", "b16_8k,4x4096", "--implementations", "flashinfer,xla", "--no-copies")
    rows = {(row["shape"], row["implementation"]): row for row in report["rows"]}
    assert report["environment"]["flashinfer"] == "0.6.12"
    assert rows["decode_b16_8k", "flashinfer"]["us"] == pytest.approx(2)
    assert rows["decode_b16_8k", "xla"]["speed_over_best_peer"] == pytest.approx(2 / 2000)
    assert "nothing of this shape" in rows["prefill_4x4096", "flashinfer"]["skipped"]


def test_tuner_keeps_the_best_of_each_class_that_runs_on_all_its_shapes(monkeypatch):
    broken, small, large = (Sizes(DecodeSizes(slots=slots), PrefillSizes()) for slots in (2, 3, 4))
    us = {("one", small): 4.0, ("one", large): 1.0, ("two", small): 4.0, ("two", large): 9.0}
    times = {shape.name: shape for shape in (replace(SHARED, name="one"), replace(SHARED, name="two"))}
    saved = {}

    def time_candidates(shape, candidates, programs, num_samples):
        assert programs.keys() >= {(shape.name, sizes) for sizes in candidates}
        return [
            np.inf if sizes == broken and shape.name == "two" else us.get((shape.name, sizes), 0.1)
            for sizes in candidates
        ]

    def save(device_kind, chosen):
        saved.update(chosen)
        return "a file"

    monkeypatch.setattr(tune, "candidates", lambda shape: [broken, small, large])
    monkeypatch.setattr(tune.tuning, "save", save)
    monkeypatch.setattr(tune, "_time_candidates", time_candidates)
    monkeypatch.setattr(tune, "compile_all", dict)
    report = tune.tune([*times.values(), RAGGED], num_samples=1)
    name = tune.class_of(SHARED)
    assert saved[name] == {"decode": large.decode}
    assert report[f"decode: {name}"]["geometric_mean_us"][str(small.decode)] == pytest.approx(4)


def test_candidates_of_other_outputs_do_not_count(monkeypatch):
    nan, first, close, off, in_one_head, crashing = (Sizes(DecodeSizes(slots=n), PrefillSizes()) for n in range(6))

    def program(change):
        def run(state, inputs):
            return state._replace(first=change(state.q))

        return run

    def crash(q):
        raise RuntimeError("too much shared memory")

    changes = {
        nan: lambda q: q * jnp.asarray(jnp.nan, q.dtype),
        first: lambda q: q,
        close: lambda q: q * jnp.asarray(1.008, q.dtype),
        off: lambda q: q * jnp.asarray(1.03, q.dtype),
        in_one_head: lambda q: q.at[1, 2].add(jnp.asarray(0.1, q.dtype)),
        crashing: crash,
    }
    programs: dict = {(SHARED.name, sizes): program(change) for sizes, change in changes.items()}
    not_compiled = Sizes(DecodeSizes(slots=6), PrefillSizes())
    programs[SHARED.name, not_compiled] = RuntimeError("it does not compile")
    monkeypatch.setattr(tune, "time_program", lambda program, state, args, num_samples: (Timing(1.0, 1.0, 1.0, 1), 0))
    times = tune._time_candidates(SHARED, [*changes, not_compiled], programs, num_samples=1)
    assert dict(zip([*changes, not_compiled], np.isfinite(times), strict=True)) == {
        nan: False,
        first: True,
        close: True,
        off: False,
        in_one_head: False,
        crashing: False,
        not_compiled: False,
    }


def test_candidates_fit_and_differ():
    for shape in MEASURED:
        tried = tune.candidates(shape)
        assert len(set(tried)) == len(tried) > 1
