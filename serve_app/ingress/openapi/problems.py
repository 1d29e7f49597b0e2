"""What /openapi.json says of answers that are none: each example is what the server makes of such a fault."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import msgspec

from serve_app.errors import OctavoError
from serve_app.ingress import guard
from serve_app.ingress.client import EngineUnavailableError
from serve_app.ingress.faults import (
    AbortedError,
    BadInputError,
    BodyTooLargeError,
    GenerationError,
    RefusedError,
    TakenOverError,
    TimedOutError,
)
from serve_app.ingress.openapi.schemas import Schema, any_of, schema_of
from serve_app.ingress.openapi.words import RETRY_HEADERS, json_answer

Fault = Callable[[OctavoError], tuple[int, bytes]]


class FaultDetail(msgspec.Struct):
    message: str
    code: int  # the status
    type: str | msgspec.UnsetType = msgspec.UNSET
    field: str | msgspec.UnsetType = msgspec.UNSET  # that is to be changed


class FaultBody(msgspec.Struct):
    """What went wrong, as SGLang tells it."""

    error: FaultDetail


class TgiFaultBody(msgspec.Struct):
    """What went wrong, as TGI tells it."""

    error: str
    error_type: str
    field: str | msgspec.UnsetType = msgspec.UNSET


TEXTS = {
    400: "What is wrong with the request, and in which field",
    401: "A key is needed, or this one is not known",
    403: "This needs an admin's key",
    404: "There is nothing of this name",
    408: "The body has not come in time; in OpenAI's dialect also: the answer was not finished in time",
    409: "Another connection or somebody else has taken or ended the request",
    413: "The body is too large",
    422: "What is wrong with the request, and in which field",
    424: "The answer could not be finished",
    429: "Not let in now. The status is what `slo.refusal_status` in the config says: 429, if nothing",
    431: "Too many header fields, or too many bytes of them",
    499: "Somebody ended the request by its name",
    500: "A fault of the server's own",
    503: "No engine answers, or the server is draining, or it has no room for another connection",
    504: "The answer was not finished within the time that `x-request-timeout-ms` allows",
}
LOOK_UP_ERRORS: tuple[OctavoError, ...] = (
    BadInputError("tokens", "token 70000 is outside the vocabulary of 32000"),
    BodyTooLargeError(2 << 20),
)
GENERATE_ERRORS: tuple[OctavoError, ...] = (
    BadInputError("temperature", "must be in [0, 100], not 101"),
    BodyTooLargeError(2 << 20),
    RefusedError("ttft", "the first token would come after 12.1 s; the objective is 10 s", 3.0),
    RefusedError("draining", "the server is draining", 0.0),
    EngineUnavailableError("the engine is being replaced"),
    TakenOverError("taken over by a newer connection"),
    AbortedError("the request was aborted"),
    GenerationError("the engine ended the answer before it was finished"),
    TimedOutError(30.0),
)
_GUARDS: dict[int, tuple[str, str]] = {
    401: ("a key is needed: Authorization: Bearer ...", "Unauthorized"),
    403: ("this needs an admin's key", "Forbidden"),
    408: ("the body has not come in time", "RequestTimeout"),
    431: ("120 header fields; the limit is 100", "RequestHeaderFieldsTooLarge"),
    500: ("internal error", "InternalServerError"),
    503: ("2000 requests are open, as many as may be", "ServiceUnavailable"),
}
_CHALLENGE: Schema = {"www-authenticate": {"description": "`Bearer`", "schema": {"type": "string"}}}
_HEADERS = {401: _CHALLENGE, 429: RETRY_HEADERS, 503: RETRY_HEADERS}


def problem(status: int, schema: Schema, examples: Mapping[str, Any], text: str = "") -> Schema:
    return json_answer(text or TEXTS[status], schema, examples, _HEADERS.get(status))


def problems(dialects: Mapping[str, tuple[Fault, Schema]], errors: Sequence[OctavoError]) -> dict[str, Schema]:
    """The responses that these dialects make of these errors. A dialect is its function and its schema."""
    told: dict[int, tuple[list[Schema], dict[str, Any]]] = {}
    for name, (fault, schema) in dialects.items():
        for error in errors:
            status, body = fault(error)
            schemas, examples = told.setdefault(status, ([], {}))
            schemas.append(schema)
            examples[_name_of(error) if len(dialects) == 1 else f"{name}, {_name_of(error)}"] = msgspec.json.decode(
                body
            )
    return {str(status): problem(status, any_of(schemas), examples) for status, (schemas, examples) in told.items()}


def fault_answers(told: Mapping[int, tuple[str, str]], **texts: str) -> dict[str, Schema]:
    """Responses in SGLang's shape: by status the message and the type of an example. `on_404` is another text."""
    return {
        str(status): problem(
            status,
            schema_of(FaultBody),
            {kind: {"error": {"message": message, "type": kind, "code": status}}},
            texts.get(f"on_{status}", ""),
        )
        for status, (message, kind) in told.items()
    }


def add_guards(path: str, responses: dict[str, Schema], statuses: Iterable[int], openai: Schema) -> None:
    """What is answered before any route is reached; `openai` is the schema of such an answer under `/v1/`."""
    schema = openai if path.startswith("/v1/") else schema_of(FaultBody)
    for status in statuses:
        message, kind = _GUARDS[status]
        example = msgspec.json.decode(guard.fault(path, status, message, kind))
        merge_problem(responses, str(status), problem(status, schema, {"before the route": example}))


def merge_problem(responses: dict[str, Schema], status: str, added: Schema) -> None:
    """Let an answer of this status be also that."""
    known = responses.setdefault(status, added)
    if known is added:
        return
    content, more = known["content"]["application/json"], added["content"]["application/json"]
    content["schema"] = any_of([content["schema"], more["schema"]])
    content["examples"] = {**content["examples"], **more["examples"]}
    if "headers" in added:
        known["headers"] = {**added["headers"], **known.get("headers", {})}


def _name_of(error: OctavoError) -> str:
    return error.reason if isinstance(error, RefusedError) else type(error).__name__.removesuffix("Error")
