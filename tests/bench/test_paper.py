"""The paper's experiments: the baselines' accounting, the modelled machine, and a tiny run of each experiment."""

import json
import math
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.paper.baselines import FasterTransformer, Orca, Reservation
from bench.paper.beams import CandidateModel, CandidateSource
from bench.paper.buddy import BuddyAllocator
from bench.paper.command import EXPERIMENTS
from bench.paper.experiment import Row, render, save_plots, to_json
from bench.paper.memory import SYSTEMS
from bench.paper.paged import Paged
from bench.paper.step_time import A100, NUM_SLOTS
from bench.paper.sustained import LATENCY_BOUND_S, sweep_rates
from bench.paper.traces import Decoding, Tally, Trace, TraceMaker
from bench.workloads import Workload, alpaca, chat, poisson_arrivals, sharegpt, translation
from jpaged.contract.plan import BeamSelect


def trace_of(*requests: tuple[float, int, int], decoding: Decoding = Decoding()) -> Trace:  # noqa: B008
    """Requests given as (arrival, prompt length, output length)."""
    arrivals, prompt_lens, output_lens = zip(*requests, strict=True)
    return Trace(Workload([[7] * n for n in prompt_lens], list(output_lens)), list(arrivals), decoding)


def serve(system, trace: Trace, **options) -> Tally:
    tally = Tally(trace, **options)
    system.serve(trace, tally)
    return tally


# The buddy allocator --------------------------------------------------------------------------------------------------


def free_aligned_run_exists(used: np.ndarray, length: int) -> bool:
    """Oracle: whether the powers of two that the pool is cut into hold an aligned free run of ``length``."""
    start, left = 0, len(used)
    while left:
        cut = 1 << (left.bit_length() - 1)
        for run in range(start, start + cut - length + 1, length):
            if not used[run : run + length].any():
                return True
        start, left = start + cut, left - cut
    return False


@given(st.integers(1, 200), st.lists(st.tuples(st.booleans(), st.integers(1, 64)), max_size=60))
def test_buddy_runs_are_aligned_disjoint_and_found_whenever_one_is_free(num_slots, calls):
    allocator = BuddyAllocator(num_slots)
    used, runs = np.zeros(num_slots, bool), []
    for is_free, number in calls:
        if is_free and runs:
            start, length = runs.pop(number % len(runs))
            allocator.free(start)
            used[start : start + length] = False
            continue
        length = 1 << (number - 1).bit_length()
        start = allocator.allocate(number)
        assert (start is not None) == free_aligned_run_exists(used, length)
        if start is not None:
            assert start % length == 0
            assert start + length <= num_slots
            assert not used[start : start + length].any()
            used[start : start + length] = True
            runs.append((start, length))
        assert allocator.num_free == num_slots - used.sum()


def test_buddy_refuses_what_it_did_not_hand_out_and_changes_nothing():
    allocator = BuddyAllocator(24)
    start = allocator.allocate(5)
    assert start is not None
    with pytest.raises(ValueError, match="no run handed out starts there"):
        allocator.free(start + 1)
    with pytest.raises(ValueError, match="num_slots=0"):
        allocator.allocate(0)
    assert allocator.num_free == 16


def test_the_pool_holds_seven_of_the_longest_reservations_as_in_the_paper():
    allocator = BuddyAllocator(NUM_SLOTS)
    taken = [allocator.allocate(2048) for _ in range(8)]
    assert taken.count(None) == 1


# The systems ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("reservation", "expected"), [("MAX", 2048), ("POW2", 20 + 32), ("ORACLE", 20 + 25)])
def test_reservations_are_the_papers(reservation, expected):
    assert Reservation[reservation].num_slots(20, 25) == expected


def test_a_power_of_two_is_reserved_as_it_is_and_never_more_than_the_model_allows():
    assert Reservation.POW2.num_slots(20, 32) == 52
    assert Reservation.POW2.num_slots(1024, 1023) == 2048
    assert Reservation.POW2.num_slots(1500, 548) == 2048


@pytest.mark.parametrize("system", [FasterTransformer(), *SYSTEMS], ids=lambda system: system.name)
def test_a_lone_request_takes_the_sum_of_its_steps(system):
    num_blocks = {9: 1, 10: 1, 11: 1, 12: 1} if system.name == "jpaged" else {}
    steps = [(9, 9), (1, 10), (1, 11), (1, 12)]  # tokens fed, context read
    total_s = sum(A100.compute_s(fed, context, num_blocks.get(context, 0)) for fed, context in steps)
    tally = serve(system, trace_of((3.0, 9, 4)))
    assert tally.latency_s == pytest.approx(total_s / 4)


def test_request_level_batching_answers_all_when_the_longest_is_done_and_then_starts_the_next():
    trace = trace_of((0.0, 8, 2), (0.0, 8, 50), (0.001, 8, 2))
    alone_s = serve(FasterTransformer(), trace_of((0.0, 8, 2))).latency_s * 2
    first_s = A100.compute_s(16, 16) + A100.compute_s(2, 18) + sum(A100.compute_s(1, 8 + k) for k in range(2, 50))
    expected = np.mean([first_s / 2, first_s / 50, (first_s - 0.001 + alone_s) / 2])
    assert serve(FasterTransformer(), trace).latency_s == pytest.approx(expected)


def test_iteration_level_batching_answers_each_when_it_is_done():
    tally = serve(Orca(Reservation.ORACLE), trace_of((0.0, 8, 2), (0.0, 8, 50)))
    short_s = A100.compute_s(16, 16) + A100.compute_s(2, 18)
    long_s = short_s + sum(A100.compute_s(1, 8 + k) for k in range(2, 50))
    assert tally.latency_s == pytest.approx(np.mean([short_s / 2, long_s / 50]))


@pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: system.name)
@pytest.mark.parametrize("decoding", [Decoding(), Decoding(3)], ids=str)
def test_every_slot_of_the_pool_is_accounted_for(system, decoding):
    trace = TraceMaker(sharegpt, 20, 3, decoding).at(3)
    tally = serve(system, trace, is_drained=False)
    assert tally.usages
    for usage in tally.usages:
        assert usage.num_slots == NUM_SLOTS
        assert min(usage.tokens, usage.reserved, usage.internal, usage.external) >= 0
    assert sum(tally.mean_usage().values()) == pytest.approx(100)


def test_a_reservation_of_the_longest_sequence_admits_seven():
    tally = serve(Orca(Reservation.MAX), TraceMaker(sharegpt, 30, 5).at(5), is_drained=False)
    assert max(tally.batches) == 7


def test_baselines_reserve_for_every_sequence_of_a_request():
    one, three = (
        serve(Orca(Reservation.MAX), trace_of(*[(i / 10, 9, 200) for i in range(20)], decoding=d), is_drained=False)
        for d in (Decoding(), Decoding(3, True))
    )
    assert (max(one.batches), max(three.batches)) == (7, 2)


def test_sharing_saves_all_but_one_of_the_full_prompt_blocks():
    width, prompt_len, output_len = 4, 64, 17  # 4 full blocks of prompt, then 1 block of each sequence's own
    tally = serve(Paged(), trace_of((0.0, prompt_len, output_len), decoding=Decoding(width)))
    prompt_step, first_own, rest = (4, 4), (4 * 5, 4 + 4), output_len - 1
    logical = prompt_step[0] + rest * first_own[0]
    physical = prompt_step[1] + rest * first_own[1]
    assert tally.saved == pytest.approx(1 - physical / logical)


def test_beams_save_more_than_samples_and_less_than_one_sequence_would():
    trace = TraceMaker(alpaca, 10, 2)
    saved = [
        serve(Paged(), TraceMaker(trace.workload, trace.seconds, 2, Decoding(4, is_beam)).at(2)).saved
        for is_beam in (False, True)
    ]
    assert saved[0] < saved[1] < 3 / 4


def test_a_full_pool_swaps_and_ends_sooner_than_by_recomputing():
    maker = TraceMaker(sharegpt, 20, 6)
    recompute = serve(Paged(horizon=0), maker.at(6))
    swap = serve(Paged(horizon=0, preemption="swap", num_host_slots=NUM_SLOTS), maker.at(6))
    assert recompute.num_preemptions > 0 == recompute.num_swaps
    assert swap.num_swaps > 0
    assert swap.latency_s < recompute.latency_s < math.inf


# The made-up beams ----------------------------------------------------------------------------------------------------


def test_candidates_are_the_best_distinct_continuations_and_come_from_the_seed():
    selects = [BeamSelect((0, 1, 2), (-1.0, -1.5, -9.0), 6), BeamSelect((3,), (0.0,), 8)]
    first, again = (CandidateSource(CandidateModel(seed=5)).choose(selects) for _ in range(2))
    for select, found, same in zip(selects, first, again, strict=True):
        assert len(found.scores) == select.num_candidates
        assert (np.diff(found.scores) <= 0).all()
        assert (found.scores < np.asarray(select.scores)[found.beams]).all()
        assert len(set(zip(found.beams, found.token_ids, strict=True))) == select.num_candidates
        np.testing.assert_array_equal(found.scores, same.scores)
        np.testing.assert_array_equal(found.beams, same.beams)


def test_tabled_distributions_have_the_stated_entropy():
    source = CandidateSource(CandidateModel(concentration=1.5))
    found = source.choose([BeamSelect((0,), (0.0,), 16)] * 3000)
    logprobs = np.array([candidates.scores for candidates in found], float)
    assert (np.exp(logprobs).sum(axis=1) < 1 + 1e-6).all()
    entropy = -(np.exp(logprobs) * logprobs).sum(axis=1).mean()
    assert entropy == pytest.approx(1.2804, abs=0.05)  # digamma(2.5) + Euler's constant


# Traces and rates -----------------------------------------------------------------------------------------------------


def test_a_higher_rate_brings_the_same_requests_closer_together():
    maker = TraceMaker(sharegpt, 10, 8)
    slow, fast = maker.at(2), maker.at(8)
    assert len(slow) == 20
    assert fast.work.prompts[:20] == slow.work.prompts
    assert fast.work.output_lens[:20] == slow.work.output_lens
    np.testing.assert_allclose(np.array(fast.arrivals_s[:20]) * 4, slow.arrivals_s)


def test_poisson_arrivals_have_the_rate():
    arrivals = poisson_arrivals(20_000, 4.0, seed=1)
    gaps = np.diff(arrivals)
    assert gaps.mean() == pytest.approx(0.25, rel=0.03)
    assert gaps.std() == pytest.approx(0.25, rel=0.05)


def test_workloads_have_the_papers_mean_lengths():
    for work, mean_in, mean_out in ((sharegpt(8000), 161.31, 337.99), (alpaca(8000), 19.31, 58.45)):
        assert np.mean([len(prompt) for prompt in work.prompts]) == pytest.approx(mean_in, rel=0.03)
        assert np.mean(work.output_lens) == pytest.approx(mean_out, rel=0.03)


def test_translations_share_their_prefix_and_chats_are_cut_to_their_last_tokens():
    prompts = translation(20, 80).prompts
    assert len({tuple(prompt[:80]) for prompt in prompts}) == 1
    assert len({tuple(prompt[80:]) for prompt in prompts}) == 20
    lens = [len(prompt) for prompt in chat(500).prompts]
    assert max(lens) == 1024
    assert 0.5 < np.mean(np.array(lens) == 1024) < 0.8


@dataclass
class Overloaded:
    """A system whose normalised latency is its load squared, in units of the bound."""

    capacity: float
    served: list[float] = field(default_factory=list)
    name: str = "made up"

    def serve(self, trace: Trace, tally: Tally) -> None:
        rate = len(trace) / 100
        self.served.append(rate)
        for i, (arrival, output_len) in enumerate(zip(trace.arrivals_s, trace.work.output_lens, strict=True)):
            tally.finish(i, arrival + LATENCY_BOUND_S * (rate / self.capacity) ** 2 * output_len)


@pytest.mark.parametrize("first_rate", [0.5, 7.0, 20.0])
def test_the_sustained_rate_is_where_latency_crosses_the_bound(first_rate):
    system = Overloaded(7.5)
    sweep = sweep_rates(system, TraceMaker(alpaca, 100, 32), first_rate)
    assert sweep.sustained == pytest.approx(7.5, rel=0.01)
    assert sweep.rates == sorted(sweep.rates)
    assert len(system.served) == len(sweep.rates)


def test_without_overload_the_sustained_rate_is_the_last_one_tried():
    assert sweep_rates(Overloaded(1e9), TraceMaker(alpaca, 100, 4), 1.0).sustained == pytest.approx(4, rel=0.3)


# The experiments ------------------------------------------------------------------------------------------------------


def test_a_ratio_to_a_range_is_one_inside_it():
    assert [Row("", (2.0, 4.0), ours).ratio for ours in (1.0, 3.0, 8.0)] == [0.5, 1.0, 2.0]
    assert Row("", None, 1.0).ratio is None


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_a_tiny_run_of_each_experiment_reports_finite_figures(name):
    experiment = EXPERIMENTS[name]
    report = experiment.report({key: task() for key, task in experiment.tasks(0.01).items()})
    assert report.rows
    for row in report.rows:
        assert math.isfinite(row.ours)
        assert row.ours >= 0
    for table in report.tables:
        assert all(len(row) == len(table.columns) for row in table.rows.values())
    text = render(experiment, report)
    assert all(row.label in text for row in report.rows)
    content = json.dumps(to_json(experiment, report), allow_nan=False)
    assert experiment.title in content
    if name == "fig02":
        assert [sum(row) for row in report.tables[0].rows.values()] == pytest.approx([100] * 4)


def test_plots_are_small_and_without_matplotlib_the_way_to_get_them_is_said(tmp_path, monkeypatch):
    experiment = EXPERIMENTS["fig02"]
    reports = {"fig02": experiment.report({key: task() for key, task in experiment.tasks(0.01).items()})}
    with monkeypatch.context() as patch:
        patch.setattr("bench.paper.experiment.find_spec", lambda name: None)
        assert "pip install" in save_plots(reports, tmp_path / "none")
    assert not (tmp_path / "none").exists()
    pytest.importorskip("matplotlib")
    save_plots(reports, tmp_path)
    assert 1_000 < (tmp_path / "fig02.png").stat().st_size < 100_000
