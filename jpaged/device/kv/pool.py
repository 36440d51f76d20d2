"""The KV cache on the device: the block pool as a value, and attention over it."""

from dataclasses import dataclass
from functools import partial
from typing import Self

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int, Real, UInt, UInt8

from jpaged.sharding import check_axes
from pallas_kernels import (
    block_pool_shape,
    copy_blocks,
    gather_blocks,
    is_quantized,
    kv_scales_shape,
    paged_attention,
    scatter_blocks,
    write_kv,
    write_kv_quantized,
)
from pallas_kernels.block_pool.layout import as_blocks, as_layers, shape_of
from pallas_kernels.rope_write import HeadNorms, rope_write

Blocks = (
    UInt[Array, "n num_layers 2 num_kv_heads block_size head_dim"] | UInt8[Array, "n num_layers 2 num_kv_heads bytes"]
)
"""Blocks outside of a pool: their bits. A quantised block is bytes, its scales among them."""

SCALE_BYTES = 4


@jax.tree_util.register_dataclass
@dataclass(frozen=True, repr=False)
class KVCache:
    """Keys and values of all layers in fixed-size blocks of one preallocated array.

    A value, not an object with state: every method that writes returns the new cache. Inside ``jax.jit``, donate the
    cache (``donate_argnums``) and writes happen in place.

    Args:
        pool: all blocks; its layout belongs to ``pallas_kernels.block_pool``. Block 0 is for padding.
        kv_scales: scales of a pool of float8_e4m3fn or int8; None for a pool of another type. A block's scale grows
            with its tokens. A block written in one piece and a block written token by token may differ, within the
            error of the type. Copies of a block keep its bits.
    """

    pool: Real[Array, "num_blocks num_layers 2 num_kv_heads block_size head_dim"]
    kv_scales: Float32[Array, "num_blocks num_layers 2 num_kv_heads"] | None = None

    @property
    def block_size(self) -> int:
        """Tokens of a block."""
        return shape_of(self.pool).block_size

    def as_layers(self) -> Self:
        """The cache as one layer: layer l of block b is block ``b * num_layers + l``. The same memory."""
        return jax.tree.map(as_layers, self)

    def as_blocks(self, num_layers: int) -> Self:
        """Undo ``as_layers``."""
        return jax.tree.map(lambda layers: as_blocks(layers, num_layers), self)

    def __repr__(self) -> str:
        return f"KVCache(pool={self.pool.dtype}{list(self.pool.shape)})"

    @classmethod
    def allocate(
        cls,
        *,
        num_blocks: int,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        block_size: int = 16,
        dtype: jax.typing.DTypeLike = jnp.float32,
        sharding: jax.sharding.Sharding | None = None,
    ) -> Self:
        """A cache of zeros, with scales if ``dtype`` is 8-bit.

        Args:
            sharding: spreads the pool over devices (``pool_sharding``), and its scales alike.

        Raises:
            ValueError: a mesh whose axes are not Auto.
        """
        check_axes(sharding)
        shape = block_pool_shape(num_blocks, num_layers, num_kv_heads, block_size, head_dim)
        pool = jnp.zeros(shape, dtype, device=sharding)
        if not is_quantized(dtype):
            return cls(pool)
        shape = kv_scales_shape(num_blocks, num_layers, num_kv_heads)
        return cls(pool, jnp.zeros(shape, jnp.float32, device=sharding))

    def write(
        self,
        layer: int,
        k: Float[Array, "tokens num_kv_heads head_dim"],
        v: Float[Array, "tokens num_kv_heads head_dim"],
        slots: Int[Array, " tokens"],
        implementation: str | None = None,
    ) -> Self:
        """Store one layer's K and V of each token at its slot (``BlockManager.slots``).

        Args:
            layer: index of the layer.
            k, v: K and V of the tokens, in any float type.
            slots: as ``write_kv`` takes them.
            implementation: implementation of ``write_kv``, or of ``write_kv_quantized``.

        Raises:
            ValueError: the pool has no such layer, or the shapes do not fit the pool.
        """
        if self.kv_scales is None:
            return type(self)(write_kv(self.pool, layer, k, v, slots, implementation=implementation))
        written = write_kv_quantized(self.pool, self.kv_scales, layer, k, v, slots, implementation=implementation)
        return type(self)(*written)

    def rope_write(
        self,
        layer: int,
        projected: Float[Array, "summands tokens features"],
        angles: tuple[Float32[Array, "tokens half"], Float32[Array, "tokens half"]],
        slots: Int[Array, " tokens"],
        norms: HeadNorms | None,
    ) -> tuple[Float[Array, "tokens num_heads head_dim"], Self]:
        """``pallas_kernels.rope_write`` into this cache, which is not quantised."""
        q, pool = rope_write(self.pool, layer, projected, angles, slots, norms)
        return q, type(self)(pool)

    def attend(
        self,
        layer: int,
        q: Float[Array, "tokens num_heads head_dim"],
        block_tables: Int[Array, "num_seqs max_blocks"],
        kv_lens: Int[Array, " num_seqs"],
        cu_q_lens: Int[Array, " num_seqs_plus_1"],
        **options,
    ) -> Float[Array, "tokens num_heads head_dim"]:
        """``pallas_kernels.paged_attention`` over this cache; ``options`` are its keyword arguments."""
        options.setdefault("kv_scales", self.kv_scales)
        return paged_attention(q, self.pool, layer, block_tables, kv_lens, cu_q_lens, **options)

    def copy(
        self,
        src: Int[Array, " copies"],
        dst: Int[Array, " copies"],
        implementation: str | None = None,
        *,
        interpret: bool = False,
    ) -> Self:
        """Copy blocks (copy-on-write), as ``copy_blocks`` does with the pool and with its scales."""
        run = partial(copy_blocks, implementation=implementation, interpret=interpret)
        return jax.tree.map(lambda array: run(array, src, dst), self)

    def gather(self, blocks: Int[Array, " n"], implementation: str | None = None, *, interpret: bool = False) -> Blocks:
        """The bits of some blocks, as ``gather_blocks`` copies them."""
        gathered = gather_blocks(self.pool, blocks, implementation=implementation, interpret=interpret)
        if self.kv_scales is not None:
            return pack_blocks(gathered, gather_blocks(self.kv_scales, blocks))
        return lax.bitcast_convert_type(gathered, bits_of(gathered.dtype))

    def scatter(
        self,
        blocks: Int[Array, " n"],
        data: Blocks,
        implementation: str | None = None,
        *,
        interpret: bool = False,
    ) -> Self:
        """Overwrite some blocks, as ``gather`` returns them. Block 0 may occur any number of times, others once."""
        run = partial(scatter_blocks, implementation=implementation, interpret=interpret)
        if self.kv_scales is None:
            return type(self)(run(self.pool, blocks, lax.bitcast_convert_type(data, self.pool.dtype)))
        stored, scales = unpack_blocks(data, self.pool.dtype, self.pool.shape[1:])
        return type(self)(run(self.pool, blocks, stored), run(self.kv_scales, blocks, scales))


def bits_of(dtype: jax.typing.DTypeLike) -> jnp.dtype:
    """The unsigned integer type of the same size."""
    return jnp.dtype(f"uint{8 * jnp.dtype(dtype).itemsize}")


def pack_blocks(
    stored: Real[Array, "n num_layers 2 num_kv_heads block_size head_dim"],
    kv_scales: Float32[Array, "n num_layers 2 num_kv_heads"],
) -> UInt8[Array, "n num_layers 2 num_kv_heads bytes"]:
    """Quantised blocks with their scales in one array, the four bytes of a head's scale after what the head stores.

    A copy between device and host costs about as much for each array as for a MiB. So scales travel with their block.
    """
    values = lax.bitcast_convert_type(stored, jnp.uint8).reshape(*stored.shape[:4], -1)
    return jnp.concatenate([values, lax.bitcast_convert_type(kv_scales, jnp.uint8)], axis=-1)


def unpack_blocks(
    packed: UInt8[Array, "n num_layers 2 num_kv_heads bytes"], dtype: jax.typing.DTypeLike, shape: tuple[int, ...]
) -> tuple[
    Real[Array, "n num_layers 2 num_kv_heads block_size head_dim"], Float32[Array, "n num_layers 2 num_kv_heads"]
]:
    """Undo ``pack_blocks``: the stored values and the scales of blocks of this type and shape."""
    values, scales = packed[..., :-SCALE_BYTES], packed[..., -SCALE_BYTES:]
    stored = lax.bitcast_convert_type(values, jnp.dtype(dtype)).reshape(len(packed), *shape)
    return stored, lax.bitcast_convert_type(scales, jnp.float32)
