"""Conversations to token ids, so that no text of a message becomes a control token."""

import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

from jpaged.async_llm import AsyncLLM
from jpaged.engine.chat import render_chat
from jpaged.engine.token_texts import special_tokens
from jpaged.server.errors import ApiError, refusals
from jpaged.server.protocol.chat import ChatOptions
from jpaged.server.text_codec import TextCodec

_NOT_FOR_REQUESTS = re.compile(
    r"messages|tools|documents|tokenize|chat_template|add_generation_prompt|continue_final_message|return_\w+|\w+_token"
    r"|raise_exception|strftime_now"
)
"""Variables of templates that are set elsewhere."""


class ChatTemplate:
    """Applies the model's chat template.

    Args:
        llm: the engine.
        codec: text to token ids.
    """

    def __init__(self, llm: AsyncLLM, codec: TextCodec) -> None:
        self._llm = llm
        self._codec = codec

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

    async def render(self, body: ChatOptions) -> list[int]:
        """The token ids of a conversation.

        Raises:
            ApiError: 400 for messages that the template refuses, or that are too long.
        """
        messages, options = body.conversation(), body.template_options(self.variables)
        lengths: list[int] = []
        _mapped(messages, lambda text: lengths.append(len(text)) or text)
        self._codec.check_length(sum(lengths), "messages")
        with refusals():
            return await self._llm.in_background(lambda: self._render(messages, options))

    def _render(self, messages: Sequence[dict[str, Any]], options: Mapping[str, Any]) -> list[int]:
        """Render, with a mark in place of every special text of a message, which is then encoded as plain text."""
        tokenizer, specials = self._codec.tokenizer, self._special_texts
        nonce, found = secrets.token_hex(8), []

        def mark(match: re.Match[str]) -> str:
            found.append(match[0])
            return f"\ue000{nonce}{len(found) - 1}\ue001"

        marked = _mapped(messages, lambda text: self._special_pattern.sub(mark, text))
        text, token_ids = render_chat(tokenizer, marked, **options)
        if not found:
            return token_ids
        token_ids = []
        for i, piece in enumerate(re.split(f"\ue000{nonce}([0-9]+)\ue001", text)):
            if i % 2 == 0:
                token_ids += tokenizer.encode(piece, add_special_tokens=False) if piece else []
                continue
            plain = list(tokenizer.encode(found[int(piece)], add_special_tokens=False, split_special_tokens=True))
            if not set(plain).isdisjoint(specials.values()):
                raise ApiError(400, "a message has the text of a control token, which this model cannot read as text")
            token_ids += plain
        return token_ids


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    """A value of JSON with each of its texts changed, names of fields included."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [_mapped(each, change) for each in value]
    if isinstance(value, dict):
        return {change(name): _mapped(each, change) for name, each in value.items()}
    return value
