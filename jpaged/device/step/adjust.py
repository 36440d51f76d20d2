"""Changes of adjustments, packed for the program that enters them."""

import numpy as np
from jaxtyping import Array, Int32

from jpaged.contract.adjustments import RowAdjustments
from jpaged.device.sampling.adjustments import Adjustments
from jpaged.device.step.layout import Layout

ADJUSTED_ROWS, CHANGED_MARKS, CHANGED_BIASES = 64, 2048, 256
"""Rows that begin anew, marks and biases that one call enters into the adjustments."""

LAYOUT = Layout(rows=(ADJUSTED_ROWS,), marks=(3, CHANGED_MARKS), biases=(4, CHANGED_BIASES))
"""Packed changes of adjustments, as many as one call enters."""


def enter_adjustments(adjustments: Adjustments, packed: Int32[Array, " adjustment_size"]) -> Adjustments:
    """The adjustments with the changes of one call."""
    return adjustments.enter(**LAYOUT.split(packed))


def pack_adjustments(changes: RowAdjustments, num_table_rows: int) -> tuple[Int32[np.ndarray, " adjustment_size"], ...]:
    """All changes, as many in each call as it enters. A row begins anew before any of its marks is added."""
    marks = np.stack([changes.mark_rows, changes.mark_ids, changes.marks])
    values = changes.bias_values.view(np.int32)
    biases = np.stack([changes.bias_rows, changes.bias_places, changes.bias_ids, values])
    layout, packed = LAYOUT, []
    num_clearing = -(-len(changes.rows) // ADJUSTED_ROWS)
    num_entering = max(-(-marks.shape[1] // CHANGED_MARKS), -(-biases.shape[1] // CHANGED_BIASES), 1)
    first = max(num_clearing - 1, 0)  # the last call that clears rows enters marks too
    for number in range(first + num_entering):
        packed.append(np.zeros(layout.size, np.int32))
        fields = layout.split(packed[-1])
        for name in ("marks", "biases"):
            fields[name][0] = num_table_rows  # padding, which is dropped
        fields["rows"][:] = num_table_rows
        rows = changes.rows[number * ADJUSTED_ROWS :][:ADJUSTED_ROWS]
        fields["rows"][: len(rows)] = rows
        if number >= first:
            for name, all_changes, most in (("marks", marks, CHANGED_MARKS), ("biases", biases, CHANGED_BIASES)):
                own = all_changes[:, (number - first) * most :][:, :most]
                fields[name][:, : own.shape[1]] = own
    return tuple(packed)
