"""``/v1/prefixes``: pinned prefixes are found, belong to their key, stay within quotas, and expire."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest

from jpaged.server import ServerSettings, create_app
from jpaged.server.dashboard.routes import OPEN_PATHS
from jpaged.server.keys import ANONYMOUS, KEYS_VARIABLE, KeyRing
from tests.server.conftest import TIMEOUT_S

PREFIX = "class Stack:\n    def push(self, item):\n        self.items.append(item)\n"
ALICE, BOB = "alice-has-this-key", "bob-has-that-key"


@asynccontextmanager
async def clients(served, *keys: str, **settings) -> AsyncIterator[list[httpx.AsyncClient]]:
    """A client for each key of one application; without keys, one client."""
    ring = KeyRing.load(None, {KEYS_VARIABLE: ",".join(keys)})
    app = create_app(served.llm, ServerSettings(**settings), ring)
    transport = httpx.ASGITransport(app)
    made = [
        httpx.AsyncClient(
            transport=transport,
            base_url="http://localhost",
            timeout=TIMEOUT_S,
            headers={"authorization": f"Bearer {key}"} if key else {},
        )
        for key in keys or ("",)
    ]
    try:
        yield made
    finally:
        for prefix in list(app.state.server.prefixes._prefixes.values()):
            await app.state.server.prefixes.unpin(prefix)
        for client in made:
            await client.aclose()


async def pin(client: httpx.AsyncClient, prompt=PREFIX, **fields) -> httpx.Response:
    return await client.post("/v1/prefixes", json={"prompt": prompt} | fields)


async def num_cached(client: httpx.AsyncClient, prompt: str) -> int:
    body = {"prompt": prompt, "max_tokens": 1}
    answer = await client.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]


def test_a_pinned_prefix_is_listed_found_and_unpinned(served):
    async def run() -> None:
        async with clients(served) as [client]:
            made = await pin(client, ttl=60)
            card = made.json()
            assert made.status_code == 201
            assert made.headers["location"] == f"/v1/prefixes/{card['id']}"
            assert card["expires"] - card["created"] == 60
            assert card["tokens"] == len(served.llm.tokenizer.encode(PREFIX))
            assert (await served.llm.stats()).num_used_blocks == card["blocks"] == -(-card["tokens"] // 16)
            assert (await client.get("/v1/prefixes")).json() == {"object": "list", "data": [card]}
            assert (await client.get(f"/v1/prefixes/{card['id']}")).json() == card
            assert await num_cached(client, PREFIX + "x = 1") >= card["tokens"] // 16 * 16
            gone = await client.delete(f"/v1/prefixes/{card['id']}")
            assert gone.json() == {"id": card["id"], "object": "prefix", "deleted": True}
            assert (await client.get("/v1/prefixes")).json()["data"] == []
            assert (await served.llm.stats()).num_used_blocks == 0
            assert (await client.delete(f"/v1/prefixes/{card['id']}")).status_code == 404

    served.run(run())


def test_the_first_messages_of_conversations_are_pinned(served):
    system = {"role": "system", "content": PREFIX}

    async def run() -> None:
        async with clients(served) as [client]:
            made = await client.post("/v1/prefixes", json={"messages": [system]})
            assert made.status_code == 201, made.text
            assert made.json()["tokens"] == len(served.llm.tokenizer.encode(PREFIX))
            body = {"messages": [system, {"role": "user", "content": "x = 1"}], "max_tokens": 1}
            usage = (await client.post("/v1/chat/completions", json=body)).json()["usage"]
            assert usage["prompt_tokens_details"]["cached_tokens"] >= made.json()["tokens"] // 16 * 16 > 0

    served.run(run())


def test_a_prefix_expires_after_its_time(served):
    async def run() -> None:
        async with clients(served) as [client]:
            assert (await pin(client, ttl=0.01)).status_code == 201
            while (await client.get("/v1/prefixes")).json()["data"]:
                await asyncio.sleep(0.005)
            assert await served.idle() == 0

    served.run(run())


def test_keys_see_neither_the_prefixes_nor_the_cached_kv_of_others(served):
    async def run() -> None:
        async with clients(served, ALICE, BOB) as [alice, bob]:
            card = (await pin(alice, "import os\n" * 20)).json()
            path = f"/v1/prefixes/{card['id']}"
            assert (await bob.get("/v1/prefixes")).json()["data"] == []
            assert (await bob.get(path)).status_code == (await bob.delete(path)).status_code == 404
            assert await num_cached(bob, "import os\n" * 20 + "x") == 0
            assert await num_cached(alice, "import os\n" * 20 + "x") > 0
            assert (await alice.get(path)).json() == card

    served.run(run())


def test_a_key_is_needed_for_all_but_the_page_of_the_dashboard(served):
    async def run() -> None:
        async with clients(served, ALICE) as [alice]:
            del alice.headers["authorization"]
            for path in (*OPEN_PATHS, "/live"):
                assert (await alice.get(path)).status_code == 200, path
            for path in ("/v1/prefixes", "/dashboard/feed", "/metrics", "/health", "/ready", "/version"):
                assert (await alice.get(path)).status_code == 401, path

    served.run(run())


@pytest.mark.parametrize(
    ("settings", "first", "second"),
    [
        ({"max_prefixes": 1}, 201, 429),
        ({"max_pinned_fraction": 0.025}, 201, 429),
        ({"max_pinned_fraction": 0}, 400, 400),
    ],
)
def test_quotas_are_kept(served, settings, first, second):
    async def run() -> None:
        async with clients(served, **settings) as [client]:
            answers = [await pin(client, [5] * 40), await pin(client, [6] * 40)]
            assert [each.status_code for each in answers] == [first, second]
            assert answers[1].json()["error"]["code"] == "prefix_quota_exceeded"
            assert len((await client.get("/v1/prefixes")).json()["data"]) == [first, second].count(201)

    served.run(run())


def test_a_key_has_its_own_quota_of_tokens(served, tmp_path):
    (tmp_path / "keys.toml").write_text(f'[alice]\nkey = "{ALICE}"\nmax_pinned_tokens = 20\n')

    async def run() -> None:
        app = create_app(served.llm, ServerSettings(), KeyRing.load(tmp_path / "keys.toml", {}))
        headers = {"authorization": f"Bearer {ALICE}"}
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://a", headers=headers
        ) as client:
            answers = [await pin(client, [5] * num_tokens) for num_tokens in (21, 12, 9, 8)]
            assert [each.status_code for each in answers] == [400, 201, 429, 201]
            for each in (answers[1], answers[3]):
                await client.delete(f"/v1/prefixes/{each.json()['id']}")

    served.run(run())


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": ["a", "b"]}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages"),
        ({"prompt": [10**9]}, None),
        ({"ttl": 0}, "ttl"),
        ({"ttl": -1}, "ttl"),
        ({"ttl": 10**9}, "ttl"),
        ({"ttl": "60"}, "ttl"),
        ({"cache_salt": ""}, "cache_salt"),
        ({"cache_salt": "x" * 129}, "cache_salt"),
    ],
)
def test_what_cannot_be_pinned_is_refused_and_leaves_nothing(served, fields, param):
    answer = served.post("/v1/prefixes", **{"prompt": PREFIX} | fields)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param
    assert not served.server.prefixes._prefixes


def test_a_client_that_leaves_while_its_prefix_is_computed_leaves_nothing(served):
    async def run() -> None:
        held, release = asyncio.Event(), asyncio.Event()
        loop = asyncio.get_running_loop()

        def hold(engine) -> None:
            loop.call_soon_threadsafe(held.set)
            asyncio.run_coroutine_threadsafe(release.wait(), loop).result()

        holding = asyncio.ensure_future(served.llm.ask(hold))
        await held.wait()
        pinning = asyncio.ensure_future(served.server.prefixes.pin(ANONYMOUS, [5] * 40, None, None))
        await asyncio.sleep(0.01)
        pinning.cancel()
        release.set()
        with pytest.raises(asyncio.CancelledError):
            await pinning
        await holding
        assert await served.idle() == 0
        assert not served.server.prefixes._prefixes

    served.run(run())


def test_prefixes_that_are_pinned_stay_while_others_are_served(served):
    """Neighbours get the tokens that they get alone."""
    alone = served.complete("def f(x):", max_tokens=20, ignore_eos=True)["choices"][0]["text"]
    made = served.post("/v1/prefixes", prompt=PREFIX).json()
    assert served.complete("def f(x):", max_tokens=20, ignore_eos=True)["choices"][0]["text"] == alone
    assert served.wire.get("/v1/prefixes").json()["data"] == [made]
    assert served.wire.delete(f"/v1/prefixes/{made['id']}").status_code == 200
