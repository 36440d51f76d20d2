"""Files that a wheel is told to hold, and output of a command: every data file, types, and no noise."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE_DATA = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]


@pytest.mark.parametrize("package", ["jpaged", "pallas_kernels"])
def test_package_data_names_every_file_that_is_no_module(package):
    folder = ROOT / package
    packed = {path for pattern in PACKAGE_DATA[package] for path in folder.glob(pattern)}
    present = {path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert {path for path in present if path.suffix != ".py"} == packed
    assert folder / "py.typed" in packed


def test_every_folder_with_modules_is_a_package():
    for package in ("jpaged", "pallas_kernels"):
        for path in (ROOT / package).rglob("*.py"):
            assert (path.parent / "__init__.py").exists(), f"{path} is in no package: the wheel would leave it out"


def test_command_prints_no_errors_without_a_tpu():
    """An installed libtpu reports five lines of errors where no TPU is attached, unless told otherwise."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("TPU_", "JAX_PLATFORMS"))}
    command = [sys.executable, "-m", "jpaged", "info"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert "devices" in done.stdout
