"""Every option of the ``jpaged`` command, its default and its help."""

import argparse
from importlib.metadata import version

from jpaged.config import DTYPES, KV_CACHE_DTYPES, PREEMPTIONS, EngineConfig
from jpaged.request import MAX_BEAM_WIDTH, MAX_LOGPROBS, SamplingParams

GENERATE_MAX_TOKENS = 128
CHAT_MAX_TOKENS = 512
DRAWING = SamplingParams(temperature=0.8, top_p=0.9)
"""Small models, such as the one in the package, repeat themselves when greedy and lose the thread when free."""

EARLY_STOPPING = {"false": False, "true": True, "never": "never"}

_EPILOG = """\
examples:
  jpaged generate "def fibonacci(n):"
  jpaged chat --model ~/models/Llama-3.2-1B-Instruct
  jpaged info --json

Text goes to stdout. Errors go to stderr, and so do progress and rates if stderr is a terminal. Exit status:
0; 2 after a mistake in the options, the prompt or the checkpoint (1 and a traceback with --debug); 130 after
Ctrl-C.
On a GPU the command takes 95% of the memory, unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise. Compiled
programs are kept for the next run, in the directory that jpaged info names.
"""

_GENERATE = """\
Continue PROMPT and print it together with its continuation, token by token as they come. With -n above 1 each
completion is printed whole, after the prompt and under a header, when it is complete. --json prints the result
alone: an object whose "outputs" hold text, token_ids, finish_reason ("stop" or "length"), log-probabilities and
the score of a beam search.

Text is drawn at random, and differs from one run to the next; on a terminal the seed that repeats it is shown.
With --temperature 0 the likeliest token is taken at every step, so the same prompt always gives the same text.

With --beam-width nothing is drawn: the completions that are the likeliest as a whole are searched for, and printed
with their scores, best first, when the search is over. Options that change what is drawn do not go with it.
"""

_GENERATE_EXAMPLES = """\
examples:
  jpaged generate "def fibonacci(n):"
  jpaged generate "class Stack:" -n 3 --max-tokens 60 --stop $'\\n\\n\\n'
  jpaged generate "def add(a, b):" --beam-width 4 --max-tokens 16
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
the KV cache that jpaged.LLM would make with these options, its host pool, and what becomes of a request that has to
make way. Reads config.json but no weights, and allocates nothing; on an accelerator a step's workspace still comes
off the KV cache.
"""


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the paragraphs of descriptions, and gives options room."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=32, width=110)


def make_parser() -> argparse.ArgumentParser:
    """The parser; ``command`` of what it returns is the command's name."""
    parser = argparse.ArgumentParser(
        prog="jpaged",
        description="Text from a Hugging Face checkpoint, in JAX, over a paged KV cache.",
        epilog=_EPILOG,
        formatter_class=_HelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"jpaged {version('jpaged')}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    generate = commands.add_parser(
        "generate",
        help="complete a prompt",
        description=_GENERATE,
        epilog=_GENERATE_EXAMPLES,
        formatter_class=_HelpFormatter,
    )
    generate.add_argument("prompt", metavar="PROMPT", help="the text to continue; - reads it from stdin, as it is")
    _add_sampling_options(generate, GENERATE_MAX_TOKENS)
    _add_generate_options(generate)
    _add_beam_options(generate)
    _add_engine_options(generate)
    _add_prefix_caching_option(generate)
    chat = commands.add_parser(
        "chat", help="talk to a model made for conversation", description=_CHAT, formatter_class=_HelpFormatter
    )
    chat.add_argument("--system", metavar="TEXT", help="instructions that come before the conversation")
    _add_sampling_options(chat, CHAT_MAX_TOKENS)
    _add_engine_options(chat)
    _add_prefix_caching_option(chat)
    info = commands.add_parser(
        "info", help="show the machine, the model and the KV cache", description=_INFO, formatter_class=_HelpFormatter
    )
    info.add_argument("--json", action="store_true", help="print one JSON object")
    _add_engine_options(info)
    for command in (generate, chat, info):
        command.add_argument("--debug", action="store_true", help="show where an error was raised: Python's traceback")
    return parser


def _add_generate_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("completions")
    add = group.add_argument
    add(
        "-n",
        type=int,
        metavar="N",
        help="completions of the prompt, computed together (default: 1; with --beam-width all it finds)",
    )
    add("--best-of", type=int, metavar="N", help="draw this many and print the -n likeliest, best first (default: -n)")
    add("--min-tokens", type=int, default=0, metavar="N", help="no end of text before this many tokens (default: 0)")
    add("--ignore-eos", action="store_true", help="go on past the end of text, up to --max-tokens")
    add("--json", action="store_true", help="print one JSON object when all is done, instead of text as it comes")
    logprobs = f"0 to {MAX_LOGPROBS}; needs --json"
    add(
        "--logprobs", type=int, metavar="N", help=f"log-probabilities of each token and of the N likeliest ({logprobs})"
    )
    add("--prompt-logprobs", type=int, metavar="N", help=f"the same for the tokens of the prompt ({logprobs})")


def _add_beam_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("beam search").add_argument
    width = f"search for the likeliest completions, following this many at once: 1 to {MAX_BEAM_WIDTH} (default: off)"
    add("--beam-width", type=int, metavar="N", help=width)
    add(
        "--length-penalty",
        type=float,
        metavar="X",
        help="a score is the log-probability / length ** X: above 0 favours long texts (default: 1.0)",
    )
    add(
        "--early-stopping",
        choices=tuple(EARLY_STOPPING),
        help="true stops at --beam-width finished texts; false when a better one is unlikely, never when it is "
        "impossible (default: false)",
    )


def _add_sampling_options(parser: argparse.ArgumentParser, max_tokens: int) -> None:
    add = parser.add_argument_group("sampling").add_argument

    def add_number(name: str, type_: type, help_: str) -> None:
        """An option that stays None where it is not given: a beam search has no use for the default."""
        option = f"--{name.replace('_', '-')}"
        add(option, type=type_, metavar="X", help=f"{help_} (default: {getattr(DRAWING, name)})")

    add(
        "--max-tokens",
        type=int,
        metavar="N",
        help=f"tokens to generate at most; a full context ends the text sooner (default: {max_tokens})",
    )
    add_number("temperature", float, "0 always takes the likeliest token; higher is more varied")
    add_number("top_p", float, "draw from the likeliest tokens that together reach this probability; 1 is off")
    add_number("top_k", int, "draw from this many likeliest tokens; 0 is off")
    add_number("min_p", float, "drop tokens less probable than this share of the likeliest one's probability")
    add_number("presence_penalty", float, "taken off the logit of every token already generated, -2 to 2")
    add_number("frequency_penalty", float, "the same, for each time it was generated")
    add_number("repetition_penalty", float, "divides the logits of tokens in the prompt or the output; 1 is off")
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
        "--kv-cache-dtype",
        choices=KV_CACHE_DTYPES,
        default=defaults.kv_cache_dtype,
        help="of the KV cache: fp8 and int8 hold twice the tokens in the same memory (default: auto, that of --dtype)",
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
    several = parser.add_argument_group(
        "several processes",
        "One model over the devices of several machines: start the same command on each. The first one reads the "
        "prompt and prints; --tensor-parallel-size counts the devices of all.",
    )
    several.add_argument(
        "--distributed", action="store_true", help="bring them together, as JAX finds out by itself (Cloud TPU, Slurm)"
    )
    several.add_argument("--coordinator-address", metavar="HOST:PORT", help="of the first process, elsewhere")
    several.add_argument("--num-processes", type=int, metavar="N", help="of them all")
    several.add_argument("--process-id", type=int, metavar="I", help="of this one, from 0")
    parser.set_defaults(is_leader=True)
    add(
        "--attention-implementation",
        metavar="NAME",
        help="attention kernel (default: the best one here; jpaged info names it)",
    )
    add(
        "--interpret",
        action="store_true",
        help="run the attention kernel named in Pallas's interpreter, on any device: slow, to try what this machine "
        "cannot run",
    )
    add(
        "--max-burst",
        type=int,
        metavar="N",
        help="decode steps in a row before the host sees their tokens (default: 4 on an accelerator, 1 on a CPU)",
    )
    add(
        "--preemption",
        choices=PREEMPTIONS,
        default=defaults.preemption,
        help="how a request that had to make way comes back: its KV from the host pool (swap), computed again "
        "(recompute), or what is quicker here (default: %(default)s)",
    )
    add(
        "--num-host-blocks",
        type=int,
        metavar="N",
        help="blocks in the host pool, where KV goes that makes way; 0: none",
    )
    add(
        "--host-memory-bytes",
        type=int,
        metavar="N",
        help="the host pool's size in bytes instead (default: up to 4 GiB; none on a CPU unless --preemption swap)",
    )


def _add_prefix_caching_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--no-prefix-caching", action="store_true", help="do not reuse the KV of equal beginnings of prompts"
    )
