"""The tokenizer of a checkpoint: loaded from its files, and compared with the library that wrote them."""

import json
import logging
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from jpaged.models import import_transformers
from jpaged.models.checkpoint.config import read_json

log = logging.getLogger(__name__)

_FILES = "tokenizer.json", "tokenizer.model", "spiece.model", "tiktoken.model", "vocab.json", "vocab.txt"
"""Files that hold a tokenizer's vocabulary; the first one that is there counts."""

_PARTS = "normalizer", "pre_tokenizer", "post_processor", "decoder"
"""Parts of a tokenizer beside its vocabulary and its added tokens."""

_SAMPLES = (
    "Hello, world! It's 3.14 or 1234567, isn't it?",
    " leading,  doubled\tand trailing spaces \n\n",
    "def add(a, b):\n    return a + b  # sum\n",
    "naïve café: Zürich, Ελλάδα, Москва, 日本語, 한국어, العربية",
    "🙂👩‍👩‍👧 \ufb01ne \uff21\u00bd \u0301",
)
"""Texts in which other normalizers, pre-tokenizers, models or decoders show."""


class _Original(NamedTuple):
    """A tokenizer's file, read by the library that wrote it.

    Args:
        encode: token ids of a text, with special tokens around it or without; None if the file does not tell.
        decode: text of token ids, special tokens left out.
    """

    encode: Callable[[str, bool], list[int] | None]
    decode: Callable[[list[int]], str]


def load_tokenizer(path: Path) -> Any:
    """Load the tokenizer of a checkpoint directory.

    A tokenizer.json or a sentencepiece model is the whole tokenizer. transformers' class for the model type puts parts
    of its own in place of those in the file, so its general class is preferred. A sentencepiece model does not say
    which special tokens surround a text; tokenizer_config.json or the class does.

    Returns:
        A tokenizer of transformers; None if the directory has none.

    Raises:
        ValueError: the files cannot be read, or a library that converts them is missing.
    """
    file = next((path / name for name in _FILES if (path / name).exists()), None)
    if file is None:
        return None
    if file.suffix == ".model":
        _check_converters(file)
    try:
        tokenizer, difference = _choose(_candidates(path, file), file)
    except Exception as error:  # the many libraries behind it raise many kinds
        raise ValueError(
            f"the tokenizer in {path} cannot be loaded ({type(error).__name__}: {error}): download its files again, or "
            "convert it to a tokenizer.json"
        ) from error
    if difference is not None:
        log.warning(
            "transformers %s changes the tokenizer of %s: %s. Tokens may be wrong: install a newer version of "
            "transformers, or compare %s with tokenizer_config.json",
            import_transformers().__version__,
            file,
            difference,
            file.name,
        )
    _warn_of_contradictions(tokenizer, path / "tokenizer_config.json", file)
    return tokenizer


def _warn_of_contradictions(tokenizer: Any, config: Path, file: Path) -> None:
    """Warn if tokenizer_config.json says otherwise than the tokenizer's file which tokens surround a text."""
    settings = read_json(config) if config.is_file() else {}
    for kind, at in (("bos", 0), ("eos", -1)):
        name, token_id = f"add_{kind}_token", getattr(tokenizer, f"{kind}_token_id", None)
        says = settings.get(name)
        if token_id is None or not isinstance(says, bool):
            continue
        does = tokenizer.encode(_SAMPLES[0])[at] == token_id
        if does != says:
            log.warning(
                "%s has %s=%s, but %s makes a tokenizer that %s %s: the latter counts. Correct one of them",
                config,
                name,
                str(says).lower(),
                file,
                "adds" if does else "does not add",
                getattr(tokenizer, f"{kind}_token"),
            )


def _candidates(path: Path, file: Path) -> Iterator[Any]:
    """Load the tokenizer in one way after the other, the likeliest to be right first."""
    transformers = import_transformers()
    options: dict[str, Any] = {
        "local_files_only": True,
        "trust_remote_code": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2**31,  # the engine itself refuses what is too long
    }
    if file.name == "tokenizer.json":
        yield transformers.PreTrainedTokenizerFast.from_pretrained(str(path), **options)
        return
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(path), **options)
    if file.name == "tokenizer.model" and _is_sentencepiece(file):
        options |= {name: getattr(tokenizer, name, False) for name in ("add_bos_token", "add_eos_token")}
        yield transformers.PreTrainedTokenizerFast.from_pretrained(str(path), **options)  # right since 5.24
    yield tokenizer


def _choose(candidates: Iterator[Any], file: Path) -> tuple[Any, str | None]:
    """Choose the first tokenizer that agrees with its file, or else the last one, with its first difference."""
    tokenizer, difference, original = None, None, None
    for tokenizer in candidates:
        if file.name == "tokenizer.json" and _has_parts_of(tokenizer, file):
            return tokenizer, None
        original = original or _read_original(file)
        difference = None if original is None else _find_difference(tokenizer, original)
        if difference is None:
            break
    return tokenizer, difference


def _has_parts_of(tokenizer: Any, file: Path) -> bool:
    """Whether a tokenizer has all parts of a tokenizer.json beside the vocabulary, which transformers never changes.

    The library takes seconds to read a large vocabulary again, so it reads the other parts alone.
    """
    from tokenizers import Tokenizer

    content = read_json(file)
    added = {token.pop("id"): token for token in content.get("added_tokens", [])}
    model = {"type": "WordLevel", "vocab": {}, "unk_token": ""}
    parts = content | {"added_tokens": [], "truncation": None, "padding": None, "model": model}
    own, whole = Tokenizer.from_str(json.dumps(parts)), tokenizer.backend_tokenizer
    changed = [part for part in _PARTS if _written(getattr(own, part)) != _written(getattr(whole, part))]
    if changed == ["post_processor"] and own.post_processor is None:
        changed = ["post_processor"] * whole.num_special_tokens_to_add(False)  # else transformers' own adds nothing
    if changed:
        return False
    others = whole.get_added_tokens_decoder()
    return added.keys() == others.keys() and all(
        getattr(others[token_id], name) == value for token_id, token in added.items() for name, value in token.items()
    )


def _written(part: Any) -> bytes | None:
    """A part of a tokenizer as the library writes it into a file."""
    return None if part is None else part.__getstate__()


def _is_sentencepiece(file: Path) -> bool:
    """Whether a file is a sentencepiece model, which begins with the tag of its first field, not a tiktoken vocabulary.

    That byte is no letter of base64, which a tiktoken vocabulary begins with.
    """
    with file.open("rb") as opened:
        return opened.read(1) == b"\n"


def _check_converters(file: Path) -> None:
    """Check that the libraries are there that convert the file.

    Raises:
        ValueError: one is missing; the message names it.
    """
    kind, needed = "tiktoken vocabulary", {"tiktoken": "tiktoken"}
    if _is_sentencepiece(file):
        kind, needed = "sentencepiece model", {"sentencepiece": "sentencepiece", "google.protobuf": "protobuf"}
    if missing := [package for module, package in needed.items() if not _is_installed(module)]:
        raise ValueError(
            f"{file} is a {kind}, which takes {' and '.join(missing)} to convert: pip install 'jpaged[convert]', or "
            "put the tokenizer.json of the same model beside it"
        )


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # of the package around it
        return False


def _read_original(file: Path) -> _Original | None:
    """Read a file by the library that wrote it; None for a file that several libraries read."""
    if file.name == "tokenizer.json":
        from tokenizers import Tokenizer

        whole = Tokenizer.from_file(str(file))
        whole.no_padding()
        whole.no_truncation()

        def encode(text: str, adds: bool) -> list[int] | None:
            try:
                return whole.encode(text, add_special_tokens=adds).ids
            except Exception:  # of the library: the text has an unknown word, and the vocabulary no token for one
                return None

        return _Original(encode, whole.decode)
    if file.suffix == ".model" and _is_sentencepiece(file):
        pieces = import_module("sentencepiece").SentencePieceProcessor(model_file=str(file))  # no dependency of jpaged
        return _Original(lambda text, adds: None if adds else pieces.encode(text), pieces.decode)
    return None


def _find_difference(tokenizer: Any, original: _Original) -> str | None:
    """Describe the first sample that a tokenizer and its file treat differently; None if there is none."""
    for text in _SAMPLES:
        for adds in (True, False):
            ids = original.encode(text, adds)
            if ids is None:
                continue
            if (others := tokenizer.encode(text, add_special_tokens=adds)) != ids:
                return f"{text!r} is encoded as {others}, by the file as {ids}"
            decoded, expected = tokenizer.decode(ids, skip_special_tokens=True), original.decode(ids)
            if decoded != expected:
                return f"{ids} is decoded as {decoded!r}, by the file as {expected!r}"
    return None
