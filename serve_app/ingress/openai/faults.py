"""Errors as OpenAI's server tells them: `{"error": {"message", "type", "param", "code"}}`."""

import msgspec

from serve_app.errors import OctavoError
from serve_app.ingress.client import EngineUnavailableError
from serve_app.ingress.faults import (
    AbortedError,
    BadInputError,
    BodyTooLargeError,
    RefusedError,
    TakenOverError,
    TimedOutError,
)

INVALID = "invalid_request_error"


class ModelNotFoundError(BadInputError):
    """Another model than the one that is served."""

    def __init__(self, asked: str, served: str) -> None:
        super().__init__("model", f"{asked[:200]!r} does not exist; this server has {served!r}")


class ErrorDetail(msgspec.Struct):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(msgspec.Struct):
    error: ErrorDetail


_REFUSALS = {"fair-share": "rate_limit_exceeded", "no-capacity": "service_unavailable"}  # reason -> type
_KINDS: tuple[tuple[type[OctavoError], tuple[int, str, str | None]], ...] = (  # the first that fits
    (ModelNotFoundError, (404, INVALID, "model_not_found")),
    (BodyTooLargeError, (413, INVALID, "request_too_large")),
    (BadInputError, (400, INVALID, None)),
    (EngineUnavailableError, (503, "service_unavailable", "engine_unavailable")),
    (TakenOverError, (409, "conflict", "taken_over")),
    (TimedOutError, (408, "timeout", "timeout")),
    (AbortedError, (499, "aborted", "aborted")),  # no 409: OpenAI's client tries those again
)


def fault(error: OctavoError) -> tuple[int, bytes]:
    """HTTP status and JSON body."""
    status, kind, code = _kind(error)
    param = error.field if isinstance(error, BadInputError) else None
    return status, msgspec.json.encode(ErrorBody(ErrorDetail(str(error), kind, param, code)))


def _kind(error: OctavoError) -> tuple[int, str, str | None]:
    """Status, type and code."""
    if isinstance(error, RefusedError):
        return error.status, _REFUSALS.get(error.reason, "overloaded"), error.reason
    return next((kind for known, kind in _KINDS if isinstance(error, known)), (500, "server_error", None))
