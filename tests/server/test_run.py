"""The life of a server: loading, signals, drains and their deadlines, an engine that is lost, and what is exposed."""

import contextlib
import json
import os
import shutil
import signal
import socket
import stat
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from jpaged import LLM, AsyncLLM
from jpaged.device.step.inputs import Bucket
from jpaged.device.step.program_store import Background, ProgramStore
from jpaged.engine import thread as engine_thread
from jpaged.engine.outputs import StepOutput
from jpaged.interpreter import SWITCH_INTERVAL_S
from jpaged.server import ServerSettings
from jpaged.server.keys import KEYS_VARIABLE, KeyRing
from jpaged.server.run import check_exposure, serve
from tests.support.tiny import tiny_engine

TIMEOUT_S = 300
"""Only a failing test waits for so long."""

PROMPT = {"prompt": [1, 2, 4, 5], "temperature": 0, "ignore_eos": True}


@pytest.fixture
def path() -> Iterator[str]:
    """The path of a socket, which is short."""
    folder = tempfile.mkdtemp()
    yield f"{folder}/socket"
    shutil.rmtree(folder)


class Gate:
    """An engine whose steps wait for one another, or fail."""

    def __init__(self) -> None:
        self.llm = AsyncLLM.from_llm(LLM.from_engine(tiny_engine(max_burst=1)))
        self._step = self.llm.engine.step
        self.may_go_on = threading.Event()
        self.has_begun = threading.Event()
        self.ends_with_the_thread = True
        self.error: BaseException | None = None
        self.llm.engine.step = self._held

    def _held(self) -> StepOutput:
        self.has_begun.set()
        if self.error is not None:
            raise self.error
        while not self.may_go_on.wait(0.001):
            if self.ends_with_the_thread and self.llm._thread._is_closed:
                break
        return self._step()


class Client:
    """A client of the server at a path, and the signals that it gets."""

    def __init__(self, path: str, is_ready: threading.Event) -> None:
        self.path = path
        self.is_ready = is_ready
        self.http = self.connect()

    def connect(self) -> httpx.Client:
        """A client with connections of its own."""
        return httpx.Client(
            transport=httpx.HTTPTransport(uds=self.path), base_url="http://localhost", timeout=TIMEOUT_S
        )

    def wait_until_ready(self) -> None:
        assert self.is_ready.wait(TIMEOUT_S)

    def wait_until_bound(self) -> None:
        while True:
            with socket.socket(socket.AF_UNIX) as probe:
                if probe.connect_ex(self.path) == 0:
                    return

    def status(self, path: str) -> int:
        return self.http.get(path).status_code

    def wait_for(self, path: str, status: int) -> None:
        while self.status(path) != status:
            pass

    def complete(self, **body) -> httpx.Response:
        with self.connect() as http:
            return http.post("/v1/completions", json=PROMPT | body)

    @contextlib.contextmanager
    def stream(self, **body) -> Iterator[Iterator[str]]:
        with self.connect() as http, http.stream("POST", "/v1/completions", json=PROMPT | {"stream": True} | body) as r:
            assert r.status_code == 200
            yield (line for line in r.iter_lines() if line.startswith("data: "))

    def send(self, number: int) -> None:
        os.kill(os.getpid(), number)


def run(path: str, make: Callable[[], AsyncLLM], scenario: Callable[[Client], None], **settings) -> int:
    """Serve in this thread, which gets the signals, and act in another one. Returns the status."""
    assert threading.current_thread() is threading.main_thread()
    is_ready, errors = threading.Event(), []
    client = Client(path, is_ready)

    def act() -> None:
        try:
            scenario(client)
        except BaseException as error:
            errors.append(error)
            client.send(signal.SIGTERM)
            client.send(signal.SIGTERM)

    actor = threading.Thread(target=act)
    actor.start()
    try:
        all_settings = ServerSettings(unix_socket=path, keep_alive_s=0.01, **settings)
        return serve(make, all_settings, lambda url: is_ready.set())
    finally:
        actor.join(TIMEOUT_S)
        client.http.close()
        if errors:
            raise errors[0]


def test_the_server_answers_while_the_model_is_loaded(path):
    gate, may_load = Gate(), threading.Event()
    gate.may_go_on.set()

    def make() -> AsyncLLM:
        assert may_load.wait(TIMEOUT_S)
        return gate.llm

    def scenario(client: Client) -> None:
        client.wait_until_bound()
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
        assert [client.status(each) for each in ("/live", "/health", "/ready")] == [200, 200, 503]
        assert client.http.get("/health").json()["state"] == "loading"
        early = client.complete()
        assert (early.status_code, early.json()["error"]["code"]) == (503, "loading")
        assert early.headers["retry-after"] == "5"
        may_load.set()
        client.wait_until_ready()
        assert [client.status(each) for each in ("/live", "/health", "/ready")] == [200, 200, 200]
        assert client.complete().status_code == 200
        client.send(signal.SIGTERM)

    assert run(path, make, scenario) == 0
    assert not Path(path).exists()
    assert gate.llm.engine.blocks.num_used_blocks == 0


def test_a_model_that_cannot_be_loaded_ends_the_server(path):
    def make() -> AsyncLLM:
        raise ValueError("no such model")

    with pytest.raises(ValueError, match="no such model"):
        run(path, make, lambda client: None)
    assert not Path(path).exists()


class Ended(BaseException):
    """The process has ended."""


@pytest.fixture
def ends(monkeypatch) -> None:
    """The end of the process is an exception."""

    def end(status: int) -> None:
        raise Ended(status)

    monkeypatch.setattr(os, "_exit", end)
    monkeypatch.setattr("jpaged.server.run.logging.shutdown", lambda: None)
    monkeypatch.setattr("jpaged.server.run.GRACE_S", 0.1)


@pytest.mark.usefixtures("ends")
def test_threads_take_short_turns_while_a_server_runs(path):
    usual = sys.getswitchinterval()

    def make() -> AsyncLLM:
        assert sys.getswitchinterval() == pytest.approx(SWITCH_INTERVAL_S)
        raise ValueError("seen")

    with pytest.raises(ValueError, match="seen"):
        run(path, make, lambda client: None)
    assert sys.getswitchinterval() == usual > SWITCH_INTERVAL_S


@pytest.mark.usefixtures("ends")
def test_a_signal_ends_a_server_whose_background_compiles(path, monkeypatch):
    gate, may_end = Gate(), threading.Event()
    gate.may_go_on.set()
    store = ProgramStore(lambda key: key, lambda key: (may_end.wait(TIMEOUT_S), False))
    background = Background(store, {Bucket(2, 2): [("forward",)]}, None, 1)
    monkeypatch.setattr(gate.llm.engine.runner.programs, "background", background)
    background.start(gate)

    def scenario(client: Client) -> None:
        client.wait_until_ready()
        assert client.complete().status_code == 200
        client.send(signal.SIGTERM)

    with pytest.raises(Ended, match="0"):
        run(path, lambda: gate.llm, scenario)
    assert not Path(path).exists()
    may_end.set()
    assert background.wait(TIMEOUT_S)


@pytest.mark.usefixtures("ends")
def test_a_signal_ends_a_server_that_loads(path):
    may_load = threading.Event()

    def make() -> AsyncLLM:
        may_load.wait(TIMEOUT_S)
        raise ValueError("it is too late")

    def scenario(client: Client) -> None:
        client.wait_until_bound()
        client.send(signal.SIGTERM)

    with pytest.raises(Ended, match="0"):
        run(path, make, scenario)
    may_load.set()


def test_a_signal_drains(path):
    gate = Gate()

    def scenario(client: Client) -> None:
        client.wait_until_ready()
        with client.stream(max_tokens=20) as lines:
            assert gate.has_begun.wait(TIMEOUT_S)
            client.send(signal.SIGTERM)
            client.wait_for("/ready", 503)
            assert client.status("/live") == 200
            late = client.complete()
            assert (late.status_code, late.headers["connection"]) == (503, "close")
            assert late.json()["error"]["code"] == "draining"
            gate.may_go_on.set()
            events = list(lines)
            assert events[-1] == "data: [DONE]"
            assert '"finish_reason":"length"' in events[-2]

    assert run(path, lambda: gate.llm, scenario, drain_timeout_s=TIMEOUT_S) == 0
    assert gate.llm.engine.blocks.num_used_blocks == 0


@pytest.mark.parametrize(("num_signals", "drain_timeout_s"), [(1, 0.01), (2, TIMEOUT_S)])
def test_the_deadline_and_a_second_signal_end_what_runs(path, num_signals, drain_timeout_s):
    gate = Gate()

    def scenario(client: Client) -> None:
        client.wait_until_ready()
        waiting = threading.Thread(target=lambda: answers.append(client.complete(max_tokens=50)))
        with client.stream(max_tokens=50) as lines:
            waiting.start()
            while gate.llm.num_unfinished < 2:
                pass
            client.send(signal.SIGTERM)
            if num_signals == 2:  # two signals at once are one
                client.wait_for("/ready", 503)
                client.send(signal.SIGTERM)
            [event] = lines
            assert '"service_unavailable_error"' in event
            waiting.join(TIMEOUT_S)

    answers: list[httpx.Response] = []
    assert run(path, lambda: gate.llm, scenario, drain_timeout_s=drain_timeout_s) == 0
    assert [answer.status_code for answer in answers] == [503]
    assert gate.llm.engine.blocks.num_used_blocks == 0


def test_a_client_that_does_not_read_ends_with_the_deadline_of_the_drain(path):
    gate = Gate()
    gate.may_go_on.set()
    body = PROMPT | {"prompt": [PROMPT["prompt"]] * 16, "max_tokens": 50, "logprobs": 20, "stream": True}
    content = json.dumps(body).encode()  # the response is more than the socket holds
    head = f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(content)}\r\n"
    slow = socket.socket(socket.AF_UNIX)

    def scenario(client: Client) -> None:
        client.wait_until_ready()
        slow.connect(path)
        slow.sendall(head.encode() + b"content-type: application/json\r\n\r\n" + content)
        assert gate.has_begun.wait(TIMEOUT_S)
        while gate.llm.num_unfinished:
            pass
        client.send(signal.SIGTERM)

    with slow:
        settings = {"drain_timeout_s": 0.01, "write_timeout_s": float(TIMEOUT_S)}
        assert run(path, lambda: gate.llm, scenario, **settings) == 0
        received = b""
        slow.settimeout(TIMEOUT_S)
        with contextlib.suppress(ConnectionError):
            while part := slow.recv(1 << 20):
                received += part
    assert received.startswith(b"HTTP/1.1 200")
    assert b"[DONE]" not in received, "it had not read the end when the server ended"
    assert gate.llm.engine.blocks.num_used_blocks == 0


@pytest.mark.usefixtures("ends")
def test_a_step_that_hangs_does_not_keep_the_server_from_its_end(path):
    gate = Gate()
    gate.ends_with_the_thread = False

    def scenario(client: Client) -> None:
        client.wait_until_ready()
        with client.stream() as lines:
            assert gate.has_begun.wait(TIMEOUT_S)
            client.send(signal.SIGTERM)
            with contextlib.suppress(httpx.TransportError):
                list(lines)

    with pytest.raises(Ended, match="0"):
        run(path, lambda: gate.llm, scenario, drain_timeout_s=0.01)
    gate.may_go_on.set()
    gate.llm.shutdown()


def test_an_engine_whose_thread_dies_ends_the_server(path):
    gate = Gate()
    gate.error = SystemExit("the thread dies")

    def scenario(client: Client) -> None:
        client.wait_until_ready()
        answer = client.complete()
        assert answer.status_code == 503
        assert "thread" not in answer.text

    assert run(path, lambda: gate.llm, scenario) == 1


def test_steps_that_always_fail_end_the_server(path, monkeypatch):
    monkeypatch.setattr(engine_thread, "FIRST_RETRY_S", 0.0)
    gate = Gate()
    gate.error = RuntimeError("the device at /dev/secret is lost")
    health: list[int] = []

    def scenario(client: Client) -> None:
        client.wait_until_ready()
        answer = client.complete()
        assert answer.status_code == 500
        assert "secret" not in answer.text
        health.append(client.status("/health"))
        with contextlib.suppress(httpx.TransportError):
            client.complete()

    assert run(path, lambda: gate.llm, scenario, max_failed_steps=6) == 1
    assert health == [503]


def test_steps_that_fail_once_lose_nothing(path, monkeypatch):
    monkeypatch.setattr(engine_thread, "FIRST_RETRY_S", 0.0)
    gate = Gate()
    gate.may_go_on.set()

    def scenario(client: Client) -> None:
        client.wait_until_ready()
        whole = client.complete(max_tokens=20, return_token_ids=True).json()["choices"][0]["token_ids"]
        assert len(whole) == 20
        errors = [RuntimeError("once")]
        fetch = gate.llm.engine.runner.fetch

        def broken(step):
            if errors:
                raise errors.pop()
            return fetch(step)

        monkeypatch.setattr(gate.llm.engine.runner, "fetch", broken)
        again = client.complete(max_tokens=20, return_token_ids=True).json()["choices"][0]["token_ids"]
        assert (again, errors) == (whole, [])
        assert client.status("/health") == 200
        client.send(signal.SIGTERM)

    assert run(path, lambda: gate.llm, scenario) == 0


def test_keys_are_read_again_at_a_signal(path, tmp_path):
    gate, file = Gate(), tmp_path / "keys.toml"
    file.write_text('[alice]\nkey = "sk-the-first-key"\n')

    def status(client: Client, key: str) -> int:
        return client.http.get("/v1/models", headers={"authorization": f"Bearer {key}"}).status_code

    def scenario(client: Client) -> None:
        client.wait_until_ready()
        assert [status(client, key) for key in ("sk-the-first-key", "sk-the-next-key")] == [200, 401]
        file.write_text('[alice]\nkey = "sk-the-next-key"\n')
        client.send(signal.SIGHUP)
        while status(client, "sk-the-first-key") == 200:
            pass
        assert status(client, "sk-the-next-key") == 200
        client.send(signal.SIGINT)

    assert run(path, lambda: gate.llm, scenario, api_key_file=str(file)) == 0


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.org", ""])
def test_other_machines_are_served_with_keys_or_by_order_only(host):
    if host == "":
        with pytest.raises(ValueError, match="host="):
            ServerSettings(host=host)
        return
    nothing = KeyRing.load(None, {})
    with pytest.raises(ValueError, match="there is no key"):
        check_exposure(ServerSettings(host=host), nothing)
    check_exposure(ServerSettings(host=host, insecure=True), nothing)
    check_exposure(ServerSettings(host=host), KeyRing.load(None, {KEYS_VARIABLE: "sk-the-first-key"}))
    check_exposure(ServerSettings(host=host, unix_socket="x"), nothing)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1", "localhost"])
def test_this_machine_is_served_without_keys(host):
    check_exposure(ServerSettings(host=host), KeyRing.load(None, {}))


def test_an_address_in_use_is_refused():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        settings = ServerSettings(port=listener.getsockname()[1])
        with pytest.raises(OSError, match="in use"):
            serve(lambda: pytest.fail("the model is not loaded"), settings)


def test_a_socket_that_a_server_listens_at_is_not_taken(path):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        with pytest.raises(OSError, match="in use"):
            serve(lambda: pytest.fail("the model is not loaded"), ServerSettings(unix_socket=path))
    gate = Gate()

    def scenario(client: Client) -> None:
        client.wait_until_ready()
        client.send(signal.SIGTERM)

    assert run(path, lambda: gate.llm, scenario) == 0  # what a dead server has left is replaced
