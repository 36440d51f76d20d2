"""Test-wide strictness: no silent promotion of dtypes or ranks; eight fake devices; programs compiled once a worker."""

import atexit
import functools
import gc
import os
import shutil
import sys
import tempfile

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"

# Programs of one run are kept apart from the user's. Workers share the folder but no file: JAX's writes are not atomic.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="jpaged-tests-")
    atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)

import hypothesis
import jax
import pytest
from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import reset_gpu_interpret_mode_state
from jax.experimental.compilation_cache import compilation_cache

from jpaged.interpreter import FROZEN_OBJECTS

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
own_cache = os.path.join(os.environ["XDG_CACHE_HOME"], os.environ.get("PYTEST_XDIST_WORKER", "alone"))
jax.config.update("jax_compilation_cache_dir", own_cache)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)

# No example fails for being slow, and every run takes the same examples; --hypothesis-profile=explore draws new ones.
patient = hypothesis.settings(deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.register_profile("explore", patient)
hypothesis.settings.register_profile("repeat", patient, derandomize=True)
hypothesis.settings.load_profile("repeat")


def pytest_collection_modifyitems(items):
    """Start long tests first; each worker ends with short ones, which another worker can take."""
    items.sort(key=lambda item: item.get_closest_marker("starts_first") is None)


def pytest_collection_finish():
    """Visit imported modules and collected tests no more: the garbage collector took a tenth of the time of all tests.

    Tracing makes many objects that live on, so that Python's own thresholds start collections that free nothing.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 20)


MAX_MAPPINGS = 12_000
"""Memory mappings of a worker from which it drops compiled programs; each kernel has three, and Linux allows 65,530."""


@pytest.hookimpl(trylast=True)  # after the fixtures' own ends, which may ask for a module's engine again
def pytest_runtest_teardown(item, nextitem):
    """Keep a worker below Linux's limit of memory mappings: beyond it, XLA's compiler ends the process by a signal."""
    is_last_of_module = nextitem is None or nextitem.path != item.path
    if is_last_of_module and _num_mappings() > MAX_MAPPINGS:
        _drop_programs()


def _drop_programs():
    """Drop JAX's programs, and those of the engines that test modules keep: a module makes its own again."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "tests":
            for value in vars(module).values():
                if isinstance(value, functools._lru_cache_wrapper):
                    value.cache_clear()
    jax.clear_caches()
    FROZEN_OBJECTS.collect_and_freeze()  # frozen engines that were dropped have programs too


def _num_mappings():
    try:
        with open("/proc/self/maps", "rb") as mappings:
            return sum(1 for _ in mappings)
    except OSError:
        return 0  # not Linux, and no limit to keep


@pytest.fixture
def no_races(capsys):
    """Fails a test in which a launch of an interpreted kernel raced: JAX 0.12 raises, JAX 0.11 prints.

    An exception in a kernel leaves the interpreter's state behind; the reset keeps later tests from failing.
    """
    yield
    reset_gpu_interpret_mode_state()
    assert "RACE DETECTED" not in capsys.readouterr().out


@pytest.fixture
def nothing_kept_by_jax():
    """JAX's own cache off: programs loaded from that cache cannot be saved again, nor loaded for absent devices."""
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


@pytest.fixture
def no_growth(monkeypatch):
    """Lets groups start that fit now, whatever their growth: small pools then preempt all the time."""
    monkeypatch.setattr("jpaged.host.growth.HORIZON", 0)
