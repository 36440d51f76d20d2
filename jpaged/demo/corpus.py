"""The demo model's corpus: its source files, the held-out part, and the tokenizer learnt from the training part."""

import ast
import hashlib
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from jaxtyping import UInt16
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_ID = 0
HELD_OUT_PERCENT = 5

# Text that no programmer wrote: conversion tables, generated documentation, build artefacts.
_SKIPPED_DIRECTORIES = frozenset({"__pycache__", "encodings", "pydoc_data", "site-packages"})
_SKIPPED_PREFIXES = ("_sysconfigdata", "config-")
_TEST_DIRECTORIES = frozenset({"idle_test", "test", "tests"})

# A line break, an indentation and a word are separate pieces. So a prompt that ends after any of them is cut like the
# training text. A single space belongs to the word after it; each digit is a piece.
_PIECES = Regex(r" ?[\p{L}_]+| ?\p{N}| ?[^\s\p{L}\p{N}_]+|\n+| {2,}|\s")


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One Python file: its path relative to the library's root, in POSIX form, and its text."""

    path: str
    text: str

    @property
    def is_test(self) -> bool:
        """Whether the file is part of a test suite rather than of the library."""
        return not _TEST_DIRECTORIES.isdisjoint(PurePosixPath(self.path).parts[:-1])

    @property
    def is_held_out(self) -> bool:
        """Whether the file is for evaluation only, which depends on its path alone."""
        return int.from_bytes(hashlib.sha256(self.path.encode()).digest()[:8]) % 100 < HELD_OUT_PERCENT

    @property
    def num_bytes(self) -> int:
        return len(self.text.encode())


def _is_python(text: str) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes and the like: old code is still code
        try:
            ast.parse(text)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return False
    return True


def _is_skipped(path: PurePosixPath) -> bool:
    return not _SKIPPED_DIRECTORIES.isdisjoint(path.parts) or any(p.startswith(_SKIPPED_PREFIXES) for p in path.parts)


def read_source_files(root: Path) -> list[SourceFile]:
    """Read a library's Python files: UTF-8, parseable, each text once, in the order of their paths.

    Args:
        root: directory of the library, such as ``sysconfig.get_path("stdlib")``.

    Raises:
        ValueError: ``root`` holds no such file.
    """
    files: dict[str, SourceFile] = {}
    for file in sorted(root.rglob("*.py")):
        path = PurePosixPath(file.relative_to(root).as_posix())
        if _is_skipped(path):
            continue
        try:
            text = file.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip() and text not in files and _is_python(text):
            files[text] = SourceFile(str(path), text)
    if not files:
        raise ValueError(f"{root} holds no Python source file: pass --stdlib the directory that holds os.py")
    return sorted(files.values(), key=lambda file: file.path)


def digest(files: Iterable[SourceFile]) -> str:
    """Compute SHA-256 over paths and texts: equal digests mean equal corpora."""
    sha = hashlib.sha256()
    for file in files:
        sha.update(f"{file.path}\0{file.text}\0".encode())
    return sha.hexdigest()


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learn a byte-level BPE whose id 0 is ``<|endoftext|>``; decoding restores any text, spaces included.

    Args:
        texts: texts of the training files.
        vocab_size: number of tokens; the end of text and 256 bytes come first.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [
            pre_tokenizers.Split(_PIECES, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


@dataclass(frozen=True)
class Corpus:
    """A library's files, and the tokenizer learnt from its training files."""

    files: Sequence[SourceFile]
    tokenizer: Tokenizer

    def select(self, *, is_test: bool, is_held_out: bool) -> list[SourceFile]:
        """Return the files of one part, in the order of their paths."""
        return [file for file in self.files if (file.is_test, file.is_held_out) == (is_test, is_held_out)]

    def encode(self, files: Iterable[SourceFile]) -> list[list[int]]:
        """Return the token ids of each file, between two ends of text."""
        encodings = self.tokenizer.encode_batch_fast([file.text for file in files], add_special_tokens=False)
        return [[END_OF_TEXT_ID, *encoding.ids, END_OF_TEXT_ID] for encoding in encodings]

    def training_stream(self) -> tuple[UInt16[np.ndarray, "corpus_len"], int]:
        """Return the training tokens, each file with an end of text, and how many at the start are the library's."""
        parts = [self.encode(self.select(is_test=is_test, is_held_out=False)) for is_test in (False, True)]
        library, tests = (np.asarray([id for ids in part for id in ids[1:]], np.uint16) for part in parts)
        return np.concatenate([library, tests]), len(library)


def read_corpus(root: Path, vocab_size: int) -> Corpus:
    """Read a library (see ``read_source_files``), and learn a tokenizer of ``vocab_size`` from its training files."""
    files = read_source_files(root)
    return Corpus(files, train_tokenizer((file.text for file in files if not file.is_held_out), vocab_size))
