"""The input of a draw: columns of the table's rows."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Int32, UInt16, UInt32

from jpaged.contract.plan import StepPlan
from jpaged.contract.rows import COLUMNS, PADDING_ROW, pack_row
from jpaged.request import SamplingParams

_LENS = ("min_lens", "prompt_lens")  # of which a draw needs no more than ``is_early``

_Column = Array | np.ndarray  # Array under jit; numpy where inputs are made on the host


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SampleInputs:
    """The input of ``sample`` besides the logits: one row for each token to draw.

    Padding rows have temperature 0 and no filter, so they cost no noise and no search.

    Args:
        temperature: below ``MIN_TEMPERATURE`` the row is greedy.
        top_k: 0 is off.
        top_p: 1 is off.
        min_p: 0 is off.
        repetition_penalty: 1 is off.
        presence_penalty: 0 is off.
        frequency_penalty: 0 is off.
        seeds: with ``positions``, all that a row's noise depends on.
        positions: position of the drawn token in its sequence.
        num_logprobs: alternatives that each row asks for; -1 if it asks for no log-probabilities.
        num_biases: logit biases of each row; -1 for a row without adjustments.
        is_early: whether stop tokens are banned.
        marks: marks of each token (``jpaged.contract.adjustments``); without columns if no row has adjustments.
        bias_ids: token of each bias.
        bias_values: number added to that token's logit.
    """

    temperature: Float[_Column, "rows"]
    top_k: Int[_Column, "rows"]
    top_p: Float[_Column, "rows"]
    min_p: Float[_Column, "rows"]
    repetition_penalty: Float[_Column, "rows"]
    presence_penalty: Float[_Column, "rows"]
    frequency_penalty: Float[_Column, "rows"]
    seeds: UInt32[_Column, "rows"]
    positions: Int[_Column, "rows"]
    num_logprobs: Int[_Column, "rows"]
    num_biases: Int[_Column, "rows"]
    is_early: Bool[_Column, "rows"]
    marks: UInt16[_Column, "rows marked_vocab"]
    bias_ids: Int[_Column, "rows most_biases"]
    bias_values: Float[_Column, "rows most_biases"]


def rows_from(inputs: SampleInputs, start: Int[Array, ""], num_rows: int) -> SampleInputs:
    """Some rows of inputs."""
    return jax.tree.map(lambda field: lax.dynamic_slice_in_dim(field, start, num_rows), inputs)


def inputs_of_rows(
    columns: Int[_Column, "columns table_rows"], rows: Int[_Column, " rows"], positions: Int[_Column, " rows"]
) -> SampleInputs:
    """Inputs of draws without adjustments, from the table: on the device, or of numpy arrays.

    Args:
        columns: bits of ``COLUMNS``.
        rows: row id of each draw; the padding row for padding.
        positions: position of each drawn token.
    """
    chosen = columns[:, rows]
    fields = {name: chosen[i].view(dtype) for i, (name, dtype) in enumerate(COLUMNS.items()) if name not in _LENS}
    is_early = positions < chosen[list(COLUMNS).index("min_lens")]
    none = positions[:, None][:, :0]
    nothing = {"marks": none.astype(np.uint16), "bias_ids": none, "bias_values": none.view(np.float32)}
    return SampleInputs(**fields, positions=positions, is_early=is_early, **nothing)


def pack_draws(plan: StepPlan, num_rows: int, padding_row: int) -> Int32[np.ndarray, "2 rows"]:
    """Row id and position of each draw of a plan, for a program that does nothing but draw.

    Args:
        plan: has at most ``num_rows`` draws.
        num_rows: rows of the logits, padding included.
        padding_row: row id of padding.
    """
    draws, num_draws = plan.draws, len(plan.draws)
    assert num_draws <= num_rows, (num_draws, num_rows)
    packed = np.zeros((2, num_rows), np.int32)
    packed[0, :num_draws], packed[0, num_draws:] = draws.rows, padding_row
    packed[1, :num_draws] = plan.chunks.stops[draws.chunks]
    return packed


def make_sample_inputs(
    params: Sequence[SamplingParams], seeds: Sequence[int], positions: Sequence[int], num_rows: int
) -> SampleInputs:
    """Inputs of draws that belong to no plan and have no adjustments, as padded numpy arrays.

    Args:
        params: sampling parameters of each draw.
        seeds: seed of each draw.
        positions: position of each drawn token.
        num_rows: rows of the logits, padding included.
    """
    num_draws = len(params)
    cells = b"".join(pack_row(own, seed, 0) for own, seed in zip(params, seeds, strict=True))
    columns = np.tile(PADDING_ROW[:, None], (1, num_rows))
    columns[:, :num_draws] = np.frombuffer(cells, np.int32).reshape(num_draws, len(COLUMNS)).T
    padded_positions = np.zeros(num_rows, np.int32)
    padded_positions[:num_draws] = positions
    return inputs_of_rows(columns, np.arange(num_rows, dtype=np.int32), padded_positions)
