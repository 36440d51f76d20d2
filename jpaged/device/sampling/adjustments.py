"""Adjustments of logits by row: biases, bans, and the tokens that penalties count."""

import dataclasses
from dataclasses import dataclass
from typing import Self

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, UInt16

from jpaged.contract.adjustments import BANNED, BANNED_EARLY, BANNED_NOW, GENERATED, IN_PROMPT, MOST_GENERATED
from jpaged.device.sampling.columns import SampleInputs
from jpaged.request import MAX_LOGIT_BIAS

_BIASES_AT_ONCE = 16


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Adjustments:
    """The adjustments of all rows of the table. A value like the cache: donate it, and it is written in place.

    The marks of 1,025 rows and a vocabulary of 128,256 tokens are 263 MB.

    Args:
        marks: bits of ``jpaged.contract.adjustments`` for each token.
        bias_ids: token of each bias of a row; only the first ``num_biases`` of the table's column count.
        bias_values: number added to that token's logit.
    """

    marks: UInt16[Array, "table_rows vocab"]
    bias_ids: Int[Array, "table_rows most_biases"]
    bias_values: Float[Array, "table_rows most_biases"]

    @classmethod
    def allocate(cls, num_table_rows: int, vocab_size: int, sharding: jax.sharding.Sharding | None = None) -> Self:
        """No adjustments, of any row."""
        biases = num_table_rows, MAX_LOGIT_BIAS
        return cls(
            marks=jnp.zeros((num_table_rows, vocab_size), jnp.uint16, device=sharding),
            bias_ids=jnp.zeros(biases, jnp.int32, device=sharding),
            bias_values=jnp.zeros(biases, jnp.float32, device=sharding),
        )

    def enter(
        self,
        rows: Int[Array, " some_rows"],
        marks: Int[Array, "3 some_marks"],
        biases: Int[Array, "4 some_biases"],
    ) -> Self:
        """The adjustments with some changes.

        Args:
            rows: rows that begin anew; those beyond the table are padding.
            marks: row, token and number to add of each changed mark.
            biases: row, place, token and the bits of the value of each bias.
        """
        added = marks[2].astype(jnp.uint16)  # modulo 2**16, so that a mark can be taken back
        bias_at = biases[0], biases[1]
        values = lax.bitcast_convert_type(biases[3], jnp.float32)
        return dataclasses.replace(
            self,
            marks=self.marks.at[rows].set(jnp.uint16(0), mode="drop").at[marks[0], marks[1]].add(added, mode="drop"),
            bias_ids=self.bias_ids.at[bias_at].set(biases[2], mode="drop"),
            bias_values=self.bias_values.at[bias_at].set(values, mode="drop"),
        )

    def inputs_of(self, inputs: SampleInputs, rows: Int[Array, " rows"]) -> SampleInputs:
        """Inputs of draws for some rows, with their adjustments."""
        marks = jnp.where(inputs.num_biases[:, None] >= 0, self.marks[rows], jnp.uint16(0))
        return dataclasses.replace(
            inputs, marks=marks, bias_ids=self.bias_ids[rows], bias_values=self.bias_values[rows]
        )

    def with_drawn(self, inputs: SampleInputs, rows: Int[Array, " rows"], token_ids: Int[Array, " rows"]) -> Self:
        """The adjustments after draws: adjusted rows have generated one more token."""
        marks = jnp.take_along_axis(inputs.marks, token_ids[:, None], axis=1)[:, 0]
        added = jnp.where(marks < GENERATED * MOST_GENERATED, jnp.uint16(GENERATED), jnp.uint16(0))
        own = jnp.where(inputs.num_biases >= 0, rows, len(self.marks))
        return dataclasses.replace(self, marks=self.marks.at[own, token_ids].add(added, mode="drop"))


def adjusted(logits: Float[Array, "rows vocab"], inputs: SampleInputs) -> Float[Array, "rows vocab"]:
    """The logits with biases, then bans, then penalties; the same logits for inputs without adjustments."""
    if inputs.marks.shape[1] == 0:
        return logits
    late = BANNED | BANNED_NOW
    bans = jnp.where(inputs.is_early[:, None], jnp.uint16(late | BANNED_EARLY), jnp.uint16(late))
    allowed = jnp.where((inputs.marks & bans) == 0, _biased(logits, inputs), -jnp.inf)
    return _penalised(allowed, inputs)


def _biased(logits: Float[Array, "rows vocab"], inputs: SampleInputs) -> Float[Array, "rows vocab"]:
    """The logits with what each row adds to some of its tokens', a few of each row at a time."""
    rows, vocab_size = logits.shape
    row_ids, counts = jnp.arange(rows, dtype=jnp.int32)[:, None], inputs.num_biases[:, None]

    def add(step: Int[Array, ""], logits: Float[Array, "rows vocab"]) -> Float[Array, "rows vocab"]:
        start = step * _BIASES_AT_ONCE
        ids, values = [
            lax.dynamic_slice_in_dim(jnp.asarray(each), start, _BIASES_AT_ONCE, axis=1)
            for each in (inputs.bias_ids, inputs.bias_values)
        ]
        is_own = start + lax.broadcasted_iota(jnp.int32, ids.shape, 1) < counts
        return logits.at[row_ids, jnp.where(is_own, ids, vocab_size)].add(values, mode="drop")

    most = jnp.max(inputs.num_biases)
    return lax.fori_loop(0, (most + _BIASES_AT_ONCE - 1) // _BIASES_AT_ONCE, add, logits)


def _penalised(logits: Float[Array, "rows vocab"], inputs: SampleInputs) -> Float[Array, "rows vocab"]:
    """The logits after repetition (CTRL, arXiv:1909.05858, section 4.1), frequency and presence penalties."""
    num_generated = (inputs.marks // jnp.uint16(GENERATED)).astype(jnp.float32)
    is_seen = ((inputs.marks & jnp.uint16(IN_PROMPT)) > 0) | (num_generated > 0)
    repetition = jnp.where(is_seen, inputs.repetition_penalty[:, None], 1.0)
    logits = jnp.where(logits > 0, logits / repetition, logits * repetition)
    logits -= inputs.frequency_penalty[:, None] * num_generated
    return logits - inputs.presence_penalty[:, None] * (num_generated > 0).astype(jnp.float32)
