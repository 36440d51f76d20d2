"""The size of an iteration, in tokens to compute."""

from collections.abc import Iterable, Sequence


def find_token_budget(
    feed_lens: Sequence[int],
    waiting: Iterable[tuple[int, int]],
    *,
    max_num_seqs: int,
    max_num_tokens: int,
    step_sizes: Iterable[tuple[int, int]],
    least_prompt: int = 1,
) -> int:
    """Find the most tokens that the next iteration should compute.

    Padding costs as much as tokens do. So prompts beside decodes may fill one of ``step_sizes``, if the tokens left
    over are no more than they took. The rest waits for the next iteration, which the decodes need anyway. The
    result is an estimate: prefix hits and free blocks are not known yet.

    Args:
        feed_lens: tokens that each running sequence has to feed.
        waiting: rows and prompt tokens of each group that may be admitted, in order; read as far as needed.
        max_num_seqs: rows of an iteration at most.
        max_num_tokens: tokens of an iteration at most.
        step_sizes: tokens and rows of the compiled steps that take prompts.
        least_prompt: tokens that a step leaves to prompts at least.
    """
    num_tokens, num_rows, num_decodes = sum(feed_lens), len(feed_lens), feed_lens.count(1)
    if num_decodes == 0:
        return max_num_tokens
    for group_rows, prompt_len in waiting:
        if num_rows + group_rows > max_num_seqs or num_tokens >= max_num_tokens:
            break
        num_rows += group_rows
        num_tokens += prompt_len
    full = (
        size
        for size, rows in step_sizes
        if num_decodes + least_prompt <= size <= min(num_tokens, max_num_tokens)
        and rows >= num_rows
        and size - num_decodes >= num_tokens - size
    )
    return max(full, default=max_num_tokens)
