"""The engine's ``attend``: the door between a model and the block pool."""

from dataclasses import replace

from jaxtyping import Array, Float, Int

from jpaged.device.backends import Backend, HeadArrays, Rows
from jpaged.device.kv.pool import KVCache
from jpaged.device.kv.stream import HostStream
from jpaged.models.spec import LayerSpec, check_head_arrays


class PagedAttend:
    """Stores a layer's K and V, then attends over all of each sequence's context.

    Lives during one trace, and alone replaces the cache.

    Args:
        cache: the block pool before this step.
        rows: where the step's tokens lie in the pool.
        backend: writes and attends.
    """

    def __init__(self, cache: KVCache, rows: Rows, backend: Backend):
        self._cache = cache
        self._rows = rows
        self._backend = backend
        self._out: Array | None = None  # output of the layer before, which its output projection has read

    @property
    def cache(self) -> KVCache:
        """The newest value of the cache."""
        return self._cache

    def __call__(
        self,
        spec: LayerSpec,
        q: Float[Array, "tokens num_heads head_dim"],
        k: Float[Array, "tokens num_kv_heads head_dim"],
        v: Float[Array, "tokens num_kv_heads head_dim"],
        *,
        sinks: Float[Array, " num_heads"] | None = None,
        alibi_slopes: Float[Array, " num_heads"] | None = None,
    ) -> Float[Array, "tokens num_heads head_dim"]:
        check_head_arrays(spec, sinks, alibi_slopes)
        self._out = self._attend(spec, q, k, v, HeadArrays(sinks, alibi_slopes))
        return self._out

    def _attend(self, spec: LayerSpec, q: Array, k: Array, v: Array, head_arrays: HeadArrays) -> Array:
        out, self._cache = self._backend.attend(self._cache, spec, q, k, v, self._rows, head_arrays, self._out)
        return out


class StreamingAttend(PagedAttend):
    """Attends over blocks on the host too, which it streams: those of the next layer arrive while this layer runs.

    Args:
        cache, rows, backend: as for ``PagedAttend``; ``rows.block_tables`` has ``host_cell`` for streamed blocks.
        stream: streams the blocks.
        starts: first streamed block of each row, as in ``Streamed``.
    """

    def __init__(
        self, cache: KVCache, rows: Rows, backend: Backend, stream: HostStream, starts: Int[Array, " rows"]
    ) -> None:
        super().__init__(cache.as_layers(), rows, backend)
        self._stream = stream
        self._starts = starts
        self._arriving = stream.start(self._cache, 0, starts)

    @property
    def cache(self) -> KVCache:
        return self._cache.as_blocks(self._stream.window.num_layers)

    def _attend(self, spec: LayerSpec, q: Array, k: Array, v: Array, head_arrays: HeadArrays) -> Array:
        stream, window, layer, cache = self._stream, self._stream.window, spec.layer, self._cache
        after = [self._arriving, q]
        if layer + 1 < window.num_layers:
            self._arriving = stream.start(cache, layer + 1, *after)  # the layer before has read the same cells
            after.append(self._arriving)
        self._starts, slots = stream.wait(cache, layer, (self._starts, self._rows.slots), *after)
        self._rows = self._rows._replace(slots=slots)
        rows = self._rows._replace(
            block_tables=window.table(layer, self._rows.block_tables, self._starts),
            slots=window.slots(layer, slots, cache.block_size),
        )
        out, self._cache = self._backend.attend(cache, replace(spec, layer=0), q, k, v, rows, head_arrays, self._out)
        return out
