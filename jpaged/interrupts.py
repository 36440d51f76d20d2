"""Ctrl-C deferred until the end of a block that must not be left half done."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class InterruptsWait:
    """Defers Ctrl-C to the end of the block; a block inside another one joins it.

    Bookkeeping that is half done cannot be told from bookkeeping that is done. Besides, Python drops an exception that
    is raised inside a callback or a finalizer. JAX runs many of both while it traces and compiles. Only the main thread
    is ever interrupted: in other threads the block has no effect.

    Attributes:
        num_pending: interrupts that wait.
    """

    num_pending = 0

    def __enter__(self) -> "InterruptsWait":
        is_main = threading.current_thread() is threading.main_thread()
        self._before = signal.getsignal(signal.SIGINT) if is_main else None
        outer = getattr(self._before, "__self__", None)
        self._outer = outer if isinstance(outer, InterruptsWait) else None
        self._is_needed = self._before is not None and self._outer is None
        if self._outer is not None:
            return self._outer
        if self._is_needed:
            signal.signal(signal.SIGINT, self._remember)
        return self

    def __exit__(self, *error: object) -> None:
        if self._is_needed:
            signal.signal(signal.SIGINT, self._before)
            if self.num_pending:
                self._raise()

    @contextmanager
    def let_through(self) -> Iterator[None]:
        """Let Ctrl-C take effect at once in a block whose outcome nothing depends on."""
        if not self._is_needed:
            yield
            return
        try:
            signal.signal(signal.SIGINT, self._before)
            if self.num_pending:
                self._raise()
            yield
        finally:
            signal.signal(signal.SIGINT, self._remember)

    def check(self) -> None:
        """Let a Ctrl-C that waits take effect now."""
        if self.num_pending:
            with self.let_through():
                pass

    def _remember(self, number: int, frame: object) -> None:
        self.num_pending += 1

    def _raise(self) -> None:
        self.num_pending = 0
        signal.raise_signal(signal.SIGINT)


@contextmanager
def interruptible() -> Iterator[None]:
    """Let Ctrl-C take effect at once in a block that waits for another process, even inside ``InterruptsWait``."""
    with InterruptsWait() as interrupts, interrupts.let_through():
        yield
