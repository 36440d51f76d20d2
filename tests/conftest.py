"""Test-wide strictness: no silent promotion of dtypes or ranks; eight fake devices; quick compilation; no traces."""

import atexit
import os
import shutil
import tempfile

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"

if (
    "PYTEST_XDIST_WORKER" not in os.environ
):  # workers inherit it: they share compiled programs, and the user's stay apart
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="jpaged-tests-")
    atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)

import jax
import pytest
from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import reset_gpu_interpret_mode_state
from jax.experimental.compilation_cache import compilation_cache

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def no_races(capsys):
    """No launch of an interpreted kernel raced: jax 0.12 raises, 0.11 prints, and keeps only the last launch's verdict.

    An exception in a kernel leaves the interpreter's state behind, and would fail every later test.
    """
    yield
    reset_gpu_interpret_mode_state()
    assert "RACE DETECTED" not in capsys.readouterr().out


@pytest.fixture
def nothing_kept_by_jax():
    """What JAX finds in its own cache, ours does not keep; and earlier tests may have turned that on."""
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_compilation_cache_dir", before)
    compilation_cache.reset_cache()


def pytest_addoption(parser):
    parser.addoption(
        "--soak-steps", type=int, default=4000, help="steps of test_scheduler_soak.py: 4,000 or more, 100,000 by hand"
    )
