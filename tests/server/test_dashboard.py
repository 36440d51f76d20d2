"""The dashboard: its page without keys, its feed, and what a browser shows of both."""

import asyncio
import json
import os
import shutil
from contextlib import AsyncExitStack, aclosing

import pytest

from jpaged import RequestOutputKind, SamplingParams
from jpaged.engine.snapshot import BlockUse
from jpaged.server.dashboard import feed as feed_module
from jpaged.server.dashboard.feed import MAX_VIEWERS
from jpaged.server.dashboard.routes import OPEN_PATHS, PAGES
from tests.server.conftest import TIMEOUT_S

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
LONG = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True, output_kind=RequestOutputKind.DELTA)
PREFIX = "class Stack:\n    def push(self, item):\n        self.items.append(item)\n"


@pytest.fixture
def quick(monkeypatch):
    """Frames as fast as they can be made."""
    monkeypatch.setattr(feed_module, "PERIOD_S", 0.0)


async def frames(served, until) -> list[dict]:
    """The frames of one viewer up to the first one that is wanted."""
    seen = []
    async with aclosing(served.server.feed.open()) as lines:
        async for line in lines:
            seen.append(json.loads(line))
            if until(seen[-1]):
                return seen
    return seen


async def frame_of(served, *prompts: str) -> dict:
    """A frame in which a request for each prompt runs, under the ids "a", "b" and so on; they end afterwards."""
    names = "abcdefgh"[: len(prompts)]
    while True:  # until no request ended before the frame was made
        async with AsyncExitStack() as stack:
            for name, prompt in zip(names, prompts, strict=True):
                stream = await stack.enter_async_context(await served.llm.open(prompt, LONG, name))
                await anext(stream)
            frame = (await frames(served, lambda frame: frame["pool"]))[-1]
        await served.idle()
        if [request["state"] for request in frame["pool"]["requests"]] == ["running"] * len(names):
            return frame


def test_the_page_and_its_files_come_with_a_strict_policy(served):
    for path, (_, media_type) in PAGES.items():
        answer = served.wire.get(path)
        assert answer.status_code == 200, path
        assert answer.headers["content-type"].startswith(media_type)
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; ")
        assert "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers.get("access-control-allow-origin") is None
        for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", " style=", "onclick="):
            assert word not in answer.text, path
    assert set(PAGES) == OPEN_PATHS  # the feed wants a key


def test_a_frame_shows_each_block_and_who_holds_it(served, quick):
    async def run() -> tuple[dict, dict]:
        pinned = await served.llm.pin_prefix(PREFIX)
        running = await frame_of(served, PREFIX + "x", PREFIX + "x = 1")
        await served.llm.unpin(pinned)
        await served.idle()
        return running, (await frames(served, lambda frame: frame["pool"]))[-1]

    frame, after = served.run(run())
    pool, stats = frame["pool"], frame["stats"]
    assert frame["health"] == "ok"
    assert frame["block_size"] == 16
    assert len(pool["blocks"]) == stats["num_blocks"] + 1
    uses = [BlockUse(int(digit)) for digit in pool["blocks"]]
    assert uses[0] is BlockUse.RESERVED
    assert sum(use in (BlockUse.PRIVATE, BlockUse.SHARED, BlockUse.PINNED) for use in uses) == stats["num_used_blocks"]
    [[*pins]] = pool["pins"].values()
    assert all(uses[block] is BlockUse.PINNED for block in pins)
    first, second = sorted(pool["requests"], key=lambda request: request["id"])
    assert (first["id"], first["state"], second["id"]) == ("a", "running", "b")
    full = pins[: first["cached"] // 16]
    assert full
    assert set(full) <= set(first["tables"][0]) & set(second["tables"][0])
    assert frame["ttft"][0] > 0
    assert after["pool"]["requests"] == []
    assert after["stats"]["num_used_blocks"] == 0


def test_viewers_share_frames_and_end_with_the_engine_or_the_server(served, quick, monkeypatch):
    async def run() -> None:
        feed, made = served.server.feed, []
        picture = feed._picture

        async def count() -> dict:
            made.append(1)
            return await picture()

        monkeypatch.setattr(feed, "_picture", count)
        viewers = [feed.open() for _ in range(MAX_VIEWERS)]
        with pytest.raises(Exception, match="20 dashboards are open"):
            feed.open()
        lines = await asyncio.gather(*(anext(viewer) for viewer in viewers))
        assert len(set(lines)) == 1
        assert len(made) < MAX_VIEWERS
        closing = asyncio.gather(*(list_all(viewer) for viewer in viewers))
        await asyncio.sleep(0)
        await feed.close()
        await closing
        assert feed.num_viewers == 0

    async def list_all(viewer) -> list[bytes]:
        return [line async for line in viewer]

    served.run(run())


def test_a_viewer_that_does_not_read_loses_its_place(served, quick, monkeypatch):
    monkeypatch.setattr(feed_module, "MAX_UNREAD", 3)

    async def run() -> None:
        viewer = served.server.feed.open()
        while served.server.feed.num_viewers:
            await asyncio.sleep(0)
        assert [json.loads(line)["health"] async for line in viewer] == ["ok"]  # the newest, and the end

    served.run(run())


def test_a_frame_comes_without_the_pool_while_a_step_keeps_the_engine(served, quick, monkeypatch):
    monkeypatch.setattr(feed_module, "PATIENCE_S", 0.01)

    async def run() -> dict:
        held, release = asyncio.Event(), asyncio.Event()
        loop = asyncio.get_running_loop()

        def hold(engine) -> None:
            loop.call_soon_threadsafe(held.set)
            asyncio.run_coroutine_threadsafe(release.wait(), loop).result()

        holding = asyncio.ensure_future(served.llm.ask(hold))
        await held.wait()
        [frame] = await frames(served, lambda frame: True)
        release.set()
        await holding
        return frame

    frame = served.run(run())
    assert frame["pool"] is None
    assert frame["stats"]["num_blocks"] > 0


# In a browser -------------------------------------------------------------------------------------------------------


@pytest.fixture
def page():
    """A page of a real browser; the test fails if a script of it does."""
    if CHROMIUM is None:
        pytest.skip("there is no chromium")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1440, "height": 1000})
        page.set_default_timeout(TIMEOUT_S * 1000)
        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        yield page
        browser.close()
    assert not [error for error in errors if "Failed to load resource" not in error]


@pytest.mark.browser
def test_a_browser_follows_the_feed(served, page):
    page.goto(served.base_url)
    page.wait_for_selector("#main:not([hidden])")
    assert page.text_content("#health") == "ok"
    assert page.text_content("#model") == served.server.model_name
    assert page.is_visible("#idle")
    page.hover("#device", position={"x": 4, "y": 4})
    assert page.text_content("#tip") == "Block 0: reserved"
    page.goto("about:blank")  # the feed ends
    while served.run(viewers(served)):
        pass


@pytest.mark.browser
def test_a_browser_shows_requests_and_with_whom_one_shares(served, page, quick, tmp_path):
    frame = served.run(frame_of(served, PREFIX + "x", PREFIX + "y", "z"))
    hostile = "<img src=x onerror=alert(1)>"
    frame["pool"]["requests"][2]["id"] = frame["model"] = hostile
    page.route("**/dashboard/feed", lambda route: route.fulfill(status=200, body=json.dumps(frame) + "\n"))
    page.goto(served.base_url)
    page.wait_for_selector("#rows tr:nth-child(3)")
    page.click("#rows tr:nth-child(2)")
    assert page.text_content("#detail-title") == "b"
    [sharer] = page.locator("#sharers li").all_text_contents()
    assert sharer.startswith("a")
    page.click("#sharers button")
    assert page.text_content("#detail-title") == "a"
    [number] = page.locator("#legend li b").all_text_contents()[:1]
    assert int(number) == frame["pool"]["blocks"].count("3")
    assert page.text_content("#model") == hostile
    assert page.get_attribute("#rows tr:nth-child(3) td", "title") == hostile
    assert page.locator("img").count() == 0
    page.screenshot(path=os.environ.get("DASHBOARD_SCREENSHOT", tmp_path / "dashboard.png"), full_page=True)


async def viewers(served) -> int:
    await asyncio.sleep(0.01)
    return served.server.feed.num_viewers


@pytest.mark.browser
def test_a_browser_asks_for_a_key_and_keeps_it_out_of_the_address(served, page):
    asked: list[tuple[str, str | None]] = []

    def feed(route) -> None:
        asked.append((route.request.url, route.request.headers.get("authorization")))
        if asked[-1][1] != "Bearer right":
            route.fulfill(status=401, body="{}")
        else:
            route.fulfill(status=200, body=frame)

    frame = json.dumps(served.run(served.server.feed._picture())) + "\n"
    page.route("**/dashboard/feed", feed)
    page.goto(served.base_url)
    for key in ("wrong", "right"):
        page.wait_for_selector("#key-form:not([hidden])")
        page.fill("#key", key)
        page.click("#key-form button")
    page.wait_for_selector("#main:not([hidden])")
    assert page.is_hidden("#key-form")
    assert [key for _, key in asked][:3] == [None, "Bearer wrong", "Bearer right"]
    assert not [url for url, _ in asked if "right" in url or "?" in url]
    assert "right" not in page.url
    assert page.evaluate("() => localStorage.length") == 0


@pytest.mark.browser
def test_a_browser_shows_how_far_a_server_is_that_loads(served, page):
    loading = {"state": "compiling", "done": 12, "of": 31}
    page.route("**/dashboard/feed", lambda route: route.fulfill(status=503, body="{}"))
    page.route("**/health", lambda route: route.fulfill(status=200, body=json.dumps(loading)))
    page.goto(served.base_url)
    page.wait_for_function("() => document.getElementById('progress').textContent === '12 of 31'")
    assert page.text_content("#health") == "compiling"
    assert page.is_hidden("#main")
