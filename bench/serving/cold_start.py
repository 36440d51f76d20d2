"""A start with an empty compile cache, in a process of its own, before this one takes the device's memory."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def start_cold(argv: list[str], directory: Path) -> dict[str, Any]:
    """Run ``python -m bench.serving`` for its start alone; this process starts warm then, from the cache it left.

    Args:
        argv: options of this run, without ``--warm-start``.
        directory: empty; to be kept until this process has started.

    Returns:
        The ``StartUp`` of that process, by field.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    os.environ["XDG_CACHE_HOME"] = str(directory / "cache")
    os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)
    command = [sys.executable, "-m", "bench.serving", *argv]
    command += ["--startup-only", "--out", str(directory), "--name", "cold"]
    subprocess.run(command, cwd=Path(__file__).parents[2], check=True)
    return json.loads((directory / "cold.json").read_text())["startup"]
