"""The input of a draw: columns of the table's rows, and the packed biases, bans and histories of some of them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Int32, UInt32

from jpaged.contract.draws import NO_EXTRAS, Extras
from jpaged.contract.plan import StepPlan
from jpaged.contract.rows import COLUMNS, PADDING_ROW, pack_row
from jpaged.request import SamplingParams

_MIN_FLAT_LEN = 64

_Column = Array | np.ndarray  # Array under jit; numpy where inputs are made on the host

_EXTRA_FIELDS = ("bias_rows", "bias_ids", "bias_values", "seen_rows", "seen_ids", "seen_is_output")


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
        bias_rows: row of each logit bias; padding entries hold the number of rows.
        bias_ids: token of each logit bias.
        bias_values: number added to that token's logit; -inf bans the token.
        seen_rows: row of each token of the penalised rows' history; padding entries hold the number of rows.
        seen_ids: that token.
        seen_is_output: whether the token was generated; otherwise the token belongs to the prompt.
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
    bias_rows: Int[_Column, "biases"]
    bias_ids: Int[_Column, "biases"]
    bias_values: Float[_Column, "biases"]
    seen_rows: Int[_Column, "seen"]
    seen_ids: Int[_Column, "seen"]
    seen_is_output: Bool[_Column, "seen"]


class SampleSizes(NamedTuple):
    """The static sizes of packed draws.

    Args:
        num_rows: rows of the logits, padding included.
        num_biases: length of the flat arrays of biases: 0, or 64 times a power of 4.
        num_seen: length of the flat arrays of histories: 0, or 64 times a power of 4.
    """

    num_rows: int
    num_biases: int = 0
    num_seen: int = 0

    @property
    def packed_size(self) -> int:
        """Length of the packed array."""
        return 2 * self.num_rows + 3 * self.num_biases + 3 * self.num_seen


def rows_from(inputs: SampleInputs, start: Int[Array, ""], num_rows: int) -> SampleInputs:
    """Some rows of inputs without biases and penalties."""
    names = [name for name in SampleInputs.__dataclass_fields__ if name not in _EXTRA_FIELDS]
    return replace(inputs, **{n: lax.dynamic_slice(getattr(inputs, n), (start,), (num_rows,)) for n in names})


def inputs_of_rows(
    columns: Int[_Column, "columns table_rows"], rows: Int[_Column, " rows"], positions: Int[_Column, " rows"]
) -> SampleInputs:
    """Inputs of draws without biases and penalties, from the table: on the device, or of numpy arrays.

    Args:
        columns: bits of ``COLUMNS``.
        rows: row id of each draw; the padding row for padding.
        positions: position of each drawn token.
    """
    chosen = columns[:, rows]
    fields = {name: chosen[i].view(dtype) for i, (name, dtype) in enumerate(COLUMNS.items()) if name != "prompt_lens"}
    none = positions[:0]
    extras = dict.fromkeys(_EXTRA_FIELDS, none) | {"bias_values": none.view(np.float32), "seen_is_output": none != 0}
    return SampleInputs(**fields, positions=positions, **extras)


def pack_draws(plan: StepPlan, num_rows: int, padding_row: int) -> tuple[Int32[np.ndarray, " size"], SampleSizes]:
    """The draws of a plan in one array, a new one, for a program that does nothing but draw.

    Args:
        plan: has at most ``num_rows`` draws.
        num_rows: rows of the logits, padding included.
        padding_row: row id of padding.
    """
    draws, num_draws = plan.draws, len(plan.draws)
    assert num_draws <= num_rows, (num_draws, num_rows)
    rows, positions = np.full(num_rows, padding_row, np.int32), np.zeros(num_rows, np.int32)
    rows[:num_draws] = draws.rows
    positions[:num_draws] = plan.chunks.stops[draws.chunks]
    biases, seen = _pack_extras(draws.extras, num_rows)
    sizes = SampleSizes(num_rows, biases.shape[1], seen.shape[1])
    return np.concatenate([rows, positions, biases.reshape(-1), seen.reshape(-1)]), sizes


def _pack_extras(
    extras: Extras, num_rows: int
) -> tuple[Int32[np.ndarray, "fields biases"], Int32[np.ndarray, "fields seen"]]:
    return (
        np.stack(
            [
                padded(extras.bias_draws, num_rows),
                padded(extras.bias_ids, 0),
                padded(extras.bias_values, 0).view(np.int32),
            ]
        ),
        np.stack(
            [
                padded(extras.seen_draws, num_rows),
                padded(extras.seen_ids, 0),
                padded(extras.seen_is_output.astype(np.int32), 0),
            ]
        ),
    )


def unpack_draws(
    packed: Int[_Column, " size"], sizes: SampleSizes, columns: Int[_Column, "columns table_rows"]
) -> tuple[Int[_Column, " rows"], SampleInputs]:
    """Row id of each draw, and the inputs: on the device, or views of numpy arrays."""
    rows, positions = packed[: sizes.num_rows], packed[sizes.num_rows : 2 * sizes.num_rows]
    start = 2 * sizes.num_rows
    biases = packed[start : start + 3 * sizes.num_biases].reshape(3, sizes.num_biases)
    seen = packed[start + 3 * sizes.num_biases :].reshape(3, sizes.num_seen)
    return rows, replace(
        inputs_of_rows(columns, rows, positions),
        bias_rows=biases[0],
        bias_ids=biases[1],
        bias_values=biases[2].view(np.float32),
        seen_rows=seen[0],
        seen_ids=seen[1],
        seen_is_output=seen[2] != 0,
    )


def make_sample_inputs(
    params: Sequence[SamplingParams],
    seeds: Sequence[int],
    positions: Sequence[int],
    num_rows: int,
    extras: Extras = NO_EXTRAS,
) -> SampleInputs:
    """Inputs of draws that belong to no plan, as padded numpy arrays.

    Args:
        params: sampling parameters of each draw.
        seeds: seed of each draw.
        positions: position of each drawn token.
        num_rows: rows of the logits, padding included.
        extras: biases, bans and histories.
    """
    num_draws = len(params)
    cells = b"".join(pack_row(own, seed, 0) for own, seed in zip(params, seeds, strict=True))
    columns = np.tile(PADDING_ROW[:, None], (1, num_rows))
    columns[:, :num_draws] = np.frombuffer(cells, np.int32).reshape(num_draws, len(COLUMNS)).T
    padded_positions = np.zeros(num_rows, np.int32)
    padded_positions[:num_draws] = positions
    biases, seen = _pack_extras(extras, num_rows)
    packed = [np.arange(num_rows, dtype=np.int32), padded_positions, biases.reshape(-1), seen.reshape(-1)]
    sizes = SampleSizes(num_rows, biases.shape[1], seen.shape[1])
    return unpack_draws(np.concatenate(packed), sizes, columns)[1]


def padded(values: np.ndarray, fill: int) -> np.ndarray:
    """Pad to 64, 256, 1024, ... entries: each length is a program of its own, and padding costs next to nothing."""
    if len(values) == 0:
        return values
    length = _MIN_FLAT_LEN
    while length < len(values):
        length *= 4
    return np.concatenate([values, np.full(length - len(values), fill, values.dtype)])
