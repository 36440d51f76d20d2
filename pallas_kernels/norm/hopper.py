"""The sum of two arrays and its norm on Hopper GPUs, as a Pallas Mosaic GPU kernel.

XLA takes two kernels for this, of which the second reads the sum that the first has written. It takes three for two
branches that are normed before the sum. Here one warpgroup takes a row, and keeps the sum in registers.
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
from pallas_kernels.norm.spec import NormSpec

DTYPES = (jnp.bfloat16, jnp.float16)

VECTORS = (8, 4, 2)
"""Elements that a thread may load at once: 16, 8 or 4 bytes. A warp's loads are neighbours, whatever the number."""

MOST_FEATURES = 64 * WARPGROUP
"""Features of a row: more would not stay in the registers of a warpgroup."""


def why_not_add_norm(num_features: int, dtype: jnp.dtype) -> str | None:
    """The reason why the kernel cannot take rows, whatever the device; None if it can."""
    if dtype not in DTYPES:
        return f"{jnp.dtype(dtype).name}: the kernel takes bfloat16 and float16"
    multiple = min(VECTORS) * WARPGROUP
    if num_features % multiple or num_features > MOST_FEATURES:
        return f"rows of {num_features}: expected a multiple of {multiple}, and at most {MOST_FEATURES}"
    return None


def add_rms_norm_hopper(
    x: Float[Array, "tokens features"],
    branch: Float[Array, "tokens features"],
    scale: Float[Array, " features"],
    spec: NormSpec,
    *,
    branch_scale: Float[Array, " features"] | None = None,
    multiplier: float = 1.0,
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
    scales = (scale,) if branch_scale is None else (scale, branch_scale)
    return _add_rms_norm(x, branch, scales, spec=spec, multiplier=multiplier, interpret=interpret)


@partial(jax.jit, static_argnames=("spec", "multiplier", "interpret"))
def _add_rms_norm(
    x: Float[Array, "tokens features"],
    branch: Float[Array, "tokens features"],
    scales: tuple[Float[Array, " features"], ...],
    *,
    spec: NormSpec,
    multiplier: float,
    interpret: plgpu.InterpretGPUParams | None,
) -> tuple[Float[Array, "tokens features"], Float[Array, "tokens features"]]:
    num_tokens, num_features = x.shape
    vector = next(size for size in VECTORS if num_features % (size * WARPGROUP) == 0)
    layout = plgpu.Layout.WG_STRIDED((num_features,), vec_size=vector)

    def body(x: Ref, branch: Ref, *refs: Ref) -> None:
        scales, (total, normed) = refs[:-2], refs[-2:]
        row = lax.axis_index("row")

        # All loads come before any arithmetic: a warpgroup has no other work while loads are in flight.
        own, addend = (plgpu.load(ref.at[row], layout=layout) for ref in (x, branch))
        factor, *branch_factor = (plgpu.load(ref, layout=layout) for ref in scales)
        if multiplier != 1:
            addend = (addend.astype(jnp.float32) * multiplier).astype(x.dtype)
        for each in branch_factor:
            addend = _normed(addend, each, spec)
        rounded = own + addend
        total[row] = rounded
        normed[row] = _normed(rounded, factor, spec)

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
    )(x, branch, *scales)


def _normed(row: Array, scale: Array, spec: NormSpec) -> Array:
    wide = row.astype(jnp.float32)
    mean_square = jnp.sum(wide * wide) * (1 / row.size)
    wide = wide * lax.rsqrt(mean_square + spec.epsilon)
    if not spec.is_wide:
        return wide.astype(row.dtype) * scale
    return (wide * (scale.astype(jnp.float32) + spec.offset)).astype(row.dtype)
