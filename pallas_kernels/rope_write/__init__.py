"""The norms and the rotation of projected heads, and the write of K and V into the block pool, in one kernel."""

from jax import Array
from jaxtyping import Float, Int

from pallas_kernels import dispatch
from pallas_kernels.block_pool.layout import BlockPool, check_kv_scales, check_static_layer, shape_of
from pallas_kernels.dispatch import Kernel
from pallas_kernels.rope_write.call import Angles, HeadNorms, num_heads_of
from pallas_kernels.rope_write.hopper import rope_write_hopper, why_not_rope_write

__all__ = ["HeadNorms", "rope_write", "why_not_rope_write"]

KERNEL = Kernel("hopper", rope_write_hopper, why_not_rope_write)


def rope_write(
    pool: BlockPool,
    layer: int,
    projected: Float[Array, "summands tokens features"],
    angles: Angles,
    slots: Int[Array, " tokens"],
    norms: HeadNorms | None = None,
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "tokens num_heads head_dim"], BlockPool]:
    """Norm and rotate queries and keys, and store one layer's K and V, by the kernel for Hopper GPUs.

    Feature i of a head is rotated with feature i + head_dim / 2, in float32. Results are rounded to the pool's type.

    Args:
        pool: the pool; donate it to the enclosing jit. Block 0 stays as it is.
        layer: which layer, a static number.
        projected: all query heads of a token, then its heads of K, then those of V, of head_dim features each. One
            summand in the pool's type, or summands in float32, whose sum is rounded first.
        angles: cosine and sine of each token's angles, float32 [tokens, head_dim / 2].
        slots: as for ``write_kv``.
        norms: norms of queries and keys before the rotation; None for none.
        interpret: run the kernel in Pallas's interpreter, on any device.

    Returns:
        The rotated queries, and the pool with the slots written.

    Raises:
        ValueError: a quantised pool, or a layer that the pool does not have; shapes or types that do not fit together.
        NotImplementedError: heads, a pool or a device that the kernel does not take.
    """
    check_kv_scales(pool, None)
    check_static_layer(pool, layer)
    if projected.ndim != 3 or projected.shape[1] != slots.size or not projected.size:
        raise ValueError(
            f"projected has shape {projected.shape}: expected [summands, tokens, features] of {slots.size} tokens, as "
            "many as slots"
        )
    num_heads_of(pool, projected.shape[2])
    if projected.dtype != "float32" and (projected.dtype != pool.dtype or len(projected) > 1):
        raise ValueError(
            f"projected is {len(projected)} summands of {projected.dtype}: expected one of {pool.dtype}, the pool's "
            "type, or summands of float32"
        )
    cos, sin = angles
    if cos.shape != sin.shape or len(cos) != slots.size or {cos.dtype.name, sin.dtype.name} != {"float32"}:
        raise ValueError(
            f"the angles are {cos.dtype}{list(cos.shape)} and {sin.dtype}{list(sin.shape)}: expected cosine and sine "
            f"of {slots.size} tokens, in float32"
        )
    head_dim = shape_of(pool).head_dim
    for scale in () if norms is None else (norms.q_scale, norms.k_scale):
        if scale.shape != (head_dim,):
            raise ValueError(f"a norm has a scale of shape {scale.shape}: expected {(head_dim,)}, head_dim of the pool")
    return dispatch.run(KERNEL, pool, layer, projected, angles, slots, norms, interpret=interpret)
