"""Costs of bringing KV back: measured by the device half, weighed by the host half."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Costs:
    """Costs of one machine.

    Args:
        transfer_s: fixed seconds of one batch of block transfers, either way.
        to_host_block_s: seconds that each block adds on its way to the host.
        from_host_block_s: seconds that each block adds on its way back.
        prefill_token_s: seconds to compute one token in a large prefill.
    """

    transfer_s: float
    to_host_block_s: float
    from_host_block_s: float
    prefill_token_s: float
