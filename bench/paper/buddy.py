"""A buddy allocator of contiguous slots, which the paper assumes for Orca's KV (section 6.1)."""


class BuddyAllocator:
    """Hands out contiguous runs of slots, each a power of two long and aligned to its length.

    Other pools are cut into the powers of two that sum to them, largest first.

    Args:
        num_slots: slots in the pool.

    Raises:
        ValueError: the pool is empty.
    """

    def __init__(self, num_slots: int) -> None:
        if num_slots < 1:
            raise ValueError(f"num_slots={num_slots}: give 1 or more")
        self.num_slots = num_slots
        self.num_free = num_slots
        largest = num_slots.bit_length() - 1
        self._free: list[set[int]] = [set() for _ in range(largest + 1)]  # by order: starts of runs of 2**order slots
        self._orders: dict[int, int] = {}  # of the runs handed out, by start
        start = 0
        for order in range(largest, -1, -1):
            if num_slots >> order & 1:
                self._free[order].add(start)
                start += 1 << order

    def allocate(self, num_slots: int) -> int | None:
        """Take the smallest run that holds ``num_slots``. Returns its first slot, or None if no free run is long
        enough.

        Raises:
            ValueError: fewer than one slot asked for.
        """
        if num_slots < 1:
            raise ValueError(f"num_slots={num_slots}: ask for 1 or more")
        wanted = (num_slots - 1).bit_length()
        order = next((o for o in range(wanted, len(self._free)) if self._free[o]), None)
        if order is None:
            return None
        start = min(self._free[order])
        self._free[order].remove(start)
        while order > wanted:
            order -= 1
            self._free[order].add(start + (1 << order))
        self._orders[start] = order
        self.num_free -= 1 << order
        return start

    def free(self, start: int) -> None:
        """Free a run, and merge it with its buddy while the buddy is free.

        Raises:
            ValueError: no run handed out starts there.
        """
        order = self._orders.pop(start, None)
        if order is None:
            raise ValueError(f"start={start}: no run handed out starts there")
        self.num_free += 1 << order
        # A whole cut of the pool is never merged: the rest of the pool after it is shorter.
        while order + 1 < len(self._free) and (buddy := start ^ (1 << order)) in self._free[order]:
            self._free[order].remove(buddy)
            start = min(start, buddy)
            order += 1
        self._free[order].add(start)
