"""Fuzzed bodies: every answer is a success or says what is wrong, and the engine lives on."""

import asyncio
import json
import random

import pytest

NASTY = (
    None, True, False, 0, 1, 2, -1, 21, 65, 4097, 2**31, 2**32, 2**63, -(2**63), 2**64, 0.5, 1.0, -0.0, 1e-320, 1e300,
    -1e300, "", "x", "1", "a" * 300, "\0", "\u2028", "🙂", "\ufffd", "<|endoftext|>", [], [0], [1, 2], [-1], [2**40],
    ["x"], ["", "x"], ["x"] * 70, [[1, 2], [3]], [[]], [None], [True], {}, {"1": 1}, {"5": -100}, {"x": 1}, {"1": None},
    {"type": "text"}, {"type": "json_object"}, {"include_usage": True}, {"include_usage": 1}, {"a": {"b": [1]}},
)  # fmt: skip
SAMPLING = (
    "n", "best_of", "use_beam_search", "length_penalty", "early_stopping", "temperature", "top_p", "top_k", "min_p",
    "presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias", "seed", "stop", "stop_token_ids",
    "include_stop_str_in_output", "ignore_eos", "max_tokens", "min_tokens", "prompt_logprobs", "bad_words",
    "allowed_token_ids", "skip_special_tokens", "stream", "stream_options", "priority", "cache_salt",
    "return_token_ids", "user", "model", "logprobs", "response_format", "tools", "tool_choice", "suffix", "unknown",
)  # fmt: skip
ROUTES = {
    "/v1/completions": ({"prompt": "x = 1"}, ("prompt", "echo", "add_special_tokens", *SAMPLING)),
    "/v1/chat/completions": (
        {"messages": [{"role": "user", "content": "x = 1"}]},
        (
            "messages", "top_logprobs", "max_completion_tokens", "add_generation_prompt", "continue_final_message",
            "chat_template", "chat_template_kwargs", "reasoning_effort", *SAMPLING,
        ),
    ),
    "/tokenize": ({"prompt": "x = 1"}, ("prompt", "messages", "add_special_tokens", "return_token_strs")),
    "/detokenize": ({"tokens": [1, 2]}, ("tokens", "skip_special_tokens")),
}  # fmt: skip
FITTING = {
    "temperature": (0, 0.7, 1e-320, 1e300, -0.0), "top_p": (0.5, 1e-300), "top_k": (1, 5, 2**31 - 1), "min_p": (0.1, 1),
    "n": (1, 2, 5), "logprobs": (0, 2, 20, True), "top_logprobs": (0, 20), "seed": (0, -1, 2**63), "stop": ("e", ["e"]),
    "logit_bias": ({"5": 100}, {"2047": -100.0}, {"5": 1e300}), "allowed_token_ids": ([5], [5, 6]), "echo": (True,),
    "presence_penalty": (2, -2), "frequency_penalty": (2,), "repetition_penalty": (1e-300, 1e300), "stream": (True,),
    "min_tokens": (1, 3), "max_tokens": (0, 1, 3), "prompt_logprobs": (0, 20), "bad_words": (["e"], ["return x"]),
    "use_beam_search": (True,), "best_of": (2, 5), "ignore_eos": (True,), "stop_token_ids": ([5, 2047],),
    "stream_options": ({"include_usage": True, "continuous_usage_stats": True},), "return_token_ids": (True,),
    "prompt": ([5], [[5], [6, 7]], ["x", "y"]), "length_penalty": (-10, 10), "early_stopping": (True, "never"),
}  # fmt: skip


def fuzzed(rng: random.Random) -> tuple[str, dict]:
    """A route, and a body of which some fields are odd."""
    path = rng.choice(list(ROUTES))
    base, names = ROUTES[path]
    body = {"max_tokens": 3} | base if path.startswith("/v1") else dict(base)
    for name in rng.sample(names, rng.randint(0, min(6, len(names)))):
        is_odd = name not in FITTING or rng.random() < 0.2
        body[name] = rng.choice(NASTY if is_odd else FITTING[name])
    if body.get("max_tokens") is None and path.startswith("/v1"):
        body["max_tokens"] = 2  # or the context would be filled
    return path, body


@pytest.mark.parametrize("num_requests", [100, pytest.param(100_000, marks=pytest.mark.slow)])
def test_odd_bodies_get_an_answer(served, num_requests):
    rng, statuses = random.Random(num_requests), {}

    async def ask(client, path: str, body: dict) -> None:
        response = await client.post(path, json=body)
        assert response.status_code in (200, 400, 404), (path, body, response.text)
        statuses[response.status_code] = statuses.get(response.status_code, 0) + 1
        if response.status_code != 200:
            assert response.json()["error"]["message"], (path, body)
        elif body.get("stream") is True and path.startswith("/v1"):
            assert response.text.endswith("data: [DONE]\n\n"), (path, body, response.text)
        else:
            json.loads(response.content)

    async def ask_some(client) -> None:
        await asyncio.gather(*(ask(client, *fuzzed(rng)) for _ in range(20)))

    client = served.client()
    for _ in range(0, num_requests, 20):
        served.run(ask_some(client))
    served.run(client.aclose())
    assert sum(statuses.values()) == num_requests
    assert min(statuses[200], statuses[400]) > num_requests / 10
