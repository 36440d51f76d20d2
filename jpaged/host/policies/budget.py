"""The size of an iteration, in tokens to compute."""

import math
from collections.abc import Iterable, Sequence

from jpaged.contract.profile import MachineProfile

LITTLE_PADDING = 512
"""Padded tokens that cost about as much as a further step with prompts, which reads all weights and is planned anew."""


def tokens_within(profile: MachineProfile | None, max_step_s: float, context_len: int) -> float:
    """Count the tokens of prompts that a step computes in so many seconds; the most if that was not measured.

    A chunk of n tokens after ``context_len`` others takes the seconds that ``prefill_s`` predicts.

    Args:
        profile: rates of the machine.
        max_step_s: seconds of the step.
        context_len: tokens before the chunk.
    """
    if profile is None or max_step_s == math.inf:
        return math.inf
    left_s = max(max_step_s - profile.prefill_fixed_s, 0.0)
    token_s, half = profile.prefill_token_s + profile.prefill_context_s * context_len, profile.prefill_context_s / 2
    divisor = token_s + math.sqrt(token_s * token_s + 4 * half * left_s)  # of the root that does not cancel
    return 2 * left_s / divisor if divisor else math.inf


def find_token_budget(
    feed_lens: Sequence[int],
    waiting: Iterable[tuple[int, int]],
    *,
    max_num_seqs: int,
    max_num_tokens: int,
    step_sizes: Sequence[tuple[int, int]],
    least_prompt: int = 1,
    most_beside: float = math.inf,
) -> int:
    """Find the most tokens that the next iteration should compute.

    An iteration that takes all that waits with little padding is not cut: a first token would come an iteration later.
    Otherwise padding counts, which costs as much as tokens do: prompts beside decodes may fill one of ``step_sizes``,
    if the tokens left over are no more than they took. The rest waits for the next iteration, which the decodes need
    anyway. The result is an estimate: prefix hits and free blocks are not known yet.

    Args:
        feed_lens: tokens that each running sequence has to feed.
        waiting: rows and prompt tokens of each group that may be admitted, in order; read as far as needed.
        max_num_seqs: rows of an iteration at most.
        max_num_tokens: tokens of an iteration at most.
        step_sizes: tokens and rows of the compiled steps that take prompts.
        least_prompt: tokens that a step leaves to prompts at least.
        most_beside: tokens of prompts at most, if something decodes.
    """
    num_tokens, num_rows, num_decodes = sum(feed_lens), len(feed_lens), feed_lens.count(1)
    if num_decodes == 0:
        return max_num_tokens
    if num_decodes + most_beside < max_num_tokens:
        bound = num_decodes + max(int(most_beside), least_prompt)
        sizes = [size for size, _ in step_sizes if num_decodes + least_prompt <= size <= bound]
        max_num_tokens = max(sizes, default=bound)
    for group_rows, prompt_len in waiting:
        if num_rows + group_rows > max_num_seqs or num_tokens >= max_num_tokens:
            break
        num_rows += group_rows
        num_tokens += prompt_len
    else:
        padded = min((size for size, _ in step_sizes if size >= num_tokens), default=num_tokens)
        if num_tokens <= max_num_tokens and padded - num_tokens <= LITTLE_PADDING:
            return max_num_tokens
    full = (
        size
        for size, rows in step_sizes
        if num_decodes + least_prompt <= size <= min(num_tokens, max_num_tokens)
        and rows >= num_rows
        and size - num_decodes >= num_tokens - size
    )
    return max(full, default=max_num_tokens)
