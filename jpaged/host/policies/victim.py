"""Whom to preempt when blocks run out, and how it is to come back."""

from collections.abc import Sequence

from jpaged.contract.plan import Costs
from jpaged.host.policies.order import schedule_order
from jpaged.host.sequence import SequenceGroup


def choose_victim(running: Sequence[SequenceGroup]) -> SequenceGroup:
    """The group that would be served last, so that the earliest arrivals are never starved."""
    return max(running, key=schedule_order)


def is_swap_cheaper(costs: Costs, *, num_blocks_out: int, num_blocks_in: int, num_tokens: int) -> bool:
    """Whether moving blocks to the host and back takes less time than computing their tokens again (section 4.5).

    Args:
        costs: measured on this machine.
        num_blocks_out, num_blocks_in: blocks to move each way.
        num_tokens: tokens to compute otherwise.
    """
    swap_s = 2 * costs.transfer_s + num_blocks_out * costs.to_host_block_s + num_blocks_in * costs.from_host_block_s
    return swap_s < num_tokens * costs.prefill_token_s
