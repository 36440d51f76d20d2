"""The ``jpaged`` command: generate, chat, info. JAX loads inside the commands, so that ``--help`` is quick."""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Generator, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from jpaged.config import DTYPES, EngineConfig
from jpaged.request import MAX_LOGPROBS, CompletionDelta, FinishReason, SamplingParams

if TYPE_CHECKING:
    from jpaged.llm import LLM

MAX_BATCHED_TOKENS = 512
"""Of a step: prompts are computed in pieces of this size, so that one short command compiles small programs only."""

GENERATE_MAX_TOKENS = 128
CHAT_MAX_TOKENS = 512
TEMPERATURE = 0.8
"""Where completions should differ: in a chat, and for several completions of one prompt."""

_ENGINE_OPTIONS = (
    "dtype", "block_size", "num_blocks", "memory_fraction", "max_model_len", "tensor_parallel_size",
    "attention_implementation",
)  # fmt: skip
_SAMPLING_OPTIONS = (
    "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "stop",
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: what follows the program's name; None takes the process's own.

    Returns:
        The exit status: 0; 2 for a mistake of the caller's; 130 after Ctrl-C; 141 when nobody reads the output.
    """
    args = _make_parser().parse_args(argv)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # XLA's own log: errors only
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    try:
        args.run(args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter's last flush would fail
        return 141
    except (ValueError, OSError, NotImplementedError) as error:
        _note(f"jpaged: error: {' '.join(str(error).split())}")
        return 2
    return 0


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# generate -------------------------------------------------------------------------------------------------------------


def _generate(args: argparse.Namespace) -> None:
    if not args.json and (args.logprobs is not None or args.prompt_logprobs is not None):
        raise ValueError("--logprobs and --prompt-logprobs are shown by --json only: add it")
    params = replace(
        _sampling_params(args, GENERATE_MAX_TOKENS, 0.0 if args.n == 1 else TEMPERATURE),
        n=args.n,
        ignore_eos=args.ignore_eos,
        min_tokens=args.min_tokens,
        logprobs=args.logprobs,
        prompt_logprobs=args.prompt_logprobs,
    )
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    if not prompt:
        raise ValueError("the prompt is empty: give at least one character")
    llm = _load(args, max_num_seqs=args.n)
    if args.max_tokens is None and llm.tokenizer is not None:
        params = _fit(params, llm, len(llm.tokenizer.encode(prompt)))
    if args.json:
        [output] = llm.generate(prompt, params, use_tqdm=sys.stderr.isatty())
        print(json.dumps(asdict(output), ensure_ascii=False))
    elif args.n == 1:
        answer, deltas = _Answer(), llm.stream(prompt, params)  # which refuses a bad prompt before it is shown
        sys.stdout.write(prompt)
        _show(deltas, answer)
        _end_line(prompt + answer.text)
        if sys.stderr.isatty():
            _note(f"[{answer}; seed {params.seed}]" if params.temperature else f"[{answer}]")
    else:
        _print_whole(llm, prompt, params)


def _print_whole(llm: LLM, prompt: str, params: SamplingParams) -> None:
    """Print each of several completions, after the prompt and under a header, when it is complete."""
    texts = [""] * params.n
    for delta in llm.stream(prompt, params):
        texts[delta.index] += delta.text
        if delta.finish_reason is not None:
            print(f"=== completion {delta.index + 1} of {params.n} ({delta.finish_reason}) ===")
            sys.stdout.write(prompt + texts[delta.index])
            _end_line(prompt + texts[delta.index])


def _end_line(text: str) -> None:
    """End the line ``text`` was written on, if it did not end it itself."""
    if not text.endswith("\n"):
        sys.stdout.write("\n")
    sys.stdout.flush()


@dataclass(slots=True)
class _Answer:
    """One completion as it was streamed."""

    text: str = ""
    num_tokens: int = 0
    seconds: float = 0.0  # from the first token to the last
    finish_reason: FinishReason = FinishReason.ABORT

    def __str__(self) -> str:
        rate = f", {(self.num_tokens - 1) / self.seconds:.0f} a second" if self.seconds else ""
        return f"{self.num_tokens} tokens{rate}; ended by {self.finish_reason}"


def _show(deltas: Generator[CompletionDelta], answer: _Answer) -> None:
    """Write a completion to stdout as it comes, and into ``answer``, which is right even after Ctrl-C."""
    start = None
    with closing(deltas):
        for delta in deltas:
            sys.stdout.write(delta.text)
            sys.stdout.flush()
            start = start or time.monotonic()
            answer.text += delta.text
            answer.num_tokens += len(delta.token_ids)
            answer.seconds = time.monotonic() - start
            answer.finish_reason = delta.finish_reason or answer.finish_reason


# chat -----------------------------------------------------------------------------------------------------------------


def _chat(args: argparse.Namespace) -> None:
    params = _sampling_params(args, CHAT_MAX_TOKENS, TEMPERATURE)
    llm = _load(args, max_num_seqs=1)
    if getattr(llm.tokenizer, "chat_template", None) is None:
        raise ValueError(
            f"{args.model or 'the model in the package'} has no chat template, so it is not made for conversation: "
            "use jpaged generate"
        )
    history = [{"role": "system", "content": args.system}] if args.system else []
    messages = list(history)
    if sys.stdin.isatty():
        import readline  # noqa: F401 - gives input() line editing and a history

        _note("/reset forgets the conversation, /quit or Ctrl-D ends it, Ctrl-C stops an answer")
    try:
        while (text := _read_message()) is not None:
            if text == "/reset":
                messages = list(history)
                _note("[forgotten]")
            elif text:
                _answer(llm, messages, text, params)
    finally:
        blocks = llm.engine.blocks.stats()
        _note(
            f"[{blocks.prefix_hit_tokens} of {blocks.prefix_queried_tokens} prompt tokens came from the prefix cache]"
        )


def _read_message() -> str | None:
    """The user's next line, stripped; None at the end."""
    try:
        text = input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None
    return None if text == "/quit" else text


def _answer(llm: LLM, messages: list[dict[str, str]], text: str, params: SamplingParams) -> None:
    """Answer one message. Question and answer join ``messages``: the next turn finds them in the prefix cache."""
    turn = [*messages, {"role": "user", "content": text}]
    token_ids = llm.tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False)
    room = llm.max_model_len - len(token_ids)
    if room < 1:
        _note(
            f"[your message would make the conversation {len(token_ids)} tokens long and the context holds "
            f"{llm.max_model_len}: shorten it, or /reset to start afresh]"
        )
        return
    answer = _Answer()
    with suppress(KeyboardInterrupt):  # what there is of the answer stays
        _show(llm.stream({"prompt_token_ids": token_ids}, _fit(params, llm, len(token_ids))), answer)
    _end_line(answer.text)
    messages[:] = [*turn, {"role": "assistant", "content": answer.text}]
    if answer.finish_reason is FinishReason.LENGTH:
        is_full = room <= (params.max_tokens or room)
        _note(
            f"[the context of {llm.max_model_len} tokens is full: /reset to start afresh]"
            if is_full
            else f"[cut off after {params.max_tokens} tokens: start with a higher --max-tokens for more]"
        )


# info -----------------------------------------------------------------------------------------------------------------


def _info(args: argparse.Namespace) -> None:
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # only looks: leaves the memory to others
    config = EngineConfig(**_engine_options(args))
    from jpaged.info import gather_info

    info = gather_info(args.model, config)
    print(json.dumps(asdict(info)) if args.json else info)


# Options --------------------------------------------------------------------------------------------------------------


def _engine_options(args: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(args, name) for name in _ENGINE_OPTIONS}


def _load(args: argparse.Namespace, *, max_num_seqs: int) -> LLM:
    """The model, each program to be compiled when it is first needed: a command needs few."""
    from jpaged.llm import LLM

    return LLM(
        args.model,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max(MAX_BATCHED_TOKENS, max_num_seqs),
        enable_prefix_caching=not args.no_prefix_caching,
        warm_up=False,
        use_tqdm=sys.stderr.isatty(),
        **_engine_options(args),
    )


def _sampling_params(args: argparse.Namespace, max_tokens: int, temperature: float) -> SamplingParams:
    """What the options say, with a command's own defaults and, if none was given, a seed drawn now."""
    return SamplingParams(
        max_tokens=max_tokens if args.max_tokens is None else args.max_tokens,
        temperature=temperature if args.temperature is None else args.temperature,
        seed=random.SystemRandom().getrandbits(32) if args.seed is None else args.seed,
        **{name: getattr(args, name) for name in _SAMPLING_OPTIONS},
    )


def _fit(params: SamplingParams, llm: LLM, prompt_len: int) -> SamplingParams:
    """``params`` with ``max_tokens`` no more than the context leaves after the prompt (but 1, if it leaves nothing)."""
    return replace(
        params, max_tokens=max(1, min(params.max_tokens or llm.max_model_len, llm.max_model_len - prompt_len))
    )


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the paragraphs of descriptions, and gives options room."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=32, width=110)


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jpaged",
        description="Text from a Hugging Face checkpoint, in JAX, over a paged KV cache.",
        epilog=_EPILOG,
        formatter_class=_HelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"jpaged {version('jpaged')}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    generate = commands.add_parser(
        "generate",
        help="complete a prompt",
        description=_GENERATE,
        epilog=_GENERATE_EXAMPLES,
        formatter_class=_HelpFormatter,
    )
    generate.set_defaults(run=_generate)
    generate.add_argument("prompt", metavar="PROMPT", help="the text to continue; - reads it from stdin, as it is")
    _add_sampling_options(generate, GENERATE_MAX_TOKENS, f"0, greedy; {TEMPERATURE} with -n above 1")
    _add_generate_options(generate)
    _add_engine_options(generate)
    _add_prefix_caching_option(generate)
    chat = commands.add_parser(
        "chat", help="talk to a model made for conversation", description=_CHAT, formatter_class=_HelpFormatter
    )
    chat.set_defaults(run=_chat)
    chat.add_argument("--system", metavar="TEXT", help="instructions that come before the conversation")
    _add_sampling_options(chat, CHAT_MAX_TOKENS, str(TEMPERATURE))
    _add_engine_options(chat)
    _add_prefix_caching_option(chat)
    info = commands.add_parser(
        "info", help="show the machine, the model and the KV cache", description=_INFO, formatter_class=_HelpFormatter
    )
    info.set_defaults(run=_info)
    info.add_argument("--json", action="store_true", help="print one JSON object")
    _add_engine_options(info)
    return parser


def _add_generate_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("completions")
    add = group.add_argument
    add("-n", type=int, default=1, metavar="N", help="completions of the prompt, computed together (default: 1)")
    add("--min-tokens", type=int, default=0, metavar="N", help="no end of text before this many tokens (default: 0)")
    add("--ignore-eos", action="store_true", help="go on past the end of text, up to --max-tokens")
    add("--json", action="store_true", help="print one JSON object when all is done, instead of text as it comes")
    logprobs = f"0 to {MAX_LOGPROBS}; needs --json"
    add(
        "--logprobs", type=int, metavar="N", help=f"log-probabilities of each token and of the N likeliest ({logprobs})"
    )
    add("--prompt-logprobs", type=int, metavar="N", help=f"the same for the tokens of the prompt ({logprobs})")


def _add_sampling_options(parser: argparse.ArgumentParser, max_tokens: int, temperature: str) -> None:
    defaults = SamplingParams()
    add = parser.add_argument_group("sampling").add_argument

    def add_number(name: str, type_: type, help_: str) -> None:
        value = getattr(defaults, name)
        add(
            f"--{name.replace('_', '-')}",
            type=type_,
            default=value,
            metavar="X",
            help=f"{help_} (default: {value:g}, off)",
        )

    add(
        "--max-tokens",
        type=int,
        metavar="N",
        help=f"tokens to generate at most (default: {max_tokens}, or what the context leaves)",
    )
    add(
        "--temperature",
        type=float,
        metavar="X",
        help=f"0 takes the likeliest token; higher is more varied (default: {temperature})",
    )
    add_number("top_p", float, "draw from the likeliest tokens that together reach this probability")
    add_number("top_k", int, "draw from this many likeliest tokens")
    add_number("min_p", float, "drop tokens less probable than this share of the likeliest one's probability")
    add_number("presence_penalty", float, "taken off the logit of every token already generated, -2 to 2")
    add_number("frequency_penalty", float, "the same for each time it was generated, -2 to 2")
    add_number("repetition_penalty", float, "divides the logits of tokens already in the prompt or the output")
    add("--seed", type=int, metavar="N", help="equal seeds give equal text (default: a new one every time)")
    add("--stop", action="append", metavar="TEXT", help="end before this text; may be given several times")


def _add_engine_options(parser: argparse.ArgumentParser) -> None:
    defaults = EngineConfig()
    add = parser.add_argument_group("model and engine").add_argument
    add(
        "--model",
        metavar="DIR",
        help="Hugging Face checkpoint: config.json, *.safetensors, tokenizer (default: the small model in the package)",
    )
    add(
        "--dtype",
        choices=DTYPES,
        default=defaults.dtype,
        help="of weights and KV cache (default: auto, the checkpoint's own; float32 on a CPU)",
    )
    add(
        "--block-size",
        type=int,
        default=defaults.block_size,
        metavar="N",
        help="tokens in a KV block (default: %(default)s)",
    )
    add("--num-blocks", type=int, metavar="N", help="blocks in the KV cache (default: what --memory-fraction leaves)")
    add(
        "--memory-fraction",
        type=float,
        default=defaults.memory_fraction,
        metavar="X",
        help="of the device's memory, for weights, workspace and KV cache together (default: %(default)s)",
    )
    add(
        "--max-model-len",
        type=int,
        metavar="N",
        help="tokens of prompt and output together (default: the model's own limit)",
    )
    add(
        "--tensor-parallel-size",
        type=int,
        default=defaults.tensor_parallel_size,
        metavar="N",
        help="devices to spread the model over (default: %(default)s)",
    )
    add(
        "--attention-implementation",
        metavar="NAME",
        help="attention kernel (default: the best one here; jpaged info names it)",
    )


def _add_prefix_caching_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--no-prefix-caching", action="store_true", help="do not reuse the KV of equal beginnings of prompts"
    )


_EPILOG = """\
examples:
  jpaged generate "def fibonacci(n):"
  jpaged chat --model ~/models/Llama-3.2-1B-Instruct
  jpaged info --json

Text goes to stdout. Errors go to stderr, and so do progress and rates if stderr is a terminal. Exit status:
0; 2 after a mistake in the options, the prompt or the checkpoint; 130 after Ctrl-C.
On a GPU the command takes 95% of the memory, unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise. Compiled
programs are kept for the next run, in the directory that jpaged info names.
"""

_GENERATE = """\
Continue PROMPT and print it together with its continuation, token by token as they come. With -n above 1 each
completion is printed whole, after the prompt and under a header, when it is complete. --json prints the result
alone: an object whose "outputs" hold text, token_ids, finish_reason ("stop" or "length") and log-probabilities.

The default is greedy, the likeliest token at every step: the same prompt always gives the same text.
"""

_GENERATE_EXAMPLES = """\
examples:
  jpaged generate "def fibonacci(n):"
  jpaged generate "class Stack:" -n 3 --max-tokens 60 --stop $'\\n\\n\\n'
  jpaged generate - --temperature 0.4 --seed 1 < start.py > whole.py
  jpaged generate "import " --json --logprobs 5 | python -m json.tool
"""

_CHAT = """\
Talk to a model that has a chat template. Every message is answered with the whole conversation before it as
context; what was computed for earlier turns is found in the prefix cache. At the end it says how many prompt
tokens were.

  /reset         forget the conversation (not --system)
  /quit, Ctrl-D  end it
  Ctrl-C         stop an answer (what there is of it stays); end the conversation when there is none
"""

_INFO = """\
Show versions, devices, the attention kernel chosen and why, where compiled programs are kept, the model's shape,
and the KV cache that jpaged.LLM would make with these options. Reads config.json but no weights, and allocates
nothing; on an accelerator a step's workspace still comes off the pool.
"""
