"""The copy engine on a made-up driver, which runs streams as late as their order allows."""

import ctypes
from collections import deque
from collections.abc import Callable

import numpy as np
import pytest

from jpaged.device.kv import copy_engine
from jpaged.device.kv.copy_engine import STRIDED, Copies, CopyEngine, strided

PROGRAMS = 7
"""The handle of the programs' stream."""


class Driver:
    """Streams of work: copies, records of events, and waits for records. Handles count up from 100."""

    def __init__(self) -> None:
        self.num_handles = 100
        self.streams: dict[int, deque[Callable[[], bool]]] = {PROGRAMS: deque()}
        self.recorded: dict[int, int] = {}  # by event: records asked for
        self.reached: dict[int, int] = {}  # by event: records that its stream has come to
        self.clock = 0.0
        self.times: dict[int, float] = {}
        self.destroyed: list[int] = []

    def __call__(self, name: str, *args) -> bool:
        return getattr(self, name)(*args) is not False

    def run(self) -> None:
        """Run all streams as far as they come."""
        while any(queue and queue[0]() and (queue.popleft() or True) for queue in self.streams.values()):
            pass

    def _new(self, handle) -> int:
        self.num_handles += 1
        handle._obj.value = self.num_handles
        return self.num_handles

    def cuCtxGetCurrent(self, context):
        self._new(context)

    def cuCtxSetCurrent(self, context):
        assert context.value

    def cuStreamCreate(self, stream, flags):
        assert flags.value == 1
        self.streams[self._new(stream)] = deque()

    def cuEventCreate(self, event, flags):
        handle = self._new(event)
        self.recorded[handle] = self.reached[handle] = 0

    def cuEventDestroy_v2(self, event):
        self.destroyed.append(event.value)

    def cuEventRecord(self, event, stream):
        self.recorded[event.value] += 1
        number, handle = self.recorded[event.value], event.value

        def reach() -> bool:
            self.reached[handle], self.times[handle] = number, self.clock
            return True

        self.streams[stream.value].append(reach)

    def cuStreamWaitEvent(self, stream, event, flags):
        number, handle = self.recorded[event.value], event.value
        self.streams[stream.value].append(lambda: self.reached[handle] >= number)

    def cuMemcpy2DAsync_v2(self, described, stream):
        copy = described._obj
        assert copy.srcMemoryType == copy.dstMemoryType == 4

        def run() -> bool:
            for row in range(copy.Height):
                src, dst = copy.srcDevice + row * copy.srcPitch, copy.dstDevice + row * copy.dstPitch
                ctypes.memmove(dst, src, copy.WidthInBytes)
            self.clock += 500
            return True

        self.streams[stream.value].append(run)

    def cuStreamSynchronize(self, stream):
        self.run()
        assert not self.streams[stream.value]

    def cuEventQuery(self, event):
        return self.reached[event.value] == self.recorded[event.value]

    def cuEventElapsedTime(self, milliseconds, first, last):
        milliseconds._obj.value = self.times[last.value] - self.times[first.value]


@pytest.fixture
def driver(monkeypatch):
    driver = Driver()
    monkeypatch.setattr(copy_engine, "call_driver", driver)
    return driver


def copy_of(src: np.ndarray, dst: np.ndarray) -> Copies:
    return strided(src.ctypes.data, src.strides[0], dst.ctypes.data, dst.strides[0], dst.shape[1], len(dst))


def test_copies_wait_for_the_program_and_the_program_for_the_copies(driver):
    engine, host, device = CopyEngine(), np.arange(12, dtype=np.uint8).reshape(3, 4), np.zeros((3, 4), np.uint8)
    is_ready, seen = [False], []
    driver.streams[PROGRAMS].append(lambda: is_ready[0])
    timed = engine.start_timed(
        PROGRAMS, 0, np.concatenate([copy_of(host[:, 1:3], device[:, :2]), copy_of(host[:1], device[:1])])
    )
    driver.streams[PROGRAMS].append(lambda: seen.append(device.copy()) or True)
    engine.wait(PROGRAMS, 0)
    driver.streams[PROGRAMS].append(lambda: seen.append(device.copy()) or True)
    driver.run()
    assert not seen
    assert not device.any()
    assert not timed.is_over()

    is_ready[0] = True
    driver.run()
    before, after = seen
    assert not before.any()
    assert after.tolist() == [[0, 1, 2, 3], [5, 6, 0, 0], [9, 10, 0, 0]]
    assert timed.is_over()
    assert timed.seconds() == 1.0, "two copies of 500 ms"


def test_copies_run_in_the_order_of_their_starts(driver):
    """A load sees what a store has written before."""
    engine, pool, slots = CopyEngine(), np.array([[1], [2]], np.uint8), np.zeros((1, 1), np.uint8)
    engine.start(PROGRAMS, 0, copy_of(pool[:1], slots))
    engine.start(PROGRAMS, 1, copy_of(slots, pool[1:]))
    driver.run()
    assert pool.tolist() == [[1], [1]]


def test_the_host_waits_for_all_copies(driver):
    engine, src, dst = CopyEngine(), np.array([[1], [2]], np.uint8), np.zeros((2, 1), np.uint8)
    engine.finish()
    engine.start(PROGRAMS, 0, copy_of(src[:1], dst[:1]))
    engine.start(PROGRAMS, 1, copy_of(src[1:], dst[1:]))
    assert not dst.any()
    engine.finish()
    assert dst.tolist() == [[1], [2]]


def test_events_of_observed_copies_are_destroyed_with_them(driver):
    timed = CopyEngine().start_timed(PROGRAMS, 0, np.empty(0, STRIDED))
    assert not driver.destroyed
    del timed
    assert len(driver.destroyed) == 2
