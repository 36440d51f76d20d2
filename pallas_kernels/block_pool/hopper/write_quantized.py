"""Writes of K and V into a quantised pool on Hopper GPUs, with a Mosaic GPU kernel that rescales blocks.

XLA writes the tokens and the scales. Few blocks need rescaling, since scales grow seldom. XLA could only copy the
blocks of all tokens, or loop over some, which makes the host wait for the loop's condition. A thread block of the
kernel has the K or V of one head of one token's block. It rescales these numbers if their scale has grown, and mostly
ends at once.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector
from jaxtyping import Float, Float32, Int, Int32

from pallas_kernels import dispatch
from pallas_kernels.block_pool.layout import BlockPool, KvScales, block_size_of, is_quantized, num_blocks_of, shape_of
from pallas_kernels.block_pool.quantization import quantize, to_stored
from pallas_kernels.block_pool.xla import beside_another, write_tokens
from pallas_kernels.chips import here
from pallas_kernels.chips.hopper import WARPGROUP
from pallas_kernels.chips.hopper_ptx import IN_PLACE, SCALING_PTX, narrowing_ptx, widening_ptx
from pallas_kernels.chips.memory import Ref

WORD = 4
"""Numbers of a register."""


def why_not_write_quantized(pool: BlockPool) -> str | None:
    """The reason why the kernel cannot rescale blocks of a pool, whatever the device; None if it can."""
    shape = shape_of(pool)
    if not is_quantized(pool.dtype):
        return f"a pool of {jnp.dtype(pool.dtype).name}: the kernel rescales int8 and float8_e4m3fn"
    if shape.block_size * shape.head_dim % (WORD * WARPGROUP):
        return (
            f"blocks of {shape.block_size} tokens of head_dim {shape.head_dim}: expected a multiple of "
            f"{WORD * WARPGROUP} numbers of each head"
        )
    return None


def write_kv_quantized_hopper(
    pool: BlockPool,
    kv_scales: KvScales,
    layer: int,
    k: Float[Array, "tokens num_kv_heads head_dim"],
    v: Float[Array, "tokens num_kv_heads head_dim"],
    slots: Int[Array, " tokens"],
    *,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> tuple[BlockPool, KvScales]:
    """Store K and V in a quantised pool; arguments and result as for ``write_kv_quantized``, which checks shapes.

    Args:
        interpret: settings of Pallas's interpreter for Mosaic GPU; None runs on a GPU.

    Raises:
        NotImplementedError: a pool, or a device, that the kernel does not take.
    """
    reason = why_not_write_quantized(pool) or (None if interpret else here.why_no_hopper())
    dispatch.refuse(reason, "implementation='xla' takes it")
    if k.size == 0:
        return pool, kv_scales
    values, slots = beside_another(pool, jnp.stack([k, v], axis=1), slots)
    stored, kv_scales, old, new = quantize(pool, kv_scales, layer, values, slots)
    blocks = slots // block_size_of(pool)
    # Tokens of a block follow one another; the first stands for all.
    is_first = (jnp.diff(blocks, prepend=-1) != 0) & (blocks > 0) & (blocks < num_blocks_of(pool))
    ratios = jnp.where(is_first[:, None, None], old / new, 1)
    pool = _rescale(pool, jnp.int32(layer), blocks.astype(jnp.int32), ratios, interpret=interpret)
    return write_tokens(pool, layer, stored, slots), kv_scales


@partial(jax.jit, static_argnames="interpret")
def _rescale(
    pool: BlockPool,
    layer: Int32[Array, ""],
    blocks: Int32[Array, " tokens"],
    ratios: Float32[Array, "tokens 2 num_kv_heads"],
    *,
    interpret: plgpu.InterpretGPUParams | None,
) -> BlockPool:
    """Multiply the numbers of each token's block by the ratio of their head in one layer, where it is in (0, 1)."""
    shape = shape_of(pool)
    num_tokens, num_heads = len(blocks), 2 * shape.num_kv_heads
    size = shape.block_size * shape.head_dim
    heads = jax.new_ref(pool.reshape(-1, size))

    def body(blocks: Ref, ratios: Ref, layer: Ref, heads: Ref) -> None:
        token, head = lax.axis_index("token"), lax.axis_index("head")
        ratio = ratios[token * num_heads + head]
        index = (blocks[token] * shape.num_layers + layer[0]) * num_heads + head

        @pl.when((ratio > 0) & (ratio < 1))
        def _() -> None:
            numbers = heads.at[index]
            if interpret:
                numbers[...] = to_stored(numbers[...].astype(jnp.float32) * ratio, pool.dtype)
            else:
                run = plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT))
                run(lambda _, numbers, ratio: _multiply(numbers, ratio.registers.item(), size, pool.dtype))(
                    numbers, ratio
                )

    plgpu.kernel(
        body,
        out_type=(),
        grid=(num_tokens, num_heads),
        grid_names=("token", "head"),
        num_threads=1,
        thread_name="warpgroup",
        kernel_name="rescale_blocks",
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),  # threads share nothing
        interpret=interpret,
    )(blocks, ratios.reshape(-1), layer.reshape(1), heads)
    return heads[...].reshape(pool.shape)


def _multiply(numbers: ir.Value, ratio: ir.Value, size: int, dtype: jnp.dtype) -> None:
    """Multiply this thread's share of ``size`` numbers in device memory."""
    i32, i8, f32 = ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(8), ir.F32Type.get()
    num_words = next(n for n in (4, 2, 1) if size % (n * WORD * WARPGROUP) == 0)
    words_type, pointer = ir.VectorType.get((num_words,), i32), mgpu.utils.memref_ptr(numbers)
    step = num_words * WORD
    first = arith.muli(arith.remui(mgpu.utils.thread_idx(), mgpu.utils.c(WARPGROUP, i32)), mgpu.utils.c(step, i32))
    places = [
        mgpu.utils.getelementptr(pointer, [arith.addi(first, mgpu.utils.c(start, i32))], i8)
        for start in range(0, size, step * WARPGROUP)
    ]
    for place, words in [(place, llvm.load(words_type, place)) for place in places]:
        products = []
        for nth in range(num_words):
            word = vector.extract(words, [], [nth])
            halves = mgpu.utils.inline_ptx(widening_ptx(dtype, IN_PLACE), word, result_types=(i32, i32))
            scaled = [
                number
                for half in halves
                for number in mgpu.utils.inline_ptx(SCALING_PTX, half, ratio, result_types=(f32, f32))
            ]
            products.append(mgpu.utils.inline_ptx(narrowing_ptx(dtype), *scaled, result_types=i32))
        llvm.store(vector.from_elements(words_type, products), place)
