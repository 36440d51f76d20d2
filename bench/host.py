"""What a decode step costs the host: planning it, packing it for the device, taking in its tokens. No device is used.

    python -m bench.host                      # 256 sequences
    python -m bench.host --num-seqs 32 --profile
    python -m bench.host --max-burst 4        # as on an accelerator, while nobody can be admitted

The real engine, scheduler and block manager over a runner that packs each step as for a device and then makes up its
tokens, so that nothing but the host's own work is timed, in CPU time of its thread. One step is in flight, as in
serving. Prints a table, writes ``bench/results/host_NAME.json``.
"""

import argparse
import cProfile
import pstats
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

HERE = Path(__file__).parent
MAX_MODEL_LEN = 2048


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.host", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--num-seqs", type=int, default=256, metavar="N", help="sequences that decode (default: %(default)s)")
    add("--num-plans", type=int, default=300, metavar="N", help="plans timed (default: %(default)s)")
    add("--prompt-len", type=int, default=512, metavar="N", help="tokens of each prompt (default: %(default)s)")
    add("--max-burst", type=int, default=1, metavar="N", help="steps planned at once (default: %(default)s)")
    add("--stream", action="store_true", help="tell of every token, as a server does; else of results only")
    add("--no-prefix-caching", action="store_true", help="without the prefix cache")
    add("--profile", action="store_true", help="print where the time goes, by function")
    add("--out", type=Path, default=HERE / "results", help="directory of the result file")
    add("--commit", help="commit to record, where there is no git")
    args = parser.parse_args(argv)
    if args.prompt_len + (args.num_plans + 2) * args.max_burst > MAX_MODEL_LEN:
        parser.error(f"--prompt-len and --num-plans: they make sequences of more than {MAX_MODEL_LEN} tokens")
    from bench.results import environment, save

    timed = _time_steps(args)
    rows = {name: median(seconds) * 1e6 for name, seconds in timed.items()}
    total = sum(rows.values())
    for name, us in rows.items():
        print(f"{name:28} {us:8.0f} us")
    print(f"{'a plan':28} {total:8.0f} us; a step {total / args.max_burst:.0f} us")
    report = {
        "environment": environment(args.commit),
        "num_seqs": args.num_seqs,
        "num_plans": args.num_plans,
        "max_burst": args.max_burst,
        "prompt_len": args.prompt_len,
        "is_streamed": args.stream,
        "enable_prefix_caching": not args.no_prefix_caching,
        "median_us": rows,
        "step_us": total / args.max_burst,
    }
    name = f"host_{args.num_seqs}" + f"_burst{args.max_burst}" * (args.max_burst > 1) + "_stream" * args.stream
    print(f"written to {save(name, report, args.out)}")
    return 0


@dataclass
class _Runner:
    """Stands for the device half: packs a step as the real one does, and makes up what the step brings.

    It has what an engine asks a runner for.
    """

    config: Any
    model_config: Any
    max_model_len: int
    num_blocks: int
    timed: dict[str, list[float]]
    num_host_blocks = 0
    host_bytes_per_block = 1
    costs = None
    host_pool = None

    @property
    def max_burst(self) -> int:
        return self.config.max_burst

    def __post_init__(self) -> None:
        from jpaged.device.sampling.sampler import SamplePacker
        from jpaged.device.step.inputs import StepPacker, all_buckets

        self.buckets = all_buckets(self.config.max_num_seqs, self.config.token_budget)
        self._step_packer = StepPacker(self.max_model_len // self.config.block_size, self.config.block_size)
        self._sample_packer = SamplePacker()

    def enqueue(self, plan: Any) -> Any:
        from jpaged.device.sampling.sampler import num_top_of
        from jpaged.device.step.inputs import bucket_for

        start = time.thread_time()
        bucket = bucket_for(plan, self.buckets)
        self._step_packer.pack(plan, bucket)
        packed = time.thread_time()
        self._sample_packer.pack(plan.samples, bucket.num_rows)
        num_top_of(plan.samples)
        self.timed["pack tokens and tables"].append(packed - start)
        self.timed["pack sampling parameters"].append(time.thread_time() - packed)
        return SimpleNamespace(plan=plan)  # all that an engine reads of a step under way

    def fetch(self, step: Any) -> Any:
        import numpy as np

        from jpaged.contract.plan import StepResult, TokenScores

        rows = len(step.plan.samples)
        floats, ints = np.zeros(rows, np.float32), np.zeros(rows, np.int32)
        none = np.zeros((rows, 0))
        scores = TokenScores(floats, ints, none.astype(np.int32), none.astype(np.float32))
        return StepResult(ints + 7, scores, later=((ints + 7, scores),) * (step.plan.num_steps - 1))


def _time_steps(args: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of each part, for every step timed."""
    import numpy as np

    from jpaged import EngineConfig, SamplingParams
    from jpaged.engine.loop import Engine
    from jpaged.models import load_config

    num_blocks = 1 + args.num_seqs * (MAX_MODEL_LEN // 16)
    config = EngineConfig(
        max_num_seqs=args.num_seqs,
        max_model_len=MAX_MODEL_LEN,
        num_blocks=num_blocks,
        max_burst=args.max_burst,
        enable_prefix_caching=not args.no_prefix_caching,
    )
    timed: defaultdict[str, list[float]] = defaultdict(list)
    model_config = load_config(HERE / "configs" / "llama3-8b")
    engine = Engine(_Runner(config, model_config, MAX_MODEL_LEN, num_blocks, timed), config)  # pyright: ignore[reportArgumentType]
    random = np.random.default_rng(0)
    for i in range(args.num_seqs):
        prompt = random.integers(5, 30_000, args.prompt_len).tolist()
        params = SamplingParams(temperature=1.0, ignore_eos=True, max_tokens=MAX_MODEL_LEN - args.prompt_len)
        engine.add(engine.make_request(str(i), {"prompt_token_ids": prompt}, params), is_streamed=args.stream)
    num_before = 0
    while engine.scheduler.stats().num_waiting or engine.num_output_tokens - num_before < args.num_seqs:
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
        assert engine.num_output_tokens - num_before == args.num_seqs * args.max_burst
        assert len(output.deltas) == args.num_seqs * args.stream
        told_apart = sum(elsewhere) + timed["schedule"][-1] + timed["update"][-1]
        timed["collect, and what is left"].append(step_s - told_apart)
        elsewhere.clear()
    if args.profile:
        pstats.Stats(profile).sort_stats("tottime").print_stats(25)
    return timed


def _timing[**P, R](call: Callable[P, R], into: list[float]) -> Callable[P, R]:
    def timed(*args: P.args, **kwargs: P.kwargs) -> R:
        start = time.thread_time()
        try:
            return call(*args, **kwargs)
        finally:
            into.append(time.thread_time() - start)

    return timed


if __name__ == "__main__":
    sys.exit(main())
