"""Whether a prompt waits for blocks that the same plan writes."""

LEAST_SHARED = 0.5
"""Least part of the tokens left that a prompt must save to wait for the next iteration."""


def is_worth_waiting(num_shared: int, num_left: int) -> bool:
    """Whether a prompt should start one iteration later, and share blocks that this iteration writes.

    Args:
        num_shared: tokens in these blocks.
        num_left: tokens that the prompt would compute now, these included.
    """
    return num_shared >= LEAST_SHARED * num_left
