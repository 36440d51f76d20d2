"""Implementations that attend a batch, layer after layer in one program: ours, and those that come with JAX."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bench.kernels.inputs import Inputs, attend, make_inputs, make_queries
from bench.kernels.shapes import AttentionShape, value_deviations
from pallas_kernels.paged_attention import IMPLEMENTATIONS

NUM_LAYERS = 8
NUM_XLA_LAYERS = 2
"""Layers with K and V of their own, together far larger than the L2 cache (60 MB on an H200). The portable
implementation compiles many operations for every layer, and its layers share nothing, so two suffice."""

NUM_OUR_LAYERS = 32
"""Layers of a program of our kernels, which cycle through the pool's layers. Work shared by all layers is done once, so
its proportion matters. A model of 8 billion parameters has as many layers."""

TRITON_SPLITS, TRITON_TOKENS = (1, 4, 16, 64), 128
"""Configurations of JAX's paged attention: parts of a context, of which the best counts. And the tokens that it takes
at once, its default for blocks of 16; as many blocks of 64 do not fit into shared memory."""

type Program = Callable[[Array, Any], Array]
"""From queries and the rest to outputs, which are the next run's queries."""


@dataclass(frozen=True, slots=True)
class Ours:
    """An entry of ``IMPLEMENTATIONS``, through ``paged_attention``.

    ``why_not`` is the reason of a refusal that is known without a call. ``programs`` are by configuration.
    ``make_rest`` makes the programs' argument beside the queries.
    """

    name: str
    num_layers: int
    is_ours = True
    is_paged = True

    def why_not(self, shape: AttentionShape) -> str | None:
        return None

    def programs(self, shape: AttentionShape) -> dict[str, Program]:
        def run(q: Array, inputs: Inputs) -> Array:
            for layer in range(self.num_layers):
                q = attend(q, inputs, layer % inputs.pool.shape[1], shape, self.name)
            return q

        return {"": run}

    def make_rest(self, shape: AttentionShape) -> Inputs:
        return make_inputs(shape, min(self.num_layers, NUM_LAYERS), grows=True)


@dataclass(frozen=True, slots=True)
class JaxTriton:
    """jax.experimental.pallas.ops.gpu.paged_attention: decodes of equal length, K and V in arrays of their own."""

    name: str = "jax"
    num_layers: int = NUM_LAYERS
    is_ours = False
    is_paged = True

    def why_not(self, shape: AttentionShape) -> str | None:
        if shape.kind != "decode" or shape.is_ragged or shape.is_quantized:
            return "it takes decodes of equal length, K and V in the queries' type"
        if jax.default_backend() != "gpu":
            return "it needs a GPU"
        return None

    def programs(self, shape: AttentionShape) -> dict[str, Program]:
        num_blocks = int(shape.num_row_blocks[0])
        splits = [split for split in TRITON_SPLITS if num_blocks % split == 0]
        return {f"k_splits={split}": partial(self._run, num_splits=split) for split in splits}

    def _run(self, q: Array, rest: tuple[list[Array], list[Array], Array, Array], *, num_splits: int) -> Array:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            from jax.experimental.pallas.ops.gpu import paged_attention

        keys, values, tables, kv_lens = rest
        pages = max(TRITON_TOKENS // keys[0].shape[2], 1)
        for k, v in zip(keys, values, strict=True):
            q = paged_attention.paged_attention(
                q, k, v, tables, kv_lens, k_splits=num_splits, pages_per_compute_block=pages, num_warps=4
            )
        return q

    def make_rest(self, shape: AttentionShape) -> tuple[list[Array], list[Array], Array, Array]:
        tables = shape.block_tables()
        deviations = np.nan_to_num(value_deviations(shape.positions(tables)))
        pages = (shape.num_kv_heads, shape.num_blocks, shape.block_size, shape.head_dim)
        # JAX's kernel does not scale scores, so the keys are scaled.
        of_key, of_slot = shape.head_dim**-0.5, jnp.asarray(deviations)[None, :, :, None]
        keys, values = _make_layers(pages, of_key, of_slot, self.num_layers, shape.dtype)
        return keys, values, jnp.asarray(tables), jnp.asarray(shape.kv_lens, jnp.int32)


@dataclass(frozen=True, slots=True)
class CuDNN:
    """cuDNN's attention through ``jax.nn``: whole prompts of equal length, K and V dense."""

    name: str = "cudnn"
    num_layers: int = NUM_LAYERS
    is_ours = False
    is_paged = False

    def why_not(self, shape: AttentionShape) -> str | None:
        if shape.is_ragged or shape.q_lens != shape.kv_lens or shape.is_quantized:
            return "not paged: it takes whole prompts of equal length"
        if jax.default_backend() != "gpu":
            return "it needs a GPU"
        return None

    def programs(self, shape: AttentionShape) -> dict[str, Program]:
        return {"": partial(self._run, batch=len(shape.q_lens))}

    def _run(self, q: Array, rest: tuple[list[Array], list[Array]], *, batch: int) -> Array:
        batched = q.reshape(batch, -1, *q.shape[1:])
        for k, v in zip(*rest, strict=True):
            batched = jax.nn.dot_product_attention(batched, k, v, is_causal=True, implementation="cudnn")
        return batched.reshape(q.shape)

    def make_rest(self, shape: AttentionShape) -> tuple[list[Array], list[Array]]:
        kv_len = shape.kv_lens[0]
        of_token = jnp.asarray(value_deviations(np.arange(kv_len)))[None, :, None, None]
        dense = (len(shape.kv_lens), kv_len, shape.num_kv_heads, shape.head_dim)
        return _make_layers(dense, 1.0, of_token, self.num_layers, shape.dtype)


type Contender = Ours | JaxTriton | CuDNN


def _make_layers(
    axes: tuple[int, ...], of_key: float, of_value: Array, num_layers: int, dtype: str
) -> tuple[list[Array], list[Array]]:
    """K and V of each layer, in arrays of their own, normal with the given deviations."""
    keys = [jax.random.split(jax.random.key(layer, impl="rbg")) for layer in range(num_layers)]
    return (
        [_normal(key[0], axes, jnp.float32(of_key), dtype) for key in keys],
        [_normal(key[1], axes, of_value, dtype) for key in keys],
    )


@partial(jax.jit, static_argnames=("axes", "dtype"))
def _normal(key: Any, axes: tuple[int, ...], deviation: Array, dtype: str) -> Array:
    return (jax.random.normal(key, axes, jnp.float32) * deviation).astype(dtype)


def all_contenders() -> list[Contender]:
    """All implementations, peers first: our rows have ratios to them."""
    names = [name for name in IMPLEMENTATIONS if name != "reference"]
    ours = [Ours(name, NUM_XLA_LAYERS if name == "xla" else NUM_OUR_LAYERS) for name in names]
    return [JaxTriton(), CuDNN(), *ours]


def abstract_arguments(contender: Contender, shape: AttentionShape) -> tuple[Any, Any]:
    """Shapes of a program's queries and rest, without making them."""
    return jax.eval_shape(lambda: (make_queries(shape), contender.make_rest(shape)))
