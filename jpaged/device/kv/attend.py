"""The engine's ``attend``: the door between a model and the block pool."""

from collections.abc import Sequence

from jaxtyping import Array, Float

from jpaged.device.backends import Backend, HeadArrays, Rows
from jpaged.device.kv.pool import KVCache
from jpaged.device.step.inputs import StepInputs
from jpaged.models.spec import LayerSpec, Source, check_head_arrays


def rows_of_groups(inputs: StepInputs, num_groups: int, *, reads_shared: bool = False) -> list[Rows]:
    """The places of a step's tokens in the pool, for each layer group.

    Args:
        inputs: the step.
        num_groups: layer groups.
        reads_shared: whether tokens that rows share are read once.
    """
    tables, slots = inputs.block_tables, inputs.slots
    lens = inputs.kv_lens, inputs.cu_q_lens, inputs.shared_lens if reads_shared else None
    if num_groups == 1:
        return [Rows(slots, tables, *lens)]
    return [Rows(slots[i], tables[i], *lens) for i in range(num_groups)]


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
        self._source: Source | None = None

    @property
    def cache(self) -> KVCache:
        """The newest value of the cache."""
        return self._cache

    def take_source(self, source: Source) -> None:
        """Keep the source of the next layer's queries, K and V."""
        self._source = source

    def _taken_source(self) -> Source | None:
        """The source that the layer has shown; no other layer may use it."""
        source, self._source = self._source, None
        return source

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
        source = self._taken_source()
        projected = None if source is None else source.projected
        out, self._cache = self._backend.attend(
            self._cache, spec, q, k, v, self._rows, head_arrays, self._out, projected
        )
        return out


class GroupedAttend(PagedAttend):
    """Attends where layers form groups, each with a block table of its own.

    Args:
        cache, backend: as for ``PagedAttend``.
        rows: where the step's tokens lie in the pool, for each group.
        layers: the layers in the order of the model, with their groups and their places in blocks.
    """

    def __init__(self, cache: KVCache, rows: Sequence[Rows], backend: Backend, layers: Sequence[LayerSpec]) -> None:
        super().__init__(cache, rows[0], backend)
        self._rows_of_groups = rows
        self._layers = layers

    def _attend(self, spec: LayerSpec, q: Array, k: Array, v: Array, head_arrays: HeadArrays) -> Array:
        placed = self._layers[spec.layer]
        self._rows = self._rows_of_groups[placed.group]
        return super()._attend(placed, q, k, v, head_arrays)
