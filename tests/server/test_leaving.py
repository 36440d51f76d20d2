"""Clients that leave or cancel: nothing is computed for them any more, and their blocks are free."""

import asyncio
import json
import signal
import socket
import subprocess
import sys
from collections.abc import Callable

import pytest

from tests.server.conftest import Served

PROMPT = "def add(a, b):"
ENDLESS = {"prompt": PROMPT, "max_tokens": 280, "ignore_eos": True, "temperature": 0}
FORMS = {
    "streamed": {"stream": True},
    "whole": {},
    "eight": {"n": 8, "temperature": 1},
    "beams": {"use_beam_search": True, "n": 4},
    "prompts": {"prompt": [PROMPT, "import"], "stream": True},
}

KILLED = """
import json, socket, sys
port, number, body = json.loads(sys.argv[1])
head = f"POST /v1/completions HTTP/1.1\\r\\nhost: localhost\\r\\ncontent-type: application/json\\r\\n"
streams = [socket.create_connection(("127.0.0.1", port)) for _ in range(number)]
for stream in streams:
    stream.sendall(f"{head}content-length: {len(body)}\\r\\n\\r\\n{body}".encode())
sys.stdin.read()
"""
"""A client that streams many responses, and reads none."""


def send(served: Served, body: dict) -> socket.socket:
    """Send a request and read nothing of the response."""
    content = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(content)}\r\n"
    connection = socket.create_connection(served.address)
    connection.sendall(head.encode() + b"content-type: application/json\r\n\r\n" + content)
    return connection


async def num_steps_until_free(served: Served, leave: Callable[[], None]) -> int:
    """Let clients leave once one has a token; the steps that begin between their leaving and the last free block."""

    def state(engine) -> tuple[int, int, bool]:
        has_tokens = any(seq.num_outputs for group in engine.scheduler.line.running for seq in group.sequences)
        stats = engine.stats()
        return stats.num_steps, stats.num_used_blocks, has_tokens

    while not (await served.llm.ask(state))[2]:
        pass
    leave()
    await until(lambda: not served.server.calls)
    before = served.llm.engine.scheduler.stats().num_steps
    while (now := await served.llm.ask(state))[1]:
        pass
    return now[0] - before


async def until(is_true: Callable[[], bool]) -> None:
    while not is_true():
        await asyncio.sleep(0.001)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_client_that_leaves_frees_its_blocks_within_two_steps(served, form):
    connection = send(served, ENDLESS | form)
    assert served.run(num_steps_until_free(served, connection.close)) <= 2


def test_a_killed_client_with_200_streams_frees_all_blocks_within_two_steps(served):
    request = json.dumps([served.address[1], 200, json.dumps(ENDLESS | {"stream": True})])
    server = served.server
    with subprocess.Popen([sys.executable, "-c", KILLED, request], stdin=subprocess.PIPE) as client:
        with served.held():  # none ends before the last has come
            served.run(until(lambda: len(server._waiting) + len(server.calls) == 200))
        assert served.run(num_steps_until_free(served, client.kill)) <= 2
        assert client.wait() == -signal.SIGKILL


def test_a_client_that_leaves_before_its_request_is_accepted_leaves_nothing(served):
    with served.held():
        connection = send(served, ENDLESS)
        served.run(until(lambda: served.llm.num_unfinished == 1))
        connection.close()
        served.run(until(lambda: served.llm.num_unfinished == 0))


def test_requests_that_wait_for_a_row_leave_with_their_client(served):
    first = send(served, ENDLESS | {"n": 8, "temperature": 1})
    served.run(until(lambda: len(served.server.calls) == 1))
    waiting = send(served, ENDLESS)
    served.run(until(lambda: len(served.server.calls) == 2))
    waiting.close()
    served.run(until(lambda: len(served.server.calls) == 1))
    first.close()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("by", ["call", "client"])
def test_a_cancelled_request_ends_with_an_error(served, stream, by):
    async def task():
        async with served.client() as client:
            body, headers = ENDLESS | {"stream": stream}, {"x-request-id": "mine"}
            answering = asyncio.ensure_future(client.post("/v1/completions", json=body, headers=headers))
            server = client._transport.app.state.server
            while not server.calls:
                await asyncio.sleep(0)
            call_id = next(iter(server.calls)) if by == "call" else "mine"
            for other in ("x", call_id[:-1], call_id + "0"):
                assert (await client.post(f"/v1/requests/{other}/cancel")).status_code == 404
            assert (await client.post(f"/v1/requests/{call_id}/cancel")).json() == {"id": call_id, "cancelled": True}
            response = await answering
            assert (await client.post(f"/v1/requests/{call_id}/cancel")).status_code == 404
            return response

    response = served.run(task())
    content = response.content.decode()
    assert "[DONE]" not in content
    error = json.loads(content.strip().split("\n\n")[-1].removeprefix("data: "))["error"]
    assert error["code"] == "cancelled"
    assert "abort" not in content
