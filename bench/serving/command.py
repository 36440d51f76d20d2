"""Throughput, latency of a step and its parts, start-up and memory waste of the whole engine.

    python -m bench serving --device cpu                          # the model in the box, on this machine
    python -m bench serving --random-weights llama3-8b            # the shapes of a real model, on a GPU
    python -m bench serving --random-weights llama3-8b --quick    # a first look: less work, a file of its own
    python -m bench serving --random-weights llama3-8b --warm-start --profile traces
    python -m bench serving --options --device cpu                # the cost of sampling options
    python -m bench serving --random-weights llama3-8b --workloads decode prefill32 sharegpt1000 \\
        --decode-batches 1 32 256 --max-num-seqs 1024 --no-breakdown --name serving_llama3-8b_1024rows

Columns: the figure measured here; the best figure of the peers; the ratio (above 1: better than the peer); the floor
and the fraction of it reached; the same for the floor in turn. The floor is the least time that bytes and FLOPs take at
this device's own rates, measured in the same run; that of a throughput is for the steps it took. No program overlaps
all of them. In turn, attention reads blocks while no product runs. A breakdown divides a step's time: kernels by kind,
from a profile; gaps, in which no kernel runs; and the host's own work, which runs beside the device.

The limit of a workload is that of its timed runs: what it prepares has as much time again. Its seconds of preparation,
timed runs and breakdowns are printed and kept. Without --few-sizes a run waits for the programs of all sizes.

Prints figures as they come and all of them in the end, and keeps ``bench/results/serving_NAME_DEVICE.json`` current. A
workload that fails or runs out of time is recorded, and the next one runs. The exit status is 1 if any failed.
"""

import argparse
import dataclasses
import os
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax.numpy as jnp

from bench import UsageError, machine
from bench.peers import SERVING, serving_figures
from bench.report import CONFIGS, device_name, save, start_report
from bench.serving.clock import TimeIsUp
from bench.serving.demo import measure_model
from bench.serving.figures import Figures, Floor, experts_of
from bench.serving.options import measure_options
from bench.serving.runs import Bench
from bench.serving.scenarios import run_workload
from bench.serving.sizes import FULL, QUICK, WORKLOADS, Sizes
from bench.serving.startup import StartUp, start, start_cold
from jpaged import LLM, EngineConfig
from jpaged.config import DEFAULT_NUM_ROWS, MAX_INTER_TOKEN_MS
from jpaged.device.kv.layout import grouping_of
from jpaged.device.runner import ModelRunner
from jpaged.models import ModelConfig, load_config

DECODE_BATCHES = (1, 32, 128, 256)
PREEMPTIONS = ("swap", "recompute", "auto")
FIXED_WORKLOADS = {"decode", "prefill32"}
"""Workloads whose steps have the sizes of ``--decode-batches``, or the largest."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--model", metavar="DIR", help="a checkpoint (default: the model in the box)")
    known = ", ".join(path.name for path in sorted(CONFIGS.iterdir()))
    shapes = f"random weights in the shapes of a config.json: its directory, or one of {known}"
    source.add_argument("--random-weights", metavar="CONFIG", help=shapes)
    add(
        "--options",
        action="store_true",
        help="the cost of each sampling option, and nothing else",
    )
    add("--quick", action="store_true", help="less work in every workload, and so figures of other names")
    add("--num-blocks", type=int, help="blocks in the pool (default: all that fit)")
    add("--name", help="name of the result file (default: from the model and the device)")
    add = parser.add_argument_group("with --random-weights").add_argument
    add("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS), help="run these, in this order")
    batches = f"batches of the decode workload (default: {' '.join(map(str, DECODE_BATCHES))})"
    add("--decode-batches", nargs="+", type=int, metavar="B", help=batches)
    add(
        "--preemption",
        nargs="+",
        choices=PREEMPTIONS,
        default=list(PREEMPTIONS),
        help="run the sharegpt1000_2048blocks workload under each of these",
    )
    seconds = "seconds after which a timed workload stops with what it has (default: %(default)s)"
    context = f"tokens of the prompts of decode and prefill32; the peers have figures for {FULL.prompt_len} (default)"
    add("--prompt-len", type=int, metavar="N", help=context)
    add("--few-sizes", action="store_true", help="compile only the sizes that decode and prefill32 need")
    add("--limit-s", type=float, default=60.0, metavar="X", help=seconds)
    budget = "seconds after which no further workload starts; the current one stops (default: none)"
    add("--budget-s", type=float, metavar="X", help=budget)
    add("--no-breakdown", action="store_true", help="skip the profiles of steps")
    add("--profile", type=Path, metavar="DIR", help="keep the traces that breakdowns come from")
    add("--warm-start", action="store_true", help="measure a start without a compile cache too, before this one")
    add("--startup-only", action="store_true", help="start, print how long that took, and end")
    add("--host-memory-gib", type=float, default=16.0, metavar="X", help="size of the host pool (default: %(default)s)")
    add("--max-model-len", type=int, default=2048, metavar="N", help="tokens (default: %(default)s)")
    add("--max-num-seqs", type=int, metavar="N", help="rows of a step (default: the engine's)")
    add("--max-num-batched-tokens", type=int, metavar="N", help="tokens of a step (default: the engine's)")
    add("--tensor-parallel-size", type=int, default=1, metavar="N", help="devices that share a model (default: 1)")
    add("--kv-cache-dtype", default="auto", metavar="TYPE", help="auto, fp8 or int8 (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Measure, print and save; 1 if a workload failed."""
    if not args.random_weights and (args.warm_start or args.startup_only):
        raise UsageError("--warm-start and --startup-only need --random-weights")
    most_rows = args.max_num_seqs or DEFAULT_NUM_ROWS
    if args.decode_batches is None:
        args.decode_batches = [batch for batch in DECODE_BATCHES if batch <= most_rows]
    if max(args.decode_batches) > most_rows:
        raise UsageError(f"--decode-batches: at most --max-num-seqs, {most_rows}")
    if args.few_sizes and set(args.workloads) - FIXED_WORKLOADS:
        raise UsageError(f"--few-sizes: give --workloads {' '.join(sorted(FIXED_WORKLOADS))}, or one of them")
    # All-reduces take their scratch outside of the memory that XLA reserves.
    fraction = "0.95" if args.tensor_parallel_size == 1 else "0.85"
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", fraction)
    if args.options:
        name, report = _measure_options(args)
    elif not args.random_weights:
        name, report = measure_model(args)
    else:
        with _cold_start(args) as cold:
            name, report = _measure(args, cold)
    print(f"\nwritten to {save(name, report, args.out)}")
    return 1 if report.get("failed") else 0


@contextmanager
def _cold_start(args: argparse.Namespace) -> Iterator[StartUp | None]:
    """The cold start, if asked for; the programs it compiled are there for the warm one until this ends."""
    if not args.warm_start:
        yield None
        return
    with TemporaryDirectory() as directory:
        cold = start_cold(args, Path(directory))
        args.began = time.perf_counter()
        yield cold


def _measure(args: argparse.Namespace, cold: StartUp | None) -> tuple[str, dict[str, Any]]:
    """Name and content of the result file."""
    jnp.zeros(()).block_until_ready()
    imports_s = time.perf_counter() - args.began
    path, model_config, config = _read_settings(args)
    limits = None if args.startup_only else machine.measure_limits(jnp.dtype(model_config.dtype))
    batches = args.decode_batches if args.few_sizes else None
    llm, startup = start(model_config, config, imports_s, args.tensor_parallel_size, batches)
    print(startup)
    runner, config = llm.engine.runner, llm.engine.config
    name = args.name or f"serving_{path.name}_{device_name()}" + "_quick" * args.quick
    report = start_report(
        args,
        is_quick=args.quick,
        sizes=dataclasses.asdict(_sizes(args)),
        limit_s=args.limit_s,
        model=dataclasses.asdict(model_config),
        dtype=str(runner.dtype),
        weight_bytes=runner.weight_bytes,
        settings=dataclasses.asdict(config)
        | {"num_blocks": runner.num_blocks, "num_host_blocks": runner.num_host_blocks},
        num_programs=len(runner.programs),
        limits=None if limits is None else dataclasses.asdict(limits),
        profile=None if runner.profile is None else dataclasses.asdict(runner.profile),
        startup_s=(cold or startup).total_s,
        startup=dataclasses.asdict(cold or startup),
        startup_warm=None if cold is None else dataclasses.asdict(startup),
        peers={engine: {key: peer[key] for key in ("settings", "source")} for engine, peer in SERVING.items()},
        figures={},
        steps={},
        unfinished=[],
        failed={},
    )
    if limits is not None:
        peers = serving_figures(path.name) if args.prompt_len is None else {}
        figures = Figures(report, peers, lambda: save(name, report, args.out))
        bench = Bench(
            runner,
            config,
            _sizes(args),
            figures,
            _floor(runner, config, limits.of_devices(args.tensor_parallel_size)),
            args.limit_s,
            end=float("inf") if args.budget_s is None else args.began + args.budget_s,
        )
        _run_workloads(args, report, bench)
    return name, report


def _sizes(args: argparse.Namespace) -> Sizes:
    sizes = QUICK if args.quick else FULL
    return sizes if args.prompt_len is None else dataclasses.replace(sizes, prompt_len=args.prompt_len)


def _read_settings(args: argparse.Namespace) -> tuple[Path, ModelConfig, EngineConfig]:
    """The directory of the shapes, the shapes, and the engine's settings."""
    path = named if (named := CONFIGS / args.random_weights).is_dir() else Path(args.random_weights)
    try:
        model_config = load_config(path)
        return (
            path,
            model_config,
            EngineConfig(
                num_blocks=args.num_blocks,
                max_num_seqs=args.max_num_seqs,
                max_num_batched_tokens=args.max_num_batched_tokens,
                max_model_len=min(args.max_model_len, model_config.max_model_len),
                enable_prefix_caching=True,
                kv_cache_dtype=args.kv_cache_dtype,
                # With few sizes a chunk below the bound would be padded to the largest.
                max_inter_token_ms=MAX_INTER_TOKEN_MS if args.few_sizes else None,
                host_memory_bytes=int(args.host_memory_gib * 2**30),
            ),
        )
    except ValueError as error:
        raise UsageError(str(error)) from error


def _measure_options(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Name and content of the result file of ``--options``."""
    if args.random_weights:
        _, model_config, config = _read_settings(args)
        llm, _ = start(model_config, config, 0.0, args.tensor_parallel_size)
    else:
        llm = LLM(
            args.model,
            max_num_seqs=32,
            max_num_batched_tokens=256,
            num_blocks=args.num_blocks,
            enable_prefix_caching=False,
        )
        llm.engine.runner.programs.background.wait()
    return measure_options(llm, args)


def _floor(runner: ModelRunner, config: EngineConfig, limits: machine.MachineLimits) -> Floor:
    model, item_bytes = runner.model_config, runner.dtype.itemsize
    return Floor(
        limits,
        weight_bytes=runner.weight_bytes,
        embedding_bytes=model.vocab_size * model.hidden_size * item_bytes,
        has_tied_logits=model.tie_word_embeddings,
        weight_item_bytes=item_bytes,
        bytes_per_block=runner.bytes_per_block,
        block_size=config.block_size,
        experts=experts_of(model, runner.dtype),
        windows=tuple(spec.sliding_window for spec in model.layer_specs),
        layers_per_block=grouping_of(model, config).groups.layers_per_block,
    )


def _run_workloads(args: argparse.Namespace, report: dict[str, Any], bench: Bench) -> None:
    """Run all workloads asked for; the report is filled and saved on the way."""
    runner, figures = bench.runner, bench.figures
    print(bench.floor.limits)
    print(f"{runner.num_blocks:,} blocks, {runner.num_host_blocks:,} in host memory, {len(runner.programs)} programs")
    figures.print_header()
    figures.add("startup_s", report["startup_s"], lower_is_better=True)
    if report["startup_warm"] is not None:
        figures.add("startup_warm_s", report["startup_warm"]["total_s"], lower_is_better=True)
    began = time.perf_counter()
    bench.load_programs()
    now = time.perf_counter()
    startup = report["startup_warm"] or report["startup"]
    seconds = {"imports": startup["imports_s"], "programs made": startup["all_programs_s"], "loaded": now - began}
    figures.add_seconds("before the workloads", seconds | {"total": now - args.began})
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
        figures.save()
    figures.print_all()


def preset_names() -> list[str]:
    """Shapes with a peer's figures; the other configs are of models that one GPU does not hold."""
    return sorted(path.name for path in CONFIGS.iterdir() if serving_figures(path.name))
