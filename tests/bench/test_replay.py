"""Replays without a device: their model of a step, and a small run of the command."""

import json

import numpy as np
import pytest

from bench.__main__ import main
from bench.replay.replay import Setting, replay
from bench.replay.step_time import H200
from bench.workloads import poisson_arrivals, sharegpt, uniform
from jpaged.device.step.inputs import all_buckets


def test_products_follow_the_measured_points_and_grow_with_tokens():
    for num_tokens, seconds in H200.product_s:
        assert H200.products_s(num_tokens) == pytest.approx(seconds)
    assert H200.products_s(8192) == pytest.approx(4 * H200.products_s(2048))
    assert (H200.padding_s(np.arange(1, 9000), np.arange(2, 9001)) > 0).all()


@pytest.mark.parametrize("knows_ends", [True, False])
def test_a_replay_draws_every_token_once(knows_ends):
    """Known ends need a step for each token; other sequences draw some in vain, in bursts that were planned ahead."""
    setting = Setting(40, tuple(all_buckets(8, 64)), 8, 64, knows_ends=knows_ends)
    done = replay(uniform(12, 20, 30), setting)
    drawn = (done.num_steps * done.num_rows)[done.num_tokens == done.num_rows].sum()
    assert done.num_output_tokens == 360
    assert 360 - 12 <= drawn + 12 <= 360 * 1.4
    assert done.fill.max() <= 1
    assert done.figures()["seconds"] == pytest.approx(done.seconds.sum())


def test_a_first_token_comes_in_the_third_step_after_its_request_where_rows_are_free():
    """The step that runs, the one planned behind it, and its own: short prompts are not cut to save padding."""
    setting, work = Setting(4000, tuple(all_buckets(64, 2048)), 64, 2048), sharegpt(60, 3)
    done = replay(work, setting, poisson_arrivals(60, 20.0))
    is_short = np.array([len(prompt) <= 512 for prompt in work.prompts])
    assert 0 < is_short.sum() < 60
    assert done.first_token_steps[is_short].max() == 3
    assert (done.first_token_s > 0).all()
    assert done.figures()["num_steps"] >= max(work.output_lens)


def test_a_request_that_finds_the_engine_idle_needs_its_own_step_alone():
    setting = Setting(400, tuple(all_buckets(8, 64)), 8, 64)
    done = replay(uniform(3, 20, 30), setting, np.array([0.0, 100.0, 200.0]))
    assert done.first_token_steps.tolist() == [1, 1, 1]
    assert done.first_token_s == pytest.approx(done.first_token_s[0])


def test_command_compares_ways_to_admit(tmp_path, capsys):
    assert main(["replay", "--num-requests", "30", "--out", str(tmp_path), "--commit", "abc"]) == 0
    report = json.loads((tmp_path / "replay.json").read_text())
    assert all(row["num_steps"] > 0 for row in report["under_pressure"].values())
    assert all(0 < row["seconds_percent"] < row["row_steps_percent"] for row in report["padding"].values())
    assert 1 <= report["arrivals"]["steps_p50"] <= report["arrivals"]["steps_p99"] < 30
    assert "sharegpt30, stops, by growth" in capsys.readouterr().out
