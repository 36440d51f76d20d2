"""Time of a step of llama3-8b on one H200, fitted to the breakdowns of steps in measured results."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from jpaged.contract.plan import StepPlan
from jpaged.contract.profile import Link, MachineProfile
from jpaged.device.step.inputs import Bucket

BLOCK_BYTES = 2 << 20


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step by its size and its context.

    The products, the rest of a step and the gaps are those of the steps decode_1, decode_32, decode_128, decode_256 and
    prefill in serving_llama3-8b_nvidia-h200.json at commit 6bfb810. Attention is that of 256 rows there.

    Args:
        product_s: tokens of a step, padding included, and seconds of its products; linear between these points, and
            proportional beyond the last one.
        context_s: seconds that each token of the context adds.
        fixed_s, token_s: seconds of all other kernels, in each step and for each of its tokens.
        gap_s: seconds that the device idles after a decode.
        prompt_gap_s: seconds that it idles after a step with prompts.
        late_s: seconds that it idles where a plan depends on the results of the step before. Chosen such that 2,048
            blocks take the 41.9 s that they took at commit 6bfb810.
    """

    product_s: tuple[tuple[int, float], ...] = (
        (1, 3.77e-3),
        (32, 3.90e-3),
        (128, 4.39e-3),
        (256, 5.85e-3),
        (2048, 39.58e-3),
    )
    context_s: float = 31e-9
    fixed_s: float = 0.55e-3
    token_s: float = 1.6e-6
    gap_s: float = 0.15e-3
    prompt_gap_s: float = 4.9e-3
    late_s: float = 10.7e-3

    def products_s(self, num_tokens: Any) -> Any:
        """Seconds of the products over so many tokens, or over an array of numbers."""
        tokens, seconds = zip(*self.product_s, strict=True)
        return np.interp(num_tokens, tokens, seconds) * np.maximum(num_tokens / tokens[-1], 1.0)

    def plan_s(self, plan: StepPlan, bucket: Bucket, *, is_late: bool) -> float:
        """Seconds of a plan whose steps have the size of a bucket.

        Args:
            plan: has chunks.
            bucket: the size.
            is_late: whether it was made once the results of the step before were known.
        """
        gap_s = self.prompt_gap_s if plan.num_tokens > len(plan.chunks) else self.gap_s
        step_s = self.products_s(bucket.num_tokens) + self.fixed_s + self.token_s * bucket.num_tokens + gap_s
        context_s = self.context_s * int(plan.chunks.stops.sum())
        return plan.num_steps * (step_s + context_s) + is_late * self.late_s

    def padding_s(self, num_tokens: Any, padded: Any) -> Any:
        """Seconds that steps of so many tokens take longer, since they have more: numbers, or arrays of them."""
        return self.products_s(padded) - self.products_s(num_tokens) + self.token_s * (padded - num_tokens)


H200 = StepTime()
H200_PROFILE = MachineProfile(
    block_bytes=BLOCK_BYTES,
    to_host=Link(4.6e-4, 24e9, 20e9),
    from_host=Link(4.6e-4, 26e9, 20e9),
    projection_flops_per_s=(),
    prefill_fixed_s=4e-3,
    prefill_token_s=2e-5,
    prefill_context_s=4e-10,
    layer_fixed_s=1.2e-4,
    layer_token_s=1e-9,
)
"""Rates by which the scheduler chooses between swap and recomputation, from the costs in the same file."""
