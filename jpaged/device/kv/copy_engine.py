"""Copies between host and device that run beside programs: a GPU's copy engine, and plain copies elsewhere.

Programs start a copy and wait for it by callbacks. A callback runs while its program is enqueued, and orders a stream
of its own against that of the program.
"""

import ctypes
import time
import weakref
from collections.abc import Iterable
from typing import Any, Protocol

import jax
import numpy as np
from jaxtyping import Bool, Int64, Integer

from jpaged.device.kv.pinned import call_driver

STRIDED = np.dtype([(name, np.uint64) for name in ("src", "src_pitch", "dst", "dst_pitch", "width", "num_rows")])
"""Copies of rows of bytes at equal distances, from host memory to device memory or back.

src, src_pitch: address of the first row, and bytes from one row to the next one.
dst, dst_pitch: the same of the copy.
width, num_rows: bytes of a row, and rows.
"""

Copies = np.ndarray[tuple[int], np.dtype[np.void]]
"""Copies of type ``STRIDED``: a step may start thousands of them for each layer."""


def strided(*columns: Integer[np.ndarray, " copies"] | int) -> Copies:
    """Copies by the columns of ``STRIDED``, in its order; a number is that of all copies."""
    assert len(columns) == len(STRIDED.names or ())
    copies: Any = np.empty(np.broadcast_shapes((1,), *map(np.shape, columns)), STRIDED)
    for name, column in zip(STRIDED.names or (), columns, strict=True):
        copies[name] = column
    return copies


def runs_of(
    slots: Integer[np.ndarray, " n"], slots_per_piece: int, is_first: Bool[np.ndarray, " n"]
) -> tuple[Int64[np.ndarray, " runs"], Int64[np.ndarray, " runs"]]:
    """Divide slots into runs of neighbours in one piece, each of which one copy moves.

    Args:
        slots: the slots.
        slots_per_piece: no copy spans slots of two pieces of so many.
        is_first: slots that start a run in any case.

    Returns:
        The index at which each run starts, and its slots.
    """
    is_first = is_first | (np.diff(slots, prepend=-2) != 1) | (slots % slots_per_piece == 0)
    starts = np.flatnonzero(is_first)
    return starts, np.diff(starts, append=len(slots))


class Timed(Protocol):
    """Copies that the host observes, from any thread."""

    def is_over(self) -> bool:
        """Whether the copies are over."""
        ...

    def wait(self) -> None:
        """Wait until the copies are over."""
        ...

    def seconds(self) -> float:
        """The duration of copies that are over."""
        ...


class Copier(Protocol):
    """Runs copies in the order in which they start.

    Args of the methods:
        stream: handle of the stream of the program that calls (``stream_of``).
        buffer: number of the buffer that the copies read or fill.
    """

    def start(self, stream: int | None, buffer: int, copies: Copies) -> None:
        """Start copies once the program has come to this point."""
        ...

    def start_timed(self, stream: int | None, buffer: int, copies: Copies) -> Timed:
        """Start copies as ``start`` does, for a host that observes them."""
        ...

    def wait(self, stream: int | None, buffer: int) -> None:
        """Let the program go on once the copies that started last for this buffer are over."""
        ...

    def finish(self) -> None:
        """Wait, from any thread, until all copies are over."""
        ...


def stream_of(context: Any) -> int | None:
    """The handle of the stream of the program that calls; None on a CPU, whose programs have none."""
    try:
        return context.stream
    except jax.errors.JaxRuntimeError:
        return None


class PlainCopier:
    """Copies at once, for devices whose memory is the machine's."""

    def start(self, stream: int | None, buffer: int, copies: Copies) -> None:
        del stream, buffer
        for src, src_pitch, dst, dst_pitch, width, num_rows in copies.tolist():
            for row in range(num_rows):
                ctypes.memmove(dst + row * dst_pitch, src + row * src_pitch, width)

    def start_timed(self, stream: int | None, buffer: int, copies: Copies) -> Timed:
        started = time.perf_counter()
        self.start(stream, buffer, copies)
        return _Past(time.perf_counter() - started)

    def wait(self, stream: int | None, buffer: int) -> None:
        pass  # the copies are over

    def finish(self) -> None:
        pass  # the copies are over


class _Past:
    """Copies that were over when they had started."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def is_over(self) -> bool:
        return True

    def wait(self) -> None:
        pass

    def seconds(self) -> float:
        return self._seconds


class CopyEngine:
    """Copies by a GPU's copy engine, on a stream of its own. Made on first use, in the context of the caller."""

    def __init__(self) -> None:
        self._stream: ctypes.c_void_p | None = None
        self._context = ctypes.c_void_p()
        self._reached: dict[int, ctypes.c_void_p] = {}
        self._copied: dict[int, ctypes.c_void_p] = {}

    def start(self, stream: int | None, buffer: int, copies: Copies) -> None:
        self._reach(stream, buffer)
        self._copy(buffer, copies)

    def start_timed(self, stream: int | None, buffer: int, copies: Copies) -> Timed:
        self._reach(stream, buffer)
        first, last = _new_event(), _new_event()
        call_driver("cuEventRecord", first, self._stream)
        self._copy(buffer, copies)
        call_driver("cuEventRecord", last, self._stream)
        return _BetweenEvents(self._context, first, last)

    def wait(self, stream: int | None, buffer: int) -> None:
        call_driver("cuStreamWaitEvent", ctypes.c_void_p(stream), self._copied[buffer], ctypes.c_uint(0))

    def finish(self) -> None:
        if self._stream is not None:
            call_driver("cuCtxSetCurrent", self._context)
            call_driver("cuStreamSynchronize", self._stream)

    def _reach(self, stream: int | None, buffer: int) -> None:
        """Let the next copies wait until the program has come to this point."""
        if self._stream is None:
            call_driver("cuCtxGetCurrent", ctypes.byref(self._context))
            self._stream = ctypes.c_void_p()
            call_driver("cuStreamCreate", ctypes.byref(self._stream), ctypes.c_uint(_NON_BLOCKING))
        if buffer not in self._copied:
            self._reached[buffer], self._copied[buffer] = _new_event(_NO_TIMING), _new_event(_NO_TIMING)
        call_driver("cuEventRecord", self._reached[buffer], ctypes.c_void_p(stream))
        call_driver("cuStreamWaitEvent", self._stream, self._reached[buffer], ctypes.c_uint(0))

    def _copy(self, buffer: int, copies: Copies) -> None:
        for described in _described(copies):
            call_driver("cuMemcpy2DAsync_v2", ctypes.byref(described), self._stream)
        call_driver("cuEventRecord", self._copied[buffer], self._stream)


class _BetweenEvents:
    """Copies between two events of their stream. The events are destroyed with this object."""

    def __init__(self, context: ctypes.c_void_p, first: ctypes.c_void_p, last: ctypes.c_void_p) -> None:
        self._context, self._first, self._last = context, first, last
        weakref.finalize(self, _destroy, context, first, last).atexit = False

    def is_over(self) -> bool:
        call_driver("cuCtxSetCurrent", self._context)
        return call_driver("cuEventQuery", self._last)

    def wait(self) -> None:
        call_driver("cuCtxSetCurrent", self._context)
        call_driver("cuEventSynchronize", self._last)

    def seconds(self) -> float:
        milliseconds = ctypes.c_float()
        call_driver("cuCtxSetCurrent", self._context)
        call_driver("cuEventElapsedTime", ctypes.byref(milliseconds), self._first, self._last)
        return milliseconds.value / 1000


_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: does not wait for the default stream
_NO_TIMING = 2  # CU_EVENT_DISABLE_TIMING
_UNIFIED = 4  # CU_MEMORYTYPE_UNIFIED: the address says whose memory it is


class _Copy2D(ctypes.Structure):
    """CUDA_MEMCPY2D, as the driver defines it. Addresses are numbers."""

    _fields_ = [
        ("srcXInBytes", ctypes.c_size_t),
        ("srcY", ctypes.c_size_t),
        ("srcMemoryType", ctypes.c_uint),
        ("srcHost", ctypes.c_size_t),
        ("srcDevice", ctypes.c_uint64),
        ("srcArray", ctypes.c_size_t),
        ("srcPitch", ctypes.c_size_t),
        ("dstXInBytes", ctypes.c_size_t),
        ("dstY", ctypes.c_size_t),
        ("dstMemoryType", ctypes.c_uint),
        ("dstHost", ctypes.c_size_t),
        ("dstDevice", ctypes.c_uint64),
        ("dstArray", ctypes.c_size_t),
        ("dstPitch", ctypes.c_size_t),
        ("WidthInBytes", ctypes.c_size_t),
        ("Height", ctypes.c_size_t),
    ]


_FIELDS = {
    "src": "srcDevice",
    "src_pitch": "srcPitch",
    "dst": "dstDevice",
    "dst_pitch": "dstPitch",
    "width": "WidthInBytes",
    "num_rows": "Height",
}
"""Columns of ``STRIDED`` -> fields of ``_Copy2D``."""


def _described(copies: Copies) -> Iterable[_Copy2D]:
    """Copies as the driver takes them: one by one in Python would take as long as the copies."""
    described: Any = np.zeros(len(copies), np.dtype(_Copy2D))
    described["srcMemoryType"] = described["dstMemoryType"] = _UNIFIED
    for column, name in _FIELDS.items():
        described[name] = copies[column]
    return (_Copy2D * len(copies)).from_buffer(described) if len(copies) else ()


def _new_event(flags: int = 0) -> ctypes.c_void_p:
    event = ctypes.c_void_p()
    call_driver("cuEventCreate", ctypes.byref(event), ctypes.c_uint(flags))
    return event


def _destroy(context: ctypes.c_void_p, *events: ctypes.c_void_p) -> None:
    call_driver("cuCtxSetCurrent", context)
    for event in events:
        call_driver("cuEventDestroy_v2", event)
