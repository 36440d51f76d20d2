"""The sum of two arrays and its norm on Hopper GPUs, as a Pallas Mosaic GPU kernel.

XLA takes two kernels for this, of which the second reads the sum that the first has written. Here one warpgroup takes a
row, and keeps the sum in registers.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Float

from pallas_kernels import dispatch
from pallas_kernels.chips import here
from pallas_kernels.chips.hopper import WARPGROUP
from pallas_kernels.chips.memory import Ref

DTYPES = (jnp.bfloat16, jnp.float16)

VECTOR = 8
"""Elements that a thread loads at once: 16 bytes."""

MOST_FEATURES = 64 * WARPGROUP
"""Features of a row: more would not stay in the registers of a warpgroup."""


def why_not_add_norm(num_features: int, dtype: jnp.dtype) -> str | None:
    """The reason why the kernel cannot take rows, whatever the device; None if it can."""
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
    """The sum of two arrays and its norm; arguments and result as for ``add_rms_norm``, which checks shapes.

    Args:
        interpret: settings of Pallas's interpreter for Mosaic GPU; None runs on a GPU.

    Raises:
        NotImplementedError: rows, or a device, that the kernel does not take.
    """
    reason = why_not_add_norm(x.shape[1], x.dtype) or (None if interpret else here.why_no_hopper())
    dispatch.refuse(reason, "add and norm in plain JAX instead")
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

        # All loads come before any arithmetic: a warpgroup has no other work while loads are in flight.
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
