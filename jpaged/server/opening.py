"""The streams of one call: each is open from its prompt's turn on, whether or not it is the turn of the others."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from jpaged.engine.request_stream import RequestStream

OpenOne = Callable[[int], Awaitable[RequestStream]]
"""Waits for the turn of a prompt, by its number, and gives the prompt to the engine."""


class Opening:
    """Opens the streams of a call's prompts. Used in the thread of its event loop alone.

    Args:
        num_prompts: prompts of the call.
        open_one: opens the stream of a prompt.
        on_open: called with each stream.

    Attributes:
        streams: by prompt, the stream; None before it is open.
    """

    def __init__(self, num_prompts: int, open_one: OpenOne, on_open: Callable[[], None]) -> None:
        self.streams: list[RequestStream | None] = [None] * num_prompts
        self._open_one = open_one
        self._on_open = on_open
        self._tasks = [asyncio.ensure_future(self._open(number)) for number in range(num_prompts)]

    def __len__(self) -> int:
        return len(self._tasks)

    @property
    def open_streams(self) -> Sequence[RequestStream]:
        """The streams that are open."""
        return [stream for stream in self.streams if stream is not None]

    async def stream(self, number: int) -> RequestStream:
        """The stream of a prompt, once it is open.

        Raises:
            ApiError: the prompt was refused, or waited for too long.
        """
        return await asyncio.shield(self._tasks[number])

    def watch(self, on_open: Callable[[int, RequestStream], None], on_error: Callable[[BaseException], None]) -> None:
        """Call ``on_open`` with the number of each prompt whose stream opens, and ``on_error`` if one is refused."""

        def note(number: int, task: asyncio.Future[RequestStream]) -> None:
            if task.cancelled():
                return
            error = task.exception()
            if error is None:
                on_open(number, task.result())
            else:
                on_error(error)

        for number, task in enumerate(self._tasks):
            task.add_done_callback(lambda task, number=number: note(number, task))

    async def close(self) -> None:
        """Open no more, and end what is open."""
        for task in self._tasks:
            task.cancel()
        try:
            await asyncio.gather(*self._tasks, return_exceptions=True)
        finally:
            for stream in self.open_streams:
                stream.close()

    async def _open(self, number: int) -> RequestStream:
        stream = self.streams[number] = await self._open_one(number)
        self._on_open()
        return stream
