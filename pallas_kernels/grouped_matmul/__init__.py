"""Products of groups of rows, each with a matrix of its own: the layers of a mixture of experts."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int32

from pallas_kernels import dispatch
from pallas_kernels.dispatch import Kernel, best_implementation
from pallas_kernels.grouped_matmul.hopper import grouped_matmul_hopper, why_not_grouped

__all__ = ["grouped_matmul", "why_not_grouped"]


def _grouped_matmul_xla(
    x: Float[Array, "rows features"],
    weights: Float[Array, "num_matrices ..."],
    group_sizes: Int32[Array, " num_groups"],
    *,
    matrices: Int32[Array, " num_groups"] | None,
    is_transposed: bool,
) -> Float[Array, "rows out_features"]:
    if matrices is not None:
        weights = weights[matrices]
    contracted = 2 if is_transposed else 1
    numbers = jax.lax.RaggedDotDimensionNumbers((([1], [contracted]), ([], [])), [0], [0])
    return jax.lax.ragged_dot_general(x, weights, group_sizes, numbers)


KERNELS = {
    kernel.name: kernel
    for kernel in (
        Kernel("xla", _grouped_matmul_xla),
        Kernel("hopper", grouped_matmul_hopper, why_not_grouped),
    )
}


def grouped_matmul(
    x: Float[Array, "rows features"],
    weights: Float[Array, "num_matrices ..."],
    group_sizes: Int32[Array, " num_groups"],
    *,
    matrices: Int32[Array, " num_groups"] | None = None,
    is_transposed: bool = False,
    implementation: str | None = None,
    interpret: bool = False,
) -> Float[Array, "rows out_features"]:
    """Multiply each group of rows by the matrix of the group.

    XLA's implementation is one operation on TPUs. For GPUs and CPUs, XLA expands that operation into a product of all
    rows and all matrices.

    Args:
        x: the rows of the first group, those of the second group, and so on.
        weights: the matrices, [num_matrices, features, out_features].
        group_sizes: rows of each group. Rows behind all groups give unspecified results, and may not be finite.
        matrices: the matrix of each group; None if each matrix has a group, in their order.
        is_transposed: whether the matrices are [num_matrices, out_features, features].
        implementation: "xla" or "hopper"; None chooses by device and case.
        interpret: run the kernel in Pallas's interpreter, on any device.

    Returns:
        The products, in the type of ``x``; sums are accumulated in float32.

    Raises:
        ValueError: shapes or types that do not fit together, or an unknown implementation.
        NotImplementedError: the named implementation does not take the case, or the device.
    """
    if weights.ndim != 3 or x.shape[1] != weights.shape[2 if is_transposed else 1] or x.dtype != weights.dtype:
        raise ValueError(
            f"x is {x.dtype}{list(x.shape)} and weights {weights.dtype}{list(weights.shape)} with "
            f"is_transposed={is_transposed}: expected one type, and as many features in both"
        )
    given, expected = group_sizes, weights.shape[:1] if matrices is None else matrices.shape
    if given.shape != expected or given.dtype != jnp.int32 or (matrices is not None and matrices.dtype != jnp.int32):
        raise ValueError(
            f"group_sizes is {given.dtype}{list(given.shape)}: expected int32{list(expected)}, the rows of each of the "
            "groups that weights has, or that matrices names in int32"
        )
    dispatch.check_named(KERNELS, implementation, interpret=interpret)
    if implementation is None:
        case = why_not_grouped(weights.shape[1:], x.dtype)
        implementation = "hopper" if best_implementation(case, num_devices=1).name == "hopper" else "xla"
    run = KERNELS[implementation]
    options = {"matrices": matrices, "is_transposed": is_transposed}
    return dispatch.run(run, x, weights, group_sizes, interpret=interpret, **options)
