"""Conversations to token ids, so that no text of a message becomes a control token."""

import asyncio
import re
import secrets
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any

from jpaged.async_llm import AsyncLLM
from jpaged.engine.chat import chat_text
from jpaged.engine.template_process import TemplateProcess
from jpaged.engine.token_texts import special_tokens
from jpaged.server.errors import ApiError, refusals
from jpaged.server.protocol.chat import ChatOptions
from jpaged.server.text_codec import TextCodec

_NOT_FOR_REQUESTS = re.compile(
    r"messages|tools|documents|tokenize|chat_template|add_generation_prompt|continue_final_message|return_\w+|\w+_token"
    r"|raise_exception|strftime_now"
)
"""Variables of templates that are set elsewhere."""

MOST_GROWTH = 32
"""Characters rendered for each of a text that fits the context: a mark is longer than the text that it stands for."""


class ChatTemplate:
    """Applies the model's chat template.

    Args:
        llm: the engine.
        codec: text to token ids.
    """

    def __init__(self, llm: AsyncLLM, codec: TextCodec) -> None:
        self._llm = llm
        self._codec = codec
        self._rendering = ThreadPoolExecutor(1, "jpaged-templates")

    @cached_property
    def variables(self) -> frozenset[str]:
        """Variables of the template that a request may set."""
        from jinja2 import Environment, TemplateSyntaxError, meta

        template = getattr(self._llm.tokenizer, "chat_template", None)
        if not isinstance(template, str):
            return frozenset()
        # The extensions that Hugging Face's templates may use; "generation" marks spans and is of no matter here.
        environment = Environment(extensions=["jinja2.ext.loopcontrols"])
        template = re.sub(r"{%-?\s*(end)?generation\s*-?%}", "", template)
        try:
            names = meta.find_undeclared_variables(environment.parse(template))
        except TemplateSyntaxError:  # a tag of an extension that is unknown here
            return frozenset()
        return frozenset(name for name in names if not _NOT_FOR_REQUESTS.fullmatch(name))

    @cached_property
    def _special_texts(self) -> dict[str, int]:
        return special_tokens(self._codec.tokenizer)

    @cached_property
    def _special_pattern(self) -> re.Pattern[str]:
        longest_first = sorted(self._special_texts, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    @cached_property
    def _process(self) -> TemplateProcess | None:
        """Renders the template; None where the tokenizer has none, or applies another kind of template itself."""
        from transformers import PreTrainedTokenizerBase

        tokenizer = self._llm.tokenizer
        if getattr(tokenizer, "chat_template", None) is None:
            return None
        is_jinja = getattr(type(tokenizer), "apply_chat_template", None) is PreTrainedTokenizerBase.apply_chat_template
        return TemplateProcess(tokenizer.get_chat_template()) if is_jinja else None

    def start(self) -> None:
        """Let the process that renders start, so that the first conversation does not wait for its libraries."""
        if self._process is not None:
            self._process.start()

    def close(self) -> None:
        """End the process that renders."""
        self._rendering.shutdown(wait=False)
        if self._process is not None:
            self._process.close()

    async def render(self, body: ChatOptions) -> list[int]:
        """The token ids of a conversation.

        Raises:
            ApiError: 400 for messages that the template refuses or takes too long for, or that are too long.
        """
        messages, options = body.conversation(), body.template_options(self.variables)
        lengths: list[int] = []
        _mapped(messages, lambda text: lengths.append(len(text)) or text)
        self._codec.check_length(sum(lengths), "messages")
        conversation = _Conversation(self._special_pattern)
        with refusals():
            # A slow template holds other conversations only: prompts are tokenised in another thread.
            text = await asyncio.get_running_loop().run_in_executor(
                self._rendering,
                lambda: chat_text(self._codec.tokenizer, conversation.mark(messages), apply=self._apply, **options),
            )
            return await self._llm.in_background(lambda: self._encode(conversation.split(text)))

    def _apply(self, messages: list[dict[str, Any]], *, tokenize: bool, **arguments: Any) -> str:
        """Do the work of the tokenizer's ``apply_chat_template``, within bounds."""
        tokenizer, process = self._codec.tokenizer, self._process
        if process is None:
            return tokenizer.apply_chat_template(messages, tokenize=tokenize, **arguments)
        del arguments["chat_template"]  # None: it is the tokenizer's
        arguments = {**tokenizer.special_tokens_map, **arguments}
        return process.render(messages, arguments, MOST_GROWTH * self._codec.max_characters)

    def _encode(self, pieces: Sequence[str]) -> list[int]:
        """The token ids of a text, of which every second piece is read as plain text."""
        self._codec.check_length(sum(map(len, pieces)), "messages")
        tokenizer, specials = self._codec.tokenizer, self._special_texts
        token_ids: list[int] = []
        for i, piece in enumerate(pieces):
            if i % 2 == 0:
                token_ids += tokenizer.encode(piece, add_special_tokens=False) if piece else []
                continue
            plain = list(tokenizer.encode(piece, add_special_tokens=False, split_special_tokens=True))
            if not set(plain).isdisjoint(specials.values()):
                raise ApiError(400, "a message has the text of a control token, which this model cannot read as text")
            token_ids += plain
        return token_ids


class _Conversation:
    """Puts a mark in place of every special text of a conversation, and finds the marks in what is rendered of it.

    Args:
        specials: matches the special texts.
    """

    def __init__(self, specials: re.Pattern[str]) -> None:
        self._specials = specials
        self._nonce = secrets.token_hex(8)
        self._found: list[str] = []

    def mark(self, messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """The messages with marks."""

        def mark(match: re.Match[str]) -> str:
            self._found.append(match[0])
            return f"\ue000{self._nonce}{len(self._found) - 1}\ue001"

        return _mapped(messages, lambda text: self._specials.sub(mark, text))

    def split(self, text: str) -> list[str]:
        """The text in pieces, of which every second one stands in the place of a mark."""
        pieces = re.split(f"\ue000{self._nonce}([0-9]+)\ue001", text)
        pieces[1::2] = [self._found[int(number)] for number in pieces[1::2]]
        return pieces


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    """A value of JSON with each of its texts changed, names of fields included."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [_mapped(each, change) for each in value]
    if isinstance(value, dict):
        return {change(name): _mapped(each, change) for name, each in value.items()}
    return value
