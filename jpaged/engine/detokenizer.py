"""Token ids to text as they arrive: whole characters only, stop strings cut off."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

CONTEXT_TOKENS = 6
"""Prompt tokens decoded with the first output token: some tokenizers drop the space before a text's first token."""

MAX_CHARACTER_TOKENS = 4
"""A character is at most 4 bytes of UTF-8, and a token that is any text is at least one of them."""

REPLACEMENT = "\ufffd"

_PLAIN_MODULES = {"transformers.tokenization_utils_base", "transformers.tokenization_utils_tokenizers"}
"""Modules of ``decode`` and ``_decode``, for tokenizers of transformers whose classes have none of their own."""


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that jpaged uses."""

    def encode(self, text: str) -> list[int]: ...
    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = ...) -> str: ...


class TokenDecoder:
    """Decodes as a tokenizer does, at a fraction of its time: for all texts of one tokenizer.

    The checks that transformers wraps around its library take longer than the library itself.

    Args:
        tokenizer: the tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        library = _library_of(tokenizer)
        self._decode: Any = (tokenizer if library is None else library).decode
        self._is_byte_level = library is not None and _is_byte_level(library)
        self._texts: tuple[dict[int, str], dict[int, str]] = {}, {}  # without special tokens, and with them

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        """The text of tokens."""
        return self._decode(token_ids, skip_special_tokens=skip_special_tokens)

    def added(self, context: Sequence[int], token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """The text that tokens add to that of a context.

        Returns:
            Empty unless it is sure that both the context and the tokens end with a whole character.
        """
        before = self._sure_text(context[-1], skip_special_tokens) if context else ""
        if not before:
            return ""
        if self._is_byte_level:  # the bytes of tokens are joined, whatever the tokens around them
            texts = [self._sure_text(token_id, skip_special_tokens) for token_id in token_ids]
            return "".join(texts) if all(texts) else ""
        if len(context) > 1:
            before = self.decode(list(context), skip_special_tokens=skip_special_tokens)
        after = self.decode([*context, *token_ids], skip_special_tokens=skip_special_tokens)
        is_sure = not before.endswith(REPLACEMENT) and not after.endswith(REPLACEMENT) and after.startswith(before)
        return after[len(before) :] if is_sure else ""

    def _sure_text(self, token_id: int, skip_special_tokens: bool) -> str:
        """The text of a token by itself; empty if it has replacements."""
        texts = self._texts[skip_special_tokens]
        text = texts.get(token_id)
        if text is None:
            text = self.decode([token_id], skip_special_tokens=skip_special_tokens)
            text = texts[token_id] = "" if REPLACEMENT in text else text
        return text


class _State(NamedTuple):
    """State that a token changes. It is replaced as a whole: an interrupted token is taken or not, never half.

    Args:
        text: the whole text, decided or not.
        num_tokens: tokens appended so far.
        ids: the last tokens; ``ids[:num_read]`` are decoded already and serve as context.
        num_read: see ``ids``.
        is_open: whether the decoded text ended in a replacement that is held back: a character may begin there.
        stop: the stop string that ended the text.
    """

    text: str
    num_tokens: int
    ids: tuple[int, ...]
    num_read: int
    is_open: bool = False
    stop: str | None = None


class Detokenizer:
    """The text of one completion, grown token by token.

    Args:
        tokenizer: decodes token ids; a ``TokenDecoder`` of it saves each text the time to make one.
        prompt_token_ids: the tokens before the completion.
        stop_strings: the text ends before the first of these to appear.
        includes_stop: whether the text ends behind that stop string instead.
        skip_special_tokens: whether special tokens are no text.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | TokenDecoder,
        prompt_token_ids: Sequence[int],
        stop_strings: Sequence[str] = (),
        *,
        includes_stop: bool = False,
        skip_special_tokens: bool = True,
    ) -> None:
        self._decoder = tokenizer if isinstance(tokenizer, TokenDecoder) else TokenDecoder(tokenizer)
        self._stop_strings = stop_strings
        self._includes_stop = includes_stop
        self._skip_special_tokens = skip_special_tokens
        self._prompt_token_ids = tuple(prompt_token_ids[-CONTEXT_TOKENS - MAX_CHARACTER_TOKENS :])
        context = self._prompt_token_ids[-CONTEXT_TOKENS:]
        self._state = _State("", 0, context, len(context))

    @property
    def text(self) -> str:
        """The whole text, decided or not."""
        return self._state.text

    @property
    def num_tokens(self) -> int:
        """Tokens appended so far."""
        return self._state.num_tokens

    @property
    def is_stopped(self) -> bool:
        """Whether a stop string ended the text."""
        return self._state.stop is not None

    @property
    def stop(self) -> str | None:
        """The stop string that ended the text."""
        return self._state.stop

    def append(self, token_id: int, *, may_stop: bool = True) -> bool:
        """Add a token.

        Args:
            token_id: the token.
            may_stop: whether a stop string that this token completes ends the text.

        Returns:
            Whether a stop string ended the text.
        """
        self.extend([token_id], may_stop=may_stop)
        return self.is_stopped

    def extend(self, token_ids: Sequence[int], *, may_stop: bool = False) -> None:
        """Add tokens. Text that still waits for the rest of a character is held back, though never for long."""
        state, num_tokens = self._state, self._state.num_tokens + len(token_ids)
        if state.text and not _is_waiting(state):
            added = self._decoder.added(state.ids, token_ids, skip_special_tokens=self._skip_special_tokens)
            if added:
                text, new_ids, stop = state.text + added, tuple(token_ids), None
                if may_stop and self._stop_strings:
                    end, stop = self._find_stop(text, len(state.text))
                    text = text[:end]
                self._state = _State(text, num_tokens, new_ids, len(new_ids), False, stop)
                return
        before = state._replace(num_tokens=num_tokens)
        grown = before._replace(ids=(*before.ids, *token_ids))
        after = self._decoded(grown, is_last=False, may_stop=may_stop)
        if not before.text and (_is_waiting(after) or REPLACEMENT in after.text):
            grown = self._with_whole_context(grown)
            after = self._decoded(grown, is_last=False, may_stop=may_stop)
        if _is_waiting(after) and not after.stop and (end := self._find_whole(grown, len(token_ids))):
            whole = self._decoded(grown._replace(ids=grown.ids[:end]), is_last=True, may_stop=may_stop)
            after = whole if whole.stop else whole._replace(ids=(*whole.ids, *grown.ids[end:]))
        if after.text == before.text and self._is_textless(token_ids):
            after = before  # or every further token would decode an endless row of special tokens again
        self._state = after

    def finish(self, *, may_stop: bool = False, ending: str = "") -> None:
        """Turn what is held back into text: no more tokens come.

        Args:
            may_stop: whether a stop string in that text ends it.
            ending: ends the text unless a stop string did, or the text ends so.
        """
        if not self.is_stopped:
            state = self._decoded(self._state, is_last=True, may_stop=may_stop)
            is_ended = state.stop is not None or state.text.endswith(ending)
            self._state = state if is_ended else state._replace(text=state.text + ending)

    def num_decided(self, *, is_last: bool) -> int:
        """Number of characters of ``text`` that no later token can take back.

        Unless ``is_last``, an ending that may be the beginning of a stop string waits.
        """
        text = self._state.text
        if is_last or not self._stop_strings:
            return len(text)
        return len(text) - max(_overlap(text, stop) for stop in self._stop_strings)

    def _decoded(self, state: _State, *, is_last: bool, may_stop: bool) -> _State:
        """``state`` with decided tokens turned into text."""
        before, after = self._text_of(state.ids[: state.num_read]), self._text_of(state.ids)
        is_open = after.endswith(REPLACEMENT) and not is_last
        is_held = is_open and len(state.ids) - state.num_read <= MAX_CHARACTER_TOKENS
        first, whole = self._find_last_character(state, before)
        if not is_held and _is_spoiled(whole, before, after):
            dropped = state._replace(ids=state.ids[first:], num_read=state.num_read - first)
            return self._decoded(dropped, is_last=is_last, may_stop=may_stop)
        before = before[:-1] if state.is_open else before
        if is_held:
            after = after.rstrip(REPLACEMENT)  # later tokens change the replacements alone
        elif is_open:
            after = after[:-1]  # a character may begin at the last replacement; the earlier ones are text
        if after == before:
            return state
        # Where the prompt ends inside a character, ``before`` ends in a replacement, which ``after`` has not.
        start = len(before)
        if not after.startswith(before):
            start = max(_num_common(before, after), len(whole) if after.startswith(whole) else 0)
        text = state.text + after[start:]
        end, stop = self._find_stop(text, len(state.text)) if may_stop and self._stop_strings else (None, None)
        if is_held and stop is None:
            return state
        ids = state.ids[first:]  # a row of bytes that begins inside a character is no text
        return _State(text[:end], state.num_tokens, ids, len(ids), is_open, stop)

    def _find_last_character(self, state: _State, before: str) -> tuple[int, str]:
        """Find the tokens that are decoded already, but end inside a character.

        Args:
            state: the tokens.
            before: the text of those that are decoded already.

        Returns:
            Where they begin, and the text before them; the end of what is decoded, if it ends in a whole character.
        """
        end, text = state.num_read, before
        while text.endswith(REPLACEMENT) and state.num_read - end < MAX_CHARACTER_TOKENS and end:
            end -= 1
            text = self._text_of(state.ids[:end])
        return (state.num_read, before) if text.endswith(REPLACEMENT) else (end, text)

    def _with_whole_context(self, state: _State) -> _State:
        """A state without text, whose context does not begin inside a character of the prompt.

        Tokenizers that spell unknown characters as bytes decode a row of bytes as characters if all of it is valid.
        """

        def num_broken(context: tuple[int, ...]) -> int:
            """The prompt may end inside a character too: its last tokens do not count."""
            texts = (self._text_of(context[: len(context) - i]) for i in range(MAX_CHARACTER_TOKENS))
            return min(text.count(REPLACEMENT) for text in texts)

        contexts = [self._prompt_token_ids[-CONTEXT_TOKENS - i :] for i in range(MAX_CHARACTER_TOKENS)]
        context = min(contexts, key=num_broken)
        return state._replace(ids=(*context, *state.ids[state.num_read :]), num_read=len(context))

    def _find_whole(self, state: _State, num_new: int) -> int:
        """Find the end of the tokens that are whole characters, where the last ``num_new`` may end inside a character.

        Tokenizers that spell unknown characters as bytes decode each byte of a row as a replacement while the row is
        not valid. The text gets shorter when a byte ends a character, even where that character is a replacement.

        Returns:
            The end in ``state.ids``; 0 if none of the new tokens ends a character.
        """
        first = max(state.num_read, len(state.ids) - min(num_new, MAX_CHARACTER_TOKENS))
        for end in range(len(state.ids), first, -1):
            text = self._text_of(state.ids[:end])
            if not text.endswith(REPLACEMENT) or len(text) < len(self._text_of(state.ids[: end - 1])):
                return end
        return 0

    def _is_textless(self, token_ids: Sequence[int]) -> bool:
        """Whether tokens are special. Each is decoded twice: some tokenizers drop the space of a text's first token."""
        return not self._text_of([*token_ids, *token_ids])

    def _text_of(self, token_ids: Sequence[int]) -> str:
        return self._decoder.decode(list(token_ids), skip_special_tokens=self._skip_special_tokens)

    def _find_stop(self, text: str, start: int) -> tuple[int | None, str | None]:
        """The end of the text at the earliest stop string that ends after ``start``, and that string."""
        found = [(text.find(stop, max(0, start - len(stop) + 1)), stop) for stop in self._stop_strings]
        at, stop = min((each for each in found if each[0] >= 0), key=lambda each: each[0], default=(None, None))
        if at is None or stop is None:
            return None, None
        return at + (len(stop) if self._includes_stop else 0), stop


def _library_of(tokenizer: Any) -> Any:
    """The tokenizer of Hugging Face's library that decodes all that ``tokenizer`` does; None if there is none."""
    made_by = {getattr(getattr(type(tokenizer), name, None), "__module__", None) for name in ("decode", "_decode")}
    is_plain = made_by == _PLAIN_MODULES and vars(tokenizer).keys().isdisjoint(("decode", "_decode"))
    return tokenizer.backend_tokenizer if is_plain and not _removes_spaces(tokenizer) else None


def _removes_spaces(tokenizer: Any) -> bool:
    """Whether transformers takes spaces out of what its library decodes. It ignores the setting for BPE (Llama 3)."""
    is_forced = getattr(tokenizer, "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output", True)
    is_bpe = type(tokenizer.backend_tokenizer.model).__name__ == "BPE"
    return bool(tokenizer.clean_up_tokenization_spaces) and (is_forced or not is_bpe)


def _is_byte_level(library: Any) -> bool:
    from tokenizers import decoders

    return isinstance(library.decoder, decoders.ByteLevel)


def _is_waiting(state: _State) -> bool:
    """Whether a character may begin in the last tokens."""
    return state.is_open or len(state.ids) > state.num_read


def _is_spoiled(whole: str, before: str, after: str) -> bool:
    """Whether new tokens turn whole characters of the context into replacements, as bytes do that are no character."""
    return not after.startswith((before, whole)) and after[_num_common(before, after) :].startswith(REPLACEMENT)


def _num_common(a: str, b: str) -> int:
    """Characters that ``a`` and ``b`` begin with alike."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _overlap(text: str, stop: str) -> int:
    """Length of the longest ending of ``text`` that begins ``stop``."""
    n = min(len(stop) - 1, len(text))
    while n and (n := stop.rfind(text[-1], 0, n) + 1):  # other beginnings end in another character
        if text.endswith(stop[:n]):
            return n
        n -= 1
    return 0
