"""The benchmark of KV in host memory, on a tiny model: structure and counts, never times."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench.__main__ import main
from bench.offload import restore, scenarios
from bench.offload.busy import NUM_TRACED, shares_of
from bench.offload.generation import Work
from bench.offload.predictions import predict_steps
from bench.offload.restore import first_differences
from bench.offload.shapes import Shapes
from bench.peers import KV_ON_HOST, run_offloaded_cache
from bench.report import CONFIGS
from bench.serving.breakdown import Kernel
from jpaged.contract.profile import Link, MachineProfile
from jpaged.device.step import programs
from jpaged.device.step.inputs import Bucket, all_buckets
from jpaged.models import load_config
from tests.support.tiny import tiny_config

TINY = tiny_config(num_layers=1, vocab_size=64, dtype="float32", eos_token_ids=(3,), max_position_embeddings=64)


@pytest.fixture(scope="module")
def tiny_path(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(TINY.to_hf()))
    return path


@pytest.fixture
def run_offload(tiny_path, tmp_path, capsys, monkeypatch):
    """Runs the command on the tiny model, with two sizes of steps: printed lines, report."""

    def few_buckets(*sizes) -> list[Bucket]:
        buckets = all_buckets(*sizes)
        return [[bucket for bucket in buckets if bucket.is_decode][-1], buckets[-1]]

    monkeypatch.setattr(programs, "all_buckets", few_buckets)

    def run(scenario: str, *options: str) -> tuple[list[str], dict]:
        args = ["offload", scenario, "--random-weights", str(tiny_path), "--out", str(tmp_path), "--commit", "abc"]
        assert main([*args, "--name", "result", *options]) == 0
        report = json.loads((tmp_path / "result.json").read_text())
        assert report["environment"]["commit"] == "abc"
        return capsys.readouterr().out.splitlines(), report

    return run


def test_restores_come_back_each_way_with_the_same_tokens(run_offload):
    options = ("--lengths", "60", "--decodes", "0", "2", "--repeats", "1", "--max-num-batched-tokens", "32")
    lines, report = run_offload("restore", *options)
    rows = report["restores"]
    assert [(row["num_tokens"], row["num_decodes"]) for row in rows] == [(60, 0), (60, 2)]
    for row in rows:
        assert list(row["ways"]) == ["swap", "recompute", "both", "auto"]
        assert row["are_tokens_equal"]
        assert row["first_differences"] == {}
        assert row["num_tokens_compared"] > 4
        swap, recompute, both = (row["ways"][way]["rounds"][-1] for way in ("swap", "recompute", "both"))
        assert (swap["num_swaps_in"], recompute["num_swaps_in"], both["num_swaps_in"]) == (1, 0, 1)
        assert swap["num_recomputed_tokens"] == recompute["bytes_from_host"] == 0
        assert swap["bytes_from_host"] >= both["bytes_from_host"] > 0
        assert row["ways"]["swap"]["profile"] is None
        assert row["gain_of_both"] > 0
    assert report["settings"]["max_model_len"] > 64, "positions are raised"
    assert sum(line.startswith("60 beside") for line in lines) == 2


@pytest.mark.filterwarnings("ignore:builtin type event_stats:DeprecationWarning")
def test_decodes_are_measured_by_both_placements_with_the_same_tokens(run_offload, tmp_path):
    options = (
        "--num-seqs",
        "3",
        "--contexts",
        "140",
        "--num-steps",
        "6",
        "--repeats",
        "2",
        "--num-blocks",
        "160",
        "--busy",
    )
    lines, report = run_offload("decode", *options, "--max-num-batched-tokens", "32")
    host, device = report["variants"]
    assert (host["variant"], device["variant"]) == ("host", "device")
    assert host["rates"]["pool_bytes_per_s"] > 0
    assert device["rates"] is None
    for variant in (host, device):
        assert [run["work"]["num_seqs"] for run in variant["runs"]] == [3]
        for run in variant["runs"]:
            best, work = run["best"], run["work"]
            assert run["are_tokens_equal"]
            assert best["num_steps"] >= 6
            # The middle of the steps lies in the tenth or the eleventh block.
            assert best["kv_bytes"] / variant["bytes_per_block"] / work["num_seqs"] in (9, 10)
            assert len(run["step_ms"]) == 2
            assert 0 < run["busy"]["computing"] <= 1
            assert run["busy"]["copying"] == 0, "a CPU has no copies of its own"
    [on_host], [on_device] = host["runs"], device["runs"]
    assert on_host["best"]["share_of_copies"] > 0
    assert on_host["best"]["bytes_from_host"] == pytest.approx(on_host["best"]["kv_bytes"], rel=0.5)
    assert on_device["best"]["bytes_from_host"] == 0
    assert on_host["predicted"]["kv_ms"] >= on_host["predicted"]["planned_ms"] > 0
    assert on_device["predicted"] is None
    assert (tmp_path / "offload" / "result.png").exists()
    assert sum(line.startswith("host: 3 x 140") for line in lines) == 1


def test_activations_bring_half_of_the_bytes_of_k_and_v(run_offload, tmp_path):
    config = tiny_config(num_layers=2, hidden_size=64, num_kv_heads=4, vocab_size=64, dtype="float32")
    (tmp_path / "config.json").write_text(json.dumps(config.to_hf()))
    options = ("--num-seqs", "2", "--contexts", "40", "--num-steps", "6", "--repeats", "1", "--num-blocks", "64")
    placements = ("--random-weights", str(tmp_path), "--placements", "activations", "kv")
    _, report = run_offload("decode", *options, *placements, "--max-num-batched-tokens", "32")
    activations, kv = (variant["runs"][0] for variant in report["variants"])
    assert activations["are_tokens_equal"]
    assert kv["are_tokens_equal"]
    assert activations["best"]["kv_bytes"] == kv["best"]["kv_bytes"]
    assert activations["best"]["bytes_from_host"] == pytest.approx(kv["best"]["bytes_from_host"] / 2)


def test_shares_of_time_count_what_runs_together_once():
    events = [("MemcpyH2D", 0, 60), ("gemm", 10, 30), ("paged_decode", 20, 40), ("MemcpyH2D", 70, 30)]
    busy = shares_of([Kernel(name, 1e6 * start, 1e6 * duration) for name, start, duration in events])
    assert (busy.computing, busy.copying) == pytest.approx((0.5, 0.9))
    assert busy.step_ms == pytest.approx(100 / NUM_TRACED)
    with pytest.raises(RuntimeError, match="no event"):
        shares_of([])


@pytest.mark.parametrize(("num_kv_heads", "saves"), [(4, True), (1, False)])
def test_predictions_are_those_of_the_planner(num_kv_heads, saves):
    config = tiny_config(hidden_size=64, num_kv_heads=num_kv_heads)
    shapes, link = Shapes("tiny", config, Path("tiny"), is_trained=False), Link(0.0, 1e9, 1e9)
    profile = MachineProfile(1, link, link, ((1024, 1e14),), 0.0, 0.0, 0.0, layer_fixed_s=1e-9, layer_token_s=1e-12)
    kv_bytes = shapes.kv_block_bytes("auto")
    predicted = predict_steps(profile, shapes, kv_bytes, 4, [100, 50])
    assert predicted["kv_ms"] == pytest.approx(1e3 * 150 * kv_bytes / 1e9)
    half = predicted["kv_ms"] * 64 / (2 * num_kv_heads * 16)
    assert predicted["activations_ms"] == pytest.approx(half, rel=0.1), "hidden_size elements for those of K and V"
    assert (predicted["planned_share"] > 0.9, predicted["paper_share"] > 0.5) == (saves, saves)
    assert predicted["planned_ms"] <= min(predicted["kv_ms"], predicted["activations_ms"], predicted["paper_ms"])


def test_a_long_sequence_is_measured_over_a_part_of_its_blocks_and_over_all(run_offload, monkeypatch):
    monkeypatch.setattr("bench.offload.generation.SHORT_LEN", 16)  # the first run streams nothing
    options = ("--length", "200", "--num-steps", "6", "--repeats", "1", "--max-num-batched-tokens", "32")
    _, report = run_offload("long", *options, "--pool-gib", "0.00018", "--num-layers", "4")
    part, whole = report["variants"]
    assert part["settings"]["num_blocks"] == 11 < 200 / 16 < whole["settings"]["num_blocks"]
    assert part["runs"][0]["best"]["bytes_from_host"] > 0
    assert part["runs"][0]["best"]["num_programs_compiled"] == 0, "the prompt waits for none"
    assert (part["settings"]["kv_placement"], whole["settings"]["kv_placement"]) == ("auto", "device")
    assert whole["runs"][0]["are_tokens_equal"]


def test_a_variant_that_does_not_fit_is_recorded_with_the_reason(run_offload):
    options = ("--num-seqs", "2", "--contexts", "40", "--num-steps", "6", "--placements", "device", "--num-blocks", "2")
    lines, report = run_offload("decode", *options, "--max-num-batched-tokens", "32", "--repeats", "1")
    [run] = report["variants"][0]["runs"]
    assert "the request can never fit" in run["refused"]
    assert any(line.startswith("device: 2 x 40 + 17: refused") for line in lines)


@pytest.mark.parametrize(
    ("scenario", "placement"), [("latency", "device"), ("sweep", "device"), ("throughput", "host")]
)
def test_batches_of_the_paper_shrink_to_the_host_memory(run_offload, monkeypatch, scenario, placement):
    ran = []
    monkeypatch.setattr(scenarios, "run_variants", lambda *args, keep, **options: ran.append(args) or keep([]))
    options = ("--divisor", "8", "--host-memory-gib", "0.001")
    lines, report = run_offload(scenario, *options)
    assert "second-hand" in report["paper"]
    assert "second-hand" in lines[0]
    [(shapes, config, variants, works, _)] = ran
    assert [variant.name for variant in variants] == ["host", "device"]
    assert config.weight_placement == placement
    block_bytes = shapes.kv_block_bytes("auto")
    assert 0.0005 * 2**30 < max(work.num_blocks for work in works) * block_bytes <= 0.001 * 2**30
    assert all(work.num_blocks <= config.num_host_blocks for work in works)
    assert len(set(works)) == len(works)
    with pytest.raises(SystemExit):
        run_offload(scenario, "--host-memory-gib", "0.000001")


def test_a_batch_of_your_own_takes_the_place_of_the_papers(run_offload, monkeypatch, capsys):
    ran = []
    monkeypatch.setattr(scenarios, "run_variants", lambda *args, keep, **options: ran.append(args) or keep([]))
    run_offload("throughput", "--num-seqs", "3", "--contexts", "40", "--num-steps", "5", "--placements", "kv")
    [(_, _, variants, works, _)] = ran
    assert (works, [variant.name for variant in variants]) == ([Work(3, 40, 5)], ["kv"])
    with pytest.raises(SystemExit):
        main(["offload", "throughput", "--num-seqs", "3"])
    assert "needs --num-seqs and --contexts" in capsys.readouterr().err


def test_a_long_sequence_has_two_placements(capsys):
    with pytest.raises(SystemExit):
        main(["offload", "long", "--placements", "kv"])
    assert "long takes --placements host device, got kv" in capsys.readouterr().err


def test_a_peer_that_is_not_installed_says_so(run_offload, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert run_offloaded_cache.main(["--config", "anywhere"]) == 0
    printed = json.dumps({"unavailable": "No module named 'torch'"}) + "\nother output\n"

    def run(command, **options):
        assert command[1:4] == ["-m", "bench.peers.run_offloaded_cache", "--config"]
        assert command[-4:] == ["--num-seqs", "2", "--prompt-len", "40"]
        return subprocess.CompletedProcess(command, 0, printed)

    monkeypatch.setattr(subprocess, "run", run)
    _, report = run_offload("peer", "--num-seqs", "2", "--contexts", "40")
    assert report["peer"] == [{"unavailable": "No module named 'torch'"}]


def test_a_peer_has_figures_of_the_shapes_that_it_was_measured_on():
    for peer in KV_ON_HOST.values():
        for name, figures in peer["figures"].items():
            config = load_config(CONFIGS / name)
            kv_bytes = 32 * 1024 * config.num_layers * 2 * config.num_kv_heads * config.head_dim * 2
            assert kv_bytes / figures["step_ms"] / 1e6 == pytest.approx(figures["link_gb_per_s"], rel=0.02)


def test_fewer_layers_are_for_random_weights(capsys, run_offload):
    with pytest.raises(SystemExit):
        main(["offload", "restore", "--num-layers", "1"])
    assert "--num-layers needs --random-weights" in capsys.readouterr().err
    options = ("--num-layers", "2", "--lengths", "40", "--decodes", "0", "--repeats", "1", "--ways", "both")
    _, report = run_offload("restore", *options, "--max-num-batched-tokens", "32")
    assert report["model"]["num_layers"] == 2
    assert report["restores"][0]["gain_of_both"] is None


def test_ways_that_differ_are_told_with_the_first_position():
    token_ids = {"swap": [1, 2, 3, 4], "recompute": [1, 2, 3], "both": [1, 5, 3, 9], "auto": [0, 2, 3]}
    assert first_differences(token_ids) == {"both": 1, "auto": 0}
    assert first_differences({"swap": [1, 2], "recompute": [1, 2, 7]}) == {}  # compared as far as both go
    row = {"ways": {}, "gain_of_both": None, "are_tokens_equal": False, "first_differences": {"both": 1, "auto": 0}}
    assert restore._cells(row)[-1] == "NO: both from 1, auto from 0"
