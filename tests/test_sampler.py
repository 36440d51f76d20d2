"""The sampler against sorting, counting oracles in numpy float64; its randomness against (seed, position) alone."""

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jpaged.device import sampler
from jpaged.device.sampler import SampledTokens, make_sample_inputs
from jpaged.host.step_plan import Sample
from jpaged.request import SamplingParams

ROWS, VOCAB = 32, 48  # of most cases: few shapes, few compilations

jitted_sample = jax.jit(sampler.sample, static_argnames="num_top")
jitted_score = jax.jit(sampler.score, static_argnames="num_top")
exact = settings(deadline=None, derandomize=True)


def request_sample(params=None, *, seed=0, position=0, banned=(), prompt=(), output=()) -> Sample:
    params = params or SamplingParams()
    return Sample(0, 0, position, seed, params, list(banned), list(prompt), list(output))


def draw(logits: np.ndarray, samples: list[Sample], num_top: int = 0) -> SampledTokens:
    inputs = make_sample_inputs(samples, len(logits))
    return jitted_sample(jnp.asarray(logits, jnp.float32), inputs, num_top=num_top)


def token_ids(logits: np.ndarray, samples: list[Sample]) -> list[int]:
    return np.asarray(draw(logits, samples).token_ids)[: len(samples)].tolist()


def gumbel_oracle(seed: int, position: int, vocab: int) -> np.ndarray:
    """The noise of a row, by itself and outside of jit: neither the batch nor the compiler may change it."""
    key = jax.random.fold_in(jax.random.key(np.uint32(seed)), position)
    bits = np.asarray(jax.random.bits(key, (vocab,), jnp.uint32)).astype(np.float64)
    return -np.log(-np.log1p(-np.minimum((bits + 0.5) / 2**32, 1 - 2.0**-24)))


def probabilities_oracle(logits: np.ndarray, params: SamplingParams, slack: float = 0.0) -> np.ndarray:
    """Filtered probabilities by sorting. ``slack`` moves the top-p and min-p thresholds by that fraction."""
    logits = logits.astype(np.float64)
    weights = np.exp((logits - logits.max()) / params.temperature)
    if params.top_k > 0:
        weights[logits < np.sort(logits)[::-1][: params.top_k][-1]] = 0
    if params.top_p < 1:
        order = np.argsort(-logits, kind="stable")
        mass = np.cumsum(weights[order]) / weights.sum()
        last = order[min(np.searchsorted(mass, params.top_p * (1 + slack)), len(order) - 1)]
        weights[logits < logits[last]] = 0
    weights[(weights < params.min_p * (1 + slack)) & (logits < logits.max())] = 0
    return weights / weights.sum()


def draw_oracle(logits: np.ndarray, sample: Sample) -> set[int]:
    """The tokens a correct draw may give: one, or more where float32 rounding decides."""
    params = sample.params
    if params.temperature == 0:
        return {int(np.argmax(logits))}
    noise = gumbel_oracle(sample.seed, sample.position, len(logits))
    accepted = set()
    for slack in (-1e-5, 0.0, 1e-5):
        kept = probabilities_oracle(logits, params, slack) > 0
        scores = logits.astype(np.float64) / params.temperature + noise
        scores[~kept] = -np.inf
        accepted |= set(np.flatnonzero(scores >= scores.max() - 1e-4 * max(1, abs(scores.max()))).tolist())
    return accepted


def random_params(rng: np.random.Generator) -> SamplingParams:
    return SamplingParams(
        temperature=float(rng.choice([0, 0.3, 1, 2.5])),
        top_k=int(rng.choice([0, 0, 1, 2, 7, VOCAB - 1, VOCAB, VOCAB + 5])),
        top_p=float(rng.choice([1, 1, 1e-6, 0.3, 0.9, 0.999])),
        min_p=float(rng.choice([0, 0, 0.02, 0.3, 1])),
    )


def random_logits(rng: np.random.Generator) -> np.ndarray:
    """Rows of mixed kinds: plain, with many ties, far apart, one constant, with tokens that cannot be drawn."""
    logits = rng.normal(size=(ROWS, VOCAB)).astype(np.float32) * rng.choice([0.1, 1, 4, 50], (ROWS, 1)).astype(
        np.float32
    )
    logits[::5] = np.round(logits[::5])
    logits[1] = -3.5
    logits[2:8] = np.where(rng.random((6, VOCAB)) < 0.5, -np.inf, logits[2:8])
    logits[2:8, 11] = 0
    return logits + rng.choice([0, 0, -100, 100], (ROWS, 1)).astype(np.float32)


@settings(exact, max_examples=40)
@given(st.integers(0, 2**32 - 1))
def test_draws_equal_those_of_a_sorting_oracle(case):
    rng = np.random.default_rng(case)
    logits = random_logits(rng)
    samples = [
        request_sample(random_params(rng), seed=int(rng.integers(2**32)), position=int(rng.integers(10**6)))
        for _ in range(ROWS)
    ]
    drawn = token_ids(logits, samples)
    for row, sample in enumerate(samples):
        assert drawn[row] in draw_oracle(logits[row], sample), (row, sample.params)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=0.6),
        SamplingParams(top_k=5),
        SamplingParams(top_p=0.8),
        SamplingParams(top_p=0.97),
        SamplingParams(temperature=1.5, min_p=0.2),
        SamplingParams(temperature=2, top_k=6, top_p=0.9, min_p=0.05),
    ],
)
def test_draws_follow_the_filtered_probabilities(params):
    logits = np.array([1.2, -0.3, 0.0, 2.0, -4.0, 0.7, 0.7, -1.1], np.float32)
    samples = [request_sample(params, seed=3, position=i) for i in range(4096)]
    counts = np.bincount(token_ids(np.tile(logits, (4096, 1)), samples), minlength=8)
    expected = 4096 * probabilities_oracle(logits, params)
    kept = expected > 0
    assert counts[~kept].sum() == 0
    chi_square = np.sum((counts[kept] - expected[kept]) ** 2 / expected[kept])
    assert chi_square < 29.9  # seven degrees of freedom stay below this in all but 1 of 10,000


@pytest.mark.parametrize("neighbour", [{"position": 1}, {"seed": 1}])
def test_neighbouring_positions_and_seeds_draw_independently(neighbour):
    first = [request_sample(seed=2 * i, position=2 * i) for i in range(4096)]
    second = [
        request_sample(seed=2 * i + neighbour.get("seed", 0), position=2 * i + neighbour.get("position", 0))
        for i in range(4096)
    ]
    logits = np.zeros((4096, 8), np.float32)
    pairs = Counter(zip(token_ids(logits, first), token_ids(logits, second), strict=True))
    chi_square = sum((pairs[a, b] - 64) ** 2 / 64 for a in range(8) for b in range(8))
    assert chi_square < 113.5  # 63 degrees of freedom: all but 1 of 10,000


def test_a_token_depends_on_seed_position_and_logits_alone():
    rng = np.random.default_rng(5)
    logits = random_logits(rng)
    samples = [request_sample(random_params(rng), seed=row // 2, position=row % 3) for row in range(ROWS)]
    together = token_ids(logits, samples)
    order = rng.permutation(ROWS)
    assert token_ids(logits[order], [samples[row] for row in order]) == [together[row] for row in order]
    assert [token_ids(logits[row : row + 1], [samples[row]])[0] for row in range(ROWS)] == together


def test_other_rows_penalties_and_biases_change_no_draw():
    rng = np.random.default_rng(6)
    logits = random_logits(rng)
    plain = [request_sample(random_params(rng), seed=row) for row in range(ROWS)]
    alone = token_ids(logits, plain)
    busy = SamplingParams(presence_penalty=1.0, repetition_penalty=1.3, logit_bias={3: 5.0})
    mixed = [request_sample(busy, output=[1, 2, 3]) if row % 2 else plain[row] for row in range(ROWS)]
    assert token_ids(logits, mixed)[::2] == alone[::2]


@pytest.mark.parametrize("temperature", [0, 1e-6])
def test_greedy_takes_the_lowest_of_equal_maxima(temperature):
    logits = np.zeros((ROWS, VOCAB))
    logits[:, [7, 9, 40]] = 2
    params = SamplingParams(temperature=temperature, top_k=3, top_p=0.5)
    assert token_ids(logits, [request_sample(params), request_sample()])[0] == 7


def penalties_oracle(logits: np.ndarray, sample: Sample) -> int:
    adjusted = {token_id: float(logit) for token_id, logit in enumerate(logits)}
    params = sample.params
    for token_id, bias in (params.logit_bias or {}).items():
        adjusted[token_id] += bias
    for token_id in sample.banned_token_ids:
        adjusted[token_id] = -np.inf
    for token_id in {*sample.prompt_token_ids, *sample.output_token_ids}:
        logit = adjusted[token_id]
        adjusted[token_id] = logit / params.repetition_penalty if logit > 0 else logit * params.repetition_penalty
    for token_id, count in Counter(sample.output_token_ids).items():
        adjusted[token_id] -= params.frequency_penalty * count + params.presence_penalty
    return max(adjusted, key=adjusted.__getitem__)


@settings(exact, max_examples=40)
@given(st.integers(0, 2**32 - 1))
def test_penalties_and_biases_equal_those_of_a_counting_oracle(case):
    rng = np.random.default_rng(case)
    logits = np.full((ROWS, VOCAB), -np.inf, np.float32)
    logits[:8, :12] = rng.normal(size=(8, 12))

    def sample_of_row() -> Sample:
        params = SamplingParams(
            temperature=0,
            repetition_penalty=float(rng.choice([1, 0.5, 1.2, 3])),
            presence_penalty=float(rng.choice([0, -1, 0.7])),
            frequency_penalty=float(rng.choice([0, -0.3, 0.4])),
            logit_bias={int(i): float(rng.normal()) for i in rng.integers(12, size=rng.integers(1, 4))},
        )
        prompt, output = (rng.integers(12, size=rng.integers(1, 5)).tolist() for _ in range(2))
        return request_sample(
            params, banned=rng.integers(12, size=rng.integers(3)).tolist(), prompt=prompt, output=output
        )

    samples = [sample_of_row() for _ in range(8)]
    assert token_ids(logits, samples) == [penalties_oracle(logits[row], samples[row]) for row in range(8)]


def test_banned_tokens_are_never_drawn():
    logits = np.full((ROWS, VOCAB), -np.inf)
    logits[:, :8] = 0
    logits[:, 2] = 30
    params = SamplingParams(logit_bias={5: -100.0})
    drawn = set()
    for start in range(0, 200, 20):
        drawn |= set(token_ids(logits, [request_sample(params, position=start + i, banned=[2, 7]) for i in range(20)]))
    assert drawn == {0, 1, 3, 4, 6}


@pytest.mark.parametrize("params", [SamplingParams(temperature=0), SamplingParams(top_k=3, top_p=0.5, min_p=0.1)])
def test_the_only_token_left_is_drawn(params):
    logits = np.random.default_rng(1).normal(size=(ROWS, VOCAB))
    others = [token_id for token_id in range(VOCAB) if token_id != 31]
    biased = SamplingParams(temperature=params.temperature, top_p=params.top_p, logit_bias={4: 1e39})
    assert token_ids(logits, [request_sample(params, banned=others), request_sample(biased, banned=[5])]) == [31, 4]


def test_token_0_stands_for_a_row_without_a_possible_token():
    samples = [request_sample(SamplingParams(temperature=t, top_k=3, top_p=0.5, min_p=0.1)) for t in (0, 1)]
    assert token_ids(np.full((ROWS, VOCAB), -np.inf), samples) == [0, 0]


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(top_p=1e-45),
        SamplingParams(temperature=1e39, top_k=10**12),
        SamplingParams(temperature=1e-4, min_p=1.0),
        SamplingParams(top_k=1, top_p=0.999999, min_p=1e-300),
        SamplingParams(repetition_penalty=1e39, presence_penalty=2.0),
        SamplingParams(repetition_penalty=1e-39),
    ],
)
def test_extreme_values_still_draw_a_possible_token(params):
    limit = np.finfo(np.float32).max
    logits = np.full((ROWS, VOCAB), -np.inf, np.float32)
    logits[0, 10:20] = limit
    logits[0, 20:30] = -limit
    logits[1, 10:20] = 0.0
    logits[1, 15:20] = -0.0
    logits[2, 10:20] = -limit
    logits[3, 10:20] = 1e-44
    logits[4, 10:20] = 7.25
    samples = [request_sample(params, seed=i, prompt=[1, 12], output=[11, 40]) for i in range(5)]
    result = draw(logits, samples, num_top=20)
    drawn = np.asarray(result.token_ids)[:5]
    assert np.all((drawn >= 10) & (drawn < (30 if params.temperature > 1 else 20)))
    assert not np.any(np.isnan(np.asarray(result.scores.logprobs)[:5]))
    assert not np.any(np.isnan(np.asarray(result.scores.top_logprobs)[:5]))


def test_ties_with_a_threshold_are_kept():
    logits = np.tile(np.array([1.0, 3.0, 1.0, 1.0, 0.0, -1.0, -2.0, -3.0], np.float32), (4096, 1))
    for params in (SamplingParams(top_k=2), SamplingParams(top_p=0.75)):
        samples = [request_sample(params, position=i) for i in range(4096)]
        assert set(token_ids(logits, samples)) == {0, 1, 2, 3}


def test_scores_are_the_models_own_whatever_was_drawn():
    rng = np.random.default_rng(2)
    logits = np.round(rng.normal(size=(ROWS, VOCAB)) * 5, 1).astype(np.float32)
    logits[3, 5:] = -np.inf
    params = SamplingParams(temperature=2, top_k=9, repetition_penalty=2.0)
    samples = [request_sample(params, seed=row, output=[1, 2]) for row in range(ROWS)]
    result = draw(logits, samples, num_top=20)
    rows = np.arange(ROWS)
    raw = logits.astype(np.float64)
    logprobs = (
        raw - np.log(np.sum(np.exp(raw - raw.max(-1, keepdims=True)), -1, keepdims=True)) - raw.max(-1, keepdims=True)
    )
    drawn, scores = np.asarray(result.token_ids), result.scores
    np.testing.assert_allclose(scores.logprobs, logprobs[rows, drawn], atol=1e-5)
    np.testing.assert_array_equal(scores.ranks, 1 + np.sum(logits > logits[rows, drawn][:, None], -1))
    top_ids = np.argsort(-raw, axis=-1, kind="stable")[:, :20]
    np.testing.assert_array_equal(scores.top_ids, top_ids)
    np.testing.assert_allclose(scores.top_logprobs, logprobs[rows[:, None], top_ids], atol=1e-5)


def test_given_tokens_are_scored_like_drawn_ones():
    logits = jnp.asarray(np.random.default_rng(3).normal(size=(ROWS, VOCAB)), jnp.float32)
    result = jitted_sample(logits, make_sample_inputs([], ROWS), num_top=20)
    scores = jitted_score(logits, result.token_ids, num_top=20)
    jax.tree.map(np.testing.assert_array_equal, scores, result.scores)
    assert np.asarray(scores.ranks).tolist() == [1] * ROWS
    np.testing.assert_array_equal(scores.top_ids[:, 0], result.token_ids)


def test_small_vocabulary_has_fewer_alternatives():
    scores = jitted_score(jnp.zeros((2, 5)), jnp.zeros(2, jnp.int32), num_top=20)
    np.testing.assert_array_equal(scores.top_ids, np.tile(np.arange(5), (2, 1)))


def test_inputs_are_padded_with_rows_that_ask_for_nothing():
    inputs = make_sample_inputs([request_sample(SamplingParams(top_k=-1, seed=1), seed=2**32 - 1, position=9)], 4)
    assert inputs.temperature.tolist() == [1, 0, 0, 0]
    assert inputs.top_p.tolist() == inputs.repetition_penalty.tolist() == [1, 1, 1, 1]
    assert inputs.top_k.tolist() == [0, 0, 0, 0]
    assert inputs.seeds.tolist() == [2**32 - 1, 0, 0, 0]
    assert inputs.positions.tolist() == [9, 0, 0, 0]
    assert len(inputs.bias_rows) == len(inputs.seen_rows) == 0


@pytest.mark.parametrize(("num_tokens", "padded_len"), [(1, 64), (64, 64), (65, 256), (1000, 1024), (1025, 4096)])
def test_flat_arrays_are_padded_to_few_lengths_in_a_dropped_row(num_tokens, padded_len):
    params = SamplingParams(presence_penalty=1.0)
    inputs = make_sample_inputs(
        [request_sample(), request_sample(params, prompt=range(num_tokens), banned=range(num_tokens))], 3
    )
    for rows, ids in ((inputs.seen_rows, inputs.seen_ids), (inputs.bias_rows, inputs.bias_ids)):
        assert rows.tolist() == [1] * num_tokens + [3] * (padded_len - num_tokens)
        assert ids[:num_tokens].tolist() == list(range(num_tokens))
    assert np.all(np.isneginf(inputs.bias_values[:num_tokens]))
    assert not inputs.seen_is_output.any()
