"""The benchmark of KV in host memory, on a tiny model: structure and counts, never times."""

import json
from pathlib import Path

import pytest

from bench.__main__ import main
from tests.support.tiny import tiny_config

TINY = tiny_config(num_layers=1, vocab_size=64, dtype="float32", eos_token_ids=(3,), max_position_embeddings=64)


@pytest.fixture(scope="module")
def tiny_path(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(TINY.to_hf()))
    return path


@pytest.fixture
def run_offload(tiny_path, tmp_path, capsys):
    """Runs the command on the tiny model: printed lines, report."""

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
        assert row["num_tokens_compared"] > 4
        swap, recompute, both = (row["ways"][way]["rounds"][-1] for way in ("swap", "recompute", "both"))
        assert (swap["num_swaps_in"], recompute["num_swaps_in"], both["num_swaps_in"]) == (1, 0, 1)
        assert swap["num_recomputed_tokens"] == recompute["bytes_from_host"] == 0
        assert swap["bytes_from_host"] >= both["bytes_from_host"] > 0
        assert row["ways"]["swap"]["profile"] is None
        assert row["gain_of_both"] > 0
    assert report["settings"]["max_model_len"] > 64, "positions are raised"
    assert sum(line.startswith("60 beside") for line in lines) == 2


def test_decodes_are_measured_by_both_placements_with_the_same_tokens(run_offload, tmp_path):
    options = ("--num-seqs", "3", "--contexts", "40", "--num-steps", "6", "--repeats", "2")
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
            # The middle of the steps lies in the third or the fourth block.
            assert best["kv_bytes"] / variant["bytes_per_block"] / work["num_seqs"] in (2, 3)
            assert len(run["step_ms"]) == 2
    assert host["runs"][0]["best"]["share_of_copies"] > 0
    assert (tmp_path / "offload" / "result.png").exists()
    assert sum(line.startswith("host: 3 x 40") for line in lines) == 1


def test_a_long_sequence_is_measured_over_a_part_of_its_blocks_and_over_all(run_offload):
    options = ("--length", "200", "--num-steps", "6", "--repeats", "1", "--max-num-batched-tokens", "32")
    _, report = run_offload("long", *options, "--pool-gib", "0.001")
    part, whole = report["variants"]
    assert (part["settings"]["kv_placement"], whole["settings"]["kv_placement"]) == ("auto", "device")
    assert whole["runs"][0]["are_tokens_equal"]


def test_a_variant_that_does_not_fit_is_recorded_with_the_reason(run_offload):
    options = ("--num-seqs", "2", "--contexts", "40", "--num-steps", "6", "--placements", "device", "--num-blocks", "2")
    lines, report = run_offload("decode", *options, "--max-num-batched-tokens", "32", "--repeats", "1")
    assert "the request can never fit" in report["variants"][0]["refused"]
    assert any(line.startswith("device: refused") for line in lines)


def test_batches_of_the_paper_shrink_to_the_host_memory(run_offload):
    options = ("--divisor", "32", "--host-memory-gib", "0.00015", "--repeats", "1", "--placements", "host")
    lines, report = run_offload("latency", *options, "--max-num-batched-tokens", "64")
    assert "second-hand" in report["paper"]
    assert "second-hand" in lines[0]
    works = [run["work"] for run in report["variants"][0]["runs"]]
    assert len(works) == 6
    assert {work["num_tokens"] for work in works} == {32, 128}
    block_bytes = report["variants"][0]["bytes_per_block"]
    most = max(work["num_seqs"] * -(-(work["prompt_len"] + work["num_tokens"]) // 16) for work in works)
    assert 1 < most * block_bytes <= 0.00015 * 2**30


def test_fewer_layers_are_for_random_weights(capsys, run_offload):
    with pytest.raises(SystemExit):
        main(["offload", "restore", "--num-layers", "1"])
    assert "--num-layers needs --random-weights" in capsys.readouterr().err
    options = ("--num-layers", "2", "--lengths", "40", "--decodes", "0", "--repeats", "1", "--ways", "both")
    _, report = run_offload("restore", *options, "--max-num-batched-tokens", "32")
    assert report["model"]["num_layers"] == 2
    assert report["restores"][0]["gain_of_both"] is None
