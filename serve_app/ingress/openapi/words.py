"""The words of /openapi.json: bodies, answers, event streams, headers."""

from collections.abc import Mapping
from typing import Any

import msgspec

from serve_app.ingress.openapi.schemas import Schema
from serve_app.ingress.terms import LATE_HEADER, MAX_TIMEOUT_MS, PRIORITY_HEADER, TIMEOUT_HEADER, TTFT_HEADERS

NAME_HEADER: Schema = {
    "x-request-id": {
        "description": "The name of the request: the client's, or one that was made for it",
        "schema": {"type": "string"},
    }
}
RETRY_HEADERS: Schema = {
    "Retry-After": {
        "description": "Seconds after which it would be let in; absent where it never would be",
        "schema": {"type": "integer", "minimum": 1},
    },
    "retry-after-ms": {
        "description": "The same in milliseconds, for clients that look for it",
        "schema": {"type": "integer", "minimum": 1},
    },
    "x-llm-d-request-dropped-reason": {
        "description": "Why it was not let in, in a word: `ttft`, `queue-full`, `fair-share`, `draining`, ...",
        "schema": {"type": "string"},
    },
}


def _header(name: str, description: str, schema: Schema, example: str | int) -> Schema:
    return {"name": name, "in": "header", "description": description, "schema": schema, "example": example}


GENERATE_PARAMETERS: list[Schema] = [
    _header(
        "x-request-id",
        "The client's name for the request, where its body has none. It is what a broken stream is resumed by",
        {"type": "string", "maxLength": 256},
        "my-request-1",
    ),
    _header(
        "Last-Event-ID",
        "Go on with a stream: the id of the last event that came. The body and the name must be the same as before",
        {"type": "string"},
        "",
    ),
    _header(
        TTFT_HEADERS[0],
        "Until the first token, in milliseconds: the request is refused where that cannot be kept. "
        f"`{TTFT_HEADERS[1]}` is the same",
        {"type": "number", "exclusiveMinimum": 0},
        8000,
    ),
    _header(PRIORITY_HEADER, "The class of the request, one of those in the config", {"type": "string"}, "normal"),
    _header(
        LATE_HEADER,
        "What becomes of an admitted request whose first token will be late: it is served last, or dropped",
        {"type": "string", "enum": ["serve", "drop"]},
        "serve",
    ),
    _header(
        TIMEOUT_HEADER,
        "The answer is of no use after so many milliseconds",
        {"type": "number", "minimum": 1, "maximum": MAX_TIMEOUT_MS},
        600_000,
    ),
]


def examples_of(values: Mapping[str, Any]) -> Schema:
    """As JSON texts, until `read_examples` makes values of them: FastAPI drops the nulls in what it is given."""
    return {name: {"value": msgspec.json.encode(value).decode()} for name, value in values.items()}


def read_examples(answer: Schema) -> None:
    """Of a request body or an answer."""
    for content in answer.get("content", {}).values():
        for example in content.get("examples", {}).values():
            example["value"] = msgspec.json.decode(example["value"])


def request_body(schema: Schema, examples: Mapping[str, Any]) -> Schema:
    return {"required": True, "content": {"application/json": {"schema": schema, "examples": examples_of(examples)}}}


def json_answer(text: str, schema: Schema, examples: Mapping[str, Any], headers: Schema | None = None) -> Schema:
    answer: Schema = {
        "description": text,
        "content": {"application/json": {"schema": schema, "examples": examples_of(examples)}},
    }
    return answer | ({"headers": headers} if headers else {})


def event_stream(text: str, events: Schema, examples: Mapping[str, str]) -> Schema:
    """What an answer's `content` says of a stream of server-sent events: as usual before OpenAPI 3.2, of each event."""
    json = {"type": "string", "contentMediaType": "application/json", "contentSchema": events}
    event = {
        "type": "object",
        "description": text,
        "properties": {
            "id": {"type": "string", "description": "How many tokens of each sequence are told by now"},
            "data": {"anyOf": [{"const": "[DONE]"}, json]},
        },
        "required": ["data"],
    }
    return {"text/event-stream": {"schema": event, "examples": examples_of(examples)}}
