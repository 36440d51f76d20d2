"""The way from the engine thread to the tasks of an event loop: each output to the stream that waits for it."""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress

from jpaged.engine.health import EngineDeadError
from jpaged.engine.loop import Engine
from jpaged.engine.outputs import StepOutput
from jpaged.engine.request_stream import RequestStream
from jpaged.engine.thread import EngineThread
from jpaged.request import FinishReason, Request, RequestOutputKind

Listener = Callable[[StepOutput], None]
"""Takes the output of every step, in the event loop: for metrics. Results of requests without a consumer are in it."""

_log = logging.getLogger(__name__)


class _Arrivals:
    """Things on their way to an event loop. One callback takes all that wait, in order.

    Args:
        loop: the loop.
        notify: called in the loop when things have come.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, notify: Callable[["_Arrivals"], None]) -> None:
        self._loop = loop
        self._notify = notify
        self._waiting: deque[StepOutput | RequestStream] = deque()
        self._is_due = False  # a callback is on its way, and takes all that is appended before it begins

    def put(self, each: StepOutput | RequestStream) -> None:
        """Send one to the loop; from any thread."""
        self._waiting.append(each)
        if self._is_due:
            return
        self._is_due = True
        try:
            self._loop.call_soon_threadsafe(self._notify, self)
        except RuntimeError:  # the loop is closed
            self._waiting.clear()
            self._is_due = False
            raise

    def take(self) -> Iterator[StepOutput | RequestStream]:
        """Those that wait now; in the loop."""
        self._is_due = False
        for _ in range(len(self._waiting)):
            yield self._waiting.popleft()


class Dispatcher:
    """Starts the engine thread, and hands what each step brought to the streams of one event loop, in one call.

    All methods are for the thread of that loop.

    Args:
        engine: the engine; from now on only the thread touches it.

    Attributes:
        thread: the engine thread.
        listeners: called with the output of every step, before the streams get it.
    """

    def __init__(self, engine: Engine) -> None:
        self.listeners: list[Listener] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._arrivals: _Arrivals | None = None  # of that loop
        self._request_ids: set[str] = set()  # in use
        self._streams: dict[str, RequestStream] = {}  # of the requests that the engine has
        self._ended: list[asyncio.Future[None]] = []  # the tasks that wait for the end
        self._num_outputs = 0  # distributed so far
        self.thread = EngineThread(engine, self._hand_over, self._note_end)

    @property
    def num_unfinished(self) -> int:
        """Requests whose streams have not ended."""
        return len(self._request_ids)

    @contextmanager
    def reserve(self, request_id: str) -> Iterator[asyncio.AbstractEventLoop]:
        """The running loop, for a block that adds a request; an error in the block gives the id back.

        Raises:
            ValueError: the id is in use.
            EngineDeadError: no more requests are taken.
            RuntimeError: requests of another loop are unfinished.
        """
        loop = self._bind()
        if request_id in self._request_ids:
            raise ValueError(f"request_id {request_id!r} is already in use by an unfinished request")
        self.thread.check_open()
        self._request_ids.add(request_id)
        try:
            yield loop
        except BaseException:
            self._release(request_id)
            raise

    async def add(self, request: Request, max_unread_tokens: int) -> RequestStream:
        """Give a request, whose id is reserved, to the engine. Returns its stream once the engine has accepted it.

        Raises:
            ValueError: the engine refuses the request.
            EngineDeadError: no more requests are taken.
        """
        self._bind()
        arrivals, stream = self._arrivals, RequestStream(request, self._drop, max_unread_tokens)

        def register(added: Future[None]) -> None:
            # In the engine's thread: outputs of an earlier request of this id are on their way to the loop before this.
            if arrivals is not None and not added.cancelled() and added.exception() is None:
                arrivals.put(stream)

        added = self.thread.add(request, is_streamed=request.params.output_kind is not RequestOutputKind.FINAL_ONLY)
        added.add_done_callback(register)
        try:
            await asyncio.wrap_future(added)
        except asyncio.CancelledError:
            stream.close()
            raise
        return stream

    async def wait_for_the_end(self) -> None:
        """Return once the thread has ended."""
        ended = self._bind().create_future()
        self._ended.append(ended)
        if not self.thread.is_ended:
            await ended

    def _bind(self) -> asyncio.AbstractEventLoop:
        """The running loop, which is that of all open streams."""
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            if self._loop is not None and not self._loop.is_closed() and self._request_ids:
                raise RuntimeError("requests of another event loop are unfinished: use one loop, or one AsyncLLM each")
            self.thread.drop(self._request_ids)
            self._request_ids = set()
            self._streams.clear()
            self._loop, self._arrivals = loop, _Arrivals(loop, self._take)
        return loop

    def _hand_over(self, output: StepOutput) -> None:
        """Give an output to the loop; called in the engine's thread."""
        if self._arrivals is not None:
            self._arrivals.put(output)

    def _take(self, arrivals: _Arrivals) -> None:
        """Take what has arrived, and then let each consumer read all of its own at once."""
        gained: dict[RequestStream, None] = {}
        for each in arrivals.take():
            if isinstance(each, RequestStream):
                self._register(each)
            else:
                self._distribute(each, gained)
        for stream in gained:
            stream.wake()

    def _distribute(self, output: StepOutput, gained: dict[RequestStream, None]) -> None:
        """Give an output to its streams; those with deltas enter ``gained``."""
        for listener in self.listeners:
            try:
                listener(output)
            except Exception:
                _log.exception("a listener failed")
        streams = self._streams
        self._num_outputs += 1
        for request_id, first in output.started.items():
            if (stream := streams.get(request_id)) is not None:
                stream.num_cached_tokens = first.num_cached_tokens
        for delta in output.deltas:
            stream = streams.get(delta.request_id)
            if stream is not None:
                gained[stream] = None
                if not stream.take(delta, self._num_outputs):
                    self._drop(delta.request_id)
        for result in output.finished:
            if (stream := streams.get(result.request_id)) is not None:
                self._release(result.request_id)
                stream.finish(result)
        for request_id, error in output.failed.items():
            if (stream := streams.get(request_id)) is not None:
                self._release(request_id)
                stream.break_off(FinishReason.ERROR, f"the text cannot be made ({type(error).__name__}: {error})")

    def _register(self, stream: RequestStream) -> None:
        if not stream.is_over:
            self._streams[stream.request_id] = stream

    def _release(self, request_id: str) -> None:
        """Let others have the id of a request that has ended."""
        self._request_ids.discard(request_id)
        self._streams.pop(request_id, None)

    def _drop(self, request_id: str) -> None:
        """End a request that has no consumer any more."""
        self._release(request_id)
        self.thread.drop([request_id])

    def _note_end(self, error: BaseException | None) -> None:
        """Tell the loop of the end; the last call of the engine's thread."""
        if self._loop is not None:
            with suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._end_all, error)

    def _end_all(self, error: BaseException | None) -> None:
        for stream in self._streams.values():
            reason = "it was shut down" if error is None else f"{type(error).__name__}: {error}"
            stream.finish(EngineDeadError(f"the engine has ended ({reason})"))
        self._streams.clear()
        self._request_ids.clear()
        for ended in self._ended:
            if not ended.done():
                ended.set_result(None)
