"""The interface of the engine to the kernels of a platform, and the parts that all platforms share."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Float32, Int

from jpaged.device.kv.pool import Blocks, KVCache
from jpaged.models.layers.common import AddNorm
from jpaged.models.layers.moe import Gated, GroupedProduct, Routes, Weights, compute_experts
from jpaged.models.spec import LayerSpec, Projected
from jpaged.sharding import TENSOR_AXIS, pool_spec
from pallas_kernels.rope_write import HeadNorms


class Rows(NamedTuple):
    """Places of the tokens of a step in the pool; the fields are arguments of ``write_kv`` and ``paged_attention``.

    Without slots, K and V of the step's tokens are in the pool already.
    """

    slots: Int[Array, " tokens"] | None
    block_tables: Int[Array, "rows max_blocks"]
    kv_lens: Int[Array, " rows"]
    cu_q_lens: Int[Array, " rows_plus_1"]
    shared_lens: Int[Array, " rows"] | None = None


class HeadArrays(NamedTuple):
    """Numbers of attention for each query head, as ``Attend`` takes them; None for a layer without."""

    sinks: Float[Array, " num_heads"] | None = None
    alibi_slopes: Float[Array, " num_heads"] | None = None


class Unrotated(NamedTuple):
    """Queries, K and V before their norms and rotation; the fields are arguments of ``rope_write``."""

    summands: Float[Array, "summands tokens features"]
    angles: tuple[Float32[Array, "tokens half"], Float32[Array, "tokens half"]]
    norms: HeadNorms | None


@dataclass(frozen=True)
class Backend:
    """Writes K and V, attends and moves blocks with the kernels of one platform. Hashable: it is static under jit.

    Over several devices, each device runs the kernels over its own heads, under ``jax.shard_map``. XLA does what a
    subclass does not override, and splits it over the devices itself.

    Args:
        reason: why this backend was chosen, for people.
        num_devices: devices that the heads are split over.
        interpret: whether kernels run in Pallas's interpreter, on any device.
    """

    reason: str = field(compare=False)
    num_devices: int = 1
    interpret: bool = False

    name: ClassVar[str]
    """The implementation of ``pallas_kernels.paged_attention``."""

    streams_by_dma: ClassVar[bool] = False
    """Whether kernels stream blocks from the host, in place of callbacks."""

    least_shared_bytes: ClassVar[float] = math.inf
    """K and V of a layer that the rows of a decode must save for a device to read a prefix faster that they share."""

    def pool_heads(self, num_kv_heads: int, head_dim: int) -> tuple[int, int]:
        """KV heads and head_dim of the pool, for a model's over all devices."""
        return num_kv_heads, head_dim

    @property
    def add_norm(self) -> AddNorm | None:
        """A kernel that adds and norms; None if there is none."""
        return None

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
        projected: Projected | None = None,
    ) -> tuple[Float[Array, "tokens num_heads head_dim"], KVCache]:
        """Store a layer's K and V, and attend over all of each row's context.

        Args:
            cache: the block pool.
            spec: the layer.
            q, k, v: this step's tokens.
            rows: where the tokens lie in the pool.
            head_arrays: as the spec announces them.
            into: the result for an earlier layer, which nothing reads any more. Its memory may take the next result.
            projected: the source of q, k and v, which a kernel may take in their place; None if there is none.
        """
        heads, pool, per_head = P(None, TENSOR_AXIS), pool_spec(), P(TENSOR_AXIS)
        unrotated = None if projected is None or rows.slots is None else self.unrotated(cache, projected)
        own_features: Any = None if unrotated is None else Unrotated._make((P(None, None, TENSOR_AXIS), P(), P()))
        in_specs = (pool, heads, heads, heads, P(), per_head, heads, own_features)
        run = self.on_each_device(partial(self._attend_own_heads, spec), in_specs, (heads, pool))
        return run(cache, q, k, v, rows, head_arrays, into, unrotated)

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
        """``attend`` with the heads of one device."""
        if rows.slots is not None:
            if unrotated is None:
                cache = self.write(cache, spec.layer, k, v, rows.slots)
            else:
                summands, angles, norms = unrotated
                q, cache = cache.rope_write(spec.layer, summands, angles, rows.slots, norms)
        out = cache.attend(
            spec.layer,
            q,
            rows.block_tables,
            rows.kv_lens,
            rows.cu_q_lens,
            sm_scale=spec.sm_scale,
            sliding_window=spec.sliding_window,
            soft_cap=spec.soft_cap,
            sinks=head_arrays.sinks,
            alibi_slopes=head_arrays.alibi_slopes,
            into=into,
            shared_lens=rows.shared_lens,
            implementation=self.name,
            interpret=self.interpret,
        )
        return out, cache

    def write(
        self,
        cache: KVCache,
        layer: int,
        k: Float[Array, "tokens num_kv_heads head_dim"],
        v: Float[Array, "tokens num_kv_heads head_dim"],
        slots: Int[Array, " tokens"],
    ) -> KVCache:
        """``KVCache.write`` with the heads of one device."""
        return cache.write(layer, k, v, slots, self._writer(cache, len(k)))

    def unrotated(self, cache: KVCache, projected: Projected) -> Unrotated | None:
        """The heads that a kernel norms, rotates and writes, in place of ``write``; None if there is no such kernel."""
        del cache, projected
        return None

    def _writer(self, cache: KVCache, num_tokens: int) -> str | None:
        """The implementation of ``KVCache.write`` for so many tokens; None is XLA's."""
        return None

    def grouped_product(self, weights: Weights) -> GroupedProduct | None:
        """The product of groups of rows with the matrices of one device's experts; None if there is none."""
        del weights
        return None

    def experts(
        self, x: Float[Array, "tokens hidden_size"], routes: Routes, weights: Weights, gated: Gated
    ) -> Float[Array, "tokens hidden_size"]:
        """Compute the experts of a layer, each device its own; see ``compute_experts``."""
        if self.num_devices == 1:
            return compute_experts(x, routes, weights, gated, self.grouped_product(weights), has_all=True)
        are_whole = len(weights.down) % self.num_devices == 0  # as in ``param_sharding``
        by_number, by_width = P(TENSOR_AXIS), P(None, None, TENSOR_AXIS)
        specs = [by_number] * 4 if are_whole else [by_width, P(None, TENSOR_AXIS), by_width, P()]
        leaves, structure = jax.tree.flatten(weights)
        in_specs = P(), P(), jax.tree.unflatten(structure, specs[: len(leaves)])
        run = partial(self._own_experts, gated, are_whole)
        return self.on_each_device(run, in_specs, P())(x, routes, weights)

    def _own_experts(
        self,
        gated: Gated,
        are_whole: bool,
        x: Float[Array, "tokens hidden_size"],
        routes: Routes,
        weights: Weights,
    ) -> Float[Array, "tokens hidden_size"]:
        """``experts`` with the experts of one device, or its part of the width of all of them."""
        device = jax.lax.axis_index(TENSOR_AXIS)
        if are_whole:
            routes = routes._replace(experts=routes.experts - device * len(weights.down))
        elif weights.down_bias is not None:  # one device adds it
            weights = weights._replace(down_bias=jnp.where(device == 0, weights.down_bias, 0))
        product = self.grouped_product(weights)
        out = compute_experts(x, routes, weights, gated, product, has_all=not are_whole)
        return jax.lax.psum(out, TENSOR_AXIS)

    def copy(self, cache: KVCache, src: Int[Array, " copies"], dst: Int[Array, " copies"]) -> KVCache:
        """``KVCache.copy``. No block but block 0 may be both a source and a destination; block 0 may stay as it is."""
        return cache.copy(src, dst)

    def gather(self, cache: KVCache, blocks: Int[Array, " n"]) -> Blocks:
        """``KVCache.gather``."""
        return cache.gather(blocks)

    def scatter(self, cache: KVCache, blocks: Int[Array, " n"], data: Blocks) -> KVCache:
        """``KVCache.scatter``. Block 0 may stay as it is."""
        return cache.scatter(blocks, data)

    def on_each_device(self, run: Callable[..., Any], in_specs: tuple[P, ...], out_specs: Any) -> Callable[..., Any]:
        """A function that every device of the mesh in use runs over its own parts of the arguments."""
        if self.num_devices == 1:
            return run
        return jax.shard_map(run, in_specs=in_specs, out_specs=out_specs, check_vma=False)
