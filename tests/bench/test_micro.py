"""The list of benchmarks, the host's time of a plan, and the calls of a request."""

import json
import subprocess
from types import SimpleNamespace

import pytest

import jpaged
from bench import machine
from bench.__main__ import BENCHMARKS, main
from bench.machine import MachineLimits
from bench.micro import experts, host
from bench.micro.count_calls import count


def test_benchmarks_are_listed_and_unknown_ones_are_refused(capsys):
    assert main([]) == 0
    listed = capsys.readouterr().out
    assert all(f"  {name} " in listed for name in BENCHMARKS)
    assert main(["nothing"]) == 2


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_explains_itself(name, capsys):
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert all(option in shown for option in ("--out", "--commit"))


def test_experts_are_computed_in_each_way_with_small_errors(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(machine, "measure_limits", lambda dtype: MachineLimits(1e9, 1e12, dtype.name))
    monkeypatch.setattr(experts, "NUM_LAYERS", 1)
    options = ["--shapes", "gpt-oss-20b", "--tokens", "2", "40", "--shrink", "45", "--device", "cpu"]
    assert main(["experts", *options, "--out", str(tmp_path), "--commit", "abc"]) == 0
    rows = json.loads((tmp_path / "experts_cpu.json").read_text())["rows"]
    ways = [(2, "chosen"), (2, "all"), (2, "grouped"), (40, "all"), (40, "grouped")]
    assert [(row["tokens"], row["way"]) for row in rows] == ways
    assert [row["is_used"] for row in rows] == [True, False, False, True, False]
    assert all(row["error"] < 0.02 for row in rows)
    assert "grouped" in capsys.readouterr().out


def test_host_times_the_parts_of_a_plan(tmp_path, capsys):
    options = ["--num-seqs", "3", "--max-burst", "2", "--num-plans", "3", "--prompt-len", "20"]
    assert main(["host", *options, "--out", str(tmp_path), "--commit", "abc"]) == 0
    report = json.loads((tmp_path / "host_3_burst2.json").read_text())
    assert {name.partition(" ")[0] for name in report["median_us"]} >= {"schedule", "update", "pack"}
    assert all(us >= 0 for us in report["median_us"].values())
    assert report["step_us"] == pytest.approx(sum(report["median_us"].values()) / 2)
    assert (report["num_seqs"], report["max_burst"], report["environment"]["commit"]) == (3, 2, "abc")
    assert "schedule" in capsys.readouterr().out


@pytest.mark.parametrize(("work", "num_seqs"), [("beams", 8), ("prompts", 3)])
def test_host_times_searches_and_prompts(work, num_seqs, tmp_path, capsys):
    options = [f"--num-{work}", str(num_seqs), "--num-plans", "3", "--prompt-len", "20"]
    assert main(["host", *options, "--out", str(tmp_path), "--commit", "abc"]) == 0
    report = json.loads((tmp_path / f"host_{num_seqs}_{work}.json").read_text())
    assert (report["work"], report["num_seqs"], report["max_burst"]) == (work, num_seqs, 1)
    assert all(us >= 0 for us in report["median_us"].values())
    assert f"{num_seqs} {work}: update" in capsys.readouterr().out


def test_two_commits_alternate_and_each_is_called_by_its_own_command(tmp_path, monkeypatch, capsys):
    commands = []

    def run(command, *, cwd, env, **options):
        commands.append((cwd, command[2:4]))
        assert env["PYTHONPATH"] == str(cwd)
        num_us = 10.0 if cwd == tmp_path else 4.0 + len(commands)
        us = {"schedule": num_us, "update": num_us, "pack tokens and tables": num_us, "pack sampling parameters": 0.0}
        directory = command[command.index("--out") + 1]
        name = f"{directory}/host_{command[command.index('--num-seqs') + 1]}.json"
        with open(name, "w") as file:
            json.dump({"median_us": us | {"collect, and what is left": 1.0}}, file)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(host, "subprocess", SimpleNamespace(run=run, DEVNULL=None))
    monkeypatch.setattr(host, "current_commit", lambda checkout: checkout.name)
    options = ["--num-seqs", "3", "--against", str(tmp_path), "--repeats", "3", "--out", str(tmp_path / "results")]
    assert main(["host", *options]) == 0
    assert commands == [(host.ROOT, ["bench", "host"]), (tmp_path, ["bench.host", "--num-seqs"])] * 3
    report = json.loads((tmp_path / "results" / "host.json").read_text())
    assert report["commits"]["against"] == tmp_path.name
    [case] = report["cases"]
    assert [each["pack"] for each in case["median_us"]["here"]] == [5.0, 7.0, 9.0]
    shown = [line for line in capsys.readouterr().out.splitlines() if "schedule+update+pack" in line]
    assert shown[0].split()[-7:] == ["15", "21", "27", "30", "30", "30", "0.70"]


def test_calls_count_functions_and_types_of_the_packages_alone():
    counts = count(lambda: [jpaged.SamplingParams(max_tokens=3), json.dumps([1, 2])])
    assert counts["types_made"] == 1
    assert counts["own_calls"] >= counts["distinct_functions"] >= 1
    assert counts["deepest_stack"] >= 1
    assert count(lambda: json.dumps([1])) == dict.fromkeys(counts, 0)
