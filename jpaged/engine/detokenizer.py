"""Token ids to text as they arrive: whole characters only, stop strings cut off."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

CONTEXT_TOKENS = 6
"""Prompt tokens decoded with the first output token: some tokenizers drop the space before a text's first token."""

MAX_CHARACTER_TOKENS = 4
"""A character is at most 4 bytes of UTF-8, and a token that is any text is at least one of them."""

REPLACEMENT = "\ufffd"


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that jpaged uses."""

    def encode(self, text: str) -> list[int]: ...
    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = ...) -> str: ...


class _State(NamedTuple):
    """All that a token changes, replaced as a whole: an interruption leaves the token taken or not, never half.

    Args:
        text: all of it, decided or not.
        num_tokens: tokens that made it.
        ids: the tail of the tokens; ``ids[:num_read]`` is decoded already, and context.
        num_read: see ``ids``.
        is_open: whether the decoded ends in a replacement held back, maybe a character's beginning.
        is_stopped: whether a stop string ended the text.
    """

    text: str
    num_tokens: int
    ids: tuple[int, ...]
    num_read: int
    is_open: bool = False
    is_stopped: bool = False


class Detokenizer:
    """The text of one completion, grown token by token.

    Args:
        tokenizer: decodes ids.
        prompt_token_ids: what comes before.
        stop_strings: the text ends before the first of these to appear.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int], stop_strings: Sequence[str] = ()):
        self._tokenizer = tokenizer
        self._stop_strings = stop_strings
        context = tuple(prompt_token_ids[-CONTEXT_TOKENS:])
        self._state = _State("", 0, context, len(context))

    @property
    def text(self) -> str:
        """All of it, decided or not."""
        return self._state.text

    @property
    def num_tokens(self) -> int:
        """Tokens appended so far."""
        return self._state.num_tokens

    @property
    def is_stopped(self) -> bool:
        """Whether a stop string ended the text."""
        return self._state.is_stopped

    def append(self, token_id: int, *, may_stop: bool = True) -> None:
        """Add a token. Text that still waits for the rest of a character is held back, though never for long.

        Args:
            token_id: the token.
            may_stop: whether a stop string that this token completes ends the text.
        """
        before = self._state._replace(num_tokens=self._state.num_tokens + 1)
        after = self._decoded(before._replace(ids=(*before.ids, token_id)), is_last=False, may_stop=may_stop)
        if after.text == before.text and self._is_textless(token_id):
            after = before  # else an endless row of them would be decoded again with each
        self._state = after

    def finish(self) -> None:
        """No more tokens: what was held back becomes text."""
        if not self.is_stopped:
            self._state = self._decoded(self._state, is_last=True, may_stop=False)

    def num_decided(self, *, is_last: bool) -> int:
        """How much of ``text``, in characters, no later token can take back.

        Unless ``is_last``, an ending that may be the beginning of a stop string waits.
        """
        waiting = 0 if is_last else max((_overlap(self.text, stop) for stop in self._stop_strings), default=0)
        return len(self.text) - waiting

    def _decoded(self, state: _State, *, is_last: bool, may_stop: bool) -> _State:
        """``state`` with what is decided turned into text."""
        before = self._tokenizer.decode(list(state.ids[: state.num_read]), skip_special_tokens=True)
        after = self._tokenizer.decode(list(state.ids), skip_special_tokens=True)
        before = before[:-1] if state.is_open else before
        is_open = after.endswith(REPLACEMENT) and not is_last
        if is_open:
            if len(state.ids) - state.num_read <= MAX_CHARACTER_TOKENS:
                return state
            after = after[:-1]  # the last may be a character's beginning; those before it are in the output
        if after == before:
            return state
        # Not always all of ``before``: where the prompt ends inside a character, that ends in a replacement.
        text = state.text + after[_num_common(before, after) :]
        end = self._find_stop(text, len(state.text)) if may_stop else None
        ids = state.ids[state.num_read :]
        return _State(text[:end], state.num_tokens, ids, len(ids), is_open, end is not None)

    def _is_textless(self, token_id: int) -> bool:
        """Whether it is a special token. Twice, as some tokenizers drop the space before a text's first token."""
        return not self._tokenizer.decode([token_id, token_id], skip_special_tokens=True)

    def _find_stop(self, text: str, start: int) -> int | None:
        """Where the earliest stop string that ends after ``start`` begins."""
        found = [text.find(stop, max(0, start - len(stop) + 1)) for stop in self._stop_strings]
        return min((index for index in found if index >= 0), default=None)


def _num_common(a: str, b: str) -> int:
    """Characters that ``a`` and ``b`` begin with alike."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _overlap(text: str, stop: str) -> int:
    """Length of the longest ending of ``text`` that begins ``stop``."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
