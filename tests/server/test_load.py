"""Load, a long run and invalid requests as the benchmark makes them, in small, against the server of these tests."""

import argparse
import asyncio
from urllib.parse import urlsplit

import pytest

from bench.http.command import _first_tokens
from bench.http.connection import Client, completion, request
from bench.http.fuzz import run_fuzz
from bench.http.launch import Metrics
from bench.http.load import Timeline, first_tokens_by_length, jobs_of, run_load, summary
from bench.http.phases import run_phases
from bench.http.soak import run_soak
from bench.workloads import sharegpt


class Child:
    """The server of these tests in the place of one in a process of its own."""

    def __init__(self, served) -> None:
        url = urlsplit(served.base_url)
        self.address = url.hostname, url.port
        self.said = {"vocab_size": served.llm.engine.model_config.vocab_size}
        self.has_ended = False
        self._served = served

    def state(self) -> dict:
        used = self._served.llm.latest_stats.num_used_blocks
        unfinished = self._served.llm.num_unfinished
        return {
            "num_used_blocks": used,
            "num_unfinished": unfinished,
            "num_tasks": self._served.run(self._num_tasks()),
            "num_files": 0,
            "rss_bytes": 1,
        }

    async def _num_tasks(self) -> int:
        return len(asyncio.all_tasks())

    def stop(self) -> None:
        pass

    def wait(self, timeout_s: float) -> int:
        return 0


@pytest.fixture
def child(served) -> Child:
    return Child(served)


def test_every_stream_of_a_load_has_its_times(child):
    work = sharegpt(6, mean_in=8, mean_out=6, longest=16, vocab_size=child.said["vocab_size"])
    timelines, seconds = run_load(child.address, jobs_of(work, [0.0, 0.0, 0.1, 0.1, 0.2, 0.2]), num_processes=2)
    assert [(times.status, times.is_complete) for times in timelines] == [(200, True)] * 6
    for times in timelines:
        assert times.first_s is not None
        assert 0 < times.first_s <= times.last_s <= seconds
        assert sum(times.gaps_s) == pytest.approx(times.last_s - times.first_s)
    assert summary(timelines)["num_failed"] == 0


def test_a_phase_has_a_rate_and_the_figures_of_the_server(child):
    work = sharegpt(4, mean_in=8, mean_out=6, longest=16, vocab_size=child.said["vocab_size"])
    at_once, slower = run_phases(child.address, work, {"seconds": 1.0}, [0.5], num_processes=1)
    assert (at_once["rate"], slower["rate"]) == (None, 2.0)
    for phase in (at_once, slower):
        assert phase["num_failed"] == 0
        assert phase["tokens_per_s"] == pytest.approx(work.num_output_tokens / phase["seconds"])
        assert phase["step_s"] > 0
        assert phase["ttft_p99_steps"] == pytest.approx(phase["ttft_p99_s"] / phase["step_s"])
        assert phase["first_token_steps_p99"] >= 1
        assert sum(phase["first_token_steps"].values()) == 4
        short, *longer = phase["ttft_by_length"]
        assert (short["most_prompt_tokens"], short["num_requests"]) == (128, 4)
        assert short["ttft_p99_s"] == phase["ttft_p99_s"]
        assert [each["num_requests"] for each in longer] == [0, 0]
    shown = _first_tokens([at_once, slower])
    assert "<= 128 tokens" in shown
    assert " ," not in shown, "a class without requests has an empty cell"
    assert "requests by most steps before it" in shown


def test_times_to_first_tokens_are_told_apart_by_the_length_of_the_prompt():
    lengths = [1, 128, 129, 512, 513, 2000, 2000]
    timelines = [Timeline(200, True, float(i), 9.0) for i in range(6)]
    timelines.append(Timeline(500, False, 100.0, 100.0))
    classes = first_tokens_by_length([[0] * length for length in lengths], timelines)
    assert [each["num_requests"] for each in classes] == [2, 2, 2]
    assert [each["ttft_p50_s"] for each in classes] == [0.5, 2.5, 4.5]


def test_streams_whose_clients_leave_leak_nothing(child):
    args = argparse.Namespace(minutes=0.01, num_streams=8, disconnects=0.5)
    report = run_soak(child, args)  # pyright: ignore[reportArgumentType]
    assert report["statuses"] == {200: report["num_complete"]}
    assert report["num_complete"] > 0
    assert [failure for failure in report["failures"] if "late" not in failure] == []


def test_invalid_requests_neither_fail_the_server_nor_change_the_tokens_of_others(child):
    report = run_fuzz(child, 150)  # pyright: ignore[reportArgumentType]
    assert report["failures"] == [], report["kept"]
    assert sum(report["statuses"].values()) == 150
    assert {"200", "400", "404"} <= report["statuses"].keys()


def test_a_connection_that_ends_within_a_response_gives_an_incomplete_answer():
    async def cut_off() -> list:
        async def answer(reader, writer) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nabc")
            writer.close()

        async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
            client = Client(server.sockets[0].getsockname())
            return [await client.get("/"), await client.exchange(request("/", b"{}"))]

    for answer in asyncio.run(cut_off()):
        assert answer == (200, b"abc", False)
    assert completion(n=1).endswith(b'content-length: 8\r\n\r\n{"n": 1}')


def test_figures_of_the_server_are_of_the_time_between_two_readings():
    text = """# HELP a b
h_bucket{le="0.1",model="m"} %d
h_bucket{le="1.0",model="m"} %d
h_bucket{le="+Inf",model="m"} %d
h_sum{model="m"} %f
h_count{model="m"} %d
g 3.0
"""
    before, after = Metrics(text % (5, 5, 5, 0.5, 5)), Metrics(text % (7, 15, 15, 5.5, 15))
    assert after.total("g") == 3
    assert after.mean_since(before, "h") == 0.5
    assert after.quantile_since(before, "h", 0.1) == 0.1
    assert after.quantile_since(before, "h", 0.5) == 1.0
    assert after.histogram_since(before, "h") == {0.1: 2, 1.0: 8}
    assert after.mean_since(after, "h") is None
    assert after.quantile_since(after, "h", 0.5) is None
