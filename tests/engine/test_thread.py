"""The engine thread: what it delivers, and what becomes of requests when steps fail, hang or end it."""

import threading
from collections.abc import Callable
from contextlib import contextmanager
from unittest import mock

import pytest

from jpaged.engine import bursts
from jpaged.engine import thread as module
from jpaged.engine.health import EngineDeadError, HealthState
from jpaged.engine.outputs import StepOutput
from jpaged.engine.thread import EngineThread
from jpaged.request import CompletionDelta, FinishReason, Request, RequestOutput, SamplingParams
from tests.support.tiny import tiny_engine

TIMEOUT_S = 900
"""Only a failing test waits for so long."""


class Served:
    """An engine in its thread, and all that it delivers."""

    def __init__(self, **settings) -> None:
        self.engine = tiny_engine(**settings)
        self.results: dict[str, RequestOutput] = {}
        self.deltas: list[CompletionDelta] = []
        self.num_deliveries = 0
        self.end: list[BaseException | None] = []
        self.refuses = False
        self._changed = threading.Condition()
        self.thread = EngineThread(self.engine, self._deliver, self._note_end)

    def request(self, name: str, length: int = 5, **params) -> Request:
        sampling = SamplingParams(**{"seed": 1, "max_tokens": 6, "ignore_eos": True} | params)
        return self.engine.prompts.read(name, {"prompt_token_ids": list(range(1, length + 1))}, sampling, 0)

    def add(self, name: str, length: int = 5, **params) -> None:
        self.thread.add(self.request(name, length, **params), is_streamed=True).result(TIMEOUT_S)

    def add_and_hold(self, name: str, **params) -> Callable[[], None]:
        """Add a request whose step waits once it has begun, and the thread with it. Returns what lets both go on."""
        step, has_begun, may_go_on = self.engine.step, threading.Event(), threading.Event()

        def held() -> StepOutput:
            has_begun.set()
            assert may_go_on.wait(TIMEOUT_S)
            return step()

        self.engine.step = held
        self.add(name, **params)
        assert has_begun.wait(TIMEOUT_S)
        return may_go_on.set

    def result(self, name: str) -> RequestOutput:
        self.wait_until(lambda: name in self.results)
        return self.results[name]

    def wait_until(self, is_true: Callable[[], bool]) -> None:
        with self._changed:
            assert self._changed.wait_for(is_true, TIMEOUT_S)

    def _deliver(self, output: StepOutput) -> None:
        if self.refuses:
            raise RuntimeError("the loop is closed")
        with self._changed:
            self.num_deliveries += 1
            self.deltas += output.deltas
            self.results |= {result.request_id: result for result in output.finished}
            self._changed.notify_all()

    def _note_end(self, error: BaseException | None) -> None:
        with self._changed:
            self.end.append(error)
            self._changed.notify_all()


@pytest.fixture(autouse=True)
def _no_wait_before_a_retry(monkeypatch):
    monkeypatch.setattr(module, "FIRST_RETRY_S", 0.0)


@contextmanager
def serving(**settings):
    served = Served(**settings)
    try:
        yield served
    finally:
        assert served.thread.shutdown(TIMEOUT_S)
        assert served.engine.blocks.num_used_blocks == 0


def fail_steps(monkeypatch, served: Served, errors: list[BaseException]) -> None:
    """Let the next steps fail with these errors."""
    fetch = served.engine.runner.fetch

    def broken(step):
        if errors:
            raise errors.pop(0)
        return fetch(step)

    monkeypatch.setattr(served.engine.runner, "fetch", broken)


def token_ids(name: str, served: Served) -> list[int]:
    return served.result(name).outputs[0].token_ids


def expected_tokens(length: int = 5, **params) -> list[int]:
    with serving() as served:
        served.add("alone", length, **params)
        return token_ids("alone", served)


def test_an_iteration_delivers_all_that_it_brought_at_once():
    expected = expected_tokens()
    with serving(max_burst=1) as served:
        served.thread.call(lambda engine: [engine.add(served.request(str(i))) for i in range(3)]).result(TIMEOUT_S)
        for i in range(3):
            assert token_ids(str(i), served) == expected
            told = [t for delta in served.deltas if delta.request_id == str(i) for t in delta.token_ids]
            assert told == expected
        assert served.num_deliveries <= served.thread.call(lambda engine: engine.stats().num_steps).result(TIMEOUT_S)
        assert served.num_deliveries < 3 * 6


def test_results_have_the_times_of_their_request():
    with serving() as served:
        served.add("a")
        times = served.result("a").times
        assert times.arrived <= times.first_scheduled <= times.first_token <= times.finished
        assert served.result("a").num_preemptions == 0


def test_a_step_that_fails_once_costs_no_token(monkeypatch):
    expected = expected_tokens()
    with serving() as served:
        fail_steps(monkeypatch, served, [RuntimeError("the device broke")])
        served.add("a")
        assert token_ids("a", served) == expected
        assert served.result("a").num_preemptions == 1
        assert served.result("a").outputs[0].finish_reason is FinishReason.LENGTH
        assert served.thread.health().state is HealthState.OK
        assert served.thread.health().num_failures == 0


def test_requests_of_steps_that_fail_three_times_end_with_an_error_and_others_go_on(monkeypatch):
    expected = expected_tokens(9)
    with serving(max_num_seqs=1) as served:
        errors: list[BaseException] = [RuntimeError("the device broke") for _ in range(3)]
        fail_steps(monkeypatch, served, errors)
        red = []
        finish = served.engine.abort

        def abort(*args, **kwargs):
            red.append(served.thread.health())
            return finish(*args, **kwargs)

        monkeypatch.setattr(served.engine, "abort", abort)
        served.thread.call(lambda engine: [engine.add(served.request("bad")), engine.add(served.request("good", 9))])
        bad = served.result("bad")
        assert bad.outputs[0].finish_reason is FinishReason.ERROR
        assert bad.error == "3 steps in a row failed, the last with RuntimeError"
        assert token_ids("good", served) == expected
        assert [(health.state, health.num_failures) for health in red] == [(HealthState.FAILING, 3)]
        assert not red[0].is_healthy
        assert red[0].error == "RuntimeError: the device broke"
        assert served.thread.health().state is HealthState.OK


def test_errors_before_any_request_runs_end_all_of_them(monkeypatch):
    with serving() as served:
        errors = [RuntimeError("no plan") for _ in range(3)]
        schedule = served.engine.scheduler.schedule
        monkeypatch.setattr(
            served.engine.scheduler,
            "schedule",
            lambda: schedule() if not errors else (_ for _ in ()).throw(errors.pop()),
        )
        served.thread.call(lambda engine: [engine.add(served.request(name)) for name in ("a", "b")])
        for name in ("a", "b"):
            assert served.result(name).outputs[0].finish_reason is FinishReason.ERROR
        served.add("c")
        assert len(token_ids("c", served)) == 6


def test_a_pin_whose_steps_fail_ends_with_an_error(monkeypatch):
    with serving() as served:
        fail_steps(monkeypatch, served, [RuntimeError("the device broke") for _ in range(3)])
        with pytest.raises(RuntimeError, match="3 steps in a row failed"):
            served.thread.pin("p", {"prompt_token_ids": [1, 2, 3]}).result(TIMEOUT_S)
        assert served.thread.pin("p", {"prompt_token_ids": [1, 2, 3]}).result(TIMEOUT_S) == 3
        assert served.thread.call(lambda engine: engine.is_pinned("p")).result(TIMEOUT_S)
        served.thread.unpin("p").result(TIMEOUT_S)
        with pytest.raises(ValueError, match="not pinned"):
            served.thread.unpin("p").result(TIMEOUT_S)


def test_an_error_that_ends_the_thread_reaches_every_caller(monkeypatch):
    served = Served()
    step = served.engine.step
    monkeypatch.setattr(served.engine, "step", mock.Mock(side_effect=SystemExit("the thread is killed")))
    go_on = served.add_and_hold("a")
    waiting = served.thread.call(lambda engine: engine.stats())
    go_on()
    with pytest.raises(EngineDeadError, match="SystemExit: the thread is killed"):
        waiting.result(TIMEOUT_S)
    assert served.thread.join(TIMEOUT_S)
    assert [type(error) for error in served.end] == [SystemExit]
    with pytest.raises(EngineDeadError, match="SystemExit"):
        served.thread.add(served.request("b"), is_streamed=True).result(TIMEOUT_S)
    assert served.thread.health().state is HealthState.DEAD
    assert served.thread.shutdown(TIMEOUT_S)
    monkeypatch.setattr(served.engine, "step", step)
    served.engine.forget("a")


def test_an_order_that_fails_is_its_callers_error_alone():
    with serving() as served:
        with pytest.raises(ZeroDivisionError):
            served.thread.call(lambda engine: 1 / 0).result(TIMEOUT_S)
        with pytest.raises(ValueError, match="is more than max_num_seqs"):
            served.add("wide", n=100)
        served.add("a")
        served.result("a")
        assert served.thread.health().state is HealthState.OK


@pytest.mark.parametrize(
    ("step_s", "has_room", "expected"),
    [(0.0, True, 4), (0.0025, True, 4), (0.003, True, 3), (0.006, True, 1), (0.5, True, 1), (0.5, False, 4)],
)
def test_bursts_are_short_while_a_newcomer_would_find_room(step_s, has_room, expected):
    assert bursts.burst_for(step_s, 4, has_room=has_room) == expected


def test_bursts_follow_the_times_of_steps_and_the_free_rows(monkeypatch):
    asked = []

    def burst_for(step_s: float, most: int, *, has_room: bool) -> int:
        asked.append((most, has_room, step_s > 0))
        return 1 if has_room else most

    monkeypatch.setattr(bursts, "burst_for", burst_for)
    served = Served(max_burst=3, max_num_seqs=2)
    go_on = served.add_and_hold("one", max_tokens=30)
    served.thread.add(served.request("other", max_tokens=20), is_streamed=True)
    go_on()
    served.result("one")
    served.thread.shutdown(TIMEOUT_S)
    assert set(asked) == {(3, True, True), (3, False, True)}, "one row was free in the beginning and in the end"
    assert served.engine.scheduler.max_burst == 1


def test_bursts_are_long_while_others_wait_for_blocks(monkeypatch):
    """A row is free, and a newcomer would come after the request that finds no blocks."""
    asked = []

    def burst_for(step_s: float, most: int, *, has_room: bool) -> int:
        scheduler = served.engine.scheduler
        asked.append((bool(scheduler.line.waiting), scheduler.line.num_rows < scheduler.max_num_seqs, has_room))
        return most

    monkeypatch.setattr(bursts, "burst_for", burst_for)
    with serving(max_burst=3, max_num_seqs=3, num_blocks=13, block_size=4) as served:
        for name in ("one", "other"):
            served.thread.add(served.request(name, max_tokens=36), is_streamed=True)
        served.result("one")
        served.result("other")
    assert (True, True, False) in asked
    assert (True, True, True) not in asked
    assert (False, True, True) in asked


def test_a_step_that_hangs_is_seen_and_compilation_is_none(monkeypatch):
    with serving() as served:
        go_on = served.add_and_hold("a")
        assert served.thread.health().state is HealthState.OK
        monkeypatch.setattr(module, "HANGS_AFTER_S", -1.0)
        health = served.thread.health()
        assert (health.state, health.is_healthy) == (HealthState.HUNG, False)
        assert health.step_began is not None
        with monkeypatch.context() as patched:
            patched.setattr(served.engine.runner.programs.compiling, "is_running", True)
            assert served.thread.health().state is HealthState.COMPILING
        go_on()
        served.result("a")
        served.thread.call(lambda engine: None).result(TIMEOUT_S)
        assert served.thread.health().state is HealthState.OK
        assert served.thread.health().step_ended is not None


def test_draining_finishes_the_requests_and_takes_no_more():
    served = Served()
    served.add("a", max_tokens=20)
    served.thread.close(drain_s=TIMEOUT_S)
    with pytest.raises(EngineDeadError, match="takes no more requests"):
        served.add("b")
    assert served.thread.join(TIMEOUT_S)
    assert served.results["a"].outputs[0].finish_reason is FinishReason.LENGTH
    assert served.end == [None]
    assert served.thread.health().state is HealthState.STOPPED


def test_shutting_down_aborts_the_requests():
    served = Served()
    go_on = served.add_and_hold("a", max_tokens=40)
    served.thread.close()
    go_on()
    assert served.thread.shutdown(TIMEOUT_S)
    assert served.results["a"].outputs[0].finish_reason is FinishReason.ABORT
    assert served.results["a"].error == "the engine was shut down"
    assert served.engine.blocks.num_used_blocks == 0


def test_requests_without_a_receiver_are_dropped():
    with serving() as served:
        served.refuses = True
        served.add("a", max_tokens=40)
        while served.thread.call(lambda engine: engine.has_unfinished).result(TIMEOUT_S):
            pass
        served.refuses = False
        served.add("b")
        assert len(token_ids("b", served)) == 6


def test_statistics_are_there_without_waiting():
    with serving() as served:
        before = served.thread.latest_stats
        served.add("a")
        served.result("a")
        while served.thread.latest_stats.num_output_tokens == before.num_output_tokens:
            served.thread.call(lambda engine: None).result(TIMEOUT_S)
        assert served.thread.latest_stats.num_used_blocks == 0
