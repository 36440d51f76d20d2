"""Texts and bytes of single tokens, and the tokens that are no text."""

import codecs
import re
from collections.abc import Callable, Collection, Iterable
from functools import cached_property
from typing import Any

from jpaged.engine.detokenizer import Tokenizer

_PRINTED = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTED]
BYTE_LETTERS = {chr(byte): byte for byte in _PRINTED} | {chr(256 + i): byte for i, byte in enumerate(_OTHERS)}
"""The letters by which byte-level tokenizers, since GPT-2, write bytes."""

PART_MARK = "bytes:"
"""Begins the text of a token that ends inside a character."""


class TokenTexts:
    """The text of each token of a vocabulary, as the token stands in the middle of a text.

    Args:
        tokenizer: a Hugging Face tokenizer. One with ``encode`` and ``decode`` alone decodes each token by itself.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer: Any = tokenizer
        self._texts: dict[int, str] = {}
        self._bytes: dict[int, bytes] = {}

    def text(self, token_id: int) -> str:
        """The text of a token. A token of a part of a character reads ``bytes:\\xe2\\x82``, as in OpenAI's API."""
        found = self._texts.get(token_id)
        if found is None:
            found = self._texts[token_id] = self._find_text(token_id)
        return found

    def bytes_of(self, token_id: int) -> bytes:
        """The bytes of a token in UTF-8, of which a part of a character may be some."""
        found = self._bytes.get(token_id)
        if found is None:
            exact = self._exact_bytes(token_id)
            found = self._bytes[token_id] = self.text(token_id).encode() if exact is None else exact
        return found

    def _find_text(self, token_id: int) -> str:
        exact = self._exact_bytes(token_id)
        if exact is None:
            return self._decode_behind_another(token_id)
        try:
            return exact.decode()
        except UnicodeDecodeError:
            return PART_MARK + "".join([chr(byte) if 0x20 <= byte < 0x7F else f"\\x{byte:02x}" for byte in exact])

    def _decode_behind_another(self, token_id: int) -> str:
        """Decode a token behind a letter: some tokenizers drop the space of a text's first token."""
        letter, text = self._letter
        joined = self._decode([*letter, token_id])
        return joined.removeprefix(text) if joined.startswith(text) else self._decode([token_id])

    @cached_property
    def _letter(self) -> tuple[list[int], str]:
        if not hasattr(self._tokenizer, "convert_ids_to_tokens"):
            return [], ""
        letter = list(self._tokenizer.encode("a", add_special_tokens=False))[-1:]
        text = self._decode(letter)
        return (letter, text) if text.strip() else ([], "")

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=False) if token_ids else ""

    def _exact_bytes(self, token_id: int) -> bytes | None:
        """The bytes of a token that the vocabulary spells byte by byte; None for another one."""
        if not hasattr(self._tokenizer, "convert_ids_to_tokens"):
            return None
        token = self._tokenizer.convert_ids_to_tokens(token_id)
        if not isinstance(token, str) or token_id in self._added_ids:
            return None
        if self.is_byte_level and all(letter in BYTE_LETTERS for letter in token):
            return bytes(BYTE_LETTERS[letter] for letter in token)
        byte = re.fullmatch(r"<0x([0-9A-F]{2})>", token)
        return bytes.fromhex(byte[1]) if byte else None

    @cached_property
    def _added_ids(self) -> frozenset[int]:
        return frozenset(getattr(self._tokenizer, "added_tokens_decoder", ()))

    @cached_property
    def is_byte_level(self) -> bool:
        """Whether each letter of a token stands for a byte."""
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        return backend is not None and "ByteLevel" in repr(backend.decoder)


class TextOffsets:
    """The characters of a text before each of its tokens, counted as tokens arrive.

    A token that begins inside a character comes after that character.

    Args:
        bytes_of: the bytes of a token.
        start: characters before the first token.
        hidden: tokens that are no text.
        is_byte_level: see ``TokenTexts``. Other tokenizers spell unknown characters as rows of bytes: behind a broken
            character, each byte of the row becomes a replacement.
    """

    def __init__(
        self,
        bytes_of: Callable[[int], bytes],
        start: int = 0,
        hidden: Collection[int] = (),
        *,
        is_byte_level: bool = True,
    ) -> None:
        self._bytes_of = bytes_of
        self._num_decoded = start
        self._hidden = hidden
        self._is_byte_level = is_byte_level
        self._open = b""  # the beginning of a character
        self._is_broken = False  # the row of bytes

    def extend(self, token_ids: Iterable[int]) -> list[int]:
        """Add tokens. Returns the offset of each."""
        return [self._add(token_id) for token_id in token_ids]

    def _add(self, token_id: int) -> int:
        offset = self._num_decoded + bool(self._open)
        if token_id not in self._hidden:
            written = self._bytes_of(token_id)
            self._num_decoded += self._decode(written) if self._is_byte_level else self._decode_in_row(written)
        return offset

    def _decode(self, written: bytes, errors: str = "replace") -> int:
        """Add bytes. Returns how many characters they complete, replacements for broken ones included."""
        given = self._open + written
        text, num_used = codecs.utf_8_decode(given, errors, False)
        self._open = given[num_used:]
        return len(text)

    def _decode_in_row(self, written: bytes) -> int:
        """Add bytes, as ``_decode`` does, for a tokenizer with rows of bytes."""
        if len(written) != 1 or written < b"\x80":
            num_broken, self._open, self._is_broken = len(self._open), b"", False
            return num_broken + self._decode(written)
        if self._is_broken:
            return 1
        try:
            return self._decode(written, "strict")
        except UnicodeDecodeError:
            num_broken, self._open, self._is_broken = len(self._open) + 1, b"", True
            return num_broken


def special_tokens(tokenizer: Any) -> dict[str, int]:
    """The special tokens of a tokenizer, which are no text: id by name. Empty without a Hugging Face tokenizer."""
    tokens = getattr(tokenizer, "added_tokens_decoder", {})
    return {str(token): token_id for token_id, token in tokens.items() if token.special}


def end_token_ids(tokenizer: Any, vocab_size: int) -> tuple[int, ...]:
    """The tokenizer's own end-of-sequence token, if it has one that the model knows."""
    token_id = getattr(tokenizer, "eos_token_id", None)
    if not isinstance(token_id, int) or isinstance(token_id, bool) or not 0 <= token_id < vocab_size:
        return ()
    return (token_id,)
