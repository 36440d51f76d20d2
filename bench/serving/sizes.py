"""The workloads' names and sizes."""

from dataclasses import dataclass

WORKLOADS = (
    "sharegpt1000", "decode", "prefill32", "sharedprefix341_500", "sharedprefix4096_256",
    "parallel4_200", "beam4_64x64", "sharegpt1000_2048blocks",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes of the workloads. A figure is named after its work, so shortened work has no peer.

    Args:
        num_sharegpt, num_shared_prefix, num_system_prompt, num_parallel: numbers of requests.
        length_divisor: divisor of the lengths of these requests.
        prompt_len: tokens of the prompts of decodes and prefills.
        num_decoded: tokens of each request over which a decode step is timed.
        num_prefill: prompts.
        num_beam_prompts, beam_len: searches and their tokens.
        num_pressure_blocks: blocks of the small pool.
        num_timed_steps: prefill steps behind a breakdown, times two.
        num_traced_steps: decode steps that are profiled; a prefill takes half as many.
    """

    num_sharegpt: int = 1000
    num_shared_prefix: int = 500
    num_system_prompt: int = 256
    num_parallel: int = 200
    length_divisor: int = 1
    prompt_len: int = 1024
    num_decoded: int = 128
    num_prefill: int = 32
    num_beam_prompts: int = 64
    beam_len: int = 64
    num_pressure_blocks: int = 2048
    num_timed_steps: int = 32
    num_traced_steps: int = 8


FULL = Sizes()
QUICK = Sizes(
    num_sharegpt=100,
    num_shared_prefix=50,
    num_system_prompt=32,
    num_parallel=20,
    length_divisor=4,
    num_decoded=32,
    num_prefill=8,
    num_beam_prompts=8,
    beam_len=16,
    num_pressure_blocks=128,
    num_timed_steps=8,
    num_traced_steps=4,
)
