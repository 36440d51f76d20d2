"""Host time of a plan: schedule it, pack it for the device, update with its tokens. No device is used.

    python -m bench host                                         # 256 sequences
    python -m bench host --num-seqs 32 --profile
    python -m bench host --num-seqs 256 1024 --max-burst 1 4 --num-beams 256 --num-prompts 8 --against PATH

The real engine, scheduler and block manager run over a made-up runner. It packs each step as for a device, and makes up
its tokens. So only the host's own work is timed, in CPU time of its thread. One step is in flight, as in serving. A
burst is a multi-step decode, as on an accelerator while no request can be admitted. Searches have a width of 4 and are
never over; ``bench.paper.beams`` draws their candidates. Prompts are computed whole, and draw one token.

With several cases, repeats or ``--against`` (a checkout of another commit), every measurement has a process of its own.
The two commits alternate, and the table has medians over the repeats. Writes ``bench/results/host_NAME.json``, or
``host.json`` for several cases or commits.
"""

import argparse
import cProfile
import json
import math
import os
import pstats
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count, islice, product
from pathlib import Path
from statistics import mean, median
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from bench import UsageError
from bench.paper.beams import DEFAULT_CANDIDATES, CandidateSource
from bench.report import CONFIGS, Table, current_commit, save, start_report
from bench.workloads import made_up_result
from jpaged import BeamSearchParams, EngineConfig, SamplingParams
from jpaged.contract.layer_groups import LayerGroups
from jpaged.contract.plan import StepPlan
from jpaged.contract.result import StepResult
from jpaged.device.step.inputs import all_buckets
from jpaged.device.step.pack import Packer
from jpaged.engine.loop import Engine
from jpaged.models import ModelConfig, load_config
from jpaged.request import Request

ROOT = Path(__file__).parents[2]
MAX_MODEL_LEN, BEAM_WIDTH = 2048, 4
NUM_POOLED = 4
"""Steps of prompts whose blocks the pool holds: a running server evicts blocks for new prompts."""
PARTS = "schedule", "update", "pack"
"""The parts that a step cannot do without; "rest" collects the outputs."""


class Case(NamedTuple):
    """One measurement.

    Args:
        work: "rows" that decode, "beams" or "prompts".
        num_seqs: how many of these a step computes.
        max_burst: steps planned at once.
    """

    work: str
    num_seqs: int
    max_burst: int = 1

    @property
    def title(self) -> str:
        """The name in the table."""
        return f"{self.num_seqs} {self.work}" + f", burst {self.max_burst}" * (self.work == "rows")

    @property
    def file_name(self) -> str:
        """The name of the result file."""
        kind = f"_{self.work}" * (self.work != "rows") + f"_burst{self.max_burst}" * (self.max_burst > 1)
        return f"host_{self.num_seqs}{kind}"

    @property
    def options(self) -> list[str]:
        """The options that ask for it."""
        name = {"rows": "--num-seqs", "beams": "--num-beams", "prompts": "--num-prompts"}[self.work]
        burst = ["--max-burst", str(self.max_burst)] if self.work == "rows" else []
        return [name, str(self.num_seqs), *burst]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    add = parser.add_argument
    add("--num-seqs", type=int, nargs="+", metavar="N", help="sequences that decode (default, without others: 256)")
    add("--max-burst", type=int, nargs="+", default=[1], metavar="N", help="steps planned at once (default: 1)")
    add("--num-beams", type=int, nargs="+", default=[], metavar="N", help=f"beams, {BEAM_WIDTH} of each search")
    add("--num-prompts", type=int, nargs="+", default=[], metavar="N", help="prompts that a step computes")
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
    if any(number % BEAM_WIDTH for number in args.num_beams):
        raise UsageError(f"--num-beams {args.num_beams}: give multiples of {BEAM_WIDTH}, the width of a search")
    args.repeats = args.repeats or (1 if args.against is None else 5)
    cases = _cases(args)
    settings = {
        "num_plans": args.num_plans,
        "prompt_len": args.prompt_len,
        "is_streamed": args.stream,
        "enable_prefix_caching": not args.no_prefix_caching,
    }
    if len(cases) == args.repeats == 1 and args.against is None:
        [case] = cases
        timed = _time_steps(args, case)
        rows = {name: median(times) * 1e6 for name, times in timed.items()}
        means = {name: mean(times) * 1e6 for name, times in timed.items()}  # with the plans in which blocks end
        print(render({case: {"here": [_by_part(rows)]}}))
        step_us = sum(rows.values()) / case.max_burst
        report = start_report(args, **case._asdict(), **settings, median_us=rows, mean_us=means, step_us=step_us)
        print(f"written to {save(case.file_name + '_stream' * args.stream, report, args.out)}")
        return 0
    if args.profile:
        raise UsageError("--profile takes one case without --against")
    checkouts = {"here": ROOT} | ({} if args.against is None else {"against": args.against})
    measured = {case: {name: [] for name in checkouts} for case in cases}
    for case, _ in tqdm(list(product(cases, range(args.repeats)))):
        for name, checkout in checkouts.items():
            measured[case][name].append(_run_in_process(checkout, args, case))
    report = start_report(
        args,
        settings=settings | {"repeats": args.repeats},
        commits={name: current_commit(checkout) for name, checkout in checkouts.items()},
        cases=[case._asdict() | {"median_us": runs} for case, runs in measured.items()],
    )
    print(render(measured))
    print(f"written to {save('host', report, args.out)}")
    return 0


def _cases(args: argparse.Namespace) -> list[Case]:
    num_seqs = args.num_seqs or ([] if args.num_beams or args.num_prompts else [256])
    rows = [Case("rows", *sizes) for sizes in product(num_seqs, args.max_burst)]
    beams = [Case("beams", number) for number in args.num_beams]
    return rows + beams + [Case("prompts", number) for number in args.num_prompts]


def render(measured: dict[Case, dict[str, list[dict[str, float]]]]) -> str:
    """The table, in microseconds a plan: least, median and most over the repeats, and the ratio of the medians.

    Args:
        measured: microseconds by part, of each repeat, by commit and by case.
    """
    table = Table("us a plan", "least", "median", "most", "against: least", "median", "most", "ratio", first=40)
    lines = [table.header()]
    for case, runs in measured.items():
        for title in (*PARTS, "+".join(PARTS), "all"):
            parts = title.split("+")
            sums = {
                name: [sum(us for part, us in each.items() if title == "all" or part in parts) for each in repeats]
                for name, repeats in runs.items()
            }
            cells = [f"{us:,.0f}" for times in sums.values() for us in (min(times), median(times), max(times))]
            if "against" in sums:
                cells.append(f"{median(sums['here']) / median(sums['against']):.2f}")
            lines.append(table.row(f"{case.title}: {title}", *cells))
    return "\n".join(lines)


def _run_in_process(checkout: Path, args: argparse.Namespace, case: Case) -> dict[str, float]:
    """Microseconds by part of one case. Commits before ``python -m bench`` have a script with the same options."""
    names = ["bench", "host"] if (checkout / "bench" / "__main__.py").exists() else ["bench.host"]
    options = {"--num-plans": args.num_plans, "--prompt-len": args.prompt_len, "--commit": "unknown"}
    command = [sys.executable, "-m", *names, *case.options, *(str(x) for option in options.items() for x in option)]
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
    spent: "defaultdict[str, float]"
    candidates: CandidateSource = field(default_factory=lambda: CandidateSource(DEFAULT_CANDIDATES))
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
        self.programs = SimpleNamespace(
            background=background, usable_buckets=lambda: self.buckets, least_shared_tokens=math.inf
        )

    def enqueue(self, plan: StepPlan) -> Any:
        start = time.thread_time()
        self._packer.pack(plan)
        self.spent["pack"] += time.thread_time() - start
        return SimpleNamespace(plan=plan)

    def fetch(self, step: Any) -> StepResult:
        plan = step.plan
        return made_up_result(len(plan.draws), plan.num_steps, self.candidates.choose(plan.beams))


def _time_steps(args: argparse.Namespace, case: Case) -> dict[str, list[float]]:
    """Seconds of each part, for every plan timed."""
    timed: defaultdict[str, list[float]] = defaultdict(list)
    spent: defaultdict[str, float] = defaultdict(float)
    engine = _make_engine(args, case, spent)
    requests = _requests(args, case, engine)
    num_added = case.num_seqs // BEAM_WIDTH if case.work == "beams" else case.num_seqs
    if case.work == "prompts":  # those of the step in flight, and of the next
        _add(engine, requests, num_added, args)
    _add(engine, requests, num_added, args)
    num_before = 0
    while engine.scheduler.stats().num_waiting or engine.num_output_tokens - num_before < case.num_seqs:
        num_before = engine.num_output_tokens
        engine.step()
    for owner, name in (
        (engine.scheduler, "schedule"),
        (engine.scheduler, "schedule_ahead"),
        (engine.scheduler, "update"),
        (engine.runner, "enqueue"),
        (engine.runner, "fetch"),
    ):
        setattr(owner, name, _timing(getattr(owner, name), spent, name.removesuffix("_ahead")))
    profile = cProfile.Profile()
    for _ in range(args.num_plans):
        if case.work == "prompts":
            _add(engine, requests, num_added, args)
        num_before = engine.num_output_tokens
        spent.clear()
        if args.profile:
            profile.enable()
        started = time.thread_time()
        output = engine.step()
        step_s = time.thread_time() - started
        profile.disable()
        if engine.num_output_tokens - num_before != case.num_seqs * case.max_burst:
            raise UsageError(
                f"--num-plans {args.num_plans}: a sequence of {case.num_seqs} ended at {MAX_MODEL_LEN} tokens while "
                "it was timed: time fewer plans, or shorter prompts"
            )
        assert len(output.deltas) == case.num_seqs * args.stream * (case.work != "beams")
        for part in PARTS:
            timed[part].append(spent[part])
        timed_apart = sum([spent[name] for name in ("schedule", "update", "enqueue", "fetch")])
        timed["collect, and the rest"].append(step_s - timed_apart)
    if args.profile:
        pstats.Stats(profile).sort_stats("tottime").print_stats(25)
    return timed


def _make_engine(args: argparse.Namespace, case: Case, spent: "defaultdict[str, float]") -> Engine:
    """An engine with rows and blocks for a case."""
    is_prompts = case.work == "prompts"
    num_blocks = 1 + case.num_seqs * (MAX_MODEL_LEN // 16)
    if is_prompts:
        num_blocks = 1 + NUM_POOLED * case.num_seqs * -(-args.prompt_len // 16)
    config = EngineConfig(
        max_num_seqs=case.num_seqs * (1 + is_prompts),
        max_num_batched_tokens=case.num_seqs * args.prompt_len if is_prompts else None,
        max_model_len=MAX_MODEL_LEN,
        num_blocks=num_blocks,
        max_burst=case.max_burst,
        enable_prefix_caching=not args.no_prefix_caching,
    )
    runner = _Runner(config, load_config(CONFIGS / "llama3-8b"), MAX_MODEL_LEN, num_blocks, case.max_burst, spent)
    return Engine(runner, config)  # pyright: ignore[reportArgumentType]


def _requests(args: argparse.Namespace, case: Case, engine: Engine) -> Iterator[Request]:
    """Requests of a case, without end. Those that decode or search do not end while they are timed."""
    random, max_tokens = np.random.default_rng(0), MAX_MODEL_LEN - args.prompt_len
    if case.work == "beams":
        params = BeamSearchParams(BEAM_WIDTH, max_tokens, ignore_eos=True).to_sampling_params()
    else:
        max_tokens = 1 if case.work == "prompts" else max_tokens
        params = SamplingParams(temperature=1.0, ignore_eos=True, max_tokens=max_tokens)
    for number in count():
        prompt = random.integers(5, 30_000, args.prompt_len).tolist()
        yield engine.make_request(str(number), {"prompt_token_ids": prompt}, params)


def _add(engine: Engine, requests: Iterator[Request], num_added: int, args: argparse.Namespace) -> None:
    for request in islice(requests, num_added):
        engine.add(request, is_streamed=args.stream)


def _timing[**P, R](call: Callable[P, R], into: "defaultdict[str, float]", name: str) -> Callable[P, R]:
    def timed(*args: P.args, **kwargs: P.kwargs) -> R:
        start = time.thread_time()
        try:
            return call(*args, **kwargs)
        finally:
            into[name] += time.thread_time() - start

    return timed
