"""The way in which the KV of a preempted group comes back: a transfer, or computation."""

from jpaged.contract.costs import Costs


def is_swap_cheaper(costs: Costs, *, num_blocks_out: int, num_blocks_in: int, num_tokens: int) -> bool:
    """Whether moving blocks to the host and back takes less time than computing their tokens again (section 4.5).

    Args:
        costs: the costs measured on this machine.
        num_blocks_out: blocks to move to the host.
        num_blocks_in: blocks to move back.
        num_tokens: tokens to compute otherwise.
    """
    swap_s = 2 * costs.transfer_s + num_blocks_out * costs.to_host_block_s + num_blocks_in * costs.from_host_block_s
    return swap_s < num_tokens * costs.prefill_token_s
