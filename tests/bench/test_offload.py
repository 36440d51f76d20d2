"""The benchmark of KV in host memory, on a tiny model: structure and counts, never times."""

import json
from pathlib import Path

import pytest

from bench.__main__ import main
from tests.support.tiny import tiny_config

TINY = tiny_config(num_layers=2, vocab_size=64, dtype="float32", eos_token_ids=(3,), max_position_embeddings=64)


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
    options = ("--lengths", "60", "100", "--decodes", "0", "2", "--repeats", "1", "--max-num-batched-tokens", "32")
    lines, report = run_offload("restore", *options)
    rows = report["restores"]
    assert [(row["num_tokens"], row["num_decodes"]) for row in rows] == [(60, 0), (60, 2), (100, 0), (100, 2)]
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
    assert report["settings"]["max_model_len"] > 100 > report["model"]["max_position_embeddings"] - 100
    assert sum(line.startswith("60 beside") for line in lines) == 2


def test_fewer_layers_are_for_random_weights(capsys, run_offload):
    with pytest.raises(SystemExit):
        main(["offload", "restore", "--num-layers", "1"])
    assert "--num-layers needs --random-weights" in capsys.readouterr().err
    options = ("--num-layers", "1", "--lengths", "40", "--decodes", "0", "--repeats", "1", "--ways", "both")
    _, report = run_offload("restore", *options, "--max-num-batched-tokens", "32")
    assert report["model"]["num_layers"] == 1
    assert report["restores"][0]["gain_of_both"] is None
