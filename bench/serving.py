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
WORKLOADS = (
    "sharegpt1000", "decode", "prefill32", "sharedprefix341_500", "parallel4_200", "beam4_64x64",
    "sharegpt1000_2048blocks",
)  # fmt: skip
PREEMPTIONS = ("swap", "recompute", "auto")

WARM_UP_ROWS, WARM_UP_TOKENS = 512, 48
"""Sequences run before the clock starts, and their length: the first run of a program also loads it."""

NUM_BLOCKS_UNDER_PRESSURE = 2048

PEER_VOCAB_SIZE = 30_000


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
    add(
        "--preemption",
        nargs="+",
        choices=PREEMPTIONS,
        default=list(PREEMPTIONS),
        help="of the sharegpt1000_2048blocks workload: under which to run it",
    )
    add("--num-blocks", type=int, help="blocks in the pool (default: what fits)")
    add(
        "--host-memory-gib",
        type=float,
        default=16.0,
        metavar="X",
        help="with --random-weights: size of the host pool (default: %(default)s)",
    )
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
    config = EngineConfig(
        num_blocks=args.num_blocks,
        max_model_len=min(args.max_model_len, model_config.max_model_len),
        enable_prefix_caching=True,
        host_memory_bytes=int(args.host_memory_gib * 2**30),
    )
    for preemption in args.preemption:
        dataclasses.replace(config, preemption=preemption)  # refused now rather than when its turn comes
    # Nobody keeps the model: the runner joins its projections, and the single ones would take the pool's place.
    runner = LLM.from_model(
        random_model(model_config, jnp.dtype(model_config.dtype), mesh, 0), model_config, config, mesh=mesh
    ).engine.runner
    startup_s = time.perf_counter() - start
    report: dict[str, Any] = {
        "file": args.name or f"serving_{path.name}_{_platform()}",
        "environment": environment(args.commit),
        "model": dataclasses.asdict(model_config),
        "dtype": str(runner.dtype),
        "weight_bytes": runner.weight_bytes,
        "settings": dataclasses.asdict(config)
        | {"num_blocks": runner.num_blocks, "num_host_blocks": runner.num_host_blocks},
        "num_programs": runner.num_programs,
        "limits": dataclasses.asdict(limits),
        "costs": None if runner.costs is None else dataclasses.asdict(runner.costs),
        "startup_s": startup_s,
        "figures": {},
    }
    peers = json.loads((HERE / "peers.json").read_text())
    report["peer_source"] = peers["source"]
    peer = peers.get(path.name, {})
    print(
        f"{runner.num_blocks:,} blocks, {runner.num_host_blocks:,} in host memory, {runner.num_programs} programs, "
        f"start-up {startup_s:.1f} s\n"
    )
    print(f"{'':44} {'here':>10} {'peer':>10} {'ratio':>7} {'floor':>10}")
    figures = _Figures(report["figures"], peer, lambda: save(report["file"], report, args.out))
    figures.add("startup_s", startup_s, lower_is_better=True)
    kv_bytes = runner.bytes_per_block / config.block_size
    bench = _Bench(runner, config, args, figures, _Floor(limits, runner.weight_bytes, kv_bytes))
    for workload in args.workloads:
        _RUNS[workload](bench)
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

    def add(
        self,
        name: str,
        value: float,
        *,
        lower_is_better: bool,
        floor: float | None = None,
        peer_name: str | None = None,
        **extra: Any,
    ) -> None:
        """``peer_name``: of the peer's figure, where it is not ``name``."""
        peer = self.peer.get(peer_name or name)
        ratio = None if peer is None else (peer / value if lower_is_better else value / peer)
        self.into[name] = {"value": value, "peer": peer, "ratio_to_peer": ratio, "floor": floor, **extra}
        shown = [f"{x:,.3g}" if x < 100 else f"{x:,.0f}" for x in (value, peer or 0, ratio or 0, floor or 0)]
        blank = ["" if x is None else s for x, s in zip((value, peer, ratio, floor), shown, strict=True)]
        print(f"{name:44} {blank[0]:>10} {blank[1]:>10} {blank[2]:>7} {blank[3]:>10}", flush=True)
        self.save()


@dataclasses.dataclass(frozen=True)
class _Bench:
    """What all workloads share: one runner, whose programs are compiled once, and where figures go."""

    runner: Any
    config: Any
    args: argparse.Namespace
    figures: _Figures
    floor: _Floor

    def llm(self, **changes: Any) -> Any:
        """An LLM over the runner, its pools empty. Those made before it are done with."""
        from jpaged import LLM
        from jpaged.engine import Engine

        return LLM.from_engine(Engine(self.runner, dataclasses.replace(self.config, **changes)))

    @property
    def vocab_size(self) -> int:
        """Of the prompts: what the peers were given, if the model has as many."""
        return min(PEER_VOCAB_SIZE, self.runner.model_config.vocab_size)


@dataclasses.dataclass(frozen=True)
class _Run:
    """One timed ``LLM.generate``: what it made, and by how much it moved the engine's counters.

    Args:
        elapsed_s: of all of it, at once in the queue.
        num_requests, num_prompt_tokens, num_output_tokens: the work done.
        num_cached_prompt_tokens: found in the prefix cache.
        num_programs_compiled: while the clock ran; anything but 0 spoils the figure.
        num_steps, ..., transfer_stalled_s: see ``EngineStats``.
        saved_by_sharing_percent: the same, over the steps of this run.
    """

    elapsed_s: float
    num_requests: int
    num_prompt_tokens: int
    num_output_tokens: int
    num_cached_prompt_tokens: int
    num_programs_compiled: int
    num_steps: int
    num_preemptions: int
    num_swaps_out: int
    num_swaps_in: int
    bytes_to_host: int
    bytes_from_host: int
    transfer_stalled_s: float
    saved_by_sharing_percent: float

    @property
    def tokens_per_s(self) -> float:
        return self.num_output_tokens / self.elapsed_s

    def note(self) -> str:
        """A warning, if the figure is worth less than it seems."""
        count = self.num_programs_compiled
        return f"; {count} programs were compiled while the clock ran" if count else ""


def _run(llm: Any, prompts: list[list[int]], params: Any) -> _Run:
    tokens = [{"prompt_token_ids": prompt} for prompt in prompts]
    runner, blocks = llm.engine.runner, llm.engine.scheduler.stats
    before, blocks_before, programs_before = llm.stats(), blocks(), runner.num_programs
    start = time.perf_counter()
    results = llm.generate(tokens, params)
    elapsed_s = time.perf_counter() - start
    after, blocks_after = llm.stats(), blocks()
    logical = blocks_after.num_logical_blocks - blocks_before.num_logical_blocks
    physical = blocks_after.num_physical_blocks - blocks_before.num_physical_blocks
    counters = (
        "num_steps", "num_preemptions", "num_swaps_out", "num_swaps_in", "bytes_to_host", "bytes_from_host",
        "transfer_stalled_s",
    )  # fmt: skip
    return _Run(
        elapsed_s=elapsed_s,
        num_requests=len(results),
        num_prompt_tokens=sum(map(len, prompts)),
        num_output_tokens=sum(len(output.token_ids) for result in results for output in result.outputs),
        num_cached_prompt_tokens=sum(result.num_cached_tokens for result in results),
        num_programs_compiled=runner.num_programs - programs_before,
        saved_by_sharing_percent=100 * (1 - physical / logical),
        **{name: getattr(after, name) - getattr(before, name) for name in counters},
    )


def _params(**options: Any) -> Any:
    from jpaged import SamplingParams

    return SamplingParams(temperature=1.0, ignore_eos=True, **options)


def _sampling(work: Any, n: int = 1) -> list[Any]:
    return [_params(max_tokens=length, n=n) for length in work.output_lens]


def _warm_up(llm: Any, work: Any, num_requests: int, n: int = 1) -> None:
    """The beginning of the same work, cut short."""
    params = [_params(max_tokens=min(length, WARM_UP_TOKENS), n=n) for length in work.output_lens[:num_requests]]
    _run(llm, work.prompts[:num_requests], params)


def _throughput(bench: _Bench, name: str, work: Any, *, n: int = 1, unit: str = "tokens") -> None:
    params = _sampling(work, n)
    _warm_up(bench.llm(), work, WARM_UP_ROWS // n, n)
    run = _run(bench.llm(), work.prompts, params)
    value = (run.num_requests if unit == "requests" else run.num_output_tokens) / run.elapsed_s
    bench.figures.add(f"{name}_{unit}_per_s", value, lower_is_better=False, **dataclasses.asdict(run))
    cached, total = run.num_cached_prompt_tokens, run.num_prompt_tokens
    print(
        f"  {run.saved_by_sharing_percent:.1f}% of the blocks saved by sharing; {cached:,} of {total:,} prompt tokens "
        f"({100 * cached / total:.0f}%) from the prefix cache{run.note()}"
    )


def _sharegpt(bench: _Bench) -> None:
    from bench.workloads import sharegpt

    _throughput(bench, "sharegpt1000", sharegpt(1000, 1, vocab_size=bench.vocab_size))


def _shared_prefix(bench: _Bench) -> None:
    from bench.workloads import shared_prefix

    work = shared_prefix(500, 341, vocab_size=bench.vocab_size)
    _throughput(bench, "sharedprefix341_500", work, unit="requests")


def _parallel(bench: _Bench) -> None:
    from bench.workloads import sharegpt

    _throughput(bench, "parallel4_200", sharegpt(200, 6, vocab_size=bench.vocab_size), n=4)


def _beams(bench: _Bench) -> None:
    """64 prompts, 4 beams each, 64 tokens; and 4 samples each of the same prompts, plain decoding of as many rows.

    Both run twice, and the second run is timed: their steps are of the same shapes, so all that compiles late has.
    """
    from bench.workloads import sharegpt
    from jpaged import BeamSearchParams

    prompts, width, length = sharegpt(64, 7, vocab_size=bench.vocab_size).prompts, 4, 64
    beams = BeamSearchParams(width, length, ignore_eos=True).to_sampling_params()
    _, plain = (_run(bench.llm(), prompts, _params(max_tokens=length, n=width)) for _ in range(2))
    _, run = (_run(bench.llm(), prompts, beams) for _ in range(2))
    assert run.num_output_tokens == plain.num_output_tokens == len(prompts) * width * length
    of_plain = 100 * run.tokens_per_s / plain.tokens_per_s
    bench.figures.add(
        "beam4_64x64_tokens_per_s",
        run.tokens_per_s,
        lower_is_better=False,
        **dataclasses.asdict(run),
        of_plain_percent=of_plain,
        plain_tokens_per_s=plain.tokens_per_s,
        plain=dataclasses.asdict(plain),
    )
    print(
        f"  {of_plain:.0f}% of plain decoding ({plain.tokens_per_s:,.0f} tokens/s: 4 samples a prompt); "
        f"{run.saved_by_sharing_percent:.1f}% of the blocks saved by sharing, plain "
        f"{plain.saved_by_sharing_percent:.1f}%{run.note() or plain.note()}"
    )


def _under_pressure(bench: _Bench) -> None:
    """The work of sharegpt1000 in a pool of 2,048 blocks, against the same engine with all of its pool."""
    from bench.workloads import sharegpt

    name, work = "sharegpt1000", sharegpt(1000, 1, vocab_size=bench.vocab_size)
    if f"{name}_tokens_per_s" not in bench.figures.into:
        _sharegpt(bench)
    unconstrained = bench.figures.into[f"{name}_tokens_per_s"]["value"]
    params = _sampling(work)
    for preemption in bench.args.preemption:
        # So few blocks that the first requests preempt each other already.
        warm = bench.llm(num_blocks=1 + NUM_BLOCKS_UNDER_PRESSURE // 8, preemption=preemption)
        _warm_up(warm, work, WARM_UP_ROWS // 8)
        # Block 0 is for padding.
        llm = bench.llm(num_blocks=1 + NUM_BLOCKS_UNDER_PRESSURE, preemption=preemption)
        run = _run(llm, work.prompts, params)
        kept = 100 * run.tokens_per_s / unconstrained
        title = f"{name}_{NUM_BLOCKS_UNDER_PRESSURE}blocks"
        bench.figures.add(
            f"{title}_{preemption}_tokens_per_s",
            run.tokens_per_s,
            lower_is_better=False,
            peer_name=f"{title}_tokens_per_s",
            costs=None if bench.runner.costs is None else dataclasses.asdict(bench.runner.costs),
            **dataclasses.asdict(run),
        )
        bench.figures.add(
            f"{title}_{preemption}_kept_percent",
            kept,
            lower_is_better=False,
            peer_name=f"{title}_kept_percent",
            unconstrained_tokens_per_s=unconstrained,
        )
        print(
            f"  {run.num_preemptions:,} preemptions, {run.num_swaps_out:,} swaps out and {run.num_swaps_in:,} in; "
            f"{run.bytes_to_host / 2**30:.3g} GiB to the host and {run.bytes_from_host / 2**30:.3g} GiB back; "
            f"{run.transfer_stalled_s:.2f} of {run.elapsed_s:.1f} s stalled{run.note()}"
        )


def _decode(bench: _Bench) -> None:
    """Prompts of 1024 tokens, already cached: (time of 161 tokens - time of 33 tokens) / 128."""
    from bench.workloads import uniform

    llm = bench.llm()
    for batch in bench.args.decode_batches:
        prompts = uniform(batch, 1024, 1, seed=batch, vocab_size=bench.vocab_size).prompts
        _run(llm, prompts, _params(max_tokens=33))  # caches the prompts, and loads the programs
        short, long = (_run(llm, prompts, _params(max_tokens=length)) for length in (33, 161))
        bench.figures.add(
            f"decode_{batch}_ms",
            1e3 * (long.elapsed_s - short.elapsed_s) / 128,
            lower_is_better=True,
            floor=1e3 * bench.floor.decode_s(batch, 1024 + 97),
            num_programs_compiled=short.num_programs_compiled + long.num_programs_compiled,
        )


def _prefill(bench: _Bench) -> None:
    """32 prompts of 1024 tokens, one token each."""
    from bench.workloads import uniform

    llm = bench.llm()
    works = [uniform(32, 1024, 1, seed=100 + i, vocab_size=bench.vocab_size) for i in range(2)]
    elapsed_s = min(_run(llm, work.prompts, _params(max_tokens=1)).elapsed_s for work in works)
    bench.figures.add("prefill32_s", elapsed_s, lower_is_better=True, floor=bench.floor.prefill_s(32 * 1024))


_RUNS = {
    "sharegpt1000": _sharegpt,
    "decode": _decode,
    "prefill32": _prefill,
    "sharedprefix341_500": _shared_prefix,
    "parallel4_200": _parallel,
    "beam4_64x64": _beams,
    "sharegpt1000_2048blocks": _under_pressure,
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
