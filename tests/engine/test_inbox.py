"""Threads share the steps of one engine, and each gets its own results."""

import contextlib
import gc
import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import cache, partial
from queue import SimpleQueue

import pytest

from jpaged import LLM, FinishReason, SamplingParams
from jpaged.engine.inbox import Inbox
from jpaged.engine.outputs import StepOutput
from jpaged.request import CompletionDelta, Request, RequestOutput
from tests.support.tiny import with_few_sizes

TIMEOUT_S = 900
"""Only a failing test waits for so long."""


class Scripted:
    """An engine of requests that gain one token a step and end after ``max_tokens``. Each step waits for the test."""

    def __init__(self) -> None:
        self.left: dict[str, int] = {}
        self.streamed: set[str] = set()
        self.bad: set[str] = set()  # requests whose text cannot be made
        self.begun: SimpleQueue[str] = SimpleQueue()  # the name of the thread that makes each step
        self.go: SimpleQueue[BaseException | None] = SimpleQueue()
        self.output = StepOutput()

    @property
    def has_unfinished(self) -> bool:
        return bool(self.left)

    def add(self, request: Request, *, is_streamed: bool) -> None:
        assert request.params.max_tokens is not None
        self.left[request.request_id] = request.params.max_tokens
        if is_streamed:
            self.streamed.add(request.request_id)

    def forget(self, request_id: str) -> None:
        self.left.pop(request_id, None)

    def take(self) -> StepOutput:
        output, self.output = self.output, StepOutput()
        return output

    def step(self) -> StepOutput:
        self.begun.put(threading.current_thread().name)
        if (error := self.go.get(timeout=TIMEOUT_S)) is not None:
            raise error
        for request_id in self.left:
            self.left[request_id] -= 1
            if request_id in self.streamed:
                self.output.deltas.append(CompletionDelta(request_id, 0, "", [7]))
        for request_id in [request_id for request_id, left in self.left.items() if left == 0]:
            del self.left[request_id]
            if request_id in self.bad:
                self.output.failed[request_id] = LookupError(request_id)
            else:
                self.output.finished.append(RequestOutput(request_id, None, [1]))
        return self.take()


def in_thread(name: str, work: Callable) -> Future:
    """The future of ``work()``, which runs in a thread of that name."""
    future: Future = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future


class Callers:
    """Threads that complete requests over one inbox."""

    def __init__(self) -> None:
        self.engine = Scripted()
        self.inbox = Inbox(self.engine)  # pyright: ignore[reportArgumentType]

    def request(self, name: str, max_tokens: int) -> Request:
        return Request(name, None, [1], SamplingParams(max_tokens=max_tokens), 0)

    def generate(self, name: str, max_tokens: int) -> list[str]:
        requests = [self.request(name, max_tokens)]
        with self.inbox.expecting(lambda engine: requests, is_streamed=False) as mailbox:
            self.inbox.run_until(mailbox.is_complete)
            return [output.request_id for output in mailbox.outputs()]

    def start(self, name: str, max_tokens: int) -> Future:
        return in_thread(name, partial(self.generate, name, max_tokens))

    def stepper(self) -> str:
        """The thread that makes the next step, which has begun."""
        return self.engine.begun.get(timeout=TIMEOUT_S)

    def let_step(self, error: BaseException | None = None) -> None:
        self.engine.go.put(error)


@pytest.fixture
def callers():
    callers = Callers()
    yield callers
    assert len(callers.inbox) == 0
    assert not callers.engine.left


def start_beside(callers: Callers, first: Future, name: str, max_tokens: int) -> Future:
    """Start a thread while another one steps: its request is added before the next step."""
    started = callers.start(name, max_tokens)
    while not callers.inbox._door.locked():  # it waits for the engine
        assert not first.done()
    return started


def test_a_thread_whose_request_ends_in_anothers_step_returns_while_that_steps_on(callers):
    long = callers.start("long", 4)
    assert callers.stepper() == "long"
    short = start_beside(callers, long, "short", 1)
    callers.let_step()
    assert callers.stepper() == "long", "the request of the other thread was added before this step"
    assert set(callers.engine.left) == {"long", "short"}
    callers.let_step()
    assert short.result(TIMEOUT_S) == ["short"]
    assert callers.stepper() == "long"
    for _ in range(2):
        callers.let_step()
    assert long.result(TIMEOUT_S) == ["long"]


def test_the_thread_that_has_its_results_hands_the_steps_over(callers):
    short = callers.start("short", 2)
    assert callers.stepper() == "short"
    others = [start_beside(callers, short, "other 0", 3)]
    callers.let_step()
    assert callers.stepper() == "short"
    callers.let_step()
    assert short.result(TIMEOUT_S) == ["short"]
    assert callers.stepper() == "other 0"
    for _ in range(2):
        callers.let_step()
    assert others[0].result(TIMEOUT_S) == ["other 0"]


@pytest.mark.parametrize("error", [RuntimeError("the device broke"), KeyboardInterrupt("the user had enough")])
def test_a_failed_step_is_raised_in_its_thread_and_the_others_go_on(callers, error):
    first = callers.start("first", 9)
    callers.stepper()
    second = start_beside(callers, first, "second", 1)
    callers.let_step()
    callers.stepper()
    callers.let_step(error)
    with pytest.raises(type(error), match=str(error)):
        first.result(TIMEOUT_S)
    assert callers.stepper() == "second"
    callers.let_step()
    assert second.result(TIMEOUT_S) == ["second"]


def test_a_request_that_fails_raises_in_its_own_thread(callers):
    callers.engine.bad.add("bad")
    good = callers.start("good", 3)
    callers.stepper()
    bad = start_beside(callers, good, "bad", 1)
    for _ in range(3):
        callers.let_step()
    with pytest.raises(LookupError, match="bad"):
        bad.result(TIMEOUT_S)
    assert good.result(TIMEOUT_S) == ["good"]


def test_a_request_that_the_engine_lost_does_not_hang_its_thread(callers):
    lost = callers.start("lost", 3)
    callers.stepper()
    callers.engine.left.clear()
    callers.let_step()
    with pytest.raises(RuntimeError, match="request lost was dropped"):
        lost.result(TIMEOUT_S)


def test_requests_closed_while_another_thread_steps_end_after_that_step(callers):
    stream = contextlib.ExitStack()
    requests = [callers.request("closed", 9)]
    stream.enter_context(callers.inbox.expecting(lambda engine: requests, is_streamed=True))
    other = callers.start("other", 2)
    callers.stepper()
    stream.close()  # does not wait
    assert "closed" in callers.engine.left
    callers.let_step()
    callers.stepper()
    assert "closed" not in callers.engine.left
    callers.let_step()
    other.result(TIMEOUT_S)


def test_requests_closed_by_a_garbage_collection_inside_a_step_end_after_it(callers):
    def forgotten_stream():
        with callers.inbox.expecting(lambda engine: [callers.request("garbage", 9)], is_streamed=True):
            yield

    stream = [forgotten_stream()]
    next(stream[0])
    stream.append(stream)  # pyright: ignore[reportArgumentType] (a cycle: only a collection finds it)
    del stream
    step = callers.engine.step

    def collecting():
        gc.collect()
        assert "garbage" in callers.engine.left
        return step()

    callers.engine.step = collecting
    callers.let_step()
    assert callers.generate("other", 1) == ["other"]
    assert "garbage" not in callers.engine.left


# The whole engine -----------------------------------------------------------------------------------------------------

PROMPTS = ["import os\n", "def f(x):", "class A:\n", "for i in range(", "x = 1", "return "]


@cache
def llm() -> LLM:
    settings = {"max_num_seqs": 4, "max_num_batched_tokens": 32, "num_blocks": 64}
    return with_few_sizes(LLM(**settings, warm_up=False, use_tqdm=False))


def params(index: int) -> SamplingParams:
    return SamplingParams(seed=index, max_tokens=5 + 3 * index, ignore_eos=True)


def test_threads_that_generate_and_stream_get_their_own_tokens():
    expected = [llm().generate(p, params(i), use_tqdm=False)[0].outputs[0] for i, p in enumerate(PROMPTS)]

    def generate(index: int) -> None:
        for _ in range(3):
            [output] = llm().generate(PROMPTS[index], params(index), use_tqdm=False)
            completion = output.outputs[0]
            assert (completion.token_ids, completion.text) == (expected[index].token_ids, expected[index].text)

    def stream(index: int) -> None:
        for _ in range(3):
            deltas = list(llm().stream(PROMPTS[index], params(index)))
            assert [t for delta in deltas for t in delta.token_ids] == expected[index].token_ids
            assert "".join(delta.text for delta in deltas) == expected[index].text

    work = [partial(generate if i % 2 else stream, i) for i in range(len(PROMPTS))]
    for future in [in_thread(str(i), each) for i, each in enumerate(work)]:
        future.result(TIMEOUT_S)
    assert llm().stats().num_used_blocks == 0
    assert len(llm().inbox) == 0


def test_threads_that_pin_abort_and_are_refused_leave_each_other_alone():
    expected = llm().generate(PROMPTS[0], params(9), use_tqdm=False)[0].outputs[0].token_ids

    def generate() -> None:
        for _ in range(3):
            assert llm().generate(PROMPTS[0], params(9), use_tqdm=False)[0].outputs[0].token_ids == expected

    def pin() -> None:
        for i in range(3):
            pinned = llm().pin_prefix(f"class Stack{i}:\n    def push(self, item):\n")
            assert llm().stats().num_pinned_prefixes >= 1
            llm().unpin(pinned)

    def abort() -> None:
        for _ in range(3):
            stream = llm().stream(PROMPTS[1], params(20))
            first = next(stream)
            assert llm().abort(first.request_id)
            assert list(stream)[-1].finish_reason is FinishReason.ABORT

    def be_refused() -> None:
        for _ in range(3):
            with pytest.raises(ValueError, match="prompt 1: the prompt is empty"):
                llm().generate(["a", ""], params(0), use_tqdm=False)

    for future in [in_thread(each.__name__, each) for each in (generate, pin, abort, be_refused, generate)]:
        future.result(TIMEOUT_S)
    assert llm().stats().num_used_blocks == 0
    assert len(llm().inbox) == 0
