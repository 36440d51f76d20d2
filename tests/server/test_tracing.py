"""Traces: one span for each request with its parts, in the client's trace, and no cost from a dead collector."""

import socket
import sys
from collections import Counter

import httpx
import pytest

from jpaged import FinishReason
from jpaged.engine.outputs import StepOutput
from jpaged.request import CompletionOutput, RequestOutput, RequestTimes
from jpaged.server import ServerSettings, create_app
from tests.server.conftest import TIMEOUT_S

pytest.importorskip("opentelemetry.sdk")

from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from jpaged.server import tracing
from jpaged.server.tracing import Tracing, batches_to

SECRET = "a secret prompt"
TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


@pytest.fixture
def exporter(monkeypatch) -> InMemorySpanExporter:
    """The spans of applications that are made from now on."""
    exporter = InMemorySpanExporter()
    monkeypatch.setattr(tracing, "batches_to", lambda endpoint: SimpleSpanProcessor(exporter))
    return exporter


def complete(served, *headers: dict[str, str], **body) -> None:
    """Send a request for each of the headers to an application that traces."""

    async def run() -> None:
        app = create_app(served.llm, ServerSettings(otlp_traces_endpoint="http://127.0.0.1:9/v1/traces"))
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=TIMEOUT_S) as client:
            for each in headers:
                fields = {"prompt": SECRET, "max_tokens": 4, "ignore_eos": True, "temperature": 0} | body
                answer = await client.post("/v1/completions", json=fields, headers=each)
                assert answer.status_code == 200, answer.text
        assert not app.state.server.tracing._parents
        assert not app.state.server.tracing._firsts

    try:
        served.run(run())
    finally:
        served.llm._dispatcher.listeners[:] = [
            each
            for each in served.llm._dispatcher.listeners
            if not isinstance(getattr(each, "__self__", None), Tracing)
        ]


def test_nothing_is_traced_unless_asked_for(served):
    assert served.server.tracing is None


@pytest.mark.parametrize("streams", [True, False])
def test_a_request_is_one_span_with_its_parts_and_none_of_its_text(served, exporter, streams):
    complete(served, {}, stream=streams, user="someone", stop=["a stop string"])
    spans = {span.name: span for span in exporter.get_finished_spans()}
    assert list(spans) == ["queue", "prefill", "decode", "text_completion jpaged"]
    root = spans["text_completion jpaged"]
    queue, prefill, decode = (spans[name] for name in ("queue", "prefill", "decode"))
    assert {each.parent.span_id for each in (queue, prefill, decode)} == {root.context.span_id}
    assert root.parent is None
    assert root.start_time == queue.start_time
    assert root.start_time <= prefill.start_time <= decode.start_time <= root.end_time
    attributes = root.attributes
    assert attributes["gen_ai.operation.name"] == "text_completion"
    assert attributes["gen_ai.usage.input_tokens"] == attributes["gen_ai.usage.prompt_tokens"]
    assert attributes["gen_ai.usage.output_tokens"] == attributes["gen_ai.usage.completion_tokens"] == 4
    assert attributes["gen_ai.response.finish_reasons"] == ("length",)
    assert attributes["gen_ai.request.max_tokens"] == 4
    assert attributes["gen_ai.request.temperature"] == 0
    assert 0 <= attributes["gen_ai.latency.time_to_first_token"] <= attributes["gen_ai.latency.e2e"]
    words = "".join(span.to_json() for span in spans.values())
    for text in (SECRET, "someone", "a stop string"):
        assert text not in words


def test_a_well_formed_traceparent_is_the_parent_and_no_other_is(served, exporter):
    well_formed = f"00-{TRACE}-{SPAN}-01"
    malformed = [f"00-{'0' * 32}-{SPAN}-01", f"01-{TRACE}-{SPAN}-01", f"00-{TRACE.upper()}-{SPAN}-01", "x" * 10_000]
    complete(served, *({"traceparent": each} for each in [well_formed, *malformed]), prompt=[SECRET, SECRET])
    roots = [span for span in exporter.get_finished_spans() if span.name.startswith("text_completion")]
    traces = Counter(f"{span.context.trace_id:032x}" for span in roots)
    assert len(roots) == 2 * (1 + len(malformed))
    assert traces.pop(TRACE) == 2
    assert set(traces.values()) == {1}
    assert {f"{span.parent.span_id:016x}" for span in roots if span.parent is not None} == {SPAN}


def test_a_request_that_failed_has_an_error_and_one_that_never_started_has_one_part(exporter):
    traced = Tracing(SimpleSpanProcessor(exporter), "m")
    output = CompletionOutput(0, "", [], 0.0, finish_reason=FinishReason.ERROR)
    result = RequestOutput("chatcmpl-1", None, [1, 2], [output], times=RequestTimes(1.0, None, None, 2.0))
    traced.listen(StepOutput(finished=[result]))
    queue, root = exporter.get_finished_spans()
    assert (queue.name, root.name) == ("queue", "chat m")
    assert root.status.status_code is StatusCode.ERROR
    assert root.end_time - root.start_time == 10**9


def test_a_collector_that_never_answers_costs_no_request_and_loses_spans_alone(monkeypatch):
    monkeypatch.setattr(tracing, "EXPORT_TIMEOUT_S", 0.2)
    monkeypatch.setattr(tracing, "CLOSE_TIMEOUT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as hole:  # it takes connections and reads nothing
        traced = Tracing(batches_to(f"http://127.0.0.1:{hole.getsockname()[1]}/v1/traces"), "m")
        output = CompletionOutput(0, "", [3], 0.0, finish_reason=FinishReason.STOP)
        for i in range(3000):
            result = RequestOutput(str(i), None, [1, 2], [output], times=RequestTimes(1.0, 1.1, 1.2, 2.0))
            traced.listen(StepOutput(finished=[result]))
        [processor] = traced._provider._active_span_processor._span_processors
        assert len(processor._batch_processor._queue) <= processor._batch_processor._max_queue_size < 3000 * 4
        traced.shutdown()


def test_a_missing_extra_is_named(served, monkeypatch):
    monkeypatch.delitem(sys.modules, "jpaged.server.tracing")
    monkeypatch.setitem(sys.modules, "opentelemetry.context", None)
    with pytest.raises(ValueError, match=r"pip install 'jpaged\[otel\]'"):
        create_app(served.llm, ServerSettings(otlp_traces_endpoint="http://127.0.0.1:9/v1/traces"))
