"""Text that grows token by token equals the text of all tokens, and stops where it must."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from jpaged.engine.detokenizer import Detokenizer, TokenDecoder

END = "<end>"
TEXT = "héllo wörld: 日本語, 🙂 = 1 + 2\n"


class Reader(Detokenizer):
    """Takes decided text as a stream does, each character once."""

    num_given = 0

    def take(self, *, is_last):
        end = self.num_decided(is_last=is_last)
        given, self.num_given = self.text[self.num_given : end], max(end, self.num_given)
        return given


def byte_level_tokenizer():
    """A byte-level BPE whose every byte is a token, with a few merges, some of them across characters."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {END: 0} | {letter: i + 1 for i, letter in enumerate(letters)}
    space, first_of_cjk = "\u0120", "æ"  # byte 0x20 and byte 0xE6 as ByteLevel writes them
    merges = [("l", "l"), ("o", space), (space, "w"), (space, first_of_cjk), ("s", "t")]
    vocab |= {a + b: len(vocab) + i for i, (a, b) in enumerate(merges)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)


def metaspace_tokenizer():
    """A tokenizer like Llama 2's: words carry their space, and the first word of a text loses it."""
    words = ["<unk>", "▁a", "▁b", "c", ",", "▁", "▁🙂"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def byte_fallback_tokenizer():
    """A tokenizer like Llama 2's without words: byte tokens, decoded as replacements until a whole row is valid."""
    vocab = {"<unk>": 0} | {f"<0x{byte:02X}>": byte + 1 for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


TOKENIZER = byte_level_tokenizer()
BYTE_FALLBACK = byte_fallback_tokenizer()


class WatchedTokenizer:
    """``TOKENIZER``, noting the most tokens it was asked to decode at once."""

    def __init__(self):
        self.most_tokens = 0

    def encode(self, text):
        return TOKENIZER.encode(text)

    def decode(self, token_ids, *, skip_special_tokens=False):
        self.most_tokens = max(self.most_tokens, len(token_ids))
        return TOKENIZER.decode(token_ids, skip_special_tokens=skip_special_tokens)


def stream(detokenizer, token_ids):
    """Every take, one a token and the last one after the end."""
    taken = []
    for token_id in token_ids:
        detokenizer.append(token_id)
        taken.append(detokenizer.take(is_last=False))
        if detokenizer.is_stopped:
            break
    detokenizer.finish()
    return [*taken, detokenizer.take(is_last=True)]


def test_character_of_several_tokens_comes_whole():
    token_ids = TOKENIZER.encode("a🙂b")
    assert len(token_ids) == 6
    assert stream(Reader(TOKENIZER, []), token_ids) == ["a", "", "", "", "🙂", "b", ""]


def test_unfinished_character_at_the_end_becomes_a_replacement():
    token_ids = TOKENIZER.encode("a🙂")[:3]
    assert stream(Reader(TOKENIZER, []), token_ids) == ["a", "", "", "\ufffd"]


def test_character_begun_by_the_prompt_is_text_of_the_output():
    token_ids = TOKENIZER.encode("aé!")
    detokenizer = Reader(TOKENIZER, token_ids[:2])
    assert stream(detokenizer, token_ids[2:]) == ["é", "!", ""]


def test_replacement_character_in_the_prompt_is_not_repeated():
    detokenizer = Reader(TOKENIZER, TOKENIZER.encode("a\ufffd"))
    assert stream(detokenizer, TOKENIZER.encode("bc")) == ["b", "c", ""]


@pytest.mark.parametrize("piece", ["\ufffd", "\ufffd" + END, "a" + END], ids=["genuine", "then-special", "special"])
def test_replacement_characters_and_special_tokens_without_end_keep_coming_and_cost_no_more(piece):
    token_ids = [*TOKENIZER.encode(piece), *TOKENIZER.encode(piece.removeprefix("a")) * 200]
    tokenizer = WatchedTokenizer()
    detokenizer = Reader(tokenizer, [])
    for token_id in token_ids:
        detokenizer.append(token_id)
    assert len(detokenizer.text) > len(TOKENIZER.decode(token_ids, skip_special_tokens=True)) - 5
    assert tokenizer.most_tokens < 16


def test_stop_string_behind_replacement_characters_stops():
    first, last = TOKENIZER.encode("🙂")[0], TOKENIZER.encode("é")[-1]
    detokenizer = Reader(TOKENIZER, [], ["\ufffd\ufffd"])
    taken = stream(detokenizer, [first] * 9 + [last])
    assert (detokenizer.is_stopped, "".join(taken), len(taken)) == (True, "", 6)


def test_special_tokens_are_no_text():
    token_ids = [TOKENIZER.eos_token_id, *TOKENIZER.encode("a"), TOKENIZER.eos_token_id, *TOKENIZER.encode("b")]
    assert stream(Reader(TOKENIZER, []), token_ids) == ["", "a", "", "b", ""]


def test_first_word_keeps_the_space_that_a_text_would_lose():
    tokenizer = metaspace_tokenizer()
    assert tokenizer.decode([1, 2]) == "a b"
    assert stream(Reader(tokenizer, [1]), [2, 3, 1, 5, 6]) == [" b", "c", " a", " ", " 🙂", ""]


@pytest.mark.parametrize("stop", ["o w", " wö", "ö", "日本", "ld: 日", "🙂 ="])
def test_text_ends_before_a_stop_string_wherever_tokens_end(stop):
    detokenizer = Reader(TOKENIZER, [], [stop])
    taken = stream(detokenizer, TOKENIZER.encode(TEXT))
    assert detokenizer.is_stopped
    assert "".join(taken) == detokenizer.text == TEXT[: TEXT.index(stop)]


def test_first_of_several_stop_strings_wins():
    token_ids = TOKENIZER.encode("abcxyz")
    assert "".join(stream(Reader(TOKENIZER, [], ["yz", "cx", "q"]), token_ids)) == "ab"
    assert "".join(stream(Reader(TOKENIZER, [], ["x", "bcx"]), token_ids)) == "a"


def test_beginning_of_a_stop_string_waits_until_it_is_decided():
    token_ids = TOKENIZER.encode("aababc")
    assert stream(Reader(TOKENIZER, [], ["abc"]), token_ids) == ["", "a", "", "ab", "", "", ""]
    assert stream(Reader(TOKENIZER, [], ["abd"]), token_ids) == ["", "a", "", "ab", "", "abc", ""]


def test_what_waits_comes_at_the_end():
    assert stream(Reader(TOKENIZER, [], ["abc"]), TOKENIZER.encode("xab")) == ["x", "", "", "ab"]


def test_stop_string_in_the_prompt_or_across_its_end_does_not_stop():
    detokenizer = Reader(TOKENIZER, TOKENIZER.encode("stop st"), ["stop"])
    assert "".join(stream(detokenizer, TOKENIZER.encode("op."))) == "op."
    assert not detokenizer.is_stopped


def test_stop_string_counts_only_from_where_it_may():
    detokenizer = Reader(TOKENIZER, [], ["ab"])
    a, b = TOKENIZER.encode("ab")
    for token_id in (a, b):
        detokenizer.append(token_id, may_stop=False)
    detokenizer.append(a)
    assert (detokenizer.text, detokenizer.is_stopped) == ("aba", False)
    detokenizer.append(b)
    assert (detokenizer.text, detokenizer.is_stopped) == ("ab", True)


def cleaning_byte_level_tokenizer(**options):
    """Like Llama 3's: transformers ignores the setting that would take spaces out, unless it is forced."""
    library = TOKENIZER.backend_tokenizer
    return PreTrainedTokenizerFast(
        tokenizer_object=library, eos_token=END, clean_up_tokenization_spaces=True, **options
    )


@pytest.mark.parametrize(
    ("make", "num_decodes"),
    [(metaspace_tokenizer, 1), (byte_level_tokenizer, 0), (cleaning_byte_level_tokenizer, 0)],
)
def test_token_that_was_seen_before_costs_one_decode_at_most(make, num_decodes, monkeypatch):
    decoder, ids, calls = TokenDecoder(make()), [1, 2, 3] * 4, []
    Detokenizer(decoder, [3], ["never seen"]).extend(ids)
    detokenizer = Detokenizer(decoder, [3], ["never seen"])
    for token_id in ids:
        detokenizer.append(token_id)
    decode = TokenDecoder.decode
    monkeypatch.setattr(TokenDecoder, "decode", lambda *args, **options: calls.append(0) or decode(*args, **options))
    before = detokenizer.text
    for token_id in ids:
        detokenizer.append(token_id)
    assert len(calls) == num_decodes * len(ids)
    assert detokenizer.text == before * 2


class Shouting(PreTrainedTokenizerFast):
    """A class with a decoding of its own."""

    def _decode(self, *args, **options):
        return super()._decode(*args, **options).upper()


def test_what_a_tokenizer_does_beside_its_library_is_done():
    library, ids = TOKENIZER.backend_tokenizer, TOKENIZER.encode("a , b")
    shouting = Shouting(tokenizer_object=library, eos_token=END)
    with_words = metaspace_tokenizer()
    cleaning = PreTrainedTokenizerFast(
        tokenizer_object=with_words.backend_tokenizer, clean_up_tokenization_spaces=True, unk_token="<unk>"
    )
    patched = byte_level_tokenizer()
    patched.decode = lambda token_ids, **options: "".join("x" for _ in token_ids)
    assert "".join(stream(Reader(shouting, []), ids)) == "A , B"
    assert "".join(stream(Reader(patched, []), ids)) == "xxxxx"
    words = [1, 5, 4, 2]
    assert with_words.decode(words) == "a , b" != cleaning.decode(words) == "a, b"
    at_once = Detokenizer(cleaning, [3])
    at_once.extend(words)
    assert at_once.text == " a, b"
    forced = cleaning_byte_level_tokenizer(clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output=True)
    assert cleaning_byte_level_tokenizer().decode(ids) == "a , b" != forced.decode(ids) == "a, b"
    at_once = Detokenizer(forced, [])
    at_once.extend(ids)
    assert at_once.text == "a, b"


any_ids = st.lists(st.integers(0, len(TOKENIZER) - 1), max_size=24)
prompts = st.text(max_size=4).map(TOKENIZER.encode)


@given(prompt=prompts, token_ids=any_ids | st.text(max_size=12).map(TOKENIZER.encode))
def test_pieces_join_to_the_text_of_all_tokens(prompt, token_ids):
    expected = TOKENIZER.decode(token_ids, skip_special_tokens=True)
    assert "".join(stream(Reader(TOKENIZER, prompt), token_ids)) == expected


@given(prompt=prompts, token_ids=any_ids | st.text(max_size=12).map(TOKENIZER.encode))
def test_tokens_added_at_once_give_the_text_of_tokens_added_one_by_one(prompt, token_ids):
    at_once, one_by_one = Detokenizer(TOKENIZER, prompt), Detokenizer(TOKENIZER, prompt)
    at_once.extend(token_ids)
    for token_id in token_ids:
        one_by_one.append(token_id)
    at_once.finish()
    one_by_one.finish()
    assert at_once.text == one_by_one.text


@given(text=st.text("a\x00é日🙂\u07ff\uffff\U0010ffff", max_size=12))
def test_bytes_of_a_text_give_each_character_with_its_last_byte(text):
    detokenizer, seen = Reader(BYTE_FALLBACK, []), ""
    for character in text:
        for byte in character.encode():
            assert detokenizer.text == seen
            detokenizer.append(byte + 1)
        seen += character
    assert detokenizer.text == seen


@given(
    pieces=st.lists(
        st.text("aé日🙂", max_size=3).map(TOKENIZER.encode)
        | st.sampled_from([[0], TOKENIZER.encode("\ufffd"), TOKENIZER.encode("🙂")[:3], TOKENIZER.encode("é")[1:]]),
        max_size=24,
    )
)
def test_little_waits_and_nothing_is_lost_among_broken_characters(pieces):
    tokenizer, token_ids, text = WatchedTokenizer(), [], ""
    detokenizer = Reader(tokenizer, [])
    for token_id in [token_id for piece in pieces for token_id in piece]:
        detokenizer.append(token_id)
        text += detokenizer.take(is_last=False)
        token_ids += [token_id] if token_id != TOKENIZER.eos_token_id else []
        assert len(text) >= len(TOKENIZER.decode(token_ids[:-4])) - 1
    assert tokenizer.most_tokens < 16
    detokenizer.finish()
    assert text + detokenizer.take(is_last=True) == TOKENIZER.decode(token_ids)


@given(
    token_ids=st.lists(st.sampled_from(TOKENIZER.encode("abcé"))).filter(bool),
    stops=st.lists(st.text("abcé", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_stream_with_stop_strings_equals_the_text_cut_at_the_first_to_be_complete(token_ids, stops):
    texts = [TOKENIZER.decode(token_ids[:n]) for n in range(len(token_ids) + 1)]
    texts = [text for text in texts if not text.endswith("\ufffd")]  # what is whole after some token
    expected = next(
        (
            after[: min(i for i in (after.find(stop) for stop in stops) if i >= 0)]
            for after in texts
            if any(stop in after for stop in stops)
        ),
        TOKENIZER.decode(token_ids),
    )
    detokenizer = Reader(TOKENIZER, [], stops)
    taken = stream(detokenizer, token_ids)
    assert "".join(taken) == detokenizer.text == expected


@given(token_ids=any_ids, stop=st.text("abé🙂", min_size=1, max_size=3))
def test_what_was_taken_is_never_taken_back(token_ids, stop):
    detokenizer = Reader(TOKENIZER, [], [stop])
    texts = [""]
    for token_id in token_ids:
        detokenizer.append(token_id)
        texts.append(texts[-1] + detokenizer.take(is_last=False))
    assert all(after.startswith(before) for before, after in pairwise(texts))
    assert detokenizer.text.startswith(texts[-1])
