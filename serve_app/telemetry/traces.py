"""OpenTelemetry traces: one span per request, with those of its sequences' queue, prefill and decode in it.

They are made when the environment names a collector (OTEL_EXPORTER_OTLP_ENDPOINT) and the packages of the extra `otel`
are installed. Otherwise nothing of them is imported, and a request pays for one look at a variable.
"""

import importlib
import importlib.util
import logging
import os
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI

from serve_app.engine.request import SamplingParams

log = logging.getLogger(__name__)

ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
MAX_TIMINGS = 64  # sequences of one request that have spans of their own; of further ones only the tokens are counted


@dataclass
class Timing:
    """When what happened to one sequence, in seconds of one clock. Never what was said in it."""

    accepted_s: float
    num_prompt_tokens: int = 0
    sampling: SamplingParams = field(default_factory=SamplingParams)
    queued_s: float | None = None  # how long it waited for the first step that computed it
    first_s: float | None = None  # when its first token came
    last_s: float = 0.0  # when its last token came
    num_tokens: int = 0
    outcome: str = "abort"
    refused: str = ""  # why it was not let in
    ended_s: float = 0.0


@dataclass
class Trace:
    """What is known of one HTTP request."""

    timings: list[Timing] = field(default_factory=list)
    num_sequences: int = 0
    num_prompt_tokens: int = 0
    num_tokens: int = 0

    def add(self, timing: Timing) -> None:
        """A sequence has ended."""
        self.num_sequences += 1
        self.num_prompt_tokens += timing.num_prompt_tokens
        self.num_tokens += timing.num_tokens
        if len(self.timings) < MAX_TIMINGS:
            self.timings.append(timing)


TRACE: ContextVar[Trace | None] = ContextVar("octavo_trace", default=None)


def trace_requests(app: FastAPI, model_name: str) -> None:
    """Make spans of the requests to `app`, if that is asked for: by `app.state.traces`, their provider."""
    if not any(os.environ.get(name) for name in ENDPOINTS):
        return
    if not is_installed():
        log.warning("no traces: %s is set, but the extra `otel` is not installed", ENDPOINTS[0])
        return
    otel: Any = importlib.import_module("serve_app.telemetry.otel")
    provider = app.state.traces = otel.make_provider()
    app.add_middleware(otel.TraceRequests, tracer=provider.get_tracer("octavo"), model_name=model_name)


def is_installed() -> bool:
    """Whether the extra's packages are there."""
    try:
        return importlib.util.find_spec("opentelemetry.exporter.otlp.proto.http.trace_exporter") is not None and (
            importlib.util.find_spec("opentelemetry.sdk.trace") is not None
        )
    except ModuleNotFoundError:  # not even the package that it would be in
        return False
