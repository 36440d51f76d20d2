"""Pinned prefixes: prompts whose blocks stay in the pool, and the capacity that they leave to others."""

from jpaged.host.blocks.holdings import common_len
from jpaged.host.blocks.manager import BlockManager
from jpaged.host.sequence import SequenceGroup, SequenceState
from jpaged.request import Request


class Pins:
    """Pins by request id: queued until their prompt is computed, then held until they are released.

    Args:
        blocks: the bookkeeping of the pools, which pins free their blocks in.
    """

    def __init__(self, blocks: BlockManager) -> None:
        self.state = object()
        """A new object after every change: while it stays, the pins keep the same capacity from a request."""
        self._blocks = blocks
        self._queued: dict[str, SequenceGroup] = {}
        self.held: dict[str, SequenceGroup] = {}
        """The pins whose blocks are in the pool, by request id; written here alone."""

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._queued or request_id in self.held

    def __len__(self) -> int:
        return len(self._queued) + len(self.held)

    def is_held(self, request_id: str) -> bool:
        """Whether the blocks of a pin are in the pool."""
        return request_id in self.held

    @property
    def held_seq_ids(self) -> list[int]:
        """The sequences that hold the blocks of pins."""
        return [pin.sequences[0].seq_id for pin in self.held.values()]

    def queue(self, pin: SequenceGroup) -> None:
        """Add a pin whose prompt is still to be computed."""
        self.state = object()
        self._queued[pin.request.request_id] = pin

    def hold(self, pin: SequenceGroup) -> None:
        """Mark a queued pin as held: its sequence holds the blocks of its prompt."""
        self.state = object()
        self.held[pin.request.request_id] = self._queued.pop(pin.request.request_id)

    def discard(self, request_id: str) -> None:
        """Forget a pin that is still queued, if there is one."""
        if self._queued.pop(request_id, None) is not None:
            self.state = object()

    def release(self, request_id: str) -> None:
        """Free the blocks of a held pin; they stay in the prefix cache."""
        self.state = object()
        self._blocks.free(self.held.pop(request_id).sequences[0].seq_id)

    def requeue_all(self) -> list[SequenceGroup]:
        """Free the blocks of all held pins, whose content is lost. Returns the pins to compute again."""
        lost = list(self.held.values())
        for pin in lost:
            self.release(pin.request.request_id)
            for seq in pin.sequences:
                seq.state, seq.num_computed = SequenceState.WAITING, 0
            self.queue(pin)
        return lost

    def num_blocks_kept_from(self, request: Request | None) -> int:
        """Count the blocks that pins keep from ``request``, which may share the beginning of one pin.

        Without a request, count all blocks that pins take.
        """
        if not self._queued and not self.held:
            return 0
        block_size = self._blocks.block_size
        groups = self._blocks.groups
        num_queued = sum(groups.num_blocks(pin.prompt_len, block_size, pin.prompt_len) for pin in self._queued.values())
        num_kept = len(self._held_blocks()) + num_queued
        if request is not None and request.params.prompt_logprobs is None:
            pins = [*self._queued.values(), *self.held.values()]
            num_kept -= max((self._num_common_blocks(pin.request, request) for pin in pins), default=0)
        return num_kept

    def _held_blocks(self) -> set[tuple[int, int]]:
        """The full blocks of pins, each once, and the last block of each pin that is not full.

        Pins always share full blocks. They share others only by chance: no longer after a failed step lost the pool.
        """
        held: set[tuple[int, int]] = set()
        for pin in self.held.values():
            seq_id = pin.sequences[0].seq_id
            table = self._blocks.holdings.held_by(seq_id).live_blocks
            if not self._blocks.groups.is_plain:
                held |= {(block, -1) for block in table}
                continue
            num_full = pin.prompt_len // self._blocks.block_size
            held |= {(block, -1) for block in table[:num_full]} | {(block, seq_id) for block in table[num_full:]}
        return held

    def _num_common_blocks(self, pin: Request, request: Request) -> int:
        """Count the full blocks of a pin that a request shares."""
        if pin.prefix_salt != request.prefix_salt:
            return 0
        # At least one token of the prompt is computed: a block that ends with it is copied, not shared.
        common = common_len(pin.prompt_token_ids, request.prompt_token_ids)
        num_common = min(common, len(request.prompt_token_ids) - 1) // self._blocks.block_size
        groups = self._blocks.groups
        if groups.has_windows and num_common < len(pin.prompt_token_ids) // self._blocks.block_size:
            return 0  # a match that ends earlier needs blocks that the windows of the pin have passed
        return num_common * groups.num_full
