"""KV in host memory, measured through the engine.

    python -m bench offload restore --device cpu                          # the model in the box, on this machine
    python -m bench offload restore --random-weights opt-13b --lengths 1024 8192
    python -m bench offload restore --random-weights llama3-8b --num-layers 4   # fewer layers: a first look

restore: a request of N tokens is preempted by another of higher priority, and comes back: transferred (swap), computed
again (recompute), by both ways at once (both), and as the engine chooses (auto). The time runs from the plan that
admits the request to its next token, alone and beside decodes. The tokens of all ways are compared.

Prints a table and writes ``bench/results/offload_SCENARIO_MODEL_DEVICE.json``.
"""

import argparse
import dataclasses
import os
from collections.abc import Callable
from typing import Any

from bench.offload import restore
from bench.offload.shapes import Shapes, read_shapes
from bench.report import device_name, save, start_report

SCENARIOS: dict[str, Callable[[argparse.Namespace, Shapes], dict[str, Any]]] = {"restore": restore.measure}
"""Scenario -> its measurement, which prints a table and returns content of the result file."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    add = parser.add_argument
    add("scenario", choices=SCENARIOS, help="what to measure")
    shapes = "random weights in the shapes of a config.json: its directory, or a name in bench/configs"
    add("--random-weights", metavar="CONFIG", help=f"{shapes} (default: the model in the box)")
    add("--num-layers", type=int, metavar="N", help="layers of the random model (default: all)")
    add("--kv-cache-dtype", default="auto", metavar="TYPE", help="auto, fp8 or int8 (default: %(default)s)")
    add("--max-num-batched-tokens", type=int, metavar="N", help="tokens of a step (default: the scenario's)")
    add("--repeats", type=int, default=3, metavar="N", help="clean measurements of each figure (default: %(default)s)")
    add("--name", help="name of the result file (default: from scenario, model and device)")
    restore.add_options(parser.add_argument_group("restore"))


def run(args: argparse.Namespace) -> int:
    """Measure one scenario, print and save."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    shapes = read_shapes(args)
    content = SCENARIOS[args.scenario](args, shapes)
    name = args.name or f"offload_{args.scenario}_{shapes.name}_{device_name()}"
    report = start_report(args, model=dataclasses.asdict(shapes.model_config)) | content
    print(f"\nwritten to {save(name, report, args.out)}")
    return 0
