"""The PagedAttention paper's experiments on this repository's scheduler and block manager.

    python -m bench paper                       # all of them: some minutes on two cores
    python -m bench paper --only fig12 fig13    # some
    python -m bench paper --quick               # short traces, for a first look

The scheduler and the block manager run as they are, through traces of requests. Only the device is a model of a
step's time, printed first. The baselines are allocation and batching policies on the same model. Prints every figure
beside the paper's, writes bench/results/paper.json and, with matplotlib, a plot of each to bench/results/paper/. With
--only or --quick nothing is written unless --out is given."""

import argparse
import dataclasses
import multiprocessing
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

from tqdm import tqdm

from bench import workloads
from bench.paper.blocks import FIG18B, FIG19
from bench.paper.experiment import Experiment, Report, render, save_plots, to_json
from bench.paper.latency import FIG12, FIG16, FIG17
from bench.paper.memory import FIG02, FIG13
from bench.paper.paged import MAX_NUM_BATCHED_TOKENS, MAX_NUM_SEQS
from bench.paper.sampling import FIG14, FIG15
from bench.paper.step_time import A100
from bench.report import RESULTS, save, start_report

_ALL = (FIG02, FIG12, FIG13, FIG14, FIG15, FIG16, FIG17, FIG18B, FIG19)
EXPERIMENTS = {experiment.name: experiment for experiment in _ALL}
QUICK_SCALE = 0.3
NUM_PROCESSES = 2


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    names = ", ".join(EXPERIMENTS)
    parser.add_argument("--only", nargs="+", choices=EXPERIMENTS, metavar="FIG", help=f"experiments, of {names}")
    parser.add_argument("--quick", action="store_true", help="traces a third as long: a first look")


def run(args: argparse.Namespace) -> int:
    """Run the experiments, print and save. With --only or --quick files are written to --out alone."""
    experiments = [EXPERIMENTS[name] for name in args.only or EXPERIMENTS]
    scale = QUICK_SCALE if args.quick else 1.0
    print(_describe_setting())
    if args.quick:
        print(f"Quick: every trace lasts {QUICK_SCALE:g} of the time given below, so rates seem sustained that are not")
    print(flush=True)
    start = time.perf_counter()
    reports = run_experiments(experiments, scale)
    elapsed_s = time.perf_counter() - start
    for name, report in reports.items():
        print(render(EXPERIMENTS[name], report))
    print(f"{elapsed_s:.0f} s in all")
    if args.out is not None or not (args.only or args.quick):
        report = start_report(
            args,
            elapsed_s=elapsed_s,
            step_time=dataclasses.asdict(A100),
            experiments={name: to_json(EXPERIMENTS[name], report) for name, report in reports.items()},
        )
        path = save("paper", report, args.out)
        print(f"written to {path}; {save_plots(reports, (args.out or RESULTS) / 'paper')}")
    return 0


def _describe_setting() -> str:
    w = workloads
    return (
        f"{A100.describe()}\n"
        f"jpaged: blocks of 16, {MAX_NUM_SEQS} rows and {MAX_NUM_BATCHED_TOKENS:,} tokens a step at most;\n"
        "  prefix cache off but for fig16, preempted requests recomputed but for fig19\n"
        "Lengths: log-normal, means the paper's, spreads (sigma of the logarithm, in / out) chosen here: "
        f"ShareGPT {w.SHAREGPT_SIGMA_IN:g} / {w.SHAREGPT_SIGMA_OUT:g}, "
        f"Alpaca {w.ALPACA_SIGMA_IN:g} / {w.ALPACA_SIGMA_OUT:g};\n"
        f"  translations {w.TRANSLATION_MEAN_IN:g} / {w.TRANSLATION_MEAN_OUT:g} tokens, {w.TRANSLATION_SIGMA:g}; chats "
        f"of {w.CHAT_MEAN_ROUNDS} rounds of ShareGPT (mean of a geometric) before the question\n"
        "Poisson arrivals, the same for every system; fixed seeds"
    )


def run_experiments(experiments: Sequence[Experiment], scale: float) -> dict[str, Report]:
    """Run the simulations of all experiments in two processes; returns their reports by name."""
    tasks = {experiment.name: experiment.tasks(scale) for experiment in experiments}
    names = [(figure, key) for figure, keyed in tasks.items() for key in keyed]
    # The replays of jpaged are long: they come first, so that none runs alone at the end.
    names.sort(key=lambda name: "Orca" in str(name) or "FasterTransformer" in str(name))
    results: dict[tuple[str, Any], Any] = {}
    with (
        # Spawned and not forked: a caller may run threads (JAX does).
        ProcessPoolExecutor(NUM_PROCESSES, multiprocessing.get_context("spawn")) as pool,
        tqdm(total=len(names), desc="Replaying traces", unit="run") as bar,
    ):
        names_of = {pool.submit(tasks[figure][key]): (figure, key) for figure, key in names}
        for future in as_completed(names_of):
            results[names_of[future]] = future.result()
            bar.update()
    return {e.name: e.report({key: results[e.name, key] for key in tasks[e.name]}) for e in experiments}
