"""Settings of Python's interpreter that all engines of a process share: the switch interval and frozen objects."""

import gc
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

SWITCH_INTERVAL_S = 0.0005
"""Switch interval while threads share the interpreter with steps.

The engine's thread gives the interpreter up in each of its calls of JAX, a few dozen in a step. With Python's own 5 ms,
each call would wait so long for a thread that encodes tokens or lowers programs.
"""


class ShortSwitches:
    """Shortens the switch interval while any part of the process asks for it. The last one restores the interval."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_inside = 0
        self._usual = 0.0

    def enter(self) -> None:
        """Ask for the short interval."""
        with self._lock:
            if self._num_inside == 0:
                self._usual = sys.getswitchinterval()
                sys.setswitchinterval(min(SWITCH_INTERVAL_S, self._usual))
            self._num_inside += 1

    def leave(self) -> None:
        """Take back one call of ``enter``."""
        with self._lock:
            self._num_inside -= 1
            assert self._num_inside >= 0
            if self._num_inside == 0:
                sys.setswitchinterval(self._usual)


class FrozenObjects:
    """Objects that the garbage collector does not visit: tracing leaves a million that stay.

    The collector would visit them between two steps. It frees no cycle of frozen objects, so that an engine must
    ``thaw`` them before its own cycles can go.
    """

    def __init__(self) -> None:
        self._are_there = False

    def freeze(self) -> None:
        """Freeze all objects there are, garbage included."""
        self._are_there = True
        gc.freeze()

    def collect_and_freeze(self) -> None:
        """Free all garbage, also what was frozen before, and freeze the other objects."""
        self.thaw()
        gc.collect()
        self.freeze()

    def thaw(self) -> None:
        """Let the collector visit all objects again, if this process froze any."""
        if self._are_there:
            self._are_there = False
            gc.unfreeze()


SHORT_SWITCHES = ShortSwitches()
FROZEN_OBJECTS = FrozenObjects()


@contextmanager
def short_switches() -> Iterator[None]:
    """Shorten the switch interval for a block."""
    SHORT_SWITCHES.enter()
    try:
        yield
    finally:
        SHORT_SWITCHES.leave()
