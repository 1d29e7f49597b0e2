"""/openapi.json: what FastAPI knows of the routes, the schemas, and what holds for all of them."""

from copy import deepcopy
from typing import Any

from fastapi import FastAPI

from serve_app.config import SloConfig
from serve_app.ingress.door import ModelInfo
from serve_app.ingress.guard import OPEN_PATHS
from serve_app.ingress.openai.faults import ErrorBody
from serve_app.ingress.openapi.problems import add_guards, merge_problem
from serve_app.ingress.openapi.schemas import Schema, components, schema_of
from serve_app.ingress.openapi.words import read_examples
from serve_app.ingress.terms import PRIORITY_HEADER, TTFT_HEADERS

DESCRIPTION = """\
A serving cluster for Mixture-of-Experts language models. `/generate` speaks SGLang's dialect and TGI's, `/v1/...`
OpenAI's, `/tokenize` and `/detokenize` vLLM's.

What is let in meets its objective for the time to the first token. What cannot meet it is refused at once, with a
`Retry-After` that is computed and a reason in `x-llm-d-request-dropped-reason`.

Where the server has a file of keys, all but the health pages and the metrics need one: `Authorization: Bearer KEY`.
`/admin/...` needs an admin's.
"""
_TAGS = [
    {"name": "generate", "description": "Text, in SGLang's dialect or TGI's"},
    {"name": "openai", "description": "Text, in OpenAI's dialect; and the tokenizer"},
    {"name": "health", "description": "For who watches the server: no key is needed"},
    {"name": "admin", "description": "For operators: an admin's key is needed"},
    {"name": "info", "description": "Metrics"},
]
_BEARER: Schema = {
    "type": "http",
    "scheme": "bearer",
    "description": "A key that `octavo key new` has made; not needed where the server has no file of keys",
}
_INVALID = "HTTPValidationError"  # FastAPI's own answer to a bad parameter: ours is another


class OctavoApi(FastAPI):
    """FastAPI that knows msgspec's schemas, and what stands before its routes."""

    def __init__(self, model: ModelInfo, slo: SloConfig, **options: Any) -> None:
        super().__init__(description=DESCRIPTION, openapi_tags=_TAGS, **options)
        self._model = model
        self._slo = slo

    def openapi(self) -> Schema:
        if self.openapi_schema is None:
            self.openapi_schema = _complete(deepcopy(super().openapi()), self._model, self._slo)
        return self.openapi_schema


def _complete(document: Schema, model: ModelInfo, slo: SloConfig) -> Schema:
    for path, methods in document["paths"].items():
        for operation in methods.values():
            _complete_operation(path, operation)
            _hold_to(slo, operation)
            for content in (operation.get("requestBody", {}), *operation["responses"].values()):
                read_examples(content)
    known = document.setdefault("components", {})
    known["securitySchemes"] = {"key": _BEARER}
    schemas = {**known.get("schemas", {}), **components(model)}
    known["schemas"] = {name: schema for name, schema in schemas.items() if name not in {_INVALID, "ValidationError"}}
    document["security"] = [{"key": []}, {}]
    return document


def _complete_operation(path: str, operation: Schema) -> None:
    responses = operation["responses"]
    if _INVALID in str(responses.get("422", "")):
        del responses["422"]
    statuses = [431, 500]
    if path in OPEN_PATHS:
        operation["security"] = []
    else:
        statuses += [401, 503]
    if path.startswith("/admin/"):
        statuses.append(403)
    if "requestBody" in operation:
        statuses.append(408)
    add_guards(path, responses, sorted(statuses), schema_of(ErrorBody))
    operation["responses"] = dict(sorted(responses.items()))


def _hold_to(slo: SloConfig, operation: Schema) -> None:
    """What the config says of headers, and of the status of a refusal."""
    for parameter in operation.get("parameters", ()):
        if parameter["name"] == PRIORITY_HEADER:
            parameter["schema"] = {"type": "string", "enum": sorted(slo.priorities), "default": slo.default_priority}
            parameter["example"] = slo.default_priority
        elif parameter["name"] in TTFT_HEADERS:
            least_ms, most_ms = slo.min_ttft_s * 1e3, slo.max_ttft_s * 1e3
            parameter["schema"] = {"type": "number", "minimum": least_ms, "maximum": most_ms}
            parameter["example"] = most_ms
    responses = operation["responses"]
    if slo.refusal_status != 429 and "429" in responses:
        merge_problem(responses, str(slo.refusal_status), responses.pop("429"))
