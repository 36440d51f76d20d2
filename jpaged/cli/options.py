"""Every option of the ``jpaged`` command, made from the settings that it sets."""

import argparse
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from importlib.metadata import version
from typing import Any, NoReturn

from jpaged.config import WARM_UP, EngineConfig
from jpaged.request import BeamSearchParams, SamplingParams
from jpaged.rules import Setting, settings_of
from jpaged.server.settings import ServerSettings

GENERATE_MAX_TOKENS = 128
CHAT_MAX_TOKENS = 512
DRAWING = SamplingParams(temperature=0.8, top_p=0.9)
"""Small models, such as the one in the package, repeat themselves when greedy and lose the thread when free."""
PARAMETERS_OF_DRAWING = ("temperature", "top_p", "top_k", "min_p")
"""``DRAWING`` belongs together: a checkpoint that recommends one of these is drawn from by its own alone."""

EARLY_STOPPING = {"false": False, "true": True, "never": "never"}

SERVING_OPTIONS = tuple(name for name in settings_of(EngineConfig) if name != "enable_prefix_caching")
"""Settings of an engine that computes requests of many clients; --no-prefix-caching has a default of its own."""

ENGINE_OPTIONS = tuple(name for name in SERVING_OPTIONS if name != "seed")
"""Settings of an engine that computes the requests of one command, which draws their seeds."""

MAX_BATCHED_TOKENS = 512
"""Most tokens of a step of such a command: prompts are computed in pieces, so that it compiles small programs only."""

_OWN_DEFAULTS = {
    "max_num_seqs": "as many as the prompt asks for",
    "max_num_batched_tokens": f"{MAX_BATCHED_TOKENS}, or what that many sequences need",
}
"""Defaults of a command with one prompt at a time, in words."""

SERVER_OPTIONS = tuple(settings_of(ServerSettings))
BATCH_OPTIONS = "served_model_name", "strict_params", "max_prompts", "max_sequences", "max_logprobs_entries"
SAMPLING_OPTIONS = (
    "max_tokens", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty",
    "repetition_penalty", "seed", "stop", "stop_token_ids",
)  # fmt: skip
COMPLETION_OPTIONS = "n", "best_of", "min_tokens", "ignore_eos", "logprobs", "prompt_logprobs"
BEAM_OPTIONS = "beam_width", "length_penalty", "early_stopping"

_EPILOG = """\
examples:
  jpaged generate "def fibonacci(n):"
  jpaged chat --model ~/models/Llama-3.2-1B-Instruct
  jpaged serve --model Qwen/Qwen3-0.6B
  jpaged batch requests.jsonl results.jsonl
  jpaged info --json

Text goes to stdout. Errors go to stderr, and so do progress and rates if stderr is a terminal. Exit status:
0; 2 after a mistake in the options, the prompt or the checkpoint (1 and a traceback with --debug); 1 if the
engine fails a server or a batch; 130 after Ctrl-C, which ends a server with 0.
On a GPU the command takes 95% of the memory, unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise. Compiled
programs are kept for the next run, in the directory that jpaged info names.
"""

_GENERATE = """\
Continue PROMPT and print it together with its continuation, token by token as they come. With -n above 1 each
completion is printed whole, after the prompt and under a header, when it is complete. --json prints the result
alone: an object whose "outputs" hold text, token_ids, finish_reason ("stop", "length" or "error"), log-probabilities
and the score of a beam search. A number that JSON cannot say is null.

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
context; the KV of earlier messages is found in the prefix cache. At the end the command says how many prompt
tokens were found there.

  /reset         forget the conversation (not --system)
  /quit, Ctrl-D  end it
  Ctrl-C         stop an answer (what there is of it stays); end the conversation when there is none
"""

_INFO = """\
Show versions, devices, the attention kernel chosen and why, where compiled programs are kept, the model's shape,
the KV cache that jpaged.LLM would make with these options, its host pool, and how preempted requests come back.
Reads config.json but no weights, and allocates nothing; on an accelerator a step's workspace still comes off the KV
cache.
"""


_SERVE = """\
Serve a model over HTTP, under the names of OpenAI's API: /v1/completions, /v1/chat/completions and more. On an
accelerator the programs of a few sizes are compiled before the first request, and the others beside the requests;
all are kept for the next start, and /health tells the progress. On a CPU each is compiled when it is first needed,
unless --warm-up says otherwise.

SIGTERM and Ctrl-C take no more requests and let those finish that run; a second one ends them. SIGHUP reads the
file of keys again. The exit status is 1 if the engine is lost.
"""

_SERVE_EXAMPLES = """\
examples:
  jpaged serve
  curl localhost:8000/v1/completions -H 'content-type: application/json' -d '{"prompt": "def add(a, b):"}'
"""

_BATCH = """\
Compute the requests of a file and write their results to another one, both in the format of OpenAI's batches: one
JSON object on each line. A request has "custom_id", "method", "url" (/v1/completions or /v1/chat/completions) and
"body". Its result has the same custom_id and the response, or the error; results come in the order in which they
are done.

After Ctrl-C the results that are done stay. The same command goes on from there, and computes again what failed for
a reason that was not the request's.
"""

_BATCH_EXAMPLES = """\
examples:
  echo '{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "def "}}' > in.jsonl
  jpaged batch in.jsonl out.jsonl
"""

_METAVARS = {int: "N", float: "X", str: "NAME", list: "TEXT"}


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the paragraphs of descriptions, and gives options room."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=32, width=110)


class _Parser(argparse.ArgumentParser):
    """Names the option that an unknown option resembles."""

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> tuple[Any, list[str]]:
        known, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(self._explain(unknown))
        return known, unknown

    def error(self, message: str) -> NoReturn:
        super().error(f"{message} ({self.prog} --help shows all)")

    def _explain(self, unknown: list[str]) -> str:
        options = [each.partition("=")[0] for each in unknown if each.startswith("-")]
        if not options:
            remedy = "a text of several words needs quotes" if "generate" in self.prog else "--model names a checkpoint"
            return f"{unknown[0]!r} is one argument too many: {remedy}"
        similar = get_close_matches(options[0].replace("_", "-"), self._option_string_actions, n=1)
        return f"unknown option {options[0]}" + (f": did you mean {similar[0]}?" if similar else "")


def make_parser() -> argparse.ArgumentParser:
    """The parser; ``command`` of what it returns is the command's name."""
    parser = _Parser(
        prog="jpaged",
        description="Text from a Hugging Face checkpoint, in JAX, over a paged KV cache.",
        epilog=_EPILOG,
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"jpaged {version('jpaged')}")
    commands = parser.add_subparsers(dest="command", metavar="{generate,chat,serve,batch,info}", required=True)

    def add_command(name: str, help_: str, description: str, epilog: str | None = None) -> argparse.ArgumentParser:
        arguments = {"generate": " PROMPT", "batch": " IN OUT"}
        return commands.add_parser(
            name,
            usage=f"jpaged {name} [OPTIONS]{arguments.get(name, '')}",
            help=help_,
            description=description,
            epilog=epilog,
            formatter_class=_HelpFormatter,
            allow_abbrev=False,
        )

    generate = add_command("generate", "complete a prompt", _GENERATE, _GENERATE_EXAMPLES)
    generate.add_argument("prompt", metavar="PROMPT", help="the text to continue; - reads it from stdin, as it is")
    _add_sampling_options(generate, GENERATE_MAX_TOKENS)
    _add_completion_options(generate)
    _add_beam_options(generate)
    chat = add_command("chat", "talk to a model made for conversation", _CHAT)
    chat.add_argument("--system", metavar="TEXT", help="instructions that come before the conversation")
    _add_sampling_options(chat, CHAT_MAX_TOKENS)
    serve = add_command("serve", "serve a model over HTTP, under OpenAI's names", _SERVE, _SERVE_EXAMPLES)
    _add_server_options(serve, SERVER_OPTIONS)
    batch = add_command("batch", "compute a file of requests", _BATCH, _BATCH_EXAMPLES)
    batch.add_argument("source", metavar="IN", help="file of requests")
    batch.add_argument("destination", metavar="OUT", help="file of results; one that is there is continued")
    _add_server_options(batch, BATCH_OPTIONS)
    info = add_command("info", "show the machine, the model and the KV cache", _INFO)
    info.add_argument("--json", action="store_true", help="print one JSON object")
    for command in (generate, chat, serve, batch, info):
        is_serving, is_single = command in (serve, batch), command in (generate, chat)
        group = _add_engine_options(
            command, SERVING_OPTIONS if is_serving else ENGINE_OPTIONS, _OWN_DEFAULTS if is_single else {}
        )
        if is_serving:
            _add(group, WARM_UP, shown=WARM_UP.shown_default, default=WARM_UP.default)
        _add_process_options(command)
        command.add_argument("--debug", action="store_true", help="show where an error was raised: Python's traceback")
    for command in (generate, chat, serve, batch):
        command.add_argument(
            "--no-prefix-caching", action="store_true", help="do not reuse the KV of equal beginnings of prompts"
        )
    return parser


def _add(group: Any, each: Setting, *flags: str, shown: str, **more: Any) -> None:
    """Add the option of a setting.

    Args:
        group: group of the parser.
        each: the setting.
        flags: the option's names, if they are not the setting's.
        shown: the default in words; "" says none.
        more: arguments of ``add_argument``.
    """
    flags = flags or (f"--{each.name.replace('_', '-')}",)
    help_ = re.sub(
        "``(.*?)``", lambda found: _as_option(found[1]), f"{each.help} (default: {shown})" if shown else each.help
    )
    if each.rule.type is bool:
        more = {"action": "store_true"} | more
    elif each.rule.choices:
        more = {"choices": each.rule.choices} | more
    elif each.rule.type is list:
        more = {"action": "append", "metavar": _METAVARS[list]} | more
    else:
        more = {"type": each.rule.type, "metavar": _METAVARS[each.rule.type]} | more
    group.add_argument(*flags, help=help_.replace("%", "%%"), **more)


def _as_option(name: str) -> str:
    return {"n": "-n", "use_beam_search": "--beam-width"}.get(name, f"--{name.replace('_', '-')}")


_PROCESSES = "coordinator_address", "num_processes", "process_id"
_SETTINGS = (
    *SERVING_OPTIONS, *SERVER_OPTIONS, *SAMPLING_OPTIONS, *COMPLETION_OPTIONS, *BEAM_OPTIONS, *_PROCESSES,
    "use_beam_search", "warm_up",
)  # fmt: skip
_SETTING = re.compile(rf"(?<![\w/.-])({'|'.join(_SETTINGS)})\b(?:=('?)([^\s,:;)]+)\2)?")


def as_typed(message: str) -> str:
    """The message of an error with options, as users type them, instead of settings: "-n 0" for "n=0"."""

    def option(found: re.Match[str]) -> str:
        name, _, value = found.groups()
        if value is None:  # a word such as "seed" is a setting only where it has a value
            return _as_option(name) if "_" in name else name
        if value == "True":
            return _as_option(name)
        if value in ("False", "None"):
            return f"no {_as_option(name)}"
        return f"{_as_option(name)} {value}"

    return _SETTING.sub(option, message).replace("expected None or ", "expected ")


def _add_engine_options(parser: argparse.ArgumentParser, names: Iterable[str], own_defaults: Mapping[str, str]) -> Any:
    group = parser.add_argument_group("model and engine")
    group.add_argument(
        "--model",
        metavar="MODEL",
        help="directory of a Hugging Face checkpoint (config.json, *.safetensors, tokenizer), or a repository of the "
        "hub, ORG/NAME or ORG/NAME@REVISION, which is downloaded once (default: the small model in the package)",
    )
    settings = settings_of(EngineConfig)
    for name in names:
        each = settings[name]
        shown = "" if each.rule.type is bool else own_defaults.get(name, each.shown_default)
        _add(group, each, shown=shown, default=each.default)
    return group


def _add_server_options(parser: argparse.ArgumentParser, names: Iterable[str]) -> None:
    group, settings = parser.add_argument_group("server"), settings_of(ServerSettings)
    for name in names:
        each = settings[name]
        _add(group, each, shown="" if each.rule.type is bool else each.shown_default, default=None)


def _add_process_options(parser: argparse.ArgumentParser) -> None:
    several = parser.add_argument_group(
        "several processes",
        "One model over the devices of several machines: start the same command on each. The first one reads the "
        "prompt and prints; --tensor-parallel-size counts the devices of all.",
    )
    several.add_argument(
        "--distributed", action="store_true", help="bring them together, as JAX finds out by itself (Cloud TPU, Slurm)"
    )
    several.add_argument("--coordinator-address", metavar="HOST:PORT", help="address of the first process")
    several.add_argument("--num-processes", type=int, metavar="N", help="number of processes")
    several.add_argument("--process-id", type=int, metavar="I", help="number of this process, from 0")
    parser.set_defaults(is_leader=True)


def _add_sampling_options(parser: argparse.ArgumentParser, max_tokens: int) -> None:
    description = (
        "Defaults are those that generation_config.json of the checkpoint names (--generation-config none leaves them "
        "out), and otherwise these. A file that names a temperature, top_p, top_k or min_p sets all four."
    )
    group, settings = parser.add_argument_group("sampling", description), settings_of(SamplingParams)
    for name in SAMPLING_OPTIONS:
        shown = settings[name].unset or str(max_tokens if name == "max_tokens" else getattr(DRAWING, name))
        more = {"type": int, "metavar": "ID"} if name == "stop_token_ids" else {}
        # None where the option is not given: a beam search has no use for the default.
        _add(group, settings[name], shown=shown, default=None, **more)


def _add_completion_options(parser: argparse.ArgumentParser) -> None:
    group, settings = parser.add_argument_group("completions"), settings_of(SamplingParams)
    shown = dict.fromkeys(COMPLETION_OPTIONS, "") | {
        "n": "1; with --beam-width as many as it finds",
        "best_of": "-n",
        "min_tokens": "0",
        "logprobs": "off; needs --json",
        "prompt_logprobs": "off; needs --json",
    }
    for name in COMPLETION_OPTIONS:
        flags = ("-n",) if name == "n" else ()
        _add(group, settings[name], *flags, shown=shown[name], default=None)
    group.add_argument(
        "--json", action="store_true", help="print one JSON object when all is done, instead of text as it comes"
    )


def _add_beam_options(parser: argparse.ArgumentParser) -> None:
    group, settings = parser.add_argument_group("beam search"), settings_of(BeamSearchParams)
    _add(group, settings["beam_width"], shown="off", default=None)
    _add(group, settings["length_penalty"], shown=settings["length_penalty"].shown_default, default=None)
    early_stopping = settings["early_stopping"]
    choices = early_stopping._replace(rule=early_stopping.rule._replace(choices=tuple(EARLY_STOPPING)))
    _add(group, choices, shown="false", default=None)


# From options to settings ---------------------------------------------------------------------------------------------


def engine_settings(args: argparse.Namespace, names: Iterable[str] = ENGINE_OPTIONS) -> dict[str, Any]:
    """The settings of the engine that options set."""
    return {name: getattr(args, name) for name in names}


def server_settings(args: argparse.Namespace, names: Iterable[str]) -> ServerSettings:
    """The settings of the server that options set. A model from the hub is served under its name there.

    Raises:
        ValueError: a setting out of range.
    """
    from jpaged.models.checkpoint.hub import repository_of  # imports JAX, which --help has no use for

    repository = repository_of(args.model)
    named: dict[str, Any] = {} if repository is None else {"served_model_name": repository.name}
    return ServerSettings(**named | _given(args, names))


def model_aliases(args: argparse.Namespace) -> tuple[str, ...]:
    """Other names that requests may call the model by: the model as it was given, unless it is given a name."""
    return () if args.model is None or args.served_model_name is not None else (args.model,)


def sampling_params(
    args: argparse.Namespace, max_tokens: int, recommended: Mapping[str, Any], more: Sequence[str] = ()
) -> SamplingParams:
    """Parameters to draw with.

    Args:
        args: the options given; without a seed, one is drawn.
        max_tokens: the command's own default.
        recommended: the parameters that the checkpoint names.
        more: options beside ``SAMPLING_OPTIONS`` that the command has.
    """
    defaults = {"max_tokens": max_tokens, "seed": random.SystemRandom().getrandbits(32)}
    given = _given(args, (*SAMPLING_OPTIONS, *more))
    has_own = any(name in recommended for name in PARAMETERS_OF_DRAWING)
    return replace(SamplingParams() if has_own else DRAWING, **{**defaults, **recommended, **given})


def generate_params(args: argparse.Namespace, recommended: Mapping[str, Any]) -> SamplingParams:
    """Parameters of ``jpaged generate``.

    Args:
        args: the options given.
        recommended: the parameters of drawing that the checkpoint names.

    Raises:
        ValueError: an option of beam search without a search, or an option that does not go with a search.
    """
    if args.beam_width is not None:
        return _beam_params(args)
    if args.length_penalty is not None or args.early_stopping is not None:
        raise ValueError("--length-penalty and --early-stopping are of beam search: add --beam-width")
    return sampling_params(args, GENERATE_MAX_TOKENS, recommended, COMPLETION_OPTIONS)


def _beam_params(args: argparse.Namespace) -> SamplingParams:
    """Parameters of a beam search: the defaults of drawing do not apply, and options that do not go with it raise."""
    if args.best_of is not None:
        raise ValueError("--best-of does not go with --beam-width: the width says how many are searched for")
    search = BeamSearchParams(
        args.beam_width,
        GENERATE_MAX_TOKENS,
        early_stopping=EARLY_STOPPING[args.early_stopping or "false"],
        **_given(args, ["length_penalty"]),
    )
    if args.n is not None and args.n > args.beam_width:
        raise ValueError(
            f"-n {args.n} is more than --beam-width {args.beam_width}: lower the first or raise the second"
        )
    return replace(search.to_sampling_params(), **_given(args, (*SAMPLING_OPTIONS, *COMPLETION_OPTIONS)))


def _given(args: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    """The options that were given."""
    return {name: value for name in names if (value := getattr(args, name)) is not None}


def cap(params: SamplingParams, most: int) -> SamplingParams:
    """``params`` with ``max_tokens`` no more than ``most``."""
    return replace(params, max_tokens=min(params.max_tokens or most, most))
