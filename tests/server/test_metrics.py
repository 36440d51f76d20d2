"""Metrics: vLLM's names and labels, and what each request and step adds to them."""

import asyncio
import re
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

import jpaged
from jpaged import LLM, AsyncLLM, FinishReason, RequestOutputKind, SamplingParams
from jpaged.engine.outputs import FirstToken, StepOutput
from jpaged.request import CompletionDelta
from jpaged.server import ServerSettings, create_app
from jpaged.server import metrics as module
from jpaged.server.admission import Demand
from jpaged.server.counting import Counting
from jpaged.server.errors import CANCELLED_STATUS, ApiError
from jpaged.server.histograms import Histogram, Recent, one_two_five
from jpaged.server.keys import ANONYMOUS
from jpaged.server.metrics import CONTENT_TYPE, Metrics
from tests.support.tiny import tiny_engine

EXPRESSIONS = """
histogram_quantile(0.99, sum by(le) (rate(vllm:e2e_request_latency_seconds_bucket{model_name="$model_name"}[5m])))
rate(vllm:e2e_request_latency_seconds_sum{model_name="$m"}[5m]) / rate(vllm:e2e_request_latency_seconds_count[5m])
rate(vllm:prompt_tokens_total{model_name="$model_name"}[5m])
rate(vllm:generation_tokens_total{model_name="$model_name"}[5m])
histogram_quantile(0.5, sum by(le) (rate(vllm:inter_token_latency_seconds_bucket{model_name="$model_name"}[5m])))
rate(vllm:inter_token_latency_seconds_sum[5m]) / rate(vllm:inter_token_latency_seconds_count[5m])
vllm:num_requests_running{model_name="$model_name"}
vllm:num_requests_waiting{model_name="$model_name"}
histogram_quantile(0.9, sum by(le) (rate(vllm:time_to_first_token_seconds_bucket{model_name="$model_name"}[5m])))
rate(vllm:time_to_first_token_seconds_sum[5m]) / rate(vllm:time_to_first_token_seconds_count[5m])
vllm:kv_cache_usage_perc{model_name="$model_name"}
sum by(le) (increase(vllm:request_prompt_tokens_bucket{model_name="$model_name"}[5m]))
sum by(le) (increase(vllm:request_generation_tokens_bucket{model_name="$model_name"}[5m]))
sum by(finished_reason) (increase(vllm:request_success_total{model_name="$model_name"}[5m]))
rate(vllm:request_queue_time_seconds_sum{model_name="$model_name"}[5m])
rate(vllm:request_prefill_time_seconds_sum{model_name="$model_name"}[5m])
rate(vllm:request_decode_time_seconds_sum{model_name="$model_name"}[5m])
rate(vllm:request_max_num_generation_tokens_sum{model_name="$model_name"}[5m])
sum(rate(vllm:prefix_cache_hits_total[5m])) / sum(rate(vllm:prefix_cache_queries_total[5m]))
sum(rate(vllm:num_preemptions_total[5m]))
rate(vllm:request_inference_time_seconds_sum[5m])
histogram_quantile(0.95, sum by(le) (rate(vllm:request_time_per_output_token_seconds_bucket[5m])))
histogram_quantile(0.95, sum by(le) (rate(vllm:iteration_tokens_total_bucket[5m])))
sum(rate(vllm:request_params_n_sum[5m])) + sum(rate(vllm:request_params_max_tokens_sum[5m]))
vllm:cache_config_info
vllm:gpu_cache_usage_perc + rate(vllm:time_per_output_token_seconds_sum[5m])
vllm:gpu_prefix_cache_hits_total / vllm:gpu_prefix_cache_queries_total
sum(rate(http_requests_total{status="5xx"}[5m]))
sum by (handler) (rate(http_request_duration_seconds_sum[5m])) / sum(rate(http_request_duration_seconds_count[5m]))
sum(vllm:num_requests_waiting_by_reason{reason="capacity"})
sum(rate(vllm:iteration_tokens_total_sum[5m])) / (sum(rate(vllm:iteration_tokens_total_count[5m])) > 0)
sum(rate(vllm:prompt_tokens_by_source_total{source="local_compute"}[5m]))
sum(rate(vllm:request_prompt_tokens_sum[5m])) / (sum(rate(vllm:request_prompt_tokens_count[5m])) > 0)
sum(rate(vllm:request_generation_tokens_sum[5m])) / (sum(rate(vllm:request_generation_tokens_count[5m])) > 0)
"""
"""Queries in the form that vLLM's dashboards for Grafana have, with every name that they read."""

NAME = re.compile(r"(?:vllm:|http_)\w+")
GREEDY = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True, output_kind=RequestOutputKind.DELTA)
FINAL = replace(GREEDY, output_kind=RequestOutputKind.FINAL_ONLY)
TIMEOUT_S = 600
PROMPT = {"prompt_token_ids": [5, 6, 7, 8, 9, 10]}


def serve(task: Callable[[AsyncLLM, Metrics], Awaitable[None]]) -> None:
    """Run a task over a tiny model and its metrics."""

    async def run() -> None:
        llm = AsyncLLM.from_llm(LLM.from_engine(tiny_engine(max_burst=1)))
        try:
            async with asyncio.timeout(TIMEOUT_S):
                await task(llm, Metrics(llm, "tiny"))
        finally:
            llm.shutdown()

    asyncio.run(run())


async def read(llm: AsyncLLM, params: SamplingParams, **options) -> list:
    return [output async for output in llm.generate(PROMPT, params, **options)]


async def idle(llm: AsyncLLM) -> None:
    """Wait until the engine has nothing to do, and has published that."""
    while await llm.ask(lambda engine: engine.has_unfinished):
        await asyncio.sleep(0)
    stats = await llm.stats()
    while llm.latest_stats != stats:
        await asyncio.sleep(0)


def samples(metrics: Metrics) -> dict[str, float]:
    """Values by name, and by name and the label that tells samples of one family apart."""
    return samples_of(metrics.text().decode())


def samples_of(text: str) -> dict[str, float]:
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            extra = {k: v for k, v in sample.labels.items() if k not in ("model_name", "engine")}
            found["/".join([sample.name, *extra.values()])] = sample.value
    return found


def test_every_name_that_vllms_dashboards_read_is_there():
    async def task(llm, metrics):
        metrics.answered("/v1/models", "GET", 200, 0.1)
        await read(llm, GREEDY)
        names = {
            sample.name
            for family in text_string_to_metric_families(metrics.text().decode())
            for sample in family.samples
        }
        asked = set(NAME.findall(EXPRESSIONS))
        assert len(asked) >= 30
        assert not asked - names

    serve(task)


def test_families_have_vllms_labels_and_one_meaning_each():
    async def task(llm, metrics):
        await read(llm, GREEDY)
        families = list(text_string_to_metric_families(metrics.text().decode()))
        assert not [name for name, count in Counter(family.name for family in families).items() if count > 1]
        for family in families:
            if not family.name.startswith(("vllm:", "jpaged:")):
                continue
            assert family.documentation, family.name
            for sample in family.samples:
                assert sample.labels["model_name"] == "tiny", family.name
                assert sample.labels["engine"] == "0", family.name

    serve(task)


@pytest.mark.parametrize("params", [GREEDY, FINAL])
def test_a_request_is_counted_once_whether_it_is_streamed_or_not(params):
    async def task(llm, metrics):
        for _ in range(2):
            await read(llm, replace(params, n=2))
        found = samples(metrics)
        for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds", "request_queue_time_seconds"):
            assert found[f"vllm:{name}_count"] == 2, name
        for name in ("prefill", "decode", "inference"):
            assert found[f"vllm:request_{name}_time_seconds_count"] == 2, name
        assert found["vllm:prompt_tokens_total"] == 2 * len(PROMPT["prompt_token_ids"])
        assert found["vllm:prompt_tokens_cached_total"] == 5  # of the second prompt, all but the last
        assert found["vllm:prompt_tokens_by_source_total/local_cache_hit"] == 5
        assert found["vllm:prompt_tokens_by_source_total/local_compute"] == 2 * len(PROMPT["prompt_token_ids"]) - 5
        assert found["vllm:request_prompt_tokens_sum"] == 2 * len(PROMPT["prompt_token_ids"])
        assert found["vllm:request_generation_tokens_sum"] == 20
        assert found["vllm:request_max_num_generation_tokens_sum"] == 10
        assert found["vllm:request_params_n_sum"] == 4
        assert found["vllm:request_params_max_tokens_sum"] == 10
        assert found["vllm:request_success_total/length"] == 2
        assert found["vllm:request_success_total/stop"] == found["vllm:request_success_total/error"] == 0
        assert found["vllm:request_time_per_output_token_seconds_count"] == 2
        assert found["vllm:inter_token_latency_seconds_count"] == (2 if params is FINAL else 8)
        assert metrics.ttft.quantiles(0.5) != [None]
        assert metrics.itl.quantiles(0.5) != [None]

    serve(task)


def test_steps_are_counted_with_all_tokens_that_they_computed():
    async def task(llm, metrics):
        await read(llm, GREEDY)
        await idle(llm)
        found = samples(metrics)
        assert found["vllm:iteration_tokens_total_sum"] == len(PROMPT["prompt_token_ids"]) + 5 - 1
        assert found["jpaged:step_seconds_count"] == found["vllm:iteration_tokens_total_count"]
        assert found["jpaged:step_seconds_sum"] > 0
        assert found["vllm:generation_tokens_total"] == 5
        assert found["vllm:num_requests_running"] == found["vllm:kv_cache_usage_perc"] == 0
        assert found["jpaged:health/ok"] == 1
        assert found["jpaged:health/hung"] == found["jpaged:heartbeat_age_seconds"] == 0

    serve(task)


def test_a_request_that_is_left_counts_as_aborted_and_leaves_nothing_behind():
    async def task(llm, metrics):
        async for _ in llm.generate(PROMPT, replace(GREEDY, max_tokens=40)):
            break
        await idle(llm)
        await asyncio.sleep(0)
        found = samples(metrics)
        assert found["vllm:request_success_total/abort"] == 1
        assert not metrics._running

    serve(task)


def test_names_of_clients_make_no_series():
    async def task(llm, metrics):
        metrics.answered(None, "GET", 404, 0.1)
        metrics.answered("/v1/models", "GET", 200, 0.1)
        before = len(samples(metrics))
        for i in range(100):
            metrics.answered(None, f"METHOD{i}", 404, 0.1)
            metrics.ignored(3)
        for i in range(3):
            await read(llm, FINAL, request_id=f"<img onerror={i}>")
        found = samples(metrics)
        assert len(found) == before + 1  # the methods that are none of HTTP's
        assert found["jpaged:ignored_params_total"] == 300
        assert b"onerror" not in metrics.text()

    serve(task)


def test_rejections_are_counted_by_reason():
    async def task(llm, metrics):
        metrics.rejected("queue_full")
        metrics.rejected("queue_full")
        assert samples(metrics)["vllm:admission_rejections_total/queue_full"] == 2

    serve(task)


def test_requests_of_one_step_are_observed_together_and_ends_in_error_are_counted():
    async def task(llm, metrics):
        request = llm.engine.make_request("a", PROMPT, GREEDY)
        first = FirstToken(request, 4, 0.0, 0.0)
        metrics.listen(StepOutput(started={"a": first, "b": first}))
        deltas = [CompletionDelta(name, index, "", [1, 2]) for name in "ab" for index in range(3)]
        metrics.listen(StepOutput(deltas=deltas, failed={"b": ValueError("no text")}))
        found = samples(metrics)
        assert found["vllm:inter_token_latency_seconds_count"] == 2
        assert found[f"vllm:request_success_total/{FinishReason.ERROR}"] == 1
        assert list(metrics._running) == ["a"]

    serve(task)


def test_the_steps_before_a_first_token_are_those_that_ended_since_the_request(monkeypatch):
    async def task(llm, metrics):
        request = llm.engine.make_request("a", PROMPT, GREEDY)
        clock = iter(range(1, 100))
        monkeypatch.setattr(module, "monotonic", lambda: float(next(clock)))
        for _ in range(5):
            metrics.listen(StepOutput(num_tokens=1))
        metrics.listen(StepOutput())  # no step
        started = {name: FirstToken(request, 0, arrived, None) for name, arrived in (("a", 2.5), ("b", 5.0))}
        metrics.listen(StepOutput(num_tokens=1, started=started))
        found = samples(metrics)
        assert found["jpaged:first_token_steps_count"] == 2
        assert found["jpaged:first_token_steps_sum"] == 4 + 1  # the third to the fifth, and their own

    serve(task)


def test_the_lag_of_the_event_loop_is_measured_while_it_is_watched():
    async def task(llm, metrics):
        async with metrics.watching():
            while not samples(metrics)["jpaged:event_loop_lag_seconds_count"]:
                await asyncio.sleep(0.01)

    serve(task)


def test_histograms_count_values_at_a_bound_below_it():
    histogram = Histogram("name", "help", [1, 2, 5])
    for value, count in ((1, 1), (1.5, 2), (6, 3)):
        histogram.observe(value, count)
    [*buckets, total, sum_] = histogram.family({"a": "b"}).samples
    assert [(each.labels["le"], each.value) for each in buckets] == [("1.0", 1), ("2.0", 3), ("5.0", 3), ("+Inf", 6)]
    assert (total.value, sum_.value, histogram.count) == (6, 22, 6)


def test_quantiles_weigh_values_by_how_often_they_were_seen():
    recent = Recent()
    assert recent.quantiles(0.5, 0.99) == [None, None]
    recent.add(1.0, 98)
    recent.add(5.0, 2)
    assert recent.quantiles(0.5, 0.98, 0.99) == [1.0, 1.0, 5.0]


def test_bounds_of_counts_end_at_the_context():
    assert one_two_five(64) == [1, 2, 5, 10, 20, 50]
    assert one_two_five(1000) == [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000]


def test_answers_are_counted_by_route_and_class_of_status(served):
    before = values(served)
    for path in ("/v1/models", "/v1/models/none", "/nowhere/1", "/nowhere/2", "/health", "/ready"):
        served.wire.get(path)
    served.wire.request("PROPFIND", "/nowhere")
    after = values(served)
    gained = {name: count - before.get(name, 0) for name, count in after.items() if name.startswith("http_requests")}
    assert gained["http_requests_total//v1/models/GET/2xx"] == 1
    assert gained["http_requests_total//v1/models/{model:path}/GET/4xx"] == 1
    assert gained["http_requests_total/other/GET/4xx"] == 2
    assert gained["http_requests_total/other/other/4xx"] == 1
    assert sum(gained.values()) == 5
    assert after["http_request_duration_seconds_count//v1/models"] >= 1


def test_clients_that_leave_before_their_answer_are_no_failures_of_the_server():
    answered = []

    class Seen:
        def answered(self, handler, method, status, seconds) -> None:
            answered.append(status)

    async def silent(scope, receive, send) -> None:
        pass

    async def failing(scope, receive, send) -> None:
        raise RuntimeError

    async def run() -> None:
        scope = {"type": "http", "method": "GET"}
        await Counting(silent, Seen())(scope, None, None)  # pyright: ignore[reportArgumentType]
        with pytest.raises(RuntimeError):
            await Counting(failing, Seen())(scope, None, None)  # pyright: ignore[reportArgumentType]

    asyncio.run(run())
    assert answered == [CANCELLED_STATUS, 500]


def test_ignored_parameters_are_counted(served):
    before = values(served)["jpaged:ignored_params_total"]
    served.complete("x", max_tokens=1, foo=1, bar=2)
    assert values(served)["jpaged:ignored_params_total"] - before == 2


def values(served) -> dict[str, float]:
    answer = served.wire.get("/metrics")
    assert answer.headers["content-type"] == CONTENT_TYPE
    return samples_of(answer.text)


def test_requests_that_wait_before_the_engine_count_as_waiting_and_refusals_by_their_code(served):
    async def run() -> dict[str, float]:
        app = create_app(served.llm, ServerSettings(max_waiting_sequences=1))
        server, fills_the_engine = app.state.server, Demand("0", 1, num_sequences=1000)
        with (
            server.admission.queue(ANONYMOUS, [fills_the_engine]),
            server.admission.queue(ANONYMOUS, [Demand("1", 1)]),
        ):
            with pytest.raises(ApiError), server.admission.queue(ANONYMOUS, [Demand("2", 1)]):
                pass
            return samples(server.metrics)

    found = served.run(run())
    assert found["vllm:num_requests_waiting"] == 1
    assert found["vllm:admission_rejections_total/max_waiting_sequences"] == 1


def test_the_page_on_monitoring_names_families_that_are_there(served):
    page = (Path(jpaged.__file__).parent / "docs" / "monitoring.md").read_text()
    served.complete("x = 1", max_tokens=2)
    found = samples_of(served.wire.get("/metrics").text)
    names = {name.split("/")[0] for name in found}
    asked = set(re.findall(r"`((?:vllm:|jpaged:|http_)\w+)`", page)) - {"vllm:admission_rejections_total"}
    assert len(asked) > 15
    assert not {name for name in asked if name not in names and f"{name}_count" not in names}
