"""Pinned host memory, which a GPU copies by itself: one allocation of the driver's, and calls of the driver."""

import ctypes
import logging
import mmap
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from typing import Any

import numpy as np

log = logging.getLogger(__name__)

PIECE_BYTES = 1 << 28
"""Bytes that are pinned by one call. The driver serves no other call meanwhile: 256 MiB take 15 to 50 ms on an H200."""

HUGE_PAGE = 1 << 21
_PAGE = mmap.PAGESIZE
_TOUCHED_BYTES = 8 * HUGE_PAGE
_FLAGS = 1 | 2  # CU_MEMHOSTREGISTER_PORTABLE, CU_MEMHOSTREGISTER_DEVICEMAP: for all GPUs, at the host's own address
_NOT_READY = 600  # CUDA_ERROR_NOT_READY


class PinnedMemory:
    """Host memory that one GPU reads and writes, at the host's own addresses.

    The memory is pinned in the background; ``wait`` for it before its first use. It is valid while this object lives.

    Args:
        num_bytes: size.
        unit: bytes that no copy divides. A copy between two pieces that were pinned apart would fail.
        device: the GPU, one of this process.
    """

    def __init__(self, num_bytes: int, unit: int, device: Any) -> None:
        self._ordinal: int = device.local_hardware_id
        pages = mmap.mmap(-1, num_bytes + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        pages.madvise(mmap.MADV_DONTFORK)  # a child would copy pinned pages
        with suppress(OSError):  # a kernel without huge pages
            pages.madvise(mmap.MADV_HUGEPAGE)  # pinned twice as fast
        anchor = ctypes.c_char.from_buffer(pages)
        self.address = -(-ctypes.addressof(anchor) // HUGE_PAGE) * HUGE_PAGE
        whole = int(np.lcm(unit, _PAGE))
        self.piece_bytes = max(PIECE_BYTES // whole, 1) * whole
        starts = range(0, num_bytes, self.piece_bytes)
        pieces = [(self.address + at, min(self.piece_bytes, num_bytes - at)) for at in starts]
        self._pinned: Future[None] = Future()
        is_dropped = threading.Event()
        args = self._ordinal, pieces, self._pinned, is_dropped, [anchor], pages
        threading.Thread(target=_own, args=args, name="host memory", daemon=True).start()
        # At exit the process returns its memory itself.
        weakref.finalize(self, is_dropped.set).atexit = False

    def wait(self) -> None:
        """Wait until all of the memory is pinned.

        Raises:
            RuntimeError: the driver refused to pin it.
        """
        self._pinned.result()

    def failure(self) -> BaseException | None:
        """The error for which the memory was not pinned; None if it is, or is being pinned."""
        return self._pinned.exception() if self._pinned.done() else None


def why_no_pinned_memory() -> str | None:
    """The reason why this process cannot pin memory for its GPUs; None if it can."""
    try:
        _cuda()
    except OSError as error:
        return f"the CUDA driver cannot be loaded: {error}"
    return None


@cache
def _cuda() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def call_driver(name: str, *args: Any) -> bool:
    """Call a function of the CUDA driver. Raises RuntimeError with its message if it fails.

    Returns:
        Whether the work that the function asks about is over; True for all other functions.
    """
    status = getattr(_cuda(), name)(*args)
    if status not in (0, _NOT_READY):
        text = ctypes.c_char_p()
        _cuda().cuGetErrorString(status, ctypes.byref(text))
        raise RuntimeError(f"{name} failed: {(text.value or b'unknown error').decode()} (CUDA error {status})")
    return status == 0


def _enter_context(ordinal: int) -> None:
    """Make the context that JAX uses on a GPU current in this thread."""
    device, context = ctypes.c_int(), ctypes.c_void_p()
    call_driver("cuDeviceGet", ctypes.byref(device), ctypes.c_int(ordinal))
    call_driver("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
    call_driver("cuCtxSetCurrent", context)


def _own(
    ordinal: int,
    pieces: Sequence[tuple[int, int]],
    pinned: Future[None],
    is_dropped: threading.Event,
    anchor: list[Any],
    pages: mmap.mmap,
) -> None:
    """Pin the memory, and return it once it is dropped and no copy uses it. The thread alone owns the pages."""
    registered: list[int] = []
    try:
        _pin(ordinal, pieces, registered, is_dropped)
        pinned.set_result(None)
    except Exception as error:  # the thread that waits gets it
        pinned.set_exception(error)
    is_dropped.wait()
    try:
        if registered:
            call_driver("cuCtxSynchronize")
        for address in registered:
            call_driver("cuMemHostUnregister", ctypes.c_void_p(address))
    except RuntimeError:
        log.exception("pinned host memory is not returned")
        return
    anchor.clear()  # it refers to the pages
    pages.close()


def _pin(ordinal: int, pieces: Sequence[tuple[int, int]], registered: list[int], is_dropped: threading.Event) -> None:
    """Pin the pieces in order. Several threads touch the pages first, which takes the driver's one thread longer."""
    with ThreadPoolExecutor(min(8, len(os.sched_getaffinity(0)))) as threads:
        for address, num_bytes in pieces:
            if is_dropped.is_set():
                return
            _touch(address, num_bytes, threads)
            try:
                if not registered:
                    _enter_context(ordinal)
                call_driver("cuMemHostRegister_v2", ctypes.c_void_p(address), ctypes.c_size_t(num_bytes), _FLAGS)
            except RuntimeError as error:
                total = sum(num_bytes for _, num_bytes in pieces)
                raise RuntimeError(
                    f"the host pool's {total:,} bytes could not be pinned: {error}; lower num_host_blocks or "
                    "host_memory_bytes"
                ) from error
            registered.append(address)


def _touch(address: int, num_bytes: int, threads: Executor) -> None:
    """Write zeros, so that the memory has pages."""
    starts = range(address, address + num_bytes, _TOUCHED_BYTES)
    sizes = [min(_TOUCHED_BYTES, address + num_bytes - start) for start in starts]
    for _ in threads.map(ctypes.memset, starts, [0] * len(starts), sizes):
        pass


class _Tensor(ctypes.Structure):
    """DLTensor and DLManagedTensor, as DLPack defines them."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("byte_offset", ctypes.c_uint64),
        ("manager_ctx", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    ]


def pointer_of(array: Any) -> int:
    """The address of an array that offers itself by DLPack."""
    capsule = array.__dlpack__()
    tensor = _Tensor.from_address(_pointer_in()(capsule, b"dltensor"))
    return tensor.data + tensor.byte_offset


@cache
def _pointer_in() -> Callable[[Any, bytes], int]:
    pointer_in = ctypes.pythonapi.PyCapsule_GetPointer
    pointer_in.restype, pointer_in.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    return pointer_in
