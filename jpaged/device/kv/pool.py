"""The KV cache on the device: the block pool as a value, attention over it, and how many blocks fit in memory."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from jpaged.config import EngineConfig
from jpaged.device.step.inputs import StepInputs
from jpaged.models import ModelConfig
from jpaged.sharding import TENSOR_AXIS, pool_spec
from pallas_kernels import (
    best_implementation,
    block_pool_shape,
    copy_blocks,
    gather_blocks,
    paged_attention,
    scatter_blocks,
    write_kv,
)
from pallas_kernels.block_pool import why_not_write
from pallas_kernels.paged_attention import Choice, kernels_here, pool_rows, why_not_here, write_and_attend

WRITE_KERNEL_FROM = 256
"""Tokens of a step from which our kernel writes a layer's KV faster than XLA's scatter. In Llama-3-8B on an H200: of
2,048 tokens in 18 us instead of 37, of 256 in 4.3 instead of 7.5, of 16 no faster."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, repr=False)
class KVCache:
    """Keys and values of all layers in fixed-size blocks of one preallocated array.

    A value, not an object with state: every method that writes returns the new cache. Inside ``jax.jit``, donate the
    cache (``donate_argnums``) and writes happen in place.

    Args:
        pool: all blocks; its layout belongs to ``pallas_kernels.block_pool``. Block 0 is for padding.
    """

    pool: Float[Array, "num_blocks num_layers 2 num_kv_heads block_size head_dim"]

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
        """A cache of zeros. ``sharding`` spreads the pool over devices (see ``device.sharding``)."""
        shape = block_pool_shape(num_blocks, num_layers, num_kv_heads, block_size, head_dim)
        return cls(jnp.zeros(shape, dtype, device=sharding))

    def write(
        self,
        layer: int,
        k: Float[Array, "tokens num_kv_heads head_dim"],
        v: Float[Array, "tokens num_kv_heads head_dim"],
        slots: Int[Array, " tokens"],
        implementation: str | None = None,
    ) -> Self:
        """Store one layer's K and V of each token at its slot (``BlockManager.slots``); see ``write_kv``."""
        return type(self)(write_kv(self.pool, layer, k, v, slots, implementation=implementation))

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
        return paged_attention(q, self.pool, layer, block_tables, kv_lens, cu_q_lens, **options)

    def copy(self, src: Int[Array, " copies"], dst: Int[Array, " copies"]) -> Self:
        """Copy blocks (copy-on-write). All sources are read before any destination is written."""
        return type(self)(copy_blocks(self.pool, src, dst))

    def gather(self, blocks: Int[Array, " n"]) -> list[Float[Array, "num_layers 2 num_kv_heads block_size head_dim"]]:
        """Copies of some blocks, each an array of its own."""
        return list(gather_blocks(self.pool, blocks))

    def scatter(
        self,
        blocks: Int[Array, " n"],
        data: Sequence[Float[Array, "num_layers 2 num_kv_heads block_size head_dim"]],
    ) -> Self:
        """Overwrite some blocks, as ``gather`` returns them. Block 0 may occur any number of times, others once."""
        return type(self)(scatter_blocks(self.pool, blocks, jnp.stack(data)))


@dataclass(frozen=True)
class BlockMover:
    """Copies whole blocks, as ``KVCache`` does, but on TPUs by DMA, each device its own heads of them.

    There no block may be both a source and a destination, and block 0 stays as it is.
    """

    implementation: str
    interpret: bool = False
    num_devices: int = 1

    def copy(self, cache: KVCache, src: Int[Array, " copies"], dst: Int[Array, " copies"]) -> KVCache:
        """``KVCache.copy``."""
        if self.implementation != "pallas_tpu":
            return cache.copy(src, dst)
        run = self._run(copy_blocks, (pool_spec(), P(), P()), pool_spec())
        return KVCache(run(cache.pool, src, dst))

    def gather(
        self, cache: KVCache, blocks: Int[Array, " n"]
    ) -> list[Float[Array, "num_layers 2 num_kv_heads block_size head_dim"]]:
        """``KVCache.gather``."""
        if self.implementation != "pallas_tpu":
            return cache.gather(blocks)
        run = self._run(gather_blocks, (pool_spec(), P()), pool_spec())
        return list(run(cache.pool, blocks))

    def scatter(
        self,
        cache: KVCache,
        blocks: Int[Array, " n"],
        data: Sequence[Float[Array, "num_layers 2 num_kv_heads block_size head_dim"]],
    ) -> KVCache:
        """``KVCache.scatter``."""
        if self.implementation != "pallas_tpu":
            return cache.scatter(blocks, data)
        run = self._run(scatter_blocks, (pool_spec(), P(), pool_spec()), pool_spec())
        return KVCache(run(cache.pool, blocks, jnp.stack(data)))

    def _run(self, move: Callable[..., Array], in_specs: tuple[P, ...], out_specs: P) -> Callable[..., Array]:
        run = partial(move, implementation="pallas_tpu", interpret=self.interpret)
        if self.num_devices == 1:
            return run
        return jax.shard_map(run, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def _choose_writer(cache: KVCache, num_tokens: int) -> str | None:
    """The implementation of ``write_kv`` on a Hopper GPU; None is XLA's."""
    if num_tokens < WRITE_KERNEL_FROM or why_not_write(cache.pool, num_tokens) is not None:
        return None
    return "hopper"


class PagedAttend:
    """The ``attend`` a model calls in a step: store this layer's K/V, then attend to all of each sequence's context.

    Lives during one trace; ``cache`` is the newest value of the cache.
    """

    def __init__(
        self,
        cache: KVCache,
        inputs: StepInputs,
        implementation: str | None,
        *,
        interpret: bool = False,
        num_devices: int = 1,
    ):
        self.cache = cache
        self._inputs = inputs
        self._implementation = implementation
        self._interpret = interpret
        self._num_devices = num_devices
        runs_on_hopper = implementation == "hopper" and not interpret
        self._writer = _choose_writer(cache, inputs.slots.size) if runs_on_hopper else None
        self._out: Array | None = None  # of the layer before, whose output projection has read it

    def __call__(
        self,
        layer: int,
        q: Float[Array, "tokens num_heads head_dim"],
        k: Float[Array, "tokens num_kv_heads head_dim"],
        v: Float[Array, "tokens num_kv_heads head_dim"],
        *,
        sm_scale: float,
        sliding_window: int | None = None,
    ) -> Float[Array, "tokens num_heads head_dim"]:
        if self._implementation == "pallas_tpu":
            return self._write_and_attend(layer, q, k, v, sm_scale, sliding_window)
        inputs = self._inputs
        self.cache = self.cache.write(layer, k, v, inputs.slots, self._writer)
        self._out = self.cache.attend(
            layer,
            q,
            inputs.block_tables,
            inputs.kv_lens,
            inputs.cu_q_lens,
            sm_scale=sm_scale,
            sliding_window=sliding_window,
            into=self._out,
            implementation=self._implementation,
            interpret=self._interpret,
        )
        return self._out

    def _write_and_attend(
        self, layer: int, q: Array, k: Array, v: Array, sm_scale: float, sliding_window: int | None
    ) -> Float[Array, "tokens num_heads head_dim"]:
        """Both in one, as TPUs do it, each device with heads of its own.

        Where K and V go, the block tables say: ``slots`` is not asked.
        """
        inputs = self._inputs

        def run(q: Array, k: Array, v: Array, pool: Array, *rows: Array) -> tuple[Array, Array]:
            out, pool, _ = write_and_attend(
                q,
                k,
                v,
                pool,
                layer,
                *rows,
                sm_scale=sm_scale,
                sliding_window=sliding_window,
                is_decode=len(q) == len(inputs.kv_lens),
                interpret=self._interpret,
            )
            return out, pool

        if self._num_devices > 1:
            heads, pool, rows = P(None, TENSOR_AXIS), pool_spec(), P()
            specs = {"in_specs": (heads, heads, heads, pool, rows, rows, rows), "out_specs": (heads, pool)}
            run = jax.shard_map(run, **specs, check_vma=False)
        rows = inputs.block_tables, inputs.kv_lens, inputs.cu_q_lens
        out, pool = run(q, k, v, self.cache.pool, *rows)
        self.cache = type(self.cache)(pool)
        return out


def choose_attention(model: ModelConfig, config: EngineConfig, dtype: jax.typing.DTypeLike, num_devices: int) -> Choice:
    """The implementation of paged attention that a model's steps use, and why."""
    if config.attention_implementation is not None:
        return Choice(config.attention_implementation, "as asked")
    name = kernels_here()
    num_kv_heads, head_dim = pool_rows(_num_kv_heads(model, num_devices), model.head_dim, name, num_devices)
    pool = block_pool_shape(1, model.num_layers, num_kv_heads, config.block_size, head_dim)
    num_devices = 1 if name == "pallas_tpu" else num_devices  # PagedAttend splits these over devices itself
    case = why_not_here((1, model.num_heads, model.head_dim), jnp.dtype(dtype), pool, jnp.dtype(dtype))
    return best_implementation(case, num_devices)


def _num_kv_heads(model: ModelConfig, num_devices: int) -> int:
    """KV heads in the pool: as many as devices at least (``models.kv_copies``)."""
    return max(model.num_kv_heads, num_devices)


def block_shape(
    model: ModelConfig, config: EngineConfig, dtype: jax.typing.DTypeLike, attention: Choice, num_devices: int
) -> dict[str, Any]:
    """What a pool's shape and type are made of, but for the number of blocks: for ``block_bytes`` and ``allocate``."""
    num_kv_heads = _num_kv_heads(model, num_devices)
    num_kv_heads, head_dim = pool_rows(num_kv_heads, model.head_dim, attention.name, num_devices)
    return {
        "num_layers": model.num_layers,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "block_size": config.block_size,
        "dtype": dtype,
    }


def block_bytes(
    *, num_layers: int, num_kv_heads: int, head_dim: int, block_size: int, dtype: jax.typing.DTypeLike
) -> int:
    """Bytes of one block, over all devices."""
    shape = block_pool_shape(1, num_layers, num_kv_heads, block_size, head_dim)
    return math.prod(shape) * jnp.dtype(dtype).itemsize
