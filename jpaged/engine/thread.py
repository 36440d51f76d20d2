"""The engine thread: the one thread that owns an engine, and does between two steps what others ask for."""

import atexit
import logging
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import replace
from queue import Empty, SimpleQueue
from time import monotonic
from typing import Any

from jpaged.engine.bursts import Bursts
from jpaged.engine.health import HANGS_AFTER_S, MAX_FAILURES, EngineDeadError, Health, HealthState
from jpaged.engine.loop import Engine
from jpaged.engine.outputs import StepOutput
from jpaged.engine.prompts import Prompt
from jpaged.engine.stats import EngineStats
from jpaged.request import FinishReason, Request

STATS_EVERY_S = 0.5
"""While steps run, ``EngineThread.latest_stats`` is at most this old at the end of a step."""

FIRST_RETRY_S, LAST_RETRY_S = 0.1, 2.0
"""Waits before a failed step is retried: each is twice the one before, up to the last."""

_log = logging.getLogger(__name__)

_Order = tuple[Future[Any], Callable[[Engine], Any]]


class EngineThread:
    """Steps an engine in a thread of its own while a request is unfinished, and obeys orders between two steps.

    A step that fails is retried: the content of the pools is forgotten, and the requests are computed again. After
    ``MAX_FAILURES`` failures in a row, the requests that ran end with ``FinishReason.ERROR``, and others get their
    chance.

    Args:
        engine: the engine; from now on only this thread touches it.
        deliver: takes all that one iteration brought, in this thread, once an iteration.
        on_end: called in this thread when it ends, with the error that ended it, if one did.
    """

    def __init__(
        self,
        engine: Engine,
        deliver: Callable[[StepOutput], None],
        on_end: Callable[[BaseException | None], None] = lambda error: None,
    ) -> None:
        self._engine = engine
        self._deliver = deliver
        self._on_end = on_end
        self._orders: SimpleQueue[_Order] = SimpleQueue()
        self._lock = threading.Lock()  # orders are given before the end, or refused
        self._is_closed = False  # no more requests are taken
        self._is_ended = False
        self._stop_at: float | None = None  # when unfinished requests are aborted, and the thread ends
        self._is_woken = threading.Event()  # ends the wait before a retry
        self._error: BaseException | None = None  # of the last step, or the one that ended the thread
        self._num_failures = 0
        self._bursts = Bursts(engine.scheduler)
        self._step_began: float | None = None
        self._step_ended: float | None = None
        self._pins: dict[str, Future[None]] = {}  # not computed yet
        self.latest_stats: EngineStats = engine.stats()
        """Statistics of a moment ago, for readers that never wait for a step."""
        self._stats_read = monotonic()
        self._thread = threading.Thread(target=self._run, name="jpaged-engine", daemon=True)
        self._thread.start()
        atexit.register(self.shutdown)

    # Orders -------------------------------------------------------------------------------------------------------

    def call[T](self, work: Callable[[Engine], T]) -> Future[T]:
        """Run ``work`` on the engine between two steps; the future has its result.

        Raises:
            EngineDeadError: in the future, if the thread has ended, or ends before.
        """
        future: Future[T] = Future()
        with self._lock:
            if not self._is_ended:
                self._orders.put((future, work))
                return future
        future.set_exception(self._dead_error())
        return future

    def add(self, request: Request, *, is_streamed: bool) -> Future[None]:
        """Queue a request, as ``Engine.add`` does.

        Raises:
            EngineDeadError: in the future, if no more requests are taken.
            ValueError: in the future, if the engine refuses the request.
        """

        def add(engine: Engine) -> None:
            self.check_open()
            engine.add(request, is_streamed=is_streamed)

        return self.call(add)

    def check_open(self) -> None:
        """Raise EngineDeadError if no more requests are taken."""
        if self._is_closed:
            raise self._dead_error()

    def abort(self, request_id: str) -> Future[bool]:
        """End a request, as ``Engine.abort`` does: its result is delivered."""
        return self.call(lambda engine: engine.abort(request_id))

    def drop(self, request_ids: Iterable[str]) -> None:
        """End requests that have no consumer; their results are delivered before any later order is carried out."""

        def drop(engine: Engine) -> None:
            for request_id in request_ids:
                engine.abort(request_id)
            self._hand_over(engine.take())

        self.call(drop)

    def pin(self, pin_id: str, prefix: Prompt) -> Future[int]:
        """Compute a prefix and keep it in the pool until ``unpin``; the future has its tokens once it is there.

        Raises:
            ValueError: in the future, as ``Engine.pin``.
        """
        pinned: Future[int] = Future()
        pinned.set_running_or_notify_cancel()  # it cannot be cancelled: unpin does that

        def pin(engine: Engine) -> None:
            self.check_open()
            token_ids = engine.pin(pin_id, prefix)
            computed: Future[None] = Future()
            computed.add_done_callback(lambda done: _pass_on(done, pinned, len(token_ids)))
            self._pins[pin_id] = computed

        self.call(pin).add_done_callback(lambda done: pinned.set_exception(e) if (e := done.exception()) else None)
        return pinned

    def unpin(self, pin_id: str) -> Future[None]:
        """Let a prefix go, as ``Engine.unpin`` does."""

        def unpin(engine: Engine) -> None:
            engine.unpin(pin_id)
            if (computed := self._pins.pop(pin_id, None)) is not None:
                computed.set_exception(ValueError("the prefix was unpinned before it was computed"))

        return self.call(unpin)

    # Life ---------------------------------------------------------------------------------------------------------

    def health(self) -> Health:
        """The health now. Takes no lock and waits for nothing."""
        error = None if self._error is None else f"{type(self._error).__name__}: {self._error}"
        steps = self._num_failures, self._step_began, self._step_ended
        return Health(self._state(), error, *steps, self._engine.runner.programs.background.progress)

    def close(self, drain_s: float = 0.0) -> None:
        """Take no more requests, and end the thread once those that it has are finished. Does not wait.

        Args:
            drain_s: seconds until unfinished requests are aborted; a later call shortens the time.
        """
        self._is_closed = True
        stop_at = monotonic() + drain_s
        if self._stop_at is None or stop_at < self._stop_at:
            self._stop_at = stop_at
        self._is_woken.set()
        self.call(lambda engine: None)  # wakes the thread
        atexit.unregister(self.shutdown)

    @property
    def is_ended(self) -> bool:
        """Whether the thread does nothing more: every order is refused."""
        return self._is_ended

    def join(self, timeout_s: float | None = None) -> bool:
        """Wait for the end of the thread. Returns whether it has ended."""
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def shutdown(self, timeout_s: float | None = HANGS_AFTER_S) -> bool:
        """Abort all requests, and end the thread after the step that runs. Returns whether it has ended."""
        self.close()
        return self.join(timeout_s)

    def _state(self) -> HealthState:
        if self._is_ended or not self._thread.is_alive():
            return HealthState.STOPPED if self._is_closed and self._error is None else HealthState.DEAD
        compiling = self._engine.runner.programs.compiling
        began = self._step_began
        if began is not None:
            if compiling.is_running:
                return HealthState.COMPILING
            if monotonic() - max(began, compiling.ended) > HANGS_AFTER_S:
                return HealthState.HUNG
        if self._num_failures >= MAX_FAILURES:
            return HealthState.FAILING
        return HealthState.DRAINING if self._is_closed else HealthState.OK

    def _dead_error(self) -> EngineDeadError:
        if self._is_ended and self._error is not None:
            return EngineDeadError(f"the engine has ended with {type(self._error).__name__}: {self._error}")
        return EngineDeadError("the engine is shut down: it takes no more requests")

    # In the thread ------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        error: BaseException | None = None
        try:
            while self._obey():
                self._step()
            self._abort_all()
        except BaseException as caught:
            _log.critical("the engine thread ends with an error", exc_info=True)
            error = caught
        finally:
            self._end(error)

    def _obey(self) -> bool:
        """Do what was asked for; wait for it while there is nothing to compute. Returns whether to go on."""
        while True:
            has_work = self._engine.has_unfinished or self._engine.scheduler.has_unfinished
            if self._stop_at is not None and (not has_work or monotonic() >= self._stop_at):
                return False
            try:
                future, work = self._orders.get_nowait() if has_work else self._wait()
            except Empty:
                return True
            if future.set_running_or_notify_cancel():
                _carry_out(future, work, self._engine)

    def _wait(self) -> _Order:
        """The next order; what aborts brought, and statistics, are handed over before the wait."""
        if self._orders.empty():
            self._hand_over(self._engine.take())
            self._read_stats()
        return self._orders.get()

    def _step(self) -> None:
        """Make one step and deliver its output."""
        began = self._step_began = monotonic()
        try:
            output = self._engine.step()
        except Exception as error:
            self._step_ended, self._step_began = monotonic(), None
            self._retry_or_give_up(error)
            return
        self._step_ended, self._step_began = monotonic(), None
        self._num_failures, self._error = 0, None
        for pin_id in [pin_id for pin_id in self._pins if self._engine.is_pinned(pin_id)]:
            self._pins.pop(pin_id).set_result(None)
        self._hand_over(replace(output, seconds=self._step_ended - began))
        if output.num_steps > 0:
            self._bursts.note_step((self._step_ended - began) / output.num_steps)
        if self._step_ended - self._stats_read > STATS_EVERY_S:
            self._read_stats()

    def _retry_or_give_up(self, error: Exception) -> None:
        """After a failed step: wait for a moment, or end the requests that ran in it."""
        self._num_failures += 1
        self._error = error
        _log.error("a step failed, %d in a row", self._num_failures, exc_info=error)
        if self._num_failures % MAX_FAILURES == 0:
            answers, is_pin = self._engine.outputs.answers, self._engine.scheduler.is_pin
            failed = [each for each in self._engine.failed_step if each in answers or is_pin(each)]
            message = f"{MAX_FAILURES} steps in a row failed, the last with {type(error).__name__}"
            for request_id in failed or list(answers):  # all, if the error came before any of them ran
                self._engine.abort(request_id, reason=FinishReason.ERROR, error=message)
                if is_pin(request_id):
                    self._engine.unpin(request_id)
                    if (computed := self._pins.pop(request_id, None)) is not None:
                        computed.set_exception(RuntimeError(message))
            self._hand_over(self._engine.take())
        self._is_woken.wait(min(FIRST_RETRY_S * 2 ** min(self._num_failures - 1, 10), LAST_RETRY_S))

    def _hand_over(self, output: StepOutput) -> None:
        if output.is_empty:
            return
        try:
            self._deliver(output)
        except Exception:
            _log.exception("outputs cannot be delivered: all requests are dropped")
            for request_id in list(self._engine.outputs.answers):
                self._engine.forget(request_id)

    def _read_stats(self) -> None:
        self.latest_stats = self._engine.stats()
        self._stats_read = monotonic()

    def _abort_all(self) -> None:
        for request_id in list(self._engine.outputs.answers):
            self._engine.abort(request_id, error="the engine was shut down")
        self._hand_over(self._engine.take())

    def _end(self, error: BaseException | None) -> None:
        """Refuse further orders, and give those that wait an error: no caller hangs."""
        with self._lock:
            self._error = error
            self._is_closed = self._is_ended = True
        self._engine.runner.programs.background.stop()
        while not self._orders.empty():
            future, _ = self._orders.get()
            if future.set_running_or_notify_cancel():
                future.set_exception(self._dead_error())
        for computed in self._pins.values():
            computed.set_exception(self._dead_error())
        self._on_end(error)


def _carry_out(future: Future[Any], work: Callable[[Engine], Any], engine: Engine) -> None:
    """Run ``work`` and keep its result or its error. An error that ends threads ends this one too."""
    try:
        result = work(engine)
    except BaseException as error:
        future.set_exception(error)
        if not isinstance(error, Exception):
            raise
    else:
        future.set_result(result)


def _pass_on(computed: Future[None], pinned: Future[int], num_tokens: int) -> None:
    if (error := computed.exception()) is not None:
        pinned.set_exception(error)
    else:
        pinned.set_result(num_tokens)
