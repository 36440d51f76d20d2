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

from bench.report import Table, current_commit, save, start_report

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).parent / "count_calls.py"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--against", type=Path, metavar="PATH", help="a checkout of another commit")


def run(args: argparse.Namespace) -> int:
    """Measure, print and save."""
    here = count_calls(ROOT)
    report = start_report(args, prompt="def add(a, b):", max_tokens=3, here=here)
    rows, table = {name: [value] for name, value in here.items()}, Table("one prompt, three tokens", "here")
    if args.against is not None:
        there = count_calls(args.against)
        report |= {"against_commit": current_commit(args.against), "against": there}
        rows = {name: [value, there[name], value / there[name]] for name, value in here.items()}
        table = Table("one prompt, three tokens", "here", "against", "ratio")
    print(f"{table.text(rows)}\nwritten to {save('calls', report, args.out)}")
    return 0


def count_calls(checkout: Path) -> dict[str, int]:
    """The counts of a checkout, made in a process of its own."""
    environ = os.environ | {"PYTHONPATH": str(checkout.resolve()), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-P", str(SCRIPT)], cwd=checkout, env=environ, stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])
