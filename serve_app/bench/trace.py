"""Spans as a Chrome trace (chrome://tracing, ui.perfetto.dev): a row for each worker; bubbles are `idle` and `wait`."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from serve_app.bench.measure import BenchError
from serve_app.model.timing import Span


def write_trace(path: Path, spans: Mapping[str, Sequence[Span]]) -> None:
    """`spans` by worker. Times in the file are microseconds since the first span began. BenchError if it cannot be."""
    begin_s = min((span.begin_s for of_one in spans.values() for span in of_one), default=0.0)
    events: list[dict[str, Any]] = []
    for row, (name, of_one) in enumerate(sorted(spans.items())):
        events.append({"ph": "M", "name": "thread_name", "pid": 0, "tid": row, "args": {"name": name}})
        events += [_event(span, row, begin_s) for span in of_one]
    try:
        path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))
    except OSError as error:
        raise BenchError(f"the trace {path} cannot be written: {error.strerror}") from None


def _event(span: Span, row: int, begin_s: float) -> dict[str, Any]:
    begin_us, lasted_us = 1e6 * (span.begin_s - begin_s), 1e6 * (span.end_s - span.begin_s)
    return {"ph": "X", "name": span.name, "pid": 0, "tid": row, "ts": round(begin_us, 1), "dur": round(lasted_us, 1)}
