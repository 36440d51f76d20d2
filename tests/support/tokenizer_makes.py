"""Small tokenizers of five makes, as Hugging Face's library loads them. All begin a text with ``<s>``."""

from functools import cache
from string import ascii_letters

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

MARK = "\u2581"
SPECIALS = ("<s>", "</s>", "<|im_end|>")
BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
LETTERS = tuple(ascii_letters + ",.!?é日")


def _finish(tokenizer: Tokenizer, **options: str) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens(list(SPECIALS))
    begin = "<s>"
    special = [(begin, tokenizer.token_to_id(begin))]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{begin} $A", special_tokens=special)
    names = {"bos_token": "<s>", "eos_token": "</s>"} | options
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **names)


def _byte_level() -> PreTrainedTokenizerFast:
    """Every byte is a token, as are a few pairs: of letters, and of a space and the first byte of an emoji."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("\u0120", "a"), ("t", "h"), ("th", "e"), ("\u0120", "\u00f0")]
    pieces = [*SPECIALS, *letters, *[a + b for a, b in merges]]
    tokenizer = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _finish(tokenizer)


def _sentencepiece(*, has_prefix: bool) -> PreTrainedTokenizerFast:
    """As Llama 2's: words carry their space, other characters are bytes, and a text may begin with a space."""
    merges = [(MARK, "a"), (MARK, "b"), ("t", "h"), ("th", "e"), (MARK, "the")]
    pieces = ["<unk>", *SPECIALS, *BYTES, MARK, *LETTERS, *[a + b for a, b in merges]]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True))
    prefix = [normalizers.Prepend(MARK)] if has_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", MARK)])
    strip = [decoders.Strip(" ", 1, 0)] if has_prefix else []
    steps = [decoders.Replace(MARK, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    tokenizer.decoder = decoders.Sequence(steps)
    return _finish(tokenizer, unk_token="<unk>")


def _word_piece() -> PreTrainedTokenizerFast:
    """As BERT's: a token begins a word, or goes on with one."""
    pieces = ["[UNK]", *SPECIALS, *LETTERS, *[f"##{letter}" for letter in LETTERS], "the", "##ing"]
    tokenizer = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    return _finish(tokenizer, unk_token="[UNK]")


def _unigram() -> PreTrainedTokenizerFast:
    """As T5's, with bytes: the pieces of greatest probability."""
    pieces = ["<unk>", *SPECIALS, *BYTES, MARK, *LETTERS, MARK + "a", MARK + "the", "ing"]
    scores = [(piece, -1.0 - len(piece) % 3) for piece in pieces]
    tokenizer = Tokenizer(models.Unigram(scores, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    # The metaspace drops the space of a text's first token; it comes last, behind the bytes.
    steps = [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")]
    tokenizer.decoder = decoders.Sequence(steps)
    return _finish(tokenizer, unk_token="<unk>")


MAKES = {
    "byte level": _byte_level,
    "sentencepiece": lambda: _sentencepiece(has_prefix=True),
    "sentencepiece without prefix": lambda: _sentencepiece(has_prefix=False),
    "WordPiece": _word_piece,
    "Unigram": _unigram,
}


@cache
def tokenizer_of(make: str) -> PreTrainedTokenizerFast:
    """The tokenizer of one of ``MAKES``, made once a process."""
    return MAKES[make]()
