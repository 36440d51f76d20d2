"""A case of the check of kernels: programs of its implementations, and what their results have to be."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from bench.kernels.compiling import Source

type Programs = dict[str, Callable[..., Any]]


@dataclass(frozen=True, slots=True)
class Verdict:
    """Result of one implementation in one case.

    Args:
        error: the worst relative error sampled; None where results are compared element by element.
        problem: the problem found, if any.
    """

    error: float | None
    problem: str | None


class Case(NamedTuple):
    """One case, of which nothing is on the device yet.

    Args:
        implementations: the program to check, by the name of its implementation.
        tools: programs by name that make its arguments and compare its results.
        examine: checks a compiled program with the compiled tools.
    """

    implementations: dict[str, Source]
    tools: dict[str, Source]
    examine: Callable[[Callable[..., Any], Programs], Verdict]
