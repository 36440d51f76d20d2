"""Writes of K and V into the block pool on TPUs, by DMA.

The hardware tiles a pool's memory, so a copy writes whole rows of registers of a block. The kernel therefore merges a
token's K and V in VMEM with the token's block, and writes the block back.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Float, Float32, Int

from pallas_kernels import dispatch
from pallas_kernels.block_pool.layout import BlockPool, KvScales, LayerIndex, is_quantized, shape_of
from pallas_kernels.block_pool.quantization import quantize
from pallas_kernels.chips import here
from pallas_kernels.chips.memory import Ref, round_up
from pallas_kernels.chips.tpu import LANES, in_hbm

WRITE_BUFFERS = 3
"""Blocks in VMEM: one that arrives, one that is merged, one that leaves."""

ROWS = 16
"""Rows at whose multiples a copy of tokens can start: a whole register of 16-bit rows, and so of 32-bit rows."""

MOST_TOKENS = 16 * 1024
"""Tokens of one launch: SMEM, of 1 MiB on every generation, holds 16 bytes for each."""


class Pieces(NamedTuple):
    """The pieces of a step: a piece is a run of tokens whose slots follow one another in one block."""

    fields: Int[Array, " four_times_tokens"]  # of each piece: block, first offset, first token, number of tokens
    count: Int[Array, ""]


def write_kv_tpu(
    pool: BlockPool,
    layer: LayerIndex,
    k: Float[Array, "tokens num_kv_heads head_dim"],
    v: Float[Array, "tokens num_kv_heads head_dim"],
    slots: Int[Array, " tokens"],
    *,
    interpret: pltpu.InterpretParams | None = None,
) -> BlockPool:
    """Store one layer's K and V of this step's tokens; arguments and result as for ``write_kv``, which checks shapes.

    The tokens of a block follow one another, in ascending order, as the tokens of a sequence do. Block 0 stays as it
    is: the kernel does not write padding tokens, whose slots lie there.

    Args:
        interpret: settings of Pallas's interpreter for TPUs; None runs on a TPU.

    Raises:
        NotImplementedError: a pool, or a device, that the kernel does not take.
    """
    if is_quantized(pool.dtype) or pool.dtype == jnp.float16:
        raise NotImplementedError(f"a pool of {pool.dtype}: the kernel writes bfloat16 and float32")
    dispatch.refuse(None if interpret else here.why_no_tpu(), "implementation='xla' takes it")
    if k.size == 0:
        return pool
    kv = jnp.stack([k, v], axis=1).astype(pool.dtype)
    return _write_all(pool, layer, kv, None, slots, interpret)


def write_kv_quantized_tpu(
    pool: BlockPool,
    kv_scales: KvScales,
    layer: LayerIndex,
    k: Float[Array, "tokens num_kv_heads head_dim"],
    v: Float[Array, "tokens num_kv_heads head_dim"],
    slots: Int[Array, " tokens"],
    *,
    interpret: pltpu.InterpretParams | None = None,
) -> tuple[BlockPool, KvScales]:
    """Store K and V in a quantised pool; arguments and result as for ``write_kv_quantized``, slots ``write_kv_tpu``.

    XLA finds the scales and rounds the new tokens; the kernel brings the numbers of their blocks to the new scales.
    (XLA's own gather and scatter of 8-bit numbers want another layout on TPUs, and would copy the pool.)

    Args:
        interpret: settings of Pallas's interpreter for TPUs; None runs on a TPU.

    Raises:
        NotImplementedError: a device that is no TPU.
    """
    dispatch.refuse(None if interpret else here.why_no_tpu(), "implementation='xla' takes it")
    if k.size == 0:
        return pool, kv_scales
    stored, kv_scales, old, new = quantize(pool, kv_scales, layer, jnp.stack([k, v], axis=1), slots)
    ratios = jnp.where((old > 0) & (new > old), old / new, 1)
    # bfloat16 holds 8-bit numbers exactly.
    return _write_all(pool, layer, stored.astype(jnp.bfloat16), ratios, slots, interpret), kv_scales


def _write_all(
    pool: BlockPool,
    layer: LayerIndex,
    kv: Float[Array, "tokens 2 num_kv_heads head_dim"],
    ratios: Float32[Array, "tokens 2 num_kv_heads"] | None,
    slots: Int[Array, " tokens"],
    interpret: pltpu.InterpretParams | None,
) -> BlockPool:
    for first in range(0, slots.size, MOST_TOKENS):
        some = slice(first, first + MOST_TOKENS)
        some_ratios = None if ratios is None else ratios[some]
        pool = _write(pool, jnp.asarray(layer, jnp.int32), kv[some], some_ratios, slots[some], interpret=interpret)
    return pool


def pieces_of(slots: Int[Array, " tokens"], block_size: int, num_blocks: int) -> Pieces:
    """The pieces of a step's tokens, in order."""
    num_tokens = slots.size
    is_written = (slots >= block_size) & (slots < num_blocks * block_size)
    block, offset = jnp.divmod(slots, block_size)
    follows = is_written[:-1] & (slots[1:] == slots[:-1] + 1) & (offset[1:] > 0)
    is_first = is_written & ~jnp.pad(follows, (1, 0))
    count = is_first.sum(dtype=jnp.int32)
    (first,) = jnp.nonzero(is_first, size=num_tokens, fill_value=num_tokens)
    nth = jnp.where(is_written, jnp.cumsum(is_first, dtype=jnp.int32) - 1, num_tokens)
    lengths = jnp.zeros(num_tokens, jnp.int32).at[nth].add(1, mode="drop")
    at = jnp.minimum(first, num_tokens - 1)
    fields = jnp.stack([block[at], offset[at], at, lengths], axis=1)
    return Pieces(fields.astype(jnp.int32).reshape(-1), count)


@partial(jax.jit, static_argnames="interpret")
def _write(
    pool: BlockPool,
    layer: Int[Array, ""],
    kv: Float[Array, "tokens 2 num_kv_heads head_dim"],
    ratios: Float32[Array, "tokens 2 num_kv_heads"] | None,
    slots: Int[Array, " tokens"],
    *,
    interpret: pltpu.InterpretParams | None,
) -> BlockPool:
    num_blocks, _, num_kv_heads, block_size, head_dim = shape_of(pool)
    pieces = pieces_of(slots, block_size, num_blocks)
    window = round_up(block_size, ROWS) + ROWS
    new = jnp.pad(kv.transpose(1, 2, 0, 3), ((0, 0), (0, 0), (0, -slots.size % ROWS + window), (0, 0)))
    buffers, dma = WRITE_BUFFERS, pltpu.SemaphoreType.DMA((WRITE_BUFFERS,))
    scratch = [
        pltpu.VMEM((buffers, 2, num_kv_heads, block_size, head_dim), pool.dtype),
        pltpu.VMEM((buffers, 2, num_kv_heads, window, head_dim), new.dtype),
        dma,
        dma,
        dma,
    ]
    given = [new]
    if ratios is not None:
        rows = ratios.reshape(slots.size, 1, -1)
        given.append(jnp.pad(rows, ((0, 0), (0, 0), (0, -rows.shape[2] % LANES))))
        scratch += [pltpu.SMEM((buffers, *given[1].shape[1:]), jnp.float32), dma]

    def body(scalars: Ref, fields: Ref, new: Ref, *refs: Ref) -> None:
        *ratio_refs, _, pool, blocks, windows, landed, window_landed, left = refs[: len(given) + 6]
        rescaling = _Rescaling(*ratio_refs, *refs[len(given) + 6 :]) if ratio_refs else None
        writer = _Writer(scalars[0], fields, new, pool, blocks, windows, landed, window_landed, left, rescaling)
        writer.run(scalars[1])

    return pl.pallas_call(
        body,
        out_shape=jax.ShapeDtypeStruct(pool.shape, pool.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(),
            in_specs=[pl.BlockSpec(memory_space=pl.ANY)] * (len(given) + 1),
            out_specs=pl.BlockSpec(memory_space=pl.ANY),
            scratch_shapes=scratch,
        ),
        input_output_aliases={2 + len(given): 0},
        interpret=interpret or False,
        name="write_kv",
    )(jnp.stack([layer, pieces.count]), pieces.fields, *given, in_hbm(pool, interpret))


class _Rescaling(NamedTuple):
    """Factors that a quantised pool's blocks are multiplied by, of each K head, then of each V head."""

    ratios: Ref  # [tokens, 1, lanes] f32 in HBM
    rows: Ref  # [WRITE_BUFFERS, 1, lanes] f32 in SMEM
    landed: Ref


@dataclass(frozen=True)
class _Writer:
    """The writes of all pieces: while the kernel merges a block, the next block arrives and the last block leaves."""

    layer: Array
    fields: Ref  # [4 * pieces] i32 in SMEM
    new: Ref  # [2, num_kv_heads, tokens, head_dim] in HBM
    pool: Ref
    blocks: Ref  # [WRITE_BUFFERS, 2, num_kv_heads, block_size, head_dim]
    windows: Ref  # [WRITE_BUFFERS, 2, num_kv_heads, window, head_dim]: a piece's tokens, and their neighbours
    block_landed: Ref
    window_landed: Ref
    block_left: Ref
    rescaling: _Rescaling | None

    def run(self, count: Array) -> None:
        pl.when(count > 0)(lambda: self._load(jnp.int32(0)))

        def step(piece: Array, _: None) -> None:
            @pl.when(piece + 1 < count)
            def _next() -> None:
                pl.when(piece + 1 >= WRITE_BUFFERS)(lambda: self._store(piece + 1 - WRITE_BUFFERS).wait())
                self._load(piece + 1)

            self._await(piece)
            self._merge(piece)
            self._store(piece).start()

        lax.fori_loop(0, count, step, None)
        lax.fori_loop(jnp.maximum(count - WRITE_BUFFERS, 0), count, lambda piece, _: self._store(piece).wait(), None)

    def _piece(self, piece: Array) -> tuple[Array, Array, Array, Array]:
        block, offset, token, length = (self.fields[4 * piece + field] for field in range(4))
        return block, offset, token, length

    def _slot(self, piece: Array) -> Array:
        return lax.rem(piece, jnp.int32(WRITE_BUFFERS))

    def _old_copy(self, piece: Array) -> Any:
        slot = self._slot(piece)
        return pltpu.make_async_copy(
            self.pool.at[self._piece(piece)[0], self.layer], self.blocks.at[slot], self.block_landed.at[slot]
        )

    def _new_copy(self, piece: Array) -> Any:
        slot, token = self._slot(piece), self._piece(piece)[2]
        first = pl.multiple_of(lax.div(token, jnp.int32(ROWS)) * ROWS, ROWS)
        return pltpu.make_async_copy(
            self.new.at[:, :, pl.ds(first, self.windows.shape[3])], self.windows.at[slot], self.window_landed.at[slot]
        )

    def _store(self, piece: Array) -> Any:
        slot = self._slot(piece)
        return pltpu.make_async_copy(
            self.blocks.at[slot], self.pool.at[self._piece(piece)[0], self.layer], self.block_left.at[slot]
        )

    def _is_partial(self, piece: Array) -> Array:
        return self._piece(piece)[3] < self.blocks.shape[3]

    def _ratio_copy(self, piece: Array, rescaling: _Rescaling) -> Any:
        slot = self._slot(piece)
        row = rescaling.ratios.at[self._piece(piece)[2]]
        return pltpu.make_async_copy(row, rescaling.rows.at[slot], rescaling.landed.at[slot])

    def _load(self, piece: Array) -> None:
        pl.when(self._is_partial(piece))(lambda: self._old_copy(piece).start())
        self._new_copy(piece).start()
        if self.rescaling is not None:
            self._ratio_copy(piece, self.rescaling).start()

    def _await(self, piece: Array) -> None:
        pl.when(self._is_partial(piece))(lambda: self._old_copy(piece).wait())
        self._new_copy(piece).wait()
        if self.rescaling is not None:
            self._ratio_copy(piece, self.rescaling).wait()

    def _merge(self, piece: Array) -> None:
        """Put a piece's tokens into their rows of the block. Rows move as float32, which holds all types exactly."""
        slot, (_, offset, token, length) = self._slot(piece), self._piece(piece)
        _, _, num_kv_heads, block_size, head_dim = self.blocks.shape
        window = self.windows.shape[3]
        down = offset - lax.rem(token, jnp.int32(ROWS))
        down = jnp.where(down < 0, down + window, down)
        row = lax.broadcasted_iota(jnp.int32, (block_size, head_dim), 0)
        is_new = (row >= offset) & (row < offset + length)

        def merge(index: Array, _: None) -> None:
            which, head = lax.div(index, jnp.int32(num_kv_heads)), lax.rem(index, jnp.int32(num_kv_heads))
            moved = pltpu.roll(self.windows[slot, which, head].astype(jnp.float32), down, 0)[:block_size]
            old = self.blocks[slot, which, head].astype(jnp.float32)
            if self.rescaling is not None:
                old = old * self.rescaling.rows[slot, 0, index]
            merged = jnp.where(is_new, moved, old)
            if self.blocks.dtype == jnp.int8:
                merged = jnp.round(merged).astype(jnp.int32)
            self.blocks[slot, which, head] = merged.astype(self.blocks.dtype)

        lax.fori_loop(0, 2 * num_kv_heads, merge, None)
