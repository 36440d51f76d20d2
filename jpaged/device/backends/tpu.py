"""The backend of TPUs: our ragged Pallas kernel, and DMA between blocks."""

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from jpaged.device.backends import Backend, HeadArrays, Rows
from jpaged.device.kv.pool import Block, KVCache, pack_blocks, unpack_blocks
from jpaged.models.spec import LayerSpec
from jpaged.sharding import TENSOR_AXIS, pool_spec
from pallas_kernels import copy_blocks, gather_blocks, scatter_blocks
from pallas_kernels.block_pool_tpu import (
    copy_blocks_tpu,
    gather_blocks_tpu,
    scatter_blocks_tpu,
    write_kv_quantized_tpu,
)
from pallas_kernels.paged_attention import INTERPRETERS, pool_rows
from pallas_kernels.paged_attention.tpu import attend_tpu, to_lanes, write_and_attend_tpu
from pallas_kernels.paged_attention.tpu.batch import layout_of_pool


class TpuBackend(Backend):
    """Kernels for TPUs, each device with heads of its own."""

    name: ClassVar[str] = "pallas_tpu"

    def pool_heads(self, num_kv_heads: int, head_dim: int) -> tuple[int, int]:
        return pool_rows(num_kv_heads, head_dim, self.name, self.num_devices)

    def attend(
        self,
        cache: KVCache,
        spec: LayerSpec,
        q: Float[Array, "tokens num_heads head_dim"],
        k: Float[Array, "tokens num_kv_heads head_dim"],
        v: Float[Array, "tokens num_kv_heads head_dim"],
        rows: Rows,
        head_arrays: HeadArrays,
        into: Float[Array, "tokens num_heads head_dim"] | None,
    ) -> tuple[Float[Array, "tokens num_heads head_dim"], KVCache]:
        del into  # XLA chooses where results go
        run = self._attend_quantized if cache.kv_scales is not None else self._write_and_attend
        heads, pool, per_head = P(None, TENSOR_AXIS), pool_spec(), P(TENSOR_AXIS)
        in_specs = (pool, heads, heads, heads, P(), per_head)
        run = self.on_each_device(partial(run, spec), in_specs, (heads, pool))
        return run(cache, q, k, v, rows, head_arrays)

    def _write_and_attend(
        self, spec: LayerSpec, cache: KVCache, q: Array, k: Array, v: Array, rows: Rows, head_arrays: HeadArrays
    ) -> tuple[Array, KVCache]:
        """Both in one kernel, to which the block tables say where K and V go."""
        out, pool = write_and_attend_tpu(
            q,
            k,
            v,
            cache.pool,
            spec.layer,
            rows.block_tables,
            rows.kv_lens,
            rows.cu_q_lens,
            is_decode=len(q) == len(rows.kv_lens),
            **self._options(spec, head_arrays),
        )
        return out, KVCache(pool)

    def _attend_quantized(
        self, spec: LayerSpec, cache: KVCache, q: Array, k: Array, v: Array, rows: Rows, head_arrays: HeadArrays
    ) -> tuple[Array, KVCache]:
        assert cache.kv_scales is not None
        num_kv_heads = k.shape[1]
        layout = layout_of_pool(q.shape[2], cache.pool, num_kv_heads)
        k, v = (to_lanes(x, layout) for x in (k, v))
        pool, kv_scales = write_kv_quantized_tpu(
            cache.pool, cache.kv_scales, spec.layer, k, v, rows.slots, interpret=self._interpreter
        )
        out = attend_tpu(
            q,
            pool,
            spec.layer,
            rows.block_tables,
            rows.kv_lens,
            rows.cu_q_lens,
            kv_scales=kv_scales,
            num_kv_heads=num_kv_heads,
            **self._options(spec, head_arrays),
        )
        return out, KVCache(pool, kv_scales)

    def _options(self, spec: LayerSpec, head_arrays: HeadArrays) -> dict[str, Any]:
        return {
            "sm_scale": spec.sm_scale,
            "sliding_window": spec.sliding_window,
            "soft_cap": spec.soft_cap,
            "sinks": head_arrays.sinks,
            "alibi_slopes": head_arrays.alibi_slopes,
            "interpret": self._interpreter,
        }

    def copy(self, cache: KVCache, src: Int[Array, " copies"], dst: Int[Array, " copies"]) -> KVCache:
        def run(cache: KVCache, src: Array, dst: Array) -> KVCache:
            pool = copy_blocks_tpu(cache.pool, src, dst, interpret=self._interpreter)
            scales = cache.kv_scales
            return KVCache(pool, None if scales is None else copy_blocks(scales, src, dst))

        return self.on_each_device(run, (pool_spec(), P(), P()), pool_spec())(cache, src, dst)

    def gather(self, cache: KVCache, blocks: Int[Array, " n"]) -> list[Block]:
        def run(cache: KVCache, blocks: Array) -> Array:
            gathered = gather_blocks_tpu(cache.pool, blocks, interpret=self._interpreter)
            if cache.kv_scales is None:
                return gathered
            return pack_blocks(gathered, gather_blocks(cache.kv_scales, blocks))

        return list(self.on_each_device(run, (pool_spec(), P()), pool_spec())(cache, blocks))

    def scatter(self, cache: KVCache, blocks: Int[Array, " n"], data: Sequence[Block]) -> KVCache:
        def run(cache: KVCache, blocks: Array, data: Array) -> KVCache:
            scales = cache.kv_scales
            if scales is not None:
                data, scales_of_blocks = unpack_blocks(data, cache.pool)
                scales = scatter_blocks(scales, blocks, scales_of_blocks)
            return KVCache(scatter_blocks_tpu(cache.pool, blocks, data, interpret=self._interpreter), scales)

        run = self.on_each_device(run, (pool_spec(), P(), pool_spec()), pool_spec())
        return run(cache, blocks, jnp.stack(data))

    @property
    def _interpreter(self) -> Any:
        return INTERPRETERS[self.name]() if self.interpret else None
