"""``jpaged chat``: a conversation with a model that has a chat template."""

import argparse
import sys
from bisect import bisect_right
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from jpaged.cli import start
from jpaged.cli.options import CHAT_MAX_TOKENS, as_typed, cap, sampling_params
from jpaged.cli.terminal import Answer, end_line, note, one_line, show
from jpaged.request import FinishReason, SamplingParams

if TYPE_CHECKING:
    from jpaged.llm import LLM


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    sampling_params(args, CHAT_MAX_TOKENS, {})  # finds mistakes before anything loads
    llm = start.load(args, num_sequences=1)
    params = sampling_params(args, CHAT_MAX_TOKENS, llm.engine.sampling_defaults)
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

        note("/reset forgets the conversation, /quit or Ctrl-D ends it, Ctrl-C stops an answer")
    try:
        while (text := _read_message()) is not None:
            if text == "/reset":
                talk = _Conversation(system)
                note("[forgotten]")
            elif text.startswith("/") and text[1:].isalpha():
                note(f"[{text} is no command: /reset forgets the conversation, /quit ends it]")
            elif text:
                talk = _answer(llm, talk, text, params)
    finally:
        blocks = llm.engine.blocks.stats()
        hits, total = blocks.prefix_hit_tokens, blocks.prefix_queried_tokens
        if total:
            note(f"[{hits} of {total} prompt tokens came from the prefix cache]")


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
    """The messages so far. ``token_ids`` spell ``text``, the template's rendering, as the prefix cache has it."""

    messages: list[dict[str, str]]
    text: str = ""
    token_ids: list[int] = field(default_factory=list)

    def ask(self, tokenizer: Any, message: str) -> "_Conversation":
        """The conversation with a message of the user, tokenised as a whole; answers keep the tokens that were drawn.

        Raises:
            _RefusedMessageError: the template raises an error.
        """
        from jinja2 import TemplateError

        messages = [*self.messages, {"role": "user", "content": message}]
        try:
            text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        except TemplateError as error:
            raise _RefusedMessageError(f"the model's chat template refuses this: {one_line(error)}") from error
        whole = list(tokenizer.encode(text, add_special_tokens=False))
        known = len(self.text) if text.startswith(self.text) else 0  # a template may drop earlier messages
        rest = _tokens_from(tokenizer, text, known) if known else None
        return _Conversation(messages, text, whole if rest is None else [*self.token_ids, *rest])

    def with_answer(self, tokenizer: Any, answer: Answer) -> "_Conversation":
        """The conversation with the model's answer. Its tokens are kept unless a stop string cut them."""
        messages = [*self.messages, {"role": "assistant", "content": answer.text}]
        token_ids = answer.token_ids[:-1] if answer.finish_reason is FinishReason.STOP else answer.token_ids
        if tokenizer.decode(token_ids) != answer.text:
            return _Conversation(messages)
        return _Conversation(messages, self.text + answer.text, self.token_ids + token_ids)


def _tokens_from(tokenizer: Any, text: str, start: int) -> list[int] | None:
    """The tokens of a whole text from character ``start`` on; None if a token begins before it and goes on."""
    if not getattr(tokenizer, "is_fast", False):
        return None
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    places = encoded["offset_mapping"]
    first = bisect_right([end for _, end in places], start)
    is_split = first < len(places) and places[first][0] < start
    return None if is_split else encoded["input_ids"][first:]


def _answer(llm: "LLM", talk: _Conversation, message: str, params: SamplingParams) -> "_Conversation":
    """Answer a message and return the conversation with both; as it was, if the message is refused or too long."""
    try:
        asked = talk.ask(llm.tokenizer, message)
    except _RefusedMessageError as error:
        note(f"[{error}; say it differently, or /reset to start afresh]")
        return talk
    prompt_len = len(asked.token_ids)
    room = llm.max_model_len - prompt_len
    if room < 1:
        note(
            f"[your message would make the conversation {prompt_len} tokens long and the context holds "
            f"{llm.max_model_len}: shorten it, or /reset to start afresh]"
        )
        return talk
    answer, params = Answer(), cap(params, room)
    with suppress(KeyboardInterrupt):  # what there is of the answer stays
        show("", llm.stream({"prompt_token_ids": asked.token_ids}, params), answer)
    if answer.error is not None:
        end_line(answer.text)
        note(f"[{as_typed(answer.error)}]")
    if not answer.token_ids or answer.error is not None:
        return talk
    end_line(answer.text)
    if answer.finish_reason is FinishReason.LENGTH:
        note(
            f"[the context of {llm.max_model_len} tokens is full: /reset to start afresh]"
            if params.max_tokens == room
            else f"[cut off after {params.max_tokens} tokens: start with a higher --max-tokens for more]"
        )
    return asked.with_answer(llm.tokenizer, answer)
