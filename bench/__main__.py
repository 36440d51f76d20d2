"""``python -m bench NAME``: the benchmarks by name, and the options that they share."""

import argparse
import importlib
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from bench import UsageError


@dataclass(frozen=True, slots=True)
class Benchmark:
    """One benchmark.

    Args:
        module: has ``add_options(parser)`` and ``run(args) -> exit status``; its docstring is the help.
        line: its description in the list.
        is_on_host: whether it runs on the CPU alone, on any machine.
    """

    module: str
    line: str
    is_on_host: bool = False


BENCHMARKS = {
    "serving": Benchmark("bench.serving.command", "throughput, step latency, start-up and waste of the whole engine"),
    "serve": Benchmark("bench.http.command", "the HTTP server under load, in a long run, and under invalid requests"),
    "sharing": Benchmark("bench.serving.sharing", "blocks saved by sharing, beside the paper's figure 15"),
    "offload": Benchmark("bench.offload.command", "KV in host memory: restores of preempted requests"),
    "kernels": Benchmark("bench.kernels.command", "attention kernels: speed, correctness (--check), sizes (--tune)"),
    "experts": Benchmark("bench.micro.experts", "one layer of a mixture of experts, computed in each of its ways"),
    "kv-quantization": Benchmark("bench.micro.kv_quantization", "8-bit KV: divergence and capacity", True),
    "host": Benchmark("bench.micro.host", "host time of a plan, --against that of another commit", True),
    "calls": Benchmark("bench.micro.calls", "calls, functions and types of one request through LLM.generate", True),
    "paper": Benchmark("bench.paper.command", "the PagedAttention paper's experiments, simulated", True),
    "replay": Benchmark("bench.replay.command", "admission under pressure, and padding of steps, simulated", True),
    "tpu-plan": Benchmark("bench.tpu.plan", "bytes and time of the TPU attention kernel, computed", True),
    "tpu-models": Benchmark("bench.tpu.models", "whole models compiled for TPUs: memory, collectives; computed", True),
}


def main(argv: list[str] | None = None) -> int:
    began = time.perf_counter()
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] not in BENCHMARKS:
        print("usage: python -m bench NAME [options]; python -m bench NAME --help\n")
        print("\n".join(f"  {name:16} {benchmark.line}" for name, benchmark in BENCHMARKS.items()))
        return 0 if argv in ([], ["-h"], ["--help"]) else 2
    benchmark = BENCHMARKS[argv[0]]
    module = importlib.import_module(benchmark.module)
    parser = argparse.ArgumentParser(
        prog=f"python -m bench {argv[0]}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    if not benchmark.is_on_host:
        add("--device", choices=("auto", "cpu"), default="auto", help="cpu keeps JAX off any accelerator")
    add("--out", type=Path, metavar="DIR", help="directory of the result file (default: bench/results)")
    add("--commit", help="commit to record, where there is no git")
    parser.set_defaults(began=began, argv=argv)
    module.add_options(parser)
    args = parser.parse_args(argv[1:])
    if benchmark.is_on_host or args.device == "cpu":
        import jax

        jax.config.update("jax_platforms", "cpu")
    try:
        return module.run(args)
    except UsageError as error:
        parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
