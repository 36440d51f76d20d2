"""The kernel that adds a branch to the residual stream and norms the sum, against XLA's operations."""

from collections.abc import Callable, Collection
from functools import partial
from typing import NamedTuple

import jax
from jax import Array

from bench.kernels.case import Case
from bench.kernels.compare import NORMED, Results, compared_case
from jpaged.models.layers.common import rms_norm, scaled
from pallas_kernels.norm import NormSpec, add_rms_norm

NUM_ROWS = (1, 37, 2048)
WIDTHS = (768, 1536, 2304, 2880, 3584, 4096, 5376, 8192)
"""Hidden sizes of models, in each of the kernel's vector lengths. It does not take 2880, which gpt-oss has."""

ROWS_OF_WIDTHS, WIDTH_OF_ROWS = 37, 4096
"""The rows beside each width, and the width beside each number of rows: a kernel is made for a width and a form."""


class Form(NamedTuple):
    """The way in which a family of models uses the kernel."""

    spec: NormSpec
    norms_branch: bool = False
    multiplier: float = 1.0


FORMS = {
    "plain": Form(NormSpec(1e-5)),
    "gemma": Form(NormSpec(1e-6, is_wide=True, offset=1), norms_branch=True),
    "granite": Form(NormSpec(1e-5), multiplier=0.22),
}


def cases() -> dict[str, Callable[[Collection[str]], Case]]:
    """Functions from implementations to a case, by its name. One type that the kernel refuses is among them."""
    sizes = dict.fromkeys([*((ROWS_OF_WIDTHS, width) for width in WIDTHS), *((n, WIDTH_OF_ROWS) for n in NUM_ROWS)])
    wanted = [(form, *size, "bfloat16") for form in FORMS for size in sizes]
    wanted += [("plain", ROWS_OF_WIDTHS, WIDTH_OF_ROWS, dtype) for dtype in ("float16", "float32")]
    return {f"add_rms_norm_{form}_{num_rows}x{width}_{dtype}": _case(form, num_rows, width, dtype) for
            form, num_rows, width, dtype in wanted}  # fmt: skip


def _case(form: str, num_rows: int, width: int, dtype: str) -> Callable[[Collection[str]], Case]:
    run, right = (partial(each, FORMS[form]) for each in (_add_norm, _add_norm_plainly))
    return partial(compared_case, partial(_make, num_rows, width, dtype), run, right, error=NORMED)


def _make(num_rows: int, width: int, dtype: str, seed: Array) -> tuple[Array, ...]:
    """The residual stream, the branch, and the parameters of two norms, which are near 0 or 1 in models."""
    *of_rows, of_scale, of_branch_scale = jax.random.split(jax.random.key(seed, impl="rbg"), 4)
    rows = [jax.random.normal(key, (num_rows, width)).astype(dtype) for key in of_rows]
    scales = [
        jax.random.uniform(key, (width,), minval=-0.5, maxval=1.5).astype(dtype) for key in (of_scale, of_branch_scale)
    ]
    return *rows, *scales


def _add_norm(form: Form, x: Array, branch: Array, scale: Array, branch_scale: Array) -> Results:
    options = {"branch_scale": branch_scale if form.norms_branch else None, "multiplier": form.multiplier}
    return dict(zip(("sum", "norm"), add_rms_norm(x, branch, scale, form.spec, **options), strict=True))


def _add_norm_plainly(form: Form, x: Array, branch: Array, scale: Array, branch_scale: Array) -> Results:
    """The operations of models on other backends."""
    branch = scaled(branch, form.multiplier)
    total = x + (rms_norm(branch, branch_scale, form.spec) if form.norms_branch else branch)
    return {"sum": total, "norm": rms_norm(total, scale, form.spec)}
