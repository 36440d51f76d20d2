"""The paper's baselines, as allocation and batching policies on the same machine."""

import enum
import heapq
import math
from collections import deque
from dataclasses import dataclass

from bench.paper.buddy import BuddyAllocator
from bench.paper.step_time import A100, MAX_MODEL_LEN, NUM_SLOTS
from bench.paper.traces import Tally, Trace, Usage


class Reservation(enum.Enum):
    """Orca's reservation for a sequence when it starts (section 6.1)."""

    MAX = "Max"  # the longest sequence the model allows
    POW2 = "Pow2"  # the output's true length rounded up to a power of two
    ORACLE = "Oracle"  # the output's true length, which no system knows

    def num_slots(self, prompt_len: int, output_len: int) -> int:
        """Contiguous slots for one sequence, before the allocator rounds them."""
        if self is Reservation.MAX:
            return MAX_MODEL_LEN
        if self is Reservation.POW2:
            output_len = 1 << (output_len - 1).bit_length()
        return min(prompt_len + output_len, MAX_MODEL_LEN)


@dataclass(frozen=True)
class Orca:
    """Iteration-level batching over contiguous reservations, first come, first served.

    A request is admitted when a run of slots is free for each of its sequences. Nothing is shared: every sample and
    every beam has its own reservation. Three assumptions favour the baseline. A prompt is computed once for all of
    them, copies of KV between beams cost nothing, and rows and tokens of a step have no limit.
    """

    reservation: Reservation

    @property
    def name(self) -> str:
        return f"Orca ({self.reservation.value})"

    def serve(self, trace: Trace, tally: Tally) -> None:
        """Replay ``trace``."""
        pool = _Reservations(self.reservation, trace)
        waiting: deque[int] = deque()
        arrivals = trace.arrivals_s
        clock, num_steps, num_arrived = 0.0, 0, 0
        ends: list[tuple[int, int]] = []  # (last step, request) of the running requests
        while not tally.is_over(clock):
            if not ends and not waiting:
                clock = max(clock, arrivals[num_arrived])
            while num_arrived < len(arrivals) and arrivals[num_arrived] <= clock:
                waiting.append(num_arrived)
                num_arrived += 1
            num_tokens = pool.num_sequences  # decodes
            pool.grow()
            while waiting and pool.admit(waiting[0]):
                request = waiting.popleft()
                num_tokens += len(trace.work.prompts[request])
                heapq.heappush(ends, (num_steps + trace.work.output_lens[request] - 1, request))
            if tally.is_steady(clock):
                tally.batches.append(len(ends))
                tally.usages.append(pool.usage())
            clock += A100.compute_s(num_tokens, pool.num_tokens)
            while ends and ends[0][0] <= num_steps:
                _, request = heapq.heappop(ends)
                pool.release(request)
                tally.finish(request, clock)
            num_steps += 1


class _Reservations:
    """Reservations and tokens of the running requests of a trace. ``Orca.serve`` is its writer."""

    def __init__(self, reservation: Reservation, trace: Trace) -> None:
        self.reservation = reservation
        self.trace = trace
        self.allocator = BuddyAllocator(NUM_SLOTS)
        self.num_sequences = 0
        self.num_tokens = 0  # stored
        self._num_needed = 0  # slots that the running sequences fill by their ends
        self._num_reserved = 0
        self._runs: dict[int, list[int]] = {}  # by request

    def admit(self, request: int) -> bool:
        """Reserve a run for each sequence of a request; False, with nothing changed, when they do not all fit."""
        prompt_len, output_len = self._lens(request)
        num_slots = self.reservation.num_slots(prompt_len, output_len)
        width = self.trace.decoding.width
        runs: list[int] = []
        for _ in range(width):
            start = self.allocator.allocate(num_slots)
            if start is None:
                for run in runs:
                    self.allocator.free(run)
                return False
            runs.append(start)
        self._runs[request] = runs
        self.num_sequences += width
        self.num_tokens += width * prompt_len
        self._num_needed += width * (prompt_len + output_len - 1)
        self._num_reserved += width * num_slots
        return True

    def grow(self) -> None:
        """Store the last drawn token of every sequence."""
        self.num_tokens += self.num_sequences

    def release(self, request: int) -> None:
        """End a request, whose last token is never stored."""
        prompt_len, output_len = self._lens(request)
        width = self.trace.decoding.width
        self.num_sequences -= width
        self.num_tokens -= width * (prompt_len + output_len - 1)
        self._num_needed -= width * (prompt_len + output_len - 1)
        self._num_reserved -= width * self.reservation.num_slots(prompt_len, output_len)
        for run in self._runs.pop(request):
            self.allocator.free(run)

    def usage(self) -> Usage:
        return Usage(
            tokens=self.num_tokens,
            reserved=self._num_needed - self.num_tokens,
            internal=self._num_reserved - self._num_needed,
            external=NUM_SLOTS - self._num_reserved,
        )

    def _lens(self, request: int) -> tuple[int, int]:
        return len(self.trace.work.prompts[request]), self.trace.work.output_lens[request]


@dataclass(frozen=True)
class FasterTransformer:
    """Request-level batching over reservations of the longest sequence: a batch starts when the last one has ended.

    A batch has the earliest arrivals, as many as fit; all are answered when the longest ends. In the baseline's favour,
    prompts are not padded, and a finished sequence costs nothing but its slots.
    """

    name: str = "FasterTransformer"

    def serve(self, trace: Trace, tally: Tally) -> None:
        """Replay ``trace``."""
        most = NUM_SLOTS // (MAX_MODEL_LEN * trace.decoding.width)
        clock, start = 0.0, 0
        while not tally.is_over(clock):
            clock = max(clock, trace.arrivals_s[start])
            stop = start
            while stop < len(trace) and stop - start < most and trace.arrivals_s[stop] <= clock:
                stop += 1
            clock += self._batch_s(trace, range(start, stop))
            for request in range(start, stop):
                tally.finish(request, clock)
            start = stop

    def _batch_s(self, trace: Trace, batch: range) -> float:
        prompt_lens = [len(trace.work.prompts[request]) for request in batch]
        output_lens = [trace.work.output_lens[request] for request in batch]
        total_s = A100.compute_s(sum(prompt_lens), sum(prompt_lens))
        for step in range(1, max(output_lens)):
            running = [p for p, o in zip(prompt_lens, output_lens, strict=True) if o > step]
            context = sum(running) + step * len(running)
            width = trace.decoding.width
            total_s += A100.compute_s(width * len(running), width * context)
        assert math.isfinite(total_s)
        return total_s
