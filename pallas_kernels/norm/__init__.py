"""The norm of a residual stream with a branch added, in one kernel."""

from jax import Array
from jaxtyping import Float

from pallas_kernels import dispatch
from pallas_kernels.dispatch import Kernel
from pallas_kernels.norm.hopper import add_rms_norm_hopper, why_not_add_norm
from pallas_kernels.norm.spec import NormSpec

__all__ = ["NormSpec", "add_rms_norm", "why_not_add_norm"]

KERNEL = Kernel("hopper", add_rms_norm_hopper, why_not_add_norm)


def add_rms_norm(
    x: Float[Array, "tokens features"],
    branch: Float[Array, "tokens features"],
    scale: Float[Array, " features"],
    spec: NormSpec,
    *,
    branch_scale: Float[Array, " features"] | None = None,
    multiplier: float = 1.0,
    interpret: bool = False,
) -> tuple[Float[Array, "tokens features"], Float[Array, "tokens features"]]:
    """The sum of two arrays and its root-mean-square norm, by the kernel for Hopper GPUs.

    Args:
        x, branch: arrays of one type, to which the sum is rounded before the norm.
        scale: parameter of each feature; see ``spec``.
        spec: how the norm is computed.
        branch_scale: parameters of a norm of the branch, computed in the same way before the sum; None for no norm.
        multiplier: factor on the branch, in float32. The product is rounded.
        interpret: run the kernel in Pallas's interpreter, on any device.

    Returns:
        The sum and its norm, both in the type of ``x``.

    Raises:
        ValueError: shapes or types that do not fit together.
        NotImplementedError: rows, or a device, that the kernel does not take.
    """
    scales = [scale] if branch_scale is None else [scale, branch_scale]
    dtypes = {array.dtype for array in (branch, *scales)}
    if branch.shape != x.shape or {each.shape for each in scales} != {x.shape[1:]} or dtypes != {x.dtype}:
        given = ", ".join(f"{each.dtype}{list(each.shape)}" for each in scales)
        raise ValueError(
            f"x is {x.dtype}{list(x.shape)}, branch {branch.dtype}{list(branch.shape)} and the scales {given}: "
            "expected one shape and type, and scales for each of the last axis"
        )
    options = {"branch_scale": branch_scale, "multiplier": multiplier}
    return dispatch.run(KERNEL, x, branch, scale, spec, **options, interpret=interpret)
