"""Spans by OpenTelemetry, in the names of its GenAI conventions. Imported only where traces are wanted (`traces`).

A request's spans are made when it has ended, from the times that its sequences noted: until then nothing is paid. They
wait in a bounded queue for a thread that sends them. Where that cannot keep up spans are dropped, and no request waits.
"""

import os
import time
from collections.abc import Iterator

from opentelemetry import trace as api
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app import __version__
from serve_app.telemetry.traces import TRACE, Timing, Trace

Attributes = dict[str, AttributeValue]

_PARENT = TraceContextTextMapPropagator()  # W3C: traceparent and tracestate


def make_provider() -> TracerProvider:
    """Set by OpenTelemetry's environment variables: endpoint, headers, sampler, queue, service name."""
    service = os.environ.get("OTEL_SERVICE_NAME", "octavo")
    resource = Resource.create({"service.name": service, "service.version": __version__})
    provider = TracerProvider(resource=resource)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider


class TraceRequests:
    """ASGI middleware: a span for each POST. Health checks and scrapes have none."""

    def __init__(self, app: ASGIApp, tracer: api.Tracer, model_name: str) -> None:
        self._app = app
        self._tracer = tracer
        self._model_name = model_name

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        status = 0

        async def send_seen(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        trace, clocks = Trace(), Clocks()
        before = TRACE.set(trace)
        try:
            await self._app(scope, receive, send_seen)
        finally:
            TRACE.reset(before)
            self._write(scope, trace, clocks, status)

    def _write(self, scope: Scope, trace: Trace, clocks: "Clocks", status: int) -> None:
        """The spans of a request that has ended."""
        route = getattr(scope.get("route"), "path", "")
        span = self._tracer.start_span(
            f"POST {route}".rstrip(),
            context=_parent(scope),
            kind=api.SpanKind.SERVER,
            attributes={"http.request.method": "POST", "gen_ai.request.model": self._model_name},
            start_time=clocks.unix_ns(clocks.began_s),
        )
        if span.is_recording():
            span.set_attributes(_http(route, status) | _usage(route, trace))
            if status >= 500 or any(timing.outcome == "error" for timing in trace.timings if not timing.refused):
                span.set_status(api.StatusCode.ERROR)
            for index, timing in enumerate(trace.timings):
                self._write_phases(api.set_span_in_context(span), index, timing, clocks)
        span.end(clocks.unix_ns(time.perf_counter()))

    def _write_phases(self, parent: Context, index: int, timing: Timing, clocks: "Clocks") -> None:
        for name, from_s, to_s in _phases(timing):
            phase = self._tracer.start_span(
                name, parent, attributes={"octavo.sequence": index}, start_time=clocks.unix_ns(from_s)
            )
            phase.end(clocks.unix_ns(to_s))


class Clocks:
    """Turns seconds of `time.perf_counter` into what spans want: they began together."""

    def __init__(self) -> None:
        self.began_s = time.perf_counter()
        self._began_ns = time.time_ns()

    def unix_ns(self, at_s: float) -> int:
        return self._began_ns + round((at_s - self.began_s) * 1e9)


def _parent(scope: Scope) -> Context:
    """The span that the client's headers name, if any."""
    headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
    return _PARENT.extract(headers, Context())


def _phases(timing: Timing) -> Iterator[tuple[str, float, float]]:
    """Name, begin and end. One that never came to an end ended with its request."""
    if timing.refused:
        return
    planned_s = timing.accepted_s + (timing.queued_s or 0.0)
    if timing.first_s is None:
        yield "queue", timing.accepted_s, timing.ended_s
        return
    planned_s = min(planned_s, timing.first_s)
    yield "queue", timing.accepted_s, planned_s
    yield "prefill", planned_s, timing.first_s
    yield "decode", timing.first_s, timing.last_s


def _http(route: str, status: int) -> Attributes:
    """Without a status the client had gone before it was answered."""
    return ({"http.route": route} if route else {}) | ({"http.response.status_code": status} if status else {})


def _usage(route: str, trace: Trace) -> Attributes:
    """What was asked for and what it took, of all sequences together; latencies of the first one."""
    if not trace.timings:
        return {}
    first = trace.timings[0]
    attributes: Attributes = {
        "gen_ai.operation.name": "chat" if route.endswith("/chat/completions") else "text_completion",
        "gen_ai.provider.name": "octavo",
        "gen_ai.request.max_tokens": first.sampling.max_new_tokens,
        "gen_ai.request.temperature": first.sampling.temperature,
        "gen_ai.request.top_p": first.sampling.top_p,
        "gen_ai.request.choice.count": trace.num_sequences,
        "gen_ai.usage.input_tokens": trace.num_prompt_tokens,
        "gen_ai.usage.output_tokens": trace.num_tokens,
        "gen_ai.latency.e2e": first.ended_s - first.accepted_s,
    }
    reasons = [timing.refused for timing in trace.timings if timing.refused]
    if reasons:
        return attributes | {"octavo.refused": reasons[0]}
    attributes["gen_ai.response.finish_reasons"] = [timing.outcome for timing in trace.timings]
    if first.first_s is not None:
        attributes["gen_ai.latency.time_to_first_token"] = first.first_s - first.accepted_s
    if first.queued_s is not None:
        attributes["gen_ai.latency.time_in_queue"] = first.queued_s
    return attributes
