"""Admission: who may wait, and whose turn it is. The engine gets as many requests as it can start at once."""

import asyncio
import bisect
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import monotonic

from jpaged.engine.outputs import StepOutput
from jpaged.server.errors import ApiError
from jpaged.server.keys import ApiKey

FIRST_GUESS = 128
"""Tokens that a sequence is taken to generate before any has ended."""

LONGEST_RETRY_S = 60
"""Greatest ``Retry-After``, in seconds."""

RATE_OVER_S = 30.0
"""The drain rate is taken over this time at most."""

NO_DRAIN_RETRY_S = 5
"""``Retry-After`` while nothing has left the queue."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of the queue, and of what the engine gets.

    A key that waits with less than its share of a full queue may still add to it: no key can shut others out.

    Args:
        max_waiting_sequences: sequences that wait.
        max_waiting_tokens: prompt tokens that wait.
        num_places: sequences in the engine, those included that have not started there.
        max_unstarted_tokens: prompt tokens in the engine of requests that have not started there.
    """

    max_waiting_sequences: int
    max_waiting_tokens: int
    num_places: int
    max_unstarted_tokens: int


@dataclass(frozen=True, slots=True)
class Demand:
    """The size of one request to the engine.

    Args:
        request_id: its id in the engine.
        num_tokens: prompt tokens.
        num_sequences: sequences that it runs at once.
        max_tokens: most tokens that each sequence generates; None fills the context.
        priority: lower is served first.
    """

    request_id: str
    num_tokens: int
    num_sequences: int = 1
    max_tokens: int | None = None
    priority: int = 0


@dataclass(slots=True)
class _Bucket:
    """Tokens that come back at a constant rate, up to those of one minute."""

    per_minute: int
    level: float
    updated: float

    def wait_s(self, now: float) -> float:
        """Seconds until something may be taken again; 0 now."""
        self.level = min(self.level + (now - self.updated) * self.per_minute / 60, self.per_minute)
        self.updated = now
        return max(0.0, (1 - self.level) * 60 / self.per_minute)


@dataclass(slots=True, eq=False)
class _Lane:
    """The requests of one key.

    Args:
        key: the key, as it was at its last request.
        waiting: the requests that wait, those of least priority first, in the order of their arrival.
        credit: tokens that it may still start before it is the turn of other keys.
        num_sequences: sequences that wait or are in the engine.
        buckets: by the name of the limit, what is left of it.
    """

    key: ApiKey
    waiting: list["Ticket"] = field(default_factory=list)
    credit: int = 0
    num_sequences: int = 0
    buckets: dict[str, _Bucket] = field(default_factory=dict)

    @property
    def num_waiting_sequences(self) -> int:
        return sum([ticket.demand.num_sequences for ticket in self.waiting])

    @property
    def num_waiting_tokens(self) -> int:
        return sum([ticket.demand.num_tokens for ticket in self.waiting])

    def bucket(self, name: str, now: float) -> _Bucket | None:
        """The bucket of a limit of the key; None without the limit."""
        per_minute: int | None = getattr(self.key, name)
        if per_minute is None:
            self.buckets.pop(name, None)
            return None
        bucket = self.buckets.get(name)
        if bucket is None or bucket.per_minute != per_minute:
            bucket = self.buckets[name] = _Bucket(per_minute, per_minute, now)
        return bucket


@dataclass(slots=True, eq=False)
class Ticket:
    """The place of one request, from its arrival to its end; only its ``Admission`` writes it.

    Args:
        number: requests that arrived before.
        lane: the requests of its key.
        demand: its size.
        cost: tokens that it is expected to take.
        turn: has a result once the engine may have it.
        is_admitted: whether its turn has come.
        is_started: whether the engine has computed its first token.
    """

    number: int
    lane: _Lane
    demand: Demand
    cost: int
    turn: asyncio.Future[None]
    is_admitted: bool = False
    is_started: bool = False

    @property
    def rank(self) -> tuple[int, int]:
        return self.demand.priority, self.number

    def refuse(self, error: ApiError) -> bool:
        """Let whoever awaits its turn get an error. Returns False, without effect, if the turn has come."""
        if self.turn.done():
            return False
        self.turn.set_exception(error)
        return True


class Admission:
    """The queue before the engine: bounded, fair among keys by deficit round robin, first come first served in a key.

    A request of a lower priority goes before all others. All methods are for the thread of one event loop.

    Args:
        limits: the limits.
        clock: seconds, as of ``time.monotonic``.
        on_rejection: told the code of each error that refuses a request.
    """

    def __init__(
        self,
        limits: Limits,
        clock: Callable[[], float] = monotonic,
        on_rejection: Callable[[str], None] = lambda code: None,
    ) -> None:
        self.limits = limits
        self._clock = clock
        self._on_rejection = on_rejection
        self._lanes: dict[str, _Lane] = {}
        self._ring: list[_Lane] = []  # the lanes that wait, the one whose turn it is first
        self._in_engine: dict[str, Ticket] = {}
        self._left: dict[str, Ticket] = {}  # that had started, and whose tokens are not charged yet
        self._num_arrived = 0
        self._is_closed = False
        self._empty: list[asyncio.Future[None]] = []  # who waits until nothing is left
        self._output_len = float(FIRST_GUESS)  # of late sequences, on average
        self._departures: deque[tuple[float, int]] = deque(maxlen=256)  # times and sequences that left the queue
        self.num_waiting_sequences = 0
        self.num_waiting_tokens = 0
        self.num_placed_sequences = 0
        self._num_unstarted_tokens = 0

    # For requests -------------------------------------------------------------------------------------------------

    @contextmanager
    def queue(self, key: ApiKey, demands: Sequence[Demand]) -> Iterator[list[Ticket]]:
        """Queue requests, all or none. Each has its place until the engine has finished it, or until the block ends.

        Raises:
            ApiError: 429, the queue is full or the key has reached a limit; 400, the key's limit is below what is asked
                for; 503, the server is draining.
        """
        try:
            tickets = self._enter(key, demands)
        except ApiError as error:
            self._on_rejection(error.code or "other")
            raise
        try:
            yield tickets
        finally:
            for ticket in tickets:
                self._leave(ticket)

    def count(self, key: ApiKey) -> None:
        """Count a request that the engine has no part in against the rates of its key.

        Raises:
            ApiError: 429, the key has reached one of them.
        """
        lane = self._lane(key)
        try:
            self._check_rates(lane)
        except ApiError as error:
            self._on_rejection(error.code or "other")
            raise
        self._charge(lane, "requests_per_minute", 1)

    def count_tokens(self, key: ApiKey, num_tokens: int) -> None:
        """Count the tokens of such a request."""
        self._charge(self._lane(key), "tokens_per_minute", num_tokens)

    @property
    def num_waiting(self) -> int:
        """Requests that wait."""
        return sum([len(lane.waiting) for lane in self._ring])

    # For the engine -----------------------------------------------------------------------------------------------

    def note(self, output: StepOutput) -> None:
        """Learn from a step which requests have started and ended; a listener of ``AsyncLLM``."""
        for request_id in output.started:
            if (ticket := self._in_engine.get(request_id)) is not None:
                self._start(ticket)
        for result in output.finished:
            ticket = self._in_engine.get(result.request_id) or self._left.pop(result.request_id, None)
            if ticket is not None:
                lens = [len(each.token_ids) for each in result.outputs]
                self._charge(ticket.lane, "tokens_per_minute", sum(lens))
                self._output_len += (sum(lens) / max(len(lens), 1) - self._output_len) / 16
                self._leave(ticket, is_finished=True)
        for request_id in output.failed:
            self._left.pop(request_id, None)
            if (ticket := self._in_engine.get(request_id)) is not None:
                self._leave(ticket, is_finished=True)
        self._admit()

    # Draining -----------------------------------------------------------------------------------------------------

    @property
    def is_closed(self) -> bool:
        """Whether new requests are refused."""
        return self._is_closed

    def close(self) -> None:
        """Refuse new requests; those that wait still get their turn."""
        self._is_closed = True

    async def wait_until_empty(self) -> None:
        """Return once no request waits or has a place."""
        if self._in_engine or self._ring:
            empty = asyncio.get_running_loop().create_future()
            self._empty.append(empty)
            await empty

    # Bounds -------------------------------------------------------------------------------------------------------

    def _enter(self, key: ApiKey, demands: Sequence[Demand]) -> list[Ticket]:
        lane, loop = self._lane(key), asyncio.get_running_loop()
        num_sequences = sum([each.num_sequences for each in demands])
        num_tokens = sum([each.num_tokens for each in demands])
        self._check(lane, num_sequences, num_tokens)
        self._charge(lane, "requests_per_minute", 1)
        self._charge(lane, "tokens_per_minute", num_tokens)
        lane.num_sequences += num_sequences
        self.num_waiting_sequences += num_sequences
        self.num_waiting_tokens += num_tokens
        tickets = []
        for demand in demands:
            self._num_arrived += 1
            tickets.append(Ticket(self._num_arrived, lane, demand, self._cost(demand), loop.create_future()))
            bisect.insort(lane.waiting, tickets[-1], key=lambda each: each.rank)
        if lane not in self._ring:
            self._ring.append(lane)
        self._admit()
        return tickets

    def _cost(self, demand: Demand) -> int:
        output_len = math.ceil(self._output_len)
        if demand.max_tokens is not None:
            output_len = min(output_len, demand.max_tokens)
        return demand.num_tokens + demand.num_sequences * output_len

    def _check(self, lane: _Lane, num_sequences: int, num_tokens: int) -> None:
        if self._is_closed:
            raise ApiError(
                503,
                "the server is shutting down and takes no more requests: ask another one",
                code="draining",
                headers={"connection": "close", "retry-after": "1"},
            )
        limits = self.limits
        self._check_rates(lane)
        most = lane.key.max_sequences
        if most is not None and num_sequences > most:
            raise ApiError(
                400, f"the request has {num_sequences} sequences, this key {most} at once", code="too_many_sequences"
            )
        if most is not None and lane.num_sequences + num_sequences > most:
            raise _too_many(f"this key has {most} sequences at once", "max_sequences", self._drain_s(num_sequences))
        if not self._ring and self._has_places(num_sequences, num_tokens):
            return
        num_lanes = len(self._ring) + (lane not in self._ring)
        for name, num, of_request, of_key in (
            ("max_waiting_sequences", self.num_waiting_sequences, num_sequences, lane.num_waiting_sequences),
            ("max_waiting_tokens", self.num_waiting_tokens, num_tokens, lane.num_waiting_tokens),
        ):
            limit = getattr(limits, name)
            if num + of_request > limit and of_key + of_request > limit // num_lanes:
                what = name.removeprefix("max_waiting_")
                wait_s = self._drain_s(self.num_waiting_sequences)
                raise _too_many(f"{num} {what} wait, of at most {limit}", name, wait_s)

    def _check_rates(self, lane: _Lane) -> None:
        now = self._clock()
        for name, what in (("requests_per_minute", "requests"), ("tokens_per_minute", "tokens")):
            bucket = lane.bucket(name, now)
            if bucket is not None and (wait_s := bucket.wait_s(now)) > 0:
                raise _too_many(f"this key has {bucket.per_minute} {what} a minute", name, wait_s)

    def _lane(self, key: ApiKey) -> _Lane:
        lane = self._lanes.setdefault(key.name, _Lane(key))
        lane.key = key
        return lane

    def _charge(self, lane: _Lane, name: str, amount: int) -> None:
        if (bucket := lane.bucket(name, self._clock())) is not None:
            bucket.level -= amount

    def _drain_s(self, num_sequences: int) -> float:
        """Seconds in which so many sequences leave the queue at the rate of late."""
        now = self._clock()
        late = [(time, num) for time, num in self._departures if now - time < RATE_OVER_S]
        if not late:
            return NO_DRAIN_RETRY_S
        rate = sum(num for _, num in late) / max(now - late[0][0], 0.1)
        return num_sequences / rate

    # Turns --------------------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Let requests into the engine as long as it has places."""
        while self._ring:
            lane = self._choose()
            ticket = lane.waiting[0]
            if not self._has_places(ticket.demand.num_sequences, ticket.demand.num_tokens):
                return
            self._dequeue(ticket)
            lane.credit -= ticket.cost
            if not lane.waiting:
                lane.credit = 0
            elif lane.credit < lane.waiting[0].cost:
                self._ring.remove(lane)
                self._ring.append(lane)
            ticket.is_admitted = True
            self._in_engine[ticket.demand.request_id] = ticket
            self.num_placed_sequences += ticket.demand.num_sequences
            self._num_unstarted_tokens += ticket.demand.num_tokens
            self._departures.append((self._clock(), ticket.demand.num_sequences))
            if not ticket.turn.done():  # its task may have been cancelled just now
                ticket.turn.set_result(None)

    def _choose(self) -> _Lane:
        """The lane whose turn it is: all get credit by their weights until one can pay for its first request."""
        priority = min(lane.waiting[0].demand.priority for lane in self._ring)
        lanes = [lane for lane in self._ring if lane.waiting[0].demand.priority == priority]
        num_rounds = min(max(0, -((lane.credit - lane.waiting[0].cost) // lane.key.weight)) for lane in lanes)
        for lane in lanes:
            lane.credit += num_rounds * lane.key.weight
        return next(lane for lane in lanes if lane.credit >= lane.waiting[0].cost)

    def _has_places(self, num_sequences: int, num_tokens: int) -> bool:
        """Whether the engine can take a request now; an engine that is empty takes any."""
        if not self._in_engine:
            return True
        if self.num_placed_sequences + num_sequences > self.limits.num_places:
            return False
        num_unstarted = self._num_unstarted_tokens
        return num_unstarted == 0 or num_unstarted + num_tokens <= self.limits.max_unstarted_tokens

    def _dequeue(self, ticket: Ticket) -> None:
        lane = ticket.lane
        del lane.waiting[bisect.bisect_left(lane.waiting, ticket.rank, key=lambda each: each.rank)]
        self.num_waiting_sequences -= ticket.demand.num_sequences
        self.num_waiting_tokens -= ticket.demand.num_tokens
        if not lane.waiting:
            self._ring.remove(lane)

    def _start(self, ticket: Ticket) -> None:
        if not ticket.is_started:
            ticket.is_started = True
            self._num_unstarted_tokens -= ticket.demand.num_tokens

    def _take_back_credit(self, lane: _Lane) -> None:
        """Leave a lane the credit for its first request: that for a request which has left is not for others."""
        lane.credit = min(lane.credit, lane.waiting[0].cost if lane.waiting else 0)

    def _leave(self, ticket: Ticket, *, is_finished: bool = False) -> None:
        """Forget a request, wherever it is. A second call does nothing."""
        if not ticket.is_admitted:
            if ticket in ticket.lane.waiting:
                self._dequeue(ticket)
                ticket.lane.num_sequences -= ticket.demand.num_sequences
                self._take_back_credit(ticket.lane)
        elif self._in_engine.get(ticket.demand.request_id) is ticket:
            del self._in_engine[ticket.demand.request_id]
            if ticket.is_started and not is_finished:
                self._left[ticket.demand.request_id] = ticket
            self._start(ticket)
            self.num_placed_sequences -= ticket.demand.num_sequences
            ticket.lane.num_sequences -= ticket.demand.num_sequences
        self._admit()
        if not self._in_engine and not self._ring:
            for empty in self._empty:
                if not empty.done():
                    empty.set_result(None)
            self._empty.clear()


def _too_many(what: str, code: str, wait_s: float) -> ApiError:
    """The error for a limit that time lifts."""
    seconds = min(max(math.ceil(wait_s), 1), LONGEST_RETRY_S)
    return ApiError(
        429,
        f"too many requests: {what}. Try again in {seconds} s",
        code=code,
        headers={"retry-after": str(seconds), "retry-after-ms": str(seconds * 1000)},
    )
