"""The backend of NVIDIA Hopper GPUs: our Mosaic GPU kernels."""

from functools import partial
from typing import ClassVar

from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from jpaged.device.backends import Backend, Unrotated
from jpaged.device.kv.pool import KVCache
from jpaged.models.layers.common import AddNorm
from jpaged.models.layers.moe import GroupedProduct, Weights
from jpaged.models.spec import Projected
from jpaged.sharding import pool_spec
from pallas_kernels.block_pool import shape_of, why_not_copy, why_not_write, why_not_write_quantized
from pallas_kernels.grouped_matmul import grouped_matmul, why_not_grouped
from pallas_kernels.norm import NormSpec, add_rms_norm
from pallas_kernels.rope_write import why_not_rope_write

WRITE_KERNEL_FROM = 256
"""Tokens of a step from which our kernel writes a layer's K and V faster than XLA's scatter. Llama-3-8B on an H200:
2,048 tokens in 18 us instead of 37, 256 in 4.3 instead of 7.5, 16 no faster."""

ROPE_KERNEL_TO = 512
"""Tokens of a step up to which one kernel norms, rotates and writes the heads of a layer; 0 turns it off.

It saves one launch or two, and traffic: in Llama-3-8B it moves 24 KiB a token, XLA's kernels 32 KiB. On an H200 the
decode steps of Qwen3-0.6B, of 1 to 256 rows, take 0.16 to 0.23 ms less with it.
"""

SUMMED_BY_KERNEL = range(16, 129)
"""Tokens of a step for which this kernel also sums ``QKV_SUMMANDS`` products, of a part of the input features each.

XLA's compiler divides products of so few tokens into 4 by itself, so that all multiprocessors have work. It then adds
a kernel that sums. It divides products of more tokens less or not at all, and computes those of one in other ways.
"""

QKV_SUMMANDS = 4

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

    def unrotated(self, cache: KVCache, projected: Projected) -> Unrotated | None:
        joined, num_tokens = projected.joined, len(projected.joined)
        if self.interpret or cache.kv_scales is not None or num_tokens > ROPE_KERNEL_TO:
            return None
        head_dim, rotary_dim = shape_of(cache.pool).head_dim, 2 * projected.cos.shape[1]
        if why_not_rope_write(head_dim, rotary_dim, joined.dtype, cache.pool.dtype) is not None:
            return None
        summands = projected.summands(QKV_SUMMANDS) if num_tokens in SUMMED_BY_KERNEL else None
        angles = projected.cos, projected.sin
        return Unrotated(joined[None] if summands is None else summands, angles, projected.norms)

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
