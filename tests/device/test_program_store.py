"""Each program is compiled once; steps go on while the background compiles, fails or is stopped."""

import gc
import logging
import subprocess
import sys
import threading
import weakref
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest

from jpaged.device.step import programs
from jpaged.device.step.inputs import Bucket, all_buckets, in_order_of_need
from jpaged.device.step.program_cache import ProgramCache
from jpaged.device.step.program_store import Background, ProgramStore
from jpaged.device.step.programs import Programs, option_keys
from jpaged.engine.loop import Engine
from jpaged.interpreter import short_switches
from jpaged.request import SamplingParams
from tests.support.tiny import make_runner, tiny_config

TIMEOUT_S = 60
SMALL, MIDDLE = Bucket(2, 2), Bucket(4, 4)


@pytest.mark.parametrize(
    "buckets",
    [all_buckets(256, 8192, 16, 64), all_buckets(1024, 16384, 16, 64), all_buckets(4, 16), all_buckets(1, 8)],
    ids=lambda buckets: str(len(buckets)),
)
def test_the_sizes_needed_first_can_do_the_work_of_all_others(buckets):
    order = in_order_of_need(buckets)
    assert sorted(order) == buckets
    largest = {max(b for b in buckets if b.is_decode == is_decode) for is_decode in (True, False)}
    assert set(order[:2]) == largest
    for num_first in range(2, len(order) + 1):
        ready = sorted(order[:num_first])
        for wanted in buckets:
            used = min(b for b in ready if b.is_decode == wanted.is_decode and b >= wanted)
            assert used.num_rows >= wanted.num_rows
            assert (used == wanted) == (wanted in ready)


def test_sizes_that_save_most_padding_come_before_the_others():
    order = in_order_of_need(all_buckets(256, 8192, 16, 64))
    assert order[:4] == [Bucket(8192, 256), Bucket(256, 256), Bucket(16, 16), Bucket(1024, 256)]
    padding = [
        sum(min(u for u in order[:n] if u.is_decode == b.is_decode and u >= b).num_tokens / b.num_tokens for b in order)
        for n in range(4, len(order) + 1)
    ]
    assert padding == sorted(padding, reverse=True)


class StubCompiler:
    """Compiles keys to their names once it is allowed to; notes what it was asked for."""

    def __init__(self, *, fails=()):
        self.lowered, self.num_compiled = [], Counter()
        self.fails = set(fails)
        self.begun, self.allowed = {}, {}
        self._lock = threading.Lock()

    def hold(self, key):
        """Let the compilation of a key wait for ``self.allowed[key].set()``, and tell of its begin."""
        self.begun[key], self.allowed[key] = threading.Event(), threading.Event()

    def lower(self, key):
        self.lowered.append(key)
        if ("lower", key) in self.fails:
            raise RuntimeError("it cannot be lowered")
        return key

    def compile(self, key):
        with self._lock:
            self.num_compiled[key] += 1
        if key in self.allowed:
            self.begun[key].set()
            assert self.allowed[key].wait(TIMEOUT_S)
        if key in self.fails:
            raise RuntimeError("it does not compile")
        return f"program {key}", True

    def store(self):
        return ProgramStore(self.lower, self.compile)


def keys_of(bucket):
    return [("forward", bucket), ("load", bucket), ("sample", bucket.num_rows)]


SIZES = {MIDDLE: keys_of(MIDDLE), SMALL: keys_of(SMALL)}
KEYS = [key for keys in SIZES.values() for key in keys]


def test_a_thread_waits_for_the_program_that_another_one_compiles():
    compiler, key = StubCompiler(), ("forward", SMALL)
    compiler.hold(key)
    store = compiler.store()
    with ThreadPoolExecutor(4) as threads:
        first = threads.submit(store.get, key)
        assert compiler.begun[key].wait(TIMEOUT_S)
        others = [threads.submit(store.get, key) for _ in range(3)]
        compiler.allowed[key].set()
        assert {each.result(TIMEOUT_S) for each in (first, *others)} == {f"program {key}"}
    assert compiler.num_compiled == {key: 1}
    assert not store.compiling.is_running


def test_an_error_reaches_all_that_wait_and_the_next_one_tries_again():
    compiler, key = StubCompiler(fails=[("forward", SMALL)]), ("forward", SMALL)
    store = compiler.store()
    with pytest.raises(RuntimeError, match="does not compile"):
        store.get(key)
    compiler.fails.clear()
    assert store.get(key) == f"program {key}"
    assert compiler.num_compiled[key] == 2


@pytest.mark.parametrize("num_threads", [1, 3])
def test_the_background_lowers_in_order_and_sizes_are_ready_once_all_their_programs_are(num_threads):
    compiler, interval = StubCompiler(), sys.getswitchinterval()
    last = KEYS[-1]
    compiler.hold(last)
    background = Background(compiler.store(), SIZES, None, num_threads)
    assert background.pending == {SMALL, MIDDLE}
    background.start(compiler)
    assert compiler.begun[last].wait(TIMEOUT_S)
    assert compiler.lowered == KEYS
    assert SMALL in background.pending
    assert background.progress.of == len(KEYS)
    assert sys.getswitchinterval() < interval
    compiler.allowed[last].set()
    background.wait()
    assert background.pending == frozenset()
    assert background.progress is None
    assert sys.getswitchinterval() == interval
    assert compiler.num_compiled == dict.fromkeys(KEYS, 1)


def test_a_step_takes_a_program_that_the_background_has_not_begun():
    compiler, first = StubCompiler(), KEYS[0]
    compiler.hold(first)
    store = compiler.store()
    background = Background(store, SIZES, None, 1)
    background.start(compiler)
    assert compiler.begun[first].wait(TIMEOUT_S)
    assert store.get(KEYS[1]) == f"program {KEYS[1]}"
    compiler.allowed[first].set()
    background.wait()
    assert compiler.num_compiled == dict.fromkeys(KEYS, 1)
    assert background.pending == frozenset()


@pytest.mark.parametrize("failure", [("load", MIDDLE), ("lower", ("load", MIDDLE))])
def test_a_program_that_fails_is_reported_once_and_its_size_stays_with_a_larger_one(failure, caplog):
    compiler = StubCompiler(fails=[failure])
    background = Background(compiler.store(), SIZES, None, 2)
    with caplog.at_level(logging.WARNING):
        background.start(compiler)
        background.wait()
    assert len([record for record in caplog.records if "a larger size does its work" in record.message]) == 1
    assert background.pending == {MIDDLE}
    assert background.progress is None


def test_programs_of_options_come_after_all_sizes_and_one_that_fails_keeps_no_size_away(caplog):
    options = [("adjust",), ("sample", 4, 20, True)]
    compiler = StubCompiler(fails=options[1:])
    background = Background(compiler.store(), SIZES, None, 1, options=options)
    assert not background.is_over
    with caplog.at_level(logging.WARNING):
        background.start(compiler)
        assert background.wait(TIMEOUT_S)
    assert compiler.lowered == [*KEYS, *options, options[1]]
    assert len([record for record in caplog.records if "a request that needs it waits" in record.message]) == 1
    assert background.pending == frozenset()
    assert background.is_over


def test_stopping_ends_the_threads_after_the_programs_that_they_compile():
    compiler, first = StubCompiler(), KEYS[0]
    compiler.hold(first)
    background = Background(compiler.store(), SIZES, None, 1)
    background.start(compiler)
    assert compiler.begun[first].wait(TIMEOUT_S)
    background.stop()
    compiler.allowed[first].set()
    background.wait()
    assert compiler.num_compiled == {first: 1}
    assert background.pending == {SMALL, MIDDLE}
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("jpaged-compile")]


@pytest.fixture
def half_warm(monkeypatch):
    """A runner with the largest decode and the largest step of prompts; the background lowers nothing before an event.

    Returns:
        The runner, and the event.
    """
    lower, go_on = Programs.lower, threading.Event()

    def wait_and_lower(self, key):
        assert threading.current_thread() is threading.main_thread() or go_on.wait(TIMEOUT_S)
        return lower(self, key)

    monkeypatch.setattr(programs, "NUM_FIRST", 2)
    monkeypatch.setattr(Programs, "lower", wait_and_lower)
    sizes = {"max_num_seqs": 2, "max_num_batched_tokens": 8, "enable_prefix_caching": False}
    runner = make_runner(model_config=tiny_config(num_layers=1), warm_up=None, **sizes)
    runner.programs.background.start(runner)
    yield runner, go_on
    go_on.set()
    runner.programs.background.wait()


def test_steps_do_the_work_with_larger_sizes_until_theirs_are_there(half_warm):
    runner, go_on = half_warm
    engine = Engine(runner, runner.config)
    first = {("forward", Bucket(8, 2)), ("forward", Bucket(2, 2))}

    def tokens(**options):
        params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True, **options)
        engine.add(engine.make_request("a", {"prompt_token_ids": [1, 2, 3]}, params))
        while not (finished := engine.step().finished):
            pass
        return finished[0].outputs[0].token_ids

    early = tokens()
    assert {key for key in runner.programs.store.programs if key[0] == "forward"} == first
    stats = engine.stats()
    assert stats.num_sizes_missing == len(runner.buckets) - 2
    assert engine.scheduler.step_sizes == ((8, 2),)
    assert stats.num_programs_to_compile == runner.programs.background.progress.of > 0
    go_on.set()
    runner.programs.background.wait()
    num_programs = engine.stats().num_programs
    made = {*runner.programs.all_keys(), *option_keys(runner.programs)}
    assert num_programs == len(made) == stats.num_programs + stats.num_programs_to_compile
    assert runner.programs.usable_buckets() == runner.buckets
    assert tokens() == early
    assert tokens(logprobs=2) == early
    assert tokens(logit_bias={4: 1e9}) == [4] * 3
    assert engine.scheduler.step_sizes == tuple((b.num_tokens, b.num_rows) for b in runner.buckets if not b.is_decode)
    assert engine.stats().num_sizes_missing == 0
    assert (engine.stats().num_programs, engine.stats().num_programs_to_compile) == (num_programs, 0)


@pytest.mark.parametrize("warm_up", [True, None])
def test_programs_and_the_pool_go_at_once_with_a_runner_that_compiled_before_it_served(warm_up, monkeypatch):
    monkeypatch.setattr(programs, "NUM_FIRST", 2)
    sizes = {"max_num_seqs": 2, "max_num_batched_tokens": 8, "enable_prefix_caching": False}
    runner = make_runner(model_config=tiny_config(num_layers=1), warm_up=warm_up, has_own_programs=True, **sizes)
    engine = Engine(runner, runner.config)
    runner.programs.background.start(runner)
    assert runner.programs.background.wait(TIMEOUT_S)
    program = next(iter(runner.programs.store.programs.values()))
    alive = [weakref.ref(each) for each in (engine, runner, runner.cache.pool, runner.programs, program)]
    del engine, runner, program  # no cycle joins them, so that no collection is needed
    assert [each() for each in alive] == [None] * len(alive)


def test_a_runner_that_is_collected_stops_its_background():
    calls, runner = [], make_runner()
    background = runner.programs.background
    background.stop = lambda: calls.append("stop")
    background.start(runner)
    del runner
    gc.collect()
    assert calls == ["stop"]


SCRIPT = """
import threading
from jpaged.device.step.inputs import Bucket
from jpaged.device.step.program_store import Background, ProgramStore

has_begun = threading.Event()

def compile_slowly(key):
    has_begun.set()
    threading.main_thread().join()
    print("compiled", key)
    return key, False

store = ProgramStore(lambda key: key, compile_slowly)
Background(store, {Bucket(2, 2): [("forward",), ("load",)]}, None, 1).start(has_begun)
has_begun.wait()
"""


def test_kept_programs_that_cannot_be_read_leave_no_claim_behind(caplog, monkeypatch, tmp_path):
    def has(self, key):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(ProgramCache, "has", has)
    compiler = StubCompiler()
    store = compiler.store()
    background = Background(store, SIZES, ProgramCache(tmp_path, ()), 1)
    background.start(compiler)
    assert background.wait(TIMEOUT_S)
    assert background.pending == {SMALL, MIDDLE}
    assert len([record for record in caplog.records if "Permission denied" in record.message]) == len(KEYS)
    assert store.get(KEYS[0]) == f"program {KEYS[0]}"


class NotedPrograms(ProgramCache):
    """Notes which programs are to be kept, and has none."""

    def __init__(self):
        self.saved = []

    def has(self, key):
        return False

    def save(self, key, program):
        self.saved.append(key)


@pytest.mark.parametrize("is_tuned", [False, True])
def test_programs_tuned_beside_steps_are_not_kept(is_tuned):
    compiler, kept, (first, second) = StubCompiler(), NotedPrograms(), KEYS[:2]
    compiler.hold(second)
    store = compiler.store()
    background = Background(store, SIZES, kept, 1, is_tuned=is_tuned)
    background.start(compiler)
    assert compiler.begun[second].wait(TIMEOUT_S)
    store.get(first)  # as a step does
    compiler.allowed[second].set()
    assert background.wait(TIMEOUT_S)
    assert kept.saved == [key for key in KEYS if key != second or not is_tuned]


def test_a_program_that_fails_once_is_made_after_the_others(caplog):
    class Flaky(StubCompiler):
        def compile(self, key):
            if self.num_compiled[key]:
                self.fails.clear()
            return super().compile(key)

    compiler = Flaky(fails=KEYS[:1])
    background = Background(compiler.store(), SIZES, None, 1)
    background.start(compiler)
    assert background.wait(TIMEOUT_S)
    assert background.pending == frozenset()
    assert compiler.lowered == [*KEYS, KEYS[0]]
    assert not caplog.records


def test_a_background_that_is_not_started_makes_no_progress():
    background = Background(StubCompiler().store(), SIZES)
    assert background.progress is None
    assert background.pending == {SMALL, MIDDLE}
    assert background.wait(0)


def test_a_wait_for_the_background_ends_in_time():
    compiler, first = StubCompiler(), KEYS[0]
    compiler.hold(first)
    background = Background(compiler.store(), SIZES, None, 1)
    background.start(compiler)
    assert compiler.begun[first].wait(TIMEOUT_S)
    assert not background.wait(0)
    compiler.allowed[first].set()
    assert background.wait(TIMEOUT_S)


def test_a_failed_program_that_another_thread_claimed_meanwhile_is_not_given_up_again():
    first, failing = KEYS[:2]
    compiler = StubCompiler(fails=[("lower", failing)])
    compiler.hold(first)
    store = compiler.store()
    with ThreadPoolExecutor(1) as threads:
        made = threads.submit(store.make_all, [first, failing], None, use_tqdm=False)
        assert compiler.begun[first].wait(TIMEOUT_S)
        while (claim := store.claim(failing)) is not None:  # by make_all, until lowering fails
            with pytest.raises(RuntimeError, match="cannot be lowered"):
                claim.result(TIMEOUT_S)
        compiler.allowed[first].set()
        with pytest.raises(RuntimeError, match="cannot be lowered"):
            made.result(TIMEOUT_S)
    claim = store.claim(failing)
    assert claim is not None
    assert not claim.done()


def test_the_switch_interval_is_short_until_the_last_of_several_backgrounds_ends():
    compilers, interval = [StubCompiler(), StubCompiler()], sys.getswitchinterval()
    backgrounds = []
    for compiler in compilers:
        compiler.hold(KEYS[0])
        backgrounds.append(Background(compiler.store(), SIZES, None, 1))
        backgrounds[-1].start(compiler)
    with short_switches():
        for compiler, background in zip(compilers, backgrounds, strict=True):
            compiler.allowed[KEYS[0]].set()
            assert background.wait(TIMEOUT_S)
            assert sys.getswitchinterval() < interval
    assert sys.getswitchinterval() == interval


def test_a_process_that_ends_waits_for_the_program_being_compiled_and_begins_no_other():
    ended = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=TIMEOUT_S)
    assert (ended.returncode, ended.stdout) == (0, "compiled ('forward',)\n"), ended.stderr


def test_one_more_program_is_made_after_the_start_alone_and_once():
    compiler, wanted, later = StubCompiler(), ("shared", SMALL), ("shared", MIDDLE)
    compiler.hold(KEYS[-1])
    store = compiler.store()
    background = Background(store, SIZES, None, 1)
    assert not background.has(wanted)
    background.start(compiler)
    assert compiler.begun[KEYS[-1]].wait(TIMEOUT_S)
    assert not background.has(wanted)
    assert not background.has(wanted)  # it is made once, by the one thread that there may be
    assert len([thread for thread in threading.enumerate() if thread.name.startswith("jpaged-compile")]) == 1
    compiler.allowed[KEYS[-1]].set()
    background.wait()
    assert set(store.programs) == {*KEYS, wanted}
    assert not background.has(later)  # when all threads have ended
    background.wait()
    assert background.has(later)
    background.stop()
    assert not background.has(("shared", Bucket(8, 8)))
    assert max(compiler.num_compiled.values()) == 1
    assert len(compiler.num_compiled) == len(KEYS) + 2
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("jpaged-compile")]
