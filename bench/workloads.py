"""The requests that serving benchmarks replay: token ids and output lengths, from fixed seeds."""

from dataclasses import dataclass

import numpy as np

from jpaged.contract.result import BeamCandidates, StepResult, TokenScores

SHAREGPT_MEAN_IN, SHAREGPT_MEAN_OUT = 161.31, 337.99
ALPACA_MEAN_IN, ALPACA_MEAN_OUT = 19.31, 58.45
"""Mean lengths in tokens of ShareGPT and of Alpaca (PagedAttention, section 6.1, figure 11)."""

SHAREGPT_SIGMA_IN, SHAREGPT_SIGMA_OUT = 1.0, 0.9
ALPACA_SIGMA_IN, ALPACA_SIGMA_OUT = 0.6, 0.9
TRANSLATION_MEAN_IN, TRANSLATION_MEAN_OUT, TRANSLATION_SIGMA = 35.0, 40.0, 0.5
CHAT_MEAN_ROUNDS = 5
"""The paper does not state three of these, which are our choices. One is the spread of the log-normals: figure 11 shows
ShareGPT broad and Alpaca short. Another is the length of WMT16 sentences in tokens. The third is the number of rounds
before a request in a conversation: by figure 17, most prompts fill their 1024 tokens."""

LOWEST_TOKEN_ID = 5  # lower ids are the special tokens of most vocabularies


@dataclass(frozen=True, slots=True)
class Workload:
    """Prompts, and the number of tokens that each generates."""

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


def _random_tokens(
    rng: np.random.Generator, prompt_lens: np.ndarray, output_lens: np.ndarray, vocab_size: int
) -> Workload:
    prompts = [rng.integers(LOWEST_TOKEN_ID, vocab_size, n).tolist() for n in prompt_lens]
    return Workload(prompts, output_lens.tolist())


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
    prompt_lens = _lognormal_lens(rng, count, mean_in, SHAREGPT_SIGMA_IN, longest)
    output_lens = _lognormal_lens(rng, count, mean_out, SHAREGPT_SIGMA_OUT, longest)
    return _random_tokens(rng, prompt_lens, output_lens, vocab_size)


def alpaca(count: int, seed: int = 0, *, longest: int = 1024, vocab_size: int = 30_000) -> Workload:
    """Random tokens in lengths distributed like Alpaca's: log-normal, clipped to [4, longest]."""
    rng = np.random.default_rng(seed)
    prompt_lens = _lognormal_lens(rng, count, ALPACA_MEAN_IN, ALPACA_SIGMA_IN, longest)
    output_lens = _lognormal_lens(rng, count, ALPACA_MEAN_OUT, ALPACA_SIGMA_OUT, longest)
    return _random_tokens(rng, prompt_lens, output_lens, vocab_size)


def translation(count: int, prefix_len: int, seed: int = 0, *, vocab_size: int = 30_000) -> Workload:
    """Sentences to translate, all behind one prefix of examples (PagedAttention, section 6.4)."""
    rng = np.random.default_rng(seed)
    prefix = rng.integers(LOWEST_TOKEN_ID, vocab_size, prefix_len).tolist()
    prompt_lens = _lognormal_lens(rng, count, TRANSLATION_MEAN_IN, TRANSLATION_SIGMA, 1024)
    output_lens = _lognormal_lens(rng, count, TRANSLATION_MEAN_OUT, TRANSLATION_SIGMA, 1024)
    tail = _random_tokens(rng, prompt_lens, output_lens, vocab_size)
    return Workload([prefix + prompt for prompt in tail.prompts], tail.output_lens)


def chat(count: int, seed: int = 0, *, longest_prompt: int = 1024, vocab_size: int = 30_000) -> Workload:
    """Rounds of conversations: the history and a question, cut to its last tokens (PagedAttention, section 6.5).

    The history has rounds of ShareGPT lengths; their number is geometric.
    """
    rng = np.random.default_rng(seed)
    rounds = rng.geometric(1 / (1 + CHAT_MEAN_ROUNDS), count) - 1
    num_rounds = int(rounds.sum()) + count
    asked = _lognormal_lens(rng, num_rounds, SHAREGPT_MEAN_IN, SHAREGPT_SIGMA_IN, 1024)
    answered = _lognormal_lens(rng, num_rounds, SHAREGPT_MEAN_OUT, SHAREGPT_SIGMA_OUT, 1024)
    last = np.cumsum(rounds + 1) - 1  # the round to answer; the rounds since the previous request are its history
    spoken = np.cumsum(asked + answered)
    before = np.concatenate([[0], spoken[last[:-1]]])
    prompt_lens = np.minimum(spoken[last] - answered[last] - before, longest_prompt)
    return _random_tokens(rng, prompt_lens, answered[last], vocab_size)


def poisson_arrivals(count: int, rate: float, seed: int = 0) -> np.ndarray:
    """Arrival times in seconds of ``count`` requests, ``rate`` a second. One seed gives one pattern at every rate."""
    return np.random.default_rng(seed).exponential(size=count).cumsum() / rate


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


def made_up_result(rows: int, num_steps: int = 1, beams: tuple[BeamCandidates, ...] = ()) -> StepResult:
    """The result of a plan without a device: every row of every step draws token 7."""
    tokens, logprobs = np.full(rows, 7, np.int32), np.zeros(rows, np.float32)
    none = np.zeros((rows, 0))
    scores = TokenScores(logprobs, np.ones(rows, np.int32), none.astype(np.int32), none.astype(np.float32))
    return StepResult(tokens, scores, beams=beams, later=((tokens, scores),) * (num_steps - 1))
