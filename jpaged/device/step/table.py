"""The rows on the device, and what steps hand on to each other, in arrays that stay where they are."""

import dataclasses
from dataclasses import dataclass
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from jpaged.contract.rows import PADDING_ROW, PROMPT_LEN
from jpaged.device.sampling.columns import SampleInputs, inputs_of_rows
from jpaged.device.step.inputs import Bucket, StepInputs
from jpaged.device.step.pack import change_layout, step_layout


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StepState:
    """The table of rows, and the inputs and the results of a step.

    A value like the cache: donate it, and it is written in place. Programs then find all that they read and write where
    it was the last time. A GPU runs them as graphs that hold addresses, and to change these takes the host longer than
    a small step runs.

    The last row of the table is padding: its blocks are block 0, and it asks for nothing.

    Args:
        block_tables: physical blocks by row id: the block table of the first layer group, then those of the others.
            Cells beyond a row's tokens, or before its windows, hold anything.
        columns: bits of ``COLUMNS``, by row id.
        latest: newest token drawn for each row.
        inputs: inputs of a bucket's program, as ``step_layout`` says.
        number: steps of the loaded burst that have run.
        hidden: hidden states of the last decode's tokens.
        sample_hidden: hidden states of the last step's tokens whose logits are read.
        drawn: tokens and the bits of their log-probabilities, drawn by the last decodes: one row for each step of a
            burst.
    """

    block_tables: Int[Array, "table_rows cells"]
    columns: Int[Array, "columns table_rows"]
    latest: Int[Array, " table_rows"]
    inputs: Int[Array, " size"]
    number: Int[Array, ""]
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
        num_groups: int = 1,
    ) -> Self:
        """A table of padding rows, for the programs of some buckets."""
        most_rows = max(bucket.num_rows for bucket in buckets)
        inputs_size = max(step_layout(bucket).size for bucket in buckets)
        columns = np.tile(PADDING_ROW[:, None], (1, most_rows + 1))
        return cls(
            block_tables=jnp.zeros((most_rows + 1, num_groups * max_blocks), jnp.int32, device=sharding),
            columns=jnp.asarray(columns, device=sharding),
            latest=jnp.zeros(most_rows + 1, jnp.int32, device=sharding),
            inputs=jnp.zeros(inputs_size, jnp.int32, device=sharding),
            number=jnp.zeros((), jnp.int32, device=sharding),
            hidden=jnp.zeros((most_rows, hidden_size), dtype, device=sharding),
            sample_hidden=jnp.zeros((most_rows, hidden_size), dtype, device=sharding),
            drawn=jnp.zeros((2, max_burst, most_rows), jnp.int32, device=sharding),
        )

    # Between steps: programs of their own, in which an update in place breaks no graph ---------------------------

    def enter(self, changes: Int[Array, " change_size"]) -> Self:
        """The state with some changes of the table; see ``change_layout``."""
        fields = change_layout(len(self.latest)).split(changes)
        columns = self.columns.at[:, fields["rows"]].set(fields["columns"], mode="drop")
        return self._replace(columns=columns, block_tables=self._tables_with(fields["cells"], fields["blocks"]))

    def load(self, bucket: Bucket, loaded: Int[Array, " loaded_size"]) -> Self:
        """The state with the inputs of the next step, and the cells of block tables that came with them."""
        size = step_layout(bucket).size
        cells, blocks = loaded[size:].reshape(2, bucket.num_rows)
        return self._replace(
            inputs=_first(self.inputs, loaded[:size]),
            number=jnp.zeros_like(self.number),
            block_tables=self._tables_with(cells, blocks),
        )

    def _tables_with(self, cells: Int[Array, " some"], blocks: Int[Array, " some"]) -> Int[Array, "table_rows cells"]:
        return self.block_tables.reshape(-1).at[cells].set(blocks, mode="drop").reshape(self.block_tables.shape)

    # Inside a step ------------------------------------------------------------------------------------------------

    def step_inputs(self, bucket: Bucket, block_size: int, num_groups: int = 1) -> StepInputs:
        """The batch of the next forward pass.

        A row that has drawn all its tokens of a burst feeds token 0, writes to block 0, and reads nothing else.
        """
        fields = self._fields(bucket)
        padding_row, goes_on = len(self.latest) - 1, self._goes_on(bucket)
        chunks, cu_q_lens = fields["chunks"], fields["cu_q_lens"]
        index = jnp.arange(bucket.num_tokens, dtype=jnp.int32)
        rows = jnp.where(goes_on, fields["rows"], padding_row)
        starts = fields["starts"] + jnp.minimum(self.number, jnp.maximum(fields["num_draws"] - 1, 0))
        kv_lens = starts + cu_q_lens[1:] - cu_q_lens[:-1]
        kv_lens = jnp.where(goes_on, kv_lens, jnp.minimum(kv_lens, 1))
        is_token = index < cu_q_lens[-1]
        positions = jnp.where(is_token, starts[chunks] + index - cu_q_lens[chunks], 0)
        is_fed = is_token & goes_on[chunks]
        max_blocks = self.block_tables.shape[1] // num_groups
        logical_starts = jnp.arange(max_blocks, dtype=jnp.int32) * block_size
        is_held, slots, tables = logical_starts[None, :] < kv_lens[:, None], [], []
        for first in range(0, num_groups * max_blocks, max_blocks):
            blocks = self.block_tables[rows[chunks], first + positions // block_size]
            slots.append(jnp.where(is_fed, blocks * block_size + positions % block_size, 0))
            table = self.block_tables[:, first : first + max_blocks] if num_groups > 1 else self.block_tables
            tables.append(jnp.where(is_held, table[rows], 0))
        is_drawn = (fields["token_ids"] < 0) | (self.number > 0)
        token_ids = jnp.where(is_drawn, self.latest[rows[chunks]], fields["token_ids"])
        return StepInputs(
            token_ids=jnp.where(is_fed, token_ids, 0),
            positions=positions,
            prompt_lens=jnp.where(is_token, self.columns[PROMPT_LEN][fields["rows"][chunks]], 0),
            slots=slots[0] if num_groups == 1 else jnp.stack(slots),
            block_tables=tables[0] if num_groups == 1 else jnp.stack(tables),
            kv_lens=kv_lens,
            cu_q_lens=cu_q_lens,
            stream_starts=fields["stream_starts"],
            sample_tokens=fields["sample_tokens"],
            num_draws=jnp.maximum(fields["num_draws"] - self.number, 0),
            shared_lens=jnp.where(goes_on, fields["shared_lens"], 0),  # a row that has ended has no table
        )

    def sample_inputs(self, bucket: Bucket) -> SampleInputs:
        """The rows of the next draws, one for each row of logits."""
        fields = self._fields(bucket)
        tokens, chunks = fields["sample_tokens"], fields["chunks"]
        positions = fields["starts"][chunks[tokens]] + tokens - fields["cu_q_lens"][chunks[tokens]] + 1
        rows = jnp.where(self._goes_on(bucket), fields["sample_rows"], len(self.latest) - 1)
        return inputs_of_rows(self.columns, rows, positions + self.number)

    def num_steps(self, bucket: Bucket) -> Int[Array, ""]:
        """Steps that a decode's program runs and draws in; 0 if it runs once and draws nothing."""
        return self._fields(bucket)["num_steps"][0]

    def with_hidden(self, hidden: Float[Array, "rows hidden_size"]) -> Self:
        """The state with the hidden states of a decode."""
        return self._replace(hidden=_first(self.hidden, hidden))

    def with_sample_hidden(self, hidden: Float[Array, "rows hidden_size"]) -> Self:
        """The state with the hidden states that logits are made of."""
        return self._replace(sample_hidden=_first(self.sample_hidden, hidden))

    def with_drawn(self, bucket: Bucket, token_ids: Int[Array, " rows"], logprobs: Float[Array, " rows"]) -> Self:
        """The state with the tokens that a decode's own program drew in a step, which is over."""
        is_draw = self._goes_on(bucket) & (self.num_steps(bucket) > 0)
        rows = jnp.where(is_draw, self._fields(bucket)["sample_rows"], -1)
        bits = jax.lax.bitcast_convert_type(logprobs, jnp.int32)
        both = _first(self.drawn[:, 0].T, jnp.stack([token_ids, bits], axis=1)).T
        drawn = jnp.where(jnp.arange(self.drawn.shape[1])[:, None] == self.number, both[:, None], self.drawn)
        return self._replace(drawn=drawn, latest=with_latest(self.latest, rows, token_ids), number=self.number + 1)

    def _fields(self, bucket: Bucket) -> dict[str, Int[Array, "..."]]:
        layout = step_layout(bucket)
        return layout.split(self.inputs[: layout.size])

    def _goes_on(self, bucket: Bucket) -> Bool[Array, " rows"]:
        """Rows that draw in this step, if it is one of a burst; otherwise all."""
        return (self.number == 0) | (self._fields(bucket)["num_draws"] > self.number)

    def _replace(self, **changes: Array) -> Self:
        return dataclasses.replace(self, **changes)


def with_latest(
    latest: Int[Array, " table_rows"], rows: Int[Array, " draws"], token_ids: Int[Array, " draws"]
) -> Int[Array, " table_rows"]:
    """``latest`` with the tokens that were drawn for some rows, which differ; a row below 0 is none.

    All of it is written, as in ``_first``: a scatter is an update in place.
    """
    is_own = rows[None, :] == jnp.arange(len(latest), dtype=jnp.int32)[:, None]
    newest = jnp.max(jnp.where(is_own, token_ids[None, :], -1), axis=1)
    return jnp.where(newest >= 0, newest, latest)


def _first(whole: Shaped[Array, "n *rest"], part: Shaped[Array, "m *rest"]) -> Shaped[Array, "n *rest"]:
    """``whole``, its first rows overwritten.

    All of it is written. An update in place becomes a copy that XLA takes out of a GPU's graph, and a loop around it
    too; the host then waits in every iteration.
    """
    return jnp.concatenate([part, whole[len(part) :]])
