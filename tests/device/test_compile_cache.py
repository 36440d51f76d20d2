"""Compiled programs are kept where only their user can put any."""

import os
import stat

import jax
import pytest

from jpaged.device.step.compile_cache import default_compile_cache_dir, enable_compile_cache


@pytest.fixture(autouse=True)
def _own_settings(monkeypatch, tmp_path):
    before = jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    yield
    jax.config.update("jax_compilation_cache_dir", before[0])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", before[1])


def test_directory_is_the_users_alone():
    path = enable_compile_cache()
    assert path == default_compile_cache_dir()
    assert jax.config.jax_compilation_cache_dir == str(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o700


def test_a_directory_left_open_is_closed():
    default_compile_cache_dir().mkdir(parents=True, mode=0o777)
    assert stat.S_IMODE(enable_compile_cache().stat().st_mode) == 0o700


def test_a_directory_of_somebody_else_is_not_used(monkeypatch):
    monkeypatch.setattr(os, "getuid", lambda: 12345678)
    assert enable_compile_cache() is None
    assert jax.config.jax_compilation_cache_dir is None


def test_a_directory_already_configured_is_kept(tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "mine"))
    assert enable_compile_cache() == tmp_path / "mine"
    assert not default_compile_cache_dir().exists()


def test_without_a_place_to_write_nothing_is_kept(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert enable_compile_cache() is None
