"""Writes into the block pool and moves of its blocks: checks their arguments and picks the implementation.

All functions are pure. In a jitted function that donates the pool they work in place, and allocate nothing of the
pool's size. Indices below zero or past the end are clipped when read and ignored when written.
"""

from collections.abc import Callable
from typing import Any

from jax import Array
from jaxtyping import Float, Int

from pallas_kernels import dispatch
from pallas_kernels.block_pool.hopper import (
    copy_blocks_hopper,
    why_not_copy,
    why_not_write,
    why_not_write_quantized,
    write_kv_hopper,
    write_kv_quantized_hopper,
)
from pallas_kernels.block_pool.layout import (
    KV_HEAD_AXIS,
    BlockIds,
    BlockPool,
    Blocks,
    KvScales,
    PoolShape,
    Scales,
    block_pool_shape,
    blocks_shape,
    check_kv_scales,
    check_static_layer,
    is_quantized,
    is_scales,
    kv_scales_shape,
    shape_of,
)
from pallas_kernels.block_pool.tpu import (
    copy_blocks_tpu,
    gather_blocks_tpu,
    scatter_blocks_tpu,
    write_kv_quantized_tpu,
    write_kv_tpu,
)
from pallas_kernels.block_pool.xla import (
    copy_blocks_xla,
    gather_blocks_xla,
    scatter_blocks_xla,
    write_kv_quantized_xla,
    write_kv_xla,
)
from pallas_kernels.dispatch import Kernel

__all__ = [
    "KV_HEAD_AXIS",
    "BlockPool",
    "Blocks",
    "KvScales",
    "PoolShape",
    "Scales",
    "block_pool_shape",
    "copy_blocks",
    "gather_blocks",
    "is_quantized",
    "kv_scales_shape",
    "scatter_blocks",
    "shape_of",
    "why_not_copy",
    "why_not_write",
    "why_not_write_quantized",
    "write_kv",
    "write_kv_quantized",
]


def _kernels(**runs: Callable[..., Any]) -> dict[str, Kernel]:
    return {name: Kernel(name, run) for name, run in runs.items()}


WRITES = _kernels(xla=write_kv_xla, hopper=write_kv_hopper, pallas_tpu=write_kv_tpu)
QUANTIZED_WRITES = _kernels(
    xla=write_kv_quantized_xla, hopper=write_kv_quantized_hopper, pallas_tpu=write_kv_quantized_tpu
)
COPIES = _kernels(xla=copy_blocks_xla, hopper=copy_blocks_hopper, pallas_tpu=copy_blocks_tpu)
GATHERS = _kernels(xla=gather_blocks_xla, pallas_tpu=gather_blocks_tpu)
SCATTERS = _kernels(xla=scatter_blocks_xla, pallas_tpu=scatter_blocks_tpu)


def write_kv(
    pool: BlockPool,
    layer: int,
    k: Float[Array, "tokens num_kv_heads head_dim"],
    v: Float[Array, "tokens num_kv_heads head_dim"],
    slots: Int[Array, " tokens"],
    *,
    implementation: str | None = None,
    interpret: bool = False,
) -> BlockPool:
    """Store one layer's K and V of this step's tokens.

    Args:
        pool: the pool, of a float type; donate it to the enclosing jit.
        layer: which layer, a static number.
        k, v: in any float type; stored in the pool's type.
        slots: ``physical_block * block_size + offset`` of each token. Slots are distinct, except that any number of
            padding tokens may share slots of block 0, which no sequence reads.
        implementation: "xla", "hopper" or "pallas_tpu"; None is "xla". The kernels of "hopper" and "pallas_tpu" leave
            block 0 as it is, and over several devices need ``jax.shard_map``. For "pallas_tpu" the tokens of a block
            follow one another.
        interpret: run the kernels of the implementation named in Pallas's interpreter, on any device.

    Returns:
        The pool, with the slots written.

    Raises:
        ValueError: a quantised pool, or a layer that the pool does not have; shapes that do not fit together, or an
            unknown implementation.
        NotImplementedError: the implementation named cannot write this pool, or not on this device.
    """
    dispatch.check_named(WRITES, implementation, interpret=interpret)
    check_kv_scales(pool, None)
    _check_written(pool, layer, k, v, slots)
    return dispatch.run(WRITES[implementation or "xla"], pool, layer, k, v, slots, interpret=interpret)


def _check_written(pool: BlockPool, layer: int, k: Array, v: Array, slots: Array) -> None:
    check_static_layer(pool, layer)
    shape = shape_of(pool)
    expected = (slots.size, shape.num_kv_heads, shape.head_dim)
    for name, array in (("k", k), ("v", v)):
        if array.shape != expected:
            raise ValueError(
                f"{name} has shape {array.shape}: expected {expected}, [tokens, num_kv_heads, head_dim] of as many "
                "tokens as slots and of the pool's heads"
            )


def write_kv_quantized(
    pool: BlockPool,
    kv_scales: KvScales,
    layer: int,
    k: Float[Array, "tokens num_kv_heads head_dim"],
    v: Float[Array, "tokens num_kv_heads head_dim"],
    slots: Int[Array, " tokens"],
    *,
    implementation: str | None = None,
    interpret: bool = False,
) -> tuple[BlockPool, KvScales]:
    """Store one layer's K and V of this step's tokens in a quantised pool.

    A token at offset 0 starts its block: the block's older numbers and scales are forgotten. Otherwise, a token too
    large for its block's scale makes the scale grow. The block's numbers are then brought to the new scale.

    Scales are powers of two, so they grow seldom. Growing costs e4m3 only the numbers that fall below its smallest. The
    error of int8 stays within one step of the block's last scale, however often the scale grows. The last rounding
    costs half a step, the rounding before it a quarter, and so on. A value that is not finite makes its block's scale
    NaN until a token starts the block again.

    Args:
        pool: the pool, of float8_e4m3fn or int8; donate it to the enclosing jit.
        kv_scales: the pool's scales; donate them too.
        layer: which layer, a static number.
        k, v: in any float type.
        slots: as for ``write_kv``. The tokens of a block follow one another, as the tokens of a sequence do.
        implementation: "xla", "hopper" or "pallas_tpu"; None is "xla". As for ``write_kv``, but only "pallas_tpu"
            leaves block 0 as it is.
        interpret: as for ``write_kv``.

    Returns:
        The pool and its scales, with the slots written.

    Raises:
        ValueError: a pool that is not quantised, scales of another pool, or a layer that the pool does not have; shapes
            that do not fit together, or an unknown implementation.
        NotImplementedError: the implementation named cannot write this pool, or not on this device.
    """
    dispatch.check_named(QUANTIZED_WRITES, implementation, interpret=interpret)
    check_kv_scales(pool, kv_scales)
    _check_written(pool, layer, k, v, slots)
    kernel = QUANTIZED_WRITES[implementation or "xla"]
    return dispatch.run(kernel, pool, kv_scales, layer, k, v, slots, interpret=interpret)


def copy_blocks(
    pool: BlockPool | KvScales,
    src: BlockIds,
    dst: BlockIds,
    *,
    implementation: str | None = None,
    interpret: bool = False,
) -> BlockPool | KvScales:
    """Copy whole blocks, all layers at once: every source is read before any destination is written.

    Args:
        pool: the pool, or its scales, which move the same way; donate it to the enclosing jit.
        src, dst: block ``dst[i]`` becomes a copy of block ``src[i]``. Destinations are distinct; pad with 0 -> 0.
        implementation: "xla", "hopper" or "pallas_tpu"; None is "xla". The kernels of "hopper" and "pallas_tpu" leave
            block 0 as it is, and over several devices need ``jax.shard_map``. For them, sources and destinations are
            disjoint, except for block 0. Scales, which are small, XLA moves under any name.
        interpret: as for ``write_kv``.

    Raises:
        ValueError: ids of another shape, or an unknown implementation.
        NotImplementedError: the implementation named cannot copy blocks of this pool, or not on this device.
    """
    kernel, interpret = _mover(COPIES, pool, implementation, interpret)
    if src.ndim != 1 or src.shape != dst.shape:
        raise ValueError(f"src has shape {src.shape} and dst {dst.shape}: expected one list of ids each, equally long")
    return dispatch.run(kernel, pool, src, dst, interpret=interpret)


def gather_blocks(
    pool: BlockPool | KvScales, blocks: BlockIds, *, implementation: str | None = None, interpret: bool = False
) -> Blocks | Scales:
    """Whole blocks, or their scales, in the order asked for.

    Args:
        pool: the pool, or its scales.
        blocks: the blocks.
        implementation: "xla" or "pallas_tpu"; None is "xla". "pallas_tpu" moves blocks of a pool by DMA. Scales XLA
            moves under either name.
        interpret: as for ``write_kv``.
    """
    kernel, interpret = _mover(GATHERS, pool, implementation, interpret)
    return dispatch.run(kernel, pool, blocks, interpret=interpret)


def scatter_blocks(
    pool: BlockPool | KvScales,
    blocks: BlockIds,
    data: Blocks | Scales,
    *,
    implementation: str | None = None,
    interpret: bool = False,
) -> BlockPool | KvScales:
    """Overwrite whole blocks, which are distinct (padding: block 0, any number of times).

    Args:
        pool: the pool, or its scales; donate it to the enclosing jit.
        blocks: destination of each of ``data``.
        data: as ``gather_blocks`` returns it.
        implementation: as for ``gather_blocks``; "pallas_tpu" leaves block 0 as it is.
        interpret: as for ``write_kv``.

    Raises:
        ValueError: ``data`` of another shape or type, or an unknown implementation.
    """
    kernel, interpret = _mover(SCATTERS, pool, implementation, interpret)
    expected = blocks_shape(pool, len(blocks))
    if data.shape != expected or data.dtype != pool.dtype:
        raise ValueError(
            f"data is {data.dtype} of shape {data.shape}: expected {pool.dtype} of shape {expected}, as gather_blocks "
            "returns it"
        )
    return dispatch.run(kernel, pool, blocks, data, interpret=interpret)


def _mover(
    kernels: dict[str, Kernel], pool: BlockPool | KvScales, implementation: str | None, interpret: bool
) -> tuple[Kernel, bool]:
    """The kernel that moves blocks of a pool, and whether it is interpreted; scales, which are small, XLA moves."""
    dispatch.check_named(kernels, implementation, interpret=interpret)
    return (kernels["xla"], False) if is_scales(pool) else (kernels[implementation or "xla"], interpret)
