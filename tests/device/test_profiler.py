"""The profile of a machine: measured, kept in a file, and read by the next run."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest

from jpaged.cli import info
from jpaged.config import EngineConfig
from jpaged.contract.profile import Link, MachineProfile, Observations, Transferred, from_json
from jpaged.device import profile_file
from jpaged.device.profile_file import load_profile, profile_path, save_profile
from jpaged.device.target import TARGETS
from jpaged.engine import loop
from jpaged.sharding import make_mesh
from tests.support.tiny import TINY, make_runner

PROFILE = MachineProfile(1024, Link(1e-4, 5e9, 4e9), Link(1e-4, 6e9, 4e9), ((8, 1e9),), 1e-3, 1e-5, 1e-9, 1e-4, 1e-9)


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A directory of compiled programs, on a device that keeps them."""
    tmp_path.chmod(0o700)
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    monkeypatch.setattr(
        profile_file, "target_of", lambda mesh: dataclasses.replace(TARGETS["cpu"], keeps_programs=True)
    )
    yield tmp_path
    jax.config.update("jax_compilation_cache_dir", before)


def path_of(config: EngineConfig, model_config=TINY):
    return profile_path(model_config, config, jnp.dtype("float32"), "xla", make_mesh(1))


def test_a_profile_has_a_place_for_each_model_and_its_rates(root, monkeypatch):
    path = path_of(EngineConfig())
    assert path == path_of(EngineConfig(num_blocks=99, seed=3, preemption="swap")), "no rate depends on them"
    others = [path_of(EngineConfig(block_size=32)), path_of(EngineConfig(), dataclasses.replace(TINY, num_layers=1))]
    assert len({path, *others}) == 3
    monkeypatch.setattr(profile_file.platform, "node", lambda: "another machine")
    assert path_of(EngineConfig()) != path


def test_no_profile_is_kept_where_programs_are_not(root, monkeypatch):
    root.chmod(0o777)
    assert path_of(EngineConfig()) is None, "others could write there"
    root.chmod(0o700)
    monkeypatch.setattr(profile_file, "target_of", lambda mesh: TARGETS["cpu"])
    assert path_of(EngineConfig()) is None
    save_profile(None, PROFILE)
    assert load_profile(None) is None


def test_a_kept_profile_is_read_again_unless_it_is_damaged(root, caplog):
    path = path_of(EngineConfig())
    assert load_profile(path) is None
    save_profile(path, PROFILE)
    assert load_profile(path) == PROFILE
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    path.write_text("{")
    assert load_profile(path) is None
    assert "measured again" in caplog.text
    save_profile(path, PROFILE)
    path.chmod(0o666)
    assert load_profile(path) is None, "others could have written it"


def test_a_profile_that_cannot_be_kept_costs_a_warning(root, caplog):
    path = path_of(EngineConfig())
    path.parent.write_text("in the way")
    save_profile(path, PROFILE)
    assert "was not kept" in caplog.text


def test_the_second_start_measures_nothing(root, monkeypatch):
    first = make_runner(num_host_blocks=64)
    first.measure_profile()
    monkeypatch.setattr("jpaged.device.profiler.measure_profile", None)
    second = make_runner(num_host_blocks=64)
    second.measure_profile()
    assert second.profile == first.profile


@pytest.mark.parametrize("max_model_len", [5, 9, 10, 16, 40])
def test_prefills_that_are_timed_fill_the_largest_size(max_model_len, monkeypatch):
    runner = make_runner(num_host_blocks=8, max_model_len=max_model_len)
    timed, largest = [], runner.buckets[-1]
    monkeypatch.setattr(runner, "time_prefill", lambda *chunks: timed.append(chunks) or 1.0 + chunks[0] * chunks[1])
    runner.measure_profile()
    assert timed.pop(0) == (1, 1)
    for num_chunks, length in timed:
        assert length <= max_model_len
        assert num_chunks <= largest.num_rows
        assert largest.num_tokens - num_chunks < num_chunks * length <= largest.num_tokens


def test_averages_are_kept_from_time_to_time(root, monkeypatch):
    monkeypatch.setattr(loop, "LEAST_LEARNT", 2)
    runner = make_runner(num_host_blocks=64)
    engine = loop.Engine(runner, runner.config)
    [path] = (root / "profiles").iterdir()
    measured, kept = from_json(path.read_text()), []
    seen = Observations([Transferred("to_host", 2**20, 1.0, is_end_seen=True)], [])
    for _ in range(5):
        engine._learn(seen)
        kept.append(from_json(path.read_text()))
    assert kept[0] == measured != kept[1] == kept[2] != kept[3] == kept[4]
    assert engine.scheduler.profile != kept[4], "the fifth is not kept"


def test_projections_and_reads_are_measured_where_decodes_stream():
    plain, streaming = (make_runner(num_host_blocks=64, kv_placement=placement) for placement in ("device", "host"))
    for runner in (plain, streaming):
        runner.measure_profile()
    assert (plain.profile.projection_flops_per_s, plain.profile.layer_token_s) == ((), 0.0)
    sizes = [num_tokens for num_tokens, _ in streaming.profile.projection_flops_per_s]
    assert sizes == [2, 16], "an eighth of a step's tokens, and all of them"
    assert min(rate for _, rate in streaming.profile.projection_flops_per_s) > 0
    assert streaming.profile.layer_token_s > 0
    assert streaming.profile.layer_fixed_s == pytest.approx(streaming.profile.prefill_fixed_s / TINY.num_layers)


def test_info_shows_the_rates_that_a_run_kept(root, monkeypatch):
    config = EngineConfig(num_host_blocks=8)
    made = info.gather_info(None, config)
    assert (made.profile, made.profile_path) == (None, None)
    assert "\nrates " not in str(made)
    monkeypatch.setattr(info, "load_profile", lambda path: PROFILE)
    made = info.gather_info(None, config)
    assert "rates          5 GB/s to the host, 6 GB/s from it, 100,000 prompt tokens/s (kept)" in str(made).splitlines()
    assert json.loads(json.dumps(dataclasses.asdict(made)))["profile"]["from_host_bytes_per_s"] == 6e9


def test_info_names_the_numa_node_of_pinned_memory():
    pool = info.HostPoolInfo(4, 4 << 20, "pinned_host")
    assert info._describe_host_pool(pool, 1) == "4 blocks are 4.00 MiB of pinned host memory of NUMA node 1"
    assert info._describe_host_pool(pool, None) == "4 blocks are 4.00 MiB of pinned host memory"
    assert info._cpus_in("0-3,8,10-11\n") == {0, 1, 2, 3, 8, 10, 11}
    assert info.find_numa_node() is None or info.find_numa_node() >= 0
