"""The HTTP server under load.

    python -m bench serve --device cpu                       # what the server costs: the model in the box
    python -m bench serve --random-weights llama3-8b         # the shapes of a real model, on a GPU
    python -m bench serve soak --device cpu --minutes 5      # 1,000 streams of clients of which 30% leave
    python -m bench serve fuzz --device cpu --num-requests 100000

load: the same requests, of ShareGPT lengths, by ``LLM.generate`` and then over HTTP: all at once, and in Poisson
arrivals at fractions of the rate that this sustains. Throughput, time to first token (TTFT) and between tokens
(ITL), in seconds. TTFT also by length of the prompt, and in steps: in mean steps, and in those that ended between the
request and the token, as the server counts them. Prefix caching is off, so that each run computes all of its prompts.
The server takes over the engine of LLM.generate, and compiles nothing again.
soak: leaked blocks, tasks and files, memory, lag of the event loop, and the end by SIGTERM.
fuzz: requests that are mostly invalid. No answer may have status 500, and no block may stay in use.

The server runs in a process of its own, and so do the clients. Exit status 1 if a check failed.
"""

import argparse
import shlex
from pathlib import Path
from typing import Any

from bench import UsageError
from bench.http.fuzz import run_fuzz
from bench.http.launch import Launch, launched, workload_of
from bench.http.phases import run_phases
from bench.http.soak import run_soak
from bench.paper.experiment import Plot, save_plot
from bench.report import CONFIGS, RESULTS, Table, save, shown

DEMO_LENGTHS = {"mean_in": 64, "mean_out": 96, "longest": 256}
DEMO_SIZES = {"max_num_seqs": 64, "max_num_batched_tokens": 512}
SMALL_SIZES = {"max_num_seqs": 64, "max_num_batched_tokens": 256}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    add = parser.add_argument
    add("what", nargs="?", choices=("load", "soak", "fuzz"), default="load", help="see above (default: load)")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--model", metavar="DIR", help="a checkpoint (default: the model in the box)")
    shapes = "random weights in the shapes of a config.json: its directory, or the name of one of bench/configs"
    source.add_argument("--random-weights", metavar="CONFIG", help=shapes)
    add("--name", help="name of the result file (default: from the model and the device)")
    add("--max-num-seqs", type=int, metavar="N", help="rows of a step")
    add("--max-model-len", type=int, metavar="N", help="tokens of a context")
    add("--num-requests", type=int, metavar="N", help="requests (default: 1000; fuzz: 100000)")
    add("--num-processes", type=int, default=1, metavar="N", help="processes that send (default: 1)")
    group = parser.add_argument_group("load").add_argument
    fractions = "fractions of the sustained rate (default: 0.5 0.75 1)"
    group("--fractions", nargs="+", type=float, default=[0.5, 0.75, 1.0], metavar="X", help=fractions)
    group = parser.add_argument_group("soak").add_argument
    group("--minutes", type=float, default=5.0, metavar="X", help="length of the run (default: 5)")
    group("--num-streams", type=int, default=1000, metavar="N", help="streams at once (default: 1000)")
    group("--disconnects", type=float, default=0.3, metavar="X", help="fraction that leaves early (default: 0.3)")


def run(args: argparse.Namespace) -> int:
    """Measure, print and save; 1 if a check failed."""
    if args.random_weights is not None and not (path := CONFIGS / args.random_weights).exists():
        path = Path(args.random_weights)
        if not (path / "config.json").exists():
            raise UsageError(f"--random-weights {args.random_weights}: there is no config.json")
    if args.what == "load":
        return _load(args)
    sizes = SMALL_SIZES | _engine_options(args)
    launch = Launch(args.device, args.commit, args.model, _shapes(args), engine=sizes)
    with launched(launch) as child:
        report = run_soak(child, args) if args.what == "soak" else run_fuzz(child, args.num_requests or 100_000)
        return _finish(args, child.said, {"settings": sizes} | report)


def _load(args: argparse.Namespace) -> int:
    is_demo = args.random_weights is None and args.model is None
    count = args.num_requests or 1000
    workload = {"count": count, "seed": 3} | (DEMO_LENGTHS if is_demo else {})
    sizes = (DEMO_SIZES if is_demo else {"max_model_len": 2048}) | _engine_options(args)
    with launched(Launch(args.device, args.commit, args.model, _shapes(args), sizes, workload=workload)) as child:
        work = workload_of(workload, child.said["vocab_size"])
        offline = child.said["offline"]
        print(_preparation(child.said["preparation"]))
        print(f"LLM.generate: {offline['tokens_per_s']:,.0f} tokens/s")
        phases = run_phases(child.address, work, offline, args.fractions, args.num_processes)
        report = {
            "settings": sizes,
            "preparation": child.said["preparation"],
            "workload": workload,
            "offline": offline,
            "http_share": phases[0]["tokens_per_s"] / offline["tokens_per_s"],
            "phases": phases,
        }
        report["failures"] = [f"{each['num_failed']} requests failed" for each in phases if each["num_failed"]]
        print(_table(phases))
        print(_first_tokens(phases))
        print(f"HTTP has {100 * report['http_share']:.1f}% of the throughput of LLM.generate")
        status = _finish(args, child.said, report)
    if not save_plot(_plots(phases), (args.out or RESULTS) / "serve" / f"{_name(args, child.said)}.png"):
        print("no plot: pip install '.[bench]' brings matplotlib")
    return status


def _finish(args: argparse.Namespace, said: dict[str, Any], report: dict[str, Any]) -> int:
    """Write the result file. Returns the exit status."""
    head = {"environment": said["environment"], "command": f"python -m bench {shlex.join(args.argv)}"}
    print(f"written to {save(_name(args, said), head | {'num_blocks': said['num_blocks']} | report, args.out)}")
    for failure in report["failures"]:
        print(f"FAILED: {failure}")
    return 1 if report["failures"] else 0


def _name(args: argparse.Namespace, said: dict[str, Any]) -> str:
    model = Path(args.model or args.random_weights or "demo").name
    return args.name or f"serve_{args.what}_{model}_{said['device_name']}"


def _shapes(args: argparse.Namespace) -> str | None:
    if args.random_weights is None:
        return None
    path = CONFIGS / args.random_weights
    return str(path if path.exists() else args.random_weights)


def _engine_options(args: argparse.Namespace) -> dict[str, Any]:
    options = {"max_num_seqs": args.max_num_seqs, "max_model_len": args.max_model_len}
    return {name: value for name, value in options.items() if value is not None}


def _preparation(said: dict[str, Any]) -> str:
    return (
        f"{said['num_programs']} programs, {said['num_from_cache']} of them from an earlier run, and weights: "
        f"{said['seconds']:.1f} s; the server takes over this engine"
    )


def _table(phases: list[dict[str, Any]]) -> str:
    table = Table(
        *("arrivals", "req/s", "tokens/s", "TTFT p50", "p99, s", "mean steps", "steps", "ITL p50", "p99, s", "step, s"),
        first=14,
    )
    names = (
        *("rate", "tokens_per_s", "ttft_p50_s", "ttft_p99_s", "ttft_p99_steps", "first_token_steps_p99"),
        *("itl_p50_s", "itl_p99_s", "step_s"),
    )
    return table.text({phase["arrivals"]: [phase[name] for name in names] for phase in phases})


def _first_tokens(phases: list[dict[str, Any]]) -> str:
    """Time to first token by length of the prompt, and requests by steps before the first token."""
    classes = [each["most_prompt_tokens"] for each in phases[0]["ttft_by_length"]]
    titles = [f"<= {most:,}" if most else "more" for most in classes]
    table = Table("TTFT p50, p99, s", *(f"{title} tokens" for title in titles), first=16, width=14)
    lines = [table.header()]
    for phase in phases:
        quantiles = ((each["ttft_p50_s"], each["ttft_p99_s"]) for each in phase["ttft_by_length"])
        cells = (", ".join(map(shown, both)) if both != (None, None) else None for both in quantiles)
        steps = ", ".join(f"{bound}: {count:,}" for bound, count in phase["first_token_steps"].items())
        lines.append(table.row(phase["arrivals"], *cells, f"  requests by most steps before it: {steps}"))
    return "\n".join(lines)


def _plots(phases: list[dict[str, Any]]) -> list[Plot]:
    timed = sorted((phase for phase in phases if phase["rate"] is not None), key=lambda phase: phase["rate"])
    rates = [phase["rate"] for phase in timed]

    def lines(name: str) -> dict[str, tuple[list[float], list[float]]]:
        return {
            f"p{percent}": (rates, [1e3 * phase[f"{name}_p{percent}_s"] for phase in timed]) for percent in (50, 99)
        }

    return [
        Plot("time to first token", "ms", "requests/s", lines("ttft")),
        Plot("between tokens", "ms", "requests/s", lines("itl")),
        Plot("throughput", "tokens/s", "requests/s", {"HTTP": (rates, [each["tokens_per_s"] for each in timed])}),
    ]
