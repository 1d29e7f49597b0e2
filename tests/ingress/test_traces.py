"""Traces, read by a real collector on loopback: one span per request, its phases in it, and never the prompt."""

import asyncio
import importlib.util
import subprocess
import sys
import threading
from contextlib import asynccontextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from serve_app.ingress.api import create_app
from serve_app.ingress.faults import RefusedError
from serve_app.telemetry import traces
from tests.ingress.conftest import client_of

pytestmark = pytest.mark.anyio

needs_otel = pytest.mark.skipif(
    not (traces.is_installed() and importlib.util.find_spec("opentelemetry.proto")), reason="no OpenTelemetry"
)
SERVER = 2  # SPAN_KIND_SERVER
TRACE_ID, PARENT_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SECRET = "Rome"


class Collector(ThreadingHTTPServer):
    """OTLP over HTTP, as far as spans go."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.spans = []
        self.resources = []
        self.bodies = []

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (  # noqa: PLC0415 -- an extra
            ExportTraceServiceRequest,
        )

        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.bodies.append(body)
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            self.server.resources.append(read_attributes(resource.resource.attributes))
            self.server.spans += [span for scope in resource.scope_spans for span in scope.spans]
        self.send_response(200)
        self.end_headers()

    def log_message(self, *args):
        pass


def read_attributes(attributes):
    def read(value):
        kind = value.WhichOneof("value")
        return [read(v) for v in value.array_value.values] if kind == "array_value" else getattr(value, kind)

    return {attribute.key: read(attribute.value) for attribute in attributes}


class Traced:
    """The application with traces on, and what the collector got."""

    def __init__(self, world, collector):
        self.app = create_app(world.engine, world.tokenizer, world.model)
        self.client = client_of(self.app)
        self.collector = collector

    async def spans(self):
        """By name; when all that have ended were sent."""
        assert await asyncio.to_thread(self.app.state.traces.force_flush)
        return {span.name: span for span in self.collector.spans}


@asynccontextmanager
async def collecting():
    with Collector() as collector:
        thread = threading.Thread(target=collector.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield collector
        finally:
            collector.shutdown()
            thread.join()


@pytest.fixture
async def traced(world, monkeypatch):
    async with collecting() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
        traced = Traced(world, collector)
        yield traced
        await traced.client.aclose()
        await asyncio.to_thread(traced.app.state.traces.shutdown)


@needs_otel
async def test_a_request_has_one_span_with_its_phases_in_it(world, traced):
    world.say(SECRET, " is the capital of Italy")
    headers = {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-01"}
    answer = await traced.client.post("/generate", json={"text": SECRET}, headers=headers)
    usage = answer.json()["meta_info"]
    spans = await traced.spans()
    assert set(spans) == {"POST /generate", "queue", "prefill", "decode"}
    whole = spans["POST /generate"]
    assert (whole.kind, whole.trace_id.hex(), whole.parent_span_id.hex()) == (SERVER, TRACE_ID, PARENT_ID)
    said = read_attributes(whole.attributes)
    assert said["gen_ai.request.model"] == "tiny"
    assert said["gen_ai.usage.input_tokens"] == usage["prompt_tokens"]
    assert said["gen_ai.usage.output_tokens"] == usage["completion_tokens"]
    assert said["gen_ai.response.finish_reasons"] == ["stop"]
    assert said["http.response.status_code"] == 200
    assert 0 < said["gen_ai.latency.time_to_first_token"] <= said["gen_ai.latency.e2e"]
    queue, prefill, decode = (spans[name] for name in ("queue", "prefill", "decode"))
    assert all(span.parent_span_id == whole.span_id for span in (queue, prefill, decode))
    times = [whole.start_time_unix_nano, queue.start_time_unix_nano]
    for span in (queue, prefill, decode):
        assert span.start_time_unix_nano == times[-1]
        times.append(span.end_time_unix_nano)
    assert times == sorted(times)
    assert times[-1] <= whole.end_time_unix_nano
    assert traced.collector.resources[0]["service.name"] == "octavo"


@needs_otel
async def test_neither_prompt_nor_answer_is_in_them(world, traced):
    world.say(SECRET, " is the capital of Italy")
    for stream in (False, True):
        body = {"text": SECRET, "rid": "mine", "stream": stream}
        assert (await traced.client.post("/generate", json=body)).status_code == 200
    await traced.spans()
    sent = b"".join(traced.collector.bodies)
    assert b"/generate" in sent
    assert not any(word in sent for word in (SECRET.encode(), b"capital", b"Italy"))


@needs_otel
async def test_the_sequences_of_one_request_share_its_span(traced):
    body = {"text": ["Rome", "Oslo"], "sampling_params": {"max_new_tokens": 3}}
    await traced.client.post("/generate", json=body)
    said = read_attributes((await traced.spans())["POST /generate"].attributes)
    names = [span.name for span in traced.collector.spans]
    assert sorted(names) == sorted(["POST /generate", *["queue", "prefill", "decode"] * 2])
    assert said["gen_ai.usage.output_tokens"] == 6
    assert said["gen_ai.request.choice.count"] == 2


@needs_otel
async def test_a_refusal_says_why_and_has_no_phases(world, traced):
    async def submit(request):
        raise RefusedError("queue-full", "too many wait", 1.0)
        yield

    world.engine.submit = submit
    await traced.client.post("/generate", json={"text": SECRET})
    spans = await traced.spans()
    assert set(spans) == {"POST /generate"}
    assert read_attributes(spans["POST /generate"].attributes)["octavo.refused"] == "queue-full"


@needs_otel
async def test_health_checks_and_scrapes_have_none(traced):
    for path in ("/livez", "/metrics", "/v1/models"):
        assert (await traced.client.get(path)).status_code == 200
    assert not await traced.spans()


@needs_otel
async def test_a_collector_that_does_not_answer_harms_nobody(world, monkeypatch):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")  # seconds that it is tried for
    app = create_app(world.engine, world.tokenizer, world.model)
    async with client_of(app) as client:
        body = {"text": SECRET, "sampling_params": {"max_new_tokens": 2}}
        assert (await client.post("/generate", json=body)).status_code == 200
    await asyncio.to_thread(app.state.traces.shutdown)


async def test_without_the_packages_the_server_runs_without_traces(world, monkeypatch, caplog):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(traces, "is_installed", lambda: False)
    app = create_app(world.engine, world.tokenizer, world.model)
    assert not hasattr(app.state, "traces")
    assert "`otel` is not installed" in caplog.text


def test_nothing_is_imported_where_no_traces_are_wanted():
    script = (
        "import sys; from fastapi import FastAPI; from serve_app.telemetry.traces import trace_requests\n"
        "trace_requests(FastAPI(), 'tiny')\n"
        "loaded = [name for name in sys.modules if name.startswith(('opentelemetry.sdk', 'opentelemetry.exporter'))]\n"
        "assert not loaded and 'serve_app.telemetry.otel' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True, env={"PATH": ""})
