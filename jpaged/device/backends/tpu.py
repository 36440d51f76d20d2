"""The backend of TPUs: our ragged Pallas kernels, and DMA between blocks."""

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from jpaged.device.backends import Backend, HeadArrays, Rows, Unrotated
from jpaged.device.kv.pool import Blocks, KVCache
from jpaged.models.layers.moe import GroupedProduct, Weights
from jpaged.models.spec import LayerSpec
from jpaged.sharding import pool_spec
from pallas_kernels import write_and_attend
from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.paged_attention import pool_rows


class TpuBackend(Backend):
    """Kernels for TPUs, each device with heads of its own."""

    name: ClassVar[str] = "pallas_tpu"
    streams_by_dma: ClassVar[bool] = True

    def pool_heads(self, num_kv_heads: int, head_dim: int) -> tuple[int, int]:
        return pool_rows(num_kv_heads, head_dim, self.name, self.num_devices)

    def _attend_own_heads(
        self,
        spec: LayerSpec,
        cache: KVCache,
        q: Float[Array, "tokens num_heads head_dim"],
        k: Float[Array, "tokens num_kv_heads head_dim"],
        v: Float[Array, "tokens num_kv_heads head_dim"],
        rows: Rows,
        head_arrays: HeadArrays,
        into: Float[Array, "tokens num_heads head_dim"] | None,
        unrotated: Unrotated | None,
    ) -> tuple[Float[Array, "tokens num_heads head_dim"], KVCache]:
        del into, unrotated  # XLA chooses where results go, and no kernel rotates

        out, pool, kv_scales = write_and_attend(
            q,
            k,
            v,
            cache.pool,
            spec.layer,
            rows.block_tables,
            rows.kv_lens,
            rows.cu_q_lens,
            sm_scale=spec.sm_scale,
            sliding_window=spec.sliding_window,
            soft_cap=spec.soft_cap,
            sinks=head_arrays.sinks,
            alibi_slopes=head_arrays.alibi_slopes,
            kv_scales=cache.kv_scales,
            is_decode=len(q) == len(rows.kv_lens),
            interpret=self.interpret,
        )
        return out, KVCache(pool, kv_scales)

    def grouped_product(self, weights: Weights) -> GroupedProduct | None:
        del weights
        return partial(grouped_matmul, implementation="xla")  # one operation of XLA for TPUs

    def copy(self, cache: KVCache, src: Int[Array, " copies"], dst: Int[Array, " copies"]) -> KVCache:
        return self._move(KVCache.copy, (pool_spec(), P(), P()), pool_spec())(cache, src, dst)

    def gather(self, cache: KVCache, blocks: Int[Array, " n"]) -> Blocks:
        return self._move(KVCache.gather, (pool_spec(), P()), pool_spec())(cache, blocks)

    def scatter(self, cache: KVCache, blocks: Int[Array, " n"], data: Blocks) -> KVCache:
        return self._move(KVCache.scatter, (pool_spec(), P(), pool_spec()), pool_spec())(cache, blocks, data)

    def _move(self, move: Callable[..., Any], in_specs: tuple[P, ...], out_specs: P) -> Callable[..., Any]:
        run = partial(move, implementation=self.name, interpret=self.interpret)
        return self.on_each_device(run, in_specs, out_specs)
