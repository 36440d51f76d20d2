"""Result files: what was measured, on which device, at which commit, with which shapes."""

import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
import jaxlib

RESULTS = Path(__file__).parent / "results"


def current_commit() -> str:
    """The checkout's commit, marked if files differ from it."""
    here = Path(__file__).parent
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True).stdout
        changed = subprocess.run(["git", "status", "--porcelain"], cwd=here, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit.strip() + (" with changes" if changed.strip() else "")


def environment(commit: str | None) -> dict[str, Any]:
    """Device, versions and commit."""
    device = jax.devices()[0]
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit or current_commit(),
        "device": f"{platform.machine()} CPU, {_num_cores()} cores" if device.platform == "cpu" else device.device_kind,
        "num_devices": jax.device_count() if device.platform != "cpu" else 1,
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "python": platform.python_version(),
    }


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def save(name: str, content: dict[str, Any], directory: Path = RESULTS) -> Path:
    """Write one result file."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{name}.json"
    path.write_text(json.dumps(content, indent=2) + "\n")
    return path
