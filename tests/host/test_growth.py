"""Admission by expected growth: the policy against a step by step count, and the scheduler that follows it."""

import itertools

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from jpaged.host.blocks.manager import BlockManager
from jpaged.host.policies.growth import BLOCKS_EACH, FIRST_GUESS, HORIZON, Stops, num_blocks_left_free, peak_tokens
from jpaged.host.scheduler import Scheduler
from jpaged.host.sequence import SequenceGroup
from jpaged.request import FinishReason, Request, SamplingParams
from tests.support.fake_device import FakeDevice

EOS = 2
NEVER = 1 << 20  # tokens that a sequence may still draw, if it is sure to stop before

LENS = st.lists(st.tuples(st.integers(1, 60), st.integers(0, 60)), min_size=1, max_size=12)
"""Tokens held and tokens left."""


def peak_of(lens, *, least_left=None, tokens_left=1.0, horizon=NEVER) -> float:
    held, left = np.array([n for n, _ in lens], float), np.array([n for _, n in lens], np.int64)
    return peak_tokens(held, left if least_left is None else least_left, left, tokens_left, horizon)


@given(LENS, st.integers(0, 80))
def test_known_ends_peak_where_a_count_of_every_step_does(lens, horizon):
    counts = [sum(held + t for held, left in lens if left >= t) for t in range(horizon + 1)]
    assert peak_of(lens, horizon=horizon) == max(counts)


@given(LENS, st.integers(1, 50))
def test_sequences_that_may_stop_peak_where_growth_and_stops_balance(lens, tokens_left):
    held = np.array([n for n, _ in lens], float)
    times = np.linspace(0, 300, 30_001)
    counts = np.exp(-times / tokens_left) * (held.sum() + len(lens) * times)
    peak = peak_tokens(held, np.zeros(len(lens), np.int64), np.full(len(lens), NEVER), tokens_left, NEVER)
    assert peak == pytest.approx(counts.max(), rel=1e-5)


@given(LENS, LENS, st.integers(1, 50), st.integers(0, 60))
def test_a_peak_is_at_least_what_is_held_and_grows_with_every_sequence(known, others, tokens_left, horizon):
    held = np.array([n for n, _ in known + others], float)
    least = np.array([n for _, n in known] + [0] * len(others), np.int64)
    most = np.array([n for _, n in known] + [NEVER] * len(others), np.int64)
    peaks = [peak_tokens(held[:n], least[:n], most[:n], tokens_left, horizon) for n in range(1, len(held) + 1)]
    assert all(b >= a for a, b in itertools.pairwise(peaks))
    assert peaks[-1] >= held.sum()
    assert peaks[-1] <= held.sum() + len(held) * horizon


def test_a_sequence_before_its_least_length_is_expected_to_reach_it():
    lens = [(10, 1000), (10, 1000)]
    assert peak_of(lens, least_left=np.array([500, 500]), tokens_left=40) == 2 * (10 + 500 + 40)
    assert peak_of(lens, least_left=np.array([0, 0]), tokens_left=5) == 20


def test_tokens_between_two_stops_are_estimated_while_most_sequences_still_run():
    """After 50 tokens of 5,000 sequences, those that stopped had 25 on average, though the mean is 338."""
    lens = np.random.default_rng(0).geometric(1 / 338, 5000)
    stops = Stops()
    for length in sorted(lens[lens <= 50].tolist()):
        stops = stops.after_stop(np.minimum(lens, length).sum())
    assert stops.tokens_left(np.minimum(lens, 50).sum()) == pytest.approx(338, rel=0.1)


def test_a_first_guess_gives_way_and_old_stops_are_forgotten():
    assert Stops().tokens_left(0) == FIRST_GUESS
    stops, num_drawn = Stops(), 0
    for length in [100] * 500 + [1000] * 5000:
        stops = stops.after_stop(num_drawn := num_drawn + length)
    assert stops.tokens_left(num_drawn) == pytest.approx(1000, rel=0.01)
    assert stops.tokens_left(num_drawn + 64) > stops.tokens_left(num_drawn)


def test_sequences_that_may_stop_leave_more_free_than_the_watermark():
    assert num_blocks_left_free(1000, is_running=False) == 0
    assert num_blocks_left_free(1000, is_running=True) == 10
    assert num_blocks_left_free(1000, is_running=True, num_unsure=100) == 100 * BLOCKS_EACH


# The scheduler --------------------------------------------------------------------------------------------------------


def make_device(num_blocks: int, *, eos=(), horizon: int = HORIZON) -> FakeDevice:
    blocks = BlockManager(1 + num_blocks, 4, enable_prefix_caching=True)
    scheduler = Scheduler(blocks, max_num_seqs=16, max_num_batched_tokens=64, max_model_len=400, eos_token_ids=eos)
    scheduler.growth.horizon = horizon
    return FakeDevice(scheduler)


def add(device: FakeDevice, name: str, prompt_len: int, *, priority: int = 0, **params) -> None:
    """Add a request; prompts share no block."""
    first = 3 + 7 * sum(map(ord, name))
    prompt = [3 + (first * 31 + i * (first % 11 + 1)) % 90 for i in range(prompt_len)]
    device.scheduler.add(Request(name, None, prompt, SamplingParams(temperature=0, **params), 0, priority=priority))


def run(device: FakeDevice, num_steps: int = 10**6) -> list[int]:
    """The running groups of each step."""
    num_running = []
    while device.scheduler.has_unfinished and len(num_running) < num_steps:
        plan = device.scheduler.schedule()
        num_running.append(device.scheduler.stats().num_running)
        device.scheduler.update(plan, device.execute(plan))
        device.scheduler.blocks.check_invariants()
    return num_running


def test_groups_with_known_ends_are_hardly_preempted_and_leave_little_of_the_pool_unused():
    num_steps, num_preemptions = [], []
    for horizon in (0, HORIZON):
        device = make_device(100, horizon=horizon)
        for i in range(60):
            add(device, str(i), 8 + 5 * i % 23, max_tokens=10 + 17 * i % 50, ignore_eos=True)
        num_steps.append(len(run(device)))
        num_preemptions.append(device.scheduler.stats().num_preemptions)
    assert 10 * num_preemptions[1] <= num_preemptions[0]
    assert num_steps[1] <= 1.2 * num_steps[0]


def test_a_group_waits_until_the_pool_will_hold_it_to_its_end():
    """ "b" starts when "a" ends so soon that both fit until then."""
    device = make_device(20)
    add(device, "a", 4, max_tokens=60, ignore_eos=True)
    add(device, "b", 4, max_tokens=70, ignore_eos=True)
    num_running = run(device)
    assert num_running[:40] == [1] * 40
    assert len(num_running) <= 60 + 70
    assert device.scheduler.stats().num_preemptions == 0


def test_a_group_starts_beside_one_that_ends_before_the_pool_is_full():
    """Of 20 blocks, "a" takes 6 until it ends, and "b" is then at 6 of its 19."""
    device = make_device(20)
    add(device, "a", 4, max_tokens=20, ignore_eos=True)
    add(device, "b", 4, max_tokens=70, ignore_eos=True)
    assert max(run(device)) == 2
    assert device.scheduler.stats().num_preemptions == 0


def test_a_search_starts_if_it_fits_now():
    device = make_device(20)
    add(device, "a", 4, max_tokens=60, ignore_eos=True)
    add(device, "b", 4, max_tokens=30, ignore_eos=True, n=2, use_beam_search=True)
    assert max(run(device)) == 2


def test_growth_of_a_lower_priority_keeps_nothing_waiting():
    device = make_device(20)
    add(device, "low", 4, max_tokens=70, ignore_eos=True, priority=1)
    run(device, 2)
    add(device, "high", 4, max_tokens=70, ignore_eos=True, priority=0)
    assert run(device, 1) == [2]
    run(device)
    assert device.scheduler.stats().num_preemptions == 1


def test_growth_of_a_higher_priority_preempts_nothing_in_vain():
    """ "high" is expected to lack blocks beside "first", so that "low" goes on."""
    device = make_device(20)
    add(device, "first", 4, max_tokens=70, ignore_eos=True, priority=0)
    run(device, 2)
    add(device, "high", 40, max_tokens=38, ignore_eos=True, priority=0)
    add(device, "low", 4, max_tokens=1, ignore_eos=True, priority=1)
    run(device)
    assert device.scheduler.stats().num_preemptions == 0


def test_requests_that_may_stop_are_preempted_less_often():
    num_preemptions = []
    for horizon in (0, HORIZON):
        device = make_device(60, eos=(EOS,), horizon=horizon)
        for i in range(40):
            add(device, str(i), 10, max_tokens=80)
        run(device)
        num_preemptions.append(device.scheduler.stats().num_preemptions)
    assert 2 * num_preemptions[1] <= num_preemptions[0]


# The estimate of lengths ----------------------------------------------------------------------------------------------


@given(st.lists(st.sampled_from(["step", "abort waiting", "abort running", "fail waiting"]), max_size=40))
@settings(max_examples=25)
def test_only_stops_shorten_the_lengths_that_are_expected(events):
    device = make_device(60, eos=(EOS,))
    scheduler = device.scheduler
    for i in range(40):
        limits = {"max_tokens": 80, "ignore_eos": i % 5 == 0, "min_tokens": i % 3}
        add(device, str(i), 10 + i % 3, **limits)
    groups = list(scheduler.roster.groups)
    for event in events:
        stops, expected = num_stopped(groups), scheduler.growth.tokens_left
        queue = scheduler.line.running if event == "abort running" else scheduler.line.waiting
        if event == "step":
            run(device, 3)
        elif queue:
            reason = FinishReason.ERROR if event == "fail waiting" else FinishReason.ABORT
            scheduler.abort(queue[-1].request.request_id, reason)
            assert scheduler.growth.tokens_left == expected
        assert scheduler.growth.num_drawn == sum(
            seq.num_outputs for group in groups for seq in group.sequences if not group.ends_at_limit
        )
        assert num_stopped(groups) > stops or scheduler.growth.tokens_left >= expected


def num_stopped(groups: list[SequenceGroup]) -> int:
    return sum(seq.finish_reason is FinishReason.STOP for group in groups for seq in group.sequences)


# Priorities and pins --------------------------------------------------------------------------------------------------

REQUESTS = st.lists(
    st.tuples(st.integers(0, 2), st.integers(4, 150), st.integers(1, 200), st.booleans(), st.integers(1, 3)),
    min_size=3,
    max_size=8,
)
"""Priority, tokens of the prompt, most tokens drawn, whether the prompt begins as others do, samples."""


@given(REQUESTS, st.integers(60, 100))
@settings(max_examples=15)
def test_a_group_preempts_others_only_if_it_can_start_then(requests, num_blocks):
    device = make_device(num_blocks, eos=(EOS,))
    scheduler, preemption = device.scheduler, device.scheduler._preemption
    yield_to_first = preemption.yield_to_first

    def checked(profile) -> None:
        num_preemptions = preemption.num_preemptions
        yield_to_first(profile)
        assert preemption.num_preemptions == num_preemptions or scheduler._admission.can_admit_first()

    preemption.yield_to_first = checked
    for i, (priority, prompt_len, max_tokens, is_shared, n) in enumerate(requests):
        max_tokens = min(max_tokens, (num_blocks * 4 - prompt_len) // n - 8)
        if max_tokens > 0:
            sampling = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=i % 2 == 0, n=n)
            prompt = [3 + (7 if is_shared else 31 + i) * j % 90 for j in range(prompt_len)]
            scheduler.add(Request(str(i), None, prompt, sampling, 0, priority=priority))
        run(device, 4)
    run(device, 150)


@pytest.mark.parametrize("high_prompt", [150, 170, 190])
def test_a_group_that_would_outgrow_the_pool_with_its_prompt_preempts_nothing(high_prompt):
    device = make_device(100)
    add(device, "low", 90, max_tokens=200, ignore_eos=True, priority=1)
    run(device, 9)
    add(device, "first", 160, max_tokens=190, ignore_eos=True)
    run(device, 9)
    add(device, "high", high_prompt, max_tokens=80, ignore_eos=True)
    num_running = run(device, 60)
    assert num_running == [2] * 60
    assert device.scheduler.stats().num_preemptions == 0


@pytest.mark.parametrize("has_low", [False, True])
def test_pins_count_beside_groups_of_lower_priority_too(has_low):
    """Of 100 blocks, 50 are pinned: "first" grows to 25, and "high" to 30."""
    device = make_device(100)
    scheduler = device.scheduler
    scheduler.pin(Request("pin", None, [5] * 200, SamplingParams(max_tokens=1), 0))
    run(device)
    add(device, "first", 40, max_tokens=60, ignore_eos=True)
    run(device, 2)
    if has_low:
        add(device, "low", 4, max_tokens=30, ignore_eos=True, priority=1)
        run(device, 2)
    add(device, "high", 60, max_tokens=60, ignore_eos=True)
    assert run(device, 4)[-1] == 1 + has_low
    assert scheduler.stats().num_preemptions == 0
