"""Several keys on one server: apart in the cache, fair in the queue, and each master of its own requests alone."""

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable

import httpx
import pytest

from jpaged.server import ServerSettings, create_app
from jpaged.server.keys import KeyRing
from tests.server.bystander import bystander
from tests.server.conftest import TIMEOUT_S

PROMPT = "def area(width, height):\n    return width * height\n" * 2
KEYS = '[alice]\nkey = "sk-of-alice"\n[bob]\nkey = "sk-of-bob-"\nmin_priority = -1\n'
SHORT = {"prompt": "x = ", "max_tokens": 4, "temperature": 0, "ignore_eos": True}


@pytest.fixture
def keys(tmp_path) -> KeyRing:
    path = tmp_path / "keys.toml"
    path.write_text(KEYS)
    return KeyRing.load(path, {})


@pytest.fixture
def run(served, keys) -> Callable[..., None]:
    """Runs a task with the clients of alice and bob, of an application of their own over the same engine."""

    def run(task: Callable[..., Awaitable[None]], **settings) -> None:
        async def all_of_it() -> None:
            app = create_app(served.llm, ServerSettings(**settings), keys)
            transport = httpx.ASGITransport(app)
            alice, bob = (
                httpx.AsyncClient(
                    transport=transport,
                    base_url="http://127.0.0.1",
                    timeout=TIMEOUT_S,
                    headers={"authorization": f"Bearer {token}"},
                )
                for token in ("sk-of-alice", "sk-of-bob-")
            )
            async with alice, bob:
                await task(alice, bob, app.state.server)
            assert app.state.server.calls == {}
            assert app.state.server._waiting == {}
            assert app.state.server.admission.num_placed_sequences == 0

        served.run(all_of_it())

    return run


async def complete(client: httpx.AsyncClient, **body) -> httpx.Response:
    return await client.post("/v1/completions", json=SHORT | body)


async def num_cached(client: httpx.AsyncClient, **body) -> int:
    response = await complete(client, **body)
    assert response.status_code == 200, response.text
    return response.json()["usage"]["prompt_tokens_details"]["cached_tokens"]


def test_keys_do_not_see_what_others_have_cached(served, run):
    async def task(alice, bob, server) -> None:
        prompt = PROMPT + "# of tenants"
        assert await num_cached(alice, prompt=prompt) == 0
        first = await num_cached(alice, prompt=prompt)
        assert first > 0
        assert await num_cached(bob, prompt=prompt) == 0
        assert await num_cached(bob, prompt=prompt) == first
        assert await num_cached(alice, prompt=prompt, cache_salt="mine") == 0
        assert await num_cached(alice, prompt=prompt, cache_salt="mine") == first
        assert await num_cached(bob, prompt=prompt, cache_salt="mine") == 0
        [alices] = [key for _, key in server.keys._keys if key.name == "alice"]
        assert await num_cached(bob, prompt=prompt, cache_salt=alices.salt) == 0  # even if it were known

    with bystander(served):
        run(task)


def test_no_step_of_a_key_is_shorter_for_what_another_has_cached(run):
    """The tokens that steps compute, rather than times, tell whether a cache was hit."""

    async def task(alice, bob, server) -> None:
        computed: list[int] = []
        server.llm.listen(lambda output: computed.append(output.num_tokens))

        async def num_computed(client, **body) -> int:
            computed.clear()
            await complete(client, prompt=PROMPT + "# steps", max_tokens=1, **body)
            return sum(computed)

        cold = await num_computed(alice)
        assert await num_computed(alice) < cold
        assert await num_computed(bob) == cold
        assert await num_computed(alice, cache_salt="mine") == cold

    run(task)


def test_requests_are_ended_by_their_own_key_alone(served, run):
    async def task(alice, bob, server) -> None:
        headers = {"x-request-id": "the-same-for-both"}
        bodies = [SHORT | {"max_tokens": 280}, SHORT | {"max_tokens": 280, "prompt": "y = "}]
        running = [
            asyncio.ensure_future(client.post("/v1/completions", json=body, headers=headers))
            for client, body in zip((alice, bob), bodies, strict=True)
        ]
        while len(server.calls) < 2:
            await asyncio.sleep(0)
        [of_alice] = [call_id for call_id, call in server.calls.items() if call.key.name == "alice"]
        for other in (of_alice, of_alice[:-1], of_alice[:-1] + "%", "", "x", f"{of_alice}-0", f"{of_alice}/../x"):
            response = await bob.post(f"/v1/requests/{other}/cancel")
            assert response.status_code == 404
        assert len(server.calls) == 2
        assert (await alice.post("/v1/requests/the-same-for-both/cancel")).status_code == 200
        ended, finished = await asyncio.gather(*running)
        assert ended.json()["error"]["code"] == "cancelled"
        assert finished.status_code == 200
        assert (await alice.post(f"/v1/requests/{of_alice}/cancel")).status_code == 404

    with bystander(served):
        run(task)


def test_a_request_that_waits_can_be_ended(served, run):
    async def task(alice, bob, server) -> None:
        with served.held():
            running = [asyncio.ensure_future(complete(alice)) for _ in range(server.admission.limits.num_places)]
            while len(server.admission._in_engine) < len(running):
                await asyncio.sleep(0)
            waiting = asyncio.ensure_future(
                alice.post("/v1/completions", json=SHORT, headers={"x-request-id": "waits"})
            )
            while server.admission.num_waiting_sequences == 0:
                await asyncio.sleep(0)
            assert (await bob.post("/v1/requests/waits/cancel")).status_code == 404
            assert (await alice.post("/v1/requests/waits/cancel")).status_code == 200
            assert (await waiting).json()["error"]["code"] == "cancelled"
        assert [each.status_code for each in await asyncio.gather(*running)] == [200] * len(running)

    run(task)


def test_one_key_with_many_requests_does_not_delay_another(run):
    """Bob comes last and is served before most of alice's requests, though all of them are there before."""

    async def task(alice, bob, server) -> None:
        order: list[str] = []

        async def ask(client, name: str) -> None:
            response = await complete(client, prompt=f"{name} = ")
            assert response.status_code == 200
            order.append(name)

        alices = [asyncio.ensure_future(ask(alice, f"a{i}")) for i in range(100)]
        while server.admission.num_waiting_sequences < 60:
            await asyncio.sleep(0)
        bobs = asyncio.ensure_future(ask(bob, "b"))
        await asyncio.gather(bobs, *alices)
        assert order.index("b") <= 40 + 2 * server.admission.limits.num_places

    run(task)


def test_a_priority_below_the_floor_of_a_key_is_raised_to_it(run):
    async def task(alice, bob, server) -> None:
        seen: list[tuple[str, int]] = []
        add = server.llm.engine.scheduler.add

        def noted(request):
            seen.append((request.request_id, request.priority))
            return add(request)

        server.llm.engine.scheduler.add = noted
        try:
            for client in (alice, bob):
                for priority in (-9, 0, 3):
                    await complete(client, priority=priority)
        finally:
            del server.llm.engine.scheduler.add
        assert [priority for _, priority in seen] == [0, 0, 3, -1, 0, 3]

    run(task)


def test_a_full_queue_refuses_and_its_clients_succeed_later(served, run):
    async def task(alice, bob, server) -> None:
        num_places = server.admission.limits.num_places
        with served.held():
            first = [asyncio.ensure_future(complete(alice)) for _ in range(num_places + 4)]
            while server.admission.num_waiting_sequences < 4:
                await asyncio.sleep(0)
            refused = await complete(alice)
            assert refused.status_code == 429
            assert refused.json()["error"]["type"] == "rate_limit_error"
            assert int(refused.headers["retry-after"]) >= 1
            assert int(refused.headers["retry-after-ms"]) == 1000 * int(refused.headers["retry-after"])
        assert [each.status_code for each in await asyncio.gather(*first)] == [200] * len(first)
        assert (await complete(alice)).status_code == 200

    run(task, max_waiting_sequences=4)


def test_what_can_never_fit_is_a_mistake_even_while_the_queue_is_full(served, run):
    async def task(alice, bob, server) -> None:
        limit = server.llm.max_model_len
        with served.held():
            first = [asyncio.ensure_future(complete(alice)) for _ in range(server.admission.limits.num_places + 1)]
            while server.admission.num_waiting_sequences < 1:
                await asyncio.sleep(0)
            assert (await complete(bob)).status_code == 429
            assert (await complete(bob, prompt=[1] * limit)).status_code == 400
            assert (await complete(bob, n=9)).status_code == 400
        await asyncio.gather(*first)

    run(task, max_waiting_sequences=1)


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_takes_too_long_ends(served, run, stream):
    async def task(alice, bob, server) -> None:
        with served.held():
            num_places = server.admission.limits.num_places
            running = [asyncio.ensure_future(complete(alice, stream=stream)) for _ in range(num_places + 1)]
            answers = await asyncio.gather(*running)
        codes = [answer.json()["error"]["code"] for answer in answers]
        assert {*codes} <= {"queue_timeout", "request_timeout"}
        for answer, code in zip(answers, codes, strict=True):
            assert answer.status_code == {"queue_timeout": 408, "request_timeout": 504}[code]

    run(task, request_timeout_s=0.5)


def test_a_request_that_runs_for_too_long_ends(served, run):
    async def task(alice, bob, server) -> None:
        long = asyncio.ensure_future(complete(alice, max_tokens=280, stream=True, n=8, temperature=1))
        while not server.calls:
            await asyncio.sleep(0)
        with served.held():
            answer = await long
        events = [event for event in answer.text.split("\n\n") if event.startswith("data")]
        last = events[-1] if events else answer.text
        assert "request_timeout" in last
        assert "[DONE]" not in answer.text

    run(task, request_timeout_s=0.3)


def test_tokenising_counts_against_the_rates_of_the_key_alone(run, keys, monkeypatch):
    async def task(alice, bob, server):
        monkeypatch.setattr(server.admission, "_clock", lambda: 0.0)
        limits = {"requests_per_minute": 3, "tokens_per_minute": 1000}
        monkeypatch.setattr(
            server.admission, "_lane", lambda key, lane=server.admission._lane: lane(dataclasses.replace(key, **limits))
        )
        tokenized = (await alice.post("/tokenize", json={"prompt": "def f(x):"})).json()["tokens"]
        assert (await alice.post("/detokenize", json={"tokens": tokenized})).status_code == 200
        assert server.admission._lanes["alice"].buckets["tokens_per_minute"].level == 1000 - 2 * len(tokenized)
        assert (await complete(alice)).status_code == 200
        for path, body in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [1]})):
            response = await alice.post(path, json=body)
            assert (response.status_code, response.json()["error"]["code"]) == (429, "requests_per_minute")
            assert response.headers["retry-after"] == "20"
            assert (await bob.post(path, json=body)).status_code == 200

    run(task)
