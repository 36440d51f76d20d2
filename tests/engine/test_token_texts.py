"""Texts of single tokens, and texts that grow token by token, under tokenizers of five makes."""

import random
import re

import pytest

from jpaged.engine.detokenizer import Detokenizer
from jpaged.engine.token_texts import TextOffsets, TokenTexts, end_token_ids, special_tokens
from tests.support.tokenizer_makes import MAKES, MARK, SPECIALS, tokenizer_of

ALPHABET = [
    *"abet hing ,.  \n\t",
    "é",
    "日本",
    "🙂",
    "👩\u200d👧",
    "e\u0301",
    "\ufffd",
    " 🙂",
    "the",
    " a",
    "<|im_end|>",
]
BROKEN = 0.2
"""Share of the strings whose tokens are drawn at random: most are no text."""

makes = pytest.mark.parametrize("make", list(MAKES))


class PlainTokenizer:
    """A user's own tokenizer, with the two methods that are asked for."""

    def encode(self, text):
        return [ord(letter) for letter in text]

    def decode(self, token_ids, *, skip_special_tokens=False):
        return "".join(map(chr, token_ids))


def _text_of_bytes(tokenizer, token_ids):
    """The text of tokens by the bytes of each of them."""
    texts, specials = TokenTexts(tokenizer), special_tokens(tokenizer).values()
    return b"".join(texts.bytes_of(token_id) for token_id in token_ids if token_id not in specials).decode(
        errors="replace"
    )


def _is_within(some, whole):
    """Whether letters stand in a text, in the same order."""
    rest = iter(whole)
    return all(letter in rest for letter in some)


def assert_streams_equal_whole_texts(make, count):
    tokenizer, rng = tokenizer_of(make), random.Random(make)
    for _ in range(count):
        if rng.random() < BROKEN:
            token_ids = [rng.randrange(len(tokenizer)) for _ in range(rng.randint(1, 12))]
        else:
            text = "".join(rng.choice(ALPHABET) for _ in range(rng.randint(1, 10)))
            token_ids = tokenizer.encode(text, add_special_tokens=False)
        prompt = tokenizer.encode("the", add_special_tokens=False)
        whole = tokenizer.decode([*prompt, *token_ids], skip_special_tokens=True)
        one_by_one, at_once = Detokenizer(tokenizer, prompt), Detokenizer(tokenizer, prompt)
        streamed = ""
        for token_id in token_ids:
            one_by_one.append(token_id)
            assert one_by_one.text.startswith(streamed), "no character is taken back"
            streamed = one_by_one.text
        one_by_one.finish()
        at_once.extend(token_ids)
        at_once.finish()
        # Bytes that are no character become one replacement or several, by the bytes that are decoded with them.
        texts = [re.sub("\ufffd+", "\ufffd", text) for text in (whole, "the" + one_by_one.text, "the" + at_once.text)]
        if "\ufffd" not in whole or make == "byte level":
            assert len(set(texts)) == 1, (make, token_ids)
        # Those of sentencepiece take characters of their row with them, unless these were streamed before.
        for text in (one_by_one.text, at_once.text):
            assert text.count("\ufffd") <= len(token_ids), (make, token_ids)
            assert _is_within(text.replace("\ufffd", ""), _text_of_bytes(tokenizer, token_ids)), (make, token_ids)


@makes
def test_streamed_text_equals_the_text_decoded_at_once(make):
    assert_streams_equal_whole_texts(make, 1000)


@makes
def test_texts_of_tokens_join_to_the_whole_text(make):
    tokenizer = tokenizer_of(make)
    texts, text = TokenTexts(tokenizer), "a the bathing, the a"
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    joined = "".join(map(texts.text, token_ids))
    assert joined.lstrip() == tokenizer.decode(token_ids).lstrip()
    assert b"".join(map(texts.bytes_of, token_ids)) == joined.encode()
    expected = [len("".join(map(texts.text, token_ids[:i]))) for i in range(len(token_ids))]
    assert TextOffsets(texts.bytes_of).extend(token_ids) == expected


@pytest.mark.parametrize(("make", "token", "text"), [("sentencepiece", MARK + "a", " a"), ("sentencepiece", "a", "a"),
    ("Unigram", MARK + "the", " the"), ("Unigram", "ing", "ing"), ("WordPiece", "the", " the"),
    ("WordPiece", "##ing", "ing"), ("byte level", "\u0120a", " a")])  # fmt: skip
def test_tokens_with_and_without_a_space_differ(make, token, text):
    tokenizer = tokenizer_of(make)
    assert TokenTexts(tokenizer).text(tokenizer.convert_tokens_to_ids(token)) == text


@pytest.mark.parametrize(
    ("make", "token", "text", "exact"),
    [
        ("byte level", "\u0120\u00f0", r"bytes: \xf0", b" \xf0"),
        ("byte level", "\u00e6", r"bytes:\xe6", b"\xe6"),
        ("sentencepiece", "<0xF0>", r"bytes:\xf0", b"\xf0"),
        ("sentencepiece", "<0x0A>", "\n", b"\n"),
        ("Unigram", "<0xE2>", r"bytes:\xe2", b"\xe2"),
    ],
)
def test_part_of_a_character_is_named_by_its_bytes(make, token, text, exact):
    tokenizer = tokenizer_of(make)
    token_id = tokenizer.convert_tokens_to_ids(token)
    assert (TokenTexts(tokenizer).text(token_id), TokenTexts(tokenizer).bytes_of(token_id)) == (text, exact)


@pytest.mark.parametrize(
    ("written", "offsets"),
    [
        ([b"quen", b"\xaa", b"H", b"tle"], [0, 4, 5, 6]),
        ([b"\x80"] * 6, [0, 1, 2, 3, 4, 5]),
        ([b"\xe6", b"\x97", b"\xa5", b"H"], [0, 1, 1, 1]),
        ([b"\xe6\x97", b"H", b"\xf0", b"\x80", b"H"], [0, 1, 2, 3, 4]),
        ([b"a\xe6", b"\x97\xa5b", b"c"], [0, 2, 3]),
    ],
)
def test_offsets_count_a_replacement_for_bytes_that_are_no_character(written, offsets):
    assert TextOffsets(written.__getitem__).extend(range(len(written))) == offsets
    decoded = [b"".join(written[:i]).decode(errors="replace") for i in range(len(written))]
    assert list(map(len, decoded)) == offsets


@makes
def test_offsets_are_those_of_the_text_that_is_streamed(make):
    tokenizer, rng = tokenizer_of(make), random.Random(5)
    texts, specials = TokenTexts(tokenizer), special_tokens(tokenizer).values()
    letter = tokenizer.encode("a", add_special_tokens=False)
    some = [i for i in range(len(tokenizer)) if i in specials or "bytes:" in texts.text(i) or rng.random() < 0.2]
    # A broken row of bytes goes on behind a letter that is spelt as a byte, which models do not write.
    letters = {f"<0x{byte:02X}>" for byte in range(0x80)}
    some = [i for i in some if tokenizer.convert_ids_to_tokens(i) not in letters]
    for _ in range(50):
        token_ids = [*rng.choices(some, k=8), *letter]
        detokenizer = Detokenizer(tokenizer, letter)
        offsets = TextOffsets(texts.bytes_of, 3, specials, is_byte_level=texts.is_byte_level)
        for token_id in token_ids:
            detokenizer.append(token_id)
            offsets.extend([token_id])
        detokenizer.finish()
        assert offsets.extend(letter[:1]) == [3 + len(detokenizer.text)], (token_ids, detokenizer.text)


@makes
def test_special_tokens_are_found_and_have_their_own_texts(make):
    tokenizer = tokenizer_of(make)
    specials = special_tokens(tokenizer)
    assert set(SPECIALS) <= specials.keys()
    assert TokenTexts(tokenizer).text(specials["<|im_end|>"]).strip() == "<|im_end|>"
    assert end_token_ids(tokenizer, len(tokenizer)) == (specials["</s>"],)
    assert end_token_ids(tokenizer, specials["</s>"]) == (), "the model does not know the token"


def test_tokenizer_of_a_user_decodes_each_token_by_itself():
    texts = TokenTexts(PlainTokenizer())
    assert (texts.text(97), texts.bytes_of(233)) == ("a", "é".encode())
    assert TextOffsets(texts.bytes_of).extend([233, 97]) == [0, 1]
    assert special_tokens(PlainTokenizer()) == {}
    assert end_token_ids(PlainTokenizer(), 300) == ()


@pytest.mark.parametrize("make", [make for make in MAKES if make != "WordPiece"])
@pytest.mark.parametrize("num_rest", [0, 1, 2])
def test_stop_string_before_an_unfinished_character_stops_at_once(make, num_rest):
    tokenizer = tokenizer_of(make)
    token_ids = tokenizer.encode("the a 🙂", add_special_tokens=False)
    first = next(i for i in range(len(token_ids)) if "\ufffd" in tokenizer.decode(token_ids[: i + 1]))
    detokenizer = Detokenizer(tokenizer, [], ["a "])
    stopped = [detokenizer.append(token_id) for token_id in token_ids[: first + 1 + num_rest]]
    stop_at = first if make == "byte level" else first - 1
    assert stopped.index(True) == stop_at
    assert detokenizer.text.endswith("the ")


def test_stop_string_of_replacements_counts_at_the_end():
    tokenizer = tokenizer_of("byte level")
    detokenizer = Detokenizer(tokenizer, [], ["\ufffd"])
    detokenizer.append(tokenizer.convert_tokens_to_ids("\u00f0"))
    assert not detokenizer.is_stopped
    detokenizer.finish(may_stop=True)
    assert (detokenizer.text, detokenizer.stop) == ("", "\ufffd")
