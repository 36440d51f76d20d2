"""Text and token ids: tokenising within bounds, outside of the event loop."""

import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

from jpaged.async_llm import AsyncLLM
from jpaged.server.errors import ApiError, refusals

_PRINTED = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTED]
BYTE_LETTERS = {chr(byte): byte for byte in _PRINTED} | {chr(256 + i): byte for i, byte in enumerate(_OTHERS)}
"""The letters by which byte-level tokenizers, since GPT-2, write bytes."""

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
        self._bytes: dict[int, list[int]] = {}  # of tokens that were asked for

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
            if not text:
                raise ApiError(400, "prompt is empty: give at least one character", param="prompt")
            self.check_length(len(text), "prompt")
        token_ids: list[list[int]] = []
        for some in _pieces(texts):  # the texts of other requests have their turn between two pieces
            token_ids += await self._llm.in_background(
                lambda some=some: [self._encode(each, tokenizer, add_special_tokens) for each in some]
            )
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
        tokenizer = self._llm.tokenizer
        return f"token_id:{token_id}" if tokenizer is None else tokenizer.decode([token_id], skip_special_tokens=False)

    def bytes_of(self, token_id: int, text: str) -> list[int]:
        """The bytes of a token, of which ``text`` has a replacement where they are a part of a character."""
        found = self._bytes.get(token_id)
        if found is None:
            found = self._bytes[token_id] = list(self._exact_bytes(token_id) or text.encode())
        return found

    def _exact_bytes(self, token_id: int) -> bytes | None:
        tokenizer = self._llm.tokenizer
        token = None if tokenizer is None else tokenizer.convert_ids_to_tokens(token_id)
        if not isinstance(token, str) or token_id in self._added_ids:
            return None
        if self._is_byte_level and all(letter in BYTE_LETTERS for letter in token):
            return bytes(BYTE_LETTERS[letter] for letter in token)
        byte = re.fullmatch(r"<0x([0-9A-F]{2})>", token)
        return bytes.fromhex(byte[1]) if byte else None

    @cached_property
    def _added_ids(self) -> frozenset[int]:
        return frozenset(getattr(self._llm.tokenizer, "added_tokens_decoder", ()))

    @cached_property
    def _is_byte_level(self) -> bool:
        """Whether each letter of a token stands for a byte."""
        backend = getattr(self._llm.tokenizer, "backend_tokenizer", None)
        return backend is not None and "ByteLevel" in repr(backend.decoder)

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
