"""Text and token ids: tokenising within bounds, outside of the event loop."""

from collections.abc import Collection, Iterator, Sequence
from functools import cached_property
from typing import Any

from jpaged.async_llm import AsyncLLM
from jpaged.engine.token_texts import TextOffsets, TokenTexts, special_tokens
from jpaged.server.errors import ApiError, refusals

PIECE_CHARACTERS = 1 << 16
"""Characters of several texts that are tokenised at once."""

LONG_TOKEN = 8
"""Characters of a token, in a text that has few tokens."""

SPARE_TOKENS = 64
"""The end of a text that is cut may have some tokens more than the whole text has there."""


class TextCodec:
    """Turns text into token ids and back, in the background.

    Args:
        llm: the engine.
    """

    def __init__(self, llm: AsyncLLM) -> None:
        self._llm = llm
        self._texts = None if llm.tokenizer is None else TokenTexts(llm.tokenizer)

    @property
    def tokenizer(self) -> Any:
        """The tokenizer.

        Raises:
            ApiError: 400, the model has none.
        """
        if self._llm.tokenizer is None:
            raise ApiError(400, "this model has no tokenizer: give prompts as token ids")
        return self._llm.tokenizer

    @cached_property
    def max_characters(self) -> int:
        """Characters above which no text fits the context: each of its tokens would have to be the longest."""
        return self._llm.max_model_len * max(map(len, self.tokenizer.get_vocab()))

    def check_length(self, num_characters: int, param: str) -> None:
        """Refuse a text that cannot fit, before it is tokenised.

        Raises:
            ApiError: 400.
        """
        if num_characters > self.max_characters:
            raise ApiError(
                400,
                f"{param} has {num_characters} characters: at most {self.max_characters} can fit the context of "
                f"{self._llm.max_model_len} tokens",
                code="context_length_exceeded",
                param=param,
            )

    async def encode(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        """The token ids of each text.

        Raises:
            ApiError: 400 for a text that is empty or too long.
        """
        tokenizer = self.tokenizer
        for text in texts:
            self.check_length(len(text), "prompt")
        token_ids: list[list[int]] = []
        for some in _pieces(texts):  # the texts of other requests have their turn between two pieces
            token_ids += await self._llm.in_background(
                lambda some=some: [self._encode(each, tokenizer, add_special_tokens) for each in some]
            )
        if not all(token_ids):  # of an empty text, some tokenizers make the token that begins a text
            raise ApiError(400, "prompt is empty: give at least one character", param="prompt")
        return token_ids

    def _encode(self, text: str, tokenizer: Any, add_special_tokens: bool) -> list[int]:
        """The token ids of a text. Of one that is far too long, only the beginning is tokenised."""
        length = self._llm.max_model_len
        beginning = text[: length * LONG_TOKEN]
        token_ids = list(tokenizer.encode(beginning, add_special_tokens=add_special_tokens))
        if len(beginning) == len(text):
            return token_ids
        if len(token_ids) > length + SPARE_TOKENS:
            raise ApiError(
                400,
                f"the prompt has {len(text)} characters, of which {len(beginning)} are {len(token_ids)} tokens: "
                f"max_model_len={length} is less",
                code="context_length_exceeded",
                param="prompt",
            )
        return list(tokenizer.encode(text, add_special_tokens=add_special_tokens))

    def decode_one(self, token_id: int) -> str:
        """The text of one token; without a tokenizer its id, as vLLM writes it."""
        return f"token_id:{token_id}" if self._texts is None else self._texts.text(token_id)

    def bytes_of(self, token_id: int, text: str) -> list[int]:
        """The bytes of a token, which stands for ``text`` in responses."""
        return list(text.encode() if self._texts is None else self._texts.bytes_of(token_id))

    def prompt_offsets(self, text: str) -> TextOffsets:
        """Counts the characters before each token of a prompt. Special tokens that its text lacks are hidden."""
        return self._offsets(0, {token_id for name, token_id in self._special_tokens.items() if name not in text})

    def output_offsets(self, start: int, *, skip_special_tokens: bool) -> TextOffsets:
        """Counts the characters before each token of an output.

        Args:
            start: characters before the output.
            skip_special_tokens: whether special tokens are no text.
        """
        return self._offsets(start, set(self._special_tokens.values()) if skip_special_tokens else ())

    def _offsets(self, start: int, hidden: Collection[int]) -> TextOffsets:
        if self._texts is None:
            return TextOffsets(lambda token_id: self.decode_one(token_id).encode(), start)
        return TextOffsets(self._texts.bytes_of, start, hidden, is_byte_level=self._texts.is_byte_level)

    @cached_property
    def _special_tokens(self) -> dict[str, int]:
        return special_tokens(self._llm.tokenizer)

    async def tokens_of(self, token_ids: Sequence[int]) -> list[str]:
        """The tokens of ids as the vocabulary writes them."""
        tokenizer = self.tokenizer
        return await self._llm.in_background(lambda: tokenizer.convert_ids_to_tokens(list(token_ids)))

    async def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The text of token ids.

        Raises:
            ApiError: 400 for ids out of the vocabulary, or more than fit the context.
        """
        if len(token_ids) > self._llm.max_model_len:
            raise ApiError(400, f"{len(token_ids)} token ids are given: at most {self._llm.max_model_len} are taken")
        tokenizer, size = self.tokenizer, len(self.tokenizer)
        if any(not 0 <= token_id < size for token_id in token_ids):
            raise ApiError(400, f"expected token ids from 0 to {size - 1}", param="tokens")
        with refusals():
            return await self._llm.in_background(
                lambda: tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
            )


def _pieces(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    """The texts, each time one and those after it that are no more than ``PIECE_CHARACTERS`` together."""
    start = num_characters = 0
    for end, text in enumerate(texts):
        if end > start and num_characters + len(text) > PIECE_CHARACTERS:
            yield texts[start:end]
            start, num_characters = end, 0
        num_characters += len(text)
    yield texts[start:]
