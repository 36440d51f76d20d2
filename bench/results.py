"""Result files: what was measured, on which device, at which commit, with which shapes."""

import json
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from jpaged.device.step.programs import num_cores

RESULTS = Path(__file__).parent / "results"


def current_commit() -> str:
    """The checkout's commit, marked if files other than results differ from it."""
    try:
        commit = _git("rev-parse", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(exclude)results")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + (" with changes" if changed else "")


def _git(*args: str) -> str:
    done = subprocess.run(["git", *args], cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def environment(commit: str | None) -> dict[str, Any]:
    """Device, versions and commit."""
    device = jax.devices()[0]
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit or current_commit(),
        "device": f"{platform.machine()} CPU, {num_cores()} cores" if device.platform == "cpu" else device.device_kind,
        "num_devices": jax.device_count() if device.platform != "cpu" else 1,
        "jax": jax.__version__,
        "jaxlib": version("jaxlib"),
        "python": platform.python_version(),
    }


def save(name: str, content: dict[str, Any], directory: Path = RESULTS) -> Path:
    """Write one result file."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{name}.json"
    path.write_text(json.dumps(content, indent=2) + "\n")
    return path
