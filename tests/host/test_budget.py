"""The tokens of a step beside decodes: those that the machine computes in the seconds given."""

import math

import hypothesis.strategies as st
import pytest
from hypothesis import given

from jpaged.contract.profile import Link, MachineProfile
from jpaged.host.blocks.manager import BlockManager
from jpaged.host.offload.profile import prefill_s
from jpaged.host.policies.budget import find_token_budget, tokens_within
from jpaged.host.scheduler import Scheduler
from jpaged.request import Request, SamplingParams
from tests.support.fake_device import FakeDevice

LINK = Link(0.0, 1e9, 1e9)
SIZES = ((128, 64), (256, 128), (512, 256), (1024, 256), (2048, 256), (8192, 256))


def profile_of(fixed_s: float, token_s: float, context_s: float = 0.0) -> MachineProfile:
    return MachineProfile(1, LINK, LINK, (), fixed_s, token_s, context_s, 0.0, 0.0)


@given(
    st.floats(0, 0.05), st.floats(1e-6, 1e-3), st.floats(0, 1e-7), st.integers(0, 100_000), st.floats(0.06, 1.0)
)  # fmt: skip
def test_a_chunk_of_the_tokens_within_takes_the_seconds_given(fixed_s, token_s, context_s, context_len, max_step_s):
    profile = profile_of(fixed_s, token_s, context_s)
    num_tokens = tokens_within(profile, max_step_s, context_len)
    assert sum_s(profile, num_tokens, context_len) == pytest.approx(max_step_s, rel=1e-3)


def sum_s(profile, num_tokens, context_len):
    return prefill_s(profile, num_tokens, context_len=context_len)


def test_no_bound_without_rates_and_no_tokens_where_a_step_alone_takes_longer():
    assert tokens_within(None, 0.1, 0) == math.inf
    assert tokens_within(profile_of(0.01, 1e-4), math.inf, 0) == math.inf
    assert tokens_within(profile_of(0.2, 1e-4), 0.1, 0) == 0
    assert tokens_within(profile_of(0.01, 0.0), 0.1, 0) == math.inf


def budget(feed_lens, most_beside=math.inf, waiting=(), max_num_tokens=8192) -> int:
    sizes = {"max_num_seqs": 256, "max_num_tokens": max_num_tokens, "step_sizes": SIZES}
    return find_token_budget(feed_lens, waiting, **sizes, most_beside=most_beside)


def test_prompts_alone_take_the_largest_step():
    assert budget([5000, 9000], most_beside=100) == 8192


def test_all_that_waits_is_taken_at_once():
    assert budget([1] * 10 + [300]) == 8192
    assert budget([1] * 10, waiting=[(1, 300)]) == 8192
    assert budget([1] * 16 + [3000]) == 2048, "8192 would be mostly padding"
    assert budget([1] * 10, waiting=[(1, 700), (240, 1), (10, 1)]) == 512, "there is no row for the last"


def test_prompts_beside_decodes_take_the_largest_size_within_the_bound():
    assert budget([1] * 10 + [9000]) == 8192
    assert budget([1] * 10 + [9000], most_beside=2500) == 2048
    assert budget([1] * 10 + [9000], most_beside=1000) == 512
    assert budget([1] * 10, most_beside=1000, waiting=[(1, 9000)]) == 512


def test_a_prompt_goes_on_however_low_the_bound():
    assert budget([1] * 10 + [9000], most_beside=0) == 11
    assert budget([1] * 200 + [9000], most_beside=40) == 240, "no size holds them"


def test_a_bound_changes_chunks_beside_decodes_alone():
    """2 ms a token: 20 tokens in 50 ms, and 64 where nothing decodes."""
    blocks = BlockManager(128, 4)
    rates = profile_of(0.01, 0.002)
    scheduler = Scheduler(blocks, max_num_seqs=4, max_num_batched_tokens=64, max_model_len=400, profile=rates)
    scheduler.max_step_s = 0.05
    device = FakeDevice(scheduler)

    def step() -> int:
        plan = scheduler.schedule()
        scheduler.update(plan, device.execute(plan))
        return plan.num_tokens

    params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    scheduler.add(Request("first", None, [3 + i % 90 for i in range(100)], params, 0))
    assert [step(), step()] == [64, 36]
    scheduler.add(Request("second", None, [3 + i % 80 for i in range(50)], params, 0))
    assert [step(), step(), step(), step()] == [21, 21, 11, 2]
