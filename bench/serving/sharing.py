"""Blocks saved by sharing in the engine, on the model in the box, beside the paper's (PagedAttention, figure 15).

    python -m bench sharing --device cpu

Requests with several samples, and beam searches, over Python source that the model was not trained on. Prints a table,
writes ``bench/results/sharing_demo_DEVICE.json``.
"""

import argparse
import sysconfig
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from bench.report import Table, device_name, save, start_report
from bench.serving.runs import as_prompts
from bench.workloads import Workload, alpaca, sharegpt
from jpaged import LLM, BeamSearchParams, SamplingParams
from jpaged.demo.corpus import SourceFile

WIDTHS = (2, 4, 6)
KINDS = ("parallel", "beam")
MAX_NUM_SEQS = 96

type Percent = float | tuple[float, float]
"""A figure of the paper, or the ends of the range it states."""


@dataclass(frozen=True)
class Trace:
    """Requests of one data set's lengths.

    Args:
        name: the data set.
        lengths: distribution of the lengths, in words.
        work: prompts, of which only the lengths are used, and output lengths.
        paper: percent of blocks saved in the paper, by kind and width.
    """

    name: str
    lengths: str
    work: Workload
    paper: dict[str, Sequence[Percent]]


@dataclass(frozen=True)
class Saving:
    """Blocks in the tables of running sequences and the distinct ones among them, each summed over all steps."""

    num_logical_blocks: int
    num_physical_blocks: int
    num_steps: int
    num_copies_on_write: int

    @property
    def percent(self) -> float:
        """Blocks saved / blocks without sharing."""
        return 100 * (1 - self.num_physical_blocks / self.num_logical_blocks)


def make_traces(context_len: int) -> tuple[Trace, ...]:
    """The paper's data sets for a model of this context, prompt and output taking half of it each at most."""
    half = context_len // 2
    return (
        Trace(
            "Alpaca",
            f"log-normal, each at most {half}",
            alpaca(64, 21, longest=half),
            {"parallel": (6.09, 8.53, 9.79), "beam": (37.56, 53.13, 55.16)},
        ),
        Trace(
            "ShareGPT",
            f"log-normal, each at most {half} (the paper's: 1,024)",
            sharegpt(24, 22, longest=half),
            {"parallel": ((16.2, 30.5),) * 3, "beam": ((44.3, 66.3),) * 3},
        ),
    )


def add_options(parser: argparse.ArgumentParser) -> None:
    """This benchmark has no options of its own."""


def run(args: argparse.Namespace) -> int:
    """Measure, print and save."""
    # Without the prefix cache only the samples or beams of one request share blocks.
    llm = LLM(max_num_seqs=MAX_NUM_SEQS, max_num_batched_tokens=512, enable_prefix_caching=False)
    texts = held_out_tokens(llm.tokenizer)
    traces = make_traces(llm.max_model_len)
    num_tokens = sum(sum(WIDTHS) * len(KINDS) * trace.work.num_output_tokens for trace in traces)
    report = start_report(
        args,
        model="the model in the box",
        block_size=llm.engine.config.block_size,
        settings=asdict(llm.engine.config),
        prompts="Python source held out from the model's training",
        traces={},
    )
    with tqdm(total=num_tokens, desc="Generating", unit="token") as bar:
        for trace in traces:
            prompts = cut_prompts(texts, [len(prompt) for prompt in trace.work.prompts])
            savings = {
                kind: [_measure(llm, prompts, _params(trace.work, kind, width), bar) for width in WIDTHS]
                for kind in KINDS
            }
            report["traces"][trace.name] = _describe(trace, savings)
    print(render(report))
    print(f"written to {save(f'sharing_demo_{device_name()}', report, args.out)}")
    return 0


def held_out_tokens(tokenizer: Any) -> list[list[int]]:
    """Tokens of the standard library's top-level modules that the model in the box was not trained on."""
    root = Path(sysconfig.get_path("stdlib"))
    files = [SourceFile(path.name, path.read_text("utf-8")) for path in sorted(root.glob("*.py"))]
    return [tokenizer.encode(file.text) for file in files if file.is_held_out]


def cut_prompts(texts: list[list[int]], lengths: list[int]) -> list[list[int]]:
    """One piece of a text for each length. Every token that can begin a piece is equally likely."""
    rng = np.random.default_rng(23)
    prompts = []
    for length in lengths:
        num_starts = np.maximum([len(text) - length + 1 for text in texts], 0)
        text = texts[rng.choice(len(texts), p=num_starts / num_starts.sum())]
        start = rng.integers(len(text) - length + 1)
        prompts.append(text[start : start + length])
    return prompts


def _params(work: Workload, kind: str, width: int) -> list[SamplingParams]:
    """Parameters that make as many tokens as the trace says."""
    if kind == "beam":
        return [BeamSearchParams(width, n, ignore_eos=True).to_sampling_params() for n in work.output_lens]
    return [SamplingParams(n=width, max_tokens=n, ignore_eos=True) for n in work.output_lens]


def _measure(llm: LLM, prompts: list[list[int]], params: list[SamplingParams], bar: Any) -> Saving:
    scheduler, copies_before = llm.engine.scheduler, llm.stats().num_copies_on_write
    before = scheduler.stats()
    for delta in llm.stream(as_prompts(prompts), params):
        bar.update(len(delta.token_ids))
    after = scheduler.stats()
    assert after.num_preemptions == before.num_preemptions, "counts are of requests that hold all their blocks"
    return Saving(
        after.num_logical_blocks - before.num_logical_blocks,
        after.num_physical_blocks - before.num_physical_blocks,
        after.num_steps - before.num_steps,
        llm.stats().num_copies_on_write - copies_before,
    )


def _describe(trace: Trace, savings: dict[str, list[Saving]]) -> dict[str, Any]:
    work = trace.work
    return {
        "lengths": trace.lengths,
        "num_requests": len(work.prompts),
        "mean_prompt_len": work.num_prompt_tokens / len(work.prompts),
        "mean_output_len": work.num_output_tokens / len(work.prompts),
        "figures": [
            {"kind": kind, "width": width, "percent": saving.percent, "paper": paper, **asdict(saving)}
            for kind in KINDS
            for width, saving, paper in zip(WIDTHS, savings[kind], trace.paper[kind], strict=True)
        ],
    }


def render(report: dict[str, Any]) -> str:
    """The table: percent of blocks saved, here and in the paper."""
    lines = [f"Blocks saved by sharing, blocks of {report['block_size']}, {report['model']}"]
    for name, trace in report["traces"].items():
        lines.append(
            f"\n{name}: {trace['num_requests']} requests of {trace['mean_prompt_len']:.1f} tokens in and "
            f"{trace['mean_output_len']:.1f} out on average; {trace['lengths']}"
        )
        rows = {
            f"  {'beam width' if figure['kind'] == 'beam' else 'samples'} {figure['width']}": [
                f"{figure['percent']:.2f}%",
                _percent(figure["paper"]),
            ]
            for figure in trace["figures"]
        }
        lines.append(Table("", "here", "paper", first=20, width=14).text(rows))
    lines.append(
        "\nThe lengths decide how much samples share; the model decides how long beams share a past. This model has\n"
        "4 million parameters, the paper's 13 billion."
    )
    return "\n".join(lines) + "\n"


def _percent(paper: Percent) -> str:
    return f"{paper:.2f}%" if isinstance(paper, int | float) else f"{paper[0]:.1f} to {paper[1]:.1f}%"
