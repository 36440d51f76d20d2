"""The functions of a step that are traced and compiled. They are pure, given the sizes they are built with."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from jpaged.device.backends import Backend
from jpaged.device.kv.attend import GroupedAttend, PagedAttend, rows_of_groups
from jpaged.device.kv.pool import KVCache
from jpaged.device.kv.stream import BlockStream
from jpaged.device.kv.streaming import RecomputingAttend, StreamingAttend
from jpaged.device.kv.widening import WideningAttend
from jpaged.device.sampling.adjustments import Adjustments
from jpaged.device.sampling.beams import BeamInputs, Candidates, beam_candidates, unpack_beam_inputs
from jpaged.device.sampling.columns import SampleInputs, inputs_of_rows, rows_from
from jpaged.device.sampling.draw import SampledTokens, sample
from jpaged.device.sampling.scores import Scores, score
from jpaged.device.step.inputs import Bucket
from jpaged.device.step.table import StepState, with_latest
from jpaged.models.groups import Grouping
from jpaged.sharding import TENSOR_AXIS, replicated

SAMPLING_SCOPE = "sampling"
"""Names the operations that choose tokens, for profiles."""


@dataclass(frozen=True)
class Steps:
    """The functions of one model under one set of sizes. Their static arguments come first, then arrays.

    Args:
        graphdef: structure of the model.
        weights_tree: tree of the weights, which programs take as a flat list. Flattening an nnx state in every call
            costs more than a small step.
        mesh: the devices.
        backend: attends.
        grouping: the layers and their groups.
        block_size: tokens of a block.
        keeps_activations: whether blocks hold activations in place of K and V.
        max_burst: steps that a decode may have.
    """

    graphdef: nnx.GraphDef
    weights_tree: Any
    mesh: jax.sharding.Mesh
    backend: Backend
    grouping: Grouping
    block_size: int
    keeps_activations: bool
    max_burst: int

    def _merge(self, weights: list[Array]) -> Any:
        return nnx.merge(self.graphdef, jax.tree.unflatten(self.weights_tree, weights))

    def forward(
        self,
        bucket: Bucket,
        stream: BlockStream | None,
        weights: list[Array],
        cache: KVCache,
        state: StepState,
        *streamed: Array,
        reads_shared: bool = False,
    ) -> tuple[KVCache, StepState, Float[Array, "tokens hidden_size"]]:
        """Run a forward pass over the loaded inputs. Returns the hidden states of all tokens too.

        Args:
            bucket: sizes of the step.
            stream: brings the blocks that are on the host; None if there are none.
            weights, cache, state: the arrays.
            streamed: inputs of the stream.
            reads_shared: whether tokens that rows share are read once.
        """
        num_groups = len(self.grouping.groups)
        inputs = state.step_inputs(bucket, self.block_size, num_groups)
        model = self._merge(weights)
        rows, *others = rows_of_groups(inputs, num_groups, reads_shared=reads_shared)
        if others:
            attend = GroupedAttend(cache, [rows, *others], self.backend, self.grouping.layers)
        elif stream is None:
            attend = PagedAttend(cache, rows, self.backend)
        else:
            plain = WideningAttend if stream.window.is_narrow else StreamingAttend
            streaming = RecomputingAttend if self.keeps_activations else plain
            attend = streaming(cache, rows, self.backend, stream.given(*streamed), inputs.stream_starts)
        hidden = model(inputs.token_ids, inputs.positions, inputs.prompt_lens, attend)
        return attend.cache, self._replicate(state.with_sample_hidden(hidden[inputs.sample_tokens])), hidden

    def decode(
        self,
        bucket: Bucket,
        stream: BlockStream | None,
        weights: list[Array],
        cache: KVCache,
        state: StepState,
        *streamed: Array,
        reads_shared: bool = False,
    ) -> tuple[KVCache, StepState]:
        """Run forward passes and plain sampling, as many as loaded, each fed with the tokens drawn before.

        With 0 steps loaded, run one forward pass alone. A pass that streams runs once. Arguments as in ``forward``.
        """
        num_steps = state.num_steps(bucket)

        def step(before: tuple[KVCache, StepState]) -> tuple[KVCache, StepState]:
            cache, state, hidden = self.forward(bucket, stream, weights, *before, *streamed, reads_shared=reads_shared)

            def draw() -> tuple[Int[Array, " rows"], Float[Array, " rows"]]:
                tokens = self._sample(weights, state.sample_hidden, state.sample_inputs(bucket), None)
                return tokens.token_ids, tokens.scores.logprobs

            def nothing() -> tuple[Int[Array, " rows"], Float[Array, " rows"]]:
                return jnp.zeros(bucket.num_rows, jnp.int32), jnp.zeros(bucket.num_rows, jnp.float32)

            drawn = jax.lax.cond(num_steps > 0, draw, nothing)
            return cache, self._replicate(state.with_hidden(hidden).with_drawn(bucket, *drawn))

        if self.max_burst == 1 or stream is not None:
            return step((cache, state))
        return jax.lax.fori_loop(0, jnp.maximum(num_steps, 1), lambda _, before: step(before), (cache, state))

    def _replicate[T](self, arrays: T) -> T:
        return jax.lax.with_sharding_constraint(arrays, replicated(self.mesh))

    def _sample(
        self,
        weights: list[Array],
        hidden: Float[Array, "max_num_seqs hidden_size"],
        inputs: SampleInputs,
        num_top: int | None,
    ) -> SampledTokens:
        num_rows, is_adjusted = len(inputs.temperature), inputs.marks.shape[1] > 0
        with jax.named_scope(SAMPLING_SCOPE):
            logits = self._whole_rows(self._merge(weights).logits(hidden[:num_rows]))
            draw = partial(sample, num_top=num_top)
            if self.mesh.size > 1 and not is_adjusted and num_rows % self.mesh.size == 0:
                draw = jax.shard_map(
                    partial(_sample_own_rows, num_top=num_top),
                    in_specs=(P(TENSOR_AXIS), P()),
                    out_specs=P(TENSOR_AXIS),
                    check_vma=False,
                )
            return self._replicate(draw(logits, inputs))

    def sample_next(
        self,
        num_top: int | None,
        weights: list[Array],
        latest: Int[Array, " table_rows"],
        columns: Int[Array, "columns table_rows"],
        hidden: Float[Array, "max_num_seqs hidden_size"],
        packed: Int[Array, "2 rows"],
        num_before: Int[Array, ""],
        adjustments: Adjustments | None = None,
    ) -> tuple[SampledTokens, Int[Array, " table_rows"], Adjustments | None]:
        """The drawn tokens; ``latest`` and the adjustments with them.

        Args:
            num_top: alternatives to score; see ``sample``.
            weights: weights of the model.
            latest: as in ``StepState``.
            columns: as in ``StepState``.
            hidden: ``StepState.sample_hidden``.
            packed: the draws; see ``pack_draws``.
            num_before: steps of the burst before this one.
            adjustments: adjustments of all rows; None if no row that draws has any.
        """
        rows = packed[0]
        inputs = inputs_of_rows(columns, rows, packed[1] + num_before)
        if adjustments is not None:
            inputs = adjustments.inputs_of(inputs, rows)
        sampled = self._sample(weights, hidden, inputs, num_top)
        if adjustments is not None:
            adjustments = self._replicate(adjustments.with_drawn(inputs, rows, sampled.token_ids))
        return sampled, self._replicate(with_latest(latest, rows, sampled.token_ids)), adjustments

    def _whole_rows(self, logits: Float[Array, "rows vocab"]) -> Float[Array, "rows vocab"]:
        """Bring each whole row to one device.

        Each device first makes its part of every row: XLA would otherwise gather the weights, which are larger.
        """
        num_rows, vocab_size = logits.shape
        if vocab_size % self.mesh.size == 0:
            logits = self._constrain(logits, P(None, TENSOR_AXIS))
        return self._constrain(logits, P(TENSOR_AXIS if num_rows % self.mesh.size == 0 else None, None))

    def _constrain(self, array: Array, spec: P) -> Array:
        return jax.lax.with_sharding_constraint(array, NamedSharding(self.mesh, spec))

    def beam(
        self,
        num_candidates: int,
        like: BeamInputs,
        weights: list[Array],
        hidden: Float[Array, "max_num_seqs hidden_size"],
        packed: Int[Array, " size"],
    ) -> Candidates:
        model = self._merge(weights)
        inputs = unpack_beam_inputs(packed, like)
        logits = model.logits(hidden[: len(inputs.group_rows)])
        return self._replicate(beam_candidates(logits, inputs, num_candidates=num_candidates))

    def score(
        self,
        num_top: int,
        weights: list[Array],
        hidden: Float[Array, "tokens hidden_size"],
        rows: Int[Array, " score_rows"],
        targets: Int[Array, " score_rows"],
    ) -> Scores:
        model = self._merge(weights)
        logits = self._whole_rows(model.logits(hidden[rows]))
        return self._replicate(score(logits, targets, num_top=num_top))


def _sample_own_rows(
    logits: Float[Array, "own_rows vocab"], inputs: SampleInputs, *, num_top: int | None
) -> SampledTokens:
    """Sample the rows of one device: devices would otherwise exchange what their rows need in every iteration."""
    first = jax.lax.axis_index(TENSOR_AXIS) * len(logits)
    return sample(logits, rows_from(inputs, first, len(logits)), num_top=num_top)
