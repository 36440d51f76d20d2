"""Placement: the memory that holds the KV of running sequences, and the sequences that it lets stream."""

from collections.abc import Iterable
from dataclasses import dataclass

from jpaged.request import SamplingParams

BYTES_OF_COPY = 1 << 19
"""Bytes that one copy should span: the driver starts a copy in the time in which the link moves a tenth of them."""

LEAST_TOGETHER = 8
"""Blocks that one copy spans at least."""

SHARE_TOGETHER = 8
"""A sequence keeps this fraction of its context on the device at most, until the blocks move together."""


@dataclass(frozen=True, slots=True)
class Placement:
    """The memory of the KV that running sequences attend to.

    A streamed sequence keeps its first blocks on the host. Every step copies them through a window of the device's
    pool.

    Args:
        kind: "device"; "host" to stream every sequence that can be streamed; "auto" to stream those that do not fit the
            device.
        num_window_blocks: device blocks of the window, from block 1 on; no sequence takes them.
        max_streamed_blocks: host blocks that one step can stream at most.
        num_together: blocks of a sequence that move to the host at once, unless the device lacks blocks: neighbours
            there, which every step copies in one piece.
        keeps_activations: whether blocks on the host hold activations, from which every step computes K and V.
    """

    kind: str = "device"
    num_window_blocks: int = 0
    max_streamed_blocks: int = 0
    num_together: int = 1
    keeps_activations: bool = False


KV_ON_DEVICE = Placement()


def blocks_moved_together(layer_bytes: int, max_blocks: int) -> int:
    """Blocks of a sequence that should move to the host at once.

    Args:
        layer_bytes: bytes of one layer of a block there.
        max_blocks: most blocks of a sequence.
    """
    return max(min(-(-BYTES_OF_COPY // layer_bytes), max_blocks // SHARE_TOGETHER), LEAST_TOGETHER)


def can_stream(params: SamplingParams) -> bool:
    """Whether a request can be streamed: it has one sequence, and asks for no scores of its prompt."""
    return params.num_sequences == 1 and not params.use_beam_search and params.prompt_logprobs is None


def has_room(num_blocks: int, others: Iterable[int], most_blocks: int) -> bool:
    """Whether a streamed sequence can start beside others.

    Alone it always can: blocks that find no room on the host stay on the device.

    Args:
        num_blocks: full blocks of the tokens that the sequence starts with.
        others: full blocks of each streamed sequence that runs.
        most_blocks: blocks that running sequences can keep on the host.
    """
    num_others = sum(others)
    return num_others == 0 or num_others + num_blocks <= most_blocks


def end_of_chunk(start: int, budget: int, block_size: int) -> int:
    """The end of a chunk of at most ``budget`` tokens from ``start`` on: the end of a block, if it reaches one."""
    stop = start + budget
    aligned = stop // block_size * block_size
    return aligned if aligned > start else stop
