"""Growth: the tokens that sequences will come to hold, if their lengths are as expected."""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int64

FIRST_GUESS = 256
"""Tokens that a sequence is expected to draw before any has stopped. It counts as one sequence that did."""

NUM_REMEMBERED = 512
"""Stopped sequences after which an older one counts half."""

HORIZON = 64
"""Tokens ahead for which growth counts: a group that runs for so long before a preemption is worth its preemption."""

WATERMARK = 0.01
"""Fraction of the pool that an admission leaves free, so that running sequences can grow before one is preempted."""

BLOCKS_EACH = 0.5
"""Blocks that an admission leaves free for each running sequence that may stop at any token, if that is more."""


def num_blocks_left_free(num_usable_blocks: int, *, is_running: bool, num_unsure: int = 0) -> int:
    """Count the blocks that an admission must leave free: none while no group runs.

    Args:
        num_usable_blocks: blocks of the pool.
        is_running: whether a group runs.
        num_unsure: sequences whose end is not known.
    """
    return math.ceil(max(WATERMARK * num_usable_blocks, BLOCKS_EACH * num_unsure)) if is_running else 0


@dataclass(frozen=True, slots=True)
class Stops:
    """Counts of the sequences that stopped by themselves, and of the tokens drawn by all that might have.

    Their ratio estimates the tokens between two stops. A mean length would be too small at first, since short sequences
    end before long ones. Here the tokens of sequences that still run count too.

    Args:
        num_stops: sequences that stopped; older ones count less.
        num_tokens: tokens drawn until the last stop; older ones count less.
        num_drawn: all tokens drawn until the last stop.
    """

    num_stops: float = 1.0
    num_tokens: float = float(FIRST_GUESS)
    num_drawn: int = 0

    def after_stop(self, num_drawn: int) -> "Stops":
        """Count a sequence that stopped.

        Args:
            num_drawn: tokens drawn so far by all sequences that may stop at any token.
        """
        kept = 0.5 ** (1 / NUM_REMEMBERED)
        num_tokens = self.num_tokens + num_drawn - self.num_drawn
        return Stops(self.num_stops * kept + 1, num_tokens * kept, num_drawn)

    def tokens_left(self, num_drawn: int) -> float:
        """Expect the tokens that a sequence, whatever its length, has still to draw.

        Args:
            num_drawn: as in ``after_stop``.
        """
        return max((self.num_tokens + num_drawn - self.num_drawn) / self.num_stops, 1.0)


def peak_tokens(
    held: Float64[np.ndarray, " sequences"],
    least_left: Int64[np.ndarray, " sequences"],
    most_left: Int64[np.ndarray, " sequences"],
    tokens_left: float,
    horizon: float,
) -> float:
    """Expect the most tokens that sequences hold at once, now or soon, if each draws one token a step.

    The end of a sequence is known if it cannot stop early, or is near its longest length. Such a sequence holds all its
    tokens until then. Of the others, ``exp(-t / tokens_left)`` still run after t steps. The sum is
    evaluated at every known end, and where growth and stops of the others balance.

    Args:
        held: tokens that each sequence holds now.
        least_left: tokens that each draws before it may stop; ``most_left`` if it cannot stop early.
        most_left: tokens that each draws at most.
        tokens_left: tokens that those which may stop are expected to draw.
        horizon: steps from now on that count.
    """
    is_known = (least_left > 0) | (most_left <= tokens_left)
    left = np.where(least_left > 0, np.minimum(most_left, least_left + tokens_left), most_left)
    left = np.where(least_left >= most_left, most_left, left)[is_known]
    order = np.argsort(-left, kind="stable")  # the last end first
    ends, known_held = left[order], np.append(0.0, np.cumsum(held[is_known][order]))
    others_held, num_others = held[~is_known].sum(), np.count_nonzero(~is_known)
    balance = max(tokens_left - others_held / max(num_others, 1), 0.0)
    times = np.minimum(np.concatenate([ends, [0.0, balance]]), horizon)
    num_known = np.searchsorted(-ends, -times, side="right")
    others = np.exp(-times / tokens_left) * (others_held + num_others * times)
    return float((known_held[num_known] + num_known * times + others).max())
