"""Programs compiled by one process serve the next, as long as nothing that they are made of has changed."""

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.experimental.compilation_cache import compilation_cache

import jpaged
from jpaged.device.step import program_cache
from jpaged.device.step.program_cache import MOST_KEPT, NO_SOURCES, ProgramCache, model_identity, source_digest
from jpaged.models import random_model
from jpaged.sharding import make_mesh
from tests.support.tiny import tiny_config

TINY = tiny_config(num_layers=1)


@pytest.fixture
def root(tmp_path):
    """A directory configured for JAX, which keeps nothing there itself: programs are compiled when a test does so."""
    names = "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"
    before = [getattr(jax.config, name) for name in names]
    tmp_path.chmod(0o700)
    for name, value in zip(names, (str(tmp_path), 1e9), strict=True):
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield tmp_path
    for name, value in zip(names, before, strict=True):
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture
def model():
    return random_model(TINY, jnp.float32, make_mesh(1), 0)


def program_cache_for(*args: object) -> ProgramCache | None:
    """On one device of several."""
    identity, *ingredients = args
    return program_cache.program_cache_for(identity, jax.devices()[:1], *ingredients)


def double():
    return jax.jit(lambda x: 2 * x).lower(jnp.ones(3)).compile()


def stored_in(root: Path) -> list[Path]:
    return [path for path in root.rglob("*") if path.is_file()]


def test_a_program_that_was_kept_runs_without_being_traced(root):
    program_cache_for("model").save(("double", 3), double())
    with ThreadPoolExecutor(1) as threads:
        loaded = program_cache_for("model").load_all([("double", 3), ("double", 4)], threads)
    assert list(loaded) == [("double", 3)]
    assert loaded["double", 3](jnp.full(3, 21.0)).tolist() == [42] * 3
    assert loaded["double", 3].memory_analysis().output_size_in_bytes == double().memory_analysis().output_size_in_bytes


SCRIPT = """
import jax, jax.numpy as jnp, sys
jax.config.update("jax_compilation_cache_dir", sys.argv[1])
from jpaged.device.step.program_cache import program_cache_for
program = program_cache_for("model", jax.devices()[:1], 1).load(("donate",))
if program is None:
    program = jax.jit(lambda xs: (xs[0] + 1, xs[1]), donate_argnums=0).lower([jnp.zeros(4), jnp.ones(2)]).compile()
    program_cache_for("model", jax.devices()[:1], 1).save(("donate",), program)
    print("compiled")
xs = [jnp.zeros(4), jnp.ones(2)]
out = program(xs)
print(out[0].tolist(), xs[0].is_deleted())
"""


def test_another_process_finds_it_and_its_donation(root):
    run = [sys.executable, "-c", SCRIPT, str(root)]
    env = os.environ | {"PYTHONPATH": str(Path(program_cache.__file__).parents[3])}
    outputs = [subprocess.run(run, capture_output=True, text=True, check=True, env=env).stdout for _ in range(2)]
    assert outputs == ["compiled\n[1.0, 1.0, 1.0, 1.0] True\n", "[1.0, 1.0, 1.0, 1.0] True\n"]


TWICE_COMPILED = """
import jax, jax.numpy as jnp, sys
jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
from jpaged.device.step.program_cache import compile_program
def spiral(x):
    for turn in range(3):
        x = jnp.sin(x @ x + turn)
    return x
program, can_be_saved = compile_program(jax.jit(spiral).lower(jnp.ones((64, 64))), None)
print(can_be_saved, bool(jnp.isfinite(program(jnp.ones((64, 64)))).all()))
"""


def test_what_jax_has_loaded_itself_is_not_saved_again(root):
    run = [sys.executable, "-c", TWICE_COMPILED, str(root)]
    env = os.environ | {"PYTHONPATH": str(Path(program_cache.__file__).parents[3])}
    outputs = [subprocess.run(run, capture_output=True, text=True, check=True, env=env).stdout for _ in range(2)]
    assert outputs == ["True True\n", "False True\n"]


def test_jax_keeps_nothing_that_one_thread_compiles_without_it(root):
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    with program_cache.unkept_by_jax():
        jax.jit(lambda x: 3 * x).lower(jnp.ones(3)).compile()
        assert stored_in(root) == []
        with ThreadPoolExecutor(1) as threads:
            threads.submit(double).result()
    assert stored_in(root) != []


def test_whatever_changes_is_another_cache(root, monkeypatch):
    program_cache_for("model", (1, 2)).save((), double())
    assert program_cache_for("model", (1, 2)).load(()) is not None
    assert program_cache_for("model", (1, 3)).load(()) is None
    assert program_cache_for("other", (1, 2)).load(()) is None
    with monkeypatch.context() as patched:
        patched.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true")
        assert program_cache_for("model", (1, 2)).load(()) is None
    with monkeypatch.context() as patched:
        patched.setattr(program_cache, "SOURCE_DIGEST", "edited")
        assert program_cache_for("model", (1, 2)).load(()) is None
    with jax.enable_x64():
        assert program_cache_for("model", (1, 2)).load(()) is None
    assert program_cache.program_cache_for("model", jax.devices()[1:2], (1, 2)).load(()) is None
    assert program_cache_for("model", (1, 2)).load(()) is not None


def test_identity_is_what_a_model_computes_and_not_its_weights(model):
    identity = model_identity(model)
    assert identity == model_identity(random_model(TINY, jnp.float32, make_mesh(1), 1))
    assert " at 0x" not in identity
    model.model.norm.epsilon = 1e-6
    assert model_identity(model) != identity


def test_models_with_code_of_their_users_are_not_kept(root, model):
    class Mine(nnx.Module):
        pass

    assert model_identity(model) is not None
    model.model.extra = Mine()
    assert model_identity(model) is None
    assert program_cache_for(None) is None


@pytest.mark.parametrize("code", [lambda *args, **kwargs: 0, stored_in], ids=["lambda", "function"])
def test_functions_of_their_users_are_code_too(model, code):
    model.lm_head.dot_general = code
    assert model_identity(model) is None


def test_a_file_that_was_cut_short_is_compiled_again(root, caplog):
    kept = program_cache_for("model")
    kept.save((), double())
    (path,) = stored_in(root)
    path.write_bytes(path.read_bytes()[:-100])
    assert kept.load(()) is None
    assert "compiled again" in caplog.text
    kept.save((), double())
    assert kept.load(()) is not None


def test_nothing_is_loaded_that_others_may_have_written(root, monkeypatch):
    umask = os.umask(0)
    try:
        (kept := program_cache_for("model")).save((), double())
    finally:
        os.umask(umask)
    (path,) = stored_in(root)
    for where in (path, path.parent, path.parent.parent):
        mode = where.stat().st_mode
        assert kept.load(()) is not None
        where.chmod(0o722)
        assert kept.load(()) is None
        where.chmod(mode)
    root.chmod(0o722)
    assert program_cache_for("model") is None
    root.chmod(0o700)
    monkeypatch.setattr(os, "getuid", lambda: 12345678)
    assert program_cache_for("model") is None


def test_nothing_is_kept_where_jax_keeps_nothing(root, monkeypatch):
    assert program_cache_for("model") is not None
    with monkeypatch.context() as patched:
        patched.setattr(jax, "process_count", lambda: 2)
        assert program_cache_for("model") is None
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        assert program_cache_for("model") is None
    finally:
        jax.config.update("jax_enable_compilation_cache", True)
    for missing in (None, str(root / "missing")):
        jax.config.update("jax_compilation_cache_dir", missing)
        assert program_cache_for("model") is None


def test_a_disk_that_cannot_be_written_serves_what_it_has(root, monkeypatch, caplog):
    (kept := program_cache_for("model")).save((), double())

    def utime(path):
        raise OSError("Read-only file system")

    monkeypatch.setattr(os, "utime", utime)
    with ThreadPoolExecutor(1) as threads:
        assert list(kept.load_all([()], threads)) == [()]
    assert "Read-only" in caplog.text


def test_code_that_changed_in_any_file_is_other_code(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "module.py").write_text("x = 1")
    (tmp_path / "b" / "sizes.json").write_text("[1]")
    roots = [tmp_path / "a", tmp_path / "b"]
    digests = [source_digest(roots)]
    for path in (tmp_path / "a" / "module.py", tmp_path / "b" / "sizes.json"):
        path.write_text("2")
        digests.append(source_digest(roots))
    assert len(set(digests)) == 3
    assert source_digest([*roots, tmp_path / "c"]) is None
    assert program_cache.SOURCE_DIGEST is not None


def test_code_that_no_program_is_made_of_may_change(tmp_path):
    for name in ("device", "host"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "module.py").write_text("x = 1")
    before = source_digest([tmp_path], NO_SOURCES)
    (tmp_path / "host" / "module.py").write_text("x = 2")
    assert source_digest([tmp_path], NO_SOURCES) == before
    (tmp_path / "device" / "module.py").write_text("x = 2")
    assert source_digest([tmp_path], NO_SOURCES) != before


def test_no_program_is_made_of_the_code_that_is_left_out():
    root = Path(jpaged.__file__).parent
    names = "|".join(name.removesuffix(".py") for name in NO_SOURCES)
    paths = [path for path in root.rglob("*.py") if path.relative_to(root).parts[0] not in NO_SOURCES]
    found = {path.name for path in paths if re.search(rf"jpaged(\.| import )({names})\b", path.read_text())}
    assert found <= {"__init__.py", "__main__.py"}
    assert len(paths) > 50


def test_a_full_disk_costs_a_warning(root, monkeypatch, caplog):
    def replace(*paths):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "replace", replace)
    program_cache_for("model").save((), double())
    assert "No space left" in caplog.text
    assert stored_in(root) == []


def test_those_not_used_for_long_make_room(root):
    kept = [program_cache_for("model", number) for number in range(MOST_KEPT + 1)]
    for age, cache in enumerate(kept[:MOST_KEPT]):
        cache.save((), double())
        os.utime(cache._directory, (age, age))
    with ThreadPoolExecutor(1) as threads:
        kept[0].load_all([()], threads)  # used again
    kept[MOST_KEPT].save((), double())
    assert [cache.load(()) is not None for cache in kept] == [True, False, *[True] * (MOST_KEPT - 1)]
