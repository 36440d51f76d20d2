"""The prefix that the decodes of a plan share: found once for as long as the same rows decode."""

import math

import numpy as np
from jaxtyping import Int32

from jpaged.host.blocks.manager import BlockManager
from jpaged.host.policies.shared_prefix import find_shared
from jpaged.host.rows import NO_DECODES, Decodes, RowTable


class SharedPrefix:
    """Finds shared prefixes by block tables.

    Args:
        blocks: the bookkeeping of the pools, which knows the block tables.
        rows: the rows of the running sequences.

    Attributes:
        least_saved: tokens that decodes must save for the device to read a prefix once; infinite if it never does.
    """

    def __init__(self, blocks: BlockManager, rows: RowTable) -> None:
        self.least_saved = math.inf
        self._blocks = blocks
        self._rows = rows
        self._decodes = NO_DECODES
        self._lens: Int32[np.ndarray, " decodes"] | None = None

    def lens(self, decodes: Decodes) -> Int32[np.ndarray, " decodes"] | None:
        """``StepPlan.shared_lens`` of decodes whose next draws are not planned yet."""
        if decodes is not self._decodes:
            self._decodes, self._lens = decodes, self._find(decodes)
        return self._lens

    def _find(self, decodes: Decodes) -> Int32[np.ndarray, " decodes"] | None:
        groups, block_size, device = self._blocks.groups, self._blocks.block_size, self._blocks.tiers.device
        most_saved = device.num_holders - (len(device.blocks) - len(device.free))  # by any prefixes of any sequences
        if most_saved * block_size < self.least_saved or groups.num_full == 0:
            return None
        tables = [self._blocks.holdings.held_by(seq_id).blocks for seq_id in decodes.seq_ids.tolist()]
        if len(groups) > 1:  # a logical block is its blocks of all groups without a window
            full = range(groups.num_full)
            tables = [list(zip(*(cells[group :: len(groups)] for group in full), strict=True)) for cells in tables]
        num_full = (self._rows.positions[decodes.rows] - 1) // block_size  # the newest token is not in the pool yet
        return find_shared(tables, num_full.tolist(), block_size, self.least_saved)
