"""Calls that one request makes: a prompt through ``LLM.generate``, three tokens, programs compiled.

    python -m bench calls
    python -m bench calls --against PATH       # and a checkout of another commit

Counts functions of jpaged and pallas_kernels alone: their calls, distinct functions, types made, the deepest stack.
Prints a table, writes ``bench/results/calls.json``.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench.report import Table, current_commit, save, start_report

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).parent / "count_calls.py"
COUNTS = "own_calls", "distinct_functions", "types_made", "deepest_stack"
NUM_FILES = 12
"""Files with the most calls, which the table lists."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--against", type=Path, metavar="PATH", help="a checkout of another commit")


def run(args: argparse.Namespace) -> int:
    """Measure, print and save."""
    here = count_calls(ROOT)
    report = start_report(args, prompt="def add(a, b):", max_tokens=3, here=here)
    rows = {name: [here[name]] for name in COUNTS}
    table = Table("one prompt, three tokens", "here", first=48)
    if args.against is not None:
        there = count_calls(args.against)
        report |= {"against_commit": current_commit(args.against), "against": there}
        rows = {name: [here[name], there[name], here[name] / there[name]] for name in COUNTS}
        table = Table("one prompt, three tokens", "here", "against", "ratio", first=48)
    rows |= {f"  {name}": [num_calls] for name, num_calls in list(here["calls_by_file"].items())[:NUM_FILES]}
    print(f"{table.text(rows)}\nwritten to {save('calls', report, args.out)}")
    return 0


def count_calls(checkout: Path) -> dict[str, Any]:
    """The counts of a checkout, made in a process of its own."""
    environ = os.environ | {"PYTHONPATH": str(checkout.resolve()), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-P", str(SCRIPT)], cwd=checkout, env=environ, stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])
