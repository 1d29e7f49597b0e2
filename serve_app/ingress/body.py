"""A request's body: read within a limit, decoded into a typed struct, its faults named by field."""

import json
import math
import re
from collections.abc import Iterator
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request

from serve_app.ingress.faults import BadInputError, BodyTooLargeError

T = TypeVar("T")

_AT_PATH = re.compile(r" - at `\$\.?(?P<path>.*)`$", re.DOTALL)
_UNKNOWN_FIELD = re.compile(r"Object contains unknown field `(?P<name>.*)`$", re.DOTALL)
_MAX_NAME_CHARS = 100  # of a client's own field names that are quoted back to it


async def read_body(request: Request, max_body_bytes: int) -> bytes:
    """The whole body. Raises BodyTooLargeError as soon as that is known: by content-length, or while reading."""
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared[:20]) > max_body_bytes:
        raise BodyTooLargeError(max_body_bytes)
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_body_bytes:
            raise BodyTooLargeError(max_body_bytes)
    return bytes(body)


def set_fields(body: bytes) -> set[str]:
    """Names of the top-level fields that are not null. Raises BadInputError when the body is no JSON object."""
    fields = decode(body, dict[str, msgspec.Raw])
    return {name for name, value in fields.items() if bytes(value) != b"null"}


def decode(body: bytes, into: type[T]) -> T:
    """Decode strictly: no unknown field, no other type, no NaN, no invalid Unicode. Raises BadInputError.

    The decoder stops at the first fault, so that what a refusal costs does not grow with the number of faults.
    """
    try:
        return msgspec.json.decode(body, type=into)
    except msgspec.ValidationError as error:
        raise _misfit(str(error)) from None
    except RecursionError:
        raise BadInputError("body", "nested too deeply") from None
    except ValueError as error:  # msgspec.DecodeError and UnicodeDecodeError
        raise _malformed(body, error) from None


def _misfit(message: str) -> BadInputError:
    at = _AT_PATH.search(message)
    path = at["path"] if at else ""
    problem = _AT_PATH.sub("", message)
    unknown = _UNKNOWN_FIELD.fullmatch(problem)
    if unknown:
        path, problem = f"{path}.{_printable(unknown['name'])}".lstrip("."), "unknown field"
    return BadInputError(path or "body", problem[:1].lower() + problem[1:])


def _malformed(body: bytes, error: ValueError) -> BadInputError:
    """Find the field of text that is not Unicode or a number that is not finite; else the JSON itself is broken."""
    try:
        fields = json.loads(body.decode("utf-8", errors="surrogateescape"))
    except (ValueError, RecursionError):
        return BadInputError("body", f"not valid JSON ({error})")
    for path, leaf in _leaves(fields):
        if isinstance(leaf, float) and not math.isfinite(leaf):
            return BadInputError(_printable(path), "not a finite number")
        if isinstance(leaf, str) and _has_surrogate(leaf):
            return BadInputError(_printable(path), "not valid Unicode (a stray byte or half of a surrogate pair)")
    return BadInputError("body", f"not valid JSON ({error})")


def _leaves(fields: Any) -> Iterator[tuple[str, Any]]:
    """Every name and every scalar below `fields`, depth first, each with its path."""
    stack: list[tuple[str, Any]] = [("body", fields)]
    while stack:
        path, value = stack.pop()
        if isinstance(value, dict):
            prefix = "" if path == "body" else f"{path}."
            for name in value:
                yield f"{prefix}{name}", name
            stack.extend((f"{prefix}{name}", item) for name, item in reversed(value.items()))
        elif isinstance(value, list):
            stack.extend((f"{path}[{i}]", value[i]) for i in reversed(range(len(value))))
        else:
            yield path, value


def _has_surrogate(text: str) -> bool:
    return any("\ud800" <= char <= "\udfff" for char in text)


def _printable(path: str) -> str:
    return path[:_MAX_NAME_CHARS].encode("utf-8", errors="replace").decode("utf-8")
