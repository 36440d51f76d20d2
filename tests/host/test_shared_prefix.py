"""The prefix that decodes share: it is theirs, and none that they share saves more."""

from itertools import accumulate

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jpaged.host.policies.shared_prefix import find_shared
from tests.support.stories import add, finish_all, make_device, step, step_until


@st.composite
def rows(draw):
    """Block tables as requests have them: each begins with a part of an earlier one, and then has blocks of its own."""
    tables, num_blocks = [], 1
    for _ in range(draw(st.integers(0, 8))):
        table = []
        if tables:
            source = draw(st.sampled_from(tables))
            table = source[: draw(st.integers(0, len(source)))]
        num_own = draw(st.integers(1, 9))
        tables.append([*table, *range(num_blocks, num_blocks + num_own)])
        num_blocks += num_own
    return tables, [draw(st.integers(0, len(table) - 1)) for table in tables]


def saved_by(tables, num_full, members):
    """Tokens, in blocks of 2, that some rows save with the longest prefix that they share."""
    least = min(num_full[row] for row in members)
    alike = accumulate((len({tables[row][i] for row in members}) == 1 for i in range(least)), lambda a, b: a and b)
    return 2 * sum(alike) * (len(members) - 1)


@given(rows(), st.integers(1, 40))
def test_rows_that_share_have_the_same_full_blocks_at_their_front(table_rows, least):
    tables, num_full = table_rows
    lens = find_shared(tables, num_full, 2, least, 0)
    if lens is None:
        return
    [num_tokens] = set(lens.tolist()) - {0}
    members = np.flatnonzero(lens).tolist()
    assert num_tokens % 2 == 0
    assert all(num_full[row] * 2 >= num_tokens for row in members)
    assert len({tuple(tables[row][: num_tokens // 2]) for row in members}) == 1
    assert num_tokens * (len(members) - 1) >= least


@given(rows())
def test_nothing_saved_is_nothing_found(table_rows):
    tables, num_full = table_rows
    pairs = [(a, b) for a in range(len(tables)) for b in range(a)]
    is_shared = any(saved_by(tables, num_full, pair) > 0 for pair in pairs)
    assert (find_shared(tables, num_full, 2, 1, 0) is not None) == is_shared


SYSTEM = list(range(100, 140))
OTHER = list(range(200, 210))


@pytest.mark.parametrize(
    ("fronts", "expected"),
    [
        ([SYSTEM] * 4, [40] * 4),
        ([SYSTEM, [], SYSTEM, OTHER], [40, 0, 40, 0]),
        # Four rows with a short prefix save more than two with a longer one, and the other way round.
        ([SYSTEM[:9], SYSTEM[:9], SYSTEM[:12], SYSTEM[:12]], [9] * 4),
        ([SYSTEM[:2], SYSTEM[:2], SYSTEM, SYSTEM], [0, 0, 40, 40]),
        # A first block that all have hides nothing: most of them have more in common.
        ([SYSTEM[:1] + OTHER, SYSTEM, SYSTEM, SYSTEM], [0, 40, 40, 40]),
        ([SYSTEM, OTHER, OTHER, OTHER], [0, 10, 10, 10]),
        ([[], [], []], None),
    ],
)
def test_group_that_saves_most(fronts, expected):
    tables = [[*front, 1000 + row, 2000 + row] for row, front in enumerate(fronts)]
    lens = find_shared(tables, [len(front) + 1 for front in fronts], 1, 2, 0)
    assert expected == (None if lens is None else lens.tolist())


def test_prefix_must_save_enough():
    tables = [[*SYSTEM, 1000 + row] for row in range(3)]
    assert find_shared(tables, [40] * 3, 16, 40 * 16 * 2, 0) is not None
    assert find_shared(tables, [40] * 3, 16, 40 * 16 * 2 + 1, 0) is None


@pytest.mark.parametrize(("num_alike", "is_shared"), [(2, False), (4, False), (5, True), (24, True)])
def test_few_rows_do_not_let_many_queries_attend_their_prefix(num_alike, is_shared):
    tables = [[*(SYSTEM if row < num_alike else [500 + row]), 1000 + row] for row in range(24)]
    lens = find_shared(tables, [len(table) - 1 for table in tables], 16, 1, 1 / 8)
    assert (lens is not None) == is_shared


def test_samples_of_a_prompt_share_its_full_blocks_while_they_decode():
    device = make_device(max_burst=4)
    samples = add(device, "samples", 10, n=3, max_tokens=20, ignore_eos=True)
    other = add(device, "other", 3, max_tokens=30, ignore_eos=True)
    plans = [step(device).plan for _ in range(3)]
    assert plans[0].shared_lens is None
    assert sorted(plans[-1].shared_lens.tolist()) == [0, 8, 8, 8]
    step_until(device, lambda: len(device.scheduler.line.running) == 1)
    assert step(device).plan.shared_lens is None
    finish_all(device, samples, other)


def test_nothing_is_looked_for_while_prompts_are_computed(monkeypatch):
    searches = []
    monkeypatch.setattr("jpaged.host.shared_prefix.find_shared", lambda tables, *_: searches.append(len(tables)))
    device = make_device()
    first = add(device, "first", 6, n=2, max_tokens=8, ignore_eos=True)
    step_until(device, lambda: len(searches) > 0)
    assert searches == [2]
    second = add(device, "second", 9, max_tokens=4, ignore_eos=True)
    assert len(step(device).plan.chunks.lens) == 3
    assert searches == [2]
    step(device)
    assert searches == [2, 3]
    finish_all(device, first, second)
