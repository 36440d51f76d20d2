"""Serving throughput, latency of a step and memory waste of the whole engine.

    python -m bench.serving --device cpu                        # the model in the box, on this machine
    python -m bench.serving --random-weights llama3-8b          # the shapes of a real model, on a GPU

Prints a table, writes ``bench/results/serving_NAME_DEVICE.json``.
"""

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
WORKLOADS = ("sharegpt1000", "decode", "prefill32", "sharedprefix341_500", "parallel4_200")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.serving", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", choices=("auto", "cpu"), default="auto", help="cpu keeps JAX off any accelerator")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--model", metavar="DIR", help="a checkpoint (default: the model in the box)")
    presets = ", ".join(_preset_names())
    shapes = f"random weights in the shapes of a config.json: its directory, or one of {presets}"
    source.add_argument("--random-weights", metavar="CONFIG", help=shapes)
    add(
        "--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS), help="with --random-weights: which to run"
    )
    add("--decode-batches", nargs="+", type=int, default=[1, 32, 128, 256], metavar="B", help="of the decode workload")
    add("--num-blocks", type=int, help="blocks in the pool (default: what fits)")
    add("--max-model-len", type=int, default=2048, help="default: %(default)s")
    add("--out", type=Path, default=HERE / "results", help="directory of the result file")
    add("--name", help="name of the result file (default: from the model and the device)")
    add("--commit", help="commit to record, where there is no git")
    args = parser.parse_args(argv)
    if args.device == "cpu":
        os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    try:
        report = _run_random_weights(args) if args.random_weights else _run_model(args)
    except ValueError as error:
        parser.error(str(error))
    from bench.results import save

    path = save(report.pop("file"), report, args.out)
    print(f"\nwritten to {path}")
    return 0


# The model in the box (or a checkpoint): continuous batching against one at a time ------------------------------------


def _run_model(args: argparse.Namespace) -> dict[str, Any]:
    from bench.results import environment
    from jpaged import LLM

    start = time.perf_counter()
    llm = LLM(
        args.model,
        max_num_seqs=64,
        max_num_batched_tokens=512,
        num_blocks=args.num_blocks,
        enable_prefix_caching=False,
        warm_up=True,
    )
    startup_s = time.perf_counter() - start
    print(f"start-up {startup_s:.1f} s")
    report: dict[str, Any] = {
        "file": args.name or f"serving_{Path(args.model).name if args.model else 'demo'}_{_platform()}",
        "environment": environment(args.commit),
        "model": dataclasses.asdict(llm.engine.model_config),
        "dtype": str(llm.engine.runner.dtype),
        "settings": dataclasses.asdict(llm.engine.config) | {"num_blocks": llm.engine.runner.num_blocks},
        "startup_s": startup_s,
        "continuous_batching": _continuous_batching(llm),
        "waste": _waste(),
    }
    batching, waste = report["continuous_batching"], report["waste"]
    print(f"\n64 requests of mixed lengths, {batching['num_output_tokens']:,} tokens to generate")
    print(f"  one at a time        {batching['one_at_a_time_tokens_per_s']:10,.0f} tokens/s")
    print(f"  continuous batching  {batching['batched_tokens_per_s']:10,.0f} tokens/s   {batching['ratio']:.1f}x")
    print(f"\nInternal waste of held blocks: ShareGPT lengths, block {waste['block_size']}, steady state")
    print(f"  mean {waste['mean_percent']:.2f}%, most {waste['max_percent']:.2f}%")
    return report


def _continuous_batching(llm: Any) -> dict[str, Any]:
    """64 requests at once against the same 64, each alone in the engine; greedy, no end-of-sequence."""
    from bench.workloads import sharegpt
    from jpaged import SamplingParams

    work = sharegpt(64, 3, mean_in=64, mean_out=96, longest=256, vocab_size=llm.engine.model_config.vocab_size)
    prompts = [{"prompt_token_ids": prompt} for prompt in work.prompts]
    params = [SamplingParams(temperature=0, ignore_eos=True, max_tokens=n) for n in work.output_lens]
    llm.generate(prompts[:8], params[:8], use_tqdm=False)  # anything compiled late is compiled now
    batched_s = _time_s(lambda: llm.generate(prompts, params))
    alone_s = _time_s(lambda: [llm.generate(p, s, use_tqdm=False) for p, s in zip(prompts, params, strict=True)])
    return {
        "workload": "sharegpt(64, 3, mean_in=64, mean_out=96, longest=256)",
        "num_prompt_tokens": work.num_prompt_tokens,
        "num_output_tokens": work.num_output_tokens,
        "batched_s": batched_s,
        "one_at_a_time_s": alone_s,
        "batched_tokens_per_s": work.num_output_tokens / batched_s,
        "one_at_a_time_tokens_per_s": work.num_output_tokens / alone_s,
        "ratio": alone_s / batched_s,
    }


def _waste(num_requests: int = 2000, block_size: int = 16, num_blocks: int = 4096) -> dict[str, Any]:
    """Waste of held blocks over the paper's ShareGPT lengths: the real scheduler and block manager, tokens made up.

    Steady state: the steps from when the pool first preempts or fills its rows until the queue is empty.
    """
    import numpy as np
    from tqdm import tqdm

    from bench.workloads import sharegpt
    from jpaged.host.block_manager import BlockManager
    from jpaged.host.scheduler import Scheduler
    from jpaged.host.step_plan import StepResult, TokenScores
    from jpaged.request import Request, SamplingParams

    work = sharegpt(num_requests, 1)
    blocks = BlockManager(num_blocks, block_size)
    scheduler = Scheduler(blocks, max_num_seqs=256, max_num_batched_tokens=2048, max_model_len=2048)
    for i, (prompt, output_len) in enumerate(zip(work.prompts, work.output_lens, strict=True)):
        scheduler.add(Request(str(i), None, prompt, SamplingParams(max_tokens=output_len), seed=0))
    samples = []
    with tqdm(total=work.num_output_tokens, desc="Waste", unit="token") as bar:
        while scheduler.stats().num_waiting:
            plan = scheduler.schedule()
            rows = len(plan.samples)
            zeros = np.zeros(rows, np.float32)
            scores = TokenScores(
                zeros, zeros.astype(np.int32), np.zeros((rows, 0), np.int32), np.zeros((rows, 0), np.float32)
            )
            scheduler.update(plan, StepResult(np.zeros(rows, np.int32), scores))
            samples.append((blocks.stats(), scheduler.stats().num_preemptions))
            bar.update(rows)
    first = next((i for i, (_, preemptions) in enumerate(samples) if preemptions), len(samples) // 2)
    steady = [100 * stats.waste for stats, _ in samples[first:]]
    return {
        "workload": f"sharegpt({num_requests}, 1)",
        "block_size": block_size,
        "num_blocks": num_blocks,
        "num_steps": len(steady),
        "num_preemptions": samples[-1][1],
        "mean_percent": float(np.mean(steady)),
        "max_percent": float(np.max(steady)),
        "mean_pool_used_percent": float(np.mean([100 * s.num_used / s.num_blocks for s, _ in samples[first:]])),
    }


# Real shapes, random weights ------------------------------------------------------------------------------------------


def _run_random_weights(args: argparse.Namespace) -> dict[str, Any]:
    import jax.numpy as jnp

    from bench.machine import measure_limits
    from bench.results import environment, save
    from jpaged import LLM, EngineConfig
    from jpaged.device.sharding import make_mesh
    from jpaged.models import load_config, random_model

    name = args.random_weights
    path = HERE / "configs" / name if name in _preset_names() else Path(name)
    model_config = load_config(path)
    limits = measure_limits(jnp.dtype(model_config.dtype))
    reads, flops = limits.read_bytes_per_s / 1e12, limits.matmul_flops_per_s / 1e12
    print(f"limits of this device: {reads:.2f} TB/s read, {flops:.0f} TFLOP/s {limits.dtype}")
    start = time.perf_counter()
    mesh = make_mesh(1)
    model = random_model(model_config, jnp.dtype(model_config.dtype), mesh, 0)
    config = EngineConfig(
        num_blocks=args.num_blocks,
        max_model_len=min(args.max_model_len, model_config.max_model_len),
        enable_prefix_caching=True,
    )
    llm = LLM.from_model(model, model_config, config, mesh=mesh)
    startup_s = time.perf_counter() - start
    runner = llm.engine.runner
    report: dict[str, Any] = {
        "file": args.name or f"serving_{path.name}_{_platform()}",
        "environment": environment(args.commit),
        "model": dataclasses.asdict(model_config),
        "dtype": str(runner.dtype),
        "weight_bytes": runner.weight_bytes,
        "settings": dataclasses.asdict(config) | {"num_blocks": runner.num_blocks},
        "num_programs": runner.num_programs,
        "limits": dataclasses.asdict(limits),
        "startup_s": startup_s,
        "figures": {},
    }
    peers = json.loads((HERE / "peers.json").read_text())
    report["peer_source"] = peers["source"]
    peer = peers.get(path.name, {})
    print(f"{runner.num_blocks:,} blocks, {runner.num_programs} programs, start-up {startup_s:.1f} s\n")
    print(f"{'':40} {'here':>10} {'peer':>10} {'ratio':>7} {'floor':>10}")
    figures = _Figures(report["figures"], peer, lambda: save(report["file"], report, args.out))
    figures.add("startup_s", startup_s, lower_is_better=True)
    kv_bytes = runner.bytes_per_block / config.block_size
    for workload in args.workloads:
        _RUNS[workload](llm, figures, args, _Floor(limits, runner.weight_bytes, kv_bytes))
    return report


@dataclasses.dataclass(frozen=True)
class _Floor:
    """Least times from bytes and FLOPs at the rates measured in this run."""

    limits: Any
    weight_bytes: int
    kv_bytes_per_token: float

    def decode_s(self, batch: int, context: int) -> float:
        return (self.weight_bytes + batch * context * self.kv_bytes_per_token) / self.limits.read_bytes_per_s

    def prefill_s(self, num_tokens: int) -> float:
        """Two FLOPs per weight element (2 bytes) and token; attention left out."""
        return num_tokens * self.weight_bytes / self.limits.matmul_flops_per_s


@dataclasses.dataclass
class _Figures:
    """Collects figures, prints each as it comes beside the peer's and the floor, and saves them at once."""

    into: dict[str, Any]
    peer: dict[str, float]
    save: Callable[[], Any]

    def add(self, name: str, value: float, *, lower_is_better: bool, floor: float | None = None, **extra: Any) -> None:
        peer = self.peer.get(name)
        ratio = None if peer is None else (peer / value if lower_is_better else value / peer)
        self.into[name] = {"value": value, "peer": peer, "ratio_to_peer": ratio, "floor": floor, **extra}
        shown = [f"{x:,.3g}" if x < 100 else f"{x:,.0f}" for x in (value, peer or 0, ratio or 0, floor or 0)]
        blank = ["" if x is None else s for x, s in zip((value, peer, ratio, floor), shown, strict=True)]
        print(f"{name:40} {blank[0]:>10} {blank[1]:>10} {blank[2]:>7} {blank[3]:>10}", flush=True)
        self.save()


def _params(**options: Any) -> Any:
    from jpaged import SamplingParams

    return SamplingParams(temperature=1.0, ignore_eos=True, **options)


def _generate_s(llm: Any, prompts: list[list[int]], params: Any) -> float:
    tokens = [{"prompt_token_ids": prompt} for prompt in prompts]
    return _time_s(lambda: llm.generate(tokens, params))


def _throughput(llm: Any, figures: _Figures, name: str, work: Any, *, n: int = 1, unit: str = "tokens") -> None:
    params = [_params(max_tokens=length, n=n) for length in work.output_lens]
    before = llm.stats()
    elapsed = _generate_s(llm, work.prompts, params)
    stats = llm.stats()
    extra = {
        "elapsed_s": elapsed,
        "num_preemptions": stats.num_preemptions - before.num_preemptions,
        "num_steps": stats.num_steps - before.num_steps,
    }
    value = (len(work.prompts) if unit == "requests" else n * work.num_output_tokens) / elapsed
    figures.add(f"{name}_{unit}_per_s", value, lower_is_better=False, **extra)


def _sharegpt(llm: Any, figures: _Figures, args: argparse.Namespace, floor: _Floor) -> None:
    from bench.workloads import sharegpt

    _throughput(llm, figures, "sharegpt1000", sharegpt(1000, 1))


def _shared_prefix(llm: Any, figures: _Figures, args: argparse.Namespace, floor: _Floor) -> None:
    from bench.workloads import shared_prefix

    _throughput(llm, figures, "sharedprefix341_500", shared_prefix(500, 341), unit="requests")


def _parallel(llm: Any, figures: _Figures, args: argparse.Namespace, floor: _Floor) -> None:
    from bench.workloads import sharegpt

    _throughput(llm, figures, "parallel4_200", sharegpt(200, 6), n=4)


def _decode(llm: Any, figures: _Figures, args: argparse.Namespace, floor: _Floor) -> None:
    """Prompts of 1024 tokens, already cached: (time of 161 tokens - time of 33 tokens) / 128."""
    from bench.workloads import uniform

    for batch in args.decode_batches:
        work = uniform(batch, 1024, 1, seed=batch)
        _generate_s(llm, work.prompts, _params(max_tokens=1))
        short_s = _generate_s(llm, work.prompts, _params(max_tokens=33))
        long_s = _generate_s(llm, work.prompts, _params(max_tokens=161))
        floor_ms = 1e3 * floor.decode_s(batch, 1024 + 97)
        figures.add(f"decode_{batch}_ms", 1e3 * (long_s - short_s) / 128, lower_is_better=True, floor=floor_ms)


def _prefill(llm: Any, figures: _Figures, args: argparse.Namespace, floor: _Floor) -> None:
    """32 prompts of 1024 tokens, one token each."""
    from bench.workloads import uniform

    elapsed = min(_generate_s(llm, uniform(32, 1024, 1, seed=100 + i).prompts, _params(max_tokens=1)) for i in range(2))
    figures.add("prefill32_s", elapsed, lower_is_better=True, floor=floor.prefill_s(32 * 1024))


_RUNS = {
    "sharegpt1000": _sharegpt,
    "decode": _decode,
    "prefill32": _prefill,
    "sharedprefix341_500": _shared_prefix,
    "parallel4_200": _parallel,
}


def _preset_names() -> list[str]:
    return sorted(path.name for path in (HERE / "configs").iterdir())


def _platform() -> str:
    import jax

    return (
        jax.default_backend()
        if jax.default_backend() == "cpu"
        else jax.devices()[0].device_kind.lower().replace(" ", "-")
    )


def _time_s(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


if __name__ == "__main__":
    sys.exit(main())
