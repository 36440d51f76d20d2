"""Token ids to text as they arrive: whole characters only, stop strings cut off."""

from collections.abc import Sequence
from typing import Protocol

CONTEXT_TOKENS = 6
"""Prompt tokens decoded with the first output token: some tokenizers drop the space before a text's first token."""

MAX_CHARACTER_TOKENS = 4
"""A character is at most 4 bytes of UTF-8, and a token that is any text is at least one of them."""

REPLACEMENT = "\ufffd"


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that jpaged uses."""

    def encode(self, text: str) -> list[int]: ...
    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = ...) -> str: ...


class Detokenizer:
    """The text of one completion, grown token by token.

    Args:
        tokenizer: decodes ids.
        prompt_token_ids: what comes before.
        stop_strings: the text ends before the first of these to appear.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int], stop_strings: Sequence[str] = ()):
        self.text = ""  # all of it, decided or not
        self.is_stopped = False
        self._tokenizer = tokenizer
        self._stop_strings = stop_strings
        self._ids = list(prompt_token_ids[-CONTEXT_TOKENS:])  # [_first, _read) is decoded already, and context
        self._first, self._read = 0, len(self._ids)
        self._is_open = False  # whether the decoded ends in a replacement held back, maybe a character's beginning
        self._num_taken = 0

    def append(self, token_id: int, *, may_stop: bool = True) -> None:
        """Add a token. Text that still waits for the rest of a character is held back, though never for long.

        Args:
            token_id: the token.
            may_stop: whether a stop string that this token completes ends the text.
        """
        self._ids.append(token_id)
        if not self._decode(is_last=False, may_stop=may_stop) and self._is_textless(token_id):
            self._ids.pop()  # else an endless row of them would be decoded again with each

    def finish(self) -> None:
        """No more tokens: what was held back becomes text."""
        if not self.is_stopped:
            self._decode(is_last=True, may_stop=False)

    def take(self, *, is_last: bool) -> str:
        """Text that no later token can take back and that was not taken before.

        Unless ``is_last``, an ending that may be the beginning of a stop string waits.
        """
        end = len(self.text)
        if not is_last:
            end -= max((_overlap(self.text, stop) for stop in self._stop_strings), default=0)
        delta = self.text[self._num_taken : end]
        self._num_taken = max(end, self._num_taken)
        return delta

    def _decode(self, *, is_last: bool, may_stop: bool) -> bool:
        """Turn what is decided into text; returns whether there was any."""
        before = self._tokenizer.decode(self._ids[self._first : self._read], skip_special_tokens=True)
        after = self._tokenizer.decode(self._ids[self._first :], skip_special_tokens=True)
        before = before[:-1] if self._is_open else before
        is_open = after.endswith(REPLACEMENT) and not is_last
        if is_open:
            if len(self._ids) - self._read <= MAX_CHARACTER_TOKENS:
                return False
            after = after[:-1]  # the last may be a character's beginning; those before it are in the output
        if after == before:
            return False
        start = len(self.text)
        # Not always all of ``before``: where the prompt ends inside a character, that ends in a replacement.
        self.text += after[_num_common(before, after) :]
        self._first, self._read, self._is_open = self._read, len(self._ids), is_open
        if may_stop:
            self._cut_at_stop(start)
        return True

    def _is_textless(self, token_id: int) -> bool:
        """Whether it is a special token. Twice, as some tokenizers drop the space before a text's first token."""
        return not self._tokenizer.decode([token_id, token_id], skip_special_tokens=True)

    def _cut_at_stop(self, start: int) -> None:
        """End the text before the earliest stop string that ends after ``start``."""
        found = [self.text.find(stop, max(0, start - len(stop) + 1)) for stop in self._stop_strings]
        hits = [index for index in found if index >= 0]
        if hits:
            self.text, self.is_stopped = self.text[: min(hits)], True


def _num_common(a: str, b: str) -> int:
    """Characters that ``a`` and ``b`` begin with alike."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _overlap(text: str, stop: str) -> int:
    """Length of the longest ending of ``text`` that begins ``stop``."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
