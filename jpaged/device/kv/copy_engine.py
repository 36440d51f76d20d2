"""Copies of host memory that run beside programs: a GPU's copy engine, and plain copies elsewhere.

Programs start a copy and wait for it by callbacks. A callback runs while its program is enqueued, and orders a stream
of its own against that of the program.
"""

import ctypes
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from jpaged.device.kv.pinned import call_driver


class Strided(NamedTuple):
    """Rows of bytes at equal distances, in host memory and in device memory.

    Args:
        src: address of the first row, on the host.
        src_pitch: bytes from one row to the next one there.
        dst: address of the first row, on the device.
        dst_pitch: bytes from one row to the next one there.
        width: bytes of a row.
        num_rows: rows.
    """

    src: int
    src_pitch: int
    dst: int
    dst_pitch: int
    width: int
    num_rows: int


class Copier(Protocol):
    """Runs copies in the order in which they start.

    Args of the methods:
        stream: handle of the stream of the program that calls; None on a CPU.
        buffer: number of the buffer that the copies fill.
    """

    def start(self, stream: int | None, buffer: int, copies: Sequence[Strided]) -> None:
        """Start copies once the program has come to this point."""
        ...

    def wait(self, stream: int | None, buffer: int) -> None:
        """Let the program go on once the copies that started last for this buffer are over."""
        ...


class PlainCopier:
    """Copies at once, for devices whose memory is the machine's."""

    def start(self, stream: int | None, buffer: int, copies: Sequence[Strided]) -> None:
        del stream, buffer
        for copy in copies:
            for row in range(copy.num_rows):
                src, dst = copy.src + row * copy.src_pitch, copy.dst + row * copy.dst_pitch
                ctypes.memmove(dst, src, copy.width)

    def wait(self, stream: int | None, buffer: int) -> None:
        pass  # the copies are over


class CopyEngine:
    """Copies by a GPU's copy engine, on a stream of its own. Made on first use, in the context of the caller."""

    def __init__(self) -> None:
        self._stream: ctypes.c_void_p | None = None
        self._reached: dict[int, ctypes.c_void_p] = {}
        self._copied: dict[int, ctypes.c_void_p] = {}

    def start(self, stream: int | None, buffer: int, copies: Sequence[Strided]) -> None:
        if self._stream is None:
            self._stream = ctypes.c_void_p()
            call_driver("cuStreamCreate", ctypes.byref(self._stream), ctypes.c_uint(_NON_BLOCKING))
        if buffer not in self._copied:
            self._reached[buffer], self._copied[buffer] = _new_event(), _new_event()
        call_driver("cuEventRecord", self._reached[buffer], ctypes.c_void_p(stream))
        call_driver("cuStreamWaitEvent", self._stream, self._reached[buffer], ctypes.c_uint(0))
        for copy in copies:
            call_driver("cuMemcpy2DAsync_v2", ctypes.byref(_described(copy)), self._stream)
        call_driver("cuEventRecord", self._copied[buffer], self._stream)

    def wait(self, stream: int | None, buffer: int) -> None:
        call_driver("cuStreamWaitEvent", ctypes.c_void_p(stream), self._copied[buffer], ctypes.c_uint(0))


_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: does not wait for the default stream
_NO_TIMING = 2  # CU_EVENT_DISABLE_TIMING
_HOST, _DEVICE = 1, 2  # CU_MEMORYTYPE_HOST, CU_MEMORYTYPE_DEVICE


class _Copy2D(ctypes.Structure):
    """CUDA_MEMCPY2D, as the driver defines it."""

    _fields_ = [
        ("srcXInBytes", ctypes.c_size_t),
        ("srcY", ctypes.c_size_t),
        ("srcMemoryType", ctypes.c_uint),
        ("srcHost", ctypes.c_void_p),
        ("srcDevice", ctypes.c_uint64),
        ("srcArray", ctypes.c_void_p),
        ("srcPitch", ctypes.c_size_t),
        ("dstXInBytes", ctypes.c_size_t),
        ("dstY", ctypes.c_size_t),
        ("dstMemoryType", ctypes.c_uint),
        ("dstHost", ctypes.c_void_p),
        ("dstDevice", ctypes.c_uint64),
        ("dstArray", ctypes.c_void_p),
        ("dstPitch", ctypes.c_size_t),
        ("WidthInBytes", ctypes.c_size_t),
        ("Height", ctypes.c_size_t),
    ]


def _described(copy: Strided) -> _Copy2D:
    described = _Copy2D()
    described.srcMemoryType, described.srcHost, described.srcPitch = _HOST, copy.src, copy.src_pitch
    described.dstMemoryType, described.dstDevice, described.dstPitch = _DEVICE, copy.dst, copy.dst_pitch
    described.WidthInBytes, described.Height = copy.width, copy.num_rows
    return described


def _new_event() -> ctypes.c_void_p:
    event = ctypes.c_void_p()
    call_driver("cuEventCreate", ctypes.byref(event), ctypes.c_uint(_NO_TIMING))
    return event
