"""Requests and the callers that wait for them: several threads share the steps of one engine."""

from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from queue import SimpleQueue
from threading import Lock

from jpaged.engine.loop import Engine
from jpaged.engine.outputs import StepOutput
from jpaged.engine.prompts import Prompt
from jpaged.interrupts import InterruptsWait
from jpaged.request import CompletionDelta, Request, RequestOutput


class Mailbox:
    """Results and deltas of one caller's requests. Written by the thread that steps, read by the caller.

    Attributes:
        deltas: deltas that the caller has not read.
        results: results by request id, or the error that ended a request.
    """

    def __init__(self) -> None:
        self.request_ids: tuple[str, ...] = ()
        self.deltas: deque[CompletionDelta] = deque()
        self.results: dict[str, RequestOutput | Exception] = {}

    def is_complete(self) -> bool:
        """Whether every request has a result."""
        return len(self.results) == len(self.request_ids)

    def outputs(self) -> list[RequestOutput]:
        """The results in the order of the requests, once the mailbox is complete.

        Raises:
            Exception: the first error that ended a request.
        """
        outputs = []
        for request_id in self.request_ids:
            result = self.results[request_id]
            if isinstance(result, Exception):
                raise result
            outputs.append(result)
        return outputs


class Inbox:
    """Gives each result to the caller that waits for it, and lets one thread at a time touch the engine.

    Of the threads that wait, one steps for all; it hands over when it has what it waited for. Other work, such as
    adding a request, goes in between two steps and has precedence over the next step.

    Args:
        engine: the engine; from now on only the inbox steps it.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._mailboxes: dict[str, Mailbox] = {}  # by request id
        self._closed: deque[Mailbox] = deque()  # closed by their callers, not yet dropped
        self._engine_lock = Lock()  # held while a thread uses the engine
        self._door = Lock()  # held by the thread that gets the engine next
        self._turn = Lock()  # held by the thread that steps for all
        self._waiters: dict[SimpleQueue[None], Callable[[], bool]] = {}  # the others: how to wake them, and when

    def __len__(self) -> int:
        """Requests that a caller waits for, or whose result it has not taken."""
        return len(self._mailboxes)

    # The engine ---------------------------------------------------------------------------------------------------

    @contextmanager
    def between_steps(self) -> Iterator[Engine]:
        """The engine, while no thread steps it. Results that this block brought are delivered in the end."""
        try:
            with self._door, self._engine_lock:
                if self._closed:
                    with InterruptsWait():
                        self._drop_closed()
                try:
                    yield self.engine
                finally:
                    with InterruptsWait():
                        self._deliver(self.engine.take())
        finally:
            if self._closed or self._waiters:
                with InterruptsWait():
                    self._tidy_up()

    def run_until(self, is_ready: Callable[[], bool], after_step: Callable[[], None] | None = None) -> None:
        """Return once ``is_ready()``; until then step the engine, or wait while another thread does.

        Args:
            is_ready: asked after every step, by whichever thread made it.
            after_step: called after every step that this thread made.

        Raises:
            Exception: a step of this thread failed. The requests of others go on.
        """
        with InterruptsWait() as interrupts:
            try:
                while not is_ready():
                    if self._turn.acquire(blocking=False):
                        try:
                            self._step_until(is_ready, after_step, interrupts)
                        finally:
                            self._turn.release()
                    else:
                        self._wait(is_ready, interrupts)
            finally:
                if self._waiters:
                    self._hand_over()

    def _step_until(
        self, is_ready: Callable[[], bool], after_step: Callable[[], None] | None, interrupts: InterruptsWait
    ) -> None:
        while not is_ready():
            if interrupts.num_pending:
                interrupts.check()
            with self._door:
                self._engine_lock.acquire()
            try:
                if self._closed:
                    self._drop_closed()
                self._deliver(self.engine.step())
                if not self.engine.has_unfinished:
                    self._end_dropped()
            finally:
                self._engine_lock.release()
                if self._closed or self._waiters:
                    self._tidy_up()
            if after_step is not None:
                after_step()

    def _wait(self, is_ready: Callable[[], bool], interrupts: InterruptsWait) -> None:
        """Wait until another thread's step made this one ready, or until no thread steps."""
        gate: SimpleQueue[None] = SimpleQueue()
        self._waiters[gate] = is_ready
        try:
            # The thread that steps releases its turn before it looks for a waiter: either sees the other.
            if self._turn.locked() and not is_ready():
                with interrupts.let_through():
                    gate.get()
        finally:
            del self._waiters[gate]

    def _hand_over(self) -> None:
        """Wake a thread that steps from now on, in case none does."""
        gate = next(iter(list(self._waiters)), None)
        if gate is not None:
            gate.put(None)

    def pin(self, pin_id: str, prefix: Prompt) -> int:
        """Compute a prefix and keep it in the pool; an error leaves nothing of it. Returns its number of tokens.

        Raises:
            ValueError: as ``Engine.pin``.
        """
        try:
            with self.between_steps() as engine:
                token_ids = engine.pin(pin_id, prefix)
            self.run_until(lambda: engine.is_pinned(pin_id))
        except BaseException:
            with suppress(ValueError), self.between_steps() as engine:  # it may have been refused
                engine.unpin(pin_id)
            raise
        return len(token_ids)

    # Mail ---------------------------------------------------------------------------------------------------------

    @contextmanager
    def expecting(self, make_requests: Callable[[Engine], list[Request]], *, is_streamed: bool) -> Iterator[Mailbox]:
        """Add requests, and leave no trace of them in the end, finished or not.

        Args:
            make_requests: makes the requests while no thread steps.
            is_streamed: whether the caller wants their deltas.

        Raises:
            ValueError: a request is refused; none of them was added.
        """
        mailbox = Mailbox()
        try:
            with self.between_steps() as engine:
                requests = make_requests(engine)
                mailbox.request_ids = tuple([request.request_id for request in requests])
                self._mailboxes |= dict.fromkeys(mailbox.request_ids, mailbox)
                for request in requests:
                    engine.add(request, is_streamed=is_streamed)
            yield mailbox
        finally:
            with InterruptsWait():
                # A garbage collection may close a stream while this thread uses the engine: never wait for it here.
                self._closed.append(mailbox)
                self._tidy_up()

    def stream(self, requests: list[Request]) -> Generator[CompletionDelta]:
        """Add requests, and yield their deltas as they come.

        Raises:
            ValueError: when first read, if a request is refused.
            Exception: the first error that ended a request.
        """
        numbers = {request.request_id: number for number, request in enumerate(requests)}
        with self.expecting(lambda engine: requests, is_streamed=True) as mailbox:
            while True:
                while mailbox.deltas:
                    delta = mailbox.deltas.popleft()
                    if delta.logprobs is not None:
                        delta = delta._replace(logprobs=list(delta.logprobs))
                    yield delta._replace(prompt_index=numbers[delta.request_id]) if numbers[delta.request_id] else delta
                if mailbox.is_complete():
                    mailbox.outputs()  # raises the error of a request that failed
                    return
                self.run_until(lambda: bool(mailbox.deltas) or mailbox.is_complete())

    def _deliver(self, output: StepOutput) -> None:
        for delta in output.deltas:
            if (mailbox := self._mailboxes.get(delta.request_id)) is not None:
                mailbox.deltas.append(delta)
        for result in output.finished:
            if (mailbox := self._mailboxes.get(result.request_id)) is not None:
                mailbox.results[result.request_id] = result
        for request_id, error in output.failed.items():
            if (mailbox := self._mailboxes.get(request_id)) is not None:
                mailbox.results[request_id] = error

    def _end_dropped(self) -> None:
        """Give requests that the engine lost an error, or their callers would wait forever."""
        for request_id, mailbox in self._mailboxes.items():
            if request_id not in mailbox.results:
                mailbox.results[request_id] = RuntimeError(f"request {request_id} was dropped and will never finish")

    def _drop_closed(self) -> None:
        while self._closed:
            for request_id in self._closed.popleft().request_ids:
                self.engine.forget(request_id)
                self._mailboxes.pop(request_id, None)

    def _tidy_up(self) -> None:
        """Drop what was closed while the engine was in use, and wake the threads that have what they wait for."""
        while self._closed and self._engine_lock.acquire(blocking=False):
            try:
                self._drop_closed()
            finally:
                self._engine_lock.release()
        for gate, is_ready in list(self._waiters.items()):
            if is_ready():
                gate.put(None)
