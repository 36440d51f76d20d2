"""Sequences whose full blocks stay on the host while they run, each feature as one story."""

import numpy as np
import pytest

from jpaged.contract.profile import Link, MachineProfile
from jpaged.contract.rows import host_cell
from jpaged.host.blocks.manager import BlockManager
from jpaged.host.offload.placement import Placement, blocks_moved_together, end_of_chunk, has_room
from jpaged.host.sequence import SequenceGroup, SequenceState
from jpaged.request import Request, SamplingParams
from tests.support.fake_device import FakeDevice
from tests.support.plans import SpelledPlan
from tests.support.stories import add, finish_all, make_device, step, step_until

WINDOW = 2


def make(
    num_blocks: int = 6,
    *,
    num_host_blocks: int = 64,
    kind: str = "host",
    most: int = 64,
    budget: int = 16,
    num_together: int = 1,
    keeps_activations: bool = False,
    **settings,
) -> FakeDevice:
    """A device with so many blocks of 4 tokens beside the window."""
    placement = Placement(kind, WINDOW, most, num_together, keeps_activations)
    return make_device(
        1 + WINDOW + num_blocks, num_host_blocks=num_host_blocks, budget=budget, placement=placement, **settings
    )


def num_on_host(device: FakeDevice, group: SequenceGroup) -> int:
    return len(device.scheduler.blocks.holdings.held_by(group.sequences[0].seq_id).host_blocks)


def streamed(plan: SpelledPlan) -> list[int]:
    return [] if plan.plan.streamed is None else plan.plan.streamed.blocks.tolist()


def test_a_prompt_longer_than_the_device_is_computed_in_chunks_and_decoded():
    device = make(num_blocks=6)
    group = add(device, "long", 100, max_tokens=20, ignore_eos=True)
    plans = []
    while group.sequences[0].num_outputs == 0:
        plans.append(step(device))
    assert [chunk.stop - chunk.start for plan in plans for chunk in plan.chunks] == [16] * 6 + [4]
    assert [len(streamed(plan)) for plan in plans] == [0, 4, 8, 12, 16, 20, 24], "all that came before"
    plans += finish_all(device, group)
    assert max(len(streamed(plan)) for plan in plans) == (100 + 19) // 4
    assert len([move for plan in plans for move in plan.to_host]) == (100 + 18) // 4, "each block moves once"
    assert not any(plan.from_host for plan in plans)
    assert device.scheduler.stats().num_preemptions == 0


def test_a_block_moves_in_the_plan_after_the_one_that_fills_it():
    device = make()
    group = add(device, "a", 4, max_tokens=9, ignore_eos=True)
    plans = finish_all(device, group)
    assert [len(plan.to_host) for plan in plans] == [0, 1, 0, 0, 0, 1, 0, 0, 0]
    assert [len(streamed(plan)) for plan in plans] == [0, 1, 1, 1, 1, 2, 2, 2, 2]
    changes = [plan.plan.changes.blocks.tolist() for plan in plans]
    assert changes[1][0] == host_cell(0), "the cell names the first streamed block of the row"
    assert changes[5][0] == host_cell(1)
    assert all(block > WINDOW for cells in changes for block in cells if block >= 0), "the window is no sequence's"


@pytest.mark.parametrize(("num_blocks", "moved"), [(8, [0] * 8 + [2] + [0] * 7 + [2] + [0]), (1, [0, 0, 0, 0, 1])])
def test_blocks_move_in_pairs_unless_the_device_lacks_blocks(num_blocks, moved):
    device = make(num_blocks, num_together=2)
    group = add(device, "a", 1, max_tokens=len(moved), ignore_eos=True)
    assert [len(plan.to_host) for plan in finish_all(device, group)] == moved


@pytest.mark.parametrize("is_cached", [True, False])
def test_blocks_that_move_together_are_in_order_on_the_host(is_cached):
    """A device copies neighbours at once. Cached blocks return to the queue with the tail first."""
    device = make(num_host_blocks=16, caching=is_cached)
    for name in ("first", "second", "third"):
        group = add(device, name, 65, max_tokens=3, ignore_eos=True)
        step_until(device, lambda group=group: group.sequences[0].num_outputs == 1)
        step(device)
        blocks = device.scheduler.blocks.holdings.held_by(group.sequences[0].seq_id).host_blocks
        assert len(blocks) == 16
        assert all(np.diff(blocks[first : first + 4]).min() > 0 for first in range(0, 16, 4))
        finish_all(device, group)


def test_sequences_on_the_host_and_on_the_device_share_steps():
    device = make(num_blocks=24)
    long = [add(device, name, 30, max_tokens=12, ignore_eos=True) for name in ("first", "second")]
    pair = add(device, "pair", 5, n=2, max_tokens=12, ignore_eos=True)
    scored = add(device, "scored", 5, prompt_logprobs=0, max_tokens=12, ignore_eos=True)
    assert [group.is_streamed for group in (*long, pair, scored)] == [True, True, False, False]
    plans = finish_all(device, *long, pair, scored)
    assert any(len(plan.chunks) == 5 and len(streamed(plan)) == 15 for plan in plans)
    assert device.scheduler.stats().num_preemptions == 0


def test_auto_streams_only_what_does_not_fit_the_device():
    device = make(num_blocks=6, kind="auto")
    fits = add(device, "fits", 12, max_tokens=13, ignore_eos=True)
    long = add(device, "long", 12, max_tokens=14, ignore_eos=True)
    open_ended = add(device, "open-ended", 12, max_tokens=None)
    assert [group.is_streamed for group in (fits, long, open_ended)] == [False, True, True]
    assert open_ended.max_tokens == device.scheduler.max_model_len - 12
    device.scheduler.abort("open-ended")
    finish_all(device, fits, long)


def test_auto_keeps_on_the_device_what_fits_while_no_group_waits():
    device = make(num_blocks=12, kind="auto")
    group = add(device, "long", 40, max_tokens=41, ignore_eos=True)
    plans = finish_all(device, group)
    assert max(len(streamed(plan)) for plan in plans) <= 20 - 12 + 2, "of 20 blocks"
    again = add(device, "again", 40, max_tokens=41, ignore_eos=True)
    step_until(device, lambda: again.sequences[0].num_outputs == 3)
    assert num_on_host(device, again) == 0
    pair = add(device, "pair", 13, n=2, max_tokens=2)
    step_until(device, lambda: pair.is_finished)
    assert 8 <= num_on_host(device, again) <= 10, "they make room for the group"
    finish_all(device, again)


def test_a_higher_priority_preempts_no_sequence_whose_blocks_can_move():
    device = make(num_blocks=12, kind="auto")
    low = add(device, "low", 40, max_tokens=41, ignore_eos=True, priority=1)
    step_until(device, lambda: low.sequences[0].num_outputs == 3)
    high = add(device, "high", 13, n=2, max_tokens=5, ignore_eos=True)
    plan = step(device)
    assert {chunk.seq_id for chunk in plan.chunks} == {low.sequences[0].seq_id, high.sequences[0].seq_id}
    finish_all(device, low, high)
    assert device.scheduler.stats().num_preemptions == 0


def test_a_request_ends_where_host_and_device_end():
    device = make(num_blocks=3, num_host_blocks=5)
    group = add(device, "all", 6, max_tokens=None)
    assert group.max_tokens == (5 + 3) * 4 - 6 + 1
    finish_all(device, group)
    assert add(make(num_blocks=3, most=2), "by the window", 6, max_tokens=None).max_tokens == (2 + 3) * 4 - 6 + 1


@pytest.mark.parametrize("kind", ["host", "auto"])
def test_a_request_that_host_and_device_together_cannot_hold_is_refused_with_the_arithmetic(kind):
    device = make(num_blocks=3, num_host_blocks=5, kind=kind)
    before = device.scheduler.stats(), device.scheduler.blocks.stats()
    with pytest.raises(ValueError, match=r"= 9 blocks, and the pool has 8, 5 of them on the host.*num_host_blocks"):
        add(device, "too long", 28, max_tokens=6)
    with pytest.raises(ValueError, match=r"n=2 x .* the pool has 3\. Lower max_tokens or n"):
        add(device, "not streamed", 9, n=2, max_tokens=8)
    assert (device.scheduler.stats(), device.scheduler.blocks.stats()) == before
    with pytest.raises(ValueError, match="kv_placement='auto'"):
        add(make(num_blocks=3, kind="device"), "on the device", 28, max_tokens=6)


def test_pins_leave_a_block_to_streamed_requests_which_count_only_the_blocks_left():
    device = make(num_blocks=4, num_host_blocks=8)
    scheduler = device.scheduler
    group = add(device, "long", 34, max_tokens=4, ignore_eos=True)  # 10 blocks, 2 of them on the device
    with pytest.raises(ValueError, match="it takes 3 blocks of 4, requests under way may need 2, and 4 are not pinned"):
        scheduler.pin(Request("large", None, list(range(9)), SamplingParams(max_tokens=1), 0))
    scheduler.pin(Request("small", None, list(range(5)), SamplingParams(max_tokens=1), 0))
    finish_all(device, group)
    assert scheduler.is_pinned("small")
    with pytest.raises(ValueError, match=r"= 11 blocks, and the pool has 10 \(2 more are pinned\), 8 of them"):
        add(device, "longer", 38, max_tokens=4)
    scheduler.unpin("small")


def test_a_preempted_sequence_keeps_its_host_blocks_and_computes_the_rest_again():
    device = make(num_blocks=4)
    low = add(device, "low", 21, max_tokens=12, ignore_eos=True, priority=1)
    step_until(device, lambda: low.sequences[0].num_outputs == 2)
    high = add(device, "high", 5, n=2, max_tokens=4, ignore_eos=True)
    plan = step(device)
    assert [chunk.seq_id for chunk in plan.chunks] == [high.sequences[0].seq_id]
    [seq] = low.sequences
    assert seq.state is SequenceState.SWAPPED
    assert seq.num_computed == 20
    back = step_until(device, lambda: seq.state is SequenceState.RUNNING)
    assert [(chunk.start, chunk.stop) for chunk in back.chunks if chunk.seq_id == seq.seq_id] == [(20, 23)]
    assert not back.from_host
    assert len(streamed(back)) == 5
    finish_all(device, low, high)
    assert device.scheduler.stats().num_swaps_in == 1


def test_when_the_host_is_full_the_sequence_served_last_gives_its_blocks():
    device = make(num_blocks=4, num_host_blocks=8)
    first, second = (add(device, name, 13, max_tokens=20, ignore_eos=True) for name in ("first", "second"))
    plans = finish_all(device, first, second)
    assert device.scheduler.stats().num_preemptions > 0
    assert max(len(streamed(plan)) for plan in plans) <= 8
    starts = [chunk.start for plan in plans for chunk in plan.chunks if chunk.seq_id == first.sequences[0].seq_id]
    assert starts == sorted(starts), "the first one never waits"


def test_the_window_bounds_what_a_step_streams():
    device = make(num_blocks=4, most=7)
    groups = [add(device, name, 13, max_tokens=8, ignore_eos=True) for name in "abc"]
    plans = finish_all(device, *groups)
    assert max(len(streamed(plan)) for plan in plans) <= 7


def test_a_higher_priority_gets_the_window():
    device = make(num_blocks=24, most=8)
    low = add(device, "low", 24, max_tokens=9, ignore_eos=True, priority=1)
    step_until(device, lambda: low.sequences[0].num_outputs == 1)
    high = add(device, "high", 24, max_tokens=3, ignore_eos=True)
    step_until(device, lambda: high.is_finished)
    assert not low.is_finished
    finish_all(device, low, high)


def test_an_aborted_sequence_leaves_nothing_on_either_side():
    device = make(num_blocks=4)
    group = add(device, "a", 40, max_tokens=9)
    step_until(device, lambda: num_on_host(device, group) == 8)
    assert device.scheduler.blocks.stats().num_streamed == 8
    device.scheduler.abort("a")
    stats = device.scheduler.blocks.stats()
    assert stats.num_used == stats.num_host_used == 0
    swapped = add(device, "b", 40, max_tokens=9, priority=1)
    step_until(device, lambda: swapped.sequences[0].num_outputs == 1)
    add(device, "c", 5, n=2, max_tokens=2)
    step_until(device, lambda: swapped.is_swapped)
    device.scheduler.abort("b")
    finish_all(device)
    assert device.scheduler.blocks.stats().num_host_used == 0


def test_a_failed_step_costs_a_recomputation():
    device = make(num_blocks=4)
    group = add(device, "a", 40, max_tokens=9, ignore_eos=True)
    step_until(device, lambda: group.sequences[0].num_outputs == 3)
    device.scheduler.schedule()
    device.lose()
    device.scheduler.forget_pool()
    assert device.scheduler.blocks.stats().num_host_used == 0
    plans = finish_all(device, group)
    assert plans[0].chunks[0].start == 0


def test_a_second_request_shares_the_host_blocks_of_an_equal_prompt():
    device = make(num_blocks=6)
    prompt = [7 * i % 16 for i in range(50)]
    first = add(device, "first", prompt, max_tokens=12, ignore_eos=True)
    step_until(device, lambda: first.sequences[0].num_outputs == 2)
    second = add(device, "second", prompt, max_tokens=3, ignore_eos=True)
    plan = step(device)
    assert second.num_cached_tokens == 48
    assert not plan.from_host
    blocks = streamed(plan)
    assert len(blocks) == 24
    assert set(blocks[:12]) == set(blocks[12:]), "by reference"
    finish_all(device, first, second)
    third = add(device, "third", prompt, max_tokens=3, ignore_eos=True)
    assert finish_all(device, third)[0].chunks[0].start == 48
    assert device.scheduler.blocks.stats().host_hit_tokens > 0


@pytest.mark.parametrize(("kind", "num_blocks", "num_moved"), [("host", 30, 22), ("auto", 30, 0), ("auto", 25, 2)])
def test_blocks_that_the_device_caches_stay_there_or_move_to_the_host_first(kind, num_blocks, num_moved):
    device = make(num_blocks=num_blocks, kind=kind)
    prompt = [5 * i % 16 for i in range(90)]
    finish_all(device, add(device, "resident", prompt, max_tokens=2, prompt_logprobs=0))
    group = add(device, "streamed", prompt, max_tokens=60, ignore_eos=True)
    assert group.is_streamed
    plan = step(device)
    assert len(plan.to_host) == len(streamed(plan)) == num_moved
    assert plan.chunks[0].start == 88
    finish_all(device, group)


@pytest.mark.parametrize(
    ("bytes_per_s", "keeps_activations", "chunk"), [(1e3, False, 15), (1e9, False, 4), (1e3, True, 4)]
)
def test_a_prompt_gets_the_time_in_which_the_link_brings_the_blocks_of_others(bytes_per_s, keeps_activations, chunk):
    """2 ms a token of 10 allowed; 2 blocks of 1,000 bytes take 2 s of a slow link, in which the device has time."""
    device = make(num_blocks=24, keeps_activations=keeps_activations)
    scheduler = device.scheduler
    link = Link(0.0, bytes_per_s, bytes_per_s)
    scheduler.profile = MachineProfile(1000, link, link, (), 0.002, 0.002, 0.0, 0.0, 0.0)
    first = add(device, "first", 9, max_tokens=20, ignore_eos=True)
    step_until(device, lambda: num_on_host(device, first) == 2)
    scheduler.max_step_s = 0.01
    add(device, "second", 30, max_tokens=5, ignore_eos=True)
    assert [each.stop - each.start for each in step(device).chunks] == [1, chunk]


def test_no_sequence_bursts_beside_a_streamed_one():
    device = make(num_blocks=12, max_burst=4)
    groups = [add(device, "streamed", 9, max_tokens=9), add(device, "pair", 3, n=2, max_tokens=9)]
    scheduler, in_flight = device.scheduler, []
    while scheduler.has_unfinished:
        for schedule in (scheduler.schedule_ahead,) if in_flight else (scheduler.schedule, scheduler.schedule_ahead):
            if (plan := schedule()) is not None:
                in_flight.append((plan, device.execute(plan)))
                assert plan.num_steps == 1 or not groups[0].running
        scheduler.update(*in_flight.pop(0))
        device.audit()


def test_the_pool_must_be_larger_than_its_window():
    with pytest.raises(ValueError, match=r"num_blocks=4: give 5 or more \(block 0 is kept for padding and 3 for"):
        BlockManager(4, 4, placement=Placement("host", 3, 8))


def test_a_sequence_starts_alone_or_where_others_leave_room():
    assert has_room(9, [], 8)
    assert has_room(3, [2, 3], 8)
    assert not has_room(4, [2, 3], 8)


@pytest.mark.parametrize(("start", "budget", "stop"), [(0, 10, 8), (8, 8, 16), (8, 3, 11), (0, 4, 4)])
def test_a_chunk_ends_with_a_block_if_it_reaches_one(start, budget, stop):
    assert end_of_chunk(start, budget, 4) == stop


def test_as_many_blocks_move_together_as_one_copy_should_span_within_a_share_of_a_context():
    assert blocks_moved_together(1 << 16, 1000) == 8
    assert blocks_moved_together(1 << 15, 1000) == 16
    assert blocks_moved_together(1 << 10, 160) == 20, "an eighth of the context"
    assert blocks_moved_together(1 << 10, 10) == 8
