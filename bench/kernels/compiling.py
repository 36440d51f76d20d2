"""Many programs compiled side by side, before anything is timed."""

from collections.abc import Hashable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from tqdm import tqdm

NUM_THREADS = 8


class Source(NamedTuple):
    """A jitted function, and the shapes of its arguments."""

    function: Any
    arguments: tuple[Any, ...]


def compile_all[Key: Hashable](sources: Mapping[Key, Source]) -> dict[Key, Any]:
    """Compile programs in threads, after tracing them one by one. A failed program's value is its exception."""
    lowered: dict[Key, Any] = {}
    for key, (function, arguments) in tqdm(sources.items(), desc="Tracing"):
        try:
            lowered[key] = function.lower(*arguments)
        except Exception as error:
            lowered[key] = error
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        built = tqdm(pool.map(_compile, lowered.values()), desc="Compiling", total=len(lowered))
        return dict(zip(lowered, built, strict=True))


def _compile(lowered: Any) -> Any:
    if isinstance(lowered, Exception):
        return lowered
    try:
        return lowered.compile()
    except Exception as error:
        return error


def one_line(error: BaseException) -> str:
    """An exception's type and the beginning of its message."""
    first = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first}"[:300]
