"""What /openapi.json says of health, metrics and `/admin`."""

from typing import Any, Literal

import msgspec

from serve_app.ingress.client import EngineStatus
from serve_app.ingress.openapi.problems import fault_answers
from serve_app.ingress.openapi.schemas import Schema, list_of, narrow, schema_of
from serve_app.ingress.openapi.words import json_answer, request_body
from serve_app.runtime.operations import MAX_ID_CHARS, MAX_SEED, MAX_TIMEOUT_S, Operation, OperationRequest
from serve_app.runtime.snapshot import CellView, EventView, PaceView, ProcessView


class Word(msgspec.Struct, omit_defaults=True):
    """How something is, and why if that is not well."""

    status: str
    reason: str = ""


class HealthView(EngineStatus, frozen=True, kw_only=True):
    """`ready`; `degraded`: ready, with something missing; `not ready`; `unreachable`: no engine answers."""

    status: Literal["ready", "degraded", "not ready", "unreachable"]


class ConflictBody(msgspec.Struct):
    """Why an order is not followed, and the operation that stands in the way."""

    error: dict[str, Any]
    operation: Operation


_UNAVAILABLE = {"status": "unavailable", "reason": "the engine has not answered within 6 s"}
_READY: dict[str, Any] = {"status": "ready", "live": True, "ready": True, "reason": "", "page_tokens": 16, "epoch": 3}
_GONE: dict[str, Any] = {"live": False, "ready": False, "reason": "the engine has been silent for 7 s"}


def _word(text: str, **example: str) -> Schema:
    return json_answer(text, schema_of(Word), {example["status"]: example})


def _health(text: str, example: dict[str, Any]) -> Schema:
    shown = {"page_tokens": 0, "stats": None, "epoch": 0, "cell": None} | example
    return json_answer(text, schema_of(HealthView), {example["status"]: shown})


LIVEZ_OPENAPI: Schema = {"responses": {"200": _word("This process serves", status="live")}}
READYZ_OPENAPI: Schema = {
    "responses": {
        "200": _word("New traffic is welcome", status="ready"),
        "503": _word("Not now; `reason` says what is awaited", status="not ready", reason="3 of 4 workers have loaded"),
    }
}
HEALTH_OPENAPI: Schema = {
    "responses": {
        "200": _health("The engine's own account", _READY),
        "503": _health("The engine is not there, and none is awaited", {"status": "unreachable", **_GONE}),
    }
}
METRICS_OPENAPI: Schema = {
    "responses": {
        "200": {
            "description": "Prometheus' text format",
            "content": {"text/plain": {"schema": {"type": "string"}, "example": "vllm:num_requests_running 3.0\n"}},
        }
    }
}


def _view(text: str, schema: Schema, example: Any, silent: str) -> Schema:
    silence = f"The {silent} does not answer; `reason` says why"
    return {
        "responses": {
            "200": json_answer(text, schema, {"one": example}),
            "503": json_answer(silence, schema_of(Word), {"silent": _UNAVAILABLE}),
        }
    }


_WORKER = {
    "name": "w0.0.0#1",
    "replica": 0,
    "shard": 0,
    "node": "9f0c",
    "resident_bytes": 183_000_000,
    "tokens": 4096,
    "primary": [[0, 0], [0, 1]],
    "standby": [],
}
_STAGE = {
    "stage": 0,
    "first_layer": 0,
    "end_layer": 1,
    "imbalance": 1.0,
    "offered_imbalance": 1.0,
    "workers": [_WORKER],
}
_CELL = {
    "epoch": 3,
    "tp": 1,
    "pp": 1,
    "dp": 1,
    "num_experts": 2,
    "primary_slots": 8,
    "standby_slots": 2,
    "window_s": 60.0,
    "stages": [_STAGE],
}
_LOSS = {"at_unix_s": 1.79e9, "kind": "lost", "epoch": 4, "text": "worker w1.0.0#3 was lost", "seconds": {}}
_PROCESS = {"role": "worker", "name": "w0.0.0#1", "pid": 4242, "node": "9f0c", "state": "serving"}

PLACEMENT_OPENAPI = _view("The cell", schema_of(CellView), _CELL, "router")
EVENTS_OPENAPI = _view(
    "What has happened, the newest last", list_of(schema_of(EventView), "events"), {"events": [_LOSS]}, "engine"
)
EVENTS_OPENAPI["responses"] |= fault_answers(
    {422: ("query.after: input should be a valid number", "UnprocessableEntity")}
)
PROCESSES_OPENAPI = _view(
    "The cell's processes", list_of(schema_of(ProcessView), "processes"), {"processes": [_PROCESS]}, "engine"
)

_PACE = {
    "model": "demo",
    "tp": 1,
    "pp": 2,
    "dp": 1,
    "max_step_tokens": 512,
    "paces": [{"num_replicas": 1, "costs": [0.02, 0.0012, 0.001, 2e-05], "observed": [[[0, 8, 1.2], 0.031]]}],
}
PACE_OPENAPI = _view("What steps take", schema_of(PaceView), _PACE, "engine")

_OPERATION = schema_of(Operation)
_DRAIN: dict[str, Any] = {
    "id": "upgrade-7",
    "kind": "drain",
    "phase": "running",
    "effective_workers": 8,
    "pending_workers": 0,
    "started_unix_s": 1.79e9,
    "timeout_s": 3600.0,
    "detail": "3 requests are running or waiting",
}
_CONFLICT = {
    "error": {"message": "drain upgrade-7 is running", "type": "Conflict", "code": 409},
    "operation": _DRAIN,
}
SILENT = {503: ("the engine is being replaced", "ServiceUnavailable")}
TOO_LARGE = {413: ("body: larger than the limit of 65536 bytes", "PayloadTooLarge")}

narrow(
    OperationRequest,
    {
        "id": {"maxLength": MAX_ID_CHARS},
        "seed": {"minimum": 0, "maximum": MAX_SEED},
        "timeout_s": {"minimum": 0, "maximum": MAX_TIMEOUT_S},
    },
)
OPERATE_OPENAPI: Schema = {
    "requestBody": request_body(
        schema_of(OperationRequest),
        {
            "drain": {"kind": "drain", "id": "upgrade-7"},
            "resume": {"kind": "resume"},
            "drill": {"kind": "drill", "role": "router"},
        },
    ),
    "responses": {
        "200": json_answer("This order was given before: its operation", _OPERATION, {"drain": _DRAIN}),
        "202": json_answer("It has begun", _OPERATION, {"drain": _DRAIN}),
        "409": json_answer("Another operation stands in the way", schema_of(ConflictBody), {"drain": _CONFLICT}),
        **fault_answers({400: ("seed: only of a drill", "BadRequest")}, on_400="The order cannot be meant"),
        **fault_answers(TOO_LARGE | SILENT),
    },
}
OPERATIONS_OPENAPI: Schema = {
    "responses": {
        "200": json_answer(
            "The last hundred, the newest last", list_of(_OPERATION, "operations"), {"one": {"operations": [_DRAIN]}}
        ),
        **fault_answers(SILENT),
    }
}
OPERATION_OPENAPI: Schema = {
    "responses": {
        "200": json_answer("The operation", _OPERATION, {"drain": _DRAIN}),
        **fault_answers({404: ("no operation of this id is known", "NotFound")} | SILENT),
    }
}
