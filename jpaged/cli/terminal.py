"""Output of the commands: text to stdout as it comes, notes and progress to stderr."""

import json
import math
import sys
import time
from collections.abc import Generator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from jpaged.request import CompletionDelta, FinishReason


def note(text: str) -> None:
    """Write a line to stderr."""
    print(text, file=sys.stderr, flush=True)


def one_line(error: Exception) -> str:
    """The message of an error, without line breaks."""
    return " ".join(str(error).split())


def end_line(text: str) -> None:
    """End the line of ``text``, unless ``text`` ended it."""
    if not text.endswith("\n"):
        sys.stdout.write("\n")
    sys.stdout.flush()


@dataclass(slots=True)
class Answer:
    """One streamed completion."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    seconds: float = 0.0  # from the first token to the last
    finish_reason: FinishReason = FinishReason.ABORT
    error: str | None = None

    def __str__(self) -> str:
        rate = f", {(len(self.token_ids) - 1) / self.seconds:.0f} a second" if self.seconds else ""
        return f"{len(self.token_ids)} tokens{rate}; ended by {self.finish_reason}"


def show(head: str, deltas: Generator[CompletionDelta], answer: Answer) -> None:
    """Write ``head`` and a completion to stdout as it comes. ``answer`` keeps it, and is right even after Ctrl-C."""
    with closing(deltas):
        with waiting("computing the prompt and compiling what is new ..."):
            first = next(deltas)
        start = time.monotonic()
        sys.stdout.write(head)
        for delta in chain((first,), deltas):
            sys.stdout.write(delta.text)
            sys.stdout.flush()
            answer.text += delta.text
            answer.token_ids += delta.token_ids
            answer.seconds = time.monotonic() - start
            answer.finish_reason = delta.finish_reason or answer.finish_reason
            answer.error = delta.error


@contextmanager
def waiting(text: str) -> Generator[None]:
    """Show ``text`` on the last line of a terminal during the block."""
    if not sys.stderr.isatty():
        yield
        return
    print(text, end="", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)  # back, and erase to the end of the line


def to_json(value: object) -> str:
    """Write a value as JSON, which has no NaN and no infinity: null stands for these."""
    return json.dumps(_finite(value), ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
