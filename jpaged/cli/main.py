"""The ``jpaged`` command: generate, chat, info. JAX loads inside the commands, so that ``--help`` is quick."""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
import traceback
from collections.abc import Generator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from typing import TYPE_CHECKING, Any

from jpaged.cli.options import CHAT_MAX_TOKENS, DRAWING, EARLY_STOPPING, GENERATE_MAX_TOKENS, make_parser
from jpaged.config import EngineConfig
from jpaged.request import BeamSearchParams, CompletionDelta, CompletionOutput, FinishReason, SamplingParams

if TYPE_CHECKING:
    from jpaged.llm import LLM

MAX_BATCHED_TOKENS = 512
"""Of a step: prompts are computed in pieces of this size, so that one short command compiles small programs only."""

_ENGINE_OPTIONS = (
    "dtype", "kv_cache_dtype", "block_size", "num_blocks", "memory_fraction", "max_model_len", "tensor_parallel_size",
    "attention_implementation", "interpret", "max_burst", "preemption", "num_host_blocks", "host_memory_bytes",
)  # fmt: skip
_SAMPLING_OPTIONS = (
    "max_tokens", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty",
    "repetition_penalty", "seed", "stop",
)  # fmt: skip
_GENERATE_OPTIONS = "n", "best_of", "min_tokens", "logprobs", "prompt_logprobs"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: what follows the program's name; None takes the process's own.

    Returns:
        The exit status: 0; 2 for a mistake of the caller's; 130 after Ctrl-C; 141 when nobody reads the output.

    Raises:
        ValueError, OSError, NotImplementedError: a mistake of the caller's, with ``--debug``.
    """
    args = make_parser().parse_args(argv)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # XLA's own log: errors only
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    _quieten_libtpu()
    try:
        by_hand = args.coordinator_address, args.num_processes, args.process_id
        if args.distributed or any(value is not None for value in by_hand):
            _join(args)
        {"generate": _generate, "chat": _chat, "info": _info}[args.command](args)
        sys.stdout.flush()
    except _Followed:
        return 0
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter's last flush would fail
        return 141
    except (ValueError, OSError, NotImplementedError) as error:
        if args.debug:
            raise
        _note(f"jpaged: error: {_one_line(error)}{'' if _is_ours(error) else ' (--debug shows where)'}")
        return 2
    return 0


def _quieten_libtpu() -> None:
    """Keep an installed libtpu from printing errors on a machine without a TPU, where JAX still loads it."""
    import jax  # noqa: F401  (sets TPU_SKIP_MDS_QUERY where no TPU is attached)

    if "TPU_SKIP_MDS_QUERY" in os.environ:  # libtpu then takes both values from the environment alone
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _is_ours(error: Exception) -> bool:
    """Whether jpaged raised it, so that it says what to do. Others' errors may come of a mistake in jpaged."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_globals.get("__name__", "").partition(".")[0] == "jpaged"


# generate -------------------------------------------------------------------------------------------------------------


def _generate(args: argparse.Namespace) -> None:
    if not args.json and (args.logprobs is not None or args.prompt_logprobs is not None):
        raise ValueError("--logprobs and --prompt-logprobs are shown by --json only: add it")
    params = _generate_params(args) if args.beam_width is None else _beam_params(args)
    prompt = sys.stdin.read() if args.prompt == "-" and args.is_leader else args.prompt
    if not prompt:
        raise ValueError("the prompt is empty: give at least one character")
    llm = _load(args, max_num_seqs=params.num_sequences)
    if args.max_tokens is None:
        params = _cap(params, llm.max_model_len)
    if args.json:
        [output] = llm.generate(prompt, params, use_tqdm=sys.stderr.isatty())
        print(json.dumps(asdict(output), ensure_ascii=False))
    elif params.use_beam_search or params.num_sequences > params.n:
        _print_ranked(llm, prompt, params)
    elif params.n == 1:
        answer = _Answer()
        _show(prompt, llm.stream(prompt, params), answer)
        _end_line(prompt + answer.text)
        if sys.stderr.isatty():
            _note(f"[{answer}; --seed {params.seed} repeats it]" if params.temperature else f"[{answer}]")
    else:
        _print_whole(llm, prompt, params)


def _print_whole(llm: LLM, prompt: str, params: SamplingParams) -> None:
    """Print each of several completions, after the prompt and under a header, when it is complete."""
    texts = [""] * params.n
    for delta in llm.stream(prompt, params):
        texts[delta.index] += delta.text
        if delta.finish_reason is not None:
            print(f"=== completion {delta.index + 1} of {params.n} ({delta.finish_reason}) ===")
            _print_text(prompt + texts[delta.index])


def _print_ranked(llm: LLM, prompt: str, params: SamplingParams) -> None:
    """Print the best of several completions, best first, once all are complete; a single one needs no header."""
    with _waiting(f"{'searching' if params.use_beam_search else 'drawing'} {params.num_sequences} at once ..."):
        [result] = llm.generate(prompt, params, use_tqdm=False)
    for output in result.outputs:
        if params.use_beam_search or params.n > 1:
            print(f"=== completion {output.index + 1} of {params.n}, {_rank(output)} ({output.finish_reason}) ===")
        _print_text(prompt + output.text)


def _rank(output: CompletionOutput) -> str:
    """What a completion was ranked by."""
    if output.score is None:
        return f"log-probability {output.cumulative_logprob:.5g}"
    return f"score {output.score:.5g}"


def _print_text(text: str) -> None:
    sys.stdout.write(text)
    _end_line(text)


def _end_line(text: str) -> None:
    """End the line ``text`` was written on, if it did not end it itself."""
    if not text.endswith("\n"):
        sys.stdout.write("\n")
    sys.stdout.flush()


@dataclass(slots=True)
class _Answer:
    """One completion as it was streamed."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    seconds: float = 0.0  # from the first token to the last
    finish_reason: FinishReason = FinishReason.ABORT

    def __str__(self) -> str:
        rate = f", {(len(self.token_ids) - 1) / self.seconds:.0f} a second" if self.seconds else ""
        return f"{len(self.token_ids)} tokens{rate}; ended by {self.finish_reason}"


def _show(head: str, deltas: Generator[CompletionDelta], answer: _Answer) -> None:
    """Write ``head`` and a completion to stdout as it comes. ``answer`` keeps it, and is right even after Ctrl-C."""
    with closing(deltas):
        with _waiting("computing the prompt and compiling what is new ..."):
            first = next(deltas)
        start = time.monotonic()
        sys.stdout.write(head)
        for delta in chain((first,), deltas):
            sys.stdout.write(delta.text)
            sys.stdout.flush()
            answer.text += delta.text
            answer.token_ids += delta.token_ids
            answer.seconds = time.monotonic() - start
            answer.finish_reason = delta.finish_reason or answer.finish_reason


@contextmanager
def _waiting(text: str) -> Generator[None]:
    """Shows ``text`` on the last line of a terminal while something takes its time."""
    if not sys.stderr.isatty():
        yield
        return
    print(text, end="", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)  # back, and erase to the end of the line


# chat -----------------------------------------------------------------------------------------------------------------


def _chat(args: argparse.Namespace) -> None:
    params = _sampling_params(args, CHAT_MAX_TOKENS)
    llm = _load(args, max_num_seqs=1)
    if getattr(llm.tokenizer, "chat_template", None) is None:
        raise ValueError(
            f"{args.model or 'the model in the package'} has no chat template, so it is not made for conversation: "
            "use jpaged generate"
        )
    system = [{"role": "system", "content": args.system}] if args.system else []
    talk = _Conversation(system)
    try:
        talk.ask(llm.tokenizer, "hello")
    except _RefusedMessageError as error:
        raise ValueError(f"{error}: leave out --system" if args.system else str(error)) from error
    if sys.stdin.isatty():
        import readline  # noqa: F401 - gives input() line editing and a history

        _note("/reset forgets the conversation, /quit or Ctrl-D ends it, Ctrl-C stops an answer")
    try:
        while (text := _read_message()) is not None:
            if text == "/reset":
                talk = _Conversation(system)
                _note("[forgotten]")
            elif text.startswith("/") and text[1:].isalpha():
                _note(f"[{text} is no command: /reset forgets the conversation, /quit ends it]")
            elif text:
                talk = _answer(llm, talk, text, params)
    finally:
        blocks = llm.engine.blocks.stats()
        hits, total = blocks.prefix_hit_tokens, blocks.prefix_queried_tokens
        if total:
            _note(f"[{hits} of {total} prompt tokens came from the prefix cache]")


def _read_message() -> str | None:
    """The user's next line, stripped; None at the end."""
    try:
        text = input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None
    return None if text == "/quit" else text


class _RefusedMessageError(ValueError):
    """The chat template does not take the conversation: no system role, say."""


@dataclass(frozen=True, slots=True)
class _Conversation:
    """What was said. ``token_ids`` are those of ``text``, the template's rendering, as they lie in the prefix cache."""

    messages: list[dict[str, str]]
    text: str = ""
    token_ids: list[int] = field(default_factory=list)

    def ask(self, tokenizer: Any, message: str) -> _Conversation:
        """With a message of the user's. What was said before keeps its tokens, even where other ones spell it too.

        Raises:
            _RefusedMessageError: the template raises an error.
        """
        from jinja2 import TemplateError

        messages = [*self.messages, {"role": "user", "content": message}]
        try:
            text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        except TemplateError as error:
            raise _RefusedMessageError(f"the model's chat template refuses this: {_one_line(error)}") from error
        known = len(self.text) if text.startswith(self.text) else 0  # a template may leave out what it said before
        rest = tokenizer.encode(text[known:], add_special_tokens=False)
        return _Conversation(messages, text, [*self.token_ids, *rest] if known else rest)

    def with_answer(self, tokenizer: Any, answer: _Answer) -> _Conversation:
        """With the model's answer. Its tokens are kept if they say what it says: a stop string may have cut it."""
        messages = [*self.messages, {"role": "assistant", "content": answer.text}]
        token_ids = answer.token_ids[:-1] if answer.finish_reason is FinishReason.STOP else answer.token_ids
        if tokenizer.decode(token_ids) != answer.text:
            return _Conversation(messages)
        return _Conversation(messages, self.text + answer.text, self.token_ids + token_ids)


def _answer(llm: LLM, talk: _Conversation, message: str, params: SamplingParams) -> _Conversation:
    """Answer a message and return the conversation with both; as it was, if it is refused or there is no room."""
    try:
        asked = talk.ask(llm.tokenizer, message)
    except _RefusedMessageError as error:
        _note(f"[{error}; say it differently, or /reset to start afresh]")
        return talk
    prompt_len = len(asked.token_ids)
    room = llm.max_model_len - prompt_len
    if room < 1:
        _note(
            f"[your message would make the conversation {prompt_len} tokens long and the context holds "
            f"{llm.max_model_len}: shorten it, or /reset to start afresh]"
        )
        return talk
    answer, params = _Answer(), _cap(params, room)
    with suppress(KeyboardInterrupt):  # what there is of the answer stays
        _show("", llm.stream({"prompt_token_ids": asked.token_ids}, params), answer)
    if not answer.token_ids:
        return talk
    _end_line(answer.text)
    if answer.finish_reason is FinishReason.LENGTH:
        _note(
            f"[the context of {llm.max_model_len} tokens is full: /reset to start afresh]"
            if params.max_tokens == room
            else f"[cut off after {params.max_tokens} tokens: start with a higher --max-tokens for more]"
        )
    return asked.with_answer(llm.tokenizer, answer)


# info -----------------------------------------------------------------------------------------------------------------


def _info(args: argparse.Namespace) -> None:
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # only looks: leaves the memory to others
    config = EngineConfig(**_engine_options(args))
    from jpaged.cli.info import gather_info

    info = gather_info(args.model, config)
    if not args.is_leader:
        return
    print(json.dumps(asdict(info)) if args.json else info)


# Options --------------------------------------------------------------------------------------------------------------


def _engine_options(args: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(args, name) for name in _ENGINE_OPTIONS}


def _load(args: argparse.Namespace, *, max_num_seqs: int) -> LLM:
    """The model, each program to be compiled when it is first needed: a command needs few."""
    from jpaged.llm import LLM

    llm = LLM(
        args.model,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max(MAX_BATCHED_TOKENS, max_num_seqs),
        enable_prefix_caching=not args.no_prefix_caching,
        warm_up=False,
        use_tqdm=sys.stderr.isatty(),
        **_engine_options(args),
    )
    if not llm.is_leader:
        llm.follow()
        raise _Followed
    return llm


class _Followed(Exception):
    """This process did what the leading one decided; that is all it had to do."""


def _join(args: argparse.Namespace) -> None:
    """Bring this process together with the others; ``args`` then says whether it leads."""
    import jax

    from jpaged.device.processes import join_processes

    join_processes(args.coordinator_address, args.num_processes, args.process_id)
    args.is_leader = jax.process_index() == 0


def _given(args: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """The options that were given."""
    return {name: value for name in names if (value := getattr(args, name)) is not None}


def _sampling_params(args: argparse.Namespace, max_tokens: int) -> SamplingParams:
    """What the options say, with a command's own ``max_tokens`` and a newly drawn seed where none was given."""
    seed = random.SystemRandom().getrandbits(32)
    return replace(DRAWING, **{"max_tokens": max_tokens, "seed": seed} | _given(args, _SAMPLING_OPTIONS))


def _generate_params(args: argparse.Namespace) -> SamplingParams:
    if args.length_penalty is not None or args.early_stopping is not None:
        raise ValueError("--length-penalty and --early-stopping are of beam search: add --beam-width")
    return replace(
        _sampling_params(args, GENERATE_MAX_TOKENS), ignore_eos=args.ignore_eos, **_given(args, _GENERATE_OPTIONS)
    )


def _beam_params(args: argparse.Namespace) -> SamplingParams:
    """A beam search. The defaults of drawing are not part of it; what was given and cannot be is refused."""
    if args.best_of is not None:
        raise ValueError("--best-of does not go with --beam-width: the width says how many are searched for")
    search = BeamSearchParams(
        args.beam_width,
        GENERATE_MAX_TOKENS,
        early_stopping=EARLY_STOPPING[args.early_stopping or "false"],
        ignore_eos=args.ignore_eos,
        **_given(args, ["length_penalty"]),
    )
    if args.n is not None and args.n > args.beam_width:
        raise ValueError(
            f"-n {args.n} is more than --beam-width {args.beam_width}: lower the first or raise the second"
        )
    return replace(search.to_sampling_params(), **_given(args, (*_SAMPLING_OPTIONS, *_GENERATE_OPTIONS)))


def _cap(params: SamplingParams, most: int) -> SamplingParams:
    """``params`` with ``max_tokens`` no more than ``most``."""
    return replace(params, max_tokens=min(params.max_tokens or most, most))
