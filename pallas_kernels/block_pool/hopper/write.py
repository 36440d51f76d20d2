"""The write of a step's K and V into the block pool on Hopper GPUs, as a Pallas Mosaic GPU kernel.

A piece is K or V of one token: [num_kv_heads, head_dim]. In the pool a piece's heads lie ``block_size`` rows apart, and
one TMA store reaches them all. A warp starts to load all its pieces into shared memory, and stores each piece as soon
as it has landed. Warps share no data.

The kernel reads K and V from memory, while XLA's scatter may also compute K and V, as in a rotary embedding. The kernel
pays off where it saves more than the launch of the fusion that then computes them.
"""

import math
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Float, Int, Int32

from pallas_kernels import dispatch
from pallas_kernels.block_pool.layout import BlockPool, as_sides, shape_of
from pallas_kernels.chips import here
from pallas_kernels.chips.hopper import MOST_COPIED, NUM_SMS, SMEM_ALIGNMENT, SMEM_BYTES, WARPS
from pallas_kernels.chips.memory import Ref, round_up

DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)

MOST_TURNS = 8
"""Most pieces that a warp takes: the code of a warp is unrolled."""

MOST_STAGED_BYTES = 32 * 1024
"""Shared memory in which a thread block stages pieces, unless a single turn takes more. Six such thread blocks fit a
multiprocessor, so that some store while others load."""

USABLE_SMEM_BYTES = SMEM_BYTES - 3 * 1024
"""Shared memory for pieces; barriers take the rest."""

NOWHERE = -1
"""The slot of tokens that are not written."""


@dataclass(frozen=True)
class WriteShape:
    """The static properties of a launch."""

    num_layers: int
    num_kv_heads: int
    block_size: int
    head_dim: int
    dtype: jnp.dtype
    num_tokens: int
    num_sms: int

    @property
    def num_pieces(self) -> int:
        return 2 * self.num_tokens

    @property
    def staged_heads(self) -> int:
        """Heads of a piece in shared memory, padded so that the next piece is aligned."""
        heads_per_unit = SMEM_ALIGNMENT // math.gcd(SMEM_ALIGNMENT, self.head_dim * self.dtype.itemsize)
        return round_up(self.num_kv_heads, heads_per_unit)

    @property
    def turn_bytes(self) -> int:
        """Shared memory for one piece of each warp."""
        return WARPS * self.staged_heads * self.head_dim * self.dtype.itemsize

    @property
    def turns(self) -> int:
        """Pieces of a warp: so few that every multiprocessor gets a thread block."""
        wanted = -(-self.num_pieces // (WARPS * self.num_sms))
        return max(1, min(wanted, MOST_TURNS, MOST_STAGED_BYTES // self.turn_bytes))

    @property
    def num_blocks(self) -> int:
        """Thread blocks."""
        return -(-self.num_pieces // (WARPS * self.turns))


def write_shape(pool: BlockPool, num_tokens: int, num_sms: int = NUM_SMS) -> WriteShape:
    """The launch that writes so many tokens."""
    shape = shape_of(pool)
    return WriteShape(
        num_layers=shape.num_layers,
        num_kv_heads=shape.num_kv_heads,
        block_size=shape.block_size,
        head_dim=shape.head_dim,
        dtype=jnp.dtype(pool.dtype),
        num_tokens=num_tokens,
        num_sms=num_sms,
    )


def why_not_write(pool: BlockPool, num_tokens: int) -> str | None:
    """The reason why the kernel cannot write so many tokens to a pool, whatever the device; None if it can."""
    shape = write_shape(pool, num_tokens)
    if shape.dtype not in DTYPES:
        return f"a pool of {shape.dtype.name}: the kernel writes float32, bfloat16 and float16"
    if shape.head_dim * shape.dtype.itemsize % 16 or shape.head_dim > MOST_COPIED:
        return f"head_dim={shape.head_dim}: expected rows of a multiple of 16 bytes, and at most {MOST_COPIED} elements"
    if shape.num_kv_heads > MOST_COPIED or shape.turn_bytes > USABLE_SMEM_BYTES:
        return f"{shape.num_kv_heads} KV heads: a token's are more than one copy takes, or {WARPS} than shared memory"
    return None


def write_kv_hopper(
    pool: BlockPool,
    layer: int,
    k: Float[Array, "tokens num_kv_heads head_dim"],
    v: Float[Array, "tokens num_kv_heads head_dim"],
    slots: Int[Array, " tokens"],
    *,
    num_sms: int = NUM_SMS,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> BlockPool:
    """Store one layer's K and V of this step's tokens; arguments and result as for ``write_kv``, which checks shapes.

    Block 0 stays as it is: the kernel does not write padding tokens, whose slots lie there.

    Args:
        num_sms: multiprocessors to fill before a warp takes more than one piece.
        interpret: settings of Pallas's interpreter for Mosaic GPU; None runs on a GPU.

    Raises:
        NotImplementedError: a pool, or a device, that the kernel does not take.
    """
    reason = why_not_write(pool, slots.size) or (None if interpret else here.why_no_hopper())
    dispatch.refuse(reason, "implementation='xla' takes it")
    if k.size == 0:
        return pool
    # The layer is an operand, so that all layers share one compiled kernel.
    shape = write_shape(pool, slots.size, num_sms)
    return _write(pool, jnp.int32(layer), k, v, slots, shape=shape, interpret=interpret)


def _joined(
    k: Float[Array, "tokens num_kv_heads head_dim"], v: Float[Array, "tokens num_kv_heads head_dim"]
) -> Float[Array, "tokens ..."]:
    """K and V of each token side by side, in one array, so that one fusion computes both."""
    if len(k) == 1:
        # A new array. XLA passes a contiguous part of a larger array on by its address, which may lack the alignment of
        # a kernel's operand.
        return jnp.stack([k, v], axis=1)
    # Neighbouring features of one product, which XLA then passes on as they are.
    return jnp.concatenate([x.reshape(len(x), -1) for x in (k, v)], axis=1)


@partial(jax.jit, static_argnames=("shape", "interpret"))
def _write(
    pool: BlockPool,
    layer: Int32[Array, ""],
    k: Float[Array, "tokens num_kv_heads head_dim"],
    v: Float[Array, "tokens num_kv_heads head_dim"],
    slots: Int[Array, " tokens"],
    *,
    shape: WriteShape,
    interpret: plgpu.InterpretGPUParams | None,
) -> BlockPool:
    is_written = (slots >= shape.block_size) & (slots < shape_of(pool).num_blocks * shape.block_size)
    slots = jnp.where(is_written, slots, NOWHERE).astype(jnp.int32)
    pieces = _joined(k, v).astype(pool.dtype).reshape(-1, *k.shape[1:])
    sides = jax.new_ref(as_sides(pool))

    def body(pieces: Ref, slots: Ref, layer: Ref, sides: Ref, staged: Ref, landed: Ref) -> None:
        plgpu.warp_map(lambda warp: _move(shape, warp, pieces, slots, layer, sides, staged, landed))

    plgpu.kernel(
        body,
        out_type=(),
        grid=(shape.num_blocks,),
        grid_names=("block",),
        num_threads=1,
        thread_name="warpgroup",
        kernel_name="write_kv",
        scratch_types=[
            plgpu.SMEM((shape.turns, WARPS, shape.staged_heads, shape.head_dim), shape.dtype),
            plgpu.Barrier(num_barriers=shape.turns * WARPS),
        ],
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),  # warps share nothing
        interpret=interpret,
    )(pieces, slots, layer.reshape(1), sides)
    return sides[...].reshape(pool.shape)


def _move(
    shape: WriteShape, warp: Array, pieces: Ref, slots: Ref, layer: Ref, sides: Ref, staged: Ref, landed: Ref
) -> None:
    """Move one warp's pieces, [pieces, num_kv_heads, head_dim], to [sides, num_kv_heads, block_size, head_dim]."""
    first = lax.axis_index("block") * (shape.turns * WARPS) + warp
    # A warp without pieces left loads the last piece again, and does not store it.
    mine = [jnp.minimum(first + turn * WARPS, shape.num_pieces - 1) for turn in range(shape.turns)]

    def stage(turn: int) -> Ref:
        return staged.at[turn, warp, pl.ds(0, shape.num_kv_heads)]

    for turn, piece in enumerate(mine):
        plgpu.copy_gmem_to_smem(pieces.at[piece], stage(turn), landed.at[turn * WARPS + warp])
    # These loads overlap with the copies of the pieces.
    first_side = 2 * layer[0]
    slots_of_mine = [slots[lax.div(piece, jnp.int32(2))] for piece in mine]

    for turn, (piece, slot) in enumerate(zip(mine, slots_of_mine, strict=True)):
        plgpu.barrier_wait(landed.at[turn * WARPS + warp])

        @pl.when((slot != NOWHERE) & (first + turn * WARPS < shape.num_pieces))
        def _store(turn: int = turn, piece: Array = piece, slot: Array = slot) -> None:
            block, offset = lax.div(slot, jnp.int32(shape.block_size)), lax.rem(slot, jnp.int32(shape.block_size))
            side = block * (2 * shape.num_layers) + first_side + lax.rem(piece, jnp.int32(2))
            plgpu.copy_smem_to_gmem(stage(turn), sides.at[side, :, offset])

    # Shared memory is freed when the warp ends.
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
