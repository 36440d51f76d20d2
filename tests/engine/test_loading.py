"""A start compiles all programs, a few, or none before the engine is there."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from jpaged import LLM, EngineConfig
from jpaged.device.target import TARGETS
from jpaged.engine import loading
from jpaged.sharding import make_mesh
from tests.support.tiny import TINY, tiny_engine


class Started:
    """A runner that notes its arguments, and the start of its background."""

    def __init__(self, *args: Any, warm_up: bool | None, **options: Any):
        self.warm_up, self.started_for = warm_up, []
        self.programs = SimpleNamespace(background=SimpleNamespace(start=self.started_for.append))


@pytest.fixture
def start(monkeypatch):
    """Starts an engine, and returns its runner."""
    monkeypatch.setattr(loading, "ModelRunner", Started)
    monkeypatch.setattr(loading, "LeadingRunner", Started)
    monkeypatch.setattr(loading, "Engine", lambda runner, *_: runner)
    monkeypatch.setattr(loading, "agree", lambda *_, **__: None)

    def start(warm_up, *, warms_up, num_processes=1):
        monkeypatch.setattr(loading, "target_of", lambda mesh: replace(TARGETS["cpu"], warms_up=warms_up))
        channel = SimpleNamespace(is_leader=True, close=lambda: None) if num_processes > 1 else None
        monkeypatch.setattr(loading, "open_channel", lambda mesh: channel)
        options: dict[str, Any] = {"warm_up": warm_up, "use_tqdm": False}
        return loading.start_engine(lambda: None, TINY, EngineConfig(), make_mesh(1), None, **options)

    return start


@pytest.mark.parametrize(
    ("asked", "warms_up", "few"), [(None, True, None), (None, False, False), (True, False, True), (False, True, False)]
)
def test_the_default_is_a_few_programs_now_where_compiling_takes_long(start, asked, warms_up, few):
    runner = start(asked, warms_up=warms_up)
    assert runner.warm_up is few
    assert runner.started_for == [runner]


@pytest.mark.parametrize(("asked", "warms_up", "expected"), [(None, True, True), (None, False, False)])
def test_several_processes_leave_nothing_to_a_background(start, asked, warms_up, expected):
    runner = start(asked, warms_up=warms_up, num_processes=2)
    assert runner.warm_up is expected
    assert runner.started_for == []


def test_an_llm_that_is_closed_compiles_nothing_more(monkeypatch):
    engine, stopped = tiny_engine(), []
    monkeypatch.setattr(engine.runner.programs.background, "stop", lambda: stopped.append(True))
    LLM.from_engine(engine).close()
    assert stopped == [True]
