"""Traces by OpenTelemetry: one span for each request to the engine, with its times in the queue, prefill and decode.

The names of attributes are those of OpenTelemetry's conventions for generative models, and those that vLLM has. No text
of a prompt or an answer is recorded.
"""

import threading
from time import monotonic_ns, time_ns
from typing import Any

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from jpaged.engine.outputs import FirstToken, StepOutput
from jpaged.request import FinishReason, RequestOutput
from jpaged.server.metrics import own_version
from jpaged.server.trace_context import traceparent

EXPORT_TIMEOUT_S = 5.0
"""Seconds that a thread of its own gives the collector for one batch."""

CLOSE_TIMEOUT_S = 3.0
"""Seconds that the end of the server waits for the last batch."""


def batches_to(endpoint: str) -> SpanProcessor:
    """A bounded queue of spans, and a thread that sends them: a collector that is slow or dead loses spans alone."""
    return BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint, timeout=EXPORT_TIMEOUT_S))


class Tracing:
    """Makes the spans of a request once it has ended. All methods are for the thread of the event loop.

    Args:
        processor: takes the spans.
        model_name: the name that clients call the model by.
    """

    def __init__(self, processor: SpanProcessor, model_name: str) -> None:
        resource = Resource.create({"service.name": "jpaged", "service.version": own_version()})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("jpaged", own_version())
        self._model_name = model_name
        self._parents: dict[str, Context] = {}  # of the open requests whose clients trace
        self._firsts: dict[str, FirstToken] = {}

    def open(self, request_ids: list[str]) -> None:
        """Let requests belong to the trace of the client that is served now."""
        if (given := traceparent.get()) is not None:
            parent = TraceContextTextMapPropagator().extract({"traceparent": given})
            self._parents |= dict.fromkeys(request_ids, parent)

    def close(self, request_ids: list[str]) -> None:
        """Forget requests that the engine has not taken."""
        for request_id in request_ids:
            self._parents.pop(request_id, None)

    def listen(self, output: StepOutput) -> None:
        """Take the output of a step; a listener of ``AsyncLLM``."""
        self._firsts |= output.started
        for result in output.finished:
            self._trace(result, self._firsts.pop(result.request_id, None))
        for request_id in output.failed:
            self._firsts.pop(request_id, None)
            self._parents.pop(request_id, None)

    def shutdown(self) -> None:
        """Send the spans that wait, as far as ``CLOSE_TIMEOUT_S`` allows."""
        closing = threading.Thread(target=self._provider.shutdown, name="jpaged-traces", daemon=True)
        closing.start()
        closing.join(CLOSE_TIMEOUT_S)

    def _trace(self, result: RequestOutput, first: FirstToken | None) -> None:
        times = result.times
        if times is None or times.finished is None:
            return
        offset = time_ns() - monotonic_ns()

        def at(seconds: float) -> int:
            return offset + int(seconds * 1e9)

        is_chat = result.request_id.startswith("chat")
        operation = "chat" if is_chat else "text_completion"
        span = self._tracer.start_span(
            f"{operation} {self._model_name}",
            context=self._parents.pop(result.request_id, None),
            kind=SpanKind.SERVER,
            attributes=self._attributes(result, first) | {"gen_ai.operation.name": operation},
            start_time=at(times.arrived),
        )
        if result.outputs[0].finish_reason is FinishReason.ERROR:
            span.set_status(Status(StatusCode.ERROR))
        ends = [times.arrived, times.first_scheduled, times.first_token, times.finished]
        for name, begin, end in zip(("queue", "prefill", "decode"), ends[:-1], ends[1:], strict=True):
            if begin is not None:
                self._part(span, name, at(begin), at(times.finished if end is None else end))
        span.end(at(times.finished))

    def _part(self, span: Span, name: str, begin: int, end: int) -> None:
        self._tracer.start_span(name, set_span_in_context(span), start_time=begin).end(max(begin, end))

    def _attributes(self, result: RequestOutput, first: FirstToken | None) -> dict[str, Any]:
        times, num_output = result.times, sum(len(output.token_ids) for output in result.outputs)
        reasons = [str(output.finish_reason) for output in result.outputs]
        found: dict[str, Any] = {
            "gen_ai.provider.name": "jpaged",
            "gen_ai.request.model": self._model_name,
            "gen_ai.response.model": self._model_name,
            "gen_ai.response.id": result.request_id,
            "gen_ai.request.id": result.request_id,
            "gen_ai.request.n": len(result.outputs),
            "gen_ai.response.finish_reasons": reasons,
            "gen_ai.usage.input_tokens": len(result.prompt_token_ids),
            "gen_ai.usage.output_tokens": num_output,
            "gen_ai.usage.prompt_tokens": len(result.prompt_token_ids),
            "gen_ai.usage.completion_tokens": num_output,
            "gen_ai.usage.cache_read.input_tokens": result.num_cached_tokens,
            "jpaged.num_preemptions": result.num_preemptions,
        }
        if first is not None:
            params = first.request.params
            found["gen_ai.request.temperature"] = params.temperature
            found["gen_ai.request.top_p"] = params.top_p
            if params.max_tokens is not None:
                found["gen_ai.request.max_tokens"] = params.max_tokens
            if params.seed is not None:
                found["gen_ai.request.seed"] = params.seed
        assert times is not None
        assert times.finished is not None
        found["gen_ai.latency.e2e"] = times.finished - times.arrived
        if times.first_scheduled is not None:
            found["gen_ai.latency.time_in_queue"] = times.first_scheduled - times.arrived
            if times.first_token is not None:
                found["gen_ai.latency.time_to_first_token"] = times.first_token - times.arrived
                found["gen_ai.latency.time_in_model_prefill"] = times.first_token - times.first_scheduled
                found["gen_ai.latency.time_in_model_decode"] = times.finished - times.first_token
        return found
