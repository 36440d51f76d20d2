"""Attention kernels on the current device: speed beside the peers' and the device's own limits, and correctness.

    python -m bench kernels             # all shapes, all implementations and peers, one run
    python -m bench kernels --check     # errors against float64, at real sizes and over all that kernels may take;
                                        # writes, copies and norms against XLA's; keeps kernels_check_DEVICE.json
    python -m bench kernels --tune      # try kernel sizes, save the best for this device

A program attends several layers of one pool, as a model does. Each layer's queries are the outputs of the layer before.
Work that does not depend on the layer (a kernel's schedule from the lengths, say) is done once. All layers together are
far larger than an L2 cache. Times are the device's: long chains of programs less short ones.

The column "limit" is the fraction reached of the read bandwidth or of the matmul rate, the larger of the two. Both
rates are measured in the same run; K and V of all contexts are read once, and visible pairs of query and key are
multiplied. Peers: JAX's own paged attention; FlashInfer, if it can be imported; cuDNN, which is not paged. The column
"peer" is the speed over the best paged peer.

Prints a table, writes ``bench/results/kernels_DEVICE.json``.
"""

import argparse
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from bench import machine
from bench.kernels import copies, timing
from bench.kernels.checking import run_check
from bench.kernels.compiling import Source, compile_all, one_line
from bench.kernels.contenders import Contender, abstract_arguments, all_contenders
from bench.kernels.inputs import make_queries
from bench.kernels.shapes import AttentionShape, choose
from bench.kernels.table import Rows
from bench.kernels.tune import tune
from bench.report import device_name, save, start_report

NUM_SAMPLES, NUM_QUICK_SAMPLES = 9, 3


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    add = parser.add_argument
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--check", action="store_true", help="correctness only; exit status 1 if anything is wrong")
    mode.add_argument("--tune", action="store_true", help="kernel sizes only")
    add(
        "--shapes",
        metavar="WORDS",
        help="parts of names of shapes (--check: of cases), separated by commas",
    )
    add("--implementations", metavar="NAMES", help="ours and peers, separated by commas (default: all)")
    add(
        "--no-copies",
        action="store_true",
        help="without writes into a pool; --check: without norms too",
    )
    add("--pool-gb", type=float, metavar="X", help="size of that pool in 10^9 bytes (default: at most 60)")
    add("--quick", action="store_true", help="fewer repeats; with --check: without the shapes that are measured")
    add("--shrink", type=int, default=1, metavar="N", help="divide batches and lengths, for a slow device")


def run(args: argparse.Namespace) -> int:
    """Measure, check or tune; 1 if anything of ours is wrong or broke."""
    if args.check:
        return run_check(args)
    if args.tune:
        classes = tune(_shrunk(choose(args.shapes), args), _num_samples(args))
        report = start_report(args, classes=classes)
        print(f"written to {save(f'kernel_sizes_{device_name()}', report, args.out)}")
        return 0
    return _measure(args)


def _measure(args: argparse.Namespace) -> int:
    shapes = _shrunk(choose(args.shapes), args)
    # FlashInfer's process has to end before this one takes the device's memory.
    peer = _run_flashinfer(args, shapes) if _is_wanted("flashinfer", args) else {}
    limits = machine.measure_limits(jnp.dtype(jnp.bfloat16))
    print(f"{limits}\n", flush=True)
    report = start_report(
        args,
        limits=asdict(limits),
        shrunk_by=args.shrink,
        shapes={shape.name: shape.describe() for shape in shapes},
        copies=[],
        rows=[],
        comparisons={},
    )
    report["environment"] |= peer.pop("versions", {})
    contenders = [c for c in all_contenders() if _is_wanted(c.name, args)]
    rows = Rows(report, limits, lambda: save(f"kernels_{device_name()}", report, args.out))
    if not args.no_copies:
        _measure_copies(args, rows)
    programs = _compile(shapes, contenders)
    rows.print_header()
    for shape in shapes:
        rows.print_shape(shape)
        if peer:
            rows.add_flashinfer(shape, peer[shape.name])
        for contender in contenders:
            _time(contender, shape, programs[shape.name, contender.name], rows, args)
    rows.compare()
    print(f"\nwritten to {rows.save()}")
    return 1 if rows.has_failed else 0


def _compile(shapes: list[AttentionShape], contenders: list[Contender]) -> dict[tuple[str, str], dict[str, Any]]:
    """Programs, or exceptions, by shape and contender and then by configuration; none if the contender refuses."""
    programs: dict[tuple[str, str], dict[str, Any]] = {}
    sources = {}
    for shape in shapes:
        for contender in contenders:
            programs[shape.name, contender.name] = {}
            if contender.why_not(shape) is None:
                arguments = abstract_arguments(contender, shape)
                for configuration, program in contender.programs(shape).items():
                    sources[shape.name, contender.name, configuration] = Source(program, arguments)
    for (shape_name, name, configuration), program in compile_all(sources).items():
        programs[shape_name, name][configuration] = program
    return programs


def _time(
    contender: Contender, shape: AttentionShape, programs: dict[str, Any], rows: Rows, args: argparse.Namespace
) -> None:
    """Time all configurations of a contender; the fastest counts."""
    name, is_ours = contender.name, contender.is_ours
    if (reason := contender.why_not(shape)) is not None:
        return rows.skip(shape, name, reason)
    timings: dict[str, timing.Timing] = {}
    errors: list[Exception] = []
    for configuration, program in programs.items():
        try:
            timings[configuration] = _time_one(contender, shape, program, args)
        except NotImplementedError as error:
            return rows.skip(shape, name, str(error))
        except Exception as error:
            errors.append(error)
    if not timings:
        return rows.fail(shape, name, "; ".join(map(one_line, errors)), is_ours=is_ours)
    best = min(timings, key=lambda configuration: timings[configuration].median_s)
    layer = timings[best].divided(contender.num_layers)
    rows.add(shape, name, layer, configuration=best, is_ours=is_ours, is_paged=contender.is_paged)


def _time_one(contender: Contender, shape: AttentionShape, program: Any, args: argparse.Namespace) -> timing.Timing:
    """Time one program. Raises the exception that took its place, too."""
    if isinstance(program, Exception):
        raise program
    rest = contender.make_rest(shape)
    timed, out = timing.time_program(program, make_queries(shape), (rest,), _num_samples(args))
    if not bool(jnp.isfinite(out).all()):
        raise FloatingPointError("outputs are not finite")
    return timed


def _measure_copies(args: argparse.Namespace, rows: Rows) -> None:
    wanted = None if args.pool_gb is None else int(args.pool_gb * 1e9)
    try:
        for copy in copies.measure_copies(copies.pool_bytes_that_fit(wanted), _num_samples(args)):
            rows.add_copy(copy)
    except Exception as error:  # too little memory, say: attention may still have enough
        rows.fail_copies(one_line(error))


def _run_flashinfer(args: argparse.Namespace, shapes: list[AttentionShape]) -> dict[str, Any]:
    """The results of bench.peers.run_flashinfer by shape, or the reason why there is none; and its "versions"."""
    command = [sys.executable, "-m", "bench.peers.run_flashinfer", "--samples", str(_num_samples(args))]
    command += ["--shrink", str(args.shrink), *([] if args.shapes is None else ["--shapes", args.shapes])]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True, check=False)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    results = {line["shape"]: line for line in lines if "shape" in line}
    others = {key: value for line in lines if "shape" not in line for key, value in line.items()}
    missing = others.get("unavailable", f"its process ended with status {done.returncode} and nothing of this shape")
    return {"versions": others.get("versions", {})} | {
        shape.name: results.get(shape.name, {"skipped": missing}) for shape in shapes
    }


def _shrunk(shapes: list[AttentionShape], args: argparse.Namespace) -> list[AttentionShape]:
    return [shape.shrunk(args.shrink) for shape in shapes] if args.shrink > 1 else shapes


def _num_samples(args: argparse.Namespace) -> int:
    return NUM_QUICK_SAMPLES if args.quick else NUM_SAMPLES


def _is_wanted(name: str, args: argparse.Namespace) -> bool:
    return args.implementations is None or name in args.implementations.split(",")
