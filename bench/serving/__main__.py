"""Serving throughput, latency of a step and what it is made of, start-up and memory waste of the whole engine.

    python -m bench.serving --device cpu                          # the model in the box, on this machine
    python -m bench.serving --random-weights llama3-8b            # the shapes of a real model, on a GPU
    python -m bench.serving --random-weights llama3-8b --quick    # a first look: less work, a file of its own
    python -m bench.serving --random-weights llama3-8b --warm-start --profile traces

Columns: what was measured here, the peer's figure, the ratio (above 1: better than the peer), the floor (least time
from bytes and FLOPs at this device's own rates, measured in the same run; of a throughput: for the steps it took) and
the fraction of it reached. A breakdown says what a step's time goes to: kernels by kind, from a profile; gaps, in which
no kernel runs; and the host's own work, which runs beside the device.

Prints as it goes and once more in the end, and keeps ``bench/results/serving_NAME_DEVICE.json`` current. A workload
that fails or runs out of time is recorded as such, and the next one runs; the exit status is 1 if any failed.
"""

import argparse
import dataclasses
import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bench import peers
from bench.serving.cold_start import start_cold
from bench.serving.sizes import FULL, QUICK, WORKLOADS

HERE = Path(__file__).parents[1]
DECODE_BATCHES = (1, 32, 128, 256)
PREEMPTIONS = ("swap", "recompute", "auto")


def main(argv: list[str] | None = None) -> int:
    began = time.perf_counter()
    argv = sys.argv[1:] if argv is None else argv
    parser = _parser()
    args = parser.parse_args(argv)
    if not args.random_weights and (args.warm_start or args.startup_only):
        parser.error("--warm-start and --startup-only need --random-weights")
    if args.decode_batches is None:
        args.decode_batches = [batch for batch in DECODE_BATCHES if batch <= args.max_num_seqs]
    if max(args.decode_batches) > args.max_num_seqs:
        parser.error(f"--decode-batches: at most --max-num-seqs, {args.max_num_seqs}")
    if args.device == "cpu":
        os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    try:
        with _cold_start(args, argv) as cold:
            report = _measure(args, cold, began if cold is None else time.perf_counter())
    except ValueError as error:
        parser.error(str(error))
    from bench.results import save

    path = save(report.pop("file"), report, args.out)
    print(f"\nwritten to {path}")
    return 1 if report.get("failed") else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.serving",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--device", choices=("auto", "cpu"), default="auto", help="cpu keeps JAX off any accelerator")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--model", metavar="DIR", help="a checkpoint (default: the model in the box)")
    presets = ", ".join(_preset_names())
    shapes = f"random weights in the shapes of a config.json: its directory, or one of {presets}"
    source.add_argument("--random-weights", metavar="CONFIG", help=shapes)
    add("--quick", action="store_true", help="less work in every workload, and so figures of other names")
    add("--num-blocks", type=int, help="blocks in the pool (default: what fits)")
    add("--out", type=Path, default=HERE / "results", help="directory of the result file")
    add("--name", help="name of the result file (default: from the model and the device)")
    add("--commit", help="commit to record, where there is no git")
    group = parser.add_argument_group("with --random-weights")
    add = group.add_argument
    add("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS), help="which to run, in this order")
    batches = f"of the decode workload (default: {' '.join(map(str, DECODE_BATCHES))})"
    add("--decode-batches", nargs="+", type=int, metavar="B", help=batches)
    add(
        "--preemption",
        nargs="+",
        choices=PREEMPTIONS,
        default=list(PREEMPTIONS),
        help="of the sharegpt1000_2048blocks workload: under which to run it",
    )
    seconds = "seconds of a workload, after which it stops with what it has (default: %(default)s)"
    add("--limit-s", type=float, default=60.0, metavar="X", help=seconds)
    add("--profile", type=Path, metavar="DIR", help="keep the traces that breakdowns come from")
    add("--warm-start", action="store_true", help="measure a start without a compile cache too, before this one")
    add("--startup-only", action="store_true", help="start, say how long that took, and end")
    add("--host-memory-gib", type=float, default=16.0, metavar="X", help="size of the host pool (default: %(default)s)")
    add("--max-model-len", type=int, default=2048, metavar="N", help="tokens (default: %(default)s)")
    add("--max-num-seqs", type=int, default=256, metavar="N", help="rows of a step (default: %(default)s)")
    add("--max-num-batched-tokens", type=int, metavar="N", help="tokens of a step (default: the engine's)")
    return parser


@contextmanager
def _cold_start(args: argparse.Namespace, argv: list[str]) -> Iterator[dict[str, Any] | None]:
    """The cold start, if asked for; what it compiled is there for the warm one until this ends."""
    if not args.warm_start:
        yield None
        return
    with TemporaryDirectory() as directory:
        yield start_cold([each for each in argv if each != "--warm-start"], Path(directory))


def _measure(args: argparse.Namespace, cold: dict[str, Any] | None, began: float) -> dict[str, Any]:
    """The report of a run, and under "file" its name. ``began``: when the imports did."""
    if not args.random_weights:
        from bench.serving.demo import measure_model

        return measure_model(args, _platform())
    import jax.numpy as jnp

    from bench.machine import measure_limits
    from bench.results import environment, save
    from bench.serving.startup import start
    from jpaged import EngineConfig
    from jpaged.models import load_config

    jnp.zeros(()).block_until_ready()
    imports_s = time.perf_counter() - began
    path = HERE / "configs" / args.random_weights
    if args.random_weights not in _preset_names():
        path = Path(args.random_weights)
    model_config = load_config(path)
    config = EngineConfig(
        num_blocks=args.num_blocks,
        max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=args.max_num_batched_tokens,
        max_model_len=min(args.max_model_len, model_config.max_model_len),
        enable_prefix_caching=True,
        host_memory_bytes=int(args.host_memory_gib * 2**30),
    )
    for preemption in args.preemption:
        dataclasses.replace(config, preemption=preemption)  # refused now rather than when its turn comes
    limits = None if args.startup_only else measure_limits(jnp.dtype(model_config.dtype))
    llm, startup = start(model_config, config, imports_s)
    print(startup)
    runner = llm.engine.runner
    report: dict[str, Any] = {
        "file": args.name or f"serving_{path.name}_{_platform()}" + "_quick" * args.quick,
        "environment": environment(args.commit),
        "is_quick": args.quick,
        "sizes": dataclasses.asdict(QUICK if args.quick else FULL),
        "limit_s": args.limit_s,
        "model": dataclasses.asdict(model_config),
        "dtype": str(runner.dtype),
        "weight_bytes": runner.weight_bytes,
        "settings": dataclasses.asdict(config)
        | {"num_blocks": runner.num_blocks, "num_host_blocks": runner.num_host_blocks},
        "num_programs": len(runner.programs),
        "limits": None if limits is None else dataclasses.asdict(limits),
        "costs": None if runner.costs is None else dataclasses.asdict(runner.costs),
        "startup_s": startup.total_s if cold is None else cold["total_s"],
        "startup": dataclasses.asdict(startup) if cold is None else cold,
        "startup_warm": None if cold is None else dataclasses.asdict(startup),
        "peers": {
            name: {"settings": peer["settings"], "source": peer["source"]} for name, peer in peers.SERVING.items()
        },
        "figures": {},
        "steps": {},
        "unfinished": [],
        "failed": {},
    }
    if limits is not None:
        figures = peers.serving_figures(path.name)
        _run_workloads(args, report, llm, limits, figures, lambda: save(report["file"], report, args.out))
    return report


def _run_workloads(
    args: argparse.Namespace,
    report: dict[str, Any],
    llm: Any,
    limits: Any,
    peer_figures: dict[str, dict[str, float]],
    save: Any,
) -> None:
    """All that were asked for; the report is filled and saved on the way."""
    from bench.serving.figures import Figures, Floor
    from bench.serving.runs import Bench, TimeIsUp
    from bench.serving.scenarios import run_workload

    runner, config = llm.engine.runner, llm.engine.config
    model = runner.model_config
    item_bytes = runner.dtype.itemsize
    floor = Floor(
        limits,
        weight_bytes=runner.weight_bytes,
        embedding_bytes=model.vocab_size * model.hidden_size * item_bytes,
        has_tied_logits=model.tie_word_embeddings,
        weight_item_bytes=item_bytes,
        bytes_per_block=runner.bytes_per_block,
        block_size=config.block_size,
    )
    reads, flops = limits.read_bytes_per_s / 1e12, limits.matmul_flops_per_s / 1e12
    print(f"limits of this device: {reads:.2f} TB/s read, {flops:.0f} TFLOP/s {limits.dtype}")
    print(f"{runner.num_blocks:,} blocks, {runner.num_host_blocks:,} in host memory, {len(runner.programs)} programs")
    figures = Figures(report, peer_figures, save)
    figures.print_header()
    figures.add("startup_s", report["startup_s"], lower_is_better=True)
    if report["startup_warm"] is not None:
        figures.add("startup_warm_s", report["startup_warm"]["total_s"], lower_is_better=True)
    bench = Bench(runner, config, QUICK if args.quick else FULL, figures, floor, args.limit_s)
    bench.load_programs()
    for workload in args.workloads:
        try:
            run_workload(workload, bench, args)
        except TimeIsUp:
            report["unfinished"].append(workload)
            print(f"{workload}: NOT FINISHED within {args.limit_s:g} s")
        except Exception as error:  # the others may still be measured
            report["failed"][workload] = f"{type(error).__name__}: {error}"
            traceback.print_exc()
            print(f"{workload}: FAILED: {error}")
        save()
    figures.print_all()


def _preset_names() -> list[str]:
    """Shapes with a peer's figures; other configs are of models that one GPU does not hold."""
    return sorted(path.name for path in (HERE / "configs").iterdir() if peers.serving_figures(path.name))


def _platform() -> str:
    import jax

    backend = jax.default_backend()
    return backend if backend == "cpu" else jax.devices()[0].device_kind.lower().replace(" ", "-")


if __name__ == "__main__":
    sys.exit(main())
