"""The scheduler's decisions, with a made-up device: a token is its sequence's seed plus its position."""

from dataclasses import replace
from unittest import mock

import numpy as np
import pytest

from jpaged.contract.result import StepResult, TokenScores
from jpaged.host.blocks import hashed_tokens
from jpaged.host.blocks.hashed_tokens import hash_blocks
from jpaged.host.blocks.manager import BlockManager
from jpaged.host.scheduler import Scheduler
from jpaged.request import FinishReason, Request, SamplingParams, derive_seed
from tests.support.plans import SpelledPlan, spell

PROMPT_SIZES = ((16, 2), (32, 8), (64, 8), (128, 8))


def make_scheduler(
    num_blocks=64,
    *,
    block_size=4,
    rows=8,
    budget=64,
    model_len=512,
    caching=False,
    eos=(),
    step_sizes=(),
    is_quantized=False,
):
    blocks = BlockManager(num_blocks, block_size, enable_prefix_caching=caching)
    blocks.is_quantized = is_quantized
    return Scheduler(
        blocks,
        max_num_seqs=rows,
        max_num_batched_tokens=budget,
        max_model_len=model_len,
        eos_token_ids=eos,
        step_sizes=step_sizes,
    )


def request(name: str, prompt_len: int = 5, *, first: int = 0, **params) -> Request:
    return Request(name, None, list(range(first, first + prompt_len)), SamplingParams(**params), params.get("seed", 0))


def token(seed: int, position: int) -> int:
    return (seed + position) % 2**31


def drawn(seed: int, index: int, start: int, stop: int) -> list[int]:
    """The tokens of a request's sample ``index`` at positions start to stop - 1."""
    return [token(derive_seed(seed, index), position) for position in range(start, stop)]


def result_of(plan: SpelledPlan, token_ids=None) -> StepResult:
    """Token = seed + position unless given."""
    num_samples = len(plan.samples)
    if token_ids is None:
        token_ids = [token(sample.seed, sample.position) for sample in plan.samples]
    return StepResult(
        np.array(token_ids, np.int32),
        scores(num_samples),
        tuple(scores(len(piece.target_ids)) for piece in plan.prompt_scores),
    )


def scores(rows: int) -> TokenScores:
    return TokenScores(
        np.zeros(rows, np.float32),
        np.ones(rows, np.int32),
        np.zeros((rows, 0), np.int32),
        np.zeros((rows, 0), np.float32),
    )


def step(scheduler: Scheduler) -> SpelledPlan:
    plan = spell(scheduler.schedule(), scheduler)
    scheduler.update(plan.plan, result_of(plan))
    scheduler.blocks.check_invariants()
    return plan


def run(scheduler: Scheduler, most: int = 1000) -> list[SpelledPlan]:
    plans = []
    while scheduler.has_unfinished:
        plans.append(step(scheduler))
        assert plans[-1].chunks, "a step with work to do computes something"
        assert len(plans) < most
    assert scheduler.blocks.num_free_blocks == scheduler.blocks.num_blocks - 1
    return plans


def step_until_preemption(scheduler: Scheduler) -> SpelledPlan:
    for _ in range(100):
        plan = step(scheduler)
        if scheduler.stats().num_preemptions:
            return plan
    raise AssertionError("nothing was preempted")


def test_prompt_and_tokens_reach_the_pool_in_order():
    scheduler = make_scheduler()
    group = scheduler.add(request("a", 5, max_tokens=4))
    plans = run(scheduler)
    assert [(c.start, list(c.token_ids)) for plan in plans for c in plan.chunks] == [
        (0, [0, 1, 2, 3, 4]),
        (5, [5]),
        (6, [6]),
        (7, [7]),
    ]
    assert group.sequences[0].output_token_ids == [5, 6, 7, 8]
    assert group.sequences[0].finish_reason is FinishReason.LENGTH


def test_long_prompts_are_chunked_and_mixed_with_decodes_within_the_budget():
    scheduler = make_scheduler(rows=4, budget=8)
    scheduler.add(request("a", 3, max_tokens=20))
    step(scheduler)
    scheduler.add(request("b", 30, max_tokens=2))
    plans = run(scheduler)
    assert max(plan.num_tokens for plan in plans) == 8
    assert [len(c.token_ids) for plan in plans for c in plan.chunks if c.seq_id == 1] == [7, 7, 7, 7, 2, 1]
    assert all(len(plan.chunks) == 2 for plan in plans[:5]), "the decode goes on beside the prompt's chunks"


@pytest.mark.parametrize(
    ("prompt_lens", "num_tokens"),
    [
        ([14], [16]),
        ([40], [42]),
        ([62], [64]),
        ([20, 20], [42]),
        ([100], [64, 40]),
        ([230], [64, 64, 64, 46]),
    ],
)
def test_prompts_beside_decodes_are_not_cut_where_one_step_takes_all(prompt_lens, num_tokens):
    scheduler = make_scheduler(budget=64, step_sizes=PROMPT_SIZES)
    start_decodes(scheduler, prompt_lens)
    assert [step(scheduler).num_tokens for _ in num_tokens] == num_tokens
    assert step(scheduler).num_tokens == 2


@pytest.mark.parametrize(
    ("prompt_lens", "num_tokens"),
    [
        ([14], [16]),
        ([15], [17]),  # beside two decodes 16 take 14: that leaves 1, but there is no row for it
        ([40], [32, 12]),
        ([46], [32, 18]),
        ([60], [32, 32]),
        ([61], [63]),  # 32 would take less than they leave
        ([20, 20], [32, 13]),  # and the one that waits, since one has ended
        ([100], [64, 32, 10]),
        ([230], [64, 64, 64, 32, 16]),
    ],
)
def test_prompts_beside_decodes_fill_a_compiled_size_while_others_wait(prompt_lens, num_tokens):
    scheduler = make_scheduler(rows=2 + len(prompt_lens), budget=64, step_sizes=PROMPT_SIZES)
    start_decodes(scheduler, [*prompt_lens, 1])
    assert [step(scheduler).num_tokens for _ in num_tokens] == num_tokens


def start_decodes(scheduler, prompt_lens):
    """Two sequences that decode, and prompts that come later."""
    for name in "ab":
        scheduler.add(request(name, 1, max_tokens=100))
    step(scheduler)
    for i, prompt_len in enumerate(prompt_lens):
        scheduler.add(request(str(i), prompt_len, first=100 * i, max_tokens=1))


def test_prompts_alone_are_computed_at_once():
    scheduler = make_scheduler(budget=64, step_sizes=((16, 8), (32, 8), (64, 8)))
    scheduler.add(request("a", 23, max_tokens=1))
    scheduler.add(request("b", 17, max_tokens=1))
    assert [plan.num_tokens for plan in run(scheduler)] == [40]


def test_prompts_over_a_quantized_pool_are_cut_between_blocks():
    scheduler = make_scheduler(rows=4, budget=11, is_quantized=True)
    scheduler.add(request("a", 3, max_tokens=20))
    step(scheduler)
    scheduler.add(request("b", 30, max_tokens=2))
    scheduler.add(request("c", 6, first=50, max_tokens=1))
    plans = run(scheduler)
    assert [len(c.token_ids) for plan in plans for c in plan.chunks if c.seq_id == 1] == [8, 8, 8, 6, 1]
    assert [len(c.token_ids) for plan in plans for c in plan.chunks if c.seq_id == 2] == [4, 2]


@pytest.mark.usefixtures("no_growth")
def test_a_size_leaves_a_prompt_over_a_quantized_pool_a_block():
    """16 tokens beside 14 decodes would leave the prompt 2 in each step, which is no block."""
    scheduler = make_scheduler(rows=16, budget=64, step_sizes=((16, 16), (64, 16)), is_quantized=True)
    for index in range(14):
        scheduler.add(request(str(index), 1, first=index, max_tokens=30))
    step(scheduler)
    scheduler.add(request("late", 4, first=100, max_tokens=1))
    assert step(scheduler).num_tokens == 18


def test_terms_of_another_scheduler_do_not_count():
    asked = request("a", 20, max_tokens=2)
    terms = make_scheduler().check(asked)
    with pytest.raises(ValueError, match="max_model_len"):
        make_scheduler(model_len=8).add(replace(asked, terms=terms))


def test_requests_are_admitted_in_order_of_arrival():
    scheduler = make_scheduler(num_blocks=9, rows=8)
    scheduler.add(request("big", 20, max_tokens=2))
    scheduler.add(request("too big for now", 20, max_tokens=2))
    scheduler.add(request("small", 2, max_tokens=2))
    assert [c.seq_id for c in step(scheduler).chunks] == [0], "a small request does not overtake"
    run(scheduler)


def test_admission_leaves_a_watermark_free_for_running_sequences():
    scheduler = make_scheduler(num_blocks=201, block_size=1)
    scheduler.add(request("a", 30, max_tokens=2))
    step(scheduler)
    scheduler.add(request("b", 168, max_tokens=2))  # 200 - 31 = 169 free, and 2 must stay free
    assert [c.seq_id for c in step(scheduler).chunks] == [0]
    run(scheduler)


def test_rows_limit_the_sequences_in_a_step():
    scheduler = make_scheduler(rows=3)
    for name in "abcde":
        scheduler.add(request(name, 2, max_tokens=3))
    plans = run(scheduler)
    assert max(len(plan.chunks) for plan in plans) == 3


@pytest.mark.usefixtures("no_growth")
def test_latest_arrival_is_preempted_and_resumes_before_anyone_is_admitted():
    scheduler = make_scheduler(num_blocks=7)  # 6 blocks of 4
    groups = [scheduler.add(request(name, 8, max_tokens=9)) for name in "abc"]
    step(scheduler)
    assert [c.seq_id for c in step(scheduler).chunks] == [0, 1], "a and b have 3 blocks each; c waits"
    plan = step_until_preemption(scheduler)
    assert [c.seq_id for c in plan.chunks] == [0], "b, the later of the two, made room"
    resumed = next(c for plan in run(scheduler) for c in plan.chunks if c.seq_id != 0)
    assert resumed.seq_id == 1
    assert resumed.start == 0
    assert list(resumed.token_ids) == groups[1].sequences[0].token_ids[: len(resumed.token_ids)]
    assert len(resumed.token_ids) > 8, "the tokens it had drawn are recomputed with its prompt"
    assert [g.sequences[0].output_token_ids for g in groups] == [list(range(8, 17))] * 3


def test_parallel_samples_compute_the_prompt_once_and_fork():
    scheduler = make_scheduler()
    group = scheduler.add(request("a", 6, n=3, max_tokens=3, seed=100))
    first = step(scheduler)
    assert len(first.chunks) == 1
    assert [(s.seq_id, s.chunk, s.seed) for s in first.samples] == [(i, 0, derive_seed(100, i)) for i in range(3)]
    assert scheduler.blocks.stats().num_shared == 2, "the partial last block is shared too"
    second = step(scheduler)
    assert len(second.copies) == 2, "the last owner writes in place"
    assert [c.start for c in second.chunks] == [6, 6, 6]
    assert scheduler.blocks.stats().num_shared == 1
    run(scheduler)
    assert [s.output_token_ids for s in group.sequences] == [drawn(100, i, 6, 9) for i in range(3)]


@pytest.mark.usefixtures("no_growth")
def test_a_resumed_group_shares_its_prompt_again():
    scheduler = make_scheduler(num_blocks=11)  # 10 blocks of 4
    scheduler.add(request("a", 4, max_tokens=28))
    group = scheduler.add(request("b", 9, n=3, max_tokens=8))
    step_until_preemption(scheduler)
    assert all(seq.num_computed == 0 for seq in group.sequences)
    plans = run(scheduler)
    b_chunks = [c for plan in plans for c in plan.chunks if c.seq_id != 0]
    assert [c.start for c in b_chunks].count(0) == 1, "one member recomputes the prompt for all"
    assert [s.output_token_ids for s in group.sequences] == [drawn(0, i, 9, 17) for i in range(3)]


def test_a_prefix_hit_may_end_inside_a_block_and_leaves_one_token_to_compute():
    scheduler = make_scheduler(caching=True)
    scheduler.add(request("a", 8, max_tokens=2))
    run(scheduler)
    group = scheduler.add(request("b", 8, max_tokens=2))
    plan = step(scheduler)
    [chunk] = plan.chunks
    assert (chunk.start, list(chunk.token_ids)) == (7, [7]), "7 of 8 tokens are found in two blocks"
    assert [copy.dst for copy in plan.copies] == [chunk.block_table[1]], "the second is copied, as its last is written"
    assert group.num_cached_tokens == 7
    run(scheduler)


def test_a_waiting_request_is_admitted_as_soon_as_its_prefix_is_cached():
    scheduler = make_scheduler(num_blocks=12, block_size=64, budget=1024, caching=True)
    for name in "ab":
        scheduler.add(request(name, 386, max_tokens=60))
    assert [c.seq_id for c in step(scheduler).chunks] == [0], "7 of 11 blocks: no room for another 7"
    assert [(c.seq_id, c.start) for c in step(scheduler).chunks] == [(0, 386), (1, 384)]
    run(scheduler)


def test_blocks_are_read_only_after_the_step_that_writes_them():
    scheduler = make_scheduler(caching=True, budget=64)
    groups = [scheduler.add(request(name, 9, max_tokens=1)) for name in "ab"]
    plan = spell(scheduler.schedule(), scheduler)
    assert [(c.seq_id, c.start) for c in plan.chunks] == [(0, 0)], "the second shares its blocks, and computes later"
    ahead = spell(scheduler.schedule_ahead(), scheduler)
    assert [(c.seq_id, c.start) for c in ahead.chunks] == [(1, 8)]
    assert ahead.chunks[0].block_table[:2] == plan.chunks[0].block_table[:2]
    for each in (plan, ahead):
        scheduler.update(each.plan, result_of(each))
    assert not scheduler.has_unfinished
    assert [group.num_cached_tokens for group in groups] == [0, 8]


def test_a_prompt_shares_the_blocks_of_a_step_in_flight():
    scheduler = make_scheduler(caching=True, budget=64)
    scheduler.add(request("a", 22, max_tokens=3))
    plan = spell(scheduler.schedule(), scheduler)
    late = scheduler.add(request("b", 22, max_tokens=3))
    ahead = spell(scheduler.schedule_ahead(), scheduler)
    assert [(c.seq_id, c.start, len(c.token_ids)) for c in ahead.chunks] == [(0, 22, 1), (1, 20, 2)]
    assert late.num_cached_tokens == 20
    for each in (plan, ahead):
        scheduler.update(each.plan, result_of(each))
    run(scheduler)


def test_a_prompt_that_shares_little_with_the_same_plan_is_computed_at_once():
    scheduler = make_scheduler(caching=True, budget=64)
    scheduler.add(request("a", 9, max_tokens=1))
    prompt = [*range(8), *range(100, 109)]  # 8 of 17 tokens
    scheduler.add(Request("b", None, prompt, SamplingParams(max_tokens=1), 0))
    assert [(c.seq_id, c.start) for c in step(scheduler).chunks] == [(0, 0), (1, 0)]
    run(scheduler)


def test_equal_prompts_of_one_step_neither_starve_nor_block_others():
    scheduler = make_scheduler(num_blocks=100, caching=True, budget=32, rows=8)
    names = ["long", "equal", "equal too", "other"]
    for name in names:
        scheduler.add(request(name, 60 if name != "other" else 20, first=500 * (name == "other"), max_tokens=2))
    first, second, third = (step(scheduler) for _ in range(3))
    assert [(c.seq_id, c.start, c.stop) for c in first.chunks] == [(0, 0, 32)]
    assert [(c.seq_id, c.start, c.stop) for c in second.chunks] == [(0, 32, 60), (3, 0, 4)], (
        "no token is computed twice"
    )
    assert [(c.seq_id, c.start) for c in third.chunks] == [(0, 60), (1, 56), (2, 56), (3, 4)]
    run(scheduler)


def test_an_equal_prompt_is_right_when_the_first_is_aborted_while_its_step_is_in_flight():
    scheduler = make_scheduler(num_blocks=30, caching=True, budget=64)
    scheduler.add(request("a", 22, max_tokens=3))
    plan = spell(scheduler.schedule(), scheduler)
    late = scheduler.add(request("b", 22, max_tokens=3))
    scheduler.abort("a")
    ahead = spell(scheduler.schedule_ahead(), scheduler)
    assert [(c.seq_id, c.start) for c in ahead.chunks] == [(1, 21)], "the step runs, and its last block is copied"
    assert [copy.src for copy in ahead.copies] == [plan.chunks[0].block_table[5]]
    for each in (plan, ahead):
        scheduler.update(each.plan, result_of(each))
    run(scheduler)
    assert late.sequences[0].output_token_ids == [22, 23, 24]


def test_blocks_of_a_step_that_failed_are_not_shared():
    scheduler = make_scheduler(caching=True, budget=64)
    for name in "ab":
        scheduler.add(request(name, 9, max_tokens=1))
    scheduler.schedule()  # its step fails
    scheduler.forget_pool()
    late = scheduler.add(request("c", 9, max_tokens=1))
    plan = step(scheduler)
    assert [(c.seq_id, c.start) for c in plan.chunks] == [(0, 0)]
    run(scheduler)
    assert late.num_cached_tokens == 8


def test_different_salts_share_nothing():
    scheduler = make_scheduler(caching=True)
    plain = request("a", 9, max_tokens=1)
    scheduler.add(plain)
    run(scheduler)
    group = scheduler.add(Request("b", None, plain.prompt_token_ids, plain.params, 0, prefix_salt=b"other"))
    run(scheduler)
    assert group.num_cached_tokens == 0


def test_prompt_scores_cover_every_prompt_token_once_whatever_the_chunks():
    scheduler = make_scheduler(budget=8, rows=4, caching=True)
    scheduler.add(request("warm", 20, max_tokens=1))
    run(scheduler)
    group = scheduler.add(request("a", 20, max_tokens=2, prompt_logprobs=0))
    plans = run(scheduler)
    assert [t for plan in plans for piece in plan.prompt_scores for t in piece.target_ids] == list(range(1, 20))
    assert group.num_cached_tokens == 0, "cached tokens have no logits to score"
    assert sum(len(piece.logprobs) for piece in group.prompt_scores) == 19


def test_stop_tokens_end_a_sequence_but_not_before_min_tokens():
    scheduler = make_scheduler(eos=(7,))
    stopped = scheduler.add(request("stops", 5, max_tokens=10))
    late = scheduler.add(request("not yet", 5, max_tokens=10, min_tokens=6))
    ignoring = scheduler.add(request("ignores", 5, max_tokens=10, ignore_eos=True))
    own = scheduler.add(request("own stop", 5, max_tokens=10, ignore_eos=True, stop_token_ids=[9]))
    bans = [s.banned_token_ids for plan in run(scheduler) for s in plan.samples if s.seq_id == 1]
    assert stopped.sequences[0].output_token_ids == [5, 6, 7]
    assert stopped.sequences[0].finish_reason is FinishReason.STOP
    assert bans == [(7,)] * 6 + [()] * 4
    assert len(late.sequences[0].output_token_ids) == 10
    assert ignoring.sequences[0].finish_reason is FinishReason.LENGTH
    assert own.sequences[0].output_token_ids == [5, 6, 7, 8, 9]


@pytest.mark.parametrize("steps", [0, 1, 2, 5])
def test_abort_frees_everything_at_any_point(steps):
    scheduler = make_scheduler(budget=8, caching=True)
    group = scheduler.add(request("a", 20, n=2, max_tokens=9))
    other = scheduler.add(request("b", 6, max_tokens=3))
    for _ in range(steps):
        step(scheduler)
    assert scheduler.abort("a") is group
    assert scheduler.abort("a") is None
    assert all(seq.finish_reason is FinishReason.ABORT for seq in group.sequences)
    run(scheduler)
    assert other.sequences[0].output_token_ids == [6, 7, 8]


def test_a_lost_pool_costs_a_recomputation_and_nothing_else():
    scheduler = make_scheduler(caching=True)
    groups = [scheduler.add(request(name, 9, first=20 * i, n=2, max_tokens=6)) for i, name in enumerate("ab")]
    for _ in range(3):
        step(scheduler)
    scheduler.schedule()  # its step fails
    scheduler.forget_pool()
    assert [c.start for c in step(scheduler).chunks] == [0, 0], "nothing cached is trusted"
    run(scheduler)
    for group in groups:
        assert [s.output_token_ids for s in group.sequences] == [drawn(0, i, 9, 15) for i in range(2)]


class TestRefusals:
    def refused(self, scheduler: Scheduler, bad: Request, match: str) -> None:
        with pytest.raises(ValueError, match=match):
            scheduler.add(bad)
        assert not scheduler.has_unfinished
        assert scheduler.blocks.num_free_blocks == scheduler.blocks.num_blocks - 1

    def test_a_request_that_can_never_fit_is_refused_with_the_arithmetic(self):
        # 10 prompt tokens are 2 full blocks; 10 + 27 - 1 = 36 tokens are 9 blocks, so 7 more for each of 2.
        bad = request("a", 10, n=2, max_tokens=27)
        scheduler = make_scheduler(num_blocks=16)
        self.refused(scheduler, bad, r"2 full prompt blocks \+ n=2 x 7 more = 16 blocks, and the pool has 15")
        scheduler = make_scheduler(num_blocks=17)
        scheduler.add(bad)
        run(scheduler)

    def test_a_prompt_or_max_tokens_beyond_the_context_is_refused(self):
        self.refused(make_scheduler(model_len=16), request("a", 16), "max_model_len=16")
        self.refused(
            make_scheduler(model_len=16), request("a", 10, max_tokens=17), "max_tokens=17 is more than max_mod"
        )
        bad = request("a", 10, min_tokens=17, max_tokens=None)
        self.refused(make_scheduler(model_len=16), bad, "min_tokens=17 is more than max_model_len=16")

    def test_more_samples_than_rows_are_refused(self):
        self.refused(make_scheduler(rows=2), request("a", n=3), "n=3 is more than max_num_seqs=2")

    def test_an_empty_prompt_is_refused(self):
        self.refused(make_scheduler(), request("a", 0), "no tokens")

    def test_a_name_in_use_is_refused(self):
        scheduler = make_scheduler()
        scheduler.add(request("a"))
        with pytest.raises(ValueError, match="already in use"):
            scheduler.add(request("a"))
        run(scheduler)


def test_max_tokens_beyond_the_context_ends_with_it():
    scheduler = make_scheduler(model_len=16)
    group = scheduler.add(request("a", 10, max_tokens=16))
    run(scheduler)
    assert len(group.sequences[0].output_token_ids) == 6
    assert group.sequences[0].finish_reason is FinishReason.LENGTH


@pytest.mark.usefixtures("no_growth")
@pytest.mark.parametrize("num_blocks", [11, 12, 13, 14])
def test_a_group_preempted_while_it_grows_leaves_no_copy_behind(num_blocks):
    scheduler = make_scheduler(num_blocks)
    for name, prompt_len, n in (("a", 4, 1), ("b", 6, 3), ("c", 2, 3), ("d", 5, 1)):
        scheduler.add(request(name, prompt_len, n=n, max_tokens=10))
    for _ in range(200):
        plan = step(scheduler)
        held = {block for chunk in plan.chunks for block in chunk.block_table}
        assert {copy.dst for copy in plan.copies} <= held
    assert not scheduler.has_unfinished
    assert scheduler.stats().num_preemptions


def test_without_max_tokens_a_sequence_fills_the_context_or_the_pool():
    scheduler = make_scheduler(num_blocks=6, model_len=512)
    group = scheduler.add(request("a", 5, n=2, max_tokens=None))
    run(scheduler)
    # 5 blocks: one shared, two each; 12 tokens in the pool and one more that is never fed back.
    assert [len(s.token_ids) for s in group.sequences] == [13, 13]
    scheduler = make_scheduler(model_len=9)
    group = scheduler.add(request("a", 5, max_tokens=None))
    run(scheduler)
    assert len(group.sequences[0].token_ids) == 9


def test_a_group_that_starts_beside_a_step_in_flight_is_matched_once():
    scheduler = make_scheduler(caching=True)
    scheduler.add(request("running", 9, max_tokens=8))
    step(scheduler)
    first = spell(scheduler.schedule(), scheduler)
    scheduler.add(request("waiting", 12, first=1000, max_tokens=2))
    with mock.patch.object(scheduler.blocks, "match_prefix", wraps=scheduler.blocks.match_prefix) as matched:
        ahead = scheduler.schedule_ahead()
    assert ahead is not None
    assert ahead.num_tokens == 1 + 12
    assert matched.call_count == 1
    scheduler.update(first.plan, result_of(first))


def test_the_blocks_of_a_waiting_prompt_are_hashed_once_and_matched_only_when_it_could_start():
    scheduler = make_scheduler(num_blocks=200, caching=True, rows=8)
    blocks = scheduler.blocks
    for i in range(4):  # one of them takes a block in every step
        scheduler.add(request(str(i), 8 + i, first=1000 * i, max_tokens=60, ignore_eos=True))
    step(scheduler)
    blocks.reserve("other", 4 * (blocks.num_free_blocks - 70))
    scheduler.add(request("waiting", 400, first=9000, max_tokens=2))
    with (
        mock.patch.object(hashed_tokens, "hash_blocks", side_effect=hash_blocks) as made,
        mock.patch.object(blocks, "match_prefix", side_effect=blocks.match_prefix) as matched,
    ):
        for _ in range(40):
            step(scheduler)
        sizes = sorted(len(call.args[1]) for call in made.call_args_list)
        assert sizes[-2:] == [4, 400 - 1 - 3], "its full blocks at once, the others as they fill"
        assert sum(call.args[0].salt == b"" and len(call.args[0]) == 400 for call in matched.call_args_list) == 1
    blocks.free("other")
    assert 4 in {chunk.seq_id for chunk in step(scheduler).chunks}, "it starts as soon as it can"
    run(scheduler)


def test_a_checked_request_is_not_checked_again_unless_pins_have_changed():
    scheduler = make_scheduler(num_blocks=12, caching=True)  # 11 blocks of 4
    waiting = request("a", 8, max_tokens=29)  # 9 blocks
    terms = scheduler.check(waiting)
    with mock.patch.object(scheduler._admission, "check", side_effect=AssertionError("checked twice")):
        assert scheduler.add(replace(waiting, terms=terms)).max_tokens == 29
        with pytest.raises(ValueError, match="already in use"):
            scheduler.add(replace(waiting, terms=terms))
    run(scheduler)
    scheduler.pin(request("pin", 12, first=100, max_tokens=1))
    with pytest.raises(ValueError, match="can never fit"):
        scheduler.add(replace(waiting, terms=terms))
    scheduler.unpin("pin")
    scheduler.add(replace(waiting, terms=terms))
    run(scheduler)
