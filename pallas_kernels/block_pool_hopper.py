"""Writes a step's K and V into the block pool on Hopper GPUs: ``write_kv`` as a Pallas Mosaic GPU kernel.

A piece is K or V of one token: [num_kv_heads, head_dim]. In the pool its heads lie ``block_size`` rows apart, which one
TMA store reaches. A warp starts to load all its pieces into shared memory, and stores each as soon as it has landed; it
shares nothing with the other warps.

The kernel reads K and V from memory, while XLA's scatter may also compute what it writes: rotary embedding, say. What
it saves must be more than the launch of the fusion that then does this.
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

from pallas_kernels.block_pool import BlockPool, block_size_of, num_kv_heads_of
from pallas_kernels.paged_attention.hopper import NUM_SMS, why_no_device
from pallas_kernels.paged_attention.hopper.tile import Ref

DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)

MOST_COPIED = 256
"""Heads, and elements of each, that one TMA copies."""

WARPS = 4
"""Of a thread block: one warpgroup."""

MOST_TURNS = 8
"""Pieces that a warp takes: its code is unrolled."""

MOST_STAGED_BYTES = 32 * 1024
"""Shared memory in which a thread block stages pieces, unless a single turn takes more: six of them fit a
multiprocessor, so that some store while others load."""

SMEM_BYTES = 224 * 1024
"""Shared memory that a thread block may have, less a few KiB for barriers."""

SMEM_ALIGNMENT = 128
"""Where TMA can read and write shared memory, in bytes."""

NOWHERE = -1
"""The slot of tokens that are not written."""


@dataclass(frozen=True)
class WriteShape:
    """Everything static about a launch."""

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
        """Heads that a piece has room for in shared memory, where the next one has to be aligned."""
        heads_per_unit = SMEM_ALIGNMENT // math.gcd(SMEM_ALIGNMENT, self.head_dim * self.dtype.itemsize)
        return -(-self.num_kv_heads // heads_per_unit) * heads_per_unit

    @property
    def turn_bytes(self) -> int:
        """Shared memory for one piece of each warp."""
        return WARPS * self.staged_heads * self.head_dim * self.dtype.itemsize

    @property
    def turns(self) -> int:
        """Pieces of a warp: no more than it takes to give every multiprocessor a thread block."""
        wanted = -(-self.num_pieces // (WARPS * self.num_sms))
        return max(1, min(wanted, MOST_TURNS, MOST_STAGED_BYTES // self.turn_bytes))

    @property
    def num_blocks(self) -> int:
        """Thread blocks."""
        return -(-self.num_pieces // (WARPS * self.turns))


def write_shape(pool: BlockPool, num_tokens: int, num_sms: int = NUM_SMS) -> WriteShape:
    """The launch that writes so many tokens."""
    return WriteShape(
        num_layers=pool.shape[1],
        num_kv_heads=num_kv_heads_of(pool),
        block_size=block_size_of(pool),
        head_dim=pool.shape[5],
        dtype=jnp.dtype(pool.dtype),
        num_tokens=num_tokens,
        num_sms=num_sms,
    )


def why_not_write(shape: WriteShape) -> str | None:
    """Why the kernel cannot take a write, whatever the device; None if it can."""
    if shape.dtype not in DTYPES:
        return f"a pool of {shape.dtype.name}: the kernel writes float32, bfloat16 and float16"
    if shape.head_dim * shape.dtype.itemsize % 16 or shape.head_dim > MOST_COPIED:
        return f"head_dim={shape.head_dim}: expected rows of a multiple of 16 bytes, and at most {MOST_COPIED} elements"
    if shape.num_kv_heads > MOST_COPIED or shape.turn_bytes > SMEM_BYTES:
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

    Block 0 stays as it is: the padding tokens that have slots there are not written.

    Args:
        num_sms: multiprocessors to fill before a warp takes more than one piece.
        interpret: run in Pallas's interpreter for Mosaic GPU instead of on a GPU.

    Raises:
        ValueError: the pool has no such layer.
        NotImplementedError: a pool, or a device, that the kernel does not take.
    """
    if not 0 <= layer < pool.shape[1]:
        raise ValueError(f"layer={layer}: expected 0 to {pool.shape[1] - 1}, one of the pool's layers")
    shape = write_shape(pool, slots.size, num_sms)
    reason = why_not_write(shape) or (None if interpret else why_no_device())
    if reason is not None:
        raise NotImplementedError(f"{reason}; implementation='xla' takes it")
    if k.size == 0:
        return pool
    # The layer is an operand, so that all layers share one compiled kernel.
    return _write(pool, jnp.int32(layer), k, v, slots, shape=shape, interpret=interpret)


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
    is_written = (slots >= shape.block_size) & (slots < pool.shape[0] * shape.block_size)
    slots = jnp.where(is_written, slots, NOWHERE).astype(jnp.int32)
    # One array, so that one fusion computes it, and a new one: a part of a larger array, which XLA passes on by its
    # address, need not be aligned as a kernel's operand has to be.
    pieces = jnp.stack([k, v], axis=1).astype(pool.dtype).reshape(-1, *k.shape[1:])
    matrices = jax.new_ref(pool.reshape(-1, *pool.shape[3:]))

    def body(pieces: Ref, slots: Ref, layer: Ref, matrices: Ref, staged: Ref, landed: Ref) -> None:
        plgpu.warp_map(lambda warp: _move(shape, warp, pieces, slots, layer, matrices, staged, landed))

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
    )(pieces, slots, layer.reshape(1), matrices)
    return matrices[...].reshape(pool.shape)


def _move(
    shape: WriteShape, warp: Array, pieces: Ref, slots: Ref, layer: Ref, matrices: Ref, staged: Ref, landed: Ref
) -> None:
    """One warp's pieces, from [pieces, num_kv_heads, head_dim] to [matrices, num_kv_heads, block_size, head_dim]."""
    first = lax.axis_index("block") * (shape.turns * WARPS) + warp
    # Past the last piece, that one is loaded again, and not stored.
    mine = [jnp.minimum(first + turn * WARPS, shape.num_pieces - 1) for turn in range(shape.turns)]

    def stage(turn: int) -> Ref:
        return staged.at[turn, warp, pl.ds(0, shape.num_kv_heads)]

    for turn, piece in enumerate(mine):
        plgpu.copy_gmem_to_smem(pieces.at[piece], stage(turn), landed.at[turn * WARPS + warp])
    # Loaded while the pieces are on their way.
    first_matrix = 2 * layer[0]
    slots_of_mine = [slots[lax.div(piece, jnp.int32(2))] for piece in mine]

    for turn, (piece, slot) in enumerate(zip(mine, slots_of_mine, strict=True)):
        plgpu.barrier_wait(landed.at[turn * WARPS + warp])

        @pl.when((slot != NOWHERE) & (first + turn * WARPS < shape.num_pieces))
        def _store(turn: int = turn, piece: Array = piece, slot: Array = slot) -> None:
            block, offset = lax.div(slot, jnp.int32(shape.block_size)), lax.rem(slot, jnp.int32(shape.block_size))
            matrix = block * (2 * shape.num_layers) + first_matrix + lax.rem(piece, jnp.int32(2))
            plgpu.copy_smem_to_gmem(stage(turn), matrices.at[matrix, :, offset])

    # Shared memory goes when the warp ends.
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
