"""Ctrl-C is never lost, not even where Python drops exceptions, and takes effect where nothing is half done."""

import signal
import threading
import weakref

import pytest

from jpaged import LLM, SamplingParams
from jpaged.device.step.programs import Programs
from jpaged.interrupts import InterruptsWait, interruptible
from jpaged.models.checkpoint import weights

SETTINGS = {"num_blocks": 16, "max_num_seqs": 1, "max_num_batched_tokens": 8, "max_model_len": 64, "use_tqdm": False}


@pytest.fixture(autouse=True)
def ctrl_c_interrupts():
    """As it does by default; a process started in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, before)


def press_in_a_callback() -> None:
    """Ctrl-C while a callback runs whose exceptions Python drops, as many do while JAX traces and compiles."""

    class Anything:
        pass

    anything = Anything()
    watched = weakref.ref(anything, lambda _: signal.raise_signal(signal.SIGINT))
    del anything
    assert watched() is None


class Presser:
    """Stands in for a function, and presses Ctrl-C in its ``number``-th call."""

    def __init__(self, call, number: int):
        self.call, self.number, self.num_calls = call, number, 0

    def __call__(self, *args, **kwargs):
        self.num_calls += 1
        if self.num_calls == self.number:
            press_in_a_callback()
        return self.call(*args, **kwargs)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_without_a_block_an_interrupt_in_a_callback_is_lost():
    """Or the tests below would show nothing."""
    press_in_a_callback()


def test_an_interrupt_takes_effect_after_the_block():
    done = []

    def block() -> None:
        with InterruptsWait():
            press_in_a_callback()
            done.append("the rest of the block")

    with pytest.raises(KeyboardInterrupt):
        block()
    assert done


def test_a_block_inside_another_one_joins_it():
    done = []

    def blocks() -> None:
        with InterruptsWait() as outer:
            with InterruptsWait() as inner:
                assert inner is outer
                signal.raise_signal(signal.SIGINT)
            done.append("after the inner block")
            inner.check()
            done.append("never")

    with pytest.raises(KeyboardInterrupt):
        blocks()
    assert done == ["after the inner block"]


def test_an_interrupt_is_let_through_where_nothing_depends_on_the_block():
    done = []

    def blocks() -> None:
        with InterruptsWait(), InterruptsWait() as interrupts, interrupts.let_through():
            signal.raise_signal(signal.SIGINT)
            done.append("never")

    with pytest.raises(KeyboardInterrupt):
        blocks()
    assert not done


def test_a_wait_for_another_process_is_interruptible_inside_a_block():
    done = []

    def blocks() -> None:
        with InterruptsWait(), interruptible():
            signal.raise_signal(signal.SIGINT)
            done.append("never")

    with pytest.raises(KeyboardInterrupt):
        blocks()
    assert not done


def test_a_block_in_another_thread_leaves_the_handler_alone():
    seen = []

    def work() -> None:
        with InterruptsWait() as interrupts, interrupts.let_through():
            seen.append(signal.getsignal(signal.SIGINT))

    with InterruptsWait():
        handler = signal.getsignal(signal.SIGINT)
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert seen == [handler]


def test_an_ignored_interrupt_stays_ignored():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with InterruptsWait():
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_an_interrupt_while_weights_load_ends_the_start_before_the_next_tensor(monkeypatch):
    presser = Presser(weights._Param.send, 3)
    monkeypatch.setattr(weights._Param, "send", lambda self, parts: presser(self, parts))
    with pytest.raises(KeyboardInterrupt):
        LLM(**SETTINGS, warm_up=True)
    assert presser.num_calls == 3


def test_an_interrupt_while_programs_compile_ends_the_start_before_the_next_program(monkeypatch):
    presser = Presser(Programs.lower, 2)
    monkeypatch.setattr(Programs, "lower", lambda self, key: presser(self, key))
    with pytest.raises(KeyboardInterrupt):
        LLM(**SETTINGS, warm_up=True)
    assert presser.num_calls == 2


def test_an_interrupt_while_a_program_compiles_for_a_request_ends_the_request(monkeypatch):
    llm = LLM(**SETTINGS, warm_up=False)
    params = SamplingParams(temperature=0, max_tokens=3)
    presser = Presser(Programs.lower, 2)
    with monkeypatch.context() as patched:
        patched.setattr(Programs, "lower", lambda self, key: presser(self, key))
        with pytest.raises(KeyboardInterrupt):
            llm.generate("x = 1", params, use_tqdm=False)
    assert presser.num_calls == 2
    assert len(llm.inbox) == 0
    assert len(llm.generate("x = 1", params, use_tqdm=False)[0].outputs[0].token_ids) == 3
