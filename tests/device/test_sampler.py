"""The sampler against sorting, counting oracles in numpy float64; its randomness against (seed, position) alone."""

from collections import Counter
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.extend.random import threefry_2x32

from jpaged.contract.adjustments import GENERATED, MOST_GENERATED
from jpaged.contract.rows import PADDING_ROW
from jpaged.device.sampling import noise
from jpaged.device.sampling.adjustments import Adjustments
from jpaged.device.sampling.chunks import CHUNK_LEN, summarise
from jpaged.device.sampling.columns import SampleInputs, inputs_of_rows, pack_draws
from jpaged.device.sampling.draw import SampledTokens, sample
from jpaged.device.sampling.filters import Filters, find_threshold
from jpaged.device.sampling.scores import score
from jpaged.device.step.adjust import (
    ADJUSTED_ROWS,
    CHANGED_BIASES,
    CHANGED_MARKS,
    enter_adjustments,
    pack_adjustments,
)
from jpaged.request import MAX_LOGIT_BIAS, SamplingParams
from tests.support.plans import Chunk, Sample, adjustments_of, make_plan, make_sample_inputs

ROWS, VOCAB = 32, 48  # of most cases: few shapes, few compilations

jitted_sample = jax.jit(sample, static_argnames="num_top")
jitted_score = jax.jit(score, static_argnames="num_top")


@jax.jit
def jitted_threshold(logits, inputs):
    filters = Filters(inputs.top_k, inputs.top_p, inputs.min_p, inputs.temperature)
    return find_threshold(logits, summarise(logits, 1 / filters.temperature), filters)


exact = settings(deadline=None, derandomize=True)


def request_sample(params=None, *, seed=0, position=0, banned=(), prompt=(), output=()) -> Sample:
    params = params or SamplingParams()
    return Sample(0, 0, position, seed, params, list(banned), list(prompt), list(output))


def draw(logits: np.ndarray, samples: list[Sample], num_top: int | None = 0) -> SampledTokens:
    if num_top is not None:
        samples = [each._replace(params=replace(each.params, logprobs=num_top)) for each in samples]
    inputs = make_sample_inputs(samples, *logits.shape)
    return jitted_sample(jnp.asarray(logits, jnp.float32), inputs, num_top=num_top)


def token_ids(logits: np.ndarray, samples: list[Sample]) -> list[int]:
    return np.asarray(draw(logits, samples).token_ids)[: len(samples)].tolist()


def gumbel_oracle(seed: int, position: int, level: int, ids: np.ndarray) -> np.ndarray:
    """The noise of a row, from JAX's own threefry and outside of jit: neither batch nor compiler may change it."""
    key = jnp.array([seed, position], jnp.uint32)
    counters = np.concatenate([np.full_like(ids, level), ids]).astype(np.uint32)
    bits = np.asarray(threefry_2x32(key, jnp.asarray(counters)))[: len(ids)].astype(np.float64)
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
    token_ids = np.arange(len(logits))
    num_chunks = -(-len(logits) // CHUNK_LEN)
    chunk_noise = gumbel_oracle(sample.seed, sample.position, 0, np.arange(num_chunks))
    token_noise = gumbel_oracle(sample.seed, sample.position, 1, token_ids)
    accepted = set()
    for slack in (-1e-5, 0.0, 1e-5):
        kept = probabilities_oracle(logits, params, slack) > 0
        scores = np.where(kept, logits.astype(np.float64) / params.temperature, -np.inf)
        masses = [np.logaddexp.reduce(scores[chunk::num_chunks]) for chunk in range(num_chunks)]
        for chunk in nearly_greatest(masses + chunk_noise):
            is_member = token_ids % num_chunks == chunk
            accepted |= set(nearly_greatest(np.where(is_member, scores + token_noise, -np.inf)))
    return accepted


def nearly_greatest(scores: np.ndarray) -> list[int]:
    return np.flatnonzero(scores >= scores.max() - 1e-4 * max(1, abs(scores.max()))).tolist()


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
    for row, request in enumerate(samples):
        assert drawn[row] in draw_oracle(logits[row], request), (row, request.params)


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


CHUNK_OF, MEMBER_OF = (lambda token_id: token_id % 8), (lambda token_id: token_id // 32)
"""Groupings of 256 tokens in 8 chunks of 32: by chunk, and by eighths of the members of all chunks."""


def assert_independent(firsts, seconds) -> None:
    pairs = Counter(zip(firsts, seconds, strict=True))
    expected = len(firsts) / 64
    chi_square = sum((pairs[a, b] - expected) ** 2 / expected for a in range(8) for b in range(8))
    assert chi_square < 113.5  # 63 degrees of freedom: all but 1 of 10,000


@pytest.mark.parametrize("part", [CHUNK_OF, MEMBER_OF])
@pytest.mark.parametrize(("seed_step", "position_step"), [(0, 1), (1, 0), (1, 1), (1 << 31, 0), (0, 1 << 16)])
def test_neighbouring_positions_and_seeds_draw_independently(seed_step, position_step, part):
    firsts = [request_sample(seed=2 * i, position=2 * i) for i in range(4096)]
    seconds = [request_sample(seed=2 * i + seed_step, position=2 * i + position_step) for i in range(4096)]
    logits = np.zeros((4096, 256), np.float32)
    assert_independent(*([part(token_id) for token_id in token_ids(logits, row)] for row in (firsts, seconds)))


def test_seed_and_position_do_not_stand_for_each_other():
    logits = np.zeros((4096, 256), np.float32)
    firsts = [request_sample(seed=i, position=7) for i in range(4096)]
    seconds = [request_sample(seed=7, position=i) for i in range(4096)]
    assert_independent(*([CHUNK_OF(token_id) for token_id in token_ids(logits, row)] for row in (firsts, seconds)))


@pytest.mark.parametrize("stream", ["positions of one seed", "seeds at one position"])
def test_every_token_of_every_chunk_has_its_probability(stream):
    logits = np.tile(np.linspace(-1, 1, 250, dtype=np.float32), (4096, 1))  # the last chunks have a member less
    counts = np.zeros(250)
    for part in range(8):
        numbers = range(4096 * part, 4096 * (part + 1))
        is_seed = stream == "seeds at one position"
        samples = [request_sample(seed=i if is_seed else 5, position=5 if is_seed else i) for i in numbers]
        drawn = token_ids(logits, samples)
        counts += np.bincount(drawn, minlength=250)
    expected = counts.sum() * probabilities_oracle(logits[0], SamplingParams())
    assert np.sum((counts - expected) ** 2 / expected) < 340  # 249 degrees of freedom: all but 1 of 10,000


@pytest.mark.parametrize("seed_and_position", [(5, 9), (2**32 - 1, 0)])
def test_noise_is_threefry_as_published(seed_and_position):
    # Known answers of Random123 for threefry2x32 with 20 rounds: counter, key, result.
    for counter, key, result in (
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), (0x1CB996FC, 0xBB002BE7)),
        ((0x243F6A88, 0x85A308D3), (0x13198A2E, 0x03707344), (0xC4923A9C, 0x483DF7A0)),
    ):
        words = [jnp.uint32(word) for word in (*key, *counter)]
        assert tuple(map(int, noise.threefry_2x32((words[0], words[1]), (words[2], words[3])))) == result
    seed, position = seed_and_position
    ids = np.arange(1000)
    found = noise.gumbel(jnp.uint32([seed]), jnp.int32([position]), 1, jnp.asarray(ids, jnp.uint32)[None])
    np.testing.assert_allclose(found[0], gumbel_oracle(seed, position, 1, ids), rtol=1e-5, atol=1e-6)


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


@pytest.mark.parametrize("vocab_size", [7, 5000])
@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_log_probability_is_nan_exactly_where_logits_are_no_distribution(wrong, vocab_size):
    logits = np.random.default_rng(0).normal(size=(3, vocab_size)).astype(np.float32)
    logits[1, 4 if wrong != -np.inf else slice(None)] = wrong
    logits[2, 1:] = -np.inf
    filters = [{}, {"temperature": 0}, {"top_k": 3, "top_p": 0.9, "min_p": 0.1}, {"top_p": 0.5}, {"logit_bias": {1: 2}}]
    for params in filters:
        samples = [request_sample(SamplingParams(**params))] * 3
        result = draw(logits, samples, num_top=None)
        assert np.isnan(np.asarray(result.scores.logprobs)[:3]).tolist() == [False, True, False]
        assert np.all(np.asarray(result.token_ids)[:3] < vocab_size)
    given = jitted_score(logits, np.ones(3, np.int32), num_top=0)
    assert np.isnan(np.asarray(given.logprobs)).tolist() == [False, True, False]
    assert np.asarray(given.logprobs)[2] == -np.inf, "a token that the model masks"


def test_ties_with_a_threshold_are_kept():
    logits = np.tile(np.array([1.0, 3.0, 1.0, 1.0, 0.0, -1.0, -2.0, -3.0], np.float32), (4096, 1))
    for params in (SamplingParams(top_k=2), SamplingParams(top_p=0.75)):
        samples = [request_sample(params, position=i) for i in range(4096)]
        assert set(token_ids(logits, samples)) == {0, 1, 2, 3}


LONG_VOCAB = 128 * CHUNK_LEN + 901  # more chunks than are listed, so that the search has work to do


def long_rows(rng: np.random.Generator) -> np.ndarray:
    """Logits that a search finds hard: flat, peaked, rounded, constant, with masks of several sorts."""
    logits = rng.normal(size=(8, LONG_VOCAB)).astype(np.float32) * rng.choice([0.05, 1, 5], (8, 1)).astype(np.float32)
    logits[1] = np.round(logits[1])
    logits[2] = 0.0
    logits[3] = np.where(rng.random(LONG_VOCAB) < 0.5, -1e9, logits[3])
    logits[4] = np.where(rng.random(LONG_VOCAB) < 0.9, -np.inf, logits[4])
    logits[5] = np.where(rng.random(LONG_VOCAB) < 0.5, 0.0, rng.choice([-1e-30, 1e-30, -5.0], LONG_VOCAB))
    logits[6] = np.finfo(np.float32).min
    logits[6, :3000] = rng.normal(size=3000)
    return logits


@settings(exact, max_examples=25)
@given(st.integers(0, 2**32 - 1))
def test_thresholds_of_long_rows_equal_those_of_a_sorting_oracle(case):
    rng = np.random.default_rng(case)
    logits = long_rows(rng)
    params = [
        SamplingParams(
            temperature=float(rng.choice([0.3, 1, 2.5])),
            top_k=int(rng.choice([0, 0, 1, 50, 128, 129, 700, 4000, LONG_VOCAB - 1, LONG_VOCAB + 5])),
            top_p=float(rng.choice([1, 0.1, 0.5, 0.9, 0.99])),
            min_p=float(rng.choice([0, 0, 0.05, 1])),
        )
        for _ in logits
    ]
    thresholds = np.asarray(
        jitted_threshold(jnp.asarray(logits), make_sample_inputs(list(map(request_sample, params)), 8))
    )
    for row, param in enumerate(params):
        kept = logits[row] >= thresholds[row]
        accepted = [probabilities_oracle(logits[row], param, slack) > 0 for slack in (-1e-5, 0.0, 1e-5)]
        is_possible = logits[row] > -1e8
        most, least = accepted[0] | accepted[1] | accepted[2], accepted[0] & accepted[1] & accepted[2]
        assert np.all(kept[least & is_possible]), (row, param)
        assert not np.any(kept & ~most & is_possible), (row, param)


@pytest.mark.parametrize("params", [SamplingParams(top_k=3000), SamplingParams(top_p=0.9)])
def test_long_searches_draw_what_they_kept(params):
    logits = np.random.default_rng(4).normal(size=(1, LONG_VOCAB)).astype(np.float32)
    for position in range(30):
        sample = request_sample(params, seed=1, position=position)
        assert token_ids(logits, [sample])[0] in draw_oracle(logits[0], sample)


def test_nobodys_logprobs_cost_the_drawn_tokens_rank_and_change_nothing_else():
    rng = np.random.default_rng(8)
    logits = random_logits(rng)
    samples = [request_sample(random_params(rng), seed=row) for row in range(ROWS)]
    unasked, asked = draw(logits, samples, num_top=None), draw(logits, samples, num_top=0)
    np.testing.assert_array_equal(unasked.token_ids, asked.token_ids)
    np.testing.assert_array_equal(unasked.scores.logprobs, asked.scores.logprobs)
    assert not np.any(unasked.scores.ranks)
    assert unasked.scores.top_ids.shape == (ROWS, 0)


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
    greedy = SamplingParams(temperature=0, logprobs=20)
    result = jitted_sample(logits, make_sample_inputs([request_sample(greedy)] * ROWS, ROWS), num_top=20)
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
    assert inputs.num_biases.tolist() == inputs.num_logprobs.tolist() == [-1, -1, -1, -1]
    assert inputs.marks.shape == (4, 0)


def test_unpacking_on_the_device_gives_each_field_bit_for_bit():
    rng = np.random.default_rng(5)
    extreme = SamplingParams(temperature=1e300, top_k=2**40, repetition_penalty=1e-300, logit_bias={3: -1e300, 4: 0.1})
    all_params = [random_params(rng), SamplingParams(presence_penalty=-2, frequency_penalty=0.3), extreme]
    samples = [
        request_sample(params, seed=2**32 - 1 - row, position=row, banned=[7], prompt=[1, 2], output=[5])
        for row, params in enumerate(all_params)
    ]
    chunks = [Chunk(row, [0], row - 1, 0, [1]) for row in range(3)]
    plan = make_plan(chunks, [request._replace(chunk=row) for row, request in enumerate(samples)])
    rows, positions = pack_draws(plan, 4, padding_row=3)
    assert rows.tolist() == [0, 1, 2, 3]
    columns = np.concatenate([plan.changes.columns, PADDING_ROW[:, None]], axis=1)
    table = Adjustments.allocate(4, 8)
    for changes in pack_adjustments(plan.adjustments, 4):
        table = jax.jit(enter_adjustments)(table, changes)
    inputs = jax.jit(lambda *args: table.inputs_of(inputs_of_rows(*args), args[1]))(columns, rows, positions)
    expected = {
        "temperature": np.float32([all_params[0].temperature, 1, 1e30, 0]),
        "top_p": np.float32([all_params[0].top_p, 1, 1, 1]),
        "min_p": np.float32([all_params[0].min_p, 0, 0, 0]),
        "repetition_penalty": np.float32([1, 1, 1e-30, 1]),
        "presence_penalty": np.float32([0, -2, 0, 0]),
        "frequency_penalty": np.float32([0, 0.3, 0, 0]),
        "top_k": np.int32([all_params[0].top_k, 0, 2**31 - 1, 0]),
        "seeds": np.uint32([2**32 - 1, 2**32 - 2, 2**32 - 3, 0]),
        "positions": np.int32([0, 1, 2, 0]),
        "num_logprobs": np.int32([-1, -1, -1, -1]),
        "num_biases": np.int32([0, 0, 2, -1]),
        "is_early": np.array([False] * 4),
        "marks": np.uint16([[0] * 7 + [2], [0] * 5 + [16, 0, 2], [0, 1, 1, 0, 0, 16, 0, 2], [0] * 8]),
        "bias_ids": np.int32([[0, 0], [0, 0], [3, 4], [0, 0]]),
        "bias_values": np.float32([[0, 0], [0, 0], [-1e30, 0.1], [0, 0]]),
    }
    for name in SampleInputs.__dataclass_fields__:
        field = np.asarray(getattr(inputs, name))
        if name.startswith("bias"):
            assert field.shape == (4, MAX_LOGIT_BIAS)
            field = field[:, :2]
        assert field.dtype == expected[name].dtype, name
        np.testing.assert_array_equal(field, expected[name], err_msg=name)


@pytest.mark.parametrize("num_tokens", [1, 64, CHANGED_MARKS, CHANGED_MARKS + 1, 3 * CHANGED_MARKS])
def test_as_many_calls_enter_adjustments_as_they_need(num_tokens):
    params = SamplingParams(logit_bias={each: float(each) for each in range(min(num_tokens, MAX_LOGIT_BIAS))})
    samples = [request_sample(), request_sample(params, banned=range(num_tokens))]
    calls = pack_adjustments(adjustments_of(samples), 3)
    assert len(calls) == max(-(-num_tokens // CHANGED_MARKS), -(-len(params.logit_bias or ()) // CHANGED_BIASES))
    table = Adjustments.allocate(3, 3 * CHANGED_MARKS)
    for changes in calls:
        table = enter_adjustments(table, changes)
    expected = make_sample_inputs(samples, 3, 3 * CHANGED_MARKS)
    np.testing.assert_array_equal(table.marks, expected.marks)
    np.testing.assert_array_equal(table.bias_ids, expected.bias_ids)
    np.testing.assert_array_equal(table.bias_values, expected.bias_values)


def test_rows_that_begin_anew_are_empty_before_their_marks_are_entered():
    samples = [request_sample(banned=[row % 5]) for row in range(2 * ADJUSTED_ROWS + 1)]
    full = jnp.full((len(samples), 8), 7, jnp.uint16)
    table = replace(Adjustments.allocate(len(samples), 8), marks=full)
    for changes in pack_adjustments(adjustments_of(samples), len(samples)):
        table = enter_adjustments(table, changes)
    np.testing.assert_array_equal(table.marks, make_sample_inputs(samples, len(samples), 8).marks)


def test_draws_are_counted_up_to_the_most_that_a_mark_counts():
    table = Adjustments.allocate(3, 4)
    [sample] = [request_sample(SamplingParams(presence_penalty=1.0), output=[2] * (MOST_GENERATED - 1))]
    for changes in pack_adjustments(adjustments_of([sample]), 3):
        table = enter_adjustments(table, changes)
    columns = make_plan([Chunk(0, [0], 0, 0, [1])], [sample]).changes.columns
    columns, rows = np.concatenate([columns, PADDING_ROW[:, None]], axis=1), jnp.array([0, 1])
    for _ in range(2):
        inputs = table.inputs_of(inputs_of_rows(jnp.asarray(columns), rows, rows), rows)
        table = table.with_drawn(inputs, rows, jnp.array([2, 3]))
        assert table.marks.tolist() == [[0, 0, GENERATED * MOST_GENERATED, 0], [0] * 4, [0] * 4]
