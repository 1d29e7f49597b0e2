"""What /openapi.json says of the body of `/generate`, taken from the structs that decode it."""

from typing import Any

import msgspec
from fastapi import FastAPI

from serve_app.ingress.sglang import SglangFields
from serve_app.ingress.tgi import TgiFields

_EXAMPLES: dict[str, Any] = {
    "chat": {
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "sampling_params": {"max_new_tokens": 40, "temperature": 0},
    },
    "sglang": {"text": "Once upon a time", "sampling_params": {"max_new_tokens": 40}, "stream": True},
    "tgi": {"inputs": "Once upon a time", "parameters": {"max_new_tokens": 40, "details": True}},
}

_ROOTS, _COMPONENTS = msgspec.json.schema_components(
    [SglangFields, TgiFields], ref_template="#/components/schemas/{name}"
)

GENERATE_OPENAPI: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {"anyOf": list(_ROOTS)},
                "examples": {name: {"value": body} for name, body in _EXAMPLES.items()},
            }
        },
    }
}


class OctavoApi(FastAPI):
    """FastAPI that knows msgspec's schemas."""

    def openapi(self) -> dict[str, Any]:
        document = super().openapi()
        document.setdefault("components", {}).setdefault("schemas", {}).update(_COMPONENTS)
        return document
