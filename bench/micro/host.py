"""Host time of a plan: schedule it, pack it for the device, update with its tokens. No device is used.

    python -m bench host                                         # 256 sequences
    python -m bench host --num-seqs 32 --profile
    python -m bench host --num-seqs 256 1024 --max-burst 1 4 --against PATH

The real engine, scheduler and block manager run over a made-up runner. It packs each step as for a device, and makes up
its tokens. So only the host's own work is timed, in CPU time of its thread. One step is in flight, as in serving. A
burst is a multi-step decode, as on an accelerator while no request can be admitted.

With several cases, repeats or ``--against`` (a checkout of another commit), every measurement has a process of its own.
The two commits alternate, and the table has medians over the repeats. Writes ``bench/results/host_NAME.json``, or
``host.json`` for several cases or commits.
"""

import argparse
import cProfile
import json
import os
import pstats
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import mean, median
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import numpy as np
from tqdm import tqdm

from bench import UsageError
from bench.report import CONFIGS, Table, current_commit, save, start_report
from bench.workloads import made_up_result
from jpaged import EngineConfig, SamplingParams
from jpaged.contract.layer_groups import LayerGroups
from jpaged.contract.plan import StepPlan
from jpaged.contract.result import StepResult
from jpaged.device.step.inputs import all_buckets
from jpaged.device.step.pack import Packer
from jpaged.engine.loop import Engine
from jpaged.models import ModelConfig, load_config

ROOT = Path(__file__).parents[2]
MAX_MODEL_LEN = 2048
PARTS = "schedule", "update", "pack"
"""The parts that a step cannot do without; "rest" collects the outputs."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    add = parser.add_argument
    add("--num-seqs", type=int, nargs="+", default=[256], metavar="N", help="sequences that decode (default: 256)")
    add("--max-burst", type=int, nargs="+", default=[1], metavar="N", help="steps planned at once (default: 1)")
    add("--num-plans", type=int, default=300, metavar="N", help="plans timed (default: %(default)s)")
    add("--prompt-len", type=int, default=512, metavar="N", help="tokens of each prompt (default: %(default)s)")
    add("--stream", action="store_true", help="stream every token, as a server does, instead of results alone")
    add("--no-prefix-caching", action="store_true", help="without the prefix cache")
    add("--profile", action="store_true", help="print the functions that take the time")
    add("--against", type=Path, metavar="PATH", help="a checkout of another commit, measured in the same run")
    add("--repeats", type=int, metavar="N", help="processes for each case (default: 1, with --against 5)")


def run(args: argparse.Namespace) -> int:
    """Measure, print and save."""
    if args.prompt_len + (args.num_plans + 2) * max(args.max_burst) > MAX_MODEL_LEN:
        raise UsageError(f"--prompt-len and --num-plans: they make sequences of more than {MAX_MODEL_LEN} tokens")
    args.repeats = args.repeats or (1 if args.against is None else 5)
    cases = list(product(args.num_seqs, args.max_burst))
    settings = {
        "num_plans": args.num_plans,
        "prompt_len": args.prompt_len,
        "is_streamed": args.stream,
        "enable_prefix_caching": not args.no_prefix_caching,
    }
    if len(cases) == args.repeats == 1 and args.against is None:
        [(num_seqs, max_burst)] = cases
        timed = _time_steps(args, num_seqs, max_burst)
        rows = {name: median(times) * 1e6 for name, times in timed.items()}
        means = {name: mean(times) * 1e6 for name, times in timed.items()}  # with the plans in which blocks end
        print(render({cases[0]: {"here": [_by_part(rows)]}}))
        case = {"num_seqs": num_seqs, "max_burst": max_burst}
        report = start_report(
            args, **case, **settings, median_us=rows, mean_us=means, step_us=sum(rows.values()) / max_burst
        )
        name = f"host_{num_seqs}" + f"_burst{max_burst}" * (max_burst > 1) + "_stream" * args.stream
        print(f"written to {save(name, report, args.out)}")
        return 0
    if args.profile:
        raise UsageError("--profile takes one case without --against")
    checkouts = {"here": ROOT} | ({} if args.against is None else {"against": args.against})
    measured = {case: {name: [] for name in checkouts} for case in cases}
    for case, _ in tqdm(list(product(cases, range(args.repeats)))):
        for name, checkout in checkouts.items():
            measured[case][name].append(_run_in_process(checkout, args, *case))
    report = start_report(
        args,
        settings=settings | {"repeats": args.repeats},
        commits={name: current_commit(checkout) for name, checkout in checkouts.items()},
        cases=[
            {"num_seqs": num_seqs, "max_burst": max_burst, "median_us": runs}
            for (num_seqs, max_burst), runs in measured.items()
        ],
    )
    print(render(measured))
    print(f"written to {save('host', report, args.out)}")
    return 0


def render(measured: dict[tuple[int, int], dict[str, list[dict[str, float]]]]) -> str:
    """The table, in microseconds a plan: least, median and most over the repeats, and the ratio of the medians.

    Args:
        measured: microseconds by part, of each repeat, by commit and by case (sequences, steps of a burst).
    """
    table = Table("us a plan", "least", "median", "most", "against: least", "median", "most", "ratio", first=40)
    lines = [table.header()]
    for (num_seqs, max_burst), runs in measured.items():
        for title in (*PARTS, "+".join(PARTS), "all"):
            parts = title.split("+")
            sums = {
                name: [sum(us for part, us in each.items() if title == "all" or part in parts) for each in repeats]
                for name, repeats in runs.items()
            }
            cells = [f"{us:,.0f}" for times in sums.values() for us in (min(times), median(times), max(times))]
            if "against" in sums:
                cells.append(f"{median(sums['here']) / median(sums['against']):.2f}")
            lines.append(table.row(f"{num_seqs} rows, burst {max_burst}: {title}", *cells))
    return "\n".join(lines)


def _run_in_process(checkout: Path, args: argparse.Namespace, num_seqs: int, max_burst: int) -> dict[str, float]:
    """Microseconds by part of one case. Commits before ``python -m bench`` have a script with the same options."""
    names = ["bench", "host"] if (checkout / "bench" / "__main__.py").exists() else ["bench.host"]
    options = {"--num-seqs": num_seqs, "--max-burst": max_burst}
    options |= {"--num-plans": args.num_plans, "--prompt-len": args.prompt_len, "--commit": "unknown"}
    command = [sys.executable, "-m", *names, *(str(x) for option in options.items() for x in option)]
    command += ["--stream"] * args.stream + ["--no-prefix-caching"] * args.no_prefix_caching
    environ = os.environ | {"PYTHONPATH": str(checkout.resolve()), "JAX_PLATFORMS": "cpu"}
    with TemporaryDirectory() as directory:
        subprocess.run([*command, "--out", directory], cwd=checkout, env=environ, stdout=subprocess.DEVNULL, check=True)
        [path] = Path(directory).glob("host_*.json")
        return _by_part(json.loads(path.read_text())["median_us"])


def _by_part(rows: dict[str, float]) -> dict[str, float]:
    """Microseconds of ``PARTS`` and of the rest."""
    parts: defaultdict[str, float] = defaultdict(float)
    for name, us in rows.items():
        parts[next((part for part in PARTS if name.startswith(part)), "rest")] += us
    return dict(parts)


@dataclass
class _Runner:
    """The attributes of a ``ModelRunner`` that an engine uses. It packs a step as the real one does.

    ``enqueue`` is to call the packers that ``ModelRunner.enqueue`` calls, and nothing else of the device half.
    """

    config: EngineConfig
    model_config: ModelConfig
    max_model_len: int
    num_blocks: int
    max_burst: int
    timed: dict[str, list[float]]
    max_inter_token_ms = None
    num_host_blocks = 0
    num_window_blocks = 0
    max_streamed_blocks = 0
    host_bytes_per_block = 1
    profile = None
    host_pool = None
    groups = LayerGroups.single()

    def __post_init__(self) -> None:
        self.buckets = all_buckets(self.config.most_rows, self.config.token_budget)
        max_blocks = self.max_model_len // self.config.block_size
        num_rows = self.config.most_rows + 1
        self._packer = Packer(self.buckets, num_rows, max_blocks, self.model_config.vocab_size)
        background = SimpleNamespace(pending=frozenset(), is_over=True)
        self.programs = SimpleNamespace(background=background, usable_buckets=lambda: self.buckets)

    def enqueue(self, plan: StepPlan) -> Any:
        start = time.thread_time()
        self._packer.pack(plan)
        self.timed["pack"].append(time.thread_time() - start)
        return SimpleNamespace(plan=plan)

    def fetch(self, step: Any) -> StepResult:
        return made_up_result(len(step.plan.draws), step.plan.num_steps)


def _time_steps(args: argparse.Namespace, num_seqs: int, max_burst: int) -> dict[str, list[float]]:
    """Seconds of each part, for every plan timed."""
    timed: defaultdict[str, list[float]] = defaultdict(list)
    engine = _make_engine(args, num_seqs, max_burst, timed)
    num_before = 0
    while engine.scheduler.stats().num_waiting or engine.num_output_tokens - num_before < num_seqs:
        num_before = engine.num_output_tokens
        engine.step()
    timed.clear()
    scheduler = engine.scheduler
    scheduler.schedule_ahead = _timing(scheduler.schedule_ahead, timed["schedule"])
    scheduler.update = _timing(scheduler.update, timed["update"])
    engine.runner.enqueue = _timing(engine.runner.enqueue, elsewhere := [])
    engine.runner.fetch = _timing(engine.runner.fetch, elsewhere)
    profile = cProfile.Profile()
    for _ in range(args.num_plans):
        num_before = engine.num_output_tokens
        if args.profile:
            profile.enable()
        started = time.thread_time()
        output = engine.step()
        step_s = time.thread_time() - started
        profile.disable()
        if engine.num_output_tokens - num_before != num_seqs * max_burst:
            raise UsageError(
                f"--num-plans {args.num_plans}: a sequence of {num_seqs} ended at {MAX_MODEL_LEN} tokens while "
                "it was timed: time fewer plans, or shorter prompts"
            )
        assert len(output.deltas) == num_seqs * args.stream
        timed_apart = sum(elsewhere) + timed["schedule"][-1] + timed["update"][-1]
        timed["collect, and the rest"].append(step_s - timed_apart)
        elsewhere.clear()
    if args.profile:
        pstats.Stats(profile).sort_stats("tottime").print_stats(25)
    return timed


def _make_engine(args: argparse.Namespace, num_seqs: int, max_burst: int, timed: dict[str, list[float]]) -> Engine:
    """An engine with as many requests, none of which ends while it is timed."""
    num_blocks = 1 + num_seqs * (MAX_MODEL_LEN // 16)
    config = EngineConfig(
        max_num_seqs=num_seqs,
        max_model_len=MAX_MODEL_LEN,
        num_blocks=num_blocks,
        max_burst=max_burst,
        enable_prefix_caching=not args.no_prefix_caching,
    )
    runner = _Runner(config, load_config(CONFIGS / "llama3-8b"), MAX_MODEL_LEN, num_blocks, max_burst, timed)
    engine = Engine(runner, config)  # pyright: ignore[reportArgumentType]
    random = np.random.default_rng(0)
    params = SamplingParams(temperature=1.0, ignore_eos=True, max_tokens=MAX_MODEL_LEN - args.prompt_len)
    for i in range(num_seqs):
        prompt = random.integers(5, 30_000, args.prompt_len).tolist()
        engine.add(engine.make_request(str(i), {"prompt_token_ids": prompt}, params), is_streamed=args.stream)
    return engine


def _timing[**P, R](call: Callable[P, R], into: list[float]) -> Callable[P, R]:
    def timed(*args: P.args, **kwargs: P.kwargs) -> R:
        start = time.thread_time()
        try:
            return call(*args, **kwargs)
        finally:
            into.append(time.thread_time() - start)

    return timed
