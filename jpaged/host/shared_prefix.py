"""The prefix that the decodes of a plan share: found once for as long as the same rows decode."""

import math
from collections.abc import Hashable, Sequence

import numpy as np
from jaxtyping import Int32

from jpaged.contract.layer_groups import LayerGroups
from jpaged.host.blocks.manager import BlockManager
from jpaged.host.policies.shared_prefix import QUERY_COST, find_shared
from jpaged.host.rows import NO_DECODES, Decodes


class SharedPrefix:
    """Finds shared prefixes by block tables.

    Args:
        blocks: the bookkeeping of the pools, which knows the block tables.

    Attributes:
        least_saved: tokens that decodes must save for the device to read a prefix once; infinite if it never does.
    """

    def __init__(self, blocks: BlockManager) -> None:
        self.least_saved = math.inf
        self._blocks = blocks
        self._decodes = NO_DECODES
        self._lens: Int32[np.ndarray, " decodes"] | None = None

    def lens(self, decodes: Decodes, positions: Int32[np.ndarray, " decodes"]) -> Int32[np.ndarray, " decodes"] | None:
        """``StepPlan.shared_lens`` of a plan that does nothing but decode.

        Args:
            decodes: the rows.
            positions: tokens of each before the plan's draws, as in ``RowTable``.
        """
        if decodes is not self._decodes:
            self._decodes, self._lens = decodes, self._find(decodes, positions)
        return self._lens

    def _find(self, decodes: Decodes, positions: Int32[np.ndarray, " decodes"]) -> Int32[np.ndarray, " decodes"] | None:
        groups, block_size, device = self._blocks.groups, self._blocks.block_size, self._blocks.tiers.device
        most_saved = device.num_holders - (len(device.blocks) - len(device.free))  # by any prefixes of any sequences
        if most_saved * block_size < self.least_saved or groups.num_full == 0:
            return None
        tables = [self._blocks.holdings.held_by(seq_id).blocks for seq_id in decodes.seq_ids.tolist()]
        if len(groups) > 1:
            tables = [_of_full_groups(cells, groups) for cells in tables]
        num_full = (positions - 1) // block_size  # the newest token is not in the pool yet
        return find_shared(tables, num_full.tolist(), block_size, self.least_saved, QUERY_COST)


def _of_full_groups(cells: list[int], groups: LayerGroups) -> Sequence[Hashable]:
    """The blocks of each logical block in all groups without a window, of which there is one in most models."""
    columns = [cells[group :: len(groups)] for group in range(groups.num_full)]
    return columns[0] if len(columns) == 1 else list(zip(*columns, strict=True))
