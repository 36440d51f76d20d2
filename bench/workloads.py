"""The requests every serving benchmark replays: token ids and output lengths, from fixed seeds."""

from dataclasses import dataclass

import numpy as np

SHAREGPT_MEAN_IN, SHAREGPT_MEAN_OUT = 161.31, 337.99
"""Mean lengths in tokens of ShareGPT (PagedAttention, section 6.1, figure 11)."""

LOWEST_TOKEN_ID = 5  # below lie the special tokens of most vocabularies


@dataclass(frozen=True, slots=True)
class Workload:
    """Prompts and how many tokens each is to generate."""

    prompts: list[list[int]]
    output_lens: list[int]

    @property
    def num_prompt_tokens(self) -> int:
        return sum(map(len, self.prompts))

    @property
    def num_output_tokens(self) -> int:
        return sum(self.output_lens)


def _lognormal_lens(rng: np.random.Generator, count: int, mean: float, sigma: float, longest: int) -> np.ndarray:
    """Lengths from 4 to ``longest`` with about the given mean after clipping."""
    drawn = rng.lognormal(np.log(mean) - sigma**2 / 2, sigma, count)
    rescaled = drawn * mean / np.clip(drawn, 4, longest).mean()
    return np.clip(rescaled, 4, longest).astype(int)


def sharegpt(
    count: int,
    seed: int = 0,
    *,
    mean_in: float = SHAREGPT_MEAN_IN,
    mean_out: float = SHAREGPT_MEAN_OUT,
    longest: int = 1024,
    vocab_size: int = 30_000,
) -> Workload:
    """Random tokens in lengths distributed like ShareGPT's: log-normal, clipped to [4, longest]."""
    rng = np.random.default_rng(seed)
    prompt_lens = _lognormal_lens(rng, count, mean_in, 1.0, longest)
    output_lens = _lognormal_lens(rng, count, mean_out, 0.9, longest)
    prompts = [rng.integers(LOWEST_TOKEN_ID, vocab_size, n).tolist() for n in prompt_lens]
    return Workload(prompts, output_lens.tolist())


def shared_prefix(count: int, prefix_len: int, seed: int = 5, *, vocab_size: int = 30_000) -> Workload:
    """One random prefix before every short request: few-shot prompting (PagedAttention, section 6.4)."""
    tail = sharegpt(count, seed, mean_in=60, mean_out=60, vocab_size=vocab_size)
    prefix = np.random.default_rng(seed + 1).integers(LOWEST_TOKEN_ID, vocab_size, prefix_len).tolist()
    return Workload([prefix + prompt for prompt in tail.prompts], tail.output_lens)


def uniform(count: int, prompt_len: int, output_len: int, seed: int = 0, *, vocab_size: int = 30_000) -> Workload:
    """Random prompts of one length."""
    rng = np.random.default_rng(seed)
    prompts = rng.integers(LOWEST_TOKEN_ID, vocab_size, (count, prompt_len)).tolist()
    return Workload(prompts, [output_len] * count)
