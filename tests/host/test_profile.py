"""The profile of a machine: its fits, its text and its running averages."""

import dataclasses
import json

import pytest

from jpaged.contract.profile import Link, MachineProfile, fit_link, fit_prefill, from_json, to_json

PROFILE = MachineProfile(
    to_host=Link(6e-5, 52e9, 40e9),
    from_host=Link(7e-5, 53e9, 41e9),
    projection_flops_per_s=((256, 2e14), (4096, 6e14)),
    prefill_fixed_s=4e-3,
    prefill_token_s=3e-5,
    prefill_context_s=2e-10,
    layer_fixed_s=1e-4,
    layer_token_s=1e-9,
)


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
