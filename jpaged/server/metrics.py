"""The metrics of a server, under vLLM's names: one listener sees each request start, gain tokens and end."""

import asyncio
from bisect import bisect_right
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from time import monotonic

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from jpaged.async_llm import AsyncLLM
from jpaged.engine.health import HealthState
from jpaged.engine.outputs import FirstToken, StepOutput
from jpaged.engine.stats import STATISTICS, VLLM_NAMES
from jpaged.request import CompletionDelta, FinishReason, RequestOutput
from jpaged.server.histograms import Histogram, Recent, one_two_five

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
"""Methods that label a metric; others are "other"."""

PROBES = frozenset({"/live", "/health", "/ping", "/ready", "/version", "/metrics"})
"""Routes whose answers are not counted: machines ask them all the time."""

UNKNOWN = "other"
"""The label of a path that is no route, and of a method that is none of HTTP's."""

LAG_EVERY_S = 0.25
"""Seconds between two measurements of the event loop's lag."""

# The bounds are vLLM's, so that the dashboards made for it work. Steps here may take a few ms, which adds smaller ones.
TTFT = [
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
    160,
    640,
    2560,
]
PER_TOKEN = [0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80]
LATENCY = [0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680]
STEP_TOKENS = [1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384]
ANSWER = [0.1, 0.5, 1, 5, 30, 120]
SHORT = [0.001, 0.0025, 0.005]
STEPS = [1, 2, 3, 4, 5, 6, 8, 12, 16, 32, 64, 256, 1024]

MOST_STEPS = 4096
"""Steps that a request may wait for and be counted exactly."""


@dataclass(slots=True)
class _Running:
    """A request that has a first token and no end.

    Args:
        max_tokens: the output tokens that it asked for at most.
        last: when it last gained tokens, of ``time.monotonic``.
        is_streamed: whether deltas have told of its tokens.
    """

    max_tokens: int | None
    last: float
    is_streamed: bool = False


class Metrics(Collector):
    """Counters and histograms of one server, read by ``/metrics`` and by the dashboard.

    All methods are for the thread of the event loop. Nothing here asks the engine: its statistics are those that the
    engine thread has published. No label comes from a client.

    Args:
        llm: the engine; the metrics listen to its steps from now on.
        model_name: the name that clients call the model by.
        num_queued: requests that wait before the engine, now.

    Attributes:
        num_queued: as given.
        ttft, itl: seconds to the first token, and between tokens, in the last minute.
    """

    def __init__(self, llm: AsyncLLM, model_name: str, num_queued: Callable[[], int] = lambda: 0) -> None:
        self._llm = llm
        self.num_queued = num_queued
        self._labels = {"model_name": model_name, "engine": "0"}
        self._running: dict[str, _Running] = {}
        self._num_prompt_tokens = self._num_cached_tokens = self._num_ignored_params = 0
        self._ends = Counter({reason.value: 0 for reason in FinishReason})
        self._rejections: Counter[str] = Counter()
        self._answers: Counter[tuple[str, str, str]] = Counter()  # handler, method, status
        self._answer_s: dict[str, Histogram] = {}  # by handler
        self.ttft, self.itl = Recent(), Recent()
        self._step_ends: deque[float] = deque(maxlen=MOST_STEPS)
        self._make_histograms(one_two_five(llm.max_model_len))
        self.registry = CollectorRegistry()
        self.registry.register(self)
        ProcessCollector(registry=self.registry)
        llm.listen(self.listen)

    def _make_histograms(self, counts: list[float]) -> None:
        self._histograms: list[Histogram] = []

        def histogram(name: str, help_: str, bounds: Sequence[float]) -> Histogram:
            self._histograms.append(Histogram(name, help_, bounds))
            return self._histograms[-1]

        short = sorted({*SHORT, *PER_TOKEN})
        self._ttft = histogram("vllm:time_to_first_token_seconds", "seconds from a request to its first token", TTFT)
        self._itl = histogram(
            "vllm:inter_token_latency_seconds", "seconds a token between two steps of a streamed request", short
        )
        self._per_token = histogram(
            "vllm:request_time_per_output_token_seconds", "seconds a token after the first, of each request", short
        )
        self._e2e = histogram("vllm:e2e_request_latency_seconds", "seconds from a request to its end", LATENCY)
        self._queue = histogram("vllm:request_queue_time_seconds", "seconds until the first step", LATENCY)
        self._inference = histogram("vllm:request_inference_time_seconds", "seconds from first step to end", LATENCY)
        self._prefill = histogram("vllm:request_prefill_time_seconds", "seconds from first step to token", LATENCY)
        self._decode = histogram("vllm:request_decode_time_seconds", "seconds from first token to end", LATENCY)
        self._prompt_len = histogram("vllm:request_prompt_tokens", "tokens of each prompt", counts)
        self._output_len = histogram("vllm:request_generation_tokens", "output tokens of each request", counts)
        self._longest = histogram(
            "vllm:request_max_num_generation_tokens", "output tokens of the longest completion of each request", counts
        )
        self._n = histogram("vllm:request_params_n", "completions that each request asked for", [1, 2, 5, 10, 20])
        self._max_tokens = histogram("vllm:request_params_max_tokens", "max_tokens of each request", counts)
        self._preemptions = histogram(
            "vllm:request_num_preemptions", "preemptions of each request", [0, 1, 2, 5, 10, 20, 50]
        )
        self._step_tokens = histogram("vllm:iteration_tokens_total", "tokens that each step computed", STEP_TOKENS)
        self._step_s = histogram("jpaged:step_seconds", "seconds that each step took", sorted({*SHORT, *TTFT}))
        self._first_steps = histogram(
            "jpaged:first_token_steps", "steps that ended between a request and its first token", STEPS
        )
        self._lag = histogram(
            "jpaged:event_loop_lag_seconds", "seconds by which the event loop is late", sorted({*SHORT, *TTFT})
        )

    # What happens -------------------------------------------------------------------------------------------------

    def listen(self, output: StepOutput) -> None:
        """Take the output of a step."""
        now = monotonic()
        if output.num_tokens:
            self._step_ends.append(now)
            self._step_tokens.observe(output.num_tokens)
            self._step_s.observe(output.seconds)
        self._note_gaps(output.deltas, now)
        for request_id, first in output.started.items():
            self._start(request_id, first, now)
        for result in output.finished:
            self._finish(result, now)
        for request_id in output.failed:
            self._running.pop(request_id, None)
            self._ends[FinishReason.ERROR.value] += 1

    def _note_gaps(self, deltas: Iterable[CompletionDelta], now: float) -> None:
        """Observe the time since each request last gained tokens, a token.

        A step has hundreds of deltas, and its requests mostly waited for the same time: runs of them are observed once.
        """
        running, last, num_tokens, count = self._running, now, 1, 0
        for delta in deltas:
            each = running.get(delta.request_id)
            if each is None or each.last == now:  # another completion of the request was observed
                continue
            if each.last != last or len(delta.token_ids) != num_tokens:
                self._observe_gap(now - last, num_tokens, count)
                last, num_tokens, count = each.last, len(delta.token_ids), 0
            count += 1
            each.last, each.is_streamed = now, True
        self._observe_gap(now - last, num_tokens, count)

    def _observe_gap(self, seconds: float, num_tokens: int, count: int) -> None:
        if count and num_tokens:
            self._itl.observe(seconds / num_tokens, count)
            self.itl.add(seconds / num_tokens, count)

    def _start(self, request_id: str, first: FirstToken, now: float) -> None:
        self._ttft.observe(now - first.arrived)
        self.ttft.add(now - first.arrived)
        self._first_steps.observe(len(self._step_ends) - bisect_right(self._step_ends, first.arrived))
        self._num_prompt_tokens += len(first.request.prompt_token_ids)
        self._num_cached_tokens += first.num_cached_tokens
        self._running[request_id] = _Running(first.request.params.max_tokens, now)

    def _finish(self, result: RequestOutput, now: float) -> None:
        running = self._running.pop(result.request_id, None)
        lengths = [len(output.token_ids) for output in result.outputs]
        reason = result.outputs[0].finish_reason or FinishReason.ABORT
        self._ends[reason.value] += 1
        self._prompt_len.observe(len(result.prompt_token_ids))
        self._output_len.observe(sum(lengths))
        self._longest.observe(max(lengths))
        self._n.observe(len(lengths))
        self._preemptions.observe(result.num_preemptions)
        times = result.times
        if times is None:
            return
        self._e2e.observe(now - times.arrived)
        if times.first_scheduled is None:
            return
        self._queue.observe(max(times.first_scheduled - times.arrived, 0.0))
        self._inference.observe(now - times.first_scheduled)
        if running is None or times.first_token is None:
            return
        if running.max_tokens is not None:
            self._max_tokens.observe(running.max_tokens)
        self._prefill.observe(max(times.first_token - times.first_scheduled, 0.0))
        self._decode.observe(now - times.first_token)
        if max(lengths) > 1:
            each_s = (now - times.first_token) / (max(lengths) - 1)
            self._per_token.observe(each_s)
            if not running.is_streamed:  # nothing else has told of the time between its tokens
                self._itl.observe(each_s)
                self.itl.add(each_s)

    def rejected(self, reason: str) -> None:
        """Count a request that was not admitted, by one of a few reasons of the code."""
        self._rejections[reason] += 1

    def ignored(self, num_params: int) -> None:
        """Count parameters of a request that mean nothing here."""
        self._num_ignored_params += num_params

    def answered(self, handler: str | None, method: str, status: int, seconds: float) -> None:
        """Count an answer over HTTP, unless its route is one of ``PROBES``.

        Args:
            handler: the path of the route, as it was declared; None if no route took the request.
            method: the request's method.
            status: the answer's status.
            seconds: time from the request to the end of the answer.
        """
        if handler in PROBES:
            return
        handler = UNKNOWN if handler is None else handler
        method = method if method in METHODS else UNKNOWN
        self._answers[handler, method, f"{status // 100}xx"] += 1
        if handler not in self._answer_s:
            name, help_ = "http_request_duration_seconds", "seconds from a request over HTTP to the end of the answer"
            self._answer_s[handler] = Histogram(name, help_, ANSWER)
        self._answer_s[handler].observe(seconds)

    @asynccontextmanager
    async def watching(self) -> AsyncIterator[None]:
        """Measure the lag of the event loop during a block."""
        task = asyncio.get_running_loop().create_task(self._measure_lag())
        try:
            yield
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    async def _measure_lag(self) -> None:
        while True:
            due = monotonic() + LAG_EVERY_S
            await asyncio.sleep(LAG_EVERY_S)
            self._lag.observe(max(monotonic() - due, 0.0))

    # What is read -------------------------------------------------------------------------------------------------

    def text(self) -> bytes:
        """All metrics, in the text format of Prometheus; its type is ``CONTENT_TYPE``."""
        return generate_latest(self.registry)

    def collect(self) -> Iterator[Metric]:
        """All families, for Prometheus."""
        yield from self._engine_state()
        yield from self._health()
        yield self._counter("vllm:prompt_tokens", "tokens of prompts, computed or found", self._num_prompt_tokens)
        yield self._counter("vllm:prompt_tokens_cached", "those from the prefix cache", self._num_cached_tokens)
        sources = Counter(
            local_compute=self._num_prompt_tokens - self._num_cached_tokens,
            local_cache_hit=self._num_cached_tokens,
            external_kv_transfer=0,
        )
        yield self._counters("vllm:prompt_tokens_by_source", "tokens of prompts, by origin", "source", sources)
        yield self._counters("vllm:request_success", "requests that ended", "finished_reason", self._ends)
        yield self._counters("vllm:admission_rejections", "requests that were not admitted", "reason", self._rejections)
        yield self._counter("jpaged:ignored_params", "parameters that mean nothing here", self._num_ignored_params)
        for histogram in self._histograms:
            yield histogram.family(self._labels)
        yield self._itl.family(self._labels, "vllm:time_per_output_token_seconds")  # its name in older dashboards
        yield from self._http()

    def _engine_state(self) -> Iterator[Metric]:
        stats, config = self._llm.latest_stats, self._llm.engine.config
        stats = replace(stats, num_waiting=stats.num_waiting + self.num_queued())
        usage = stats.num_used_blocks / max(stats.num_blocks, 1)
        for name in ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc"):  # the second in older dashboards
            yield self._gauge(name, "used blocks / blocks, from 0 to 1", usage)
        for name, each in STATISTICS.items():
            make = self._counter if each.kind == "counter" else self._gauge
            yield make(VLLM_NAMES.get(name, f"jpaged:{name}"), each.help, getattr(stats, name))
        for old, name in (("queries", "prefix_queried_tokens"), ("hits", "prefix_hit_tokens")):
            yield self._counter(f"vllm:gpu_prefix_cache_{old}", STATISTICS[name].help, getattr(stats, name))
        waiting = GaugeMetricFamily(
            "vllm:num_requests_waiting_by_reason", "requests that wait, by reason", labels=[*self._labels, "reason"]
        )
        waiting.add_metric([*self._labels.values(), "capacity"], stats.num_waiting)
        waiting.add_metric([*self._labels.values(), "deferred"], 0)
        yield waiting
        yield self._info(
            "vllm:cache_config_info",
            "settings of the KV cache",
            block_size=str(config.block_size),
            cache_dtype=config.kv_cache_dtype,
            enable_prefix_caching=str(config.enable_prefix_caching),
            gpu_memory_utilization=str(config.memory_fraction),
            num_gpu_blocks=str(stats.num_blocks),
            num_cpu_blocks=str(stats.num_host_blocks),
        )
        yield self._info("jpaged:build_info", "the version that serves", version=own_version())

    def _health(self) -> Iterator[Metric]:
        health = self._llm.health()
        age = 0.0 if health.step_began is None else monotonic() - health.step_began
        yield self._gauge("jpaged:heartbeat_age_seconds", "seconds that the step has run; 0 between steps", age)
        yield self._gauge("jpaged:failed_steps", "steps that failed in a row", health.num_failures)
        state = GaugeMetricFamily("jpaged:health", "1 for the state of the engine", labels=[*self._labels, "state"])
        for each in HealthState:
            state.add_metric([*self._labels.values(), each.value], float(each is health.state))
        yield state

    def _http(self) -> Iterator[Metric]:
        names = ["handler", "method", "status"]
        answers = CounterMetricFamily("http_requests", "answers over HTTP, by route and class of status", labels=names)
        for labels, count in self._answers.items():
            answers.add_metric(labels, count)
        yield answers
        if families := [each.family({"handler": handler}) for handler, each in self._answer_s.items()]:
            for family in families[1:]:
                families[0].samples += family.samples
            yield families[0]

    def _counter(self, name: str, help_: str, value: float) -> Metric:
        family = CounterMetricFamily(name, help_, labels=list(self._labels))
        family.add_metric(list(self._labels.values()), value)
        return family

    def _counters(self, name: str, help_: str, label: str, values: Counter[str]) -> Metric:
        family = CounterMetricFamily(name, help_, labels=[*self._labels, label])
        for of, value in values.items():
            family.add_metric([*self._labels.values(), of], value)
        return family

    def _gauge(self, name: str, help_: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, help_, labels=list(self._labels))
        family.add_metric(list(self._labels.values()), value)
        return family

    def _info(self, name: str, help_: str, **labels: str) -> Metric:
        family = GaugeMetricFamily(name, help_, labels=[*self._labels, *labels])
        family.add_metric([*self._labels.values(), *labels.values()], 1)
        return family


def metrics_route(metrics: Metrics) -> Route:
    """``/metrics``, for Prometheus."""

    async def show(request: Request) -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE)

    return Route("/metrics", show)


def own_version() -> str:
    """The version of jpaged; "unknown" if it is run from a directory of sources."""
    try:
        return version("jpaged")
    except PackageNotFoundError:
        return "unknown"
