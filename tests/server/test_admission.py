"""The queue before the engine: bounds, turns, fairness among keys, and what is left when requests go."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import ExitStack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jpaged.engine.outputs import StepOutput
from jpaged.results import CompletionOutput, FinishReason, RequestOutput
from jpaged.server.admission import LONGEST_RETRY_S, Admission, Demand, Limits, Ticket
from jpaged.server.errors import ApiError
from jpaged.server.keys import ApiKey

ALICE, BOB = ApiKey("alice"), ApiKey("bob")


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Line:
    """An admission, and requests in it by name."""

    def __init__(self, **limits: int) -> None:
        given = {"max_waiting_sequences": 8, "max_waiting_tokens": 1000, "num_places": 2, "max_unstarted_tokens": 100}
        self.clock = Clock()
        self.admission = Admission(Limits(**given | limits), self.clock)
        self._stacks: dict[str, ExitStack] = {}
        self.tickets: dict[str, Ticket] = {}

    def enter(self, name: str, key: ApiKey = ALICE, num_tokens: int = 10, **demand: int) -> Ticket:
        stack = ExitStack()
        [ticket] = stack.enter_context(self.admission.queue(key, [Demand(name, num_tokens, **demand)]))
        self._stacks[name], self.tickets[name] = stack, ticket
        return ticket

    def leave(self, *names: str) -> None:
        for name in names:
            self._stacks.pop(name).close()

    def start(self, *names: str) -> None:
        started = dict.fromkeys(names)
        self.admission.note(StepOutput(started=started))  # pyright: ignore[reportArgumentType]

    def finish(self, name: str, num_tokens: int = 5) -> None:
        output = CompletionOutput(0, "", [1] * num_tokens, 0.0, finish_reason=FinishReason.STOP)
        self.admission.note(StepOutput(finished=[RequestOutput(name, None, [1], [output])]))

    @property
    def admitted(self) -> list[str]:
        return [name for name, ticket in self.tickets.items() if ticket.turn.done()]

    def assert_empty(self) -> None:
        for name in list(self._stacks):
            self.leave(name)
        admission = self.admission
        assert admission.num_waiting_sequences == admission.num_waiting_tokens == admission.num_placed_sequences == 0
        assert admission._num_unstarted_tokens == 0
        assert not admission._in_engine
        assert not admission._ring
        assert all(not lane.waiting and lane.num_sequences == 0 for lane in admission._lanes.values())


def in_loop(test: Callable[[Line], Awaitable[None] | None], **limits: int) -> None:
    async def run() -> None:
        line = Line(**limits)
        if (waiting := test(line)) is not None:
            await waiting
        line.assert_empty()

    asyncio.run(run())


def refusal(line: Line, *args, **options) -> ApiError:
    with pytest.raises(ApiError) as caught:
        line.enter(*args, **options)
    return caught.value


def test_requests_get_places_in_the_order_of_their_arrival():
    def test(line: Line) -> None:
        for name in "abcd":
            line.enter(name)
        assert line.admitted == ["a", "b"]
        line.leave("a")
        assert line.admitted == ["a", "b", "c"]
        line.finish("b")  # the engine has finished it, its client still reads
        assert line.admitted == ["a", "b", "c", "d"]

    in_loop(test)


def test_a_place_is_given_up_once():
    def test(line: Line) -> None:
        for name in "abcd":
            line.enter(name)
        line.finish("a")
        line.finish("a")
        line.leave("a")
        assert line.admitted == ["a", "b", "c"]

    in_loop(test)


def test_a_request_that_leaves_the_queue_makes_way():
    def test(line: Line) -> None:
        for name in "abcd":
            line.enter(name)
        line.leave("c")
        line.leave("a")
        assert line.admitted == ["a", "b", "d"]

    in_loop(test)


def test_a_request_whose_task_is_cancelled_when_its_turn_comes_gives_its_place_on():
    async def test(line: Line) -> None:
        line.enter("a", num_sequences=2)
        b, c = line.enter("b", num_sequences=2), line.enter("c")

        async def wait() -> None:
            try:
                await b.turn
            finally:
                line.leave("b")

        task = asyncio.create_task(wait())
        await asyncio.sleep(0)
        task.cancel()
        line.leave("a")
        assert not c.turn.done()
        await asyncio.wait([task])
        assert c.turn.done()

    in_loop(test)


def test_the_engine_gets_few_prompt_tokens_that_it_has_not_started():
    def test(line: Line) -> None:
        line.enter("long", num_tokens=90)
        line.enter("other", num_tokens=20)
        assert line.admitted == ["long"]
        line.start("long")
        assert line.admitted == ["long", "other"]

    in_loop(test)


def test_an_empty_engine_takes_a_request_of_any_size():
    def test(line: Line) -> None:
        line.enter("first")
        line.enter("wide", num_tokens=500, num_sequences=8)
        line.enter("next")
        assert line.admitted == ["first"]
        line.leave("first")
        assert line.admitted == ["first", "wide"]
        line.leave("wide")
        assert line.admitted == ["first", "wide", "next"]

    in_loop(test, max_waiting_sequences=20)


def test_lower_priorities_go_first_whoever_asks():
    def test(line: Line) -> None:
        line.enter("full", num_sequences=2)
        line.enter("a", ALICE, priority=1)
        line.enter("b", BOB, priority=0)
        line.enter("c", ALICE, priority=-1)
        line.leave("full")
        assert line.admitted == ["full", "b", "c"]

    in_loop(test)


def test_a_key_with_many_requests_does_not_delay_another():
    def test(line: Line) -> None:
        for i in range(500):
            line.enter(f"alice {i}", ALICE)
        line.enter("bob", BOB)
        for i in range(3):
            line.finish(f"alice {i}")
        assert "bob" in line.admitted

    in_loop(test, max_waiting_sequences=1000, max_waiting_tokens=100_000)


@given(st.lists(st.integers(1, 90), min_size=60, max_size=60), st.integers(1, 3))
def test_keys_get_tokens_in_proportion_to_their_weights(sizes, weight):
    """Deficit round robin: as long as both wait, the shares differ by little more than the largest request."""

    def test(line: Line) -> None:
        keys = {"alice": ALICE, "bob": ApiKey("bob", weight=weight)}
        order: list[str] = []
        line.enter("full")
        for i, size in enumerate(sizes):
            for name, key in keys.items():
                line.enter(f"{name} {i}", key, num_tokens=size * 20, max_tokens=1)
        costs = {name: ticket.cost for name, ticket in line.tickets.items()}
        line.finish("full")
        served = dict.fromkeys(keys, 0)
        while len(order) < len(sizes):
            [name] = [name for name in line.admitted if name not in order and name != "full"]
            order.append(name)
            served[name.split()[0]] += costs[name]
            line.finish(name)
        assert abs(served["alice"] - served["bob"] / weight) <= 2 * 1801

    in_loop(test, num_places=1, max_waiting_sequences=1000, max_waiting_tokens=10**6)


def test_a_full_queue_says_when_to_come_back():
    def test(line: Line) -> None:
        for i in range(10):
            line.enter(str(i))
        error = refusal(line, "one too many")
        assert (error.status, error.type, error.code) == (429, "rate_limit_error", "max_waiting_sequences")
        assert error.headers == {"retry-after": "1", "retry-after-ms": "1000"}
        line.clock.now += 10
        for i in range(8):  # 8 leave at the end of 10 s
            line.finish(str(i))
        for i in range(10, 18):
            line.enter(str(i))
        assert refusal(line, "again").headers["retry-after"] == "8"  # 8 wait, 10 have left in 10 s
        line.clock.now += 10_000
        assert refusal(line, "still").headers["retry-after"] == "5"
        assert len(line.tickets) == 18

    in_loop(test)


def test_the_longest_wait_is_bounded():
    def test(line: Line) -> None:
        for i in range(10):
            line.enter(str(i))
        line.clock.now += 29
        assert 1 <= int(refusal(line, "one too many").headers["retry-after"]) <= LONGEST_RETRY_S

    in_loop(test, num_places=1, max_waiting_sequences=9)


def test_the_queue_is_bounded_by_tokens():
    def test(line: Line) -> None:
        line.enter("full", num_sequences=2)
        line.enter("a", num_tokens=900)
        assert refusal(line, "b", num_tokens=101).code == "max_waiting_tokens"
        line.enter("c", num_tokens=100)

    in_loop(test)


def test_sequences_of_a_request_count_in_the_queue():
    def test(line: Line) -> None:
        line.enter("full", num_sequences=2)
        assert refusal(line, "wide", num_sequences=9).status == 429
        line.enter("less wide", num_sequences=8)
        assert refusal(line, "one more").status == 429

    in_loop(test)


def test_one_key_cannot_shut_others_out():
    def test(line: Line) -> None:
        for i in range(10):
            line.enter(f"alice {i}", ALICE)
        assert refusal(line, "alice too", ALICE).status == 429
        for i in range(4):
            line.enter(f"bob {i}", BOB)
        assert refusal(line, "bob too", BOB).status == 429

    in_loop(test)


def test_a_key_has_a_limit_of_its_own():
    def test(line: Line) -> None:
        key = ApiKey("carol", max_sequences=3)
        line.enter("a", key, num_sequences=2)
        assert refusal(line, "b", key, num_sequences=2).code == "max_sequences"
        error = refusal(line, "wide", key, num_sequences=4)
        assert (error.status, error.code) == (400, "too_many_sequences")
        line.enter("c", key)
        line.enter("other", BOB)

    in_loop(test)


def test_requests_and_tokens_a_minute():
    def test(line: Line) -> None:
        few = ApiKey("few", requests_per_minute=2)
        line.enter("a", few)
        line.enter("b", few)
        error = refusal(line, "c", few)
        assert (error.code, error.headers["retry-after"]) == ("requests_per_minute", "30")
        line.clock.now += 30
        line.enter("c", few)
        short = ApiKey("short", tokens_per_minute=60)
        line.leave("a", "b", "c")
        line.enter("d", short, num_tokens=30)
        line.finish("d", num_tokens=90)
        assert refusal(line, "e", short).headers["retry-after"] == "60"  # 61 are missing, and one comes each second
        line.clock.now += 61
        line.enter("e", short)

    in_loop(test)


def test_many_prompts_enter_together_or_not_at_all():
    def test(line: Line) -> None:
        line.enter("full", num_sequences=2)
        with pytest.raises(ApiError), line.admission.queue(ALICE, [Demand(str(i), 1) for i in range(9)]):
            pass
        assert line.admission.num_waiting_sequences == 0
        with line.admission.queue(ALICE, [Demand(str(i), 1) for i in range(8)]) as tickets:
            line.leave("full")
            assert [ticket.turn.done() for ticket in tickets] == [True] * 2 + [False] * 6

    in_loop(test)


def test_a_closed_queue_serves_those_that_wait():
    async def test(line: Line) -> None:
        line.enter("a", num_sequences=2)
        line.enter("b")
        line.admission.close()
        error = refusal(line, "c")
        assert (error.status, error.headers["connection"]) == (503, "close")
        empty = asyncio.create_task(line.admission.wait_until_empty())
        await asyncio.sleep(0)
        line.leave("a")
        assert line.tickets["b"].turn.done()
        await asyncio.sleep(0)
        assert not empty.done()
        line.leave("b")
        await empty

    in_loop(test)


def test_the_tokens_of_a_request_count_though_its_client_leaves():
    def test(line: Line) -> None:
        short = ApiKey("short", tokens_per_minute=60)
        line.enter("a", short, num_tokens=30)
        line.start("a")
        line.leave("a")
        assert not line.admission._in_engine
        line.finish("a", num_tokens=90)
        assert refusal(line, "b", short).headers["retry-after"] == "60"
        line.finish("a", num_tokens=90)  # another one of this name
        line.clock.now += 61
        line.enter("b", short)

    in_loop(test)


def test_a_key_keeps_no_credit_of_requests_that_leave_the_queue():
    def test(line: Line) -> None:
        line.enter("fills", num_sequences=2)
        line.enter("a", BOB)
        line.enter("b", BOB)
        line.enter("large", num_tokens=900)
        line.enter("small", num_tokens=10, max_tokens=1)
        line.leave("fills")
        assert line.admitted == ["fills", "a"]
        lane = line.tickets["large"].lane
        assert lane.credit > 11
        line.leave("large")
        assert lane.credit == 11

    in_loop(test, num_places=1, max_waiting_tokens=10_000)
