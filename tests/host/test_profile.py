"""The profile of a machine: its fits, its text and its running averages."""

import dataclasses
import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jpaged.contract.profile import Link, MachineProfile, fit_link, fit_prefill, from_json, to_json
from jpaged.host.offload.profile import (
    MAX_GROWTH,
    WEIGHT,
    layer_s,
    learn_prefill,
    learn_transfer,
    prefill_s,
    projection_s,
    report,
    transfer_s,
)

PROFILE = MachineProfile(
    block_bytes=1,
    to_host=Link(6e-5, 52e9, 40e9),
    from_host=Link(7e-5, 53e9, 41e9),
    projection_flops_per_s=((256, 2e14), (4096, 6e14)),
    prefill_fixed_s=4e-3,
    prefill_token_s=3e-5,
    prefill_context_s=2e-10,
    layer_fixed_s=1e-4,
    layer_token_s=1e-9,
)
PREFILL_COSTS = ("prefill_fixed_s", "prefill_token_s", "prefill_context_s")


def test_json_keeps_a_profile():
    assert from_json(to_json(PROFILE)) == PROFILE


def damaged():
    values = dataclasses.asdict(PROFILE)
    yield "no JSON", "{"
    yield "no object", "3"
    yield "a field too few", json.dumps({name: values[name] for name in values if name != "prefill_token_s"})
    yield "a field too many", json.dumps(values | {"colour": 1})
    yield "no link", json.dumps(values | {"to_host": 3})
    yield "no rates", json.dumps(values | {"projection_flops_per_s": [1, 2]})


@pytest.mark.parametrize("text", [text for _, text in damaged()], ids=[name for name, _ in damaged()])
def test_text_that_is_no_profile_is_refused(text):
    with pytest.raises(ValueError, match="expected the profile of a machine"):
        from_json(text)


def test_a_link_is_found_in_two_transfers():
    times = [(n, 7e-5 + n / 53e9) for n in (2**20, 2**28)]
    link = fit_link(*times, shared_bytes_per_s=41e9)
    assert dataclasses.astuple(link) == pytest.approx((7e-5, 53e9, 41e9))


def test_a_link_measured_with_noise_has_no_negative_cost():
    link = fit_link((2**20, 1.0), (2**21, 0.9), shared_bytes_per_s=1.0)
    assert link.fixed_s >= 0
    assert link.bytes_per_s > 0


def test_prefill_costs_are_found_in_two_prompts():
    times = [(n, 4e-3 + n * 3e-5 + n**2 / 2 * 2e-10) for n in (1024, 8192)]
    assert fit_prefill(*times, fixed_s=4e-3) == pytest.approx((3e-5, 2e-10))


def test_prompts_measured_with_noise_have_no_negative_cost():
    assert min(fit_prefill((1024, 2.0), (8192, 1.0), fixed_s=0.0)) >= 0
    assert min(fit_prefill((1024, 1.0), (8192, 1000.0), fixed_s=0.0)) >= 0


def test_predictions_follow_their_formulas():
    assert transfer_s(PROFILE.to_host, 52 * 10**9) == pytest.approx(1 + 6e-5)
    assert transfer_s(PROFILE.to_host, 40 * 10**9, is_shared=True) == pytest.approx(1 + 6e-5)
    assert transfer_s(PROFILE.to_host, 0) == 0
    assert prefill_s(PROFILE, 1000, context_len=500) == pytest.approx(4e-3 + 1000 * 3e-5 + 1000 * 1000 * 2e-10)
    assert prefill_s(PROFILE, 0, context_len=500) == 0
    assert layer_s(PROFILE, 1000) == pytest.approx(1e-4 + 1e-6)


def test_a_prompt_takes_as_long_in_chunks_but_for_the_fixed_cost_of_each():
    whole = prefill_s(PROFILE, 3000)
    chunks = sum(prefill_s(PROFILE, 1000, context_len=start) for start in (0, 1000, 2000))
    assert chunks == pytest.approx(whole + 2 * PROFILE.prefill_fixed_s)


def test_projections_take_the_measured_seconds_and_lie_between_elsewhere():
    few_s, many_s = 256 * 1e8 / 2e14, 4096 * 1e8 / 6e14
    seconds = [projection_s(PROFILE, tokens, 1e8) for tokens in (0, 1, 256, 2176, 4096, 8192)]
    assert seconds == pytest.approx([0, few_s, few_s, (few_s + many_s) / 2, many_s, 2 * many_s])


def slower(profile, factor):
    """The same machine with every cost of transfers and prefills multiplied."""
    scaled = {name: getattr(profile, name) * factor for name in PREFILL_COSTS}
    links = {
        name: Link(link.fixed_s * factor, link.bytes_per_s / factor, link.shared_bytes_per_s / factor)
        for name, link in (("to_host", profile.to_host), ("from_host", profile.from_host))
    }
    return dataclasses.replace(profile, **scaled, **links)


factors = st.floats(0.1, 20.0)
sizes = st.integers(1, 2**32)


@pytest.mark.parametrize("direction", ["to_host", "from_host"])
@pytest.mark.parametrize("is_shared", [False, True])
@given(sizes, factors)
def test_a_transfer_moves_its_prediction_by_the_weight(direction, is_shared, num_bytes, factor):
    def predict(profile):
        return transfer_s(getattr(profile, direction), num_bytes, is_shared=is_shared)

    before = predict(PROFILE)
    learned = learn_transfer(PROFILE, direction, num_bytes, before * factor, is_shared=is_shared)
    error = min(factor, MAX_GROWTH) - 1
    assert predict(learned) == pytest.approx(before * (1 + WEIGHT * error), rel=1e-6)
    other = "from_host" if direction == "to_host" else "to_host"
    assert getattr(learned, other) == getattr(PROFILE, other)


@given(sizes, factors)
def test_a_transfer_whose_end_was_not_seen_is_an_upper_bound(num_bytes, factor):
    before = transfer_s(PROFILE.to_host, num_bytes)
    learned = learn_transfer(PROFILE, "to_host", num_bytes, before * factor, is_end_seen=False)
    assert transfer_s(learned.to_host, num_bytes) == pytest.approx(before * min(factor, 1.0))


@given(st.integers(1, 10**5), st.integers(0, 10**6), factors)
def test_a_chunk_moves_its_prediction_by_the_weight(num_tokens, context_len, factor):
    before = prefill_s(PROFILE, num_tokens, context_len=context_len)
    learned = learn_prefill(PROFILE, num_tokens, before * factor, context_len=context_len)
    error = min(factor, MAX_GROWTH) - 1
    after = prefill_s(learned, num_tokens, context_len=context_len)
    assert after == pytest.approx(before * (1 + WEIGHT * error), rel=1e-6)


def test_a_short_transfer_teaches_the_fixed_cost_and_a_long_one_the_rate():
    short = learn_transfer(PROFILE, "to_host", 2**10, 2 * PROFILE.to_host.fixed_s).to_host
    assert short.fixed_s > 1.19 * PROFILE.to_host.fixed_s
    assert short.bytes_per_s == pytest.approx(PROFILE.to_host.bytes_per_s, rel=1e-3)
    long = learn_transfer(PROFILE, "to_host", 2**36, 2 * 2**36 / PROFILE.to_host.bytes_per_s).to_host
    assert long.fixed_s == pytest.approx(PROFILE.to_host.fixed_s, rel=1e-3)
    assert long.bytes_per_s < PROFILE.to_host.bytes_per_s / 1.19


def test_averages_find_the_rates_of_another_machine():
    draw = random.Random(0)
    truth = slower(PROFILE, 3.0)
    profile = PROFILE
    for _ in range(2000):
        num_bytes, num_tokens, context_len = 2 ** draw.randint(16, 32), draw.randint(16, 8192), draw.randint(0, 10**5)
        profile = learn_transfer(profile, "to_host", num_bytes, transfer_s(truth.to_host, num_bytes))
        seconds = prefill_s(truth, num_tokens, context_len=context_len)
        profile = learn_prefill(profile, num_tokens, seconds, context_len=context_len)
    assert profile.to_host.fixed_s == pytest.approx(truth.to_host.fixed_s, rel=0.01)
    assert profile.to_host.bytes_per_s == pytest.approx(truth.to_host.bytes_per_s, rel=0.01)
    assert [getattr(profile, name) for name in PREFILL_COSTS] == pytest.approx(
        [getattr(truth, name) for name in PREFILL_COSTS], rel=0.01
    )


def test_costs_stay_positive_whatever_is_observed():
    profile = PROFILE
    for _ in range(200):
        profile = learn_transfer(profile, "to_host", 2**20, 0.0)
        profile = learn_transfer(profile, "from_host", 2**20, 0.0, is_end_seen=False)
        profile = learn_prefill(profile, 100, 0.0)
    assert min(report(profile).values()) > 0
    assert transfer_s(profile.from_host, 2**20) >= 0


def test_report_names_every_rate_once():
    values = report(PROFILE)
    assert values["to_host_bytes_per_s"] == 52e9
    assert values["from_host_shared_bytes_per_s"] == 41e9
    assert values["projection_4096_flops_per_s"] == 6e14
    assert len(values) == 6 + 2 + 5
    assert {type(value) for value in values.values()} == {float}
