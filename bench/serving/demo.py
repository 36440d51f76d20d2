"""The model in the box, or a checkpoint: continuous batching against one at a time, and the waste of held blocks."""

import dataclasses
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from bench.report import device_name, start_report
from bench.serving.runs import as_prompts
from bench.workloads import made_up_result, sharegpt
from jpaged import LLM, SamplingParams
from jpaged.host.blocks.manager import BlockManager
from jpaged.host.scheduler import Scheduler
from jpaged.request import Request

NUM_REQUESTS, NUM_QUICK_REQUESTS = 64, 8
NUM_WASTE_REQUESTS, NUM_QUICK_WASTE_REQUESTS = 2000, 400


def measure_model(args: Namespace) -> tuple[str, dict[str, Any]]:
    """Measure and print; returns the name and the content of the result file."""
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
    batching = _continuous_batching(llm, NUM_QUICK_REQUESTS if args.quick else NUM_REQUESTS)
    waste = _waste(NUM_QUICK_WASTE_REQUESTS if args.quick else NUM_WASTE_REQUESTS)
    print(f"\n{batching['workload']}: {batching['num_output_tokens']:,} tokens to generate")
    print(f"  one at a time        {batching['one_at_a_time_tokens_per_s']:10,.0f} tokens/s")
    print(f"  continuous batching  {batching['batched_tokens_per_s']:10,.0f} tokens/s   {batching['ratio']:.1f}x")
    print(f"\nInternal waste of held blocks: ShareGPT lengths, block {waste['block_size']}, steady state")
    print(f"  mean {waste['mean_percent']:.2f}%, most {waste['max_percent']:.2f}%")
    name = args.name or f"serving_{Path(args.model).name if args.model else 'demo'}_{device_name()}"
    return name + "_quick" * (args.quick and not args.name), start_report(
        args,
        is_quick=args.quick,
        model=dataclasses.asdict(llm.engine.model_config),
        dtype=str(llm.engine.runner.dtype),
        settings=dataclasses.asdict(llm.engine.config) | {"num_blocks": llm.engine.runner.num_blocks},
        startup_s=startup_s,
        continuous_batching=batching,
        waste=waste,
    )


def _continuous_batching(llm: LLM, count: int) -> dict[str, Any]:
    """Requests of mixed lengths at once against the same, each alone in the engine; greedy, no end-of-sequence."""
    work = sharegpt(count, 3, mean_in=64, mean_out=96, longest=256, vocab_size=llm.engine.model_config.vocab_size)
    prompts = as_prompts(work.prompts)
    params = [SamplingParams(temperature=0, ignore_eos=True, max_tokens=n) for n in work.output_lens]
    llm.generate(prompts[:8], params[:8], use_tqdm=False)  # programs that are compiled late are compiled now
    batched_s = _time_s(lambda: llm.generate(prompts, params))
    alone_s = _time_s(lambda: [llm.generate(p, s, use_tqdm=False) for p, s in zip(prompts, params, strict=True)])
    return {
        "workload": f"sharegpt({count}, 3, mean_in=64, mean_out=96, longest=256)",
        "num_prompt_tokens": work.num_prompt_tokens,
        "num_output_tokens": work.num_output_tokens,
        "batched_s": batched_s,
        "one_at_a_time_s": alone_s,
        "batched_tokens_per_s": work.num_output_tokens / batched_s,
        "one_at_a_time_tokens_per_s": work.num_output_tokens / alone_s,
        "ratio": alone_s / batched_s,
    }


def _waste(num_requests: int, block_size: int = 16, num_blocks: int = 4096) -> dict[str, Any]:
    """Waste of held blocks over the paper's ShareGPT lengths: the real scheduler and block manager, tokens made up.

    Steady state begins when the pool first preempts, or half-way, and ends when the queue is empty.
    """
    work = sharegpt(num_requests, 1)
    blocks = BlockManager(num_blocks, block_size)
    scheduler = Scheduler(blocks, max_num_seqs=256, max_num_batched_tokens=2048, max_model_len=2048)
    for i, (prompt, output_len) in enumerate(zip(work.prompts, work.output_lens, strict=True)):
        scheduler.add(Request(str(i), None, prompt, SamplingParams(max_tokens=output_len), seed=0))
    samples = []
    with tqdm(total=work.num_output_tokens, desc="Waste", unit="token") as bar:
        while scheduler.stats().num_waiting:
            plan = scheduler.schedule()
            rows = len(plan.draws)
            scheduler.update(plan, made_up_result(rows))
            samples.append((scheduler.block_stats(), scheduler.stats().num_preemptions))
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


def _time_s(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
