"""``jpaged generate``: continues a prompt."""

import argparse
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from jpaged.cli import start
from jpaged.cli.options import cap, generate_params
from jpaged.cli.terminal import Answer, end_line, note, show, to_json, waiting
from jpaged.request import CompletionOutput, SamplingParams

if TYPE_CHECKING:
    from jpaged.llm import LLM


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    if not args.json and (args.logprobs is not None or args.prompt_logprobs is not None):
        raise ValueError("--logprobs and --prompt-logprobs are shown by --json only: add it")
    params = generate_params(args, {})  # finds mistakes before anything loads
    prompt = sys.stdin.read() if args.prompt == "-" and args.is_leader else args.prompt
    if not prompt:
        _check_empty_prompt(args)
    llm = start.load(args, num_sequences=params.num_sequences)
    params = generate_params(args, llm.engine.sampling_defaults)
    if args.max_tokens is None:
        params = cap(params, llm.max_model_len)
    if args.json:
        [output] = llm.generate(prompt, params, use_tqdm=sys.stderr.isatty())
        result = asdict(output)
        del result["times"]  # of a clock that counts from no known time
        print(to_json(result))
        _check_ends([output.error])
    elif params.use_beam_search or params.num_sequences > params.n:
        _print_ranked(llm, prompt, params)
    elif params.n == 1:
        answer = Answer()
        show(prompt, llm.stream(prompt, params), answer)
        end_line(prompt + answer.text)
        _check_ends([answer.error])
        if sys.stderr.isatty():
            note(f"[{answer}; --seed {params.seed} repeats it]" if params.temperature else f"[{answer}]")
    else:
        _print_whole(llm, prompt, params)


def _check_empty_prompt(args: argparse.Namespace) -> None:
    """Refuse an empty prompt before the weights are read, unless the tokenizer begins a text with a token."""
    from jpaged.engine.tokenizers import load_tokenizer
    from jpaged.llm import DEMO_MODEL

    path = DEMO_MODEL if args.model is None else Path(args.model)
    if path.is_dir() and not ((tokenizer := load_tokenizer(path)) and tokenizer.encode("")):
        raise ValueError("the prompt is empty: give at least one character")


def _check_ends(errors: Iterable[str | None]) -> None:
    """Raise ValueError with the first reason for which the engine ended a completion."""
    for error in filter(None, errors):
        raise ValueError(error)


def _print_whole(llm: "LLM", prompt: str, params: SamplingParams) -> None:
    """Print each of several completions, after the prompt and under a header, when it is complete."""
    texts, errors = [""] * params.n, []
    for delta in llm.stream(prompt, params):
        texts[delta.index] += delta.text
        if delta.finish_reason is not None:
            print(f"=== completion {delta.index + 1} of {params.n} ({delta.finish_reason}) ===")
            _print_text(prompt + texts[delta.index])
            errors.append(delta.error)
    _check_ends(errors)


def _print_ranked(llm: "LLM", prompt: str, params: SamplingParams) -> None:
    """Print the best of several completions, best first, once all are complete; a single one needs no header."""
    with waiting(f"{'searching' if params.use_beam_search else 'drawing'} {params.num_sequences} at once ..."):
        [result] = llm.generate(prompt, params, use_tqdm=False)
    for output in result.outputs:
        if params.use_beam_search or params.n > 1:
            print(f"=== completion {output.index + 1} of {params.n}, {_rank(output)} ({output.finish_reason}) ===")
        _print_text(prompt + output.text)
    _check_ends([result.error])


def _rank(output: CompletionOutput) -> str:
    """The number that ranks a completion."""
    if output.score is None:
        return f"log-probability {output.cumulative_logprob:.5g}"
    return f"score {output.score:.5g}"


def _print_text(text: str) -> None:
    sys.stdout.write(text)
    end_line(text)
