"""Compiled programs, each compiled once: for a step that waits, before all steps, or beside them."""

import logging
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from time import monotonic

from jax.stages import Compiled, Lowered

from jpaged.device.step.compiling import Compiling
from jpaged.device.step.inputs import Bucket
from jpaged.device.step.program_cache import ProgramCache, unkept_by_jax
from jpaged.interpreter import FROZEN_OBJECTS, SHORT_SWITCHES
from jpaged.interrupts import InterruptsWait
from jpaged.progress import Progress, counted

log = logging.getLogger(__name__)


def num_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class ProgramStore:
    """The compiled programs by key. A thread that needs a program waits for the thread that compiles it.

    Programs are lowered one after the other. JAX numbers Pallas kernels as it meets them, and its own cache finds
    programs by these numbers too.

    Args:
        lower: lowers the program of a key.
        compile_lowered: compiles a program, and says whether it can be kept.

    Attributes:
        programs: the programs that are there.
        num_loaded: programs that an earlier start had compiled.
        num_asked: programs that steps have asked for.
        compiling: whether a step waits for a program.
    """

    def __init__(self, lower: Callable[[tuple], Lowered], compile_lowered: Callable[[Lowered], tuple[Compiled, bool]]):
        self.programs: dict[tuple, Compiled] = {}
        self.num_loaded = 0
        self.num_asked = 0
        self.compiling = Compiling()
        self._lower = lower
        self._compile = compile_lowered
        self._lowering = threading.Lock()
        self._lock = threading.Lock()
        self._claims: dict[tuple, Future[Compiled]] = {}  # programs that a thread is making

    def get(self, key: tuple) -> Compiled:
        """The program of a key, compiled now if it is not there."""
        self.num_asked += 1
        program = self.programs.get(key)
        if program is None:
            with self.compiling.run(), InterruptsWait():
                program = self.make(key)
        return program

    def make(self, key: tuple, kept: ProgramCache | None = None) -> Compiled:
        """Compile a program, or wait for the thread that does."""
        claim = self.claim(key)
        return claim.result() if claim is not None else self.finish(key, self.lower(key), kept)

    def claim(self, key: tuple) -> Future[Compiled] | None:
        """Take the task to make a program: None. If another thread has it, return the program to come."""
        with self._lock:
            if (program := self.programs.get(key)) is not None:
                (there := Future[Compiled]()).set_result(program)
                return there
            claim = self._claims.get(key)
            if claim is None:
                self._claims[key] = Future()
            return claim

    @contextmanager
    def owned(self, key: tuple) -> Iterator[None]:
        """Give a claimed program up if the block fails."""
        try:
            yield
        except BaseException as error:
            self._give_up(key, error)
            raise

    def load(self, key: tuple, kept: ProgramCache) -> bool:
        """Load a program that was claimed. Returns whether it could be loaded; otherwise it stays claimed."""
        with self.owned(key):
            program = kept.load(key)
        if program is not None:
            self._put(key, program, is_loaded=True)
        return program is not None

    def lower(self, key: tuple) -> Lowered:
        """Lower a program that was claimed."""
        with self.owned(key), self._lowering:
            return self._lower(key)

    def finish(self, key: tuple, lowered: Lowered, kept: ProgramCache | None, *, if_idle: bool = False) -> Compiled:
        """Compile a program that was claimed and lowered, and keep it for later runs.

        Args:
            key: the key.
            lowered: the program, not compiled.
            kept: programs of earlier runs.
            if_idle: whether to keep the program only if no step asked for a program meanwhile.
        """
        num_asked = self.num_asked
        with self.owned(key):
            program, can_be_saved = self._compile(lowered)
        is_disturbed = if_idle and self.num_asked != num_asked
        self._put(key, program)
        if kept is not None and can_be_saved and can_be_kept(key) and not is_disturbed:
            kept.save(key, program)
        return program

    def make_all(self, keys: Sequence[tuple], kept: ProgramCache | None, *, use_tqdm: bool) -> None:
        """Load or compile programs, and wait for all. This thread lowers them, in their order.

        Args:
            keys: the keys.
            kept: programs of earlier runs.
            use_tqdm: whether to show progress.
        """
        claims = {key: self.claim(key) for key in keys}
        left = [key for key, claim in claims.items() if claim is None]
        making: dict[tuple, Future[Compiled]] = {}
        threads = ThreadPoolExecutor(max_workers=num_cores())
        with InterruptsWait() as interrupts:
            try:
                if kept is not None:
                    loaded = kept.load_all([key for key in left if can_be_kept(key)], threads)
                    for key, program in loaded.items():
                        self._put(key, program, is_loaded=True)
                    left = [key for key in left if key not in loaded]
                jobs: list[Future[Compiled]] = [claim for claim in claims.values() if claim is not None]
                while left:
                    interrupts.check()
                    key = left.pop(0)
                    making[key] = threads.submit(self.finish, key, self.lower(key), kept)
                jobs += making.values()
                bar = {"label": "Compiling", "unit": "program", "is_shown": use_tqdm and bool(making)}
                with counted("compiling", len(jobs), **bar) as count:
                    for job in as_completed(jobs):
                        interrupts.check()
                        job.result()
                        count(1)
            finally:  # an interruption does not wait for programs whose compilation has not begun
                threads.shutdown(cancel_futures=True)
                for key in (*left, *(key for key, job in making.items() if job.cancelled())):
                    self._give_up(key, RuntimeError("the compilation was interrupted"))
        FROZEN_OBJECTS.collect_and_freeze()

    def _put(self, key: tuple, program: Compiled, *, is_loaded: bool = False) -> None:
        """Give a claimed program to all that wait for it."""
        with self._lock:
            self.num_loaded += is_loaded
            self.programs[key] = program
            claim = self._claims.pop(key)
        claim.set_result(program)

    def _give_up(self, key: tuple, error: BaseException) -> None:
        """Tell all that wait for a claimed program that it will not come. The next thread that needs it tries again."""
        with self._lock:
            claim = self._claims.pop(key, None)
        if claim is not None:
            claim.set_exception(error)


class Background:
    """Makes programs in threads of its own while steps run, a size of a step after the other.

    Threads end after the programs that they are making once ``stop`` was called, or once the main thread has ended. A
    program that fails is tried once more, after the others: steps may have taken the memory that its compilation needs.

    Args:
        store: takes the programs.
        sizes: the keys of each size of a step, in the order of their need.
        options: the keys of programs for steps with options, which come after all sizes.
        kept: programs of earlier runs.
        num_threads: threads at most; None leaves half of the cores to the steps.
        is_tuned: whether compiling times kernels on the device. Steps beside it make these times wrong, so that such
            programs are not kept.

    Attributes:
        pending: the sizes whose programs are not all there. A larger size does the work of each.
    """

    def __init__(
        self,
        store: ProgramStore,
        sizes: Mapping[Bucket, Sequence[tuple]],
        kept: ProgramCache | None = None,
        num_threads: int | None = None,
        *,
        options: Sequence[tuple] = (),
        is_tuned: bool = False,
    ) -> None:
        self._store = store
        self._kept = kept
        self._is_tuned = is_tuned
        self._failed: set[tuple] = set()  # once
        self._sizes = sizes
        self._options = frozenset(options)
        self.pending = frozenset(sizes)
        keys = dict.fromkeys([*(key for keys in sizes.values() for key in keys), *options])
        self._left = [key for key in reversed(keys) if key not in store.programs]
        self._num_keys = len(self._left)
        self._num_done = 0
        self._num_running = 0
        self._num_taking = 0  # threads that will still look for a program to make
        self._is_stopped = False
        self._order = threading.Lock()  # programs are lowered in their order
        self._lock = threading.RLock()  # a collection may call ``stop`` in a thread that holds it
        self._note_ready()
        self._most_threads = num_threads or max(num_cores() // 2, 1)
        self._threads: list[threading.Thread] = []
        self._is_started = False
        self._wanted: set[tuple] = set()

    def start(self, owner: object) -> None:
        """Start the threads. They end too once the owner is collected."""
        weakref.finalize(owner, self.stop).atexit = False
        self._is_started = True
        with self._lock:
            for _ in range(min(self._most_threads, self._num_keys)):
                self._start_thread()

    def has(self, key: tuple) -> bool:
        """Whether a program is there. If not, make it after all others, once started."""
        if key in self._store.programs:
            return True
        with self._lock:
            if not self._is_started or self._is_stopped or key in self._wanted:
                return False
            self._wanted.add(key)
            self._left.insert(0, key)
            self._num_keys += 1
            if self._num_taking < self._most_threads:
                self._start_thread()
        return False

    def _start_thread(self) -> None:
        """Let one thread more make programs; the lock is held."""
        if self._num_running == 0:
            SHORT_SWITCHES.enter()
        self._num_running += 1
        self._num_taking += 1
        thread = threading.Thread(target=self._run, name=f"jpaged-compile-{len(self._threads)}")
        self._threads.append(thread)
        thread.start()

    def stop(self) -> None:
        """Make no further programs, and let the collector free the engine. Does not wait for programs being made."""
        with self._lock:
            self._is_stopped = True
            FROZEN_OBJECTS.thaw()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until the threads have ended. Returns whether they have.

        Args:
            timeout_s: seconds to wait at most.
        """
        end = None if timeout_s is None else monotonic() + timeout_s
        for thread in self._threads:
            thread.join(None if end is None else max(end - monotonic(), 0.0))
        return self._num_running == 0

    @property
    def progress(self) -> Progress | None:
        """Programs that are done, or have failed; None before the start, and once the threads have ended."""
        return Progress("compiling", self._num_done, self._num_keys) if self._num_running else None

    @property
    def is_over(self) -> bool:
        """Whether no program is being made, and no size is still to come: all are there, or failed for good."""
        return self._num_running == 0 and (self._is_started or not self.pending)

    def _run(self) -> None:
        try:
            while (task := self._begin()) is not None:
                key, make = task
                try:
                    make()
                except Exception as error:
                    if self._tries_again(key):
                        log.info("%s was not compiled, and is tried again after the others: %s", _name(key), error)
                        continue
                    log.warning("%s was not compiled, and %s: %s", _name(key), self._instead_of(key), error)
                with self._lock:
                    self._num_done += 1
                    self._note_ready()
        finally:
            with self._lock:
                is_last = self._num_running == 1
                if is_last and not self._is_stopped:
                    FROZEN_OBJECTS.freeze()  # without a collection, for which steps would wait
                self._num_running -= 1
            if is_last:
                SHORT_SWITCHES.leave()

    def _instead_of(self, key: tuple) -> str:
        """The way in which steps do without a program."""
        if key in self._options:
            return "a request that needs it waits"
        return "steps do without it" if key in self._wanted else "a larger size does its work"

    def _tries_again(self, key: tuple) -> bool:
        """Queue a program that failed for the first time."""
        with self._lock:
            is_first = key not in self._failed
            if is_first:
                self._failed.add(key)
                self._left.insert(0, key)
            return is_first

    def _finish(self, key: tuple, lowered: Lowered, kept: ProgramCache | None) -> Compiled:
        if not self._is_tuned or kept is None:
            return self._store.finish(key, lowered, kept)
        with unkept_by_jax():
            return self._store.finish(key, lowered, kept, if_idle=True)

    def _begin(self) -> tuple[tuple, Callable[[], object]] | None:
        """Take the next program, and lower it if no earlier run kept it. Returns the rest of the work on it."""
        store = self._store
        with self._order:
            with self._lock:
                if self._is_stopped or not self._left or not threading.main_thread().is_alive():
                    self._num_taking -= 1
                    return None
                key = self._left.pop()
            if (claim := store.claim(key)) is not None:
                return key, claim.result
            kept = self._kept if can_be_kept(key) else None
            try:
                with store.owned(key):
                    is_kept = kept is not None and kept.has(key)
                if kept is not None and is_kept:
                    return key, lambda: store.load(key, kept) or self._finish(key, store.lower(key), kept)
                lowered = store.lower(key)
            except Exception as error:
                (failed := Future[Compiled]()).set_exception(error)
                return key, failed.result
            with self._lock:
                if not self._is_stopped:
                    FROZEN_OBJECTS.freeze()  # or a collection would visit all that tracing left, while steps wait
            return key, lambda: self._finish(key, lowered, kept)

    def _note_ready(self) -> None:
        there = self._store.programs
        self.pending = frozenset(size for size in self.pending if any(key not in there for key in self._sizes[size]))


def can_be_kept(key: tuple) -> bool:
    """Whether a later process may run the program of a key: those that stream may call back into this one."""
    return key[0] != "stream"


def _name(key: tuple) -> str:
    return f"the program {key[0]!r} of {', '.join(map(str, key[1:]))}"
