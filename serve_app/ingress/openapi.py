"""What /openapi.json says of `/generate` and `/admin/...`, taken from the structs that decode and make them."""

from collections.abc import Sequence
from typing import Any

import msgspec
from fastapi import FastAPI

from serve_app.ingress.sglang import SglangFields
from serve_app.ingress.tgi import TgiFields
from serve_app.runtime.snapshot import CellView, EventView, ProcessView

_EXAMPLES: dict[str, Any] = {
    "chat": {
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "sampling_params": {"max_new_tokens": 40, "temperature": 0},
    },
    "sglang": {"text": "Once upon a time", "sampling_params": {"max_new_tokens": 40}, "stream": True},
    "tgi": {"inputs": "Once upon a time", "parameters": {"max_new_tokens": 40, "details": True}},
}

(*_PROMPTS, _CELL, _EVENT, _PROCESS), _COMPONENTS = msgspec.json.schema_components(
    [SglangFields, TgiFields, CellView, EventView, ProcessView], ref_template="#/components/schemas/{name}"
)

GENERATE_OPENAPI: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {"anyOf": _PROMPTS},
                "examples": {name: {"value": body} for name, body in _EXAMPLES.items()},
            }
        },
    }
}


def schemas_of(types: Sequence[type]) -> list[dict[str, Any]]:
    """References to the schemas of these structs, which are in the document from now on."""
    references, components = msgspec.json.schema_components(types, ref_template="#/components/schemas/{name}")
    _COMPONENTS.update(components)
    return list(references)


def _answers(text: str, schema: dict[str, Any], silent: str) -> dict[str, Any]:
    return {
        "responses": {
            "200": {"description": text, "content": {"application/json": {"schema": schema}}},
            "503": {"description": f"The {silent} does not answer; `reason` says why"},
        }
    }


def _list_of(item: dict[str, Any], name: str) -> dict[str, Any]:
    """The schema of an object that holds one list."""
    return {"type": "object", "properties": {name: {"type": "array", "items": item}}, "required": [name]}


PLACEMENT_OPENAPI = _answers("The cell", _CELL, "router")
EVENTS_OPENAPI = _answers("What has happened, the newest last", _list_of(_EVENT, "events"), "engine")
PROCESSES_OPENAPI = _answers("The cell's processes", _list_of(_PROCESS, "processes"), "engine")


class OctavoApi(FastAPI):
    """FastAPI that knows msgspec's schemas."""

    def openapi(self) -> dict[str, Any]:
        document = super().openapi()
        document.setdefault("components", {}).setdefault("schemas", {}).update(_COMPONENTS)
        return document
