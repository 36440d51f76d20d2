"""The compiled programs of a model's steps: which there are, lowering, compiling and keeping them."""

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jpaged.config import EngineConfig
from jpaged.device.backends import Backend
from jpaged.device.kv.copy_engine import CopyEngine, PlainCopier
from jpaged.device.kv.dma import DmaStream, abstract_slots, lower_move
from jpaged.device.kv.host_memory import MOVE_SIZES, has_copy_engine
from jpaged.device.kv.host_pool import MAX_STAGED_BLOCKS, has_host_pool, num_slots_for
from jpaged.device.kv.layout import (
    grouping_of,
    host_layout,
    is_narrowed,
    keeps_activations,
    layers_at_once,
    least_shared_tokens,
    pool_layout,
    share_on_host,
)
from jpaged.device.kv.narrow import gather_for_host, scatter_from_host
from jpaged.device.kv.narrow_slots import MAX_NARROW_BLOCKS
from jpaged.device.kv.pages import PAGES_AT_ONCE, PageCapacity
from jpaged.device.kv.pool import KVCache
from jpaged.device.kv.stream import BlockStream, HostStream
from jpaged.device.kv.streaming import most_pages, most_streamed_blocks, window_for
from jpaged.device.sampling.adjustments import Adjustments
from jpaged.device.sampling.beams import empty_beam_inputs, pack_beam_inputs
from jpaged.device.step.adjust import LAYOUT, enter_adjustments
from jpaged.device.step.compiling import Compiling
from jpaged.device.step.inputs import Bucket, all_buckets, in_order_of_need
from jpaged.device.step.pack import SCORE_ROWS, change_layout, copy_sizes, loaded_size
from jpaged.device.step.program_cache import ProgramCache, compile_program, model_identity, program_cache_for
from jpaged.device.step.program_store import Background, ProgramStore
from jpaged.device.step.steps import Steps
from jpaged.device.step.table import StepState
from jpaged.device.target import target_of
from jpaged.interrupts import InterruptsWait
from jpaged.models import ModelConfig
from jpaged.request import MAX_LOGPROBS
from jpaged.sharding import pool_sharding, replicated

NUM_FIRST = 4
"""Sizes of steps that are compiled before the first request, if the others are in the background."""


class Programs:
    """The programs of one model, by a kind and its static sizes; each is compiled when first asked for.

    Programs are made of shapes alone: weights may be ``jax.ShapeDtypeStruct``, devices those of an abstract topology.

    Args:
        model: a flax.nnx model (``jpaged.models``) as it will run, its projections joined.
        model_config: its configuration.
        config: the engine's settings.
        mesh: the devices.
        backend: attends and moves blocks.
        max_model_len: the context wanted, in tokens.
        num_blocks: blocks of the pool; ``resize`` may change it.

    Attributes:
        weights: shapes, types and shardings of the parameters.
        background: makes programs while steps run.
        least_shared_tokens: tokens that plans with ``shared_lens`` save at least; may be infinite.
    """

    def __init__(
        self,
        model: nnx.Module,
        model_config: ModelConfig,
        config: EngineConfig,
        mesh: jax.sharding.Mesh,
        backend: Backend,
        *,
        max_model_len: int,
        num_blocks: int = 0,
    ):
        self.model_config = model_config
        self.config = config
        self.mesh = mesh
        self.target = target_of(mesh)
        graphdef, weights, tree = split_model(model)
        self.weights = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for x in weights]
        self.model_identity = model_identity(model)
        self.dtype = dtype_of(model)
        self.backend = backend
        self.grouping = grouping_of(model_config, config)
        self.groups = self.grouping.groups
        self._layout = pool_layout(model_config, config, self.dtype, backend)
        self._host_layout = host_layout(self._layout, config)
        self.bytes_per_block = self._layout.block_bytes
        self.host_bytes_per_block = self._host_layout.block_bytes
        self.share_on_host = share_on_host(self._layout, config)
        self.least_shared_tokens = least_shared_tokens(self._layout, model_config, config, backend)
        self.layers_at_once = layers_at_once(self._layout, config, backend)
        grid = self.target.least_rows_of(model_config), self.target.halfway_from
        self.buckets = all_buckets(config.most_rows, config.token_budget, *grid)
        self.stream: BlockStream | None = None
        self._num_streamable = 0  # blocks on the host
        self.copy_sizes = copy_sizes(config.most_rows, len(self.groups))
        self.keeps_activations = keeps_activations(model_config, config)
        """Whether blocks hold activations: every step then streams, and computes K and V."""
        fixed = graphdef, tree, mesh, backend, self.grouping, config.block_size, self.keeps_activations
        self._steps = partial(Steps, *fixed)
        self.resize(num_blocks, max_model_len)

    def resize(self, num_blocks: int, max_model_len: int) -> None:
        """Take another size of the pool, and another context; all programs are to be compiled again."""
        self.num_blocks = num_blocks
        self.max_model_len = max_model_len
        self.steps = self._steps(self.max_burst)
        compile_lowered = partial(compile_program, compiler_options=dict(self.target.compiler_options))
        self.store = ProgramStore(partial(_lower_by, weakref.ref(self)), compile_lowered)
        self.background = Background(self.store, {})
        if self._num_streamable:
            self.open_window(self._num_streamable)

    def open_window(self, num_host_blocks: int) -> None:
        """Give blocks of the pool to a window, through which so many blocks of the host are streamed."""
        self._num_streamable = num_host_blocks
        self.stream = _new_stream(self, num_host_blocks)

    @property
    def most_pages(self) -> PageCapacity | None:
        """Most pages of one step; None if blocks hold K and V."""
        if self.stream is None or not self.keeps_activations:
            return None
        return most_pages(self.stream.window, self.num_blocks)

    @property
    def max_streamed_blocks(self) -> int:
        """Blocks on the host that the rows of one step may attend to."""
        if (pages := self.most_pages) is not None:
            return pages.num_streamed
        return 0 if self.stream is None else most_streamed_blocks(self.stream.window)

    @property
    def streams_always(self) -> bool:
        """Whether every pass streams. Few others would run, and each size of a step is compiled once then."""
        return self.config.kv_placement == "host"

    @property
    def move_kinds(self) -> tuple[str, ...]:
        """Kinds of the programs that move blocks between the pools; none where a copy engine moves them as they are."""
        if self.streams_by_dma:
            return "store", "restore"
        return () if has_copy_engine(self.target) and not is_narrowed(self.config) else ("gather", "scatter")

    @property
    def streams_by_dma(self) -> bool:
        """Whether programs stream blocks by DMA, and move whole blocks so too."""
        return self.config.kv_placement != "device" and self.backend.streams_by_dma

    @property
    def max_burst(self) -> int:
        """Steps that a plan may have."""
        is_bound_by_link = self.config.weight_placement == "host" or self.streams_always
        return self.config.max_burst or (1 if is_bound_by_link else self.target.max_burst)

    @property
    def max_blocks(self) -> int:
        """Width of a block table."""
        return -(-self.max_model_len // self.config.block_size)

    @property
    def most_blocks(self) -> int:
        """Blocks of the longest sequence, of all layer groups."""
        return self.groups.num_blocks(self.max_model_len, self.config.block_size, self.config.token_budget)

    def workspace_bytes(self) -> int:
        """Temporaries and results of the largest step on one device, from the compiler, without running it."""
        # The window is opened once the pool has a size.
        kind = "stream" if self.streams_always and self.stream is not None else "forward"
        keys: list[tuple] = [(kind, self.buckets[-1]), ("copy", max(self.copy_sizes))]
        keys.append(_plain_sampler(self.config.most_rows))
        total = 0 if kind == "stream" else _num_copied_cells(self) * self._layout.layer_bytes(self.dtype)
        if has_host_pool(self.config, self.target) and self.move_kinds == ("gather", "scatter"):
            keys += [(kind, MOVE_SIZES[-1]) for kind in self.move_kinds]
            most_staged = MAX_NARROW_BLOCKS if has_copy_engine(self.target) else MAX_STAGED_BLOCKS
            total += 2 * most_staged * self.host_bytes_per_block // self.mesh.size
        total += _bytes_of(_abstract_adjustments(self))  # made when a row needs them
        with InterruptsWait() as interrupts:
            for key in keys:
                interrupts.check()
                analysis = self.get(key).memory_analysis()
                assert analysis is not None
                total += analysis.temp_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes
        return total

    def new_cache(self) -> KVCache:
        """An empty pool."""
        return self._layout.allocate(num_blocks=self.num_blocks, sharding=pool_sharding(self.mesh))

    def new_state(self) -> StepState:
        """The state before the first step."""
        return StepState.allocate(
            self.buckets,
            max_blocks=self.max_blocks,
            max_burst=self.max_burst,
            hidden_size=self.model_config.hidden_size,
            dtype=self.dtype,
            sharding=replicated(self.mesh),
            num_groups=len(self.groups),
        )

    def warm_up(self, *, with_host_pool: bool = False, few: bool = False, use_tqdm: bool = True) -> None:
        """Compile every bucket's step, its plain sampler and all that moves blocks, in parallel.

        Others compile when first asked for; those of ``option_keys`` come in the background too, after the buckets.

        Args:
            with_host_pool: whether there is a host pool.
            few: whether to compile a few buckets alone, and the others in the background.
            use_tqdm: whether to show progress.
        """
        kept, keys = kept_programs(self), self.all_keys(with_host_pool=with_host_pool)
        sizes = {bucket: self._keys_of(bucket) for bucket in in_order_of_need(self.buckets)[NUM_FIRST:] if few}
        later = {key for of_size in sizes.values() for key in of_size}
        later -= {key for bucket in self.buckets if bucket not in sizes for key in self._keys_of(bucket)}
        self.store.make_all([key for key in keys if key not in later], kept, use_tqdm=use_tqdm)
        options, is_tuned = option_keys(self) if few else [], self.target.tunes_programs
        self.background = Background(self.store, sizes, kept, options=options, is_tuned=is_tuned)

    def all_keys(self, *, with_host_pool: bool = False) -> list[tuple]:
        """The keys of all programs that plain requests need."""
        keys: list[tuple] = [(self._kind, bucket) for bucket in reversed(self.buckets)]
        keys += [_plain_sampler(rows) for rows in sorted({bucket.num_rows for bucket in self.buckets})]
        keys += [("load", bucket) for bucket in self.buckets]
        keys += [("enter",), ("read",), *(("copy", size) for size in self.copy_sizes)]
        if with_host_pool:
            keys += [(kind, size) for kind in self.move_kinds for size in MOVE_SIZES]
        return list(dict.fromkeys(keys))

    @property
    def _kind(self) -> str:
        return "stream" if self.streams_always else "forward"

    def _keys_of(self, bucket: Bucket) -> list[tuple]:
        """The keys of the programs that run plain steps of a size."""
        return [(self._kind, bucket), ("load", bucket), _plain_sampler(bucket.num_rows)]

    def usable_buckets(self) -> Sequence[Bucket]:
        """The sizes that a step may have now, smallest first: not those that the background still makes."""
        pending = self.background.pending
        return [bucket for bucket in self.buckets if bucket not in pending] if pending else self.buckets

    @property
    def compiling(self) -> Compiling:
        """The compilation that a step waits for."""
        return self.store.compiling

    @property
    def num_loaded(self) -> int:
        """Programs that an earlier start had compiled."""
        return self.store.num_loaded

    def __len__(self) -> int:
        return len(self.store.programs)

    def get(self, key: tuple) -> jax.stages.Compiled:
        """The program of ``key``: a kind and its static sizes. Compiled on first use."""
        return self.store.get(key)

    def lower(self, key: tuple) -> jax.stages.Lowered:
        """The program of ``key``, not compiled."""
        precision = "highest" if self.dtype == jnp.float32 else None
        with jax.default_matmul_precision(precision), jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
            return self._lower_kind(*key)

    def _lower_kind(self, kind: str, *sizes: Any) -> jax.stages.Lowered:
        weights, cache, state = self.weights, self.abstract_cache(), abstract_state(self)
        as_stored = self.backend, is_narrowed(self.config)
        match kind:
            case "load":
                (bucket,) = sizes
                inputs = self._abstract((loaded_size(bucket),), jnp.int32)
                return jax.jit(StepState.load, static_argnums=1, donate_argnums=0).lower(state, bucket, inputs)
            case "enter":
                size = change_layout(len(state.latest)).size
                return jax.jit(StepState.enter, donate_argnums=0).lower(state, self._abstract((size,), jnp.int32))
            case "forward" | "shared":
                (bucket,) = sizes
                run = partial(self.steps.decode, reads_shared=True) if kind == "shared" else self._pass_of(bucket)
                return _jit(run, bucket, None, donate=(1, 2)).lower(weights, cache, state)
            case "stream":
                assert self.stream is not None
                (bucket,) = sizes
                method = _jit(self._pass_of(bucket), bucket, self.stream, donate=(1, 2))
                return method.lower(weights, cache, state, *self.stream.inputs)
            case "read":
                return jax.jit(jnp.copy).lower(state.drawn)
            case "sample":
                num_rows, num_top, is_adjusted = sizes
                packed = self._abstract((2, num_rows), jnp.int32), self._abstract((), jnp.int32)
                arrays = state.latest, state.columns, state.sample_hidden, *packed
                adjustments = _abstract_adjustments(self) if is_adjusted else None
                return _jit(self.steps.sample_next, num_top, donate=(1, 6)).lower(weights, *arrays, adjustments)
            case "adjust":
                return _jit(enter_adjustments, donate=(0,)).lower(_abstract_adjustments(self), _abstract_changes(self))
            case "score":
                num_tokens, num_top = sizes
                hidden = self._abstract((num_tokens, self.model_config.hidden_size), self.dtype)
                rows = self._abstract((SCORE_ROWS,), jnp.int32)
                return _jit(self.steps.score, num_top).lower(weights, hidden, rows, rows)
            case "beam":
                rows, num_candidates, num_biases = sizes
                empty = empty_beam_inputs(rows, num_candidates, num_biases)
                packed = self._abstract(pack_beam_inputs(empty).shape, jnp.int32)
                return _jit(self.steps.beam, num_candidates, empty).lower(weights, state.sample_hidden, packed)
            case "copy":
                blocks = self._abstract((sizes[0],), jnp.int32)
                return jax.jit(self.backend.copy, donate_argnums=0).lower(cache, blocks, blocks)
            case "gather":
                blocks, sharding = self._abstract((sizes[0],), jnp.int32), pool_sharding(self.mesh)
                return _jit(gather_for_host, *as_stored, out_shardings=sharding).lower(cache, blocks)
            case "scatter":
                blocks, data = self._abstract((sizes[0],), jnp.int32), self.abstract_blocks(sizes[0])
                return _jit(scatter_from_host, *as_stored, donate=(0,)).lower(cache, blocks, data)
            case "store" | "restore":
                blocks, slots = self._abstract((sizes[0],), jnp.int32), self.host_slots(self._num_streamable)
                return lower_move(kind, cache, slots, blocks, is_interpreted=self.backend.interpret)
            case _:
                raise AssertionError(kind)

    def _pass_of(self, bucket: Bucket) -> Callable:
        return self.steps.decode if bucket.is_decode else self.steps.forward

    def _abstract(self, shape: tuple[int, ...], dtype: jax.typing.DTypeLike) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=replicated(self.mesh))

    def abstract_cache(self) -> KVCache:
        """The shapes of the pool."""
        cache = jax.eval_shape(partial(self._layout.allocate, self.num_blocks))
        sharding = pool_sharding(self.mesh)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), cache)

    def host_slots(self, num_host_blocks: int) -> jax.ShapeDtypeStruct:
        """The shape of the slots of a host pool of so many blocks."""
        blocks = self.abstract_blocks(num_slots_for(num_host_blocks))
        return abstract_slots(blocks, self.abstract_cache(), self.backend) if self.streams_by_dma else blocks

    def abstract_blocks(self, num_blocks: int) -> jax.ShapeDtypeStruct:
        """The shape of the bits of blocks on the host."""
        cache = jax.eval_shape(partial(self._host_layout.allocate, 1))
        blocks = jax.eval_shape(KVCache.gather, cache, jax.ShapeDtypeStruct((num_blocks,), jnp.int32))
        return jax.ShapeDtypeStruct(blocks.shape, blocks.dtype, sharding=pool_sharding(self.mesh))


def _lower_by(programs: weakref.ref[Programs], key: tuple) -> jax.stages.Lowered:
    """Lower a program. No cycle joins the programs and their store, so that both go with their last user."""
    if (those := programs()) is None:
        raise RuntimeError("the engine was dropped while its programs were compiled")
    return those.lower(key)


def kept_programs(programs: Programs) -> ProgramCache | None:
    """The cache that keeps these programs between runs; None where they are not kept."""
    if not programs.target.keeps_programs:
        return None
    config, weights = programs.config, [(x.shape, str(x.dtype), str(x.sharding)) for x in programs.weights]
    pools = programs.num_blocks, config.block_size, programs._layout, programs._host_layout, programs._num_streamable
    sizes = *pools, programs.max_model_len, programs.max_burst, programs.buckets
    choices = programs.model_config, programs.grouping, programs.backend, config.kv_cache_dtype, programs.target
    devices = list(programs.mesh.devices.flat)
    return program_cache_for(programs.model_identity, devices, str(programs.mesh), weights, sizes, choices)


def _num_copied_cells(programs: Programs) -> int:
    """Cells whose content a streaming layer has in temporaries at once."""
    if programs.keeps_activations:
        # Of some pages: the inputs, K and V, and both of these as a kernel and a product lay them out.
        return 6 * max(PAGES_AT_ONCE)
    window = None if programs.stream is None else programs.stream.window
    # A batch as it arrives, and widened.
    return 0 if window is None or not window.is_narrow else window.batches.num_cells + window.batches.size


def _new_stream(programs: Programs, num_host_blocks: int) -> BlockStream:
    """The stream of some programs, and the window for so many blocks of the host."""
    num_layers, with_pages = len(programs.model_config.layer_specs), programs.keeps_activations
    sizes, most = (num_host_blocks, programs.num_blocks, num_layers), programs.layers_at_once
    window = window_for(*sizes, with_pages=with_pages, share=programs.share_on_host, layers_at_once=most)
    if programs.streams_by_dma:
        slots = programs.host_slots(num_host_blocks)
        return DmaStream(window, slots, programs.mesh, is_interpreted=programs.backend.interpret)
    return HostStream(window, CopyEngine() if has_copy_engine(programs.target) else PlainCopier())


def new_adjustments(programs: Programs) -> Adjustments:
    """Adjustments of the table's rows, which have none yet."""
    sizes = max(bucket.num_rows for bucket in programs.buckets) + 1, programs.model_config.vocab_size
    return Adjustments.allocate(*sizes, sharding=replicated(programs.mesh))


def abstract_state(programs: Programs) -> StepState:
    """The shapes of the state of some programs."""
    return _abstracted(programs, programs.new_state)


def _abstract_adjustments(programs: Programs) -> Adjustments:
    return _abstracted(programs, partial(new_adjustments, programs))


def _abstracted[T](programs: Programs, make: Callable[[], T]) -> T:
    """The shapes of replicated arrays, as the programs take them."""
    sharding = replicated(programs.mesh)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), jax.eval_shape(make))


def _abstract_changes(programs: Programs) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((LAYOUT.size,), jnp.int32, sharding=replicated(programs.mesh))


def _bytes_of(arrays: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(arrays))


def option_keys(programs: Programs) -> list[tuple]:
    """The keys of the programs that draw with adjustments, and with log-probabilities alone, for all sizes."""
    sizes = dict.fromkeys(bucket.num_rows for bucket in in_order_of_need(programs.buckets))
    kinds = [(MAX_LOGPROBS, True), (MAX_LOGPROBS, False)]
    return [("adjust",), *(("sample", num_rows, *kind) for num_rows in sizes for kind in kinds)]


def _plain_sampler(num_rows: int) -> tuple:
    """The key of the program that draws for rows without adjustments and log-probabilities."""
    return "sample", num_rows, None, False


def _jit(method: Callable, *static: object, donate: tuple[int, ...] = (), **options: Any) -> Any:
    return jax.jit(partial(method, *static), donate_argnums=donate, **options)


def split_model(model: nnx.Module) -> tuple[nnx.GraphDef, list[jax.Array], Any]:
    """A model's structure, its weights as a flat list, and the tree that they are the leaves of."""
    graphdef, state = nnx.split(model)
    weights, tree = jax.tree.flatten(state)
    return graphdef, weights, tree


def dtype_of(model: nnx.Module) -> jnp.dtype:
    """Dtype of a model's weights."""
    return jnp.dtype(next(x.dtype for x in jax.tree.leaves(nnx.state(model)) if jnp.issubdtype(x.dtype, jnp.floating)))
