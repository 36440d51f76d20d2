"""Health: green while the model is made and while programs compile, red when steps hang or fail."""

import asyncio
import threading
from types import SimpleNamespace

import httpx
import pytest
from starlette.applications import Starlette

from jpaged import LLM
from jpaged.device.step.programs import Programs
from jpaged.engine.health import Health, HealthState
from jpaged.models import save_checkpoint
from jpaged.progress import Progress
from jpaged.server.health import Startup, health_routes, report_of
from jpaged.server.metrics import own_version
from tests.support.tiny import TINY, tiny_model


def ask(report, *paths: str) -> list[tuple[int, dict]]:
    """Status and body at each path of a server with this report."""

    async def run() -> list[tuple[int, dict]]:
        transport = httpx.ASGITransport(Starlette(routes=health_routes(report)))
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            answers = [await client.get(path) for path in paths]
        return [(answer.status_code, answer.json()) for answer in answers]

    return asyncio.run(run())


def test_a_server_that_starts_is_healthy_but_not_ready_and_tells_its_progress():
    startup = Startup()
    assert ask(startup.report, "/live", "/health") == [(200, {"state": "live"}), (200, {"state": "loading"})]
    seen = []

    def make() -> int:
        startup._take(Progress("compiling", 12, 31))
        seen.extend(ask(startup.report, "/health", "/ready", "/ping"))
        return 5

    assert startup.load(make) == 5
    body = {"state": "compiling", "done": 12, "of": 31}
    assert seen == [(200, body), (503, body), (200, body)]


def test_a_server_whose_model_cannot_be_made_is_dead():
    startup = Startup()

    def fail() -> None:
        raise ValueError("/secret/path holds no checkpoint")

    with pytest.raises(ValueError, match="no checkpoint"):
        startup.load(fail)
    assert ask(startup.report, "/live", "/health") == [(200, {"state": "live"}), (503, {"state": "dead"})]


def test_the_progress_of_weights_and_programs_is_told_to_the_startup_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(Programs, "all_keys", lambda programs, **_: [("enter",), ("read",)])  # they compile quickly
    save_checkpoint(tiny_model(), TINY, tmp_path)
    startup, seen = Startup(), []
    watch = startup._take
    startup._take = lambda progress: (watch(progress), seen.append(progress))

    def make() -> LLM:
        settings = {"max_num_seqs": 1, "max_num_batched_tokens": 8, "num_blocks": 16, "max_model_len": 32}
        return LLM(tmp_path, **settings, warm_up=True, use_tqdm=False)

    thread = threading.Thread(target=startup.load, args=(make,))
    thread.start()
    thread.join()
    for state in ("loading", "compiling"):
        told = [progress for progress in seen if progress.state == state]
        assert [progress.done for progress in told] == sorted(progress.done for progress in told)
        assert told[0].done == 0
        assert told[-1].done == told[-1].of > 0
    assert [progress.state for progress in seen] == sorted((p.state for p in seen), reverse=True)
    assert startup.report().body == seen[-1]._asdict()


@pytest.mark.parametrize(
    ("state", "health", "ready"),
    [
        (HealthState.OK, 200, 200),
        (HealthState.COMPILING, 200, 200),
        (HealthState.DRAINING, 200, 503),
        (HealthState.FAILING, 503, 503),
        (HealthState.HUNG, 503, 503),
        (HealthState.STOPPED, 503, 503),
        (HealthState.DEAD, 503, 503),
    ],
)
def test_every_state_has_its_statuses_and_no_error_text_leaves_the_server(state, health, ready):
    now = Health(state, "ValueError: /secret/path", 3, None, None)
    llm = SimpleNamespace(health=lambda: now)
    answers = ask(lambda: report_of(llm), "/live", "/health", "/ping", "/ready")
    assert [status for status, _ in answers] == [200, health, health, ready]
    assert answers[1][1] == {"state": state.value, "failed_steps": 3}


def test_a_server_tells_what_it_compiles_beside_its_steps():
    now = Health(HealthState.OK, None, 0, None, None, Progress("compiling", 3, 8))
    llm = SimpleNamespace(health=lambda: now)
    assert ask(lambda: report_of(llm), "/health") == [(200, {"state": "ok", "compiling": {"done": 3, "of": 8}})]


def test_a_running_server_answers_all_of_them(served):
    for path in ("/live", "/health", "/ping", "/ready"):
        answer = served.wire.get(path)
        assert answer.status_code == 200, path
        assert answer.headers["cache-control"] == "no-store"
    assert served.wire.get("/health").json() == {"state": "ok"}
    assert served.wire.get("/version").json() == {"version": own_version()}
    assert served.wire.post("/ping").status_code == 200
