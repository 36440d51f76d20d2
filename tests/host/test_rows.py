"""The table of running sequences: what the device is told of it, and that sequences find in it what they are asked."""

import numpy as np
import pytest

from jpaged.contract.result import BeamCandidates, StepResult, TokenScores
from jpaged.host.blocks.manager import BlockManager
from jpaged.host.scheduler import Scheduler
from jpaged.request import Request, SamplingParams
from tests.support.plans import Rows

BLOCK_SIZE = 4


def make_scheduler(num_blocks=65, rows=2, **settings) -> Scheduler:
    blocks = BlockManager(num_blocks, BLOCK_SIZE, enable_prefix_caching=True)
    return Scheduler(blocks, max_num_seqs=rows, max_num_batched_tokens=64, max_model_len=600, **settings)


def request(name: str, prompt: list[int], **params) -> Request:
    return Request(name, None, prompt, SamplingParams(ignore_eos=True, **params), seed=7)


def results_of(plan, first: int) -> StepResult:
    """Tokens first, first + 1, ... in the steps of a plan, the same for all rows."""

    def step(number: int) -> tuple[np.ndarray, TokenScores]:
        num_draws = len(plan.draws)
        return np.full(num_draws, first + number, np.int32), TokenScores.plain(np.full(num_draws, -number, np.float32))

    return StepResult(*step(0), later=tuple(step(number) for number in range(1, plan.num_steps)))


def test_a_row_is_entered_once_and_then_told_of_new_blocks_alone():
    scheduler = make_scheduler()
    scheduler.add(request("a", [1, 2, 3], max_tokens=12))
    changes = []
    while scheduler.has_unfinished:
        plan = scheduler.schedule()
        changes.append((plan.changes.rows.tolist(), plan.changes.block_indices.tolist()))
        scheduler.update(plan, results_of(plan, 5))
    news = [(rows, indices) for rows, indices in changes if rows or indices]
    assert news == [([0], [0]), ([], [1]), ([], [2]), ([], [3])], "a block every four tokens"


def test_beams_go_on_in_the_rows_of_others_and_a_row_is_told_of_the_blocks_that_differ_alone():
    scheduler, device, parents = make_scheduler(rows=2), Rows(), [(0, 0), (0, 1), (0, 1), (0, 1), (1, 1), (1, 0)]
    group = scheduler.add(request("a", list(range(10)), use_beam_search=True, n=2, temperature=0, max_tokens=12))
    changes = []
    for chosen in parents:
        plan = scheduler.schedule()
        device.enter(plan)
        changes.append((plan.changes.rows.tolist(), sorted(plan.changes.block_indices.tolist()), len(plan.copies)))
        for chunk in device.chunks(plan, BLOCK_SIZE):
            held = scheduler.blocks.block_table(chunk.seq_id)
            assert list(chunk.block_table) == held[: len(chunk.block_table)]
        scheduler.update(plan, StepResult(*NO_DRAWS, beams=(candidates_of(chosen),)))
    assert changes[:2] == [([0], [0, 1, 2], 0), ([1], [0, 1, 2, 2], 1)], "one of two copies the block that both write"
    assert changes[2:4] == [([], [], 0), ([], [3, 3], 0)], "each has its own block, and fills it"
    assert changes[4:] == [([], [], 0), ([], [2, 3, 3], 1)], "the second goes on in the row of the first, which ended"
    assert [seq.row for seq in group.sequences] == [0, 1]


NO_DRAWS = np.zeros(0, np.int32), TokenScores.plain(np.zeros(0, np.float32))


def candidates_of(parents: tuple[int, ...]) -> BeamCandidates:
    """Candidates that let a beam go on for each of these beams, and as many that are not chosen."""
    both = np.array([*parents, *parents], np.int32)
    return BeamCandidates(both, np.arange(len(both), dtype=np.int32), -np.arange(len(both), dtype=np.float32))


def test_a_row_that_changes_hands_within_a_plan_has_the_blocks_of_the_new_owner():
    """The device is told nothing of the sequence that was preempted."""
    scheduler = make_scheduler(num_blocks=7, rows=1, preemption="recompute")
    scheduler.add(request("low", [1] * 12, max_tokens=8))
    device = Rows()
    plan = scheduler.schedule()
    device.enter(plan)
    scheduler.update(plan, results_of(plan, 5))
    high = scheduler.add(Request("high", None, [2] * 9, SamplingParams(max_tokens=2), 3, priority=-1))
    plan = scheduler.schedule()
    device.enter(plan)
    [chunk] = device.chunks(plan, BLOCK_SIZE)
    assert (chunk.row, chunk.seq_id, chunk.start) == (0, high.sequences[0].seq_id, 0)
    assert list(chunk.block_table) == scheduler.blocks.block_table(chunk.seq_id)
    assert device.prompt_len(0) == 9


@pytest.mark.parametrize("max_burst", [1, 3, 300])
def test_tokens_and_scores_are_those_drawn_however_seldom_they_are_read(max_burst):
    scheduler = make_scheduler(num_blocks=200, max_burst=max_burst)
    group = scheduler.add(request("a", [1, 2, 3], max_tokens=500))
    [seq] = group.sequences
    in_flight, expected, logprobs = [scheduler.schedule()], [], []
    for i in range(40):
        if (ahead := scheduler.schedule_ahead()) is not None:
            in_flight.append(ahead)
        plan = in_flight.pop(0)
        result = results_of(plan, 10 * i)
        scheduler.update(plan, result)
        steps = [(result.token_ids, result.scores), *result.later]
        expected += [int(tokens[0]) for tokens, _ in steps]
        logprobs += [float(scores.logprobs[0]) for _, scores in steps]
        if not in_flight:
            break
    assert seq.output_token_ids == expected[:500]
    assert [float(scores.logprobs[row]) for scores, row in seq.output_scores] == logprobs[:500]
    assert seq.num_computed + 1 == seq.num_tokens or seq.is_finished


@pytest.mark.parametrize("max_burst", [1, 3])
def test_new_tokens_are_read_while_they_stay_with_the_row(max_burst):
    scheduler = make_scheduler(num_blocks=200, max_burst=max_burst)
    group = scheduler.add(request("a", [1, 2, 3], max_tokens=60))
    [seq] = group.sequences
    in_flight, expected, read = [scheduler.schedule()], [], []
    for i in range(70):
        if (ahead := scheduler.schedule_ahead()) is not None:
            in_flight.append(ahead)
        plan = in_flight.pop(0)
        result = results_of(plan, 10 * i)
        scheduler.update(plan, result)
        expected += [int(tokens[0]) for tokens, _ in [(result.token_ids, result.scores), *result.later]]
        if i % 5 != 3:
            read += seq.token_ids_from(3 + len(read))
            assert read == expected[:60]
        if i % 7 == 6:
            assert seq.output_token_ids == expected[:60]
        assert seq.token_ids_from(1)[2:] == expected[:60]
        if not in_flight:
            break
    assert seq.is_finished
    assert seq.token_ids_from(3 + len(read)) == expected[len(read) : 60]


@pytest.mark.parametrize("params", [{"logprobs": 1}, {"stop_token_ids": [100, 101, 102, 103, 104]}])
def test_rows_that_the_sequence_must_see_go_on_decoding(params):
    scheduler = make_scheduler(max_burst=2)
    group = scheduler.add(request("a", [1, 2, 3], max_tokens=20, **params))
    in_flight = [scheduler.schedule()]
    for i in range(6):
        in_flight.append(scheduler.schedule_ahead())
        plan = in_flight.pop(0)
        scheduler.update(plan, results_of(plan, 10 * i))
    assert group.sequences[0].output_token_ids == [0, 10, 11, 20, 21, 30, 31, 40, 41, 50, 51]
    plan = in_flight.pop(0)
    scheduler.update(plan, results_of(plan, 103))
    assert group.is_finished == ("stop_token_ids" in params)


def test_stats_count_the_tokens_in_the_pool_and_not_the_slots_that_rows_have_still_to_fill():
    scheduler = make_scheduler()
    scheduler.add(request("a", [1, 2, 3], max_tokens=12))
    for num_held in range(3, 10):
        plan = scheduler.schedule()
        scheduler.update(plan, results_of(plan, 5))
        assert scheduler.block_stats().tokens_held == num_held
        num_slots = -(-num_held // BLOCK_SIZE) * BLOCK_SIZE
        assert scheduler.block_stats().waste == pytest.approx(1 - num_held / num_slots)


def test_every_step_of_a_burst_counts_the_blocks_that_it_reads():
    scheduler = make_scheduler(max_burst=4)
    scheduler.add(request("a", [1, 2, 3], max_tokens=200))
    in_flight = [scheduler.schedule()]
    while scheduler.rows.num_restless:
        in_flight.append(scheduler.schedule_ahead())
        plan = in_flight.pop(0)
        scheduler.update(plan, results_of(plan, 5))
    before, burst = scheduler.stats(), scheduler.schedule_ahead()
    after, num_held = scheduler.stats(), scheduler.blocks.num_used_blocks
    assert burst.num_steps == after.num_steps - before.num_steps == 4
    assert after.num_physical_blocks - before.num_physical_blocks == 4 * num_held
    assert after.num_logical_blocks - before.num_logical_blocks == 4 * num_held
