"""Writes into the block pool on TPUs, and moves its blocks, by DMA: the operations of block_pool.py as Pallas kernels.

A pool's memory is tiled: what a copy writes of a block is whole rows of registers. So a token's K and V are merged in
VMEM with the block they belong to, and the block is written back. Blocks are moved as they are, from HBM to HBM.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Float, Float32, Int

from pallas_kernels.block_pool import (
    BlockIds,
    BlockPool,
    Blocks,
    KvScales,
    block_size_of,
    check_kv_scales,
    is_quantized,
    num_kv_heads_of,
    quantize,
)

type Ref = Any
"""A reference inside a kernel: JAX's own types for those are not what its functions take."""

WRITE_BUFFERS = 3
"""Blocks in VMEM: one on its way in, one merged, one on its way out."""

COPIES_IN_FLIGHT = 16
"""Moves of blocks under way: enough to hide what each takes to start."""

ROWS = 16
"""Where tokens can be copied from: whole registers of 16-bit rows, and so of 32-bit ones."""

LANES = 128
"""Elements in a row of a vector register, on every generation."""

MOST_TOKENS = 16 * 1024
"""Tokens of one launch: SMEM, of 1 MiB on every generation, holds 16 bytes for each."""


class Pieces(NamedTuple):
    """A piece is a stretch of a step's tokens whose slots follow one another in one block. ``count`` are real."""

    fields: Int[Array, " four_times_tokens"]  # block, first offset, first token, tokens of each
    count: Int[Array, ""]


def write_kv_tpu(
    pool: BlockPool,
    layer: int | Int[Array, ""],
    k: Float[Array, "tokens num_kv_heads head_dim"],
    v: Float[Array, "tokens num_kv_heads head_dim"],
    slots: Int[Array, " tokens"],
    *,
    interpret: pltpu.InterpretParams | None = None,
) -> BlockPool:
    """Store one layer's K and V of this step's tokens; arguments and result as for ``write_kv``, which checks shapes.

    The tokens of a block follow one another, in ascending order, as those of a sequence do. Block 0 stays as it is:
    the padding tokens that have slots there are not written.

    Args:
        interpret: run in Pallas's interpreter for TPUs instead of on one.

    Raises:
        NotImplementedError: a pool that the kernel does not write.
    """
    if is_quantized(pool.dtype) or pool.dtype == jnp.float16:
        raise NotImplementedError(f"a pool of {pool.dtype}: the kernel writes bfloat16 and float32")
    if k.size == 0:
        return pool
    kv = jnp.stack([k, v], axis=1).astype(pool.dtype)
    return _write_in_turns(pool, layer, kv, None, slots, interpret)


def write_kv_quantized_tpu(
    pool: BlockPool,
    kv_scales: KvScales,
    layer: int | Int[Array, ""],
    k: Float[Array, "tokens num_kv_heads head_dim"],
    v: Float[Array, "tokens num_kv_heads head_dim"],
    slots: Int[Array, " tokens"],
    *,
    interpret: pltpu.InterpretParams | None = None,
) -> tuple[BlockPool, KvScales]:
    """Store one layer's K and V of this step's tokens in a quantised pool, as ``write_kv_quantized``.

    XLA finds the scales and rounds what is new; the kernel brings what its blocks hold to their new scales. (XLA's own
    gather and scatter of 8-bit numbers want another layout on TPUs, and would copy the pool.) Slots as for
    ``write_kv_tpu``.

    Args:
        interpret: run in Pallas's interpreter for TPUs instead of on one.

    Raises:
        ValueError: the pool is not quantised, or the scales are not its own.
    """
    check_kv_scales(pool, kv_scales)
    if k.size == 0:
        return pool, kv_scales
    stored, kv_scales, old, new = quantize(pool, kv_scales, layer, k, v, slots)
    ratios = jnp.where((old > 0) & (new > old), old / new, 1)
    # bfloat16 holds 8-bit numbers exactly.
    return _write_in_turns(pool, layer, stored.astype(jnp.bfloat16), ratios, slots, interpret), kv_scales


def _write_in_turns(
    pool: BlockPool,
    layer: int | Int[Array, ""],
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
    """The pieces of a step's tokens, first to last."""
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
    block_size, num_kv_heads, head_dim = block_size_of(pool), num_kv_heads_of(pool), pool.shape[5]
    pieces = pieces_of(slots, block_size, pool.shape[0])
    window = -(-block_size // ROWS) * ROWS + ROWS
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
        *of_ratios, _, pool, blocks, windows, landed, window_landed, left = refs[: len(given) + 6]
        rescaling = _Rescaling(*of_ratios, *refs[len(given) + 6 :]) if of_ratios else None
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
    )(jnp.stack([layer, pieces.count]), pieces.fields, *given, pool)


class _Rescaling(NamedTuple):
    """By what a quantised pool's blocks are multiplied, of each K head, then each V head."""

    ratios: Ref  # [tokens, 1, lanes] f32 in HBM
    rows: Ref  # [WRITE_BUFFERS, 1, lanes] f32 in SMEM
    landed: Ref


@dataclass(frozen=True)
class _Writer:
    """The writes of all pieces: the next block arrives while one is merged and the last one leaves."""

    layer: Array
    fields: Ref  # [4 * pieces] i32 in SMEM
    new: Ref  # [2, num_kv_heads, tokens, head_dim] in HBM
    pool: Ref
    blocks: Ref  # [WRITE_BUFFERS, 2, num_kv_heads, block_size, head_dim]
    windows: Ref  # [WRITE_BUFFERS, 2, num_kv_heads, window, head_dim]: the piece's tokens, and some around them
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
        """Put the piece's tokens into their rows of the block. Rows move as float32, which holds all types exactly."""
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


def copy_blocks_tpu(
    pool: BlockPool, src: BlockIds, dst: BlockIds, *, interpret: pltpu.InterpretParams | None = None
) -> BlockPool:
    """Copy whole blocks within the pool; arguments and result as for ``copy_blocks``.

    No block is both a source and a destination but block 0, which stays as it is.
    """
    num_blocks = pool.shape[0]

    def copy(index: Array, src: Ref, dst: Ref, pool: Ref) -> _Move:
        return _Move(dst[index], pool.at[_clip(src[index], num_blocks)], pool.at[_clip(dst[index], num_blocks)])

    return _into_pool(pool, (src, dst), (), copy, "copy_blocks", interpret)


def gather_blocks_tpu(pool: BlockPool, blocks: BlockIds, *, interpret: pltpu.InterpretParams | None = None) -> Blocks:
    """Whole blocks in the order asked for, as ``gather_blocks``."""
    num_blocks = pool.shape[0]

    def body(blocks: Ref, pool: Ref, out: Ref, semaphores: Ref) -> None:
        def move(index: Array) -> _Move:
            return _Move(jnp.int32(1), pool.at[_clip(blocks[index], num_blocks)], out.at[index])

        _run_moves(blocks.shape[0], move, semaphores, num_blocks)

    return _call(body, (blocks,), (pool,), (len(blocks), *pool.shape[1:]), {}, "gather_blocks", interpret)


def scatter_blocks_tpu(
    pool: BlockPool, blocks: BlockIds, data: Blocks, *, interpret: pltpu.InterpretParams | None = None
) -> BlockPool:
    """Overwrite whole blocks; arguments and result as for ``scatter_blocks``. Block 0 stays as it is."""
    num_blocks = pool.shape[0]

    def copy(index: Array, blocks: Ref, data: Ref, pool: Ref) -> _Move:
        return _Move(blocks[index], data.at[index], pool.at[_clip(blocks[index], num_blocks)])

    return _into_pool(pool, (blocks,), (data.astype(pool.dtype),), copy, "scatter_blocks", interpret)


class _Move(NamedTuple):
    """A block's move, made if its destination is one of the pool's blocks but block 0."""

    destination: Array
    source: Ref
    target: Ref


def _clip(block: Array, num_blocks: int) -> Array:
    return jnp.clip(block, 0, num_blocks - 1)


def _into_pool(
    pool: BlockPool,
    ids: tuple[BlockIds, ...],
    data: tuple[Blocks, ...],
    copy: Callable[..., _Move],
    name: str,
    interpret: pltpu.InterpretParams | None,
) -> BlockPool:
    def body(*refs: Ref) -> None:
        *given, _, out, semaphores = refs
        _run_moves(ids[0].size, lambda index: copy(index, *given, out), semaphores, pool.shape[0])

    aliases = {len(ids) + len(data): 0}
    return _call(body, ids, (*data, pool), pool.shape, aliases, name, interpret)


def _run_moves(count: int, move_of: Callable[[Array], _Move], semaphores: Ref, num_blocks: int) -> None:
    """Make all moves, a few at a time."""

    def copy(index: Array) -> tuple[Array, Any]:
        move = move_of(index)
        is_made = (move.destination > 0) & (move.destination < num_blocks)
        return is_made, pltpu.make_async_copy(
            move.source, move.target, semaphores.at[lax.rem(index, jnp.int32(COPIES_IN_FLIGHT))]
        )

    def start(index: Array) -> None:
        is_made, made = copy(index)
        pl.when(is_made)(lambda: made.start())

    def wait(index: Array) -> None:
        is_made, made = copy(index)
        pl.when(is_made)(lambda: made.wait())

    def step(index: Array, _: None) -> None:
        pl.when(index >= COPIES_IN_FLIGHT)(lambda: wait(index - COPIES_IN_FLIGHT))
        start(index)

    lax.fori_loop(0, count, step, None)
    lax.fori_loop(max(count - COPIES_IN_FLIGHT, 0), count, lambda index, _: wait(index), None)


def _call(
    body: Callable[..., None],
    ids: tuple[BlockIds, ...],
    arrays: tuple[Array, ...],
    shape: tuple[int, ...],
    aliases: dict[int, int],
    name: str,
    interpret: pltpu.InterpretParams | None,
) -> Array:
    if ids[0].size == 0:
        return arrays[-1] if aliases else jnp.zeros(shape, arrays[-1].dtype)
    return pl.pallas_call(
        body,
        out_shape=jax.ShapeDtypeStruct(shape, arrays[-1].dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(ids),
            grid=(),
            in_specs=[pl.BlockSpec(memory_space=pl.ANY)] * len(arrays),
            out_specs=pl.BlockSpec(memory_space=pl.ANY),
            scratch_shapes=[pltpu.SemaphoreType.DMA((COPIES_IN_FLIGHT,))],
        ),
        input_output_aliases=aliases,
        interpret=interpret or False,
        name=name,
    )(*(x.astype(jnp.int32) for x in ids), *arrays)
