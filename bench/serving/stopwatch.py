"""Time spent in methods, taken around each call."""

import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

HOST_PARTS = (
    ("scheduler", "schedule", "schedule"),
    ("scheduler", "schedule_ahead", "schedule"),
    ("runner", "enqueue", "enqueue"),
    ("runner", "fetch", "wait"),
    ("scheduler", "update", "update"),
    ("outputs", "read", "collect"),
)
"""Parts of a step on the host: attribute of the engine, method, name of the part."""


class Stopwatch:
    """Seconds and calls, by the names given to ``watch``."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.calls: Counter[str] = Counter()

    @contextmanager
    def watch(self, owner: Any, method: str, name: str) -> Iterator[None]:
        """Time the calls of a method, of one object or of a class."""
        call = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                self.seconds[name] += time.perf_counter() - start
                self.calls[name] += 1

        with replaced(owner, method, timed):
            yield

    @contextmanager
    def watch_steps(self, engine: Any) -> Iterator[None]:
        """Time the parts of an engine's steps."""
        with ExitStack() as stack:
            for attribute, method, name in HOST_PARTS:
                stack.enter_context(self.watch(getattr(engine, attribute), method, name))
            yield

    @property
    def num_steps(self) -> int:
        """Number of steps enqueued."""
        return self.calls["enqueue"]

    def us_per_step(self, num_steps: float) -> dict[str, float]:
        """Microseconds of each part of a step."""
        names = dict.fromkeys(name for _, _, name in HOST_PARTS)
        return {name: 1e6 * self.seconds[name] / max(num_steps, 1) for name in names}


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Replace an attribute of an object or a class, and restore it."""
    is_own, own = name in vars(owner), vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if is_own:
            setattr(owner, name, own)
        else:
            delattr(owner, name)
