"""KV in host memory, measured through the engine.

    python -m bench offload restore --device cpu                          # the model in the box, on this machine
    python -m bench offload decode --device cpu --num-seqs 4
    python -m bench offload restore --random-weights opt-13b --lengths 1024 8192
    python -m bench offload restore --random-weights llama3-8b --num-layers 4   # fewer layers: a first look
    python -m bench offload decode --random-weights llama3-8b --num-seqs 32 --contexts 4096
    python -m bench offload decode --random-weights opt-13b --contexts 1024 --placements activations kv device
    python -m bench offload latency --random-weights opt-6.7b
    python -m bench offload long --random-weights llama3-8b --length 500000 --pool-gib 10

restore: a request of N tokens is preempted by another of higher priority, and comes back: transferred (swap), computed
again (recompute), by both ways at once (both), and as the engine chooses (auto). The time runs from the plan that
admits the request to its next token, alone and beside decodes. The tokens of all ways are compared: "both from 12" says
that output token 12, counted from 0, is the first of "both" that differs from the first way's.

decode: a batch whose KV lies on the host, streamed layer by layer in every step, and the same with KV on the device
(--placements; "activations" and "kv" fix what the host keeps). KV GB/s counts the K and V of all full blocks attended
to, link GB/s the bytes that came from the host; their share is of the fastest copy from pinned memory in the same run.
The planner's predictions stand beside. --busy profiles a few steps: the shares of time of kernels and of copies.

long: one sequence of --length tokens over a device pool of --pool-gib, and over one that holds all of it.

latency, sweep, throughput: the KVPR paper's experiments (batches of 64 at 128 to 512 tokens; of 1 to 48 at 1,024; 8
batches of 32 at 256 to 1,024, with the weights on the host), with KV on the host and on the device. Batches that the
host memory does not hold become smaller (--host-memory-gib).

peer: Hugging Face's offloaded cache on --num-seqs x --contexts, by a Python that has torch (--peer-python).

Prints a table, and writes ``bench/results/offload_SCENARIO_MODEL_DEVICE.json`` and, with matplotlib, a plot to
``bench/results/offload/``.
"""

import argparse
import dataclasses
import os
from collections.abc import Callable
from typing import Any

from bench.offload import restore, scenarios
from bench.offload.shapes import Shapes, read_shapes
from bench.paper.experiment import save_plot
from bench.report import RESULTS, device_name, save, start_report
from jpaged.device.weights import LIMIT_VARIABLE

SCENARIOS: dict[str, Callable[[argparse.Namespace, Shapes], None]] = {
    "restore": restore.measure,
    "decode": scenarios.decode,
    "long": scenarios.long,
    "latency": scenarios.of_paper("latency", scenarios.LATENCY),
    "sweep": scenarios.of_paper("sweep", scenarios.SWEEP),
    "throughput": scenarios.of_paper("throughput", scenarios.THROUGHPUT, weight_placement="host"),
    "peer": scenarios.measure_peer,
}
"""Scenario -> its measurement, which prints a table and gives its results to ``args.keep``, as far as they go."""


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
    add("--num-blocks", type=int, metavar="N", help="blocks of the device pool (default: the scenario's)")
    restore.add_options(parser.add_argument_group("restore"))
    scenarios.add_options(parser.add_argument_group("decode, long, latency, sweep, throughput, peer"))


def run(args: argparse.Namespace) -> int:
    """Measure one scenario and print; the result file is kept current."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    os.environ.setdefault(LIMIT_VARIABLE, "120")
    shapes = read_shapes(args)
    name = args.name or f"offload_{args.scenario}_{shapes.name}_{device_name()}"
    report = start_report(args, model=dataclasses.asdict(shapes.model_config))

    def keep(content: dict[str, Any]) -> None:
        report.update(content)
        save(name, report, args.out)

    args.keep = keep
    SCENARIOS[args.scenario](args, shapes)
    print(f"\nwritten to {(args.out or RESULTS) / name}.json")
    if "variants" in report and (plots := scenarios.plot(report)):
        save_plot(plots, (args.out or RESULTS) / "offload" / f"{name}.png", title=name)
    return 0
