"""Beam candidates and top-k against numpy oracles that sort everything, ties included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jpaged.contract.plan import BeamSelect
from jpaged.device.sampling.beams import (
    BeamInputs,
    beam_candidates,
    make_beam_inputs,
    num_candidates_of,
    pack_beam_inputs,
    split_candidates,
    unpack_beam_inputs,
)
from jpaged.device.sampling.filters import top_k

jitted_top_k = jax.jit(top_k, static_argnums=1)
jitted_candidates = jax.jit(beam_candidates, static_argnames="num_candidates")
exact = settings(deadline=None, derandomize=True)


def top_k_oracle(values: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """By sorting: greatest first, lower index first among equals."""
    indices = np.stack([np.lexsort((np.arange(len(row)), -row))[:k] for row in values])
    return np.take_along_axis(values, indices, axis=-1), indices


KINDS = ("normal", "few values", "one value", "mostly -inf", "signed zeros", "ascending", "descending")


def row_of(rng: np.random.Generator, kind: str, size: int) -> np.ndarray:
    rows = {
        "normal": rng.normal(size=size),
        "few values": rng.integers(-2, 2, size),
        "one value": np.full(size, -3.0),
        "mostly -inf": np.where(rng.random(size) < 0.02, rng.normal(size=size), -np.inf),
        "signed zeros": rng.choice([0.0, -0.0, -1.0], size),
        "ascending": np.arange(size),
        "descending": -np.arange(size),
    }
    return rows[kind].astype(np.float32)


@settings(exact, max_examples=60)
@given(
    st.sampled_from([(1, 1), (5, 3), (17, 4), (48, 48), (128, 2), (1000, 1), (1000, 20), (1023, 130), (4099, 8)]),
    st.lists(st.sampled_from(KINDS), min_size=3, max_size=3),
    st.integers(0, 2**32 - 1),
)
def test_top_k_equals_a_full_sort_with_ties(shape, kinds, seed):
    size, k = shape
    rng = np.random.default_rng(seed)
    values = np.stack([row_of(rng, kind, size) for kind in kinds])
    top, indices = jitted_top_k(values, k)
    expected, expected_indices = top_k_oracle(values, k)
    np.testing.assert_array_equal(indices, expected_indices)
    np.testing.assert_array_equal(top, expected)


def test_top_k_sorts_no_whole_row_of_a_large_vocabulary():
    """A sort costs 2.5 ms for 256 rows of 128,256 logits on an H200, and 100 us for 4,096."""
    logits = jax.ShapeDtypeStruct((4, 128_256), jnp.float32)
    jaxpr = jax.make_jaxpr(lambda x: top_k(x, 64))(logits)
    sizes = [equation.invars[0].aval.shape[-1] for equation in jaxpr.eqns if equation.primitive.name == "top_k"]
    assert len(sizes) == 2
    assert max(sizes) <= 4096


@pytest.mark.parametrize("sign", [1, -1])
def test_top_k_of_nan_stays_in_the_vocabulary(sign):
    """A broken model must not make token ids that no tokenizer has."""
    _, indices = jitted_top_k(np.full((1, 1001), np.copysign(np.nan, sign), np.float32), 50)
    assert np.asarray(indices).max() < 1001


@jax.jit
def log_softmax(logits):
    return jax.nn.log_softmax(logits, axis=-1)


def candidates_oracle(logprobs: np.ndarray, beam: BeamSelect) -> list[tuple[float, int, int]]:
    """(score, beam, token) of every continuation, best first, from the log-probabilities of one search."""
    totals = logprobs + np.asarray(beam.scores, np.float32)[:, None]
    totals[:, list(beam.banned_token_ids)] = -np.inf
    beams, tokens = np.indices(totals.shape).reshape(2, -1)
    order = np.lexsort((tokens, beams, -totals.ravel()))
    return [(totals.ravel()[i], int(beams[i]), int(tokens[i])) for i in order]


def find(logits: np.ndarray, beams: list[BeamSelect], first_row: int = 0):
    inputs = make_beam_inputs(beams, first_row=first_row, num_rows=len(logits))
    found = jitted_candidates(logits, inputs, num_candidates=num_candidates_of(beams))
    return split_candidates(jax.device_get(found), beams)


def assert_equal_to_oracle(logits: np.ndarray, beams: list[BeamSelect], first_row: int = 0) -> None:
    logprobs, row = np.asarray(log_softmax(logits)), first_row
    for beam, found in zip(beams, find(logits, beams, first_row), strict=True):
        expected = candidates_oracle(logprobs[row : row + len(beam.chunks)], beam)
        row += len(beam.chunks)
        expected = [triple for triple in expected if triple[0] > -np.inf][: beam.num_candidates]
        missing = beam.num_candidates - len(expected)
        expected += [(-np.inf, 0, 0)] * missing
        assert found.scores.dtype == np.float32
        assert list(zip(found.scores.tolist(), found.beams.tolist(), found.token_ids.tolist(), strict=True)) == expected


def test_packed_inputs_come_back_on_the_device_bit_for_bit():
    beams = [BeamSelect([0, 1], [-1.5, -1e6], 4, (3,)), BeamSelect([2], [0.1], 2)]
    inputs = make_beam_inputs(beams, first_row=1, num_rows=5)
    packed = pack_beam_inputs(inputs)
    assert packed.dtype == np.int32
    unpacked = jax.jit(lambda packed: unpack_beam_inputs(packed, inputs))(packed)
    for name in BeamInputs.__dataclass_fields__:
        expected, actual = getattr(inputs, name), np.asarray(getattr(unpacked, name))
        assert actual.dtype == expected.dtype, name
        np.testing.assert_array_equal(actual, expected, err_msg=name)


@st.composite
def searches(draw, vocab_size: int) -> list[BeamSelect]:
    """Searches of mixed widths over three or four rows: few shapes, few compilations."""
    beams = []
    for width in draw(st.sampled_from([(4,), (3, 1), (1, 1, 3), (2, 4), (1, 1, 1, 4), (5, 2), (7,)])):
        scores = draw(st.lists(st.sampled_from([0.0, -1.0, -2.5, -1e6]), min_size=width, max_size=width))
        banned = draw(st.lists(st.integers(0, vocab_size - 1), max_size=3))
        beams.append(BeamSelect([0] * width, scores, draw(st.sampled_from([2 * width, 2 * width + 1, 16])), banned))
    return beams


@settings(exact, max_examples=60)
@given(st.data(), st.sampled_from([2, 1500]), st.sampled_from([1.0, 0.0]), st.integers(0, 2**32 - 1))
def test_candidates_equal_those_of_a_full_sort(data, vocab_size, scale, seed):
    """Mixed widths, bans, vocabularies of 2 and 1500; equal logits, and scores that swallow differences."""
    logits = (scale * np.random.default_rng(seed).normal(size=(9, vocab_size))).astype(np.float32)
    assert_equal_to_oracle(logits, data.draw(searches(vocab_size)), first_row=data.draw(st.integers(0, 2)))


def test_equal_scores_go_to_the_lower_beam_then_to_the_lower_token():
    [found] = find(np.zeros((2, 4), np.float32), [BeamSelect([0, 1], [-1.0, -1.0], 6)])
    assert found.beams.tolist() == [0, 0, 0, 0, 1, 1]
    assert found.token_ids.tolist() == [0, 1, 2, 3, 0, 1]


def test_a_search_with_nothing_left_offers_nothing():
    [found] = find(np.zeros((1, 2), np.float32), [BeamSelect([0], [-1.0], 4, (0, 1))])
    assert found.scores.tolist() == [-np.inf] * 4
    assert found.beams.tolist() == found.token_ids.tolist() == [0] * 4


def test_bans_take_no_probability_from_other_tokens():
    logits = np.array([[3.0, 1.0, 0.0]], np.float32)
    [free] = find(logits, [BeamSelect([0], [0.0], 3)])
    [banned] = find(logits, [BeamSelect([0], [0.0], 3, (0,))])
    assert banned.token_ids.tolist()[:2] == free.token_ids.tolist()[1:]
    assert banned.scores.tolist()[:2] == free.scores.tolist()[1:]


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_beam_without_a_distribution_makes_its_group_nan_and_no_other(wrong):
    logits = np.random.default_rng(0).normal(size=(8, 40)).astype(np.float32)
    beams = [BeamSelect((0, 1), (-1.0, -2.0), 8, ()), BeamSelect((2, 3), (-1.0, -2.0), 8, ())]
    inputs = make_beam_inputs(beams, first_row=0, num_rows=8)
    alone = jitted_candidates(logits, inputs, num_candidates=8)
    logits[3, 5 if wrong != -np.inf else slice(None)] = wrong
    logits[6] = np.nan  # padding
    first, second = split_candidates(jitted_candidates(logits, inputs, num_candidates=8), beams)
    assert np.isnan(second.scores).all()
    np.testing.assert_array_equal(first.scores, np.asarray(alone.scores)[0])
    np.testing.assert_array_equal(first.token_ids, np.asarray(alone.token_ids)[0])
