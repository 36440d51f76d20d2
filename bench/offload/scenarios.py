"""The scenarios of KV in host memory: batches, settings, and what each is compared with."""

import json
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench import UsageError
from bench.offload.generation import Variant, Work, run_variants
from bench.offload.shapes import BLOCK_SIZE, Shapes
from bench.paper.experiment import Plot
from bench.peers import KV_ON_HOST
from jpaged import EngineConfig
from jpaged.config import MAX_INTER_TOKEN_MS

BATCHED_TOKENS = 8192
LATENCY = [Work(64, prompt_len, num_tokens) for prompt_len in (128, 256, 512) for num_tokens in (32, 128)]
SWEEP = [Work(num_seqs, 1024, 32) for num_seqs in (1, 2, 4, 8, 16, 32, 48)]
THROUGHPUT = [Work(8 * 32, prompt_len, 32) for prompt_len in (256, 512, 1024)]
SECOND_HAND = "The paper's figures are second-hand: its tables were not at hand. One A100 with 40 GB, PCIe 4."
PAPER = {
    "latency": f"KVPR: up to 35.8% less latency than Accelerate (OPT-6.7B, 128 + 128). {SECOND_HAND}",
    "throughput": "KVPR: up to 15.1% more tokens/s than FlexGen with OPT-6.7B, 46.2% with 13B, 29.0% with 30B, weights "
    f"on the host, 8 batches of 32. {SECOND_HAND}",
    "sweep": f"KVPR: a sweep of batches from 1 to 48 at 1,024 tokens, without figures here. {SECOND_HAND}",
}
"""Scenario of the paper -> its figures."""

USUAL_SEQS, USUAL_STEPS = [32], 32
USUAL_CONTEXTS = [4096]
"""Tokens of the sequences of ``decode`` and ``peer``."""


def add_options(group: Any) -> None:
    """Add the options of these scenarios."""
    add = group.add_argument
    seqs = "sequences (default: 32; with latency, sweep and throughput the paper's)"
    add("--num-seqs", nargs="+", type=int, metavar="N", help=seqs)
    contexts = "tokens of each (default: 4096, or the paper's; 512 with the model in the box)"
    add("--contexts", nargs="+", type=int, metavar="N", help=contexts)
    steps = f"decode steps that are timed, or tokens of a batch of your own (default: {USUAL_STEPS})"
    add("--num-steps", type=int, default=USUAL_STEPS, metavar="N", help=steps)
    add("--length", type=int, default=500_000, metavar="N", help="long: tokens of the sequence (default: %(default)s)")
    add("--pool-gib", type=float, default=10.0, metavar="X", help="long: device pool (default: %(default)s)")
    variants = (
        "host: as the engine chooses; activations, kv, int8: on the host; device (default: host device). long: host is "
        "the small pool, device the one that holds all"
    )
    add("--placements", nargs="+", choices=VARIANTS, default=["host", "device"], help=variants)
    memory = "most host memory for KV: batches of the paper that need more become smaller (default: %(default)s)"
    add("--host-memory-gib", type=float, default=96.0, metavar="X", help=memory)
    add("--busy", action="store_true", help="profile a few steps too: shares of time that compute and that copy")
    add("--peer-python", default=sys.executable, metavar="PATH", help="peer: the Python that has torch (default: this)")
    add(
        "--divisor", type=int, default=1, metavar="N", help="latency, sweep, throughput: prompts shorter by this factor"
    )


VARIANTS = {
    "host": Variant("host", {"kv_placement": "host"}),
    "activations": Variant("activations", {"kv_placement": "host", "offload_cache": "activations"}),
    "kv": Variant("kv", {"kv_placement": "host", "offload_cache": "kv"}),
    "int8": Variant("int8", {"kv_placement": "host", "offload_dtype": "int8"}),
    "device": Variant("device", {"kv_placement": "device", "num_host_blocks": 0}),
}


def decode(args: Namespace, shapes: Shapes) -> None:
    """Decode steps over KV on the host, beside KV on the device."""
    contexts = shapes.choose_lengths(args.contexts, USUAL_CONTEXTS)
    works = [_decodes(args, n, context) for n in args.num_seqs or USUAL_SEQS for context in contexts]
    peers = {name: peer for name, peer in KV_ON_HOST.items() if shapes.name in peer["figures"]}
    for name, peer in peers.items():
        print(f"{name}, {peer['settings']}: {peer['figures'][shapes.name]['step_ms']:g} ms a step")
    _run(args, shapes, works, content={"peers": peers})


def long(args: Namespace, shapes: Shapes) -> None:
    """One sequence of which the device pool holds a part, beside a pool that holds all of it."""
    if unknown := set(args.placements) - {"host", "device"}:
        raise UsageError(f"long takes --placements host device, got {' '.join(sorted(unknown))}")
    work = _decodes(args, 1, args.length)
    shapes = shapes.with_context(work.prompt_len + work.num_tokens)
    num_blocks = int(args.pool_gib * 2**30) // shapes.kv_block_bytes(args.kv_cache_dtype)
    num_all = work.num_blocks + work.num_blocks // 20 + 2
    variants = {
        "host": Variant("part", {"kv_placement": "auto", "num_blocks": max(num_blocks, 2)}),
        "device": Variant("all", {"kv_placement": "device", "num_blocks": num_all, "num_host_blocks": 0}),
    }
    _run(args, shapes, [work], [variants[name] for name in args.placements])


def of_paper(scenario: str, works: Sequence[Work], **settings: Any) -> Callable[[Namespace, Shapes], None]:
    """An experiment of the KVPR paper, its batches as large as the host memory allows.

    Args:
        scenario: its name in ``PAPER``.
        works: its batches.
        settings: settings of all variants.
    """

    def run(args: Namespace, shapes: Shapes) -> None:
        block_bytes = shapes.kv_block_bytes(args.kv_cache_dtype)
        most = int(args.host_memory_gib * 2**30) // block_bytes
        chosen = _own_works(args) or works
        fitting = [_fit(replace(work, prompt_len=work.prompt_len // args.divisor), most) for work in chosen]
        print(PAPER[scenario])
        _run(args, shapes, list(dict.fromkeys(fitting)), content={"paper": PAPER[scenario]}, **settings)

    return run


def measure_peer(args: Namespace, shapes: Shapes) -> None:
    """Hugging Face's offloaded cache on the same shapes, in a process of another environment."""
    if shapes.is_trained:
        raise UsageError("peer needs --random-weights: it makes a model from a config.json")
    command = [args.peer_python, "-m", "bench.peers.run_offloaded_cache", "--config", str(shapes.path.resolve())]
    contexts = shapes.choose_lengths(args.contexts, USUAL_CONTEXTS)
    command += ["--num-seqs", str((args.num_seqs or USUAL_SEQS)[0]), "--prompt-len", str(contexts[0])]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True, check=True)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    for line in lines:
        print(" ".join(f"{name}={value}" for name, value in line.items()))
    args.keep({"peer": lines})


def plot(report: dict[str, Any]) -> list[Plot]:
    """Bars of the decode steps and of the whole batches, for the PNG of a scenario."""
    times: dict[str, dict[str, dict[str, float]]] = {"step_ms": {}, "total_s": {}}
    for variant in report["variants"]:
        for run in variant.get("runs", ()):
            if "refused" in run:
                continue
            name = str(Work(**run["work"]))
            for key, bars in times.items():
                bars.setdefault(name, {})[variant["variant"]] = run["best"][key]
    titles = {"step_ms": ("A decode step", "ms"), "total_s": ("The whole batch", "s")}
    return [Plot(title, unit, bars=times[key]) for key, (title, unit) in titles.items() if times[key]]


def _fit(work: Work, most_blocks: int) -> Work:
    """The same batch with as many sequences as the blocks allow.

    Raises:
        UsageError: they hold none.
    """
    num_seqs = min(work.num_seqs, most_blocks // replace(work, num_seqs=1).num_blocks)
    if num_seqs == 0:
        raise UsageError(f"--host-memory-gib holds {most_blocks:,} blocks, which is less than one sequence of {work}")
    return replace(work, num_seqs=num_seqs)


def _own_works(args: Namespace) -> list[Work]:
    """Batches that the options name, in the place of the paper's; none if they name none.

    Raises:
        UsageError: the options name only sequences, or only contexts.
    """
    if (args.num_seqs is None) != (args.contexts is None):
        raise UsageError("a batch of your own needs --num-seqs and --contexts")
    return [Work(n, context, args.num_steps) for n in args.num_seqs or () for context in args.contexts]


def _decodes(args: Namespace, num_seqs: int, prompt_len: int) -> Work:
    """A batch whose requests all decode in about so many steps: the first of them begin before the last."""
    budget = args.max_num_batched_tokens or BATCHED_TOKENS
    return Work(num_seqs, prompt_len, args.num_steps + -(-num_seqs * prompt_len // budget) + 8)


def _run(
    args: Namespace,
    shapes: Shapes,
    works: Sequence[Work],
    variants: Sequence[Variant] | None = None,
    content: dict[str, Any] | None = None,
    **settings: Any,
) -> None:
    """Run works by all variants, in engines that hold the largest of them. ``content`` joins the result file."""
    longest = max(work.prompt_len + work.num_tokens for work in works)
    num_blocks = max(work.num_blocks for work in works)
    config = EngineConfig(
        num_host_blocks=num_blocks + num_blocks // 20 + 2,
        max_num_seqs=max(work.num_seqs for work in works),
        max_num_batched_tokens=args.max_num_batched_tokens or BATCHED_TOKENS,
        max_model_len=longest,
        kv_cache_dtype=args.kv_cache_dtype,
        num_blocks=args.num_blocks,
        max_inter_token_ms=MAX_INTER_TOKEN_MS,  # all requests of a batch are to decode soon
        **settings,
    )
    shapes = shapes.with_context(longest)
    print(f"{shapes.name}: blocks of {BLOCK_SIZE}, {config.num_host_blocks:,} in host memory")
    variants = variants or [VARIANTS[name] for name in args.placements]

    def keep(results: list[dict[str, Any]]) -> None:
        args.keep((content or {}) | {"variants": results})

    run_variants(shapes, config, variants, works, args.repeats, keep=keep, is_profiled=args.busy)
