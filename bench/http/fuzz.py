"""Requests that are mostly invalid: none may fail the server, change a neighbour's tokens, or leave a block in use."""

import asyncio
import json
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import uvloop

from bench.http.connection import Client, completion, request
from bench.http.launch import Child
from bench.http.soak import idle_state

NUM_AT_ONCE = 32
LOOK_EVERY = 5000
NUM_KEPT = 20
"""Requests with status 500 that the report has."""

PATHS = (
    "/v1/completions", "/v1/completions", "/v1/completions", "/v1/chat/completions", "/v1/chat/completions",
    "/tokenize", "/detokenize", "/v1/prefixes", "/v1/requests/none/cancel", "/v1/models", "/v1/", "/%00", "//",
)  # fmt: skip

VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 1.0, 0.5, -0.0, 1e-320, 1e308, 2**31, 2**31 - 1, -(2**31), 2**63, 2**64, 10**30,
    "", "a", "1", "\u0000", "\u2028", "\ud7ff", "\U0001f600" * 20, "x" * 300, "<|im_start|>", "../../etc/passwd", [],
    {}, [[]], [None], [""], ["a", 1], [-1], [0], [10**9], [2**63], [1.5], [[1], [2]], [[1], "a"], {"a": 1}, {"1": 1000},
    {"1": -1e9}, {"-1": 1}, {"x": "y"}, {"type": "json_object"}, {"type": "text"}, {"include_usage": True},
)  # fmt: skip

FIELDS = (
    "model", "prompt", "messages", "n", "best_of", "use_beam_search", "length_penalty", "early_stopping",
    "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty",
    "logit_bias", "seed", "stop", "stop_token_ids", "include_stop_str_in_output", "ignore_eos", "max_tokens",
    "max_completion_tokens", "min_tokens", "prompt_logprobs", "bad_words", "allowed_token_ids",
    "skip_special_tokens", "stream", "stream_options", "priority", "cache_salt", "add_special_tokens",
    "return_token_ids", "user", "echo", "logprobs", "top_logprobs", "suffix", "tools", "tool_choice",
    "response_format", "chat_template", "chat_template_kwargs", "add_generation_prompt", "tokens", "ttl",
    "unknown",
)  # fmt: skip

RAW = (
    b"", b"{", b"[]", b"null", b"1", b'"a"', b"\xff\xfe{\x00}\x00", b"\xef\xbb\xbf{}", b"[" * 10_000, b'{"a":' * 5_000,
    b'{"prompt":"a","prompt":1}', b'{"prompt":NaN}', b'{"prompt":"\\ud800"}', b'{"temperature":1e999,"prompt":"a"}',
    b'{"prompt":[' + b"1," * 5_000 + b"1]}", b'{"prompt":"' + b"a" * 100_000 + b'"}',
)  # fmt: skip


def run_fuzz(child: Child, num_requests: int) -> dict[str, Any]:
    """Send the requests. Returns the counts of statuses, and the checks that failed."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_fuzz(child, num_requests))


async def _fuzz(child: Child, num_requests: int) -> dict[str, Any]:
    client, draw, statuses, kept = Client(child.address), random.Random(0), Counter(), []
    expected = await _neighbour(client)
    numbers, failures = iter(range(num_requests)), []

    async def send_some() -> None:
        for number in numbers:
            data = random_request(draw)
            answer = await client.exchange(data)
            statuses[answer.status] += 1
            if answer.status == 500 and len(kept) < NUM_KEPT:
                kept.append({"request": data[:2000].decode("latin-1"), "answer": answer.body.decode("latin-1")})
            if number % LOOK_EVERY == 0:
                print(f"{number:,} of {num_requests:,}: {dict(sorted(statuses.items()))}", flush=True)
                if (tokens := await _neighbour(client)) != expected:
                    failures.append(f"after {number} requests a neighbour has other tokens: {tokens}")

    await asyncio.gather(*[send_some() for _ in range(NUM_AT_ONCE)])
    await _unpin_all(client)
    health = await client.get("/health")
    client.close()
    left = await idle_state(child)
    checks = {
        f"{statuses[500]} responses have status 500": statuses[500] > 0,
        f"/health has status {health.status}": health.status != 200,
        f"blocks in use: {left['num_used_blocks']}": left["num_used_blocks"] > 0,
        f"{statuses.total()} of {num_requests} requests were answered": statuses.total() != num_requests,
    }
    failures += [text for text, has_failed in checks.items() if has_failed]
    counts = {str(status): count for status, count in sorted(statuses.items())}
    return {"num_requests": num_requests, "statuses": counts, "left": left, "kept": kept, "failures": failures}


async def _neighbour(client: Client) -> Any:
    """The choices of a request that is valid, always the same."""
    body = completion(prompt="def add(a, b):", max_tokens=6, temperature=0)
    return json.loads((await client.exchange(body)).body)["choices"]


async def _unpin_all(client: Client) -> None:
    """Give back the prefixes that valid requests among the others have pinned."""
    for prefix in json.loads((await client.get("/v1/prefixes")).body)["data"]:
        await client.exchange(request(f"/v1/prefixes/{prefix['id']}", method="DELETE"))


def random_request(draw: random.Random) -> bytes:
    """A request over the wire: a valid one with some fields replaced, or no JSON that is an object."""
    path = draw.choice(PATHS)
    if draw.random() < 0.05:
        return request(path, draw.choice(RAW))
    if draw.random() < 0.03:
        return request(path, method=draw.choice(("GET", "PUT", "DELETE", "OPTIONS")))
    body = _valid(path, draw)
    for _ in range(draw.choice((0, 1, 1, 1, 2, 3))):
        body[draw.choice(FIELDS)] = _value(draw)
    if draw.random() < 0.03:
        body.pop(draw.choice(list(body)), None)
    # A request that turns out to be valid shall not take long.
    if body.get("max_tokens", 0) is None or (isinstance(body.get("max_tokens"), int) and body["max_tokens"] > 8):
        body["max_tokens"] = 4
    return request(path, json.dumps(body).encode())


def _valid(path: str, draw: random.Random) -> dict[str, Any]:
    limits: dict[str, Any] = {"max_tokens": draw.randint(1, 4), "temperature": draw.choice((0, 1))}
    bodies: dict[str, Callable[[], dict[str, Any]]] = {
        "/v1/completions": lambda: limits | {"prompt": draw.choice(("def f", [5, 6, 7], ["a", "b"], [[5], [6]]))},
        "/v1/chat/completions": lambda: limits | {"messages": [{"role": "user", "content": "Hello"}]},
        "/tokenize": lambda: {"prompt": "def f"},
        "/detokenize": lambda: {"tokens": [5, 6, 7]},
    }
    return bodies.get(path, lambda: {"prompt": "a"})()


def _value(draw: random.Random) -> Any:
    value = draw.choice(VALUES)
    if draw.random() < 0.1:
        return [value] * draw.choice((1, 3, 70, 1100))
    if draw.random() < 0.1:
        return [{"role": draw.choice(("user", "system", "none", 3)), "content": value}]
    return value
