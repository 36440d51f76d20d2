"""Tokenizers of six makes: loaded as their files say, and streamed as they decode at once."""

import json
import random
from functools import cache
from itertools import pairwise

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from jpaged.engine import tokenizers as loading
from jpaged.engine.detokenizer import Detokenizer
from jpaged.engine.tokenizers import load_tokenizer

MARK = "\u2581"
SPECIAL = ["<unk>", "<s>", "</s>"]
WORDS = "the cat's hat, a  naïve café: don't 日本語 是 🙂 3.14 def f(x):\n\treturn x"
NUM_STRINGS = 20_000


def _bytes_as_tokens():
    return [f"<0x{byte:02X}>" for byte in range(256)]


def _spelled(words):
    """Pieces and merges that make each word of its characters, from the left."""
    merges = dict.fromkeys((word[:n], word[n]) for word in words for n in range(1, len(word)))
    pieces = dict.fromkeys([*(c for word in words for c in word), *(a + b for a, b in merges)])
    return list(pieces), list(merges)


def byte_level():
    """GPT-2, Llama 3, Qwen."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([WORDS] * 3, trainer)
    return tokenizer


def _sentencepiece_bpe(prefix, merged):
    """A BPE that writes spaces as marks and unknown characters as bytes, as sentencepiece's."""
    pieces, merges = _spelled(merged)
    vocab = {piece: i for i, piece in enumerate([*SPECIAL, *_bytes_as_tokens(), *pieces])}
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    as_marks = [normalizers.Prepend(MARK)] * prefix + [normalizers.Replace(" ", MARK)]
    tokenizer.normalizer = normalizers.Sequence(as_marks)
    strip = [decoders.Strip(" ", 1, 0)] * prefix
    as_text = [decoders.Replace(MARK, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    tokenizer.decoder = decoders.Sequence(as_text)
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def sentencepiece_with_prefix():
    """Llama 2, Mistral."""
    return _sentencepiece_bpe(True, [f"{MARK}the", f"{MARK}cat", f"{MARK}{MARK}", "naïve", "語", "f(x)"])


def sentencepiece_without_prefix():
    """Gemma."""
    return _sentencepiece_bpe(False, [f"{MARK}the", "cat", f"{MARK}{MARK}", "日本", "\n\t"])


def byte_fallback():
    """No words at all: each character is three bytes or fewer, or an emoji of four."""
    return _sentencepiece_bpe(False, [MARK])


def unigram():
    """T5, XLM: no bytes, unknown characters are lost."""
    scores = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), (MARK, -2.0), (f"{MARK}the", -1.5), (f"{MARK}ca", -3.0)]
    scores += [(piece, -4.0 - 0.1 * i) for i, piece in enumerate(dict.fromkeys(WORDS.replace(" ", "")))]
    tokenizer = Tokenizer(models.Unigram(scores, unk_id=0))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def word_piece():
    """BERT: words without their spaces, and a decoder that puts spaces back."""
    letters = sorted(set(WORDS) - set(" \n\t"))
    pieces = [*SPECIAL, *letters, *(f"##{letter}" for letter in letters), "the", "cat", "##turn", "don", "n't"]
    tokenizer = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


MAKES = byte_level, sentencepiece_with_prefix, sentencepiece_without_prefix, byte_fallback, unigram, word_piece


def save(tokenizer, path, model_type="llama", **settings):
    """Writes a checkpoint's tokenizer files, and the part of config.json that transformers chooses a class by."""
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps(names | settings))
    architectures = [f"{model_type.capitalize()}ForCausalLM"]
    (path / "config.json").write_text(json.dumps({"model_type": model_type, "architectures": architectures}))
    return path


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """The tokenizer of a make, loaded from its files once."""
    return cache(lambda make: load_tokenizer(save(make(), tmp_path_factory.mktemp(make.__name__))))


def random_strings(seed, count):
    """Short strings of letters, spaces, several scripts, emoji, and tokens' own spelling of spaces and bytes."""
    draw = random.Random(seed)
    parts = [
        *WORDS,
        " ",
        "  ",
        "the",
        " the",
        "cat",
        "é",
        "e\u0301",
        "👩‍👩‍👧",
        MARK,
        "<0x41>",
        "##",
        "\ufffd",
        "\x00",
        "Ġ",
    ]
    return ["".join(draw.choices(parts, k=draw.randint(1, 6))) for _ in range(count)]


def _whole_characters(original, ids, text):
    """The characters of a text that are whole in its first tokens. The last tokens may be bytes of another one."""
    starts = [original.decode(ids[: max(0, len(ids) - i)]) for i in range(4)]
    return next(text[:n] for n in range(len(text), -1, -1) if any(start.startswith(text[:n]) for start in starts))


@pytest.mark.parametrize("make", MAKES, ids=lambda make: make.__name__)
def test_random_strings_stream_as_they_decode_at_once(make, loaded):
    """Token by token and whole, after prompts of no tokens and of some."""
    tokenizer, original = loaded(make), make()
    draw = random.Random(1)
    for text in random_strings(make.__name__, -(-NUM_STRINGS // len(MAKES))):
        ids = tokenizer.encode(text)
        assert ids == original.encode(text).ids
        expected = original.decode(ids)
        start = draw.choice([0, draw.randint(0, len(ids))])
        prompt = _whole_characters(original, ids[:start], expected)
        if "\ufffd" in expected[max(0, len(prompt) - 1) : len(prompt) + 1]:
            continue  # the prompt may end inside a replacement character, which is the text of its bytes too
        one_by_one, by_bursts = Detokenizer(tokenizer, ids[:start]), Detokenizer(tokenizer, ids[:start])
        decided = [""]
        for token_id in ids[start:]:
            one_by_one.append(token_id)
            decided.append(one_by_one.text[: one_by_one.num_decided(is_last=False)])
        while start < len(ids):
            end = start + draw.randint(1, 16)
            by_bursts.extend(ids[start:end])
            start = end
        one_by_one.finish()
        by_bursts.finish()
        assert one_by_one.text == by_bursts.text == expected[len(prompt) :], (text, ids, prompt)
        assert all(after.startswith(before) for before, after in pairwise([*decided, one_by_one.text]))


def _text_after(prompt, bursts):
    """The text that a byte-fallback tokenizer streams after a prompt, and what is decided after each burst of bytes."""
    tokenizer = byte_fallback()
    first = tokenizer.token_to_id("<0x00>")
    detokenizer, texts = Detokenizer(tokenizer, [first + byte for byte in prompt.encode()]), []
    for burst in bursts:
        detokenizer.extend([first + byte for byte in burst])
        texts.append(detokenizer.text)
    detokenizer.finish()
    return [*texts, detokenizer.text]


def test_a_prompt_that_ends_in_a_row_of_bytes_leaves_the_output_whole():
    assert _text_after("🙂é🙂", ["🙂".encode()]) == ["🙂", "🙂"]
    assert _text_after("é<0x41", [b">", "🙂".encode()]) == [">", ">🙂", ">🙂"]


@pytest.mark.parametrize(
    ("prompt", "output", "text"),
    [
        ("日".encode(), b"\xff\xfe", "\ufffd\ufffd"),
        ("é".encode(), b"\xe9", "\ufffd"),
        ("a日本".encode(), "語".encode() + b"\xff", "語\ufffd"),
        ("é日".encode()[:4], "日".encode()[2:] + b"\xff", "日\ufffd"),
        ("é日".encode()[:4], "日本".encode()[2:], "日本"),
        ("日".encode()[:2], b"\xff", "\ufffd"),
    ],
)
def test_bytes_that_are_no_character_leave_the_characters_before_them_whole(prompt, output, text):
    tokenizer = byte_fallback()
    ids = [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in prompt + output]
    prompt, output = ids[: len(prompt)], ids[len(prompt) :]
    for bursts in ([[token_id] for token_id in output], [output]):
        detokenizer = Detokenizer(tokenizer, prompt)
        for burst in bursts:
            detokenizer.extend(burst)
        detokenizer.finish()
        assert detokenizer.text == text


def test_a_burst_that_ends_inside_a_character_leaves_the_characters_before_it_whole():
    row = "日本語🙂".encode()
    assert _text_after("", [row[:8], row[8:11], row[11:]]) == ["日本", "日本語", "日本語🙂", "日本語🙂"]


def test_a_genuine_replacement_character_spelled_as_bytes_is_one_character():
    row = "\ufffd\ufffd是".encode()
    texts = _text_after("a", [row[i : i + 1] for i in range(len(row))])
    assert texts == [
        "",
        "",
        "\ufffd",
        "\ufffd",
        "\ufffd",
        "\ufffd\ufffd",
        *["\ufffd\ufffd"] * 2,
        *["\ufffd\ufffd是"] * 2,
    ]


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gpt2", "gemma", "mistral", "opt"])
@pytest.mark.parametrize("make", MAKES, ids=lambda make: make.__name__)
def test_tokenizer_json_counts_whatever_the_model_type(make, model_type, tmp_path, caplog):
    original = make()
    classes = {"tokenizer_class": draw} if (draw := random.Random(model_type).choice(["LlamaTokenizer", None])) else {}
    tokenizer = load_tokenizer(save(original, tmp_path, model_type, **classes))
    for text in random_strings(model_type, 20):
        ids = original.encode(text).ids
        assert (tokenizer.encode(text), tokenizer.decode(ids)) == (ids, original.decode(ids, skip_special_tokens=False))
    assert not caplog.records


@pytest.mark.parametrize(
    ("post_processor", "settings", "warning"),
    [
        (False, {"add_bos_token": True}, "add_bos_token=true, but {} makes a tokenizer that does not add <s>: the lat"),
        (False, {"add_eos_token": True}, "add_eos_token=true, but {} makes a tokenizer that does not add </s>"),
        (True, {"add_bos_token": False}, "add_bos_token=false, but {} makes a tokenizer that adds <s>"),
        (True, {"add_bos_token": True, "add_eos_token": False}, None),
        (False, {"add_bos_token": False}, None),
        (True, {"add_bos_token": None, "add_eos_token": "no"}, None),
    ],
)
def test_files_that_contradict_each_other_about_special_tokens_are_named(
    post_processor, settings, warning, tmp_path, caplog
):
    original = byte_level()
    if post_processor:
        original.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = load_tokenizer(save(original, tmp_path, **settings))
    assert (tokenizer.encode("the")[0] == 1) == post_processor
    messages = [record.getMessage() for record in caplog.records]
    if warning is None:
        assert not messages
    else:
        [message] = messages
        assert f"{tmp_path / 'tokenizer_config.json'} has {warning.format(tmp_path / 'tokenizer.json')}" in message


@pytest.mark.parametrize("make", MAKES, ids=lambda make: make.__name__)
def test_a_vocabulary_that_transformers_leaves_as_it_is_is_read_once(make, tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "_read_original", lambda file: pytest.fail("the file is read again"))
    assert load_tokenizer(save(make(), tmp_path)).encode("the") == make().encode("the").ids


@pytest.mark.parametrize("part", ["normalizer", "pre_tokenizer", "decoder", "post_processor"])
def test_a_part_that_transformers_changes_is_found(part, tmp_path, monkeypatch, caplog):
    path = save(byte_level(), tmp_path)
    tokenizer = load_tokenizer(path)
    others = {
        "normalizer": normalizers.Lowercase(),
        "pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=True),
        "decoder": decoders.WordPiece(),
        "post_processor": processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)]),
    }
    setattr(tokenizer.backend_tokenizer, part, others[part])
    monkeypatch.setattr(loading, "_candidates", lambda path, file: iter([tokenizer]))
    load_tokenizer(path)
    assert "changes the tokenizer of" in caplog.text


def test_special_tokens_around_a_text_are_those_of_tokenizer_json(tmp_path):
    original = byte_level()
    original.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = load_tokenizer(save(original, tmp_path, add_bos_token=False))
    assert tokenizer.encode("the")[0] == 1
    assert 1 not in tokenizer.encode("the", add_special_tokens=False)
    assert tokenizer.decode(tokenizer.encode("the"), skip_special_tokens=True) == "the"


def test_truncation_and_padding_left_by_training_are_not_applied(tmp_path, caplog):
    original = byte_level()
    original.enable_truncation(4)
    original.enable_padding(length=64)
    tokenizer = load_tokenizer(save(original, tmp_path))
    assert tokenizer.decode(tokenizer.encode(WORDS)) == WORDS
    assert not caplog.records


def test_a_tokenizer_that_transformers_changes_is_named_with_the_difference(tmp_path, caplog):
    extra = {"content": "world", "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    tokenizer = load_tokenizer(save(byte_level(), tmp_path, added_tokens_decoder={"400": extra}))
    assert tokenizer.decode(tokenizer.encode("world")) == "world"
    [record] = caplog.records
    assert "changes the tokenizer of" in record.getMessage()
    assert f"{loading._SAMPLES[0]!r} is encoded as [" in record.getMessage()
    assert ", by the file as [" in record.getMessage()


def test_a_vocabulary_without_a_token_for_unknown_words_is_loaded(tmp_path, caplog):
    tokenizer = Tokenizer(models.WordPiece({"a": 0, "##b": 1}, unk_token="[UNK]"))
    tokenizer.add_tokens([AddedToken("c")])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).encode("ab") == [0, 1]
    assert not caplog.records


def test_a_directory_without_a_vocabulary_has_no_tokenizer(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert load_tokenizer(tmp_path) is None


# Other files ----------------------------------------------------------------------------------------------------------


def _model_proto(pieces):
    """The least of a sentencepiece model: (piece, type) each; 2 is unknown, 3 control, 1 normal."""
    data = b""
    for piece, kind in pieces:
        entry = b"\x0a" + bytes([len(piece)]) + piece.encode() + b"\x15\0\0\0\0\x18" + bytes([kind])
        data += b"\x0a" + bytes([len(entry)]) + entry
    return data


def _hide(monkeypatch, *modules):
    found = loading.find_spec
    monkeypatch.setattr(loading, "find_spec", lambda name: None if name in modules else found(name))


def test_sentencepiece_model_says_what_to_install(tmp_path, monkeypatch):
    _hide(monkeypatch, "sentencepiece", "google.protobuf")
    (tmp_path / "tokenizer.model").write_bytes(_model_proto([("<unk>", 2), ("<s>", 3), ("</s>", 3), ("a", 1)]))
    message = (
        r"tokenizer\.model is a sentencepiece model, which takes sentencepiece and protobuf to convert: "
        r"pip install 'jpaged\[convert\]', or put the tokenizer\.j"
    )
    with pytest.raises(ValueError, match=message):
        load_tokenizer(tmp_path)


def test_tiktoken_vocabulary_says_what_to_install(tmp_path, monkeypatch):
    _hide(monkeypatch, "tiktoken")
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")
    with pytest.raises(ValueError, match=r"is a tiktoken vocabulary, which takes tiktoken to .*\[convert\]', or put"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_model_is_converted_as_its_own_library_reads_it(kind, prefix, tmp_path, caplog):
    library = pytest.importorskip("sentencepiece")
    (tmp_path / "text").write_text("\n".join([WORDS] * 40))
    (tmp_path / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer", "add_bos_token": true}')
    library.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(tmp_path / "tokenizer"), model_type=kind, vocab_size=330,
        byte_fallback=True, add_dummy_prefix=prefix, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    original, tokenizer = library.SentencePieceProcessor(str(tmp_path / "tokenizer.model")), load_tokenizer(tmp_path)
    assert not caplog.records
    for text in random_strings(kind, 200):
        text = text.replace("\x00", "").replace("<0x41>", "")  # ends a text there; a byte's name is no byte there
        ids = original.encode(text)
        assert tokenizer.encode(text) == [original.bos_id(), *ids]
        assert tokenizer.decode(ids) == original.decode(ids)
