"""Pinned memory without a GPU: the driver's calls are made up, the memory is real."""

import gc
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

from jpaged.device.kv import pinned
from jpaged.device.kv.pinned import PinnedMemory

UNIT = 3 * 4096
GPU = SimpleNamespace(local_hardware_id=0)


@pytest.fixture
def driver(monkeypatch):
    """Calls of the driver, as (name, address), with pieces of a few units."""
    calls = []
    monkeypatch.setattr(pinned, "PIECE_BYTES", 4 * UNIT)
    monkeypatch.setattr(pinned, "_enter_context", lambda ordinal: calls.append(("enter", ordinal)))
    note = lambda name, *args: calls.append((name, args[0].value if args else None))  # noqa: E731
    monkeypatch.setattr(pinned, "call_driver", note)
    return calls


def names(calls, name):
    return [address for called, address in calls if called == name]


def wait_until(is_true):
    for _ in range(1000):
        if is_true():
            return
        time.sleep(0.01)
    raise AssertionError("it never happened")


def test_all_pieces_are_pinned_and_returned(driver):
    memory = PinnedMemory(10 * UNIT, UNIT, GPU)
    memory.wait()
    assert memory.failure() is None
    assert memory.piece_bytes == 4 * UNIT
    pieces = [memory.address + at for at in (0, 4 * UNIT, 8 * UNIT)]
    assert names(driver, "cuMemHostRegister_v2") == pieces
    del memory
    wait_until(lambda: names(driver, "cuMemHostUnregister") == pieces)
    assert [name for name, _ in driver].index("cuCtxSynchronize") < [name for name, _ in driver].index(
        "cuMemHostUnregister"
    )


def test_a_driver_that_refuses_is_told_to_the_thread_that_waits(driver, monkeypatch):
    def refuse(name, *_):
        raise RuntimeError(f"{name} failed: out of memory")

    monkeypatch.setattr(pinned, "call_driver", refuse)
    memory = PinnedMemory(10 * UNIT, UNIT, GPU)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"122,880 bytes could not be pinned: .*out of memory; lower num_host"):
            memory.wait()
    assert "could not be pinned" in str(memory.failure())


def test_memory_that_is_dropped_while_it_is_pinned_is_returned_without_a_wait(driver, monkeypatch):
    may_go_on, is_pinning = threading.Event(), threading.Event()
    touch = pinned._touch

    def slow_touch(*args):
        is_pinning.set()
        assert may_go_on.wait(60)
        touch(*args)

    monkeypatch.setattr(pinned, "_touch", slow_touch)
    memory = PinnedMemory(10 * UNIT, UNIT, GPU)
    first = memory.address
    assert is_pinning.wait(60)
    del memory
    gc.collect()
    may_go_on.set()
    wait_until(lambda: names(driver, "cuMemHostUnregister") == [first])
    assert names(driver, "cuMemHostRegister_v2") == [first], "no further piece"


def test_a_pointer_is_that_of_the_first_element():
    content = np.arange(8, dtype=np.uint16)
    assert pinned.pointer_of(content[2:]) == content.ctypes.data + 4
