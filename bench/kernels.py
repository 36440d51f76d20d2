"""Attention kernels on the current device: speed beside the peers' and the device's own limits, and correctness.

    python -m bench.kernels             # all shapes, all implementations and peers, one run
    python -m bench.kernels --check     # errors against float64, at real sizes and over all that kernels may take
    python -m bench.kernels --tune      # try kernel sizes, save the best for this device

A program attends several layers of one pool, as a model does: each layer's queries are the outputs of the layer before,
and what does not depend on the layer (a kernel's schedule from the lengths, say) is computed once. All layers together
are far larger than an L2 cache. Times are the device's: long chains of programs less short ones.

The column "limit" is what a time amounts to of the read bandwidth or of the matmul rate, whichever is more, both
measured in the same run: K and V of all contexts read once, visible pairs of query and key multiplied. Peers: JAX's own
paged attention; FlashInfer, if it can be imported; cuDNN, which is not paged and does not count in "peer", the
speed over the best of the others.

Prints a table, writes ``bench/results/kernels_DEVICE.json``.
"""

import argparse
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.attention.shapes import MEASURED, AttentionShape, choose

if TYPE_CHECKING:
    from bench.attention.contenders import Contender
    from bench.attention.report import Table
    from bench.attention.timing import Timing

HERE = Path(__file__).parent
NUM_SAMPLES, NUM_QUICK_SAMPLES = 9, 3


def main(argv: list[str] | None = None) -> int:
    args = _parse(argv)
    if args.check:
        return _check(args)
    return _tune(args) if args.tune else _measure(args)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.kernels", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--check", action="store_true", help="correctness only; exit status 1 if anything is wrong")
    mode.add_argument("--tune", action="store_true", help="kernel sizes only")
    add("--shapes", metavar="WORDS", help="parts of the names of shapes, separated by commas (default: all)")
    add("--implementations", metavar="NAMES", help="of ours and of peers, separated by commas (default: all)")
    add("--no-peers", action="store_true", help="ours alone")
    add("--no-copies", action="store_true", help="without the writes into a large pool")
    add("--pool-gb", type=float, metavar="X", help="size of that pool in 10^9 bytes (default: 60, or what fits)")
    add("--quick", action="store_true", help="fewer repeats; with --check: without the shapes that are measured")
    add("--shrink", type=int, default=1, metavar="N", help="divide batches and lengths, for a slow device")
    add("--profile", type=Path, metavar="DIR", help="trace a run of each of our programs into DIR")
    add("--out", type=Path, default=HERE / "results", help="directory of the result file")
    add("--commit", help="commit to record, where there is no git")
    return parser.parse_args(argv)


def _measure(args: argparse.Namespace) -> int:
    shapes = _shrunk(choose(args.shapes), args)
    # FlashInfer's process has to be gone before this one takes the device's memory.
    peer = _run_flashinfer(args, shapes) if _is_wanted("flashinfer", args) and not args.no_peers else {}
    import jax.numpy as jnp

    from bench.attention.contenders import all_contenders
    from bench.attention.report import Table
    from bench.machine import measure_limits
    from bench.results import environment, save

    limits = measure_limits(jnp.dtype(jnp.bfloat16))
    reads, flops = limits.read_bytes_per_s / 1e12, limits.matmul_flops_per_s / 1e12
    print(f"limits of this device: {reads:.2f} TB/s read, {flops:.0f} TFLOP/s {limits.dtype}\n", flush=True)
    report: dict[str, Any] = {
        "environment": environment(args.commit) | peer.pop("versions", {}),
        "limits": asdict(limits),
        "shrunk_by": args.shrink,
        "shapes": {shape.name: shape.describe() for shape in shapes},
        "copies": [],
        "rows": [],
        "comparisons": {},
    }
    contenders = [c for c in all_contenders() if _is_wanted(c.name, args) and (c.is_ours or not args.no_peers)]
    table = Table(report, limits, lambda: save(f"kernels_{_device_name()}", report, args.out))
    if not args.no_copies:
        _measure_copies(args, table)
    programs = _compile(shapes, contenders)
    table.print_header()
    for shape in shapes:
        table.print_shape(shape)
        if peer:
            table.add_flashinfer(shape, peer[shape.name])
        for contender in contenders:
            _time(contender, shape, programs[shape.name, contender.name], table, args)
    table.compare()
    print(f"\nwritten to {table.save()}")
    return 1 if table.has_failed else 0


def _compile(shapes: list[AttentionShape], contenders: "list[Contender]") -> dict[tuple[str, str], dict[str, Any]]:
    """Programs of each shape and contender by configuration, or exceptions; none where it says beforehand why not."""
    from jax import jit

    from bench.attention.compiling import Source, compile_all
    from bench.attention.contenders import abstract_arguments

    programs: dict[tuple[str, str], dict[str, Any]] = {}
    sources = {}
    for shape in shapes:
        for contender in contenders:
            programs[shape.name, contender.name] = {}
            if contender.why_not(shape) is None:
                arguments = abstract_arguments(contender, shape)
                for configuration, program in contender.programs(shape).items():
                    sources[shape.name, contender.name, configuration] = Source(jit(program), arguments)
    for (shape_name, name, configuration), program in compile_all(sources).items():
        programs[shape_name, name][configuration] = program
    return programs


def _time(
    contender: "Contender", shape: AttentionShape, programs: dict[str, Any], table: "Table", args: argparse.Namespace
) -> None:
    """All its configurations; the fastest counts."""
    from bench.attention.compiling import one_line

    name, is_ours = contender.name, contender.is_ours
    if (reason := contender.why_not(shape)) is not None:
        return table.skip(shape, name, reason)
    timings: dict[str, Timing] = {}
    errors: list[Exception] = []
    for configuration, program in programs.items():
        try:
            timings[configuration] = _time_one(contender, shape, program, args)
        except NotImplementedError as error:
            return table.skip(shape, name, str(error))
        except Exception as error:
            errors.append(error)
    if not timings:
        return table.fail(shape, name, "; ".join(map(one_line, errors)), is_ours=is_ours)
    best = min(timings, key=lambda configuration: timings[configuration].median_s)
    layer = timings[best].divided(contender.num_layers)
    table.add(shape, name, layer, configuration=best, is_ours=is_ours, is_paged=contender.is_paged)


def _time_one(contender: "Contender", shape: AttentionShape, program: Any, args: argparse.Namespace) -> "Timing":
    """Raises what kept the program from being compiled, too."""
    import jax

    from bench.attention.inputs import make_queries
    from bench.attention.timing import time_program

    if isinstance(program, Exception):
        raise program
    rest = contender.make_rest(shape)
    timing, out = time_program(program, make_queries(shape), (rest,), _num_samples(args))
    if not bool(jax.numpy.isfinite(out).all()):
        raise FloatingPointError("outputs are not finite")
    if args.profile is not None and contender.is_ours:
        with jax.profiler.trace(str(args.profile / f"{shape.name}-{contender.name}")):
            program(out, rest).block_until_ready()
    return timing


def _measure_copies(args: argparse.Namespace, table: "Table") -> None:
    from bench.attention.compiling import one_line
    from bench.attention.copies import measure_copies, pool_bytes_that_fit

    wanted = None if args.pool_gb is None else int(args.pool_gb * 1e9)
    try:
        for copy in measure_copies(pool_bytes_that_fit(wanted), _num_samples(args)):
            table.add_copy(copy)
    except Exception as error:  # too little memory, say: attention may still have enough
        table.fail_copies(one_line(error))


def _run_flashinfer(args: argparse.Namespace, shapes: list[AttentionShape]) -> dict[str, Any]:
    """What bench.flashinfer_peer prints of each shape, or why it does not; and its "versions"."""
    command = [sys.executable, "-m", "bench.flashinfer_peer", "--samples", str(_num_samples(args))]
    command += ["--shrink", str(args.shrink), *([] if args.shapes is None else ["--shapes", args.shapes])]
    done = subprocess.run(command, cwd=HERE.parent, stdout=subprocess.PIPE, text=True, check=False)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    results = {line["shape"]: line for line in lines if "shape" in line}
    others = {key: value for line in lines if "shape" not in line for key, value in line.items()}
    missing = others.get("unavailable", f"its process ended with status {done.returncode} and nothing of this shape")
    return {"versions": others.get("versions", {})} | {
        shape.name: results.get(shape.name, {"skipped": missing}) for shape in shapes
    }


def _check(args: argparse.Namespace) -> int:
    """One line for each case and implementation; 1 if any is wrong."""
    import jax

    from bench.attention import check
    from bench.attention.compiling import Source, compile_all, one_line
    from bench.attention.contenders import all_contenders

    measured = [] if args.quick else _shrunk(list(MEASURED), args)
    cases = {case.name: case for case in choose(args.shapes, (*measured, *check.coverage()))}
    names = [c.name for c in all_contenders() if c.is_ours and _is_wanted(c.name, args)]
    sources = {}
    for case in cases.values():
        arguments = jax.eval_shape(lambda case=case: check.make_arguments(case))
        sources |= {(case.name, name): Source(check.program(case, name), arguments) for name in names}
    num_wrong = num_checked = 0
    for (case_name, name), program in compile_all(sources).items():
        verdict = None
        try:
            if isinstance(program, Exception):
                raise program
            verdict = check.examine(cases[case_name], program)
            problem, shown = verdict.problem, f"error {verdict.error:.2e}"
        except NotImplementedError as error:
            print(f"{case_name:72} {name:10} not taken: {error}", flush=True)
            continue
        except Exception as error:
            problem, shown = one_line(error), ""
        num_checked += 1
        num_wrong += problem is not None
        print(f"{case_name:72} {name:10} {shown:15} {'ok' if problem is None else f'WRONG: {problem}'}", flush=True)
    print(f"{num_checked} checked, {num_wrong} wrong")
    return 1 if num_wrong else 0


def _tune(args: argparse.Namespace) -> int:
    from bench.attention.tune import tune
    from bench.results import environment, save

    classes = tune(_shrunk(choose(args.shapes), args), _num_samples(args))
    path = save(
        f"kernel_sizes_{_device_name()}", {"environment": environment(args.commit), "classes": classes}, args.out
    )
    print(f"written to {path}")
    return 0


def _shrunk(shapes: list[AttentionShape], args: argparse.Namespace) -> list[AttentionShape]:
    return [shape.shrunk(args.shrink) for shape in shapes] if args.shrink > 1 else shapes


def _num_samples(args: argparse.Namespace) -> int:
    return NUM_QUICK_SAMPLES if args.quick else NUM_SAMPLES


def _is_wanted(name: str, args: argparse.Namespace) -> bool:
    return args.implementations is None or name in args.implementations.split(",")


def _device_name() -> str:
    import jax

    backend = jax.default_backend()
    return backend if backend == "cpu" else jax.devices()[0].device_kind.lower().replace(" ", "-")


if __name__ == "__main__":
    sys.exit(main())
