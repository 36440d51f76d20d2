"""The compilation that a step waits for, as other threads see it."""

from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic


class Compiling:
    """Whether a step waits for a program, so that a long compilation is not taken for a step that hangs.

    Attributes:
        is_running: whether a program is compiled now.
        ended: end of the last compilation, of ``time.monotonic``; 0 before the first.
    """

    def __init__(self) -> None:
        self.is_running = False
        self.ended = 0.0

    @contextmanager
    def run(self) -> Iterator[None]:
        """Note the compilation that a block does."""
        self.is_running = True
        try:
            yield
        finally:
            self.is_running, self.ended = False, monotonic()
