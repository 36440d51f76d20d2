"""The backend of NVIDIA Hopper GPUs: our Mosaic GPU kernels."""

from functools import partial
from typing import ClassVar

from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from jpaged.device.backends import Backend
from jpaged.device.kv.pool import KVCache
from jpaged.models.layers.common import AddNorm
from jpaged.models.layers.moe import GroupedProduct, Weights
from jpaged.sharding import pool_spec
from pallas_kernels.block_pool import why_not_copy, why_not_write, why_not_write_quantized
from pallas_kernels.grouped_matmul import grouped_matmul, why_not_grouped
from pallas_kernels.norm import NormSpec, add_rms_norm

WRITE_KERNEL_FROM = 256
"""Tokens of a step from which our kernel writes a layer's K and V faster than XLA's scatter. Llama-3-8B on an H200:
2,048 tokens in 18 us instead of 37, 256 in 4.3 instead of 7.5, 16 no faster."""

LEAST_SHARED_BYTES = 256 * 2**20
"""``Backend.least_shared_bytes``. An H200 reads so much in 32 us from its second-level cache, where rows find what they
share. The shared read of a layer costs 34 us besides its products: 256 rows behind 341 tokens take as long either way,
behind 4,096 tokens 88 us instead of 512. Infinity turns shared reads off."""


class HopperBackend(Backend):
    """Kernels for compute capability 9.0."""

    name: ClassVar[str] = "hopper"
    least_shared_bytes: ClassVar[float] = LEAST_SHARED_BYTES

    @property
    def add_norm(self) -> AddNorm | None:
        return None if self.interpret else self._add_norm

    def grouped_product(self, weights: Weights) -> GroupedProduct | None:
        if self.interpret:
            return None
        _, num_parts, ffn, hidden_size = weights.gate_up.shape
        matrices = (num_parts * ffn, hidden_size), (ffn, hidden_size)
        reasons = [why_not_grouped(matrix, weights.down.dtype) for matrix in matrices]
        return None if any(reasons) else partial(grouped_matmul, implementation=self.name)

    def _writer(self, cache: KVCache, num_tokens: int) -> str | None:
        if self.interpret:
            return None
        if cache.kv_scales is not None:
            return self.name if why_not_write_quantized(cache.pool) is None else None
        if num_tokens < WRITE_KERNEL_FROM:
            return None
        return self.name if why_not_write(cache.pool, num_tokens) is None else None

    def copy(self, cache: KVCache, src: Int[Array, " copies"], dst: Int[Array, " copies"]) -> KVCache:
        if self.interpret:
            return super().copy(cache, src, dst)
        return self.on_each_device(self._copy_own_heads, (pool_spec(), P(), P()), pool_spec())(cache, src, dst)

    def _copy_own_heads(self, cache: KVCache, src: Int[Array, " copies"], dst: Int[Array, " copies"]) -> KVCache:
        return cache.copy(src, dst, self.name if why_not_copy(cache.pool) is None else None)

    def _add_norm(
        self,
        x: Float[Array, "tokens features"],
        branch: Float[Array, "tokens features"],
        scale: Float[Array, " features"],
        spec: NormSpec,
        *,
        branch_scale: Float[Array, " features"] | None = None,
        multiplier: float = 1.0,
    ) -> tuple[Float[Array, "tokens features"], Float[Array, "tokens features"]]:
        def run(x: Array, branch: Array, scale: Array, branch_scale: Array | None) -> tuple[Array, Array]:
            return add_rms_norm(x, branch, scale, spec, branch_scale=branch_scale, multiplier=multiplier)

        return self.on_each_device(run, (P(),) * 4, (P(), P()))(x, branch, scale, branch_scale)
