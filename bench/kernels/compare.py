"""Cases whose results are compared with XLA's element by element: bits, or numbers that are rounded in two ways."""

from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bench.kernels.case import Case, Programs, Verdict
from bench.kernels.compiling import Source

NUM_REPEATS = 3
"""Runs of each kernel, each over other blocks and numbers: a race shows now and then."""

NORMED, ROTATED = 2.0**-6, 2.0**-4
"""Largest error of numbers that are rounded in two ways: two of bfloat16's last places; more where heads are rotated,
since products that nearly cancel leave their roundings."""

BY_BLOCK = ("pool", "scales")
"""Results that have a first block, which kernels need not write."""

type Results = dict[str, Array]


def compared_case(
    make: Callable[[Array], tuple[Any, ...]],
    run: Callable[..., Results],
    right: Callable[..., Results],
    implementations: Collection[str],
    *,
    donated: tuple[int, ...] = (),
    error: float = 0,
) -> Case:
    """A case of the Hopper kernels.

    Args:
        make: makes the arguments from a seed.
        run, right: the kernel and XLA's way, from the arguments to results by name.
        implementations: those asked for, of which there is "hopper" alone.
        donated: arguments that are overwritten.
        error: largest difference, as a share of the right number, or of 1 if it is less; with 0 all bits are equal.
    """
    seed = jax.ShapeDtypeStruct((), jnp.int32)
    arguments = jax.eval_shape(make, seed)
    results = jax.eval_shape(right, *arguments)
    return Case(
        {"hopper": Source(run, arguments, donated)} if "hopper" in implementations else {},
        {
            "make": Source(make, (seed,)),
            "right": Source(right, arguments, donated),
            "compare": Source(partial(_num_wrong, error), (results, results)),
        },
        _examine,
    )


def _examine(program: Callable[..., Results], tools: Programs) -> Verdict:
    for seed in range(NUM_REPEATS):
        got, right = (run(*tools["make"](np.int32(seed))) for run in (program, tools["right"]))
        for name, count in tools["compare"](got, right).items():
            if count:
                return Verdict(None, f"{int(count):,} of {got[name].size:,} elements of the {name} differ from XLA's")
    return Verdict(None, None)


def _num_wrong(error: float, got: Results, right: Results) -> Results:
    is_wrong = partial(_is_far, error) if error else _is_different
    return {
        name: jnp.sum(is_wrong(*(x[1:] if name in BY_BLOCK else x for x in (got[name], right[name])))) for name in right
    }


def _is_far(error: float, got: Array, right: Array) -> Array:
    got, right = got.astype(jnp.float32), right.astype(jnp.float32)
    return ~(jnp.abs(got - right) <= error * jnp.maximum(jnp.abs(right), 1))


def _is_different(got: Array, right: Array) -> Array:
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[got.dtype.itemsize]
    return jnp.not_equal(*(jax.lax.bitcast_convert_type(x, unsigned) for x in (got, right)))
