"""What a step computes: the functions that are traced and compiled, pure but for what they are built with."""

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from jpaged.device.backends import Backend, Rows
from jpaged.device.kv.attend import PagedAttend
from jpaged.device.kv.pool import KVCache
from jpaged.device.sampling.beams import BeamInputs, Candidates, beam_candidates, unpack_beam_inputs
from jpaged.device.sampling.sampler import (
    SampledTokens,
    SampleInputs,
    SampleSizes,
    Scores,
    rows_from,
    sample,
    score,
    unpack_samples,
)
from jpaged.device.step.inputs import Bucket, pack_next, unpack
from jpaged.device.step.state import StepState
from jpaged.sharding import TENSOR_AXIS, replicated

SAMPLING_SCOPE = "sampling"
"""Names the operations that choose tokens, for profiles."""


@dataclass(frozen=True)
class Steps:
    """The functions of one model under one set of sizes. Their static arguments come first, then arrays.

    Args:
        graphdef, weights_tree: with a flat list of weights, the model. A flat list: flattening an nnx state in every
            call costs more than a small step.
        mesh: the devices.
        backend: attends.
        block_size: tokens of a block.
        max_blocks: width of a block table.
        max_burst: steps that a decode may have.
    """

    graphdef: nnx.GraphDef
    weights_tree: Any
    mesh: jax.sharding.Mesh
    backend: Backend
    block_size: int
    max_blocks: int
    max_burst: int

    def _merge(self, weights: list[Array]) -> Any:
        return nnx.merge(self.graphdef, jax.tree.unflatten(self.weights_tree, weights))

    def forward(
        self, bucket: Bucket, weights: list[Array], cache: KVCache, state: StepState
    ) -> tuple[KVCache, StepState, Float[Array, "tokens hidden_size"]]:
        """A forward pass over the inputs loaded, and the hidden states of all its tokens.

        Tokens below 0 were drawn by the step before; see ``Chunk.token_ids``.
        """
        inputs = unpack(state.step_inputs(bucket, self.max_blocks), bucket, self.max_blocks)
        token_ids = jnp.where(inputs.token_ids < 0, state.latest[~inputs.token_ids], inputs.token_ids)
        model = self._merge(weights)
        rows = Rows(inputs.slots, inputs.block_tables, inputs.kv_lens, inputs.cu_q_lens)
        attend = PagedAttend(cache, rows, self.backend)
        hidden = model(token_ids, inputs.positions, inputs.prompt_lens, attend)
        return attend.cache, self._replicate(state.with_sample_hidden(hidden[inputs.sample_tokens])), hidden

    def decode(
        self, bucket: Bucket, weights: list[Array], cache: KVCache, state: StepState
    ) -> tuple[KVCache, StepState]:
        """A forward pass and plain sampling, as often as loaded, each fed with what the one before drew.

        For 0 steps, one forward pass alone.
        """
        packed_samples, num_steps = state.decode_inputs(bucket, self.max_blocks)
        sizes = SampleSizes(bucket.num_rows)

        def step(number: Int[Array, ""], before: tuple[KVCache, StepState]) -> tuple[KVCache, StepState]:
            cache, state, hidden = self.forward(bucket, weights, *before)

            def draw() -> tuple[Int[Array, " rows"], Float[Array, " rows"]]:
                tokens = self._sample(sizes, None, weights, state.sample_hidden, packed_samples, number)
                return tokens.token_ids, tokens.scores.logprobs

            def nothing() -> tuple[Int[Array, " rows"], Float[Array, " rows"]]:
                return jnp.zeros(sizes.num_rows, jnp.int32), jnp.zeros(sizes.num_rows, jnp.float32)

            drawn = jax.lax.cond(num_steps > 0, draw, nothing)
            packed = state.step_inputs(bucket, self.max_blocks)
            after = pack_next(packed, bucket, self.max_blocks, self.block_size)
            return cache, self._replicate(state.with_hidden(hidden).with_drawn(number, *drawn).load(after))

        if self.max_burst == 1:
            return step(jnp.int32(0), (cache, state))
        return jax.lax.fori_loop(0, jnp.maximum(num_steps, 1), step, (cache, state))

    def _replicate[T](self, arrays: T) -> T:
        return jax.lax.with_sharding_constraint(arrays, replicated(self.mesh))

    def _sample(
        self,
        sizes: SampleSizes,
        num_top: int | None,
        weights: list[Array],
        hidden: Float[Array, "max_num_seqs hidden_size"],
        packed: Int[Array, " size"],
        num_before: Int[Array, ""],
    ) -> SampledTokens:
        """The drawn tokens. ``num_before``: steps of the burst before this one."""
        model = self._merge(weights)
        inputs = unpack_samples(packed, sizes)
        inputs = dataclasses.replace(inputs, positions=inputs.positions + num_before)
        with jax.named_scope(SAMPLING_SCOPE):
            logits = self._whole_rows(model.logits(hidden[: sizes.num_rows]))
            draw = partial(sample, num_top=num_top)
            if self.mesh.size > 1 and sizes == SampleSizes(sizes.num_rows) and sizes.num_rows % self.mesh.size == 0:
                draw = jax.shard_map(
                    partial(_sample_own_rows, num_top=num_top),
                    in_specs=(P(TENSOR_AXIS), P()),
                    out_specs=P(TENSOR_AXIS),
                    check_vma=False,
                )
            return self._replicate(draw(logits, inputs))

    def sample_next(
        self,
        sizes: SampleSizes,
        num_top: int | None,
        weights: list[Array],
        latest: Int[Array, " max_num_seqs"],
        hidden: Float[Array, "max_num_seqs hidden_size"],
        packed: Int[Array, " size"],
        num_before: Int[Array, ""],
    ) -> tuple[SampledTokens, Int[Array, " max_num_seqs"]]:
        """The drawn tokens, and ``latest`` with them."""
        sampled = self._sample(sizes, num_top, weights, hidden, packed, num_before)
        latest = jax.lax.dynamic_update_slice(latest, sampled.token_ids, (0,))
        return sampled, self._replicate(latest)

    def _whole_rows(self, logits: Float[Array, "rows vocab"]) -> Float[Array, "rows vocab"]:
        """Each row on one device, whose part of the vocabulary is then no concern of what reads it.

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
    """Each device decides what its own rows need: all would otherwise ask each other at every turn."""
    first = jax.lax.axis_index(TENSOR_AXIS) * len(logits)
    return sample(logits, rows_from(inputs, first, len(logits)), num_top=num_top)
