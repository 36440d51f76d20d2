"""A client that minds its own business: whatever others do, it gets what it gets alone."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import httpx

from tests.server.conftest import TIMEOUT_S, Served

PROMPT = "def mean(values):"
LENGTH = 24


@cache
def expected_text(served: Served) -> str:
    return served.generate(PROMPT, max_tokens=LENGTH, ignore_eos=True).outputs[0].text


@contextmanager
def bystander(served: Served) -> Iterator[None]:
    """Ask again and again while the block runs, at least once. Every answer is that of a server without others."""
    expected, is_over, has_begun = expected_text(served), threading.Event(), threading.Event()
    texts: list[str] = []
    errors: list[BaseException] = []
    body = {"prompt": PROMPT, "max_tokens": LENGTH, "ignore_eos": True, "temperature": 0}

    def ask() -> None:
        try:
            with httpx.Client(base_url=served.base_url, timeout=TIMEOUT_S, trust_env=False) as client:
                while not (texts and is_over.is_set()):
                    has_begun.set()
                    texts.append(client.post("/v1/completions", json=body).json()["choices"][0]["text"])
                assert client.get("/live").status_code == client.get("/health").status_code == 200
        except BaseException as error:
            errors.append(error)
        finally:
            has_begun.set()

    thread = threading.Thread(target=ask)
    thread.start()
    assert has_begun.wait(TIMEOUT_S)
    try:
        yield
    finally:
        is_over.set()
        thread.join(TIMEOUT_S)
    if errors:
        raise errors[0]
    assert set(texts) == {expected}
