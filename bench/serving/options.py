"""The cost of sampling options: tokens/s of one work with each of them, beside the work without.

Requests as in sharegpt1000, shortened on the model in the box. Runs of all variants follow each other, again and again,
and a plain run precedes each, since the machine may be shared. A share is the median over the rounds.
"""

import dataclasses
import time
from argparse import Namespace
from collections.abc import Callable, Iterable
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any

from bench.report import Table, device_name, start_report
from bench.serving.runs import PEER_VOCAB_SIZE, as_prompts
from bench.workloads import Workload, sharegpt
from jpaged import LLM, SamplingParams
from jpaged.engine.loop import Engine

OPTIONS: dict[str, Callable[[int], dict[str, Any]]] = {
    "top_p 0.9, top_k 50": lambda _: {"top_p": 0.9, "top_k": 50},
    "min_tokens": lambda length: {"min_tokens": length, "ignore_eos": False},
    "logprobs 5": lambda _: {"logprobs": 5},
    "repetition_penalty 1.1": lambda _: {"repetition_penalty": 1.1},
    "frequency_penalty 0.5": lambda _: {"frequency_penalty": 0.5},
    "logit_bias": lambda _: {"logit_bias": {7: 1.0, 8: -1.0}},
    "stop string": lambda _: {"stop": "a text that no completion has"},
}
"""Sampling parameters of each option, for an output of a given length. None changes the number of tokens."""

PLAIN, MIXED, ALONE = "plain", "one of them in 5% of requests", ", one request alone"
MIXED_EVERY = 20
NUM_ROUNDS = 3


@dataclasses.dataclass(frozen=True, slots=True)
class Variant:
    """Requests to time: their prompts, and their parameters with and without options."""

    work: Workload
    params: list[SamplingParams]
    plain: list[SamplingParams]


def measure_options(llm: LLM, args: Namespace) -> tuple[str, dict[str, Any]]:
    """Measure and print. Returns the name and the content of the result file."""
    llm = _with_tokenizer(llm)
    is_small = args.random_weights is None
    sizes = (1000, 1) if not is_small else (32, 8)
    count, divisor = (max(sizes[0] // 4, 16), 4 * sizes[1]) if args.quick else sizes
    vocab_size = min(PEER_VOCAB_SIZE, llm.engine.model_config.vocab_size)
    work = _cut(sharegpt(count, vocab_size=vocab_size), divisor)
    alone = Workload(work.prompts[:1], [max(work.output_lens) if is_small else 256])
    variants = {name: _variant(work, [option]) for name, option in OPTIONS.items()}
    variants[MIXED] = _variant(work, OPTIONS.values(), every=MIXED_EVERY)
    variants |= {f"{name}{ALONE}": _variant(alone, [option]) for name, option in OPTIONS.items()}
    rounds, num_compiled = _run_rounds(llm, variants, 1 if args.quick else NUM_ROUNDS)
    table, results = Table("tokens/s", PLAIN, "with it", "share", first=44), {}
    print(table.header())
    for name, pairs in rounds.items():
        shares = [of_option / of_plain for of_plain, of_option in pairs]
        rates = {PLAIN: median(each for each, _ in pairs), "tokens_per_s": median(each for _, each in pairs)}
        results[name] = rates | {"share": median(shares), "shares": shares}
        print(table.row(name, *rates.values(), median(shares)))
    print(f"{num_compiled} programs were compiled while the clock ran")
    model = Path(args.random_weights or args.model or "demo").name
    return args.name or f"serving_options_{model}_{device_name()}" + "_quick" * args.quick, start_report(
        args,
        is_quick=args.quick,
        settings=dataclasses.asdict(llm.engine.config) | {"max_burst": llm.engine.scheduler.max_burst},
        workload=f"sharegpt({count}), lengths divided by {divisor}",
        num_output_tokens=work.num_output_tokens,
        num_rounds=len(next(iter(rounds.values()))),
        num_programs_compiled=num_compiled,
        options=results,
    )


def _run_rounds(
    llm: LLM, variants: dict[str, Variant], num_rounds: int
) -> tuple[dict[str, list[tuple[float, float]]], int]:
    """Tokens/s of each variant's pairs of runs, plain and with options; and the programs compiled meanwhile."""
    for variant in variants.values():  # programs that are compiled late are compiled now
        _rate(llm, variant.work, variant.params)
    programs = llm.engine.runner.programs
    num_programs, rounds = len(programs), {name: [] for name in variants}
    for _ in range(num_rounds):
        for name, variant in variants.items():
            of_plain = _rate(llm, variant.work, variant.plain)
            rounds[name].append((of_plain, _rate(llm, variant.work, variant.params)))
    return rounds, len(programs) - num_programs


def _rate(llm: LLM, work: Workload, params: list[SamplingParams]) -> float:
    start = time.perf_counter()
    results = llm.generate(as_prompts(work.prompts), params, use_tqdm=False)
    elapsed_s = time.perf_counter() - start
    assert sum(len(result.outputs[0].token_ids) for result in results) == work.num_output_tokens
    return work.num_output_tokens / elapsed_s


def _variant(work: Workload, options: Iterable[Callable[[int], dict[str, Any]]], every: int = 1) -> Variant:
    """Give one of some options, each in its turn, to every so many of the requests."""
    turn, params, plain = cycle(options), [], []
    for index, length in enumerate(work.output_lens):
        common = {"temperature": 1.0, "ignore_eos": True, "max_tokens": length, "seed": index}
        plain.append(SamplingParams(**common))
        params.append(SamplingParams(**common | next(turn)(length)) if index % every == 0 else plain[-1])
    return Variant(work, params, plain)


def _cut(work: Workload, divisor: int) -> Workload:
    return Workload(
        [prompt[: max(len(prompt) // divisor, 1)] for prompt in work.prompts],
        [max(length // divisor, 2) for length in work.output_lens],
    )


class _Numerals:
    """A tokenizer of random weights, whose token ids are text as numbers: stop strings need a text."""

    def encode(self, text: str) -> list[int]:
        return [int(each) for each in text.split()]

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = True) -> str:
        return "".join([f" {token_id}" for token_id in token_ids])


def _with_tokenizer(llm: LLM) -> LLM:
    """An LLM over the same runner, with a tokenizer."""
    engine = llm.engine
    if engine.tokenizer is not None:
        return llm
    return LLM.from_engine(Engine(engine.runner, engine.config, _Numerals()))
