"""What steps hand on to each other on the device, in arrays that stay where they are."""

import dataclasses
from dataclasses import dataclass
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from jpaged.device.sampling.sampler import SampleSizes
from jpaged.device.step.inputs import Bucket, packed_size


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StepState:
    """The inputs and the results of a step.

    A value like the cache: donate it, and it is written in place. Programs then find all that they read and write where
    it was the last time. A GPU runs them as graphs that hold addresses, and to change these takes the host longer than
    a small step runs.

    Args:
        inputs: of a bucket's program, one after the other: what ``StepPacker`` packs, and for decodes what
            ``SamplePacker`` packs and the number of steps.
        latest: tokens drawn by the last step, one for each of its samples.
        hidden: of the tokens of the last decode.
        sample_hidden: of the last step's tokens whose logits are read.
        drawn: tokens and the bits of their log-probabilities, of the last decodes: one row for each step of a burst.
    """

    inputs: Int[Array, " size"]
    latest: Int[Array, " max_num_seqs"]
    hidden: Float[Array, "max_num_seqs hidden_size"]
    sample_hidden: Float[Array, "max_num_seqs hidden_size"]
    drawn: Int[Array, "2 max_burst max_num_seqs"]

    @classmethod
    def allocate(
        cls,
        buckets: list[Bucket],
        *,
        max_blocks: int,
        max_burst: int,
        hidden_size: int,
        dtype: jax.typing.DTypeLike,
        sharding: jax.sharding.Sharding | None = None,
    ) -> Self:
        """A state of zeros for the programs of some buckets."""
        most_rows = max(bucket.num_rows for bucket in buckets)
        return cls(
            inputs=jnp.zeros(max(num_decode_inputs(b, max_blocks) for b in buckets), jnp.int32, device=sharding),
            latest=jnp.zeros(most_rows, jnp.int32, device=sharding),
            hidden=jnp.zeros((most_rows, hidden_size), dtype, device=sharding),
            sample_hidden=jnp.zeros((most_rows, hidden_size), dtype, device=sharding),
            drawn=jnp.zeros((2, max_burst, most_rows), jnp.int32, device=sharding),
        )

    def load(self, inputs: Int[Array, " some"]) -> Self:
        """With the inputs of the next step."""
        return self._replace(inputs=_first(self.inputs, inputs))

    def step_inputs(self, bucket: Bucket, max_blocks: int) -> Int[Array, " step_size"]:
        """What ``StepPacker`` packed."""
        return self.inputs[: packed_size(bucket, max_blocks)]

    def decode_inputs(self, bucket: Bucket, max_blocks: int) -> tuple[Int[Array, " sample_size"], Int[Array, ""]]:
        """What ``SamplePacker`` packed, and the number of steps; see ``pack_decode_inputs``."""
        start, stop = packed_size(bucket, max_blocks), num_decode_inputs(bucket, max_blocks) - 1
        return self.inputs[start:stop], self.inputs[stop]

    def with_hidden(self, hidden: Float[Array, "rows hidden_size"]) -> Self:
        """With the hidden states of a decode."""
        return self._replace(hidden=_first(self.hidden, hidden))

    def with_sample_hidden(self, hidden: Float[Array, "rows hidden_size"]) -> Self:
        """With the hidden states that logits are made of."""
        return self._replace(sample_hidden=_first(self.sample_hidden, hidden))

    def with_drawn(self, step: Int[Array, ""], token_ids: Int[Array, " rows"], logprobs: Float[Array, " rows"]) -> Self:
        """With what a step of a burst drew."""
        bits = jax.lax.bitcast_convert_type(logprobs, jnp.int32)
        both = _first(self.drawn[:, 0].T, jnp.stack([token_ids, bits], axis=1)).T
        drawn = jnp.where(jnp.arange(self.drawn.shape[1])[:, None] == step, both[:, None], self.drawn)
        return self._replace(drawn=drawn, latest=_first(self.latest, token_ids))

    def _replace(self, **changes: Array) -> Self:
        return dataclasses.replace(self, **changes)


def pack_decode_inputs(
    packed: Int[np.ndarray, " step_size"], packed_samples: Int[np.ndarray, " sample_size"], num_steps: int
) -> Int[np.ndarray, " size"]:
    """The inputs of a decode's program, for ``StepState.load``.

    For 0 steps the program runs the model once and draws nothing: what it leaves in place of tokens means nothing.
    """
    return np.concatenate([packed, packed_samples, np.array([num_steps], np.int32)])


def num_decode_inputs(bucket: Bucket, max_blocks: int) -> int:
    """Length of what ``pack_decode_inputs`` makes."""
    return packed_size(bucket, max_blocks) + SampleSizes(bucket.num_rows).packed_size + 1


def _first(whole: Shaped[Array, "n *rest"], part: Shaped[Array, "m *rest"]) -> Shaped[Array, "n *rest"]:
    """``whole``, its first rows overwritten.

    All of it is written. An update in place becomes a copy that XLA takes out of a GPU's graph, and a loop around it
    too; the host then waits in every turn.
    """
    return jnp.concatenate([part, whole[len(part) :]])
