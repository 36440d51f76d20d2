"""Every statistic is described once, and read from its owner."""

import inspect

import pytest

from jpaged.engine.stats import STATISTICS, EngineStats
from tests.support.tiny import engine_runner, tiny_engine


def test_every_statistic_says_what_it_means_and_of_which_kind_it_is():
    assert list(STATISTICS) == list(inspect.signature(EngineStats).parameters)
    for name, each in STATISTICS.items():
        assert each.help, name
        assert each.kind in ("gauge", "counter"), name


@pytest.mark.parametrize("enable_prefix_caching", [True, False])
def test_counters_never_fall_and_gauges_return(enable_prefix_caching):
    engine = tiny_engine(enable_prefix_caching=enable_prefix_caching)
    idle = before = engine.stats()
    for i in range(3):
        engine.add(engine.make_request(str(i), {"prompt_token_ids": [1 + i] * 9}))
    while engine.has_unfinished:
        engine.step()
        now = engine.stats()
        for name, each in STATISTICS.items():
            assert each.kind == "gauge" or getattr(now, name) >= getattr(before, name), name
        before = now
    assert before.num_steps > idle.num_steps
    assert before.num_used_blocks == before.num_running == before.num_waiting == before.tokens_held == 0
    assert before.num_blocks == idle.num_blocks <= engine_runner().num_blocks
