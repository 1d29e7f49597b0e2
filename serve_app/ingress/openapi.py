"""What /openapi.json says of `/generate` and `/admin/placement`, taken from the structs that decode and make them."""

from typing import Any

import msgspec
from fastapi import FastAPI

from serve_app.ingress.sglang import SglangFields
from serve_app.ingress.tgi import TgiFields
from serve_app.runtime.snapshot import CellView

_EXAMPLES: dict[str, Any] = {
    "chat": {
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "sampling_params": {"max_new_tokens": 40, "temperature": 0},
    },
    "sglang": {"text": "Once upon a time", "sampling_params": {"max_new_tokens": 40}, "stream": True},
    "tgi": {"inputs": "Once upon a time", "parameters": {"max_new_tokens": 40, "details": True}},
}

(*_PROMPTS, _CELL), _COMPONENTS = msgspec.json.schema_components(
    [SglangFields, TgiFields, CellView], ref_template="#/components/schemas/{name}"
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

PLACEMENT_OPENAPI: dict[str, Any] = {
    "responses": {
        "200": {"description": "The cell", "content": {"application/json": {"schema": _CELL}}},
        "503": {"description": "The router does not answer; `reason` says why"},
    }
}


class OctavoApi(FastAPI):
    """FastAPI that knows msgspec's schemas."""

    def openapi(self) -> dict[str, Any]:
        document = super().openapi()
        document.setdefault("components", {}).setdefault("schemas", {}).update(_COMPONENTS)
        return document
