"""Counts the calls that one request makes in jpaged; ``python -m bench calls`` runs it on any checkout.

It imports public names alone, and prints one line of JSON.
"""

import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import median
from types import CodeType, FrameType
from typing import Any

import jpaged

PACKAGES = "jpaged", "pallas_kernels"
ROOT = Path(jpaged.__file__).parents[1]
OWN_FILES = tuple(str(ROOT / package) for package in PACKAGES)
NUM_REPEATS = 5


def count(call: Callable[[], Any], calls: Counter[CodeType] | None = None) -> dict[str, int]:
    """Count the own calls, the distinct functions, the types made and the deepest stack of a call.

    Args:
        call: the call.
        calls: filled with the own calls by function, if given.
    """
    calls = Counter() if calls is None else calls
    types: set[type] = set()
    deepest = 0

    def watch(frame: FrameType, event: str, _: Any) -> None:
        nonlocal deepest
        if event != "call":
            return
        made = _made_type(frame)
        if made is not None and made.__module__.partition(".")[0] in PACKAGES:
            types.add(made)
        if frame.f_code.co_filename.startswith(OWN_FILES):
            calls[frame.f_code] += 1
            deepest = max(deepest, _depth(frame))

    sys.setprofile(watch)
    try:
        call()
    finally:
        sys.setprofile(None)
    return {
        "own_calls": sum(calls.values()),
        "distinct_functions": len(calls),
        "types_made": len(types),
        "deepest_stack": deepest,
    }


def _made_type(frame: FrameType) -> type | None:
    """The type that a constructor makes; a named tuple's takes the type as ``_cls``."""
    code = frame.f_code
    if not code.co_argcount:
        return None
    first = frame.f_locals.get(code.co_varnames[0])
    if code.co_name == "__init__":
        return type(first)
    is_constructor = code.co_name == "__new__" or code.co_varnames[0] == "_cls"
    return first if is_constructor and isinstance(first, type) else None


def _depth(frame: FrameType | None) -> int:
    depth = 0
    while frame is not None:
        depth += frame.f_code.co_filename.startswith(OWN_FILES)
        frame = frame.f_back
    return depth


def main() -> None:
    llm, params = jpaged.LLM(), jpaged.SamplingParams(max_tokens=3)

    def generate() -> None:
        llm.generate("def add(a, b):", params)

    for _ in range(2):  # compiles; then finds the prompt in the prefix cache, as all later runs do
        generate()
    counts = [count(generate) for _ in range(NUM_REPEATS)]
    medians: dict[str, Any] = {name: median(each[name] for each in counts) for name in counts[0]}
    count(generate, calls := Counter())
    by_file: Counter[str] = Counter()
    for code, num_calls in calls.items():
        by_file[str(Path(code.co_filename).relative_to(ROOT))] += num_calls
    print(json.dumps(medians | {"calls_by_file": dict(by_file.most_common())}))


if __name__ == "__main__":
    main()
