"""The norm of a residual stream with a branch added, in one kernel."""

from jax import Array
from jaxtyping import Float

from pallas_kernels import dispatch
from pallas_kernels.dispatch import Kernel
from pallas_kernels.norm.hopper import add_rms_norm_hopper, why_not_add_norm

__all__ = ["add_rms_norm", "why_not_add_norm"]

KERNEL = Kernel("hopper", add_rms_norm_hopper, why_not_add_norm)


def add_rms_norm(
    x: Float[Array, "tokens features"],
    branch: Float[Array, "tokens features"],
    scale: Float[Array, " features"],
    epsilon: float,
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "tokens features"], Float[Array, "tokens features"]]:
    """The sum of two arrays and its root-mean-square norm, by the kernel for Hopper GPUs.

    Args:
        x, branch: arrays of one type, to which the sum is rounded before the norm.
        scale: factor of each feature, applied after the norm is rounded, as Hugging Face does.
        epsilon: added to the mean square.
        interpret: run the kernel in Pallas's interpreter, on any device.

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
    return dispatch.run(KERNEL, x, branch, scale, epsilon, interpret=interpret)
