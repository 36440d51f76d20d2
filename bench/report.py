"""Results of a run: the file, with device, commit and settings, and the table on the terminal."""

import argparse
import json
import platform
import shlex
import subprocess
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from jpaged.device.step.program_store import num_cores

RESULTS = Path(__file__).parent / "results"
CONFIGS = Path(__file__).parent / "configs"
"""One directory with a config.json for each model whose shapes are measured."""


def current_commit(directory: Path = RESULTS.parent) -> str:
    """The commit of a checkout, marked if files other than results differ from it."""
    try:
        commit = _git(directory, "rev-parse", "HEAD")
        changed = _git(directory, "status", "--porcelain", "--untracked-files=no", "--", ":/", ":(exclude)results")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + (" with changes" if changed else "")


def _git(directory: Path, *args: str) -> str:
    done = subprocess.run(["git", *args], cwd=directory, capture_output=True, text=True, check=True)
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


def device_name() -> str:
    """The device in names of result files: "cpu", "nvidia-h200"."""
    device = jax.devices()[0]
    return "cpu" if device.platform == "cpu" else device.device_kind.lower().replace(" ", "-")


def start_report(args: argparse.Namespace, **content: Any) -> dict[str, Any]:
    """The beginning of a result file: the environment and the command."""
    return {"environment": environment(args.commit), "command": f"python -m bench {shlex.join(args.argv)}"} | content


def save(name: str, content: dict[str, Any], directory: Path | None = None) -> Path:
    """Write one result file, whole even if the process is killed meanwhile; the default directory is ``RESULTS``."""
    directory = directory or RESULTS
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{name}.json"
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=2) + "\n")
    part.replace(path)
    return path


class Table:
    """Rows of text in columns of fixed width: the first aligned left, the others right.

    Args:
        titles: heads of the columns.
        first: width of the first column.
        width: least width of the others.
    """

    def __init__(self, *titles: object, first: int = 28, width: int = 8) -> None:
        self._titles = titles
        self._widths = [first, *(max(width, len(str(title))) for title in titles[1:])]

    def header(self) -> str:
        """The row of titles."""
        return self.row(*self._titles)

    def row(self, *cells: object) -> str:
        """One row. A float is shortened, None is empty; further cells follow the last column."""
        first, *others = map(shown, cells)
        widths = self._widths[1:] + [0] * (len(cells) - len(self._widths))
        return " ".join([f"{first:{self._widths[0]}}", *map(str.rjust, others, widths)]).rstrip()

    def text(self, rows: dict[str, list[Any]]) -> str:
        """The whole table, of rows by their first cell."""
        return "\n".join([self.header(), *(self.row(title, *cells) for title, cells in rows.items())])


def shown(value: object) -> str:
    """A number with three digits, or whole from 100 on; other values as they are, None as nothing."""
    if isinstance(value, float):
        return f"{value:,.3g}" if abs(value) < 100 else f"{value:,.0f}"
    return "" if value is None else str(value)
