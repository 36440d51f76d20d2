"""Text and token ids: tokenising within bounds, outside of the event loop."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from jpaged.async_llm import AsyncLLM
from jpaged.server.errors import ApiError, refusals


class TextCodec:
    """Turns text into token ids and back, in the background.

    Args:
        llm: the engine.
    """

    def __init__(self, llm: AsyncLLM) -> None:
        self._llm = llm

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

    def check(self, text: str, param: str = "prompt") -> None:
        """Refuse a text that is empty or cannot fit, before it is tokenised.

        Raises:
            ApiError: 400.
        """
        if not text:
            raise ApiError(400, f"{param} is empty: give at least one character", param=param)
        if len(text) > self.max_characters:
            raise ApiError(
                400,
                f"{param} has {len(text)} characters: at most {self.max_characters} can fit the context of "
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
            self.check(text)
        return await self._llm.in_background(
            lambda: [list(tokenizer.encode(text, add_special_tokens=add_special_tokens)) for text in texts]
        )

    def decode_one(self, token_id: int) -> str:
        """The text of one token; without a tokenizer its id, as vLLM writes it."""
        tokenizer = self._llm.tokenizer
        return f"token_id:{token_id}" if tokenizer is None else tokenizer.decode([token_id], skip_special_tokens=False)

    async def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The text of token ids.

        Raises:
            ApiError: 400 for ids out of the vocabulary.
        """
        tokenizer, size = self.tokenizer, len(self.tokenizer)
        if any(not 0 <= token_id < size for token_id in token_ids):
            raise ApiError(400, f"expected token ids from 0 to {size - 1}", param="tokens")
        with refusals():
            return await self._llm.in_background(
                lambda: tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
            )
