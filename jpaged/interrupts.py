"""Ctrl-C, which waits while something is done that must not be left half done."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self


class InterruptsWait:
    """Lets Ctrl-C take effect after the block: half of a step's bookkeeping could not be told from all of it."""

    def __init__(self) -> None:
        self._before = signal.getsignal(signal.SIGINT)
        # Only the main thread is interrupted, and only it may say how.
        self._is_needed = threading.current_thread() is threading.main_thread() and self._before is not None
        self._num_pending = 0

    def __enter__(self) -> Self:
        if self._is_needed:
            signal.signal(signal.SIGINT, self._remember)
        return self

    def __exit__(self, *error: object) -> None:
        if self._is_needed:
            signal.signal(signal.SIGINT, self._before)
            num_pending, self._num_pending = self._num_pending, 0
            if num_pending:
                signal.raise_signal(signal.SIGINT)

    @contextmanager
    def let_through(self) -> Iterator[None]:
        """Let Ctrl-C take effect at once: of what runs here nothing is relied upon."""
        if not self._is_needed:
            yield
            return
        try:
            self.__exit__()
            yield
        finally:
            self.__enter__()

    def _remember(self, number: int, frame: object) -> None:
        self._num_pending += 1
