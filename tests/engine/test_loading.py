"""A start compiles all programs, a few, or none before the engine is there."""

import asyncio
import gc
import sys
import threading
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from flax import nnx

import jpaged
import pallas_kernels
from jpaged import LLM, AsyncLLM, EngineConfig, SamplingParams
from jpaged.device.step import programs
from jpaged.device.step.program_cache import SOURCE_DIGEST, source_digest
from jpaged.device.step.programs import Programs
from jpaged.device.target import TARGETS
from jpaged.engine import loading
from jpaged.engine.loading import module_loader
from jpaged.sharding import make_mesh
from tests.support.tiny import TINY, tiny_config, tiny_engine, tiny_model

TIMEOUT_S = 60


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
    ("asked", "warms_up", "few"),
    [
        (None, True, None),
        (None, False, False),
        (True, False, True),
        (False, True, False),
        ("auto", True, None),
        ("auto", False, False),
        ("all", False, True),
        ("first", False, None),
        ("none", True, False),
    ],
)
def test_the_default_is_a_few_programs_now_where_compiling_takes_long(start, asked, warms_up, few):
    runner = start(asked, warms_up=warms_up)
    assert runner.warm_up is few
    assert runner.started_for == [runner]


@pytest.mark.parametrize("asked", ["yes", "", 1, 0, "True", ["all"]])
def test_another_time_to_compile_is_refused_before_anything_is_loaded(asked, monkeypatch):
    monkeypatch.setattr("jpaged.llm.load_checkpoint", lambda *_, **__: pytest.fail("it was loaded"))
    with pytest.raises(ValueError, match=r"warm_up=.* is not valid: expected one of auto, all, first, none"):
        LLM(warm_up=asked)


@pytest.mark.parametrize(
    ("asked", "warms_up", "expected"), [(None, True, True), (None, False, False), ("first", False, True)]
)
def test_several_processes_leave_nothing_to_a_background(start, asked, warms_up, expected):
    runner = start(asked, warms_up=warms_up, num_processes=2)
    assert runner.warm_up is expected
    assert runner.started_for == []


def test_processes_agree_on_all_code_since_engines_and_schedulers_must_be_the_same(start, monkeypatch):
    codes = []
    monkeypatch.setattr(loading, "agree", lambda *_, code, **__: codes.append(code))
    start(False, warms_up=False, num_processes=2)
    packages = [Path(package.__path__[0]) for package in (jpaged, pallas_kernels)]
    assert codes == [source_digest(packages)] != [SOURCE_DIGEST]


@pytest.fixture
def accelerated(monkeypatch):
    """The CPU as a device that compiles a few sizes first.

    Returns:
        An event: the background lowers nothing before it.
    """
    lower, go_on = Programs.lower, threading.Event()

    def wait_and_lower(self, key):
        is_early = threading.current_thread().name.startswith("jpaged-compile")
        assert not is_early or go_on.wait(TIMEOUT_S)
        return lower(self, key)

    monkeypatch.setattr(Programs, "lower", wait_and_lower)
    monkeypatch.setattr(programs, "NUM_FIRST", 2)
    monkeypatch.setattr(loading, "target_of", lambda mesh: replace(TARGETS["cpu"], warms_up=True))
    yield go_on
    go_on.set()


def start_tiny() -> Any:
    """An engine with few sizes, as an accelerator starts it."""
    model_config = tiny_config(num_layers=1)
    sizes: dict[str, Any] = {"block_size": 8, "num_blocks": 64, "max_num_seqs": 2, "max_num_batched_tokens": 8}
    config = EngineConfig(enable_prefix_caching=False, **sizes)
    load = module_loader(nnx.clone(tiny_model(model_config)), model_config, config, make_mesh(1))
    return loading.start_engine(load, model_config, config, make_mesh(1), None, warm_up=None, use_tqdm=False)


def compiling_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("jpaged-compile")]


def test_an_engine_whose_background_ended_while_it_served_goes_with_its_last_user(accelerated):
    interval = sys.getswitchinterval()
    llm = AsyncLLM.from_llm(LLM.from_engine(start_tiny()))
    runner = llm.engine.runner
    alive = [weakref.ref(each) for each in (llm.engine, runner, runner.cache.pool, runner.programs)]
    background = runner.programs.background
    del runner

    async def generate():
        params = SamplingParams(max_tokens=3, ignore_eos=True)
        return [output async for output in llm.generate({"prompt_token_ids": [1, 2, 3]}, params)][-1]

    assert llm.health().compiling is not None
    assert len(asyncio.run(generate()).outputs[0].token_ids) == 3
    accelerated.set()
    assert background.wait(TIMEOUT_S)
    assert llm.health().compiling is None
    llm.shutdown()
    del llm, background
    gc.collect()
    assert [each() for each in alive] == [None] * len(alive)
    assert compiling_threads() == []
    assert sys.getswitchinterval() == interval


def test_an_llm_that_is_closed_while_it_compiles_leaves_no_thread_and_no_runner(accelerated):
    llm = LLM.from_engine(start_tiny())
    assert compiling_threads()
    runner = weakref.ref(llm.engine.runner)
    background = llm.engine.runner.programs.background
    llm.close()
    accelerated.set()
    assert background.wait(TIMEOUT_S)
    assert compiling_threads() == []
    del llm, background
    gc.collect()
    assert runner() is None


def test_an_llm_that_is_closed_compiles_compiles_nothing_more(monkeypatch):
    engine, stopped = tiny_engine(), []
    monkeypatch.setattr(engine.runner.programs.background, "stop", lambda: stopped.append(True))
    LLM.from_engine(engine).close()
    assert stopped == [True]
