"""Pinned host memory that a GPU addresses itself: one allocation, and JAX arrays over parts of it."""

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

import jax
import numpy as np

log = logging.getLogger(__name__)

PIECE_BYTES = 1 << 28
"""Bytes that are pinned by one call. The driver serves no other call meanwhile: 256 MiB take 15 to 50 ms on an H200."""

HUGE_PAGE = 1 << 21
_PAGE = mmap.PAGESIZE
_TOUCHED_BYTES = 8 * HUGE_PAGE
_FLAGS = 1 | 2  # CU_MEMHOSTREGISTER_PORTABLE, CU_MEMHOSTREGISTER_DEVICEMAP: for all GPUs, at the host's own address
_ON_DEVICE, _ON_HOST = 2, 3  # DLPack: kDLCUDA, kDLCUDAHost
_UNSIGNED = 1  # DLPack: kDLUInt


class PinnedMemory:
    """Host memory that one GPU reads and writes, at the host's own addresses.

    The memory is pinned in the background; ``wait`` for it before its first use. An array over the memory is valid
    while this object lives, and shares its bytes with all others.

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

    def array(self, start: int, shape: Sequence[int], itemsize: int, *, on_device: bool) -> jax.Array:
        """An array of unsigned integers over a part of the memory.

        Args:
            start: offset in bytes.
            shape: shape of the array.
            itemsize: bytes of each integer.
            on_device: whether programs of the GPU take it as their device's memory. Otherwise it is in "pinned_host"
                memory, from where ``jax.device_put`` copies beside running programs.
        """
        where = _ON_DEVICE if on_device else _ON_HOST
        return jax.dlpack.from_dlpack(_Export(self.address + start, tuple(shape), itemsize, where, self._ordinal))

    def holds(self, array: jax.Array) -> bool:
        """Whether an array of this device begins where the memory begins."""
        return array.unsafe_buffer_pointer() == self.address


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


def call_driver(name: str, *args: Any) -> None:
    """Call a function of the CUDA driver. Raises RuntimeError with its message if it fails."""
    status = getattr(_cuda(), name)(*args)
    if status:
        text = ctypes.c_char_p()
        _cuda().cuGetErrorString(status, ctypes.byref(text))
        raise RuntimeError(f"{name} failed: {(text.value or b'unknown error').decode()} (CUDA error {status})")


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


class _Export:
    """Memory that offers itself by DLPack.

    The description lies in memory of ``malloc``, and its deleter is ``free``. So JAX may drop an array in any thread.
    """

    def __init__(self, address: int, shape: tuple[int, ...], itemsize: int, where: int, ordinal: int) -> None:
        self._parts = address, shape, itemsize
        self._device = where, ordinal

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._device

    def __dlpack__(self, **_: Any) -> Any:
        (address, shape, itemsize), (where, ordinal) = self._parts, self._device
        malloc, free, new_capsule = _c_functions()
        size = ctypes.sizeof(_Tensor)
        start = malloc(size + 8 * len(shape))
        (ctypes.c_int64 * len(shape)).from_address(start + size)[:] = shape
        tensor = _Tensor.from_address(start)
        tensor.data, tensor.device_type, tensor.device_id, tensor.ndim = address, where, ordinal, len(shape)
        tensor.code, tensor.bits, tensor.lanes = _UNSIGNED, 8 * itemsize, 1
        tensor.shape, tensor.strides, tensor.byte_offset = start + size, None, 0
        tensor.manager_ctx, tensor.deleter = None, free
        return new_capsule(start, b"dltensor", None)


@cache
def _c_functions() -> tuple[Callable[[int], int], int, Callable[..., Any]]:
    """``malloc``, the address of ``free``, and the maker of capsules."""
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    new_capsule = ctypes.pythonapi.PyCapsule_New
    new_capsule.restype, new_capsule.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    free = ctypes.cast(libc.free, ctypes.c_void_p).value
    assert free is not None
    return libc.malloc, free, new_capsule
