"""Adds a branch to the residual stream and norms the sum, on Hopper GPUs, as a Pallas Mosaic GPU kernel.

XLA does it in two kernels, of which the second reads what the first has written. A row is one warpgroup's, which keeps
the sum in registers in between.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Float

from pallas_kernels.paged_attention.hopper import why_no_device
from pallas_kernels.paged_attention.hopper.tile import Ref

DTYPES = (jnp.bfloat16, jnp.float16)

VECTOR = 8
"""Elements that a thread loads at once: 16 bytes."""

WARPGROUP = 128
"""Threads."""

MOST_FEATURES = 64 * WARPGROUP
"""Of a row: more would not stay in the registers of a warpgroup."""


def why_not_add_norm(num_features: int, dtype: jnp.dtype) -> str | None:
    """Why the kernel cannot take rows, whatever the device; None if it can."""
    if dtype not in DTYPES:
        return f"{jnp.dtype(dtype).name}: the kernel takes bfloat16 and float16"
    if num_features % (VECTOR * WARPGROUP) or num_features > MOST_FEATURES:
        return f"rows of {num_features}: expected a multiple of {VECTOR * WARPGROUP}, and at most {MOST_FEATURES}"
    return None


def add_rms_norm_hopper(
    x: Float[Array, "tokens features"],
    branch: Float[Array, "tokens features"],
    scale: Float[Array, " features"],
    epsilon: float,
    *,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> tuple[Float[Array, "tokens features"], Float[Array, "tokens features"]]:
    """The sum of two arrays, and its root-mean-square norm.

    Args:
        x, branch: of one type, which the sum is rounded to before the norm.
        scale: of each feature, multiplied after the norm is rounded, as Hugging Face does.
        epsilon: added to the mean square.
        interpret: run in Pallas's interpreter for Mosaic GPU instead of on a GPU.

    Returns:
        ``x + branch`` and its norm, both in the type of ``x``.

    Raises:
        ValueError: shapes or types that do not fit together.
        NotImplementedError: rows, or a device, that the kernel does not take.
    """
    if branch.shape != x.shape or scale.shape != x.shape[1:] or {branch.dtype, scale.dtype} != {x.dtype}:
        raise ValueError(
            f"x is {x.dtype}{list(x.shape)}, branch {branch.dtype}{list(branch.shape)} and scale "
            f"{scale.dtype}{list(scale.shape)}: expected one shape and type, and a scale for each of the last axis"
        )
    reason = why_not_add_norm(x.shape[1], x.dtype) or (None if interpret else why_no_device())
    if reason is not None:
        raise NotImplementedError(f"{reason}; add and norm in plain JAX instead")
    return _add_rms_norm(x, branch, scale, epsilon=epsilon, interpret=interpret)


@partial(jax.jit, static_argnames=("epsilon", "interpret"))
def _add_rms_norm(
    x: Float[Array, "tokens features"],
    branch: Float[Array, "tokens features"],
    scale: Float[Array, " features"],
    *,
    epsilon: float,
    interpret: plgpu.InterpretGPUParams | None,
) -> tuple[Float[Array, "tokens features"], Float[Array, "tokens features"]]:
    num_tokens, num_features = x.shape
    layout = plgpu.Layout.WG_STRIDED((num_features,), vec_size=VECTOR)

    def body(x: Ref, branch: Ref, scale: Ref, total: Ref, normed: Ref) -> None:
        row = lax.axis_index("row")

        # All loads before any arithmetic: a warpgroup has nothing else to do while they are under way.
        addends = [plgpu.load(ref.at[row], layout=layout) for ref in (x, branch)]
        factor = plgpu.load(scale, layout=layout)
        rounded = addends[0] + addends[1]
        total[row] = rounded
        wide = rounded.astype(jnp.float32)
        mean_square = jnp.sum(wide * wide) * (1 / num_features)
        normed[row] = (wide * lax.rsqrt(mean_square + epsilon)).astype(x.dtype) * factor

    like = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return plgpu.kernel(
        body,
        out_type=(like, like),
        grid=(num_tokens,),
        grid_names=("row",),
        num_threads=1,
        thread_name="warpgroup",
        kernel_name="add_rms_norm",
        interpret=interpret,
    )(x, branch, scale)
