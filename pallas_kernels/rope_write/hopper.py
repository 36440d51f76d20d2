"""Norms, rotation and write of a step's projected heads on Hopper GPUs, as a Pallas Mosaic GPU kernel.

XLA takes two or three kernels for this: they rotate queries, rotate keys, and write K and V. In a decode each of them
takes as long as its launch. Here a warpgroup takes some heads of one token: of its queries, its keys or its values.
Thread blocks share nothing.

The first and the second halves of the heads are two matrices, [heads, head_dim / 2], in one layout. So a thread has
both numbers of each pair that is rotated.
"""

import operator
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas.mosaic_gpu import Replicated, Tiling
from jaxtyping import Float, Int, Int32

from pallas_kernels import dispatch
from pallas_kernels.block_pool.layout import BlockPool, as_sides, shape_of
from pallas_kernels.chips import here
from pallas_kernels.chips.hopper import WARPGROUP, WARPS
from pallas_kernels.chips.memory import Ref
from pallas_kernels.norm import NormSpec
from pallas_kernels.rope_write.call import Angles, HeadNorms, num_heads_of

DTYPES = (jnp.bfloat16, jnp.float16)

VECTOR = 8
"""Elements that a thread loads at once: 16 bytes."""

LANES = WARPGROUP // WARPS

MOST_FEATURES = 256
"""Features of a head, at most."""


@dataclass(frozen=True)
class Tile:
    """The halves of some heads of a token, as matrices over a warpgroup.

    Args:
        num_heads: rows of a matrix, a power of two.
        half: its columns.
    """

    num_heads: int
    half: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.num_heads, self.half

    @property
    def layout(self) -> Any:
        """Neighbouring lanes share a row. Threads without a row of their own do the work of others too."""
        columns = _lanes_of_row(self.half)
        rows = min(self.num_heads, LANES // columns)
        warps, width = self.num_heads // rows, columns * VECTOR
        tiles: list[tuple[int, ...]] = [(self.num_heads, width)]
        if rows > 1 and warps > 1:
            tiles.append((rows, width))  # [warps, 1, rows, width]
        if columns > 1:
            tiles.append((VECTOR,))  # [..., columns, VECTOR]
        row_dim = -3 if columns > 1 else -2
        warp_dim = row_dim - 2 if rows > 1 else row_dim
        return plgpu.Layout.TILED(
            Tiling(tuple(tiles)),
            warp_dims=_spread({warp_dim: warps}, WARPS),
            lane_dims=_spread({row_dim: rows, -2: columns} if columns > 1 else {row_dim: rows}, LANES),
            vector_dim=-1,
        )


def _spread(dims: dict[int, int], num_threads: int) -> tuple[int | Replicated, ...]:
    """Dimensions, with their sizes, over lanes or warps, each number of them in as many copies as there are left."""
    spread: list[int | Replicated] = [dim for dim, size in dims.items() if size > 1]
    for size in dims.values():
        num_threads //= size
    return tuple(spread if num_threads == 1 else [Replicated(num_threads), *spread])


def _lanes_of_row(half: int) -> int:
    """Lanes that share a row: a power of two, which divides the vectors of the row."""
    vectors = half // VECTOR
    return min(vectors & -vectors, LANES)


def _tile(num_heads: int, half: int) -> Tile:
    """The largest tile that the heads divide into, and that a thread has one vector of in each column."""
    return Tile(min(num_heads & -num_heads, WARPGROUP // _lanes_of_row(half)), half)


@dataclass(frozen=True)
class RopeWriteShape:
    """The static properties of a launch."""

    num_layers: int
    num_blocks: int
    block_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_tokens: int
    num_summands: int
    dtype: jnp.dtype

    @property
    def half(self) -> int:
        return self.head_dim // 2

    @property
    def q_tile(self) -> Tile:
        return _tile(self.num_heads, self.half)

    @property
    def kv_tile(self) -> Tile:
        return _tile(self.num_kv_heads, self.half)

    @property
    def num_q_tiles(self) -> int:
        return self.num_heads // self.q_tile.num_heads

    @property
    def num_k_tiles(self) -> int:
        """Tiles of K, and also those of V."""
        return self.num_kv_heads // self.kv_tile.num_heads


def why_not_rope_write(head_dim: int, rotary_dim: int, dtype: jnp.dtype, pool_dtype: jnp.dtype) -> str | None:
    """The reason why the kernel cannot take such heads, whatever the device; None if it can.

    Args:
        head_dim: features of a head.
        rotary_dim: features of it that are rotated.
        dtype: type of the heads.
        pool_dtype: type of the pool.
    """
    if dtype not in DTYPES:
        return f"heads of {jnp.dtype(dtype).name}: the kernel takes bfloat16 and float16"
    if pool_dtype != dtype:
        return f"a pool of {jnp.dtype(pool_dtype).name}: the kernel writes heads in their own type, {jnp.dtype(dtype)}"
    if head_dim % (2 * VECTOR) or head_dim > MOST_FEATURES:
        return f"head_dim={head_dim}: expected a multiple of {2 * VECTOR}, and at most {MOST_FEATURES}"
    if rotary_dim != head_dim:
        return f"{rotary_dim} of {head_dim} features of a head are rotated: the kernel rotates all"
    return None


def rope_write_hopper(
    pool: BlockPool,
    layer: int,
    projected: Float[Array, "summands tokens features"],
    angles: Angles,
    slots: Int[Array, " tokens"],
    norms: HeadNorms | None = None,
    *,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> tuple[Float[Array, "tokens num_heads head_dim"], BlockPool]:
    """Norm, rotate and write; arguments and result as for ``rope_write``, which checks shapes.

    Args:
        interpret: settings of Pallas's interpreter for Mosaic GPU; None runs on a GPU.

    Raises:
        NotImplementedError: heads, a pool or a device that the kernel does not take.
    """
    in_pool = shape_of(pool)
    num_summands, num_tokens, num_features = projected.shape
    shape = RopeWriteShape(
        num_layers=in_pool.num_layers,
        num_blocks=in_pool.num_blocks,
        block_size=in_pool.block_size,
        num_heads=num_heads_of(pool, num_features),
        num_kv_heads=in_pool.num_kv_heads,
        head_dim=in_pool.head_dim,
        num_tokens=num_tokens,
        num_summands=num_summands,
        dtype=jnp.dtype(pool.dtype),
    )
    dtype = shape.dtype if num_summands > 1 else projected.dtype
    reason = why_not_rope_write(shape.head_dim, 2 * angles[0].shape[1], dtype, shape.dtype)
    dispatch.refuse(reason or (None if interpret else here.why_no_hopper()), "norm, rotate and write in plain JAX")
    # The layer is an operand, so that all layers share one compiled kernel.
    return _rope_write(pool, jnp.int32(layer), projected, angles, slots, norms, shape=shape, interpret=interpret)


@partial(jax.jit, static_argnames=("shape", "interpret"))
def _rope_write(
    pool: BlockPool,
    layer: Int32[Array, ""],
    projected: Float[Array, "summands tokens features"],
    angles: Angles,
    slots: Int[Array, " tokens"],
    norms: HeadNorms | None,
    *,
    shape: RopeWriteShape,
    interpret: plgpu.InterpretGPUParams | None,
) -> tuple[Float[Array, "tokens num_heads head_dim"], BlockPool]:
    scales = () if norms is None else (norms.q_scale, norms.k_scale)
    sides = jax.new_ref(as_sides(pool))

    def body(projected: Ref, cos: Ref, sin: Ref, slots: Ref, layer: Ref, sides: Ref, *refs: Ref) -> None:
        *scale_refs, queries = refs
        q_scale, k_scale = scale_refs or (None, None)
        token, tile = lax.axis_index("token"), lax.axis_index("tile")
        slot, first_side = slots[token], 2 * layer[0]

        def rotated(tile: Tile, first_head: Array, scale: Ref | None) -> list[Array]:
            # All loads come before any arithmetic: a warpgroup has no other work while loads are in flight.
            loaded = _load(shape, tile, projected, token, first_head)
            angles = [_of_columns(tile, ref.at[token]) for ref in (cos, sin)]
            scales = [] if scale is None else [_of_columns(tile, half) for half in _halves(tile, scale)]
            halves = _summed(loaded, shape.dtype)
            return _rotated(halves if norms is None else _normed(tile, halves, scales, norms.spec), *angles)

        @pl.when(tile < shape.num_q_tiles)
        def _queries() -> None:
            first_head = tile * shape.q_tile.num_heads
            _store(
                shape.q_tile,
                queries.at[token, pl.ds(first_head, shape.q_tile.num_heads)],
                rotated(shape.q_tile, first_head, q_scale),
            )

        def write(which: int, first_head: Array, halves: list[Array]) -> None:
            @pl.when((slot >= shape.block_size) & (slot < shape.num_blocks * shape.block_size))
            def _in_pool() -> None:
                block, offset = lax.div(slot, jnp.int32(shape.block_size)), lax.rem(slot, jnp.int32(shape.block_size))
                side = block * (2 * shape.num_layers) + first_side + which
                heads = pl.ds(first_head, shape.kv_tile.num_heads)
                _store(shape.kv_tile, sides.at[side, heads, offset], halves)

        first_k_tile, first_v_tile = shape.num_q_tiles, shape.num_q_tiles + shape.num_k_tiles

        @pl.when((tile >= first_k_tile) & (tile < first_v_tile))
        def _keys() -> None:
            first_head = (tile - first_k_tile) * shape.kv_tile.num_heads
            write(0, first_head, rotated(shape.kv_tile, shape.num_heads + first_head, k_scale))

        @pl.when(tile >= first_v_tile)
        def _values() -> None:
            first_head = (tile - first_v_tile) * shape.kv_tile.num_heads
            first_row = shape.num_heads + shape.num_kv_heads + first_head
            write(1, first_head, _summed(_load(shape, shape.kv_tile, projected, token, first_row), shape.dtype))

    queries = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((shape.num_tokens, shape.num_heads, shape.head_dim), shape.dtype),
        grid=(shape.num_q_tiles + 2 * shape.num_k_tiles, shape.num_tokens),
        grid_names=("tile", "token"),
        num_threads=1,
        thread_name="warpgroup",
        kernel_name="rope_write",
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),  # threads share nothing but sums of lanes
        interpret=interpret,
    )(
        projected.reshape(*projected.shape[:2], -1, shape.head_dim),
        *angles,
        slots.astype(jnp.int32),
        layer.reshape(1),
        sides,
        *scales,
    )
    return queries, sides[...].reshape(pool.shape)


def _halves(tile: Tile, row: Ref) -> list[Ref]:
    """The two halves of the features of heads [heads, head_dim], or of a single one."""
    heads = (slice(None),) * (row.ndim - 1)
    return [row.at[*heads, pl.ds(start, tile.half)] for start in (0, tile.half)]


def _load(shape: RopeWriteShape, tile: Tile, projected: Ref, token: Array, first_head: Array) -> list[list[Array]]:
    """The summands of both halves of some heads."""
    heads = pl.ds(first_head, tile.num_heads)
    rows = [_halves(tile, projected.at[summand, token, heads]) for summand in range(shape.num_summands)]
    return [[plgpu.load(half, layout=tile.layout, optimized=False) for half in halves] for halves in rows]


def _summed(loaded: list[list[Array]], dtype: jnp.dtype) -> list[Array]:
    return [reduce(operator.add, summands).astype(dtype) for summands in zip(*loaded, strict=True)]


def _of_columns(tile: Tile, row: Ref) -> Array:
    """A row of numbers, one for each column of a half, as a matrix of equal rows."""
    columns = plgpu.load(row, layout=tile.layout.reduce(0), optimized=False)
    return _broadcast(tile, columns.astype(jnp.float32), 1)


def _broadcast(tile: Tile, x: Array, dim: int) -> Array:
    return plgpu.layout_cast(lax.broadcast_in_dim(x, tile.shape, (dim,)), tile.layout)


def _normed(tile: Tile, halves: list[Array], scales: list[Array], spec: NormSpec) -> list[Array]:
    """The root-mean-square norm of each head."""
    dtype = halves[0].dtype
    first, second = (half.astype(jnp.float32) for half in halves)
    mean_square = jnp.sum(first * first + second * second, axis=1) * (1 / (2 * tile.half))
    factor = _broadcast(tile, lax.rsqrt(mean_square + spec.epsilon), 0)
    normed = [half * factor for half in (first, second)]
    if not spec.is_wide:
        normed = [half.astype(dtype).astype(jnp.float32) for half in normed]
    if spec.offset:
        scales = [scale + spec.offset for scale in scales]
    return [(half * scale).astype(dtype) for half, scale in zip(normed, scales, strict=True)]


def _rotated(halves: list[Array], cos: Array, sin: Array) -> list[Array]:
    dtype = halves[0].dtype
    first, second = (half.astype(jnp.float32) for half in halves)
    return [(first * cos - second * sin).astype(dtype), (second * cos + first * sin).astype(dtype)]


def _store(tile: Tile, heads: Ref, halves: list[Array]) -> None:
    for ref, half in zip(_halves(tile, heads), halves, strict=True):
        if hasattr(plgpu, "store"):
            plgpu.store(ref, half, optimized=False)
        else:  # JAX 0.11, whose plain stores are such
            ref[...] = half
